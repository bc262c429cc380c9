"""transformers' Trainer around the distiller: global normalisation, metrics, exact resume.

What differs from the stock Trainer: the loader is ours (order and position are one counter), a
step's rows are counted over all ranks before it runs, the loss is divided by that count, metrics
are kept by source, and what is saved is the student alone, in its own format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ldistill.checkpoint import universal
from ldistill.checkpoint.saver import LATEST, Saver
from ldistill.common import ranks
from ldistill.common.errors import (
    TransientError,
    ignore_dead_workers,
    may_pass,
    worker_died,
    writing,
)
from ldistill.data.collate import to_device
from ldistill.distill.distiller import Distiller
from ldistill.models.flops import count_step, student_flops
from ldistill.models.lora import WeightUpdates, weight_updates
from ldistill.models.pair import Pair
from ldistill.models.weights import gather_trained
from ldistill.training.callbacks import ShortProgress
from ldistill.training.metrics import Meter, of_sources
from ldistill.training.optimizer import (
    Rates,
    hold_options,
    parameter_groups,
    part_step_counters,
)
from ldistill.training.sample_log import SampleLog
from ldistill.training.stopping import StopAtStep, StopRequest
from ldistill.training.validation import Best, Validation

STUDENT = "student"
DATA_STATE = "data.json"
WEIGHTS = "trained.safetensors"


class DistillTrainer(Trainer):
    """Trains a :class:`Distiller`.

    Args:
        distiller: the module to train.
        args: transformers' arguments; ``max_steps`` must be set.
        pair: for export: where the student came from.
        loader: ``(start_pack=...) -> DataLoader`` of this rank's micro-batches, without end.
        meter: collects metrics.
        rates: learning rates of what trains.
        health_steps: interval of the teacher's own-memory accuracy; 0 for never.
        saver: writes the checkpoints.
        resume: checkpoint folder to continue from.
        validation: documents whose CE and KD are told every ``args.eval_steps``.
        evaluator: ``(step, weight updates) -> scores``, as often.
        best: what tells the best evaluation; its state is always saved.
        stop: how the run may be asked to stop; default by signal and by the environment's file.
        converted: ``resume`` is in DeepSpeed's universal format (see `universal.py`).
        sample_log: notes which samples each step trains on.
    """

    progress: ShortProgress
    """What is shown of the training; whoever starts it closes it."""

    def __init__(
        self,
        distiller: Distiller,
        args: TrainingArguments,
        *,
        pair: Pair,
        loader: Any,
        meter: Meter,
        rates: Rates,
        saver: Saver,
        health_steps: int = 0,
        resume: Path | None = None,
        validation: Validation | None = None,
        evaluator: Callable[[int, WeightUpdates], dict[str, float]] | None = None,
        best: Best | None = None,
        stop: StopRequest | None = None,
        converted: bool = False,
        sample_log: SampleLog | None = None,
        **kwargs: Any,
    ) -> None:
        args.ignore_data_skip = True  # the loader itself starts at the right pack
        args.logging_nan_inf_filter = False  # it hides what must stop the run, and synchronises
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        args.eval_strategy = IntervalStrategy.NO  # else the Trainer wants a data set for it
        super().__init__(model=distiller, args=args, **kwargs)
        self._validation, self._evaluator, self.best = validation, evaluator, best
        if evaluator is not None or validation is not None:
            args.eval_strategy = IntervalStrategy.STEPS
        # Our loss is already normalised over the global batch: never divide by accumulation again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.distiller, self.pair, self.meter = distiller, pair, meter
        self._make_loader, self._rates, self._health_steps = loader, rates, health_steps
        self.stop = stop or StopRequest()
        self.add_callback(StopAtStep(self.stop))
        self._saver, self.resume, self._converted = saver, resume, converted
        self._began, self._sample_log = False, sample_log
        if sample_log is not None:
            self.add_callback(sample_log)
        self._data_state = _read_data_state(resume)
        self._first_pack, self._first_step = self._data_state["packs"], self._data_state["step"]
        self._finite = torch.ones((), device=args.device)
        self._finite_sources = torch.ones(len(distiller.weights.names), device=args.device)

    # ---- data ----

    @property
    def packs_per_step(self) -> int:
        """Packs of the global batch."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    @property
    def packs_done(self) -> int:
        """The data's whole state: packs consumed by all ranks since the run began."""
        return self._first_pack + (self.state.global_step - self._first_step) * self.packs_per_step

    def get_train_dataloader(self) -> Any:
        """Micro-batches of this rank, from the pack where the run stands."""
        return self._make_loader(start_pack=self._first_pack)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int | None]:
        """The step's micro-batches with their rows planned and counted over all ranks."""
        if not self._began:
            self._begin()
        batches, problem = _read(epoch_iterator, num_batches)
        problem = self._saver.log_problem or problem
        plans = [self.distiller.supervise(batch) for batch in batches]
        total, run_teacher = self._agree(plans, num_batches, problem)
        health = self._health_steps and self.state.global_step % self._health_steps == 0
        samples = []
        for index, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
            counts = count_step(self.distiller.student, batch, plan)
            flops = student_flops(self.distiller.student, counts, self.distiller.kv_scope)
            self.meter.add_batch(batch, counts, flops)
            if self._sample_log is not None:
                self._sample_log.add(batch)
            inputs = {
                "batch": {k: v for k, v in batch.items() if isinstance(v, Tensor)},
                "supervision": plan,
                "total": total,
                "run_teacher": run_teacher[index],
            }
            if health and index == 0 and run_teacher[index]:
                inputs["own_queries"] = self.distiller.own_queries(batch, plan)
            samples.append(inputs)
        return samples, None

    def _begin(self) -> None:
        """What is restored, or let go, when everything is set up, before the first batch."""
        self._began = True
        self.meter.start()
        if self.resume is None:
            return
        self.state.compute_steps(self.args, self.args.max_steps)  # else those of the checkpoint
        self._load_rng_state(str(self.resume))  # the Trainer does when it skips batches itself
        states = self._data_state["ranks"]
        same = len(states) == self.args.world_size
        mine = states[self.args.process_index :: self.args.world_size]
        for state in mine:
            self.meter.restore(state["meter"])
        losses = [state["loss"] for state in (mine if same else states)]
        self._tr_loss += sum(losses) / len(losses)
        self._globalstep_last_logged = states[0]["logged"]
        if self._converted:
            ranks.wait()
            ranks.from_first(lambda: universal.discard(self._saver.folder))

    def _agree(
        self, plans: list[Any], num_batches: int, problem: Exception | None
    ) -> tuple[float, list[bool]]:
        """One reduction a step: rows of the batch, who teaches, is all finite, readable, to stop?

        What one rank alone could not read stops all of them here, instead of leaving the others in
        a collective.
        """
        own = [len(plan.queries) for plan in plans] or [0] * num_batches
        flags = [self.stop.asked, problem is not None]
        counts = [*map(float, flags), sum(len(p.targets) for p in plans), *own]
        vector = torch.tensor(counts, dtype=torch.float64, device=self.args.device)
        vector = torch.cat([vector, 1 - self._finite.double()[None]])
        asked, unread, total, *teachers, broken = ranks.sum_over(vector).tolist()
        self.stop.agreed |= asked > 0
        if broken:
            self._stop_not_finite()
        if unread:
            self._stop_unreadable(problem)
        teacher = self.distiller.teacher
        collective = teacher is not None and teacher.collective
        return max(total, 1.0), [t > 0 for t in (teachers if collective else own)]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = self.args.device
        batch = to_device(inputs["batch"], device)
        moved = {k: inputs[k].to(device) for k in ("supervision", "own_queries") if k in inputs}
        return inputs | {"batch": batch} | moved

    # ---- loss ----

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """This micro-batch's share of the global loss, times the ranks that will average it."""
        own = inputs.pop("own_queries", None)
        if own is not None:
            judged = self.distiller.teacher_alone(inputs["batch"], inputs["supervision"], own)
            self.meter.health += judged
        outputs = model(**inputs)
        self.meter.add_sums(outputs["metrics"])
        self._finite *= torch.isfinite(outputs["loss"].detach()).float()
        self._finite_sources *= torch.isfinite(outputs["metrics"]).all(1).float()
        return outputs["loss"] * self.args.world_size

    def _stop_not_finite(self) -> None:
        names = self.distiller.weights.names
        broken = (self._finite_sources == 0).nonzero().flatten().tolist()
        found = ranks.gather([names[i] for i in broken])
        sources = sorted({name for part in found for name in part})
        error = FloatingPointError(
            f"the loss of step {self.state.global_step} is not finite (sources: "
            f"{', '.join(sources) or 'unknown'}). Nothing was saved since; the last checkpoint is "
            "good. Lower the learning rate, or go on from it with --log_samples true and look at "
            "what that step read."
        )
        raise ranks.shared(error)

    def _stop_unreadable(self, problem: Exception | None) -> None:
        """Raise, on every rank, what one of them could not read; rather what must be mended."""
        own = None if problem is None else (str(problem), may_pass(problem))
        found = [(rank, *said) for rank, said in enumerate(ranks.gather(own)) if said is not None]
        rank, text, passing = min(found, key=lambda one: one[2])
        told = f"{text} (step {self.state.global_step + 1}, rank {rank}). Nothing was trained on it"
        again = "go on with --resume_from_checkpoint auto"
        if passing:
            raise ranks.shared(TransientError(f"{told}: {again}.")) from problem
        raise ranks.shared(
            ValueError(
                f"{told}: mend the shards (`ldistill shards verify` names all that is damaged) and "
                f"{again}, or let bad samples be dropped and counted with --on_bad_sample drop."
            )
        )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Counted by the meter instead."""
        return 0

    # ---- optimizer, logs, checkpoints ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """``--optim`` with one rate for the projector and one for the decoder."""
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(self.pair.student, self._rates, self.args.weight_decay)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.resume is not None:
            self._restore_groups()
        return prepared

    def _restore_groups(self) -> None:
        groups = parameter_groups(self.pair.student, self._rates, self.args.weight_decay)
        _, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        hold_options(self.optimizer, self.lr_scheduler, groups, options)
        if self._converted:
            part_step_counters(self.optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meter gathered to the logged loss."""
        if "loss" in logs:
            gathered = self.meter.flush()
            gathered.pop("loss", None)  # the Trainer's own: the mean over steps of the global loss
            logs = logs | gathered
        # The Trainer counts from the restart; its "epoch" is the share of the run that is done.
        self.state.epoch = self.state.global_step / self.args.max_steps
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """CE, KD and scores of the student as it stands, logged as ``eval_...``.

        Training time stands still. Every rank must call it (the Trainer does).
        """
        logs: dict[str, float] = {}
        with self.meter.paused():
            if self._validation is not None:
                logs |= self._log_evaluation(self._validate())
            if self.control.should_save:  # an evaluation by a suite may outlast the time left
                self._save_now()
            if self._evaluator is not None:
                trained = gather_trained(self.pair.student, keep=ranks.is_first())
                updates = weight_updates(self.pair.student, trained)
                logs |= self._log_evaluation(self._evaluator(self.state.global_step, updates))
                if self.control.should_save:
                    self._save_now()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _log_evaluation(self, scores: dict[str, float]) -> dict[str, float]:
        """Log scores; the best so far is to be saved, and so are those after it."""
        logs = {f"eval_{name}": value for name, value in scores.items()}
        self.log(dict(logs))
        step = self.state.global_step
        if self.best is not None and self.best.metric in logs and step:
            best = ranks.from_first(lambda: self.best.find(step))
            there = ranks.from_first((self._saver.folder / f"checkpoint-{step}").is_dir)
            self.control.should_save |= best is not None and best[0] == step and not there
        return logs

    def _save_now(self) -> None:
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _validate(self) -> dict[str, float]:
        sums = torch.zeros_like(self.meter.sums, dtype=torch.float64)
        self.model_wrapped.eval()
        # Alone, without its parts: text alone runs the vision tower too, as all ranks must.
        self.distiller.student.training = True
        with torch.no_grad():
            batches = iter(self._validation.batches())
            for _ in range(self._validation.passes):
                read, problem = _read(batches, 1)
                plans = [self.distiller.supervise(batch) for batch in read]
                total, run_teacher = self._agree(plans, 1, problem)
                inputs = {"batch": {k: v for k, v in read[0].items() if isinstance(v, Tensor)}}
                inputs |= {"supervision": plans[0], "total": total, "run_teacher": run_teacher[0]}
                sums += self.model_wrapped(**self._prepare_inputs(inputs))["metrics"]
        self.model_wrapped.train()
        return of_sources(ranks.sum_over(sums).cpu(), self.distiller.weights)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return False  # `best` tells

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if ranks.sum_over(1 - self._finite).item():
            self._stop_not_finite()
        write = super()._save_checkpoint
        self._saver.save(self.state.global_step, lambda: write(model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saver.root)  # checkpoints are written aside, then renamed

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self._saver.guard(self.model_wrapped)
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save:
            [parts] = Path(output_dir).glob("global_step*")
            (Path(output_dir) / LATEST).write_text(parts.name, encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student in its own format, trained weights in full precision, the data's state."""
        folder = Path(output_dir or self.args.output_dir)
        trained = gather_trained(self.pair.student, keep=ranks.is_first())
        broken = [name for name, tensor in trained.items() if not tensor.isfinite().all()]
        if broken := [name for names in ranks.gather(broken) for name in names]:
            error = FloatingPointError(
                f"weights are not finite after step {self.state.global_step} ({broken[0]} and "
                f"{len(broken) - 1} more), so nothing was saved; the last checkpoint is good. "
                "Lower the learning rate."
            )
            raise ranks.shared(error)
        state = {"packs": self.packs_done, "step": self.state.global_step}
        state["ranks"] = ranks.gather(self._rank_state())

        def write() -> None:
            with self._saver.attempt() if _internal_call else writing(folder):
                self._write_student(folder, trained)
                (folder / DATA_STATE).write_text(json.dumps(state), encoding="utf-8")

        ranks.from_first(write)

    def sync_logs(self) -> None:
        """Make what this rank logged durable; raises TransientError if some of it is missing."""
        self._saver.sync_logs()

    def _rank_state(self) -> dict[str, Any]:
        """What this rank has counted since the last logged step."""
        loss, logged = float(self._tr_loss), self._globalstep_last_logged
        return {"meter": self.meter.state(), "loss": loss, "logged": logged}

    def _write_student(self, folder: Path, trained: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.pair.export(trained, folder / STUDENT)
        if not self.is_deepspeed_enabled:
            once = {id(tensor): name for name, tensor in trained.items()}  # a tied pair once
            save_file({name: trained[name] for name in once.values()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        self.pair.student.load_state_dict(weights, strict=False)  # the rest was never trained


def _read(iterator: Iterator, count: int) -> tuple[list[Any], Exception | None]:
    """A step's micro-batches, or why there are none: an error whose text is a sentence."""
    try:
        return [next(iterator) for _ in range(count)], None
    except (ConnectionError, EOFError, RuntimeError) as error:  # of a worker, or of its queue
        ignore_dead_workers()
        lost = TransientError(f"a data worker failed ({type(error).__name__}: {error})")
        lost.__cause__ = error  # LDISTILL_DEBUG shows where
        return [], worker_died(error) or lost
    except (ValueError, OSError) as error:
        return [], error


def _read_data_state(resume: Path | None) -> dict[str, Any]:
    if resume is None:
        return {"packs": 0, "step": 0, "ranks": []}
    path = resume / DATA_STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"{resume} holds no {DATA_STATE}: not a checkpoint of this program."
        )
    return json.loads(path.read_text(encoding="utf-8"))
