"""What is evaluated while a run goes on: CE and KD of documents that are not trained on, suites of
lmms-eval; and the best student by any of their metrics.

Documents are read in an order that never changes. Every rank runs equally many passes, for under
ZeRO-3 a forward is a collective: what some lack is filled up with rows that count nothing.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldistill.checkpoint.logs import read_metrics
from ldistill.common import ranks
from ldistill.common.errors import did_you_mean
from ldistill.common.samples import IGNORE
from ldistill.common.telling import telling
from ldistill.data.index import ShardIndex
from ldistill.data.loader import PackLoader
from ldistill.data.order import Order
from ldistill.data.remote.read_ahead import settle_reads
from ldistill.distill.objective import COLUMNS
from ldistill.evaluation.lmms_run import Evaluation, check, evaluate
from ldistill.evaluation.suites import suite
from ldistill.models.formats import export_like
from ldistill.models.lora import WeightUpdates
from ldistill.models.pair import Pair
from ldistill.recipe import Recipe
from ldistill.sources import SourceWeights
from ldistill.training.metrics import of_sources


@dataclass
class Validation:
    """What a run is validated on: the first epoch of an order."""

    index: ShardIndex
    order: Order
    weights: SourceWeights  # of the run, which has every source of the index
    batch_size: int  # packs of a pass on a rank
    load: partial[PackLoader]  # ``make_loader`` of this rank, but for what stands here

    @property
    def passes(self) -> int:
        """Passes of every rank."""
        return math.ceil(self.order.size(0) / (self.batch_size * ranks.count()))

    def batches(self) -> Iterator[dict[str, Any]]:
        """This rank's batches (see `collate`), as many as every rank's; sources are the run's."""
        numbers = torch.tensor([self.weights.names.index(name) for name in self.index.sources])
        each = self.batch_size * ranks.count()
        packs = {"batch_size": self.batch_size, "stop_pack": each * self.passes}
        for number, batch in enumerate(self.load(self.index, order=self.order, **packs)):
            first = number * each + ranks.index()
            row = first + ranks.count() * torch.arange(self.batch_size)
            batch["labels"][row >= self.order.size(0)] = IGNORE  # of the next epoch
            batch["doc_source"] = numbers[batch["doc_source"]]
            yield batch

    def metrics(self) -> set[str]:
        """Names of what is logged."""
        sums = torch.zeros(len(self.weights.names), len(COLUMNS))
        for source, read in self.order.summary().sources.items():
            number = self.weights.names.index(source)
            taught = self.weights.alpha[number] > 0
            columns = len(COLUMNS) if taught else COLUMNS.index("kd_rows")
            sums[number, :columns] = min(read["documents"], 1)
        return set(of_sources(sums, self.weights))


@dataclass
class Best:
    """The best evaluation so far by a metric as it is logged; `greater`: more of it is better.

    ``metrics.jsonl`` tells, which rank 0 reads: a resumed run needs no other state.
    """

    file: Path
    metric: str
    greater: bool

    def find(self, last_step: int) -> tuple[int, float] | None:
        """Step and value of the best, the first of equals, up to a step; on rank 0."""
        records = [r for r in read_metrics(self.file) if self.metric in r]
        values = {int(r["step"]): r[self.metric] for r in records}
        found = [step for step in values if 0 < step <= last_step]  # 0 has no checkpoint
        best = (max if self.greater else min)(found, key=values.__getitem__, default=None)
        return None if best is None else (best, values[best])


def open_validation(
    recipe: Recipe,
    held: tuple[ShardIndex, Order] | None,
    weights: SourceWeights,
    load: partial[PackLoader],
) -> Validation | None:
    """What a recipe validates on. Raises ValueError: shards of another student."""
    if held is None:
        return None
    args, (index, order) = recipe.training, held
    index.check(load.keywords["processor"])
    if index.store.remote:
        settle_reads(index, order, args.world_size)
    given = "per_device_eval_batch_size" in recipe.given
    rows = args.per_device_eval_batch_size if given else args.per_device_train_batch_size
    ranks.say(f"validation every {args.eval_steps:g} steps: {order.summary()}")
    return Validation(index, order, weights, rows, load)


