"""Which share of what the baseline lost a variant has back.

    share = (variant - baseline) / (original - baseline)

1 is all of it, 0 is as bad as the baseline, below 0 is worse. A group's share is the ratio of
sums over its tasks, each score divided by its row's highest possible one (so that MME's points
weigh like accuracies); a task that one of the three lacks is left out and named. Where the
baseline lost less than `LEAST_LOSS` there is nothing to recover, and no share. The table must have
a baseline and an original.

    shares = recovery(table)             # variant → group → Share
    plot_recovery(table, Path("recovery.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldistill.evaluation.compare.tables import ScoreTable, family, markdown_table
from ldistill.evaluation.suites import Row, group_title

LEAST_LOSS = 0.005
"""Smallest loss, in shares of the highest score, that can be recovered in a meaningful way."""
_COLOURS = {
    "Fine-tuning": "#8a8f98",
    "Uniform KD": "#d98b3a",
    "Selective KD": "#2f6fb5",
    "": "#6aa56a",
}  # of families
_FLOOR, _CEILING = -1.5, 1.75


@dataclass(frozen=True)
class Share:
    """Share recovered over some tasks; ``value`` is None where nothing was lost or known."""

    value: float | None
    lost: float | None
    """Mean loss of the baseline on the rows compared, in shares of the highest score."""
    rows: tuple[str, ...]
    """Names of the rows that went in."""
    left_out: tuple[str, ...]

    @property
    def text(self) -> str:
        if self.value is not None:
            return f"{self.value:.0%}"
        return "missing" if self.lost is None else "nothing lost"


def share(table: ScoreTable, variant: str, rows: Sequence[Row]) -> Share:
    """Share recovered over ``rows``."""
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
    lines: list[list[str]] = []
    gaps = [f"- {remark}" for remark in remarks]
    for group, rows in table.groups.items():
        shares = {v: of[group] for v, of in found.items()}
        lines.append([f"**{group_title(group)}**", *(f"**{s.text}**" for s in shares.values())])
        lines += [[row.name, *(share(table, v, [row]).text for v in found)] for row in rows]
        gaps += [
            f"- {v}, {group_title(group)}: without {', '.join(s.left_out)} (missing)."
            for v, s in shares.items()
            if s.left_out
        ]
    text = markdown_table(["Share recovered", *found], lines)
    text += (
        f"\n({table.baseline} = 0%, {table.original} = 100%. A group is the ratio of its tasks' "
        f'summed scores, each on a scale of 0 to 1. "nothing lost": {table.baseline} is less '
        f"than {LEAST_LOSS:.1%} of the scale below {table.original}.)\n"
    )
    return text + ("\n" + "\n".join(gaps) + "\n" if gaps else "")


def plot_recovery(table: ScoreTable, target: Path) -> bool:
    """Bars: share recovered, a panel per group, a bar per variant.

    Bars beyond the axis are cut, with their true value written beside them.

    Returns:
        False when no group of any variant has a share to draw (no file is written).
    """
    found, groups = recovery(table), table.groups
    if not any(s.value is not None for of in found.values() for s in of.values()):
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1.6 + 3.1 * len(groups), 1.3 + 0.42 * len(found))
    figure, axes = plt.subplots(1, len(groups), figsize=size, sharey=True, squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        shares = [of[group] for of in found.values()]
        lengths = [min(max(s.value or 0.0, _FLOOR), _CEILING) for s in shares]
        bars = axis.barh(
            list(found), lengths, color=[_COLOURS[family(v)] for v in found], height=0.66
        )
        cut = [s.value not in (None, length) for s, length in zip(shares, lengths, strict=True)]
        labels = [f"{s.text} (cut)" if c else s.text for s, c in zip(shares, cut, strict=True)]
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
    plt.close(figure)
    return True
