"""transformers' Trainer around the distiller: global normalisation, metrics, exact resume.

What differs from the stock Trainer, and all that it overrides: the loader is ours (order and
position are one counter), a step's rows are counted over all ranks before it runs, the loss is
divided by that count, metrics are kept by source, and what is saved is the student alone, in its
own format.

One reduction a step tells all ranks its rows, who teaches, whether all was finite and readable, and
whether to stop: what one rank alone could not read stops all of them there, instead of leaving the
others in a collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.integrations import WandbCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from ldistill.checkpoint.folder import ADAPTED, remove
from ldistill.checkpoint.resuming import Start
from ldistill.checkpoint.saver import Saver
from ldistill.common import ranks
from ldistill.common.errors import TransientError, may_pass, worker_died, writing
from ldistill.common.run_files import STUDENT
from ldistill.data.collate import to_device
from ldistill.distill.distiller import Distiller
from ldistill.models.flops import count_step, student_flops
from ldistill.models.lora import WeightUpdates, weight_updates
from ldistill.models.pair import Pair
from ldistill.models.weights import gather_trained
from ldistill.training.callbacks import PatientWandb, SampleLog, ShortProgress, WriteMetrics
from ldistill.training.metrics import Meter, of_sources
from ldistill.training.optimizer import Rates, hold_options, parameter_groups
from ldistill.training.stopping import StopRequest
from ldistill.training.validation import Best, Validation

DATA_STATE = "data.json"
WEIGHTS = "trained.safetensors"


@dataclass
class Parts:
    """What a run trains with, beside transformers' arguments."""

    distiller: Distiller
    pair: Pair  # whose format an export has
    load: Callable[..., Any]  # (start_pack=...) -> this rank's micro-batches, without end
    rates: Rates
    meter: Meter
    metrics: WriteMetrics
    progress: ShortProgress
    saver: Saver
    start: Start
    stop: StopRequest
    validation: Validation | None = None  # evaluates every eval_steps, as the next one does
    evaluator: Callable[[int, WeightUpdates], dict[str, float]] | None = None  # of step, weights
    best: Best | None = None  # tells the best evaluation, whose state is always saved
    samples: SampleLog | None = None
    health_steps: int = 0  # interval of the teacher's own-memory accuracy; 0: never


