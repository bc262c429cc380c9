"""Writing a comparison down: one folder that can be read, pasted into a paper, or plotted again.

report.md          everything, for people          comparison.json   everything, for programs
scores.csv         the table of scores             table.tex         the same for LaTeX (booktabs)
paired.csv         won, lost, p by task, category  recovery.png      share recovered by group
ocrbench.csv       ten sub-tasks                   failures.html     won and lost samples, pictures
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ldistill.evaluation.compare import ocrbench
from ldistill.evaluation.compare.comparison import Comparison, PairedRow
from ldistill.evaluation.compare.conditions import unlike_samples
from ldistill.evaluation.compare.examples import LOST, WON, Examples, chosen_for_page, page_pictures
from ldistill.evaluation.compare.failure_modes import MODES
from ldistill.evaluation.compare.paired import significance
from ldistill.evaluation.compare.recovery import plot_recovery, recovery, recovery_markdown
from ldistill.evaluation.compare.report_html import write_page
from ldistill.evaluation.compare.tables import MISSING, csv_text, markdown_table

FILES = (
    "report.md",
    "comparison.json",
    "scores.csv",
    "table.tex",
    "paired.csv",
    "recovery.png",
    "ocrbench.csv",
    "failures.html",
)


def write(comparison: Comparison, examples: Examples, out: Path, most: int = 25) -> list[Path]:
    """Write the report; files of an earlier one in ``out`` are replaced or removed.

    Args:
        comparison: of ``compare.compare``.
        examples: of ``examples.find_examples``.
        out: made if need be.
        most: examples on the page of each variant, task, outcome and mode.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    table = comparison.table
    texts = {
        "scores.csv": table.csv(),
        "table.tex": table.latex(),
        "comparison.json": json.dumps(_plain(comparison, examples), indent=2, ensure_ascii=False),
    }
    if comparison.paired:
        texts["paired.csv"] = paired_csv(comparison.paired)
    if comparison.ocrbench:
        texts["ocrbench.csv"] = csv_text(*_ocrbench_lines(comparison))
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    drawn = _has_roles(comparison) and plot_recovery(table, out / "recovery.png")
    if examples.looked_at:
        _page(comparison, examples, out / "failures.html", most)
    text = markdown(comparison, examples, picture=drawn)
    (out / "report.md").write_text(text, encoding="utf-8")
    return [out / name for name in FILES if (out / name).exists()]


def markdown(comparison: Comparison, examples: Examples, picture: bool) -> str:
    """The report as one Markdown text; ``picture``: whether recovery.png is beside it."""
    parts = ["# Comparison\n", _roles(comparison), "## Scores\n", comparison.table.markdown()]
    if _has_roles(comparison):
        unlike = unlike_samples(comparison.variants, comparison.table)
        parts += ["## Share recovered\n", recovery_markdown(comparison.table, unlike)]
        parts += ["![Share recovered by group](recovery.png)\n"] if picture else []
    if comparison.paired:
        parts += ["## Samples won and lost\n", _paired_markdown(comparison)]
    if comparison.ocrbench:
        parts += ["## OCRBench\n", _ocrbench_markdown(comparison)]
    if examples.looked_at:
        parts += ["## Failure modes\n", _modes_markdown(comparison, examples)]
    notes = [*comparison.notes, *examples.notes]
    if notes:
        parts += ["## What is missing or left out\n", "\n".join(f"- {n}" for n in notes) + "\n"]
    return "\n".join(parts)


def _has_roles(comparison: Comparison) -> bool:
    return None not in (comparison.table.baseline, comparison.table.original)


def _roles(comparison: Comparison) -> str:
    table = comparison.table
    lines = []
    for v in sorted(comparison.variants, key=lambda v: table.variants.index(v.name)):
        role = {table.baseline: "baseline", table.original: "original"}.get(v.name, "variant")
        lines.append([v.name, role, v.model or "not named", len(v.tasks)])
    return markdown_table(["name", "role", "model", "tasks"], lines, left=3)


