"""Score tables in the layout of the paper's Table 3: tasks in groups, a column per variant.

Plain data in, text out; the scores may come from anywhere and from several seeds:

    table = score_table(
        {"nanovlm-full": {"arc_easy": 0.540}, "lingudistill": {"arc_easy": [0.62, 0.63]}},
        rows("paper"), baseline="nanovlm-full",
    )
    table.markdown();  table.latex();  table.csv()

The best of a row is bold (not counting the original, which is what is to be recovered), the change
to the baseline stands in brackets. A score that is not there reads "missing", with a footnote.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ldistill.evaluation.suites import GROUPS, Row

Scores = Mapping[str, Mapping[str, float | Sequence[float] | None]]
"""Variant → row id (``Row.id``) → score, or one score per seed."""
Notes = Mapping[tuple[str, str], str]
"""(variant, row id) → what there is to say about that score."""

MISSING = "missing"
NO_RESULT = "No result for this task and variant."
OTHER = "other"

FAMILIES: dict[str, tuple[str, ...]] = {
    "Fine-tuning": ("nanovlm", "nanovlm-full", "nanovlm-lang"),
    "Uniform KD": ("distill-full", "distill-lang"),
    "Selective KD": ("lingudistill", "lingudistill-highkd", "lingudistill-lowkd"),
}
"""The paper's columns, in its order."""


@dataclass(frozen=True)
class Cell:
    """A score over seeds; ``std`` is the sample deviation, None with one seed."""

    mean: float
    std: float | None = None
    seeds: int = 1

    def text(self, digits: int) -> str:
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class ScoreTable:
    """Scores of variants, ready to be written down."""

    rows: tuple[Row, ...]
    variants: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    baseline: str | None = None
    original: str | None = None
    notes: Notes = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, list[Row]]:
        """Group key → its rows, in table order."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return groups

    def cell(self, variant: str | None, row: Row) -> Cell | None:
        return None if variant is None else self.cells.get((variant, row.id))

    def change(self, variant: str, row: Row) -> float | None:
        """Score less the baseline's; None for the baseline itself or where one is missing."""
        cell, base = self.cell(variant, row), self.cell(self.baseline, row)
        if variant == self.baseline or cell is None or base is None:
            return None
        return cell.mean - base.mean

    def best(self, row: Row) -> set[str]:
        """Variants whose printed score is the highest, the original not counted."""
        scores = {
            v: round(cell.mean, row.digits)
            for v in self.variants
            if v != self.original and (cell := self.cell(v, row)) is not None
        }
        return {v for v, score in scores.items() if score == max(scores.values())}

    def footnotes(self) -> list[str]:
        """Texts of the notes in the order in which the table meets them; numbers start at 1."""
        found = (self._note(v, row) for row in self.rows for v in self.variants)
        return list(dict.fromkeys(note for note in found if note))

    def _note(self, variant: str, row: Row) -> str | None:
        note = self.notes.get((variant, row.id))
        return note or (NO_RESULT if self.cell(variant, row) is None else None)

    def text(self, variant: str, row: Row) -> str:
        """Score and change, without emphasis or footnote."""
        cell, change = self.cell(variant, row), self.change(variant, row)
        if cell is None:
            return MISSING
        return cell.text(row.digits) + ("" if change is None else f" ({_signed(change, row)})")

    def caption(self) -> str:
        """What the columns and the emphasis mean."""
        parts = ["Best of a row in bold"]
        if self.original:
            parts[0] += f" ({self.original}, the original, not counted)"
        if self.baseline:
            parts.append(f"in brackets the change to {self.baseline}")
        if any(cell.std is not None for cell in self.cells.values()):
            parts.append("± is the standard deviation over seeds")
        return "; ".join(parts) + "."

    def markdown(self) -> str:
        """GitHub Markdown, with caption and footnotes."""
        numbers = {note: i for i, note in enumerate(self.footnotes(), 1)}
        head = ["Task", *(self._title(v) for v in self.variants)]
        lines = [_pipes(head), _pipes(["---"] + ["---:"] * len(self.variants))]
        for group, rows in self.groups.items():
            lines.append(_pipes([f"**{group_title(group)}**"] + [""] * len(self.variants)))
            for row in rows:
                best = self.best(row)
                cells = []
                for v in self.variants:
                    text = _escape_pipes(self.text(v, row))
                    if v in best:
                        score, space, change = text.partition(" (")
                        text = f"**{score}**{space}{change}"
                    note = self._note(v, row)
                    cells.append(text + (f" <sup>{numbers[note]}</sup>" if note else ""))
                lines.append(_pipes([_escape_pipes(row.name), *cells]))
        lines += ["", self.caption()]
        lines += ["", *(f"{number}. {note}" for note, number in numbers.items())] if numbers else []
        return "\n".join(lines) + "\n"

    def _title(self, variant: str) -> str:
        role = {self.baseline: " (baseline)", self.original: " (original)"}.get(variant, "")
        return _escape_pipes(variant + role)

    def csv(self) -> str:
        """One line per task; per variant a score, and its deviation where there are seeds."""
        seeds = any(cell.std is not None for cell in self.cells.values())
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        columns = [name for v in self.variants for name in ([v, f"{v} std"] if seeds else [v])]
        writer.writerow(["group", "task", "metric", *columns, "notes"])
        for row in self.rows:
            line: list[object] = [group_title(row.group), row.name, row.metric]
            for v in self.variants:
                cell = self.cell(v, row)
                line.append(MISSING if cell is None else f"{cell.mean:.6g}")
                if seeds:
                    line.append("" if cell is None or cell.std is None else f"{cell.std:.6g}")
            notes = [f"{v}: {note}" for v in self.variants if (note := self._note(v, row))]
            writer.writerow([*line, " ".join(notes)])
        return out.getvalue()

    def latex(self) -> str:
        """A ``table*`` with booktabs rules; needs ``\\usepackage{booktabs}``."""
        numbers = {note: i for i, note in enumerate(self.footnotes(), 1)}
        width = len(self.variants) + 1
        lines = [r"\begin{table*}", r"\centering", r"\small"]
        lines += [rf"\begin{{tabular}}{{l{'r' * len(self.variants)}}}", r"\toprule"]
        lines += self._latex_families()
        lines += [_ampersands(["Task", *(_tex(v) for v in self.variants)])]
        for group, rows in self.groups.items():
            title = rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_tex(group_title(group))}}}}}"
            lines += [r"\midrule", title + r" \\"]
            for row in rows:
                cells = (self._latex_cell(v, row, numbers) for v in self.variants)
                lines.append(_ampersands([_tex(row.name), *cells]))
        lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_tex(self.caption())}}}"]
        for note, number in numbers.items():
            lines.append(rf"\par\footnotesize\textsuperscript{{{number}}} {_tex(note)}")
        return "\n".join([*lines, r"\end{table*}"]) + "\n"

    def _latex_families(self) -> list[str]:
        """The line above the names, where the paper's families stand side by side."""
        cells: list[list] = []
        for v in self.variants:
            name = family(v)
            if cells and cells[-1][0] == name:
                cells[-1][1] += 1
            else:
                cells.append([name, 1])
        if not any(name for name, _ in cells):
            return []
        parts, rules, column = [], [], 2
        for name, span in cells:
            parts.append(rf"\multicolumn{{{span}}}{{c}}{{{name}}}")
            rules += [rf"\cmidrule(lr){{{column}-{column + span - 1}}}"] if name else []
            column += span
        return [_ampersands(["", *parts]), "".join(rules)]

    def _latex_cell(self, variant: str, row: Row, numbers: Mapping[str, int]) -> str:
        cell, change = self.cell(variant, row), self.change(variant, row)
        text = MISSING
        if cell is not None:
            text = f"{cell.mean:.{row.digits}f}"
            if cell.std is not None:
                text += rf"\,{{\scriptsize$\pm${cell.std:.{row.digits}f}}}"
            text = rf"\textbf{{{text}}}" if variant in self.best(row) else text
        if change is not None:
            text += rf" {{\scriptsize(${_signed(change, row)}$)}}"
        note = self._note(variant, row)
        return text + (rf"\textsuperscript{{{numbers[note]}}}" if note else "")


