"""What a run logs: sums by source on the device, reduced over ranks only when logged.

One flat dict per logged step: ``loss``, ``ce``, ``kd`` and the agreements overall, by category
(``language/ce``) and by source (``source/vqav2/ce``), each with its supervised ``rows`` and those
with a teacher, ``kd_rows``; throughput, packing, memory, samples and drops.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ldistill.common import ranks
from ldistill.distill.objective import COLUMNS
from ldistill.models.flops import StepCounts
from ldistill.sources import CATEGORIES, SourceWeights

# Metric name → (sum column, count column): means over rows.
_MEANS = {
    "loss": ("loss", "rows"),
    "ce": ("ce", "rows"),
    "student_label_accuracy": ("student_label", "rows"),
    "extra_vocabulary_mass": ("extra_mass", "rows"),
    "kd": ("kl", "kd_rows"),
    "teacher_student_agreement": ("teacher_student", "kd_rows"),
    "teacher_label_accuracy": ("teacher_label", "kd_rows"),
    "gate": ("gate", "kd_rows"),
}
_COUNTS = ("tokens", "positions", "documents", "tiles", "teacher_rows", "flops")


class Meter:
    """Accumulates between two logged steps; ``flush`` reduces over ranks and starts anew.

    The metrics matrix lies on ``device``; ``peak`` are FLOP/s of one, for MFU.
    """

    def __init__(self, weights: SourceWeights, device: torch.device, peak: float) -> None:
        self.weights, self.device, self.peak = weights, device, peak
        self.start()

    def start(self) -> None:
        """Begin a new interval now: what came before does not count."""
        self.sums = torch.zeros(len(self.weights.names), len(COLUMNS), device=self.device)
        self.counts = Counter(dict.fromkeys(_COUNTS, 0.0))
        self.health = torch.zeros(2, device=self.device)
        self._drops: Counter[str] = Counter()
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as time spent training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    def add_batch(self, batch: Mapping[str, Any], counts: StepCounts, flops: float) -> None:
        """Count a micro-batch; its tensors still lie on the CPU."""
        self.counts["tokens"] += int(batch["doc_length"].sum())
        self.counts["positions"] += counts.positions
        self.counts["documents"] += batch["doc_length"].numel()
        self.counts["tiles"] += counts.tiles
        self.counts["teacher_rows"] += counts.queries
        self.counts["flops"] += flops
        self._drops.update(batch.get("drops") or {})

    def add_sums(self, sums: Tensor) -> None:
        """Add a micro-batch's metrics matrix; no synchronisation."""
        self.sums += sums

    def state(self) -> dict[str, Any]:
        """What this rank gathered since the last logged step, as plain numbers."""
        return {
            "sums": self.sums.tolist(),
            "counts": dict(self.counts),
            "health": self.health.tolist(),
            "drops": dict(self._drops),
            "seconds": time.perf_counter() - self._since,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add what another process had gathered: an interval cut by a restart is whole again."""
        self.sums += torch.tensor(state["sums"], device=self.device)
        self.health += torch.tensor(state["health"], device=self.device)
        self._drops.update(state["drops"])
        self.counts.update(state["counts"])
        self._since -= state["seconds"]

    def flush(self) -> dict[str, float]:
        """Metrics since the last call, over all ranks. Every rank must call it."""
        seconds = time.perf_counter() - self._since
        own = torch.tensor([self.counts[k] for k in _COUNTS], dtype=torch.float64)
        counts = dict(zip(_COUNTS, ranks.sum_over(own.to(self.device)).tolist(), strict=True))
        logs = of_sources(ranks.sum_over(self.sums).double().cpu(), self.weights)
        logs |= {
            "tokens_per_second": counts["tokens"] / seconds,
            "mfu": counts["flops"] / seconds / ranks.count() / self.peak,
            "packing_efficiency": counts["tokens"] / max(counts["positions"], 1),
            **{name: counts[name] for name in ("teacher_rows", "flops", "tokens")},
            "images": counts["tiles"],
            "documents": counts["documents"],
        }
        right, judged = ranks.sum_over(self.health).tolist()
        if judged:
            logs["teacher_alone_label_accuracy"] = right / judged
        drops = sum(ranks.gather(self._drops), Counter())
        logs |= {f"dropped/{reason}": float(n) for reason, n in sorted(drops.items())}
        # The most a GPU's allocator held since the line before, or the largest resident set.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        logs["memory_gib"] = peak / 2**30
        self.start()
        return logs


def of_sources(sums: Tensor, weights: SourceWeights) -> dict[str, float]:
    """Means and counts of sums [sources, len(COLUMNS)]: of all, by category, by source."""
    logs = _of_rows(sums.sum(0), "")
    for category in CATEGORIES:
        if chosen := [i for i, c in enumerate(weights.categories) if c == category]:
            logs |= _of_rows(sums[chosen].sum(0), f"{category}/")
    for index, name in enumerate(weights.names):
        logs |= _of_rows(sums[index], f"source/{name}/")
    return logs


def _of_rows(columns: Tensor, prefix: str) -> dict[str, float]:
    """Means that there are, the supervised rows behind them, and those that the teacher judged."""
    values = dict(zip(COLUMNS, columns.tolist(), strict=True))
    counts = {prefix + name: values[name] for name in ("rows", "kd_rows")}
    return counts | {
        prefix + name: values[total] / values[count]
        for name, (total, count) in _MEANS.items()
        if values[count]
    }