def _paired_markdown(comparison: Comparison) -> str:
    baseline = comparison.table.baseline
    head = [baseline, "variant", "difference [95%]", "won", "lost", "p"]
    text = (
        f"On the samples that both answered; won: the variant scores higher than {baseline}. p is "
        "McNemar's exact test on won and lost (the sign test for graded scores), "
        "two-sided, not corrected for the number of tests; intervals are bootstraps over samples. "
        "Scores are means over samples, for MME the share of right answers.\n"
    )
    for variant in dict.fromkeys(p.variant for p in comparison.paired):
        own = [p for p in comparison.paired if p.variant == variant]
        tasks = [p for p in own if p.category is None]
        text += f"\n### {variant}\n\n"
        text += markdown_table(["Task", "samples", *head], [_paired_line(p) for p in tasks])
        parts = [p for p in own if p.category is not None]
        if parts:
            lines = [[p.row.name, *_paired_line(p, p.category)] for p in parts]
            columns = ["Task", "Category", "samples", *head]
            text += "\nBy category:\n\n" + markdown_table(columns, lines, left=2)
    return text


def _paired_line(p: PairedRow, name: str | None = None) -> list[Any]:
    r = p.result
    return [
        name or p.row.name,
        f"{r.samples:,}",
        f"{r.baseline:.3f}",
        f"{r.variant:.3f}",
        f"{r.difference:+.3f} [{r.low:+.3f}, {r.high:+.3f}]",
        r.won,
        r.lost,
        significance(r.p),
    ]


def paired_csv(lines: Iterable[PairedRow]) -> str:
    """Won and lost, one line per variant, task and category (empty: all of the task)."""
    head = ["variant", "task", "metric", "category", "samples", "baseline", "score", "difference",
            "low", "high", "won", "lost", "p"]  # fmt: skip
    body = []
    for p in lines:
        r = p.result
        numbers = (r.baseline, r.variant, r.difference, r.low, r.high)
        before = [p.variant, p.row.task, p.row.metric, p.category or "", r.samples]
        body.append([*before, *(f"{n:.6g}" for n in numbers), r.won, r.lost, f"{r.p:.6g}"])
    return csv_text(head, body)


