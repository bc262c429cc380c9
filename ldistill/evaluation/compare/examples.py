"""Won and lost samples of reading tasks, each with its failure mode, ready for a page.

A *lost* sample is one the baseline scores higher on: the variant's answer is judged. On a *won*
sample the baseline's answer is. Tasks whose answers are text to be read are looked at: those of the
document and reading groups, and generated answers of tasks in no suite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ldistill.evaluation.compare.comparison import Comparison
from ldistill.evaluation.compare.failure_modes import (
    MODES,
    Lexicon,
    Verdict,
    accepted_answers,
    judge,
)
from ldistill.evaluation.compare.matching import Match, Pair
from ldistill.evaluation.compare.results import Sample
from ldistill.evaluation.compare.sample_scores import sample_categories
from ldistill.evaluation.compare.tables import OTHER
from ldistill.evaluation.compare.task_data import TaskData, inline_picture
from ldistill.evaluation.suites import Row

READING_GROUPS = frozenset({"document", "tiny_reading", OTHER})
WON, LOST = "won", "lost"


@dataclass(frozen=True)
class Example:
    """A sample one of the two got wrong, and how."""

    variant: str
    row: Row
    outcome: str
    sample: Sample
    """The baseline's; question and target are those of both."""
    baseline_answer: str
    variant_answer: str
    category: str
    verdict: Verdict
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """All judged samples, with the counts the report shows."""

    found: tuple[Example, ...]
    looked_at: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    counts: Mapping[tuple[str, str, str], Counter[str]] = field(default_factory=dict)
    """(variant, row id, won or lost) → mode → samples."""


def find_examples(
    comparison: Comparison,
    lexicon: Lexicon | None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Examples:
    """Judge every won and lost sample of the reading tasks.

    Args:
        comparison: with pairs and their documents.
        lexicon: for the first mode; None leaves it out, and a note says so.
        progress: wraps the samples as they are gone through.
    """
    matches = [m for m in comparison.matches if m.pairs and _reads(comparison, m)]
    every = {m.row: _samples(comparison, m) for m in matches}
    work = [(m, p) for m in matches for p in m.pairs if p.before != p.after]
    found = [_example(comparison, m, p, every[m.row], lexicon) for m, p in progress(work)]
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for m in matches:
        for outcome in (LOST, WON):
            counts[m.variant, m.row.id, outcome] = Counter(dict.fromkeys(MODES, 0))
    for example in found:
        counts[example.variant, example.row.id, example.outcome][example.verdict.mode] += 1
    rows = tuple(dict.fromkeys(m.row for m in matches))
    return Examples(tuple(found), rows, tuple(_notes(comparison, rows, lexicon)), counts)


def _reads(comparison: Comparison, m: Match) -> bool:
    result = next(v for v in comparison.variants if v.name == m.variant).tasks[m.row.task]
    generated = result.config.get("output_type", "generate_until") == "generate_until"
    return m.row.group in READING_GROUPS and generated


def _example(
    comparison: Comparison,
    m: Match,
    pair: Pair,
    every: Mapping[int, Sample],
    lexicon: Lexicon | None,
) -> Example:
    outcome = LOST if pair.after < pair.before else WON
    wrong = pair.variant if outcome == LOST else pair.baseline
    data = comparison.data[m.row.task]
    accepted = _accepted(pair.baseline, m.row)
    verdict = judge(wrong.answer, accepted, lambda: data.text(pair.baseline, every), lexicon)
    return Example(
        variant=m.variant,
        row=m.row,
        outcome=outcome,
        sample=pair.baseline,
        baseline_answer=pair.baseline.answer,
        variant_answer=pair.variant.answer,
        category=", ".join(sample_categories(pair.baseline, m.row)),
        verdict=verdict,
        accepted=tuple(accepted),
    )


def _samples(comparison: Comparison, m: Match) -> Mapping[int, Sample]:
    base = next(v for v in comparison.variants if v.name == comparison.table.baseline)
    return base.tasks[m.row.task].samples(m.row.filter)


def _accepted(sample: Sample, row: Row) -> list[str]:
    """OCRBench logs its accepted answers as they are, other tasks as the string of the target."""
    value = sample.metrics.get(row.metric)
    logged = value.get("ground_truth") if isinstance(value, Mapping) else None
    if isinstance(logged, str):
        return [logged]
    if isinstance(logged, list) and logged:
        return [str(answer) for answer in logged]
    return accepted_answers(sample.target)


def _notes(comparison: Comparison, rows: Iterable[Row], lexicon: Lexicon | None) -> Iterable[str]:
    if lexicon is None:
        yield (
            'Mode "corrected" is missing: it needs a list of words (pip install pyspellchecker, '
            "or --words FILE)."
        )
    for row in rows:
        data = comparison.data[row.task]
        if data.documents is None:
            yield f"{row.name}: pictures and their text are missing: {data.reason}."


def chosen_for_page(examples: Examples, most: int) -> list[Example]:
    """At most ``most`` examples of each variant, task, outcome and mode, in sample order."""
    seen: Counter[tuple] = Counter()
    chosen = []
    for example in examples.found:
        key = (example.variant, example.row.id, example.outcome, example.verdict.mode)
        seen[key] += 1
        if seen[key] <= most:
            chosen.append(example)
    return chosen


def page_pictures(
    chosen: Iterable[Example], data: Mapping[str, TaskData]
) -> dict[tuple[str, int], list[str]]:
    """(task, document) → data URIs of its pictures, each picture encoded once."""
    pictures: dict[tuple[str, int], list[str]] = {}
    for example in chosen:
        key = (example.row.task, example.sample.doc_id)
        if key not in pictures:
            encoded = data[example.row.task].pictures(example.sample)
            pictures[key] = [uri for p in encoded if (uri := inline_picture(p))]
    return pictures
