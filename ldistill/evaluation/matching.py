"""Which samples of two runs belong together, and what is said where they don't.

Samples belong together when document number, prompt and expected answer agree: lmms-eval's own
``doc_hash`` differs between runs wherever a document holds a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldistill.evaluation.results import Sample, TaskResult, Variant
from ldistill.evaluation.sample_scores import sample_score
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
    """Pairs in document order, and a sentence for everything that could not be paired."""

    row: Row
    variant: str
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


def match(row: Row, baseline: Variant, variant: Variant) -> Match:
    """Pair the samples of a row's task; no pairs and a note where that cannot be done."""
    sides, notes = [], []
    for side in (baseline, variant):
        result = side.tasks.get(row.task)
        if result is None:
            notes.append(f"{side.name} has no results for {row.task}")
            continue
        if result.unreadable:
            notes.append(
                f"{result.unreadable} lines of {side.name}'s {result.samples_path.name} are no "
                "samples (file cut off?)"
            )
        sides.append(_scored(side.name, result, row, notes))
    if len(sides) < 2 or not all(sides):
        return Match(row, variant.name, (), _sentences(row, variant, notes, paired=0))
    pairs = _pairs(*sides, baseline.name, variant.name, notes)
    return Match(row, variant.name, pairs, _sentences(row, variant, notes, paired=len(pairs)))


def _sentences(row: Row, variant: Variant, notes: list[str], paired: int) -> tuple[str, ...]:
    rest = f"{paired:,} samples could be paired." if paired else "No samples could be paired."
    head = f"{row.name}, {variant.name}: "
    return (f"{head}{'; '.join(notes)}. {rest}",) if notes else ()


def _scored(
    name: str, result: TaskResult, row: Row, notes: list[str]
) -> dict[int, tuple[Sample, float]]:
    """Document → sample and score."""
    samples = result.samples(row.filter)
    if not samples:
        there = result.samples_path.is_file()
        state = "is empty" if there else "is missing (evaluate with samples logged)"
        notes.append(f"{name}'s {result.samples_path.name} {state}")
        return {}
    with_metric = {i: s for i, s in samples.items() if row.metric in s.metrics}
    scores = {i: sample_score(s, row) for i, s in with_metric.items()}
    unscored = sum(score is None for score in scores.values())
    if not with_metric or unscored == len(scores):
        notes.append(f"{name}'s samples carry no {row.metric} of their own")
    elif unscored:
        notes.append(f"{unscored} of {name}'s samples carry no {row.metric} of their own")
    return {i: (samples[i], score) for i, score in scores.items() if score is not None}


def _pairs(
    first: dict[int, tuple[Sample, float]],
    second: dict[int, tuple[Sample, float]],
    baseline: str,
    variant: str,
    notes: list[str],
) -> tuple[Pair, ...]:
    for name, own, other in ((baseline, first, second), (variant, second, first)):
        only = len(own.keys() - other.keys())
        if only:
            notes.append(f"{only:,} samples only in {name}")
    pairs, different = [], 0
    for doc_id in sorted(first.keys() & second.keys()):
        (a, before), (b, after) = first[doc_id], second[doc_id]
        if (a.question, a.target) == (b.question, b.target):
            pairs.append(Pair(a, b, before, after))
        else:
            different += 1
    if different:
        notes.append(
            f"{different:,} samples have another prompt or expected answer in the two runs "
            "(another version of the data, or another prompt format?)"
        )
    return tuple(pairs)