def _ocrbench_lines(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """OCRBench as header and lines: sub-tasks, a total per group and of all."""
    variants = [v for v in comparison.table.variants if v in comparison.ocrbench]
    baseline = comparison.table.baseline
    changes = [v for v in variants if v != baseline] if baseline in variants else []
    head = ["Group", "Sub-task", *variants, *(f"{v} change" for v in changes)]
    lines: list[list[Any]] = []

    def add(group: str, name: str, pick: Any) -> None:
        found = {v: pick(comparison.ocrbench[v]) for v in variants}
        texts = [
            MISSING if found[v] is None else f"{found[v].right:g}/{found[v].of}" for v in variants
        ]
        lines.append([group, name, *texts, *(_gain(found[baseline], found[v]) for v in changes)])

    for group, kinds in ocrbench.GROUPS.items():
        for kind in kinds:
            add(group, kind, lambda counts, kind=kind: counts.get(kind))
        if len(kinds) > 1:
            add(group, "Subtotal", lambda counts, g=group: ocrbench.grouped(counts).get(g))
    add("", "Total", ocrbench.total)
    return head, lines


def _gain(before: ocrbench.Count | None, after: ocrbench.Count | None) -> str:
    """Points gained; "missing" where a side is, "differs" where the samples are not as many."""
    if before is None or after is None:
        return MISSING
    return f"{after.right - before.right:+g}" if before.of == after.of else "other samples"


def _ocrbench_markdown(comparison: Comparison) -> str:
    head, lines = _ocrbench_lines(comparison)
    bold = [
        [f"**{c}**" if c and line[1] in ("Subtotal", "Total") else c for c in line]
        for line in lines
    ]
    text = "Right answers out of samples, recomputed from the samples.\n\n"
    text += markdown_table(head, bold, left=2)
    baseline = comparison.table.baseline
    base = comparison.ocrbench.get(baseline) if baseline else None
    for variant, counts in comparison.ocrbench.items():
        whole = ocrbench.total(counts)
        if base is None or variant == baseline or whole.of != ocrbench.total(base).of:
            continue
        if whole.right >= ocrbench.total(base).right:
            continue
        shares = ocrbench.losses(base, counts)
        parts = ", ".join(f"{g} {c:+g} ({s:.0%})" for g, (c, s) in shares.items() if c)
        lost = ocrbench.total(base).right - whole.right
        text += f"\nWhere {variant} loses its {lost:g} points: {parts}.\n"
    return text


def _modes_markdown(comparison: Comparison, examples: Examples) -> str:
    baseline = comparison.table.baseline
    text = (
        f"On lost samples the variant's answer is judged, on won ones {baseline}'s. The samples "
        "are in [failures.html](failures.html), with the rules.\n\n"
    )
    names = {row.id: row.name for row in examples.looked_at}
    lines = [
        [v, names[row], outcome, *(counts[mode] for mode in MODES), sum(counts.values())]
        for (v, row, outcome), counts in examples.counts.items()
    ]
    return text + markdown_table(["Variant", "Task", "", *MODES, "all"], lines, left=3)


def _page(comparison: Comparison, examples: Examples, path: Path, most: int) -> None:
    chosen = chosen_for_page(examples, most)
    data = comparison.data
    without = {r.name: data[r.task].reason for r in examples.looked_at if data[r.task].reason}
    write_page(
        path,
        chosen,
        page_pictures(chosen, data),
        baseline=str(comparison.table.baseline),
        found=len(examples.found),
        without_picture=without,
        notes=examples.notes,
    )


def _plain(comparison: Comparison, examples: Examples) -> dict[str, Any]:
    """Everything as JSON types."""
    table = comparison.table
    scores = {
        v: {row.id: dataclasses.asdict(cell) for row in table.rows if (cell := table.cell(v, row))}
        for v in table.variants
    }
    plain: dict[str, Any] = {
        "baseline": table.baseline,
        "original": table.original,
        "variants": {
            v.name: {"folder": str(v.folder), "model": v.model} for v in comparison.variants
        },
        "rows": [{"id": r.id, **dataclasses.asdict(r)} for r in table.rows],
        "scores": scores,
        "score_notes": {f"{v}/{row}": note for (v, row), note in table.notes.items()},
        "recovered": {},
        "recovered_notes": [],
        "paired": [_plain_pair(p) for p in comparison.paired],
        "ocrbench": {
            v: {kind: dataclasses.asdict(c) for kind, c in counts.items()}
            for v, counts in comparison.ocrbench.items()
        },
        "failure_modes": [
            {"variant": v, "row": row, "outcome": outcome, **counts}
            for (v, row, outcome), counts in examples.counts.items()
        ],
        "notes": [*comparison.notes, *examples.notes],
    }
    if _has_roles(comparison):
        plain["recovered"] = {
            v: {group: dataclasses.asdict(share) for group, share in shares.items()}
            for v, shares in recovery(table).items()
        }
        plain["recovered_notes"] = unlike_samples(comparison.variants, table)
    return plain


def _plain_pair(p: PairedRow) -> dict[str, Any]:
    kept = {"variant": p.variant, "row": p.row.id, "category": p.category}
    return kept | dataclasses.asdict(p.result) | {"difference": p.result.difference}


def headline(comparison: Comparison, examples: Examples, files: Sequence[Path]) -> str:
    """What the terminal shows: notes, counts of lost samples, and where everything is."""
    lines = [f"note: {note}" for note in (*comparison.notes, *examples.notes)]
    for outcome in (LOST, WON):
        total = sum(
            sum(c.values()) for (_, _, kind), c in examples.counts.items() if kind == outcome
        )
        if examples.looked_at:
            lines.append(f"reading samples {outcome}: {total:,}")
    return "\n".join([*lines, *(str(path) for path in files)])
