"""What a run logs: sums by source on the device, reduced over ranks only when logged.

One flat dict per logged step goes to ``metrics.jsonl`` and to whatever ``--report_to`` names:
``loss``, ``ce``, ``kd`` and the agreements overall, by category (``language/ce``) and by source
(``source/vqav2/ce``), each with its supervised ``rows`` and those with a teacher, ``kd_rows``;
throughput, packing, memory, samples and drops.
"""

from __future__ import annotations

import math
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ldistill.checkpoint.logs import StepLog, rewrite_records
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

    Args:
        weights: names and categories of the sources.
        device: where the metrics matrix lies.
        peak: FLOP/s of one device, for MFU.
    """

    def __init__(self, weights: SourceWeights, device: torch.device, peak: float) -> None:
        self.weights, self.device, self.peak = weights, device, peak
        self._reset()

    def _reset(self) -> None:
        """Start a new interval, now."""
        self.sums = torch.zeros(len(self.weights.names), len(COLUMNS), device=self.device)
        self.counts = dict.fromkeys(_COUNTS, 0.0)
        self.health = torch.zeros(2, device=self.device)
        self._drops: Counter[str] = Counter()
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begin to measure: what came before (setting up) does not count."""
        self._reset()

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
        for name, value in state["counts"].items():
            self.counts[name] += value
        self._since -= state["seconds"]

    def flush(self) -> dict[str, float]:
        """Metrics since the last call, over all ranks. Every rank must call it."""
        seconds = time.perf_counter() - self._since
        counts = torch.tensor([self.counts[k] for k in _COUNTS], dtype=torch.float64)
        counts = ranks.sum_over(counts.to(self.device)).tolist()
        logs = of_sources(ranks.sum_over(self.sums).double().cpu(), self.weights)
        logs |= self._rates(dict(zip(_COUNTS, counts, strict=True)), seconds)
        right, judged = ranks.sum_over(self.health).tolist()
        if judged:
            logs["teacher_alone_label_accuracy"] = right / judged
        logs |= self._drop_counts()
        logs["memory_gib"] = _peak_memory(self.device) / 2**30
        self._reset()
        return logs

    def _rates(self, counts: dict[str, float], seconds: float) -> dict[str, float]:
        return {
            "tokens_per_second": counts["tokens"] / seconds,
            "mfu": counts["flops"] / seconds / ranks.count() / self.peak,
            "packing_efficiency": counts["tokens"] / max(counts["positions"], 1),
            "teacher_rows": counts["teacher_rows"],
            "flops": counts["flops"],
            "tokens": counts["tokens"],
            "images": counts["tiles"],
            "documents": counts["documents"],
        }

    def _drop_counts(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for drops in ranks.gather(dict(self._drops)):
            total.update(drops)
        return {f"dropped/{reason}": float(n) for reason, n in sorted(total.items())}


def of_sources(sums: Tensor, weights: SourceWeights) -> dict[str, float]:
    """Means and counts of sums [sources, len(COLUMNS)]: of all, by category, by source."""
    logs = _of_rows(sums.sum(0), "")
    for category in CATEGORIES:
        chosen = [i for i, c in enumerate(weights.categories) if c == category]
        if chosen:
            logs |= _of_rows(sums[chosen].sum(0), f"{category}/")
    for index, name in enumerate(weights.names):
        logs |= _of_rows(sums[index], f"source/{name}/")
    return logs


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most a GPU's allocator held, or the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _of_rows(columns: Tensor, prefix: str) -> dict[str, float]:
    """Means that there are, the supervised rows behind them, and those that the teacher judged."""
    values = dict(zip(COLUMNS, columns.tolist(), strict=True))
    counts = {prefix + name: values[name] for name in ("rows", "kd_rows")}
    return counts | {
        prefix + name: values[total] / values[count]
        for name, (total, count) in _MEANS.items()
        if values[count]
    }


class MetricsFile(StepLog):
    """``metrics.jsonl``: one JSON object a logged step."""

    def begin(self, resume_step: int = 0) -> None:
        """Forget what a resumed run does again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rewrite_records(self.path, resume_step)

    def write(self, step: int, logs: Mapping[str, float]) -> None:
        self.append({"step": step} | {k: v for k, v in logs.items() if _plain(v)})


def _plain(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
