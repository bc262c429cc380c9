"""Won and lost: McNemar against scipy and brute force, the bootstrap against resampling."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from ldistill.evaluation.compare import comparison
from ldistill.evaluation.compare.comparison import bootstrap_interval, mcnemar, paired


def test_counts_by_hand():
    result = paired([1, 1, 0, 0, 1], [1, 0, 1, 1, 1])
    assert (result.won, result.lost, result.samples) == (2, 1, 5)
    assert result.baseline == pytest.approx(0.6)
    assert result.score == pytest.approx(0.8)
    assert result.difference == pytest.approx(0.2)
    assert result.p == 1.0  # 2 against 1: every outcome is as extreme


def test_graded_scores_are_won_by_being_higher():
    result = paired([0.5, 0.9, 0.0], [0.6, 0.7, 0.0])
    assert (result.won, result.lost) == (1, 1)


@pytest.mark.parametrize("n", range(11))
def test_mcnemar_against_every_outcome(n):
    """Of all 2^n ways the discordant samples could have fallen, the share at least as uneven."""
    for won in range(n + 1):
        uneven = abs(2 * won - n)
        ways = [abs(2 * sum(w) - n) >= uneven for w in itertools.product((0, 1), repeat=n)]
        assert mcnemar(won, n - won) == pytest.approx(sum(ways) / len(ways))


def test_mcnemar_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for won, lost in [(854, 498), (645, 362), (703, 432), (0, 7), (3000, 2990), (5000, 100)]:
        expected = stats.binomtest(won, won + lost, 0.5).pvalue
        assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_the_papers_scienceqa():
    """854 won, 498 lost of 4241: +8.39 points (the paper's §6.1)."""
    before = [0] * 854 + [1] * 498 + [1] * (4241 - 854 - 498)
    after = [1] * 854 + [0] * 498 + [1] * (4241 - 854 - 498)
    result = paired(before, after)
    assert (result.won, result.lost) == (854, 498)
    assert result.difference * 100 == pytest.approx(8.39, abs=0.005)
    assert result.low < result.difference < result.high
    assert result.p < 1e-20


def test_interval_is_the_exact_bootstrap():
    """Four samples: all 256 resamples are listed, and their quantiles compared."""
    values = np.array([-1.0, 0.0, 0.5, 1.0])
    means = sorted(np.mean(values[list(i)]) for i in itertools.product(range(4), repeat=4))
    low, high = bootstrap_interval(values, resamples=200_000, confidence=0.8)
    assert low == pytest.approx(np.quantile(means, 0.1), abs=0.03)
    assert high == pytest.approx(np.quantile(means, 0.9), abs=0.03)


def test_interval_against_plain_resampling():
    rng = np.random.default_rng(3)
    values = rng.choice([-1.0, 0.0, 0.25, 1.0], 400, p=[0.1, 0.6, 0.1, 0.2])
    means = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.01)
    width = 2 * 1.96 * values.std() / math.sqrt(len(values))
    assert high - low == pytest.approx(width, rel=0.1)
    assert bootstrap_interval(values) == (low, high)  # the same every time


def test_graded_scores_are_drawn_in_parts(monkeypatch):
    """As many distinct values as samples: the same interval from a fraction of the memory."""
    values = np.random.default_rng(1).random(1000)
    whole = bootstrap_interval(values, resamples=1001)
    monkeypatch.setattr(comparison, "DRAWN_AT_ONCE", 1 << 16)
    tracemalloc.start()
    parts = bootstrap_interval(values, resamples=1001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert parts == pytest.approx(whole, rel=1e-12)
    assert peak < 1001 * 1000 * 8 / 4  # of all counts at once