class DistillTrainer(Trainer):
    """Trains the parts of a run; ``max_steps`` of the arguments must be set."""

    def __init__(self, args: TrainingArguments, parts: Parts) -> None:
        args.ignore_data_skip = True  # the loader itself starts at the right pack
        args.logging_nan_inf_filter = False  # it hides what must stop the run, and synchronises
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        args.eval_strategy = IntervalStrategy.NO  # else the Trainer wants a data set for it
        super().__init__(model=parts.distiller, args=args)
        if parts.evaluator is not None or parts.validation is not None:
            args.eval_strategy = IntervalStrategy.STEPS
        # Our loss is already normalised over the global batch: never divide by accumulation again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.parts, self.distiller = parts, parts.distiller
        # [1 + sources]: whether everything was finite so far, the loss before what each source has.
        self._finite = torch.ones(1 + len(self.distiller.weights.names), device=args.device)
        self._begun: dict[str, Any] = {"packs": 0, "step": 0, "ranks": []}
        if (checkpoint := parts.start.checkpoint) is not None:
            self._begun = json.loads((checkpoint / DATA_STATE).read_text(encoding="utf-8"))
        self._restored = False
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        progress = None if args.disable_tqdm else parts.progress
        patient = self.pop_callback(WandbCallback) and PatientWandb
        for callback in (parts.stop, parts.samples, progress, parts.metrics, patient):
            if callback is not None:
                self.add_callback(callback)

    # ---- data ----

    def get_train_dataloader(self) -> Any:
        """Micro-batches of this rank, from the pack where the run stands."""
        return self.parts.load(start_pack=self._begun["packs"])

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int | None]:
        """The step's micro-batches with their rows planned and counted over all ranks."""
        if not self._restored:
            self._restore()
        parts, step, student = self.parts, self.state.global_step, self.distiller.student
        problem = next((log.problem for log in parts.saver.logs if log.problem), None)
        read = self._read(epoch_iterator, num_batches, problem)
        for inputs in read:
            batch = inputs["batch"]
            counts = count_step(student, batch, inputs["supervision"])
            flops = student_flops(student, counts, self.distiller.kv_scope)
            parts.meter.add_batch(batch, counts, flops)
            if parts.samples is not None:
                parts.samples.add(batch)
        first = read[0]
        if parts.health_steps and step % parts.health_steps == 0 and first["run_teacher"]:
            asked = first["batch"], first["supervision"]
            first["own_queries"] = self.distiller.own_queries(*asked)
        return read, None

    def _read(
        self, batches: Iterator, count: int, problem: Exception | None = None
    ) -> list[dict[str, Any]]:
        """So many micro-batches, each as what :meth:`Distiller.forward` takes.

        ``problem`` is what has failed on this rank already. Raises FloatingPointError, ValueError
        or TransientError on every rank, for what one of them met.
        """
        read, distiller, stop = [], self.distiller, self.parts.stop
        try:
            read = [next(batches) for _ in range(count)]
        except (ConnectionError, EOFError, RuntimeError) as error:  # of a worker, or of its queue
            lost = TransientError(f"a data worker failed ({type(error).__name__}: {error})")
            lost = worker_died(error) or lost
            lost.__cause__ = error  # LDISTILL_DEBUG shows where
            problem = problem or lost
        except (ValueError, OSError) as error:
            problem = problem or error
        plans = [distiller.supervise(batch) for batch in read]
        own = [len(plan.queries) for plan in plans] or [0] * count
        rows = sum(len(plan.targets) for plan in plans)
        counts = [bool(stop.asked), problem is not None, rows, *own]
        vector = torch.tensor(counts, dtype=torch.float64, device=self.args.device)
        vector = torch.cat([vector, 1 - self._finite[:1].double()])
        stops, unread, total, *teachers, broken = ranks.sum_over(vector).tolist()
        stop.agreed |= stops > 0
        if broken:
            self._check_finite()
        if unread:
            self._stop_unreadable(problem)
        teacher = distiller.teacher
        taught = teachers if teacher is not None and teacher.collective else own
        return [
            {"batch": batch, "supervision": plan, "total": max(total, 1.0), "run_teacher": n > 0}
            for batch, plan, n in zip(read, plans, taught, strict=True)
        ]

    def _stop_unreadable(self, problem: Exception | None) -> None:
        """Raise, on every rank, what one of them could not read; rather what must be mended."""

        def told(found: dict[int, tuple[str, bool]]) -> Exception:
            rank, (text, passing) = min(found.items(), key=lambda one: one[1][1])
            step = self.state.global_step + 1
            what = f"{text} (step {step}, rank {rank}). Nothing was trained on it"
            again = "go on with --resume_from_checkpoint auto"
            error: Exception = ValueError(
                f"{what}: mend the shards (`ldistill shards verify` names all that is damaged) and "
                f"{again}, or let bad samples be dropped and counted with --on_bad_sample drop."
            )
            if passing:
                error = TransientError(f"{what}: {again}.")
            error.__cause__ = problem
            return error

        ranks.relay(problem and (str(problem), may_pass(problem)), told)

    def _check_finite(self) -> None:
        """Raise FloatingPointError on every rank, when the loss of one was not finite."""
        loss, *sources = self._finite.tolist()
        names = [n for n, fine in zip(self.distiller.weights.names, sources) if not fine]

        def told(found: dict[int, list[str]]) -> FloatingPointError:
            return FloatingPointError(
                f"the loss of step {self.state.global_step} is not finite (sources: "
                f"{', '.join(sorted(set().union(*found.values())))}). Nothing was saved since; the "
                "last checkpoint is good. Lower the learning rate, or go on from it with "
                "--log_samples true and look at what that step read."
            )

        ranks.relay(None if loss else names or ["unknown"], told)

    def _restore(self) -> None:
        """What is restored, or let go, when everything is set up, before the first batch."""
        self._restored = True
        self.parts.meter.start()
        if self.parts.start.checkpoint is None:
            return
        self.state.compute_steps(self.args, self.args.max_steps)  # else those of the checkpoint
        # The Trainer does when it skips batches itself.
        self._load_rng_state(str(self.parts.start.checkpoint))
        states = self._begun["ranks"]
        mine = states[self.args.process_index :: self.args.world_size]
        for state in mine:
            self.parts.meter.restore(state["meter"])
        same = len(states) == self.args.world_size
        losses = [state["loss"] for state in (mine if same else states)]
        self._tr_loss += sum(losses) / len(losses)
        self._globalstep_last_logged = states[0]["logged"]
        if self.parts.start.converted:
            ranks.wait()
            ranks.from_first(lambda: remove(self.parts.saver.folder / ADAPTED))

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
            self.parts.meter.health += judged
        outputs = model(**inputs)
        self.parts.meter.add_sums(outputs["metrics"])
        finite = [outputs["loss"].detach()[None], outputs["metrics"].sum(1)]
        self._finite *= torch.isfinite(torch.cat(finite)).float()  # no synchronisation
        return outputs["loss"] * self.args.world_size

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Counted by the meter instead."""
        return 0

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """``--optim`` with one rate for the projector and one for the decoder."""
        if self.optimizer is None:
            cls, groups, options = self._optimizer_of_run()
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _optimizer_of_run(self) -> tuple[type, list[dict[str, Any]], dict[str, Any]]:
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rates, decay = self.parts.rates, self.args.weight_decay
        return cls, parameter_groups(self.distiller.student, rates, decay), options

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.parts.start.checkpoint is not None:
            _, groups, options = self._optimizer_of_run()
            hold_options(self.optimizer, self.lr_scheduler, groups, options)
            # DeepSpeed's universal format makes all steps one tensor, which each would count up.
            for state in self.optimizer.state.values() if self.parts.start.converted else ():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].clone()
        return prepared

    # ---- logs and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meter gathered to the logged loss."""
        if "loss" in logs:
            gathered = self.parts.meter.flush()
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
        with self.parts.meter.paused():
            if self.parts.validation is not None:
                logs |= self._log_evaluation(self._validate())
            self._save_if_due()  # an evaluation by a suite may outlast the time left
            if self.parts.evaluator is not None:
                trained = gather_trained(self.distiller.student, keep=ranks.is_first())
                updates = weight_updates(self.distiller.student, trained)
                evaluate = partial(self.parts.evaluator, self.state.global_step, updates)
                logs |= self._log_evaluation(ranks.from_first(evaluate))
                self._save_if_due()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _log_evaluation(self, scores: dict[str, float]) -> dict[str, float]:
        """Log scores; the best so far is to be saved."""
        logs = {f"eval_{name}": value for name, value in scores.items()}
        self.log(dict(logs))
        step, best = self.state.global_step, self.parts.best
        if best is not None and best.metric in logs and step:
            found = ranks.from_first(lambda: best.find(step))
            there = ranks.from_first((self.parts.saver.folder / f"checkpoint-{step}").is_dir)
            self.control.should_save |= found is not None and found[0] == step and not there
        return logs

    def _save_if_due(self) -> None:
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _validate(self) -> dict[str, float]:
        sums = torch.zeros_like(self.parts.meter.sums, dtype=torch.float64)
        self.model_wrapped.eval()
        # Alone, without its parts: text alone runs the vision tower too, as all ranks must.
        self.distiller.student.training = True
        with torch.no_grad():
            batches = iter(self.parts.validation.batches())
            for _ in range(self.parts.validation.passes):
                [inputs] = self._read(batches, 1)
                sums += self.model_wrapped(**self._prepare_inputs(inputs))["metrics"]
        self.model_wrapped.train()
        return of_sources(ranks.sum_over(sums).cpu(), self.distiller.weights)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return False  # `best` tells

    # ---- checkpoints ----

    def _save_checkpoint(self, *args: Any) -> None:
        self._check_finite()
        write = super()._save_checkpoint
        self.parts.saver.save(self.state.global_step, lambda: write(*args))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.parts.saver.root)  # checkpoints are written aside, then renamed

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.parts.saver.guard(self.model_wrapped)
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save:
            [parts] = Path(output_dir).glob("global_step*")
            (Path(output_dir) / "latest").write_text(parts.name, encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student in its own format, trained weights in full precision, the data's state."""
        folder, step = Path(output_dir or self.args.output_dir), self.state.global_step
        trained = gather_trained(self.distiller.student, keep=ranks.is_first())

        def told(found: dict[int, list[str]]) -> FloatingPointError:
            broken = [name for names in found.values() for name in names]
            return FloatingPointError(
                f"weights are not finite after step {step} ({broken[0]} and {len(broken) - 1} "
                "more), so nothing was saved; the last checkpoint is good. Lower the learning rate."
            )

        ranks.relay([n for n, tensor in trained.items() if not tensor.isfinite().all()], told)
        # The data's whole state: packs consumed by all ranks since the run began.
        args, packs = self.args, self._begun["packs"]
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        packs += (step - self._begun["step"]) * rows * args.world_size
        state: dict[str, Any] = {"packs": packs, "step": step}
        own = {"loss": float(self._tr_loss), "logged": self._globalstep_last_logged}
        state["ranks"] = ranks.gather({"meter": self.parts.meter.state()} | own)

        def write() -> None:
            with self.parts.saver.attempt() if _internal_call else writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self.parts.pair.export(trained, folder / STUDENT)
                if not self.is_deepspeed_enabled:
                    once = {id(tensor): name for name, tensor in trained.items()}  # a tied pair
                    save_file({name: trained[name] for name in once.values()}, folder / WEIGHTS)
                (folder / DATA_STATE).write_text(json.dumps(state), encoding="utf-8")

        ranks.from_first(write)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        # The rest was never trained.
        self.distiller.student.load_state_dict(weights, strict=False)
