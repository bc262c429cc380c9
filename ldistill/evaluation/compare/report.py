"""Writing a comparison down: one folder that can be read, pasted into a paper, or plotted again.

report.md          everything, for people          comparison.json   everything, for programs
scores.csv         the table of scores             table.tex         the same for LaTeX (booktabs)
paired.csv         won, lost, p by task, category  recovery.png      share recovered by group
ocrbench.csv       ten sub-tasks                   failures.html     won and lost samples, pictures
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldistill.evaluation.compare import ocrbench
from ldistill.evaluation.compare.comparison import Comparison, PairedRow, unlike_samples
from ldistill.evaluation.compare.examples import LOST, WON, Examples, write_page
from ldistill.evaluation.compare.failure_modes import MODES
from ldistill.evaluation.compare.recovery import plot_recovery, recovery, recovery_markdown
from ldistill.evaluation.compare.tables import MISSING, csv_text, markdown_table


def write(comparison: Comparison, examples: Examples, out: Path, most: int = 25) -> list[Path]:
    """Write the report; files of an earlier one in ``out`` are replaced or removed.

    Args:
        comparison, examples: of ``compare.compare`` and ``examples.find_examples``.
        out: made if need be.
        most: examples on the page of each variant, task, outcome and mode.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    picture, page = out / "recovery.png", out / "failures.html"
    for path in (picture, page):
        path.unlink(missing_ok=True)
    drawn = _has_roles(comparison) and plot_recovery(comparison.table, picture)
    if examples.looked_at:
        write_page(page, comparison, examples, most)
    plain = json.dumps(_plain(comparison, examples), indent=2, ensure_ascii=False)
    paired = paired_csv(comparison.paired) if comparison.paired else None
    parts = csv_text(*_ocrbench_lines(comparison)) if comparison.ocrbench else None
    written = []
    for name, text in (
        ("report.md", markdown(comparison, examples, drawn)),
        ("comparison.json", plain),
        ("scores.csv", comparison.table.csv()),
        ("table.tex", comparison.table.latex()),
        ("paired.csv", paired),
        ("ocrbench.csv", parts),
    ):
        (out / name).unlink(missing_ok=True)
        if text is not None:
            (out / name).write_text(text, encoding="utf-8")
            written.append(out / name)
    return [*written, *(path for path in (picture, page) if path.exists())]


def markdown(comparison: Comparison, examples: Examples, picture: bool) -> str:
    """The report as one Markdown text; ``picture``: whether recovery.png is beside it."""
    table = comparison.table
    roles = {table.baseline: "baseline", table.original: "original"}
    lines = [
        [v.name, roles.get(v.name, "variant"), v.model or "not named", len(v.tasks)]
        for v in sorted(comparison.variants, key=lambda v: table.variants.index(v.name))
    ]
    parts = ["# Comparison\n", markdown_table(["name", "role", "model", "tasks"], lines, left=3)]
    parts += ["## Scores\n", table.markdown()]
    if _has_roles(comparison):
        unlike = unlike_samples(comparison.variants, table)
        parts += ["## Share recovered\n", recovery_markdown(table, unlike)]
        parts += ["![Share recovered by group](recovery.png)\n"] if picture else []
    if comparison.paired:
        parts += ["## Samples won and lost\n", _paired_markdown(comparison)]
    if comparison.ocrbench:
        parts += ["## OCRBench\n", _ocrbench_markdown(comparison)]
    if examples.looked_at:
        parts += ["## Failure modes\n", _modes_markdown(comparison, examples)]
    if notes := [*comparison.notes, *examples.notes]:
        parts += ["## What is missing or left out\n", "\n".join(f"- {n}" for n in notes) + "\n"]
    return "\n".join(parts)


def _has_roles(comparison: Comparison) -> bool:
    return None not in (comparison.table.baseline, comparison.table.original)


def _paired_markdown(comparison: Comparison) -> str:
    baseline = comparison.table.baseline
    head = ["samples", baseline, "variant", "difference [95%]", "won", "lost", "p"]
    text = (
        f"On the samples that both answered; won: the variant scores higher than {baseline}. p is "
        "McNemar's exact test on won and lost (the sign test for graded scores), "
        "two-sided, not corrected for the number of tests; intervals are bootstraps over samples. "
        "Scores are means over samples, for MME the share of right answers.\n"
    )
    for variant in dict.fromkeys(p.variant for p in comparison.paired):
        tasks, parts = [], []
        for p in (p for p in comparison.paired if p.variant == variant):
            r = p.result
            scores = f"{r.samples:,}", f"{r.baseline:.3f}", f"{r.variant:.3f}"
            change = f"{r.difference:+.3f} [{r.low:+.3f}, {r.high:+.3f}]"
            line = [*scores, change, r.won, r.lost, p_value(r.p)]
            if p.category is None:
                tasks.append([p.row.name, *line])
            else:
                parts.append([p.row.name, p.category, *line])
        text += f"\n### {variant}\n\n" + markdown_table(["Task", *head], tasks)
        if parts:
            text += "\nBy category:\n\n"
            text += markdown_table(["Task", "Category", *head], parts, left=2)
    return text


