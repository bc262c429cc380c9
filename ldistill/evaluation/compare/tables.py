"""Score tables in the layout of the paper's Table 3: tasks in groups, a column per variant.

    scores = {"nanovlm-full": {"arc_easy": 0.540}, "lingudistill": {"arc_easy": [0.62, 0.63]}}
    score_table(scores, suite("paper").rows, baseline="nanovlm-full").markdown()

The best of a row is bold (not counting the original, which is what is to be recovered), the change
to the baseline stands in brackets. A score that is not there reads "missing", with a footnote.

The share recovered is (variant - baseline) / (original - baseline): 1 is all that was lost. A
group's share is the ratio of sums over its tasks, each score divided by its row's highest possible
one (so that MME's points weigh like accuracies); a task that one of the three lacks is left out and
named. Where the baseline lost less than `LEAST_LOSS` there is nothing to recover, and no share.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ldistill.evaluation.suites import Row, group_title

MISSING = "missing"
FAMILIES: dict[str, tuple[str, ...]] = {
    "Fine-tuning": ("nanovlm", "nanovlm-full", "nanovlm-lang"),
    "Uniform KD": ("distill-full", "distill-lang"),
    "Selective KD": ("lingudistill", "lingudistill-highkd", "lingudistill-lowkd"),
}
"""The paper's columns, in its order."""
LEAST_LOSS = 0.005  # that can be recovered in a meaningful way, in shares of the highest score
_COLOURS = dict(zip((*FAMILIES, ""), ("#8a8f98", "#d98b3a", "#2f6fb5", "#6aa56a"), strict=True))

# How spread, best, change and note of a score are written.
_MARKDOWN = (" ± {}", "**{}**", " ({})", " <sup>{}</sup>")
_LATEX = (r"\,{{\scriptsize$\pm${}}}", r"\textbf{{{}}}", r" {{\scriptsize(${}$)}}")
_LATEX += (r"\textsuperscript{{{}}}",)


@dataclass(frozen=True)
class Cell:
    """A score over seeds; ``std`` is the sample deviation, None with one seed."""

    mean: float
    std: float | None = None
    seeds: int = 1


