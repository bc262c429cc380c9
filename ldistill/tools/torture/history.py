"""What a run did, step by step, and whether two runs did the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldistill.common.run_files import METRICS
from ldistill.training.metrics import read_metrics
from ldistill.training.sample_log import read_samples


@dataclass(frozen=True)
class History:
    """Loss and samples of every step; samples are in the plan's order, pack by pack."""

    losses: dict[int, float]
    samples: dict[int, list[list[str]]]

    @classmethod
    def of(cls, run: Path) -> History:
        """The history a run folder tells of. Raises ValueError for a step that is told twice."""
        records = read_metrics(run / METRICS)
        losses = {r["step"]: r["loss"] for r in records}
        if len(losses) != len(records):
            raise ValueError(f"{run / METRICS} has steps twice: {[r['step'] for r in records]}")
        return cls(losses, read_samples(run))

    def difference(self, other: History, tolerance: float = 0.0) -> str | None:
        """The first thing in which two histories differ; None when they are the same."""
        for name in ("losses", "samples"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine.keys() != theirs.keys():
                steps = sorted(mine.keys() ^ theirs.keys())
                return f"{name} of steps {steps[:5]} are in one run only"
        for step, loss in self.losses.items():
            if not abs(loss - other.losses[step]) <= tolerance:
                return f"loss of step {step}: {loss!r} instead of {other.losses[step]!r}"
        for step, packs in self.samples.items():
            if packs != other.samples[step]:
                return f"samples of step {step} differ"
        return None


def last_step(run: Path) -> int:
    """The last step that a run logged; 0 before the first."""
    records = read_metrics(run / METRICS)
    return records[-1]["step"] if records else 0
