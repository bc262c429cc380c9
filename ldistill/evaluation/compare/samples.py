"""Single samples: the score and category of each, and two variants sample by sample.

lmms-eval logs what each task's own code returns: a number, a dict with ``score`` and what its
aggregation needs, or (MMMU) only the parsed answer. Captions have no score per sample in the logs.

Samples of two runs belong together when document number, prompt and expected answer agree:
lmms-eval's own ``doc_hash`` differs between runs wherever a document holds a picture. A sample is
*won* where the variant scores higher than the baseline, *lost* where it scores lower. For
right/wrong scores the test on won and lost is McNemar's exact test; for graded scores (ANLS) the
same arithmetic is the sign test.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from ldistill.evaluation.compare.results import Sample, Variant
from ldistill.evaluation.suites import Row

CATEGORY_COLUMNS = {
    "scienceqa": "subject",
    "docvqa_val": "question_types",
    "infovqa_val": "answer_type",
}
"""Task → column of its data that names the category, where the samples themselves don't."""
USUAL_COLUMNS = ("category", "subject", "question_type", "topic")  # tried for every other task
DRAWN_AT_ONCE = 1 << 20  # counts in memory: graded scores have as many distinct values as samples


def sample_score(sample: Sample, row: Row) -> float | None:
    """Score of one sample under a row's metric; None where the logs hold none."""
    value = sample.metrics.get(row.metric)
    if isinstance(value, Mapping) and "parsed_pred" in value:
        # MMMU judges when it aggregates: choices are compared here, open answers by its own code.
        gold, parsed = value["answer"], value["parsed_pred"]
        if value.get("question_type") == "multiple-choice":
            gold = gold if isinstance(gold, list) else [gold]
            return float(any(one in gold for one in parsed))
        try:
            from lmms_eval.tasks.mmmu.utils import eval_open
        except ImportError:
            return None
        return float(any(eval_open(gold, one) for one in parsed))
    if isinstance(value, Mapping):
        value = value.get("score", value.get(row.metric))
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def sample_categories(sample: Sample, row: Row) -> tuple[str, ...]:
    """Categories that the logged score itself names (OCRBench, MME, MMStar, MMMU)."""
    value = sample.metrics.get(row.metric)
    if not isinstance(value, Mapping):
        return ()
    if row.task == "mmstar":
        return tuple(k for k in sample.metrics if k != row.metric)[:1]
    named = (value.get(key) for key in ("subdomain", "category", "question_type"))
    return next(((name,) for name in named if isinstance(name, str)), ())


def document_categories(document: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """Categories by the task's data; a document may have several (DocVQA)."""
    columns = (CATEGORY_COLUMNS[task],) if task in CATEGORY_COLUMNS else USUAL_COLUMNS
    for value in map(document.get, columns):
        values = value if isinstance(value, list) else [value]
        if any(values) and all(isinstance(v, str) for v in values):
            return tuple(values)
    return ()


class Pair(NamedTuple):
    """One document as baseline and variant answered it, with their scores."""

    baseline: Sample
    before: float
    variant: Sample
    after: float


class Match(NamedTuple):
    """Pairs in document order, and a clause for everything that could not be paired."""

    row: Row
    variant: str
    pairs: list[Pair]
    gaps: list[str]


def match(row: Row, baseline: Variant, variant: Variant) -> Match:
    """Pair the samples of a row's task; no pairs and a gap where that cannot be done."""
    gaps: list[str] = []
    first, second = (_scored(v, row, gaps) for v in (baseline, variant))
    if not (first and second):
        return Match(row, variant.name, [], gaps)
    both = sorted(first.keys() & second.keys())
    for own, name, than in ((first, baseline, variant), (second, variant, baseline)):
        if only := len(own) - len(both):
            gaps.append(f"{only:,} samples of {name.name} are not among {than.name}'s")
    pairs = [Pair(*first[doc], *second[doc]) for doc in both]
    asked = attrgetter("question", "target")
    pairs = [p for p in pairs if asked(p.baseline) == asked(p.variant)]
    if different := len(both) - len(pairs):
        gaps.append(
            f"{different:,} samples have another prompt or expected answer in {variant.name} than "
            f"in {baseline.name} (another version of the data, or another prompt format?)"
        )
    return Match(row, variant.name, pairs, gaps)


def _scored(variant: Variant, row: Row, gaps: list[str]) -> dict[int, tuple[Sample, float]]:
    """Document → sample and score; what is lacking goes to ``gaps``."""
    name, result = variant.name, variant.tasks.get(row.task)
    if result is None:
        gaps.append(f"{name} has no results")
        return {}
    if result.unreadable:
        gaps.append(f"{name}'s samples file has lines that are no samples (cut off?)")
    samples = result.samples(row.filter)
    if not samples:
        what = "an empty" if result.samples_path.is_file() else "no"
        gaps.append(f"{name} has {what} samples file (evaluate with samples logged)")
        return {}
    scores = {i: sample_score(s, row) for i, s in samples.items() if row.metric in s.metrics}
    unscored = sum(score is None for score in scores.values())
    if unscored == len(scores):
        gaps.append(f"{name}'s samples carry no score of their own, only the whole has one")
    elif unscored:
        gaps.append(f"{unscored:,} of {name}'s samples carry no score of their own")
    return {i: (samples[i], score) for i, score in scores.items() if score is not None}


def sentences(matches: Iterable[Match]) -> list[str]:
    """The gaps of all matches, each named once, with the rows it holds for."""
    where: dict[tuple[str, bool], dict[str, None]] = defaultdict(dict)
    for m in matches:
        rest = f" (the other {len(m.pairs):,} are paired)" if m.pairs else ""
        for gap in m.gaps:
            where[gap, bool(m.pairs)][m.row.name + rest] = None
    ends = {True: ".", False: "; not compared sample by sample, scores are."}
    return [f"{gap}: {', '.join(rows)}{ends[some]}" for (gap, some), rows in where.items()]


@dataclass(frozen=True)
class Paired:
    """How a variant compares with the baseline on the samples both answered."""

    samples: int
    baseline: float  # mean score
    score: float  # of the variant
    difference: float
    low: float  # end of the 95% interval of `difference`
    high: float
    won: int
    lost: int
    p: float  # two-sided, of won against lost


def paired(baseline: Sequence[float], variant: Sequence[float]) -> Paired:
    """Compare two score vectors [samples], at least one, whose entries are of the same samples."""
    first, second = np.asarray(baseline, float), np.asarray(variant, float)
    gained = second - first
    won, lost = int((gained > 0).sum()), int((gained < 0).sum())
    before, after = float(first.mean()), float(second.mean())
    means, interval = (before, after, after - before), bootstrap_interval(gained)
    return Paired(len(first), *means, *interval, won, lost, mcnemar(won, lost))


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p value: how odd ``won`` against ``lost`` is if both were equally likely."""
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / (1 << n))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` [samples] under resampling of samples."""
    # Drawing samples with replacement is drawing counts of the distinct values: far fewer draws.
    distinct, counts = np.unique(np.round(np.asarray(values, float), 12), return_counts=True)
    n = counts.sum()
    rng, most = np.random.default_rng(0), max(1, DRAWN_AT_ONCE // len(distinct))
    sizes = [min(most, resamples - done) for done in range(0, resamples, most)]
    means = [rng.multinomial(n, counts / n, size=size) @ distinct / n for size in sizes]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