@dataclass(frozen=True)
class ScoreTable:
    """Scores of variants, ready to be written down."""

    rows: tuple[Row, ...]
    variants: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    baseline: str | None
    original: str | None
    notes: Mapping[tuple[str, str], str]  # (variant, row id) → what to say about that score

    @property
    def groups(self) -> dict[str, list[Row]]:
        """Group key → its rows, in table order."""
        keys = dict.fromkeys(row.group for row in self.rows)
        return {key: [row for row in self.rows if row.group == key] for key in keys}

    def cell(self, variant: str | None, row: Row) -> Cell | None:
        return self.cells.get((variant, row.id))

    def best(self, row: Row) -> set[str]:
        """Variants whose printed score is the highest, the original not counted."""
        cells = {v: self.cell(v, row) for v in self.variants if v != self.original}
        scores = {v: round(cell.mean, row.digits) for v, cell in cells.items() if cell}
        return {v for v, score in scores.items() if score == max(scores.values())}

    def footnotes(self) -> dict[str, int]:
        """Notes with their numbers, in the order in which the table meets them."""
        found = (self._note(v, row) for row in self.rows for v in self.variants)
        return {note: i for i, note in enumerate(dict.fromkeys(filter(None, found)), 1)}

    def caption(self) -> str:
        parts = ["Best of a row in bold"]
        if self.original:
            parts[0] += f" ({self.original}, the original, not counted)"
        if self.baseline:
            parts.append(f"in brackets the change to {self.baseline}")
        if self.seeds:
            parts.append("± is the standard deviation over seeds")
        return "; ".join(parts) + "."

    def markdown(self) -> str:
        notes = self.footnotes()
        roles = {self.baseline: " (baseline)", self.original: " (original)"}
        head = ["Task", *(v + roles.get(v, "") for v in self.variants)]
        lines = []
        for group, rows in self.groups.items():
            lines.append([f"**{group_title(group)}**"] + [""] * len(self.variants))
            lines += [[row.name, *self._texts(row, _MARKDOWN, notes)] for row in rows]
        text = markdown_table(head, lines) + f"\n{self.caption()}\n"
        footnotes = "".join(f"{number}. {note}\n" for note, number in notes.items())
        return text + ("\n" + footnotes if footnotes else "")

    def csv(self) -> str:
        parts = 2 if self.seeds else 1
        columns = [name for v in self.variants for name in (v, f"{v} std")[:parts]]
        lines = []
        for row in self.rows:
            line = [group_title(row.group), row.name, row.metric]
            for cell in (self.cell(v, row) for v in self.variants):
                mean = MISSING if cell is None else f"{cell.mean:.6g}"
                std = "" if cell is None or cell.std is None else f"{cell.std:.6g}"
                line += (mean, std)[:parts]
            notes = [f"{v}: {note}" for v in self.variants if (note := self._note(v, row))]
            lines.append([*line, " ".join(notes)])
        return csv_text(["group", "task", "metric", *columns, "notes"], lines)

    def latex(self) -> str:
        """A ``table*`` with booktabs rules; needs ``\\usepackage{booktabs}``."""
        notes = self.footnotes()
        lines = [r"\begin{table*}", r"\centering", r"\small"]
        lines += [rf"\begin{{tabular}}{{l{'r' * len(self.variants)}}}", r"\toprule"]
        spans = [(name, len(list(columns))) for name, columns in groupby(self.variants, key=family)]
        if any(name for name, _ in spans):  # the paper's families stand above the names
            parts, rules, column = [], "", 2
            for name, span in spans:
                parts.append(rf"\multicolumn{{{span}}}{{c}}{{{name}}}")
                rules += rf"\cmidrule(lr){{{column}-{column + span - 1}}}" if name else ""
                column += span
            lines += [_latex_line(["", *parts]), rules]
        lines.append(_latex_line(["Task", *map(_tex, self.variants)]))
        for group, rows in self.groups.items():
            title = rf"\textit{{{_tex(group_title(group))}}}"
            whole = rf"\multicolumn{{{len(self.variants) + 1}}}{{l}}{{{title}}}"
            lines += [r"\midrule", _latex_line([whole])]
            lines += [_latex_line([_tex(r.name), *self._texts(r, _LATEX, notes)]) for r in rows]
        lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_tex(self.caption())}}}"]
        for note, number in notes.items():
            lines.append(rf"\par\footnotesize\textsuperscript{{{number}}} {_tex(note)}")
        return "\n".join([*lines, r"\end{table*}"]) + "\n"

    def _texts(self, row: Row, style: Sequence[str], notes: Mapping[str, int]) -> list[str]:
        spread, bold, changed, footnote = style
        best, base, texts = self.best(row), self.cell(self.baseline, row), []
        for variant in self.variants:
            cell, text = self.cell(variant, row), MISSING
            if cell is not None:
                text = f"{cell.mean:.{row.digits}f}"
                text += "" if cell.std is None else spread.format(f"{cell.std:.{row.digits}f}")
            if variant in best:
                text = bold.format(text)
            if variant != self.baseline and cell is not None and base is not None:
                change = round(cell.mean - base.mean, row.digits) + 0.0  # never -0
                text += changed.format(f"{change:+.{row.digits}f}")
            if note := self._note(variant, row):
                text += footnote.format(notes[note])
            texts.append(text)
        return texts

    def _note(self, variant: str, row: Row) -> str | None:
        note = self.notes.get((variant, row.id))
        missing = self.cell(variant, row) is None
        return note or ("No result for this task and variant." if missing else None)

    @property
    def seeds(self) -> bool:
        """Whether some score is of several."""
        return any(cell.std is not None for cell in self.cells.values())


def score_table(
    scores: Mapping[str, Mapping[str, float | Sequence[float] | None]],
    rows: Iterable[Row],
    *,
    baseline: str | None = None,
    original: str | None = None,
    notes: Mapping[tuple[str, str], str] | None = None,
) -> ScoreTable:
    """A table of plain scores, columns in the paper's order as far as it knows them.

    ``scores``: variant → row id (``Row.id``) → score, or one per seed; a None is missing.
    """
    rows = tuple(rows)
    cells = {}
    for variant, own in scores.items():
        for row in rows:
            score = own.get(row.id)
            seeds = score if isinstance(score, Sequence) else [score]
            if values := [value for value in seeds if value is not None]:
                std = statistics.stdev(values) if len(values) > 1 else None
                cells[variant, row.id] = Cell(statistics.fmean(values), std, len(values))
    return ScoreTable(rows, order(scores, original), cells, baseline, original, notes or {})


def order(variants: Iterable[str], original: str | None = None) -> tuple[str, ...]:
    """Original first, the paper's variants in its order, then the others as they came."""
    known = [name for names in FAMILIES.values() for name in names]
    return tuple(sorted(variants, key=lambda v: (v != original, [*known, v].index(v))))


