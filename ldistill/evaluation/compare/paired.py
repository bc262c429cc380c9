"""Two variants on the same samples: won, lost, and whether that could be chance.

A sample is *won* where the variant scores higher than the baseline, *lost* where it scores lower.
For right/wrong scores the test on won and lost is McNemar's exact test; for graded scores (ANLS)
the same arithmetic is the sign test. The interval of the mean difference is a percentile bootstrap
over samples.

    paired([1, 0, 0], [1, 1, 0]).won      # 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 1 << 20
"""Counts in memory while resampling: graded scores have as many distinct values as samples."""


@dataclass(frozen=True)
class Paired:
    """How a variant compares with the baseline on the samples both answered."""

    samples: int
    baseline: float
    """Mean score of the baseline."""
    variant: float
    won: int
    lost: int
    low: float
    """Lower end of the 95% interval of ``difference``."""
    high: float
    p: float
    """Two-sided p value of won against lost."""

    @property
    def difference(self) -> float:
        return self.variant - self.baseline


def paired(
    baseline: Sequence[float],
    variant: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Paired:
    """Compare two score vectors [samples] whose entries belong to the same samples.

    Raises:
        ValueError: lengths differ or there is nothing to compare.
    """
    first, second = np.asarray(baseline, float), np.asarray(variant, float)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"paired scores must be two lists of one length, not {first.shape} and {second.shape}."
        )
    difference = second - first
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    low, high = bootstrap_interval(difference, resamples=resamples, seed=seed)
    return Paired(
        samples=len(first),
        baseline=float(first.mean()),
        variant=float(second.mean()),
        won=won,
        lost=lost,
        low=low,
        high=high,
        p=mcnemar(won, lost),
    )


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p value: how odd ``won`` against ``lost`` is if both were equally likely."""
    n, term, tail = won + lost, 1, 0
    for k in range(min(won, lost) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << n))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` [samples] under resampling of samples.

    Drawing n samples with replacement is drawing counts of the distinct values from a multinomial
    distribution: the same bootstrap, without the n × resamples draws.
    """
    distinct, counts = np.unique(np.round(np.asarray(values, float), 12), return_counts=True)
    n = counts.sum()
    rng, most = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // len(distinct))
    sizes = [min(most, resamples - done) for done in range(0, resamples, most)]
    means = [rng.multinomial(n, counts / n, size=size) @ distinct / n for size in sizes]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def significance(p: float) -> str:
    """A p value as text: ``0.031``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if math.isfinite(p) else "–"
