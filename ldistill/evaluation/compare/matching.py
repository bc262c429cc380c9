"""Which samples of two runs belong together, and what is said of those that don't.

Samples belong together when document number, prompt and expected answer agree: lmms-eval's own
``doc_hash`` differs between runs wherever a document holds a picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ldistill.evaluation.compare.results import Sample, Variant
from ldistill.evaluation.compare.sample_scores import sample_score
from ldistill.evaluation.suites import Row


@dataclass(frozen=True)
class Pair:
    """One document as baseline and variant answered it, with their scores."""

    baseline: Sample
    variant: Sample
    before: float
    after: float


@dataclass(frozen=True)
class Match:
    """Pairs in document order, and a clause for everything that could not be paired."""

    row: Row
    variant: str
    pairs: tuple[Pair, ...]
    gaps: tuple[str, ...]


def match(row: Row, baseline: Variant, variant: Variant) -> Match:
    """Pair the samples of a row's task; no pairs and a gap where that cannot be done."""
    gaps: list[str] = []
    first, second = (_scored(v, row, gaps) for v in (baseline, variant))
    pairs: tuple[Pair, ...] = ()
    if first and second:
        pairs = _pairs(first, second, baseline.name, variant.name, gaps)
    return Match(row, variant.name, pairs, tuple(gaps))


def sentences(matches: Iterable[Match]) -> list[str]:
    """The gaps of all matches, each named once, with the rows it holds for."""
    where: dict[tuple[str, bool], dict[str, None]] = {}
    for m in matches:
        rest = f" (the other {len(m.pairs):,} are paired)" if m.pairs else ""
        for gap in m.gaps:
            where.setdefault((gap, bool(m.pairs)), {})[m.row.name + rest] = None
    ends = {True: ".", False: "; not compared sample by sample, scores are."}
    return [f"{gap}: {', '.join(rows)}{ends[some]}" for (gap, some), rows in where.items()]


def _scored(variant: Variant, row: Row, gaps: list[str]) -> dict[int, tuple[Sample, float]]:
    """Document → sample and score."""
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


def _pairs(
    first: dict[int, tuple[Sample, float]],
    second: dict[int, tuple[Sample, float]],
    baseline: str,
    variant: str,
    gaps: list[str],
) -> tuple[Pair, ...]:
    sides = ((baseline, first, variant, second), (variant, second, baseline, first))
    for name, own, than, other in sides:
        only = len(own.keys() - other.keys())
        if only:
            gaps.append(f"{only:,} samples of {name} are not among {than}'s")
    pairs, different = [], 0
    for doc_id in sorted(first.keys() & second.keys()):
        (a, before), (b, after) = first[doc_id], second[doc_id]
        if (a.question, a.target) == (b.question, b.target):
            pairs.append(Pair(a, b, before, after))
        else:
            different += 1
    if different:
        gaps.append(
            f"{different:,} samples have another prompt or expected answer in {variant} than in "
            f"{baseline} (another version of the data, or another prompt format?)"
        )
    return tuple(pairs)
