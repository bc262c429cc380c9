"""Writing a comparison down: one folder that can be read, pasted into a paper, or plotted again.

report.md          everything, for people          comparison.json   everything, for programs
scores.csv         the table of scores             table.tex         the same for LaTeX (booktabs)
paired.csv         won, lost, p by task, category  recovery.png      share recovered by group
ocrbench.csv       ten sub-tasks                   failures.html     won and lost samples, pictures

The page of won and lost samples opens from disk and needs nothing else. Filters (variant, task, won
or lost, mode, a search) stand in its address: ``failures.html#mode=elsewhere&task=...``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from importlib import resources
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from ldistill.evaluation.compare import ocrbench, tables
from ldistill.evaluation.compare.comparison import Comparison, sample_categories, unlike_samples
from ldistill.evaluation.compare.failure_modes import MODES, Lexicon, accepted_answers, judge
from ldistill.evaluation.compare.results import Sample
from ldistill.evaluation.compare.task_data import inline_picture
from ldistill.evaluation.suites import READING, Row

WON, LOST = "won", "lost"


@dataclass(frozen=True)
class Examples:
    """All judged samples, with the counts the report shows."""

    found: list[tuple[Sample, dict[str, Any]]]
    """The baseline's sample, and what the page says of how one of the two got it wrong."""
    notes: list[str]
    counts: dict[tuple[str, Row, str], Counter[str]]  # (variant, row, won or lost) → mode → samples


