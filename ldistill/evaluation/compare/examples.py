"""Won and lost samples of reading tasks, each with its failure mode, and the page that shows them.

A *lost* sample is one the baseline scores higher on: the variant's answer is judged. On a *won*
sample the baseline's answer is. Tasks whose answers are text to be read are looked at: those of the
document and reading groups, and generated answers of tasks in no suite.

The page is one file that opens from disk and needs nothing else. Its template is
``failures.html``; data go into it as JSON, pictures as data URIs. Filters (variant, task, won or
lost, mode, a search) stand in the address: ``failures.html#mode=elsewhere&task=...``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from ldistill.evaluation.compare.comparison import Comparison
from ldistill.evaluation.compare.failure_modes import MODES, Lexicon, accepted_answers, judge
from ldistill.evaluation.compare.results import Sample
from ldistill.evaluation.compare.samples import sample_categories
from ldistill.evaluation.compare.task_data import inline_picture
from ldistill.evaluation.suites import READING, Row

WON, LOST = "won", "lost"
_GENERATED = "generate_until"


@dataclass(frozen=True)
class Example:
    """A sample one of the two got wrong, and how."""

    variant: str
    row: Row
    outcome: str
    mode: str
    sample: Sample
    """The baseline's; question and target are those of both."""
    shown: Mapping[str, Any]
    """What the page says of it."""


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
    results = {v.name: v.tasks for v in comparison.variants}
    matches = [
        m
        for m in comparison.matches
        if m.pairs
        and m.row.group in READING
        and results[m.variant][m.row.task].config.get("output_type", _GENERATED) == _GENERATED
    ]
    base = results.get(str(comparison.table.baseline), {})
    every = {m.row: base[m.row.task].samples(m.row.filter) for m in matches}
    outcomes = [(m.variant, m.row.id, outcome) for m in matches for outcome in (LOST, WON)]
    counts = {outcome: Counter(dict.fromkeys(MODES, 0)) for outcome in outcomes}
    found = []
    work = [(m, p) for m in matches for p in m.pairs if p.before != p.after]
    for m, pair in progress(work):
        outcome = LOST if pair.after < pair.before else WON
        wrong = pair.variant if outcome == LOST else pair.baseline
        data, sample, others = comparison.data[m.row.task], pair.baseline, every[m.row]
        accepted = _accepted(sample, m.row)
        verdict = judge(wrong.answer, accepted, partial(data.text, sample, others), lexicon)
        shown = {
            "variant": m.variant,
            "task": m.row.name,
            "category": ", ".join(sample_categories(sample, m.row)),
            "outcome": outcome,
            "mode": verdict.mode,
            "rule": verdict.rule,
            "reason": verdict.reason,
            "doc_id": sample.doc_id,
            "question": sample.question,
            "expected": " | ".join(accepted),
            "baseline_answer": sample.answer,
            "variant_answer": pair.variant.answer,
            "picture": f"{m.row.task}/{sample.doc_id}",
        }
        found.append(Example(m.variant, m.row, outcome, verdict.mode, sample, shown))
        counts[m.variant, m.row.id, outcome][verdict.mode] += 1
    notes, rows = [], tuple(dict.fromkeys(m.row for m in matches))
    if lexicon is None:
        notes.append(
            'Mode "corrected" is missing: it needs a list of words (pip install pyspellchecker, '
            "or --words FILE)."
        )
    for row, data in ((row, comparison.data[row.task]) for row in rows):
        if data.documents is None:
            notes.append(f"{row.name}: pictures and their text are missing: {data.reason}.")
    return Examples(tuple(found), rows, tuple(notes), counts)


def _accepted(sample: Sample, row: Row) -> list[str]:
    """OCRBench logs its accepted answers as they are, other tasks as the string of the target."""
    value = sample.metrics.get(row.metric)
    logged = value.get("ground_truth") if isinstance(value, Mapping) else None
    if logged and isinstance(logged, (str, list)):
        return [logged] if isinstance(logged, str) else [str(answer) for answer in logged]
    return accepted_answers(sample.target)


# ---- the page ----


def write_page(path: Path, comparison: Comparison, examples: Examples, most: int) -> None:
    """Write the page: at most ``most`` of each variant, task, outcome and mode, in sample order."""
    seen: Counter[tuple] = Counter()
    listed = []
    for example in examples.found:
        key = (example.variant, example.row.id, example.outcome, example.mode)
        seen[key] += 1
        if seen[key] <= most:
            listed.append(example)
    pictures: dict[str, list[str]] = {}  # of task/document, as data URIs
    for example in listed:
        if (document := example.shown["picture"]) not in pictures:
            encoded = comparison.data[example.row.task].pictures(example.sample)
            pictures[document] = [uri for p in encoded if (uri := inline_picture(p))]
    baseline, found = comparison.table.baseline, len(examples.found)
    count = f"all {found:,}" if found == len(listed) else f"{len(listed):,} of {found:,}"
    data = {
        "title": f"Samples won and lost against {baseline}",
        "lead": (
            f"Listed are {count} samples of reading tasks on which a variant and {baseline} score "
            "differently. On a lost sample the variant's answer is judged, on a won one the "
            "baseline's."
        ),
        "baseline": baseline,
        "variants": list(dict.fromkeys(e.variant for e in listed)),
        "tasks": list(dict.fromkeys(e.row.name for e in listed)),
        "modes": MODES,
        "notes": list(examples.notes),
        "bare": {
            e.row.name: comparison.data[e.row.task].reason or "none in its data" for e in listed
        },
        "pictures": pictures,
        "examples": [e.shown for e in listed],
    }
    template = resources.files(__package__).joinpath("failures.html").read_text("utf-8")
    # No text of a sample can end the script element that the data stand in.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    path.write_text(template.replace("__DATA__", text), encoding="utf-8")