@dataclass
class SuiteEvaluator:
    """A suite of lmms-eval on the weights of a running training; rank 0 alone calls it.

    The student as it stands is written to the run's folder, evaluated in a process of its own, and
    removed. The run is not touched: no module changes its mode, no random number is drawn, and a
    failed evaluation is a message and ``eval_failed``.

    asked:    what is evaluated; results go to ``step-N`` below its folder.
    base:     folder of the student the training began from.
    give_up:  asked again and again while an evaluation runs: whether to end it.
    """

    asked: Evaluation
    base: Path
    give_up: Callable[[], bool] = lambda: False

    def __call__(self, step: int, updates: WeightUpdates) -> dict[str, float]:
        """Scores by row and by group."""
        out = self.asked.out / f"step-{step}"
        student = out / "student"
        shutil.rmtree(out, ignore_errors=True)  # of a run that was resumed before this step
        try:
            export_like(self.base, updates, student)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # what the allocator only keeps, the other process can use
            with telling(f"evaluating step {step} on suite {self.asked.suite}"):
                asked = replace(self.asked, student=str(student), out=out)
                result = evaluate(asked, self.give_up)
        except (ValueError, OSError) as error:
            why = f"failed, training goes on: {error}"
            if isinstance(error, InterruptedError):
                why = "was given up: the run is to stop"
            print(f"the evaluation of step {step} {why}", flush=True)
            return {"failed": 1.0}
        finally:
            shutil.rmtree(student, ignore_errors=True)
        means = ", ".join(f"{group} {value:.3f}" for group, value in result["groups"].items())
        print(f"step {step}: {means}  ({out})", flush=True)
        return {key: score["value"] for key, score in result["scores"].items()} | result["groups"]


def visible_device(device: torch.device) -> str:
    """``CUDA_VISIBLE_DEVICES`` that leaves a process this device alone (none for a CPU)."""
    if device.type != "cuda":
        return ""
    index = device.index or 0
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return visible[index] if index < len(visible) else str(index)


def evaluator_of(
    recipe: Recipe, pair: Pair, folder: Path, give_up: Callable[[], bool]
) -> SuiteEvaluator | None:
    """What a recipe's ``eval_suite`` asks for, on the first rank's device.
    Raises ValueError: the suite cannot run here (unknown, lmms-eval or Java missing)."""
    args, name = recipe.training, recipe.run.eval_suite
    if name is None:
        return None
    given = "per_device_eval_batch_size" in recipe.given
    tiling = {"tiling": True} if recipe.data.tiling else {}
    asked = Evaluation(
        student=str(pair.student_folder),
        out=folder / "eval",
        suite=name,
        limit=recipe.run.eval_limit,
        batch_size=args.per_device_eval_batch_size if given else None,
        options={"tokenizer": recipe.pair.tokenizer} | tiling,
        processes=1,
        environment={"CUDA_VISIBLE_DEVICES": visible_device(args.device)},
    )
    check(asked)
    return SuiteEvaluator(asked, pair.student_folder, give_up)


def best_of(recipe: Recipe, metrics: Path, validation: Validation | None) -> Best | None:
    """By which metric the best student is known, if it is asked for, or a ValueError."""
    args = recipe.training
    if not args.load_best_model_at_end:
        return None
    known = validation.metrics() if validation else set()
    if recipe.run.eval_suite is not None:
        rows = suite(recipe.run.eval_suite).rows
        known |= {row.key for row in rows} | {row.group for row in rows}
    metric = args.metric_for_best_model
    if (name := metric.removeprefix("eval_")) not in known:
        raise ValueError(
            f"metric_for_best_model {name!r} is not evaluated.{did_you_mean(name, known)} There "
            f"are {', '.join(sorted(known))}."
        )
    return Best(metrics, metric, args.greater_is_better)