def find_examples(
    comparison: Comparison,
    lexicon: Lexicon | None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Examples:
    """Judge every won and lost sample of tasks whose generated answers are read in pictures.

    On a *lost* sample the baseline scores higher and the variant's answer is judged, on a *won* one
    the baseline's. Without a lexicon the first mode is left out; ``progress`` wraps the samples.
    """
    results = {v.name: v.tasks for v in comparison.variants}
    kind = "generate_until"
    matches = [
        m
        for m in comparison.matches
        if m.row.group in READING
        and results[m.variant][m.row.task].config.get("output_type", kind) == kind
    ]
    base = results.get(comparison.table.baseline)
    every = {m.row: base[m.row.task].samples(m.row.filter) for m in matches}
    outcomes = [(m.variant, m.row, outcome) for m in matches for outcome in (LOST, WON)]
    counts = {outcome: Counter(dict.fromkeys(MODES, 0)) for outcome in outcomes}
    found = []
    work = [(m, p) for m in matches for p in m.pairs if p.before != p.after]
    for m, pair in progress(work):
        outcome = LOST if pair.after < pair.before else WON
        wrong = pair.variant if outcome == LOST else pair.baseline
        data, sample = comparison.data[m.row.task], pair.baseline
        accepted = accepted_answers(sample.target)
        verdict = judge(wrong.answer, accepted, partial(data.text, sample, every[m.row]), lexicon)
        shown = {
            "variant": m.variant,
            "task": m.row.name,
            "category": ", ".join(sample_categories(sample, m.row)),
            "outcome": outcome,
            **verdict._asdict(),
            "doc_id": sample.doc_id,
            "question": sample.question,
            "expected": " | ".join(accepted),
            "baseline_answer": sample.answer,
            "variant_answer": pair.variant.answer,
            "picture": f"{m.row.task}/{sample.doc_id}",
        }
        found.append((sample, shown))
        counts[m.variant, m.row, outcome][verdict.mode] += 1
    notes = []
    if lexicon is None:
        notes.append(
            'Mode "corrected" is missing: it needs a list of words (pip install pyspellchecker, '
            "or --words FILE)."
        )
    for row in every:
        if reason := comparison.data[row.task].reason:
            notes.append(f"{row.name}: pictures and their text are missing: {reason}.")
    return Examples(found, notes, counts)


def write(comparison: Comparison, examples: Examples, out: Path, most: int = 25) -> list[Path]:
    """Write the report, at most so many examples of a kind; returns the files written.

    ``out`` is made if need be; files of an earlier report there are replaced or removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "recovery.png"
    picture.unlink(missing_ok=True)
    drawn = tables.plot_recovery(comparison.table, picture)
    plain = _plain(comparison, examples)
    texts = {
        "report.md": markdown(comparison, examples, drawn),
        "comparison.json": json.dumps(plain, indent=2, ensure_ascii=False, default=asdict),
        "scores.csv": comparison.table.csv(),
        "table.tex": comparison.table.latex(),
        "paired.csv": comparison.paired and _paired_csv(comparison),
        "ocrbench.csv": comparison.ocrbench and tables.csv_text(*_ocrbench_lines(comparison)),
        "failures.html": examples.counts and _page(comparison, examples, most),
    }
    for name, text in texts.items():
        (out / name).unlink(missing_ok=True)
        if text:
            (out / name).write_text(text, encoding="utf-8")
    return [path for path in (*(out / name for name in texts), picture) if path.exists()]


def markdown(comparison: Comparison, examples: Examples, picture: bool) -> str:
    """The report as one Markdown text; ``picture``: whether recovery.png is beside it."""
    table = comparison.table
    roles = {table.baseline: "baseline", table.original: "original"}
    lines = [
        [v.name, roles.get(v.name, "variant"), v.model or "not named", len(v.tasks)]
        for v in sorted(comparison.variants, key=lambda v: table.variants.index(v.name))
    ]
    notes = "".join(f"- {note}\n" for note in (*comparison.notes, *examples.notes))
    recovered = ""
    if table.baseline and table.original:
        recovered = tables.recovery_markdown(table, unlike_samples(comparison.variants, table))
        recovered += "\n![Share recovered by group](recovery.png)\n" if picture else ""
    parts = {
        "# Comparison": tables.markdown_table(["name", "role", "model", "tasks"], lines, left=3),
        "## Scores": table.markdown(),
        "## Share recovered": recovered,
        "## Samples won and lost": comparison.paired and _paired_markdown(comparison),
        "## OCRBench": comparison.ocrbench and _ocrbench_markdown(comparison),
        "## Failure modes": examples.counts and _modes_markdown(comparison, examples),
        "## What is missing or left out": notes,
    }
    return "\n".join(f"{title}\n\n{text}" for title, text in parts.items() if text)


def _paired_markdown(comparison: Comparison) -> str:
    baseline = comparison.table.baseline
    head = ["samples", baseline, "variant", "difference [95%]", "won", "lost", "p"]
    text = (
        f"On the samples that both answered; won: the variant scores higher than {baseline}. p is "
        "McNemar's exact test on won and lost (the sign test for graded scores), "
        "two-sided, not corrected for the number of tests; intervals are bootstraps over samples. "
        "Scores are means over samples, for MME the share of right answers.\n"
    )
    for variant, own in groupby(comparison.paired, key=itemgetter(0)):
        tasks, parts = [], []
        for _, row, category, r in own:
            scores = f"{r.samples:,}", f"{r.baseline:.3f}", f"{r.score:.3f}"
            change = f"{r.difference:+.3f} [{r.low:+.3f}, {r.high:+.3f}]"
            line = [*scores, change, r.won, r.lost, p_value(r.p)]
            if category is None:
                tasks.append([row.name, *line])
            else:
                parts.append([row.name, category, *line])
        text += f"\n### {variant}\n\n" + tables.markdown_table(["Task", *head], tasks)
        if parts:
            text += "\nBy category:\n\n"
            text += tables.markdown_table(["Task", "Category", *head], parts, left=2)
    return text


def p_value(p: float) -> str:
    """A p value as text: ``0.031``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _paired_csv(comparison: Comparison) -> str:
    """One line per variant, task and category (empty: all of the task)."""
    body = []
    for variant, row, category, result in comparison.paired:
        numbers = [f"{n:.6g}" if isinstance(n, float) else n for n in astuple(result)]
        body.append([variant, row.task, row.metric, category or "", *numbers])
    names = (field.name for field in fields(result))
    return tables.csv_text(["variant", "task", "metric", "category", *names], body)


def _ocrbench_lines(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """OCRBench as header and lines: sub-tasks, a total per group and of all."""
    baseline = comparison.table.baseline
    every = comparison.ocrbench
    counts = {v: every[v] for v in comparison.table.variants if v in every}
    changes = [v for v in counts if v != baseline] if baseline in counts else []
    parts = []
    for group, kinds in ocrbench.GROUPS.items():
        parts += [(group, kind, [kind]) for kind in kinds]
        parts += [(group, "Subtotal", kinds)] if len(kinds) > 1 else []
    lines = []
    for group, name, kinds in (*parts, ("", "Total", ocrbench.KINDS)):
        found = {v: ocrbench.total(own, kinds) for v, own in counts.items()}
        told = [f"{c.right:g}/{c.of}" if c else tables.MISSING for c in found.values()]
        for before, after in ((found[baseline], found[v]) for v in changes):
            change = tables.MISSING
            if before and after:  # points gained, where both are of as many samples
                same, gained = before.of == after.of, after.right - before.right
                change = f"{gained:+g}" if same else "other samples"
            told.append(change)
        lines.append([group, name, *told])
    return ["Group", "Sub-task", *counts, *(f"{v} change" for v in changes)], lines


def _ocrbench_markdown(comparison: Comparison) -> str:
    head, lines = _ocrbench_lines(comparison)
    for line in lines:
        if line[1] in ("Subtotal", "Total"):
            line[:] = [cell and f"**{cell}**" for cell in line]
    text = "Right answers out of samples, recomputed from the samples.\n\n"
    text += tables.markdown_table(head, lines, left=2)
    base = comparison.ocrbench.get(comparison.table.baseline, {})
    before = ocrbench.total(base)
    for variant, counts in comparison.ocrbench.items():
        after = ocrbench.total(counts)
        if before and after.of == before.of and after.right < before.right:
            shares = ocrbench.losses(base, counts)
            parts = ", ".join(f"{g} {c:+g} ({s:.0%})" for g, (c, s) in shares.items() if c)
            lost = before.right - after.right
            text += f"\nWhere {variant} loses its {lost:g} points: {parts}.\n"
    return text


def _modes_markdown(comparison: Comparison, examples: Examples) -> str:
    lines = [
        [v, row.name, outcome, *(counts[mode] for mode in MODES), counts.total()]
        for (v, row, outcome), counts in examples.counts.items()
    ]
    baseline = comparison.table.baseline
    return (
        f"On lost samples the variant's answer is judged, on won ones {baseline}'s. "
        "The samples are in [failures.html](failures.html), with the rules.\n\n"
    ) + tables.markdown_table(["Variant", "Task", "", *MODES, "all"], lines, left=3)


def _plain(comparison: Comparison, examples: Examples) -> dict[str, Any]:
    """Everything; what is no JSON type is a dataclass."""
    table = comparison.table
    roles = table.baseline and table.original
    models = {v.name: {"folder": str(v.folder), "model": v.model} for v in comparison.variants}
    return {
        "baseline": table.baseline,
        "original": table.original,
        "variants": models,
        "rows": [{"id": r.id, **asdict(r)} for r in table.rows],
        "scores": {
            v: {row.id: cell for row in table.rows if (cell := table.cell(v, row))}
            for v in table.variants
        },
        "score_notes": {f"{v}/{row}": note for (v, row), note in table.notes.items()},
        "recovered": tables.recovery(table) if roles else {},
        "recovered_notes": unlike_samples(comparison.variants, table) if roles else [],
        "paired": [
            {"variant": variant, "row": row.id, "category": category} | asdict(result)
            for variant, row, category, result in comparison.paired
        ],
        "ocrbench": comparison.ocrbench,
        "failure_modes": [
            {"variant": v, "row": row.id, "outcome": outcome, **counts}
            for (v, row, outcome), counts in examples.counts.items()
        ],
        "notes": [*comparison.notes, *examples.notes],
    }


def headline(comparison: Comparison, examples: Examples, files: Sequence[Path]) -> str:
    """What the terminal shows: notes, counts of lost samples, and where everything is."""
    lines = [f"note: {note}" for note in (*comparison.notes, *examples.notes)]
    for outcome in (LOST, WON) if examples.counts else ():
        total = sum(own.total() for key, own in examples.counts.items() if key[2] == outcome)
        lines.append(f"reading samples {outcome}: {total:,}")
    return "\n".join([*lines, *map(str, files)])


def _page(comparison: Comparison, examples: Examples, most: int) -> str:
    """The page: at most ``most`` of each variant, task, outcome and mode, in sample order."""
    seen: Counter[tuple] = Counter()
    kind = itemgetter("variant", "task", "outcome", "mode")
    listed, bare = [], {}
    pictures: dict[str, list[str]] = {}  # of task/document, as data URIs
    for sample, shown in examples.found:
        seen[kind(shown)] += 1
        if seen[kind(shown)] > most:
            continue
        listed.append(shown)
        task, _, _ = (document := shown["picture"]).rpartition("/")
        bare[shown["task"]] = comparison.data[task].reason or "none in its data"
        if document not in pictures:
            encoded = comparison.data[task].pictures(sample)
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
        "variants": list(dict.fromkeys(shown["variant"] for shown in listed)),
        "tasks": list(dict.fromkeys(shown["task"] for shown in listed)),
        "modes": MODES,
        "notes": examples.notes,
        "bare": bare,
        "pictures": pictures,
        "examples": listed,
    }
    template = resources.files(__package__).joinpath("failures.html").read_text("utf-8")
    # No text of a sample can end the script element that the data stand in.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return template.replace("__DATA__", text)