def family(variant: str) -> str:
    return next((title for title, names in FAMILIES.items() if variant in names), "")


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[object]], left: int = 1) -> str:
    """A plain Markdown table whose first ``left`` columns are left-aligned."""
    align = ["---"] * left + ["---:"] * (len(head) - left)
    escapes = str.maketrans({"|": r"\|", "\n": " "})
    table = ([str(v).translate(escapes) for v in line] for line in (head, align, *lines))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def csv_text(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *lines])
    return out.getvalue()


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


_TEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
}


def _tex(text: str) -> str:
    return text.translate(str.maketrans(_TEX))


@dataclass(frozen=True)
class Share:
    """Share recovered over some tasks; ``value`` is None where nothing was lost or known."""

    value: float | None
    lost: float | None  # mean loss of the baseline, in shares of the highest score
    rows: tuple[str, ...]  # names of those that went in
    left_out: tuple[str, ...]

    @property
    def text(self) -> str:
        if self.value is not None:
            return f"{self.value:.0%}"
        return "missing" if self.lost is None else "nothing lost"


def share(table: ScoreTable, variant: str, rows: Sequence[Row]) -> Share:
    names = (variant, table.baseline, table.original)
    full = [row for row in rows if all(table.cell(name, row) for name in names)]
    left_out = tuple(row.name for row in rows if row not in full)
    if not full:
        return Share(None, None, (), left_out)
    mine, base, top = (
        sum(table.cell(name, row).mean / row.top for row in full) / len(full) for name in names
    )
    lost = top - base
    value = (mine - base) / lost if lost >= LEAST_LOSS else None
    return Share(value, lost, tuple(row.name for row in full), left_out)


def recovery(table: ScoreTable) -> dict[str, dict[str, Share]]:
    """Variant → group → share, for every variant but the baseline and the original."""
    variants = [v for v in table.variants if v not in (table.baseline, table.original)]
    return {v: {key: share(table, v, rows) for key, rows in table.groups.items()} for v in variants}


def recovery_markdown(table: ScoreTable, remarks: Sequence[str] = ()) -> str:
    """Shares by group and by task, with what was left out and further ``remarks``."""
    found = recovery(table)
    lines, gaps = [], [f"- {remark}" for remark in remarks]
    for group, rows in table.groups.items():
        shares = {v: of[group] for v, of in found.items()}
        lines.append([f"**{group_title(group)}**", *(f"**{s.text}**" for s in shares.values())])
        lines += [[row.name, *(share(table, v, [row]).text for v in found)] for row in rows]
        for v, s in shares.items():
            if s.left_out:
                missing = ", ".join(s.left_out)
                gaps.append(f"- {v}, {group_title(group)}: without {missing} (missing).")
    text = markdown_table(["Share recovered", *found], lines)
    text += (
        f"\n({table.baseline} = 0%, {table.original} = 100%. A group is the ratio of its tasks' "
        f'summed scores, each on a scale of 0 to 1. "nothing lost": {table.baseline} is less '
        f"than {LEAST_LOSS:.1%} of the scale below {table.original}.)\n"
    )
    return text + "".join(["\n", *(f"{gap}\n" for gap in gaps)] if gaps else [])


def plot_recovery(table: ScoreTable, target: Path) -> bool:
    """Bars of the share recovered, a panel per group; False, and no file, without any share."""
    found, groups = recovery(table), table.groups
    if not any(s.value is not None for of in found.values() for s in of.values()):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 3.1 * len(groups), 1.3 + 0.42 * len(found)))
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        shares = [of[group] for of in found.values()]
        lengths = [min(max(s.value or 0.0, -1.5), 1.75) for s in shares]
        colours = [_COLOURS[family(v)] for v in found]
        bars = axis.barh(list(found), lengths, color=colours, height=0.66)
        cut = (s.value not in (None, length) for s, length in zip(shares, lengths, strict=True))
        labels = [s.text + " (cut)" * c for s, c in zip(shares, cut, strict=True)]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(min(0.0, *lengths) - 0.5, max(1.0, *lengths) + 0.5)  # room for the labels
        axis.xaxis.get_major_locator().set_params(nbins=5)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(group_title(group), fontsize=10)
    axes[0][0].invert_yaxis()
    title = f"Share recovered: {table.baseline} = 0%, {table.original} = 100%"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(target, dpi=150, bbox_inches="tight")  # a title may be wider than the panels
    return True
