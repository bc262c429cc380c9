"""CE and KD of documents that are not trained on, and the best student by any evaluated metric.

They are read in an order that never changes. Every rank runs equally many passes, for under ZeRO-3
a forward is a collective: what some lack is filled up with rows that count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldistill.checkpoint.logs import read_metrics
from ldistill.common import ranks
from ldistill.common.documents import IGNORE
from ldistill.common.errors import did_you_mean
from ldistill.data.index import ShardIndex
from ldistill.data.loader import PackLoader
from ldistill.data.order import Order
from ldistill.data.remote.read_ahead import settle_reads
from ldistill.distill.objective import COLUMNS
from ldistill.evaluation.suites import rows as suite_rows
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
    """What a recipe validates on. Raises ValueError: built for another student."""
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


def best_of(recipe: Recipe, metrics: Path, validation: Validation | None) -> Best | None:
    """By which metric the best student is known, if it is asked for; ValueError: by none."""
    args = recipe.training
    if not args.load_best_model_at_end:
        return None
    known = validation.metrics() if validation else set()
    if recipe.run.eval_suite is not None:
        rows = suite_rows(recipe.run.eval_suite)
        known |= {row.key for row in rows} | {row.group for row in rows}
    metric = args.metric_for_best_model
    if (name := metric.removeprefix("eval_")) not in known:
        raise ValueError(
            f"metric_for_best_model {name!r} is not evaluated.{did_you_mean(name, known)} There "
            f"are {', '.join(sorted(known))}."
        )
    return Best(metrics, metric, args.greater_is_better)