def score_table(
    scores: Scores,
    rows: Iterable[Row],
    *,
    baseline: str | None = None,
    original: str | None = None,
    notes: Notes | None = None,
) -> ScoreTable:
    """A table of plain scores, columns in the paper's order as far as it knows them.

    Args:
        scores: variant → row id → score, or a list with one score per seed; None is missing.
        rows: the table's rows; see ``suites.rows``.
        baseline: variant that changes refer to.
        original: the student before training (or the teacher), what is to be recovered.
        notes: footnotes by (variant, row id).

    Raises:
        ValueError: no scores, or an unknown baseline or original.
    """
    if not scores:
        raise ValueError("no variants to make a table of.")
    for role, name in (("baseline", baseline), ("original", original)):
        if name is not None and name not in scores:
            raise ValueError(unknown_variant(role, name, scores))
    rows = tuple(rows)
    cells = {}
    for variant, of_variant in scores.items():
        for row in rows:
            cell = _cell(of_variant.get(row.id))
            if cell is not None:
                cells[variant, row.id] = cell
    return ScoreTable(rows, order(scores, original), cells, baseline, original, notes or {})


def unknown_variant(role: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a --baseline or --original that is no variant."""
    return (
        f"{role} {name!r} is none of the variants; there are: {', '.join(known)}. Without "
        f"--{role} the scores can still be put side by side."
    )


def _cell(score: float | Sequence[float] | None) -> Cell | None:
    if score is None:
        return None
    values = [score] if isinstance(score, (int, float)) else [s for s in score if s is not None]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Cell(statistics.fmean(values), std, len(values))


def order(variants: Iterable[str], original: str | None = None) -> tuple[str, ...]:
    """Original first, the paper's variants in its order, then the others as they came."""
    known = [name for names in FAMILIES.values() for name in names]
    place = {name: i for i, name in enumerate(known)}
    names = list(variants)
    return tuple(sorted(names, key=lambda v: (v != original, place.get(v, len(known)))))


def family(variant: str) -> str:
    """The paper's heading above a variant, or nothing."""
    return next((title for title, names in FAMILIES.items() if variant in names), "")


def group_title(group: str) -> str:
    return GROUPS.get(group, "Other tasks" if group == OTHER else group)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[object]], left: int = 1) -> str:
    """A plain Markdown table whose first ``left`` columns are left-aligned."""
    align = ["---"] * left + ["---:"] * (len(head) - left)
    body = (_pipes([_escape_pipes(str(value)) for value in line]) for line in lines)
    return "\n".join([_pipes(head), _pipes(align), *body]) + "\n"


def csv_text(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Lines as CSV with a header."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *lines])
    return out.getvalue()


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _signed(change: float, row: Row) -> str:
    """A change with its sign; one that rounds to nothing is +0."""
    return f"{round(change, row.digits) + 0.0:+.{row.digits}f}"


def _escape_pipes(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


_TEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)