def p_value(p: float) -> str:
    """A p value as text: ``0.031``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def paired_csv(lines: Sequence[PairedRow]) -> str:
    """Won and lost, one line per variant, task and category (empty: all of the task)."""
    head = "variant task metric category samples baseline score difference low high won lost p"
    body = []
    for p in lines:
        r = p.result
        numbers = [f"{n:.6g}" for n in (r.baseline, r.variant, r.difference, r.low, r.high)]
        before = [p.variant, p.row.task, p.row.metric, p.category or "", r.samples]
        body.append([*before, *numbers, r.won, r.lost, f"{r.p:.6g}"])
    return csv_text(head.split(), body)


def _ocrbench_lines(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """OCRBench as header and lines: sub-tasks, a total per group and of all."""
    baseline = comparison.table.baseline
    counts = {
        v: comparison.ocrbench[v] for v in comparison.table.variants if v in comparison.ocrbench
    }
    changes = [v for v in counts if v != baseline] if baseline in counts else []
    head = ["Group", "Sub-task", *counts, *(f"{v} change" for v in changes)]
    rows = []
    for group, kinds in ocrbench.GROUPS.items():
        rows += [(group, kind, {v: own.get(kind) for v, own in counts.items()}) for kind in kinds]
        if len(kinds) > 1:
            sums = {v: ocrbench.grouped(own).get(group) for v, own in counts.items()}
            rows.append((group, "Subtotal", sums))
    rows.append(("", "Total", {v: ocrbench.total(own) for v, own in counts.items()}))
    lines = []
    for group, name, found in rows:
        told = [f"{c.right:g}/{c.of}" if c else MISSING for c in found.values()]
        for before, after in ((found[baseline], found[v]) for v in changes):
            if before is None or after is None:
                told.append(MISSING)
            else:  # points gained, where both are of as many samples
                same, gained = before.of == after.of, after.right - before.right
                told.append(f"{gained:+g}" if same else "other samples")
        lines.append([group, name, *told])
    return head, lines


def _ocrbench_markdown(comparison: Comparison) -> str:
    head, lines = _ocrbench_lines(comparison)
    bold = [
        [f"**{c}**" if c and line[1] in ("Subtotal", "Total") else c for c in line]
        for line in lines
    ]
    text = "Right answers out of samples, recomputed from the samples.\n\n"
    text += markdown_table(head, bold, left=2)
    base = comparison.ocrbench.get(str(comparison.table.baseline), {})
    before = ocrbench.total(base)
    for variant, counts in comparison.ocrbench.items():
        after = ocrbench.total(counts)
        if after.of == before.of and after.right < before.right:
            shares = ocrbench.losses(base, counts)
            parts = ", ".join(f"{g} {c:+g} ({s:.0%})" for g, (c, s) in shares.items() if c)
            lost = before.right - after.right
            text += f"\nWhere {variant} loses its {lost:g} points: {parts}.\n"
    return text


def _modes_markdown(comparison: Comparison, examples: Examples) -> str:
    text = (
        "On lost samples the variant's answer is judged, on won ones "
        f"{comparison.table.baseline}'s. The samples are in [failures.html](failures.html), with "
        "the rules.\n\n"
    )
    names = {row.id: row.name for row in examples.looked_at}
    lines = [
        [v, names[row], outcome, *(counts[mode] for mode in MODES), sum(counts.values())]
        for (v, row, outcome), counts in examples.counts.items()
    ]
    return text + markdown_table(["Variant", "Task", "", *MODES, "all"], lines, left=3)


def _plain(comparison: Comparison, examples: Examples) -> dict[str, Any]:
    """Everything as JSON types."""
    table, roles = comparison.table, _has_roles(comparison)
    shares = recovery(table) if roles else {}
    return {
        "baseline": table.baseline,
        "original": table.original,
        "variants": {
            v.name: {"folder": str(v.folder), "model": v.model} for v in comparison.variants
        },
        "rows": [{"id": r.id, **asdict(r)} for r in table.rows],
        "scores": {
            v: {row.id: asdict(cell) for row in table.rows if (cell := table.cell(v, row))}
            for v in table.variants
        },
        "score_notes": {f"{v}/{row}": note for (v, row), note in table.notes.items()},
        "recovered": {
            v: {group: asdict(share) for group, share in of.items()} for v, of in shares.items()
        },
        "recovered_notes": unlike_samples(comparison.variants, table) if roles else [],
        "paired": [
            {"variant": p.variant, "row": p.row.id, "category": p.category}
            | asdict(p.result)
            | {"difference": p.result.difference}
            for p in comparison.paired
        ],
        "ocrbench": {
            v: {kind: asdict(c) for kind, c in counts.items()}
            for v, counts in comparison.ocrbench.items()
        },
        "failure_modes": [
            {"variant": v, "row": row, "outcome": outcome, **counts}
            for (v, row, outcome), counts in examples.counts.items()
        ],
        "notes": [*comparison.notes, *examples.notes],
    }


def headline(comparison: Comparison, examples: Examples, files: Sequence[Path]) -> str:
    """What the terminal shows: notes, counts of lost samples, and where everything is."""
    lines = [f"note: {note}" for note in (*comparison.notes, *examples.notes)]
    if examples.looked_at:
        for outcome in (LOST, WON):
            total = sum(example.outcome == outcome for example in examples.found)
            lines.append(f"reading samples {outcome}: {total:,}")
    return "\n".join([*lines, *map(str, files)])
