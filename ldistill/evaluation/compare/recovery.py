"""Which share of what the baseline lost a variant has back.

    share = (variant - baseline) / (original - baseline)

1 is all of it, 0 is as bad as the baseline, below 0 is worse. A group's share is the ratio of
sums over its tasks, each score divided by its row's highest possible one (so that MME's points
weigh like accuracies); a task that one of the three lacks is left out and named. Where the
baseline lost less than `LEAST_LOSS` there is nothing to recover, and no share.

    shares = recovery(table)             # variant → group → Share
    plot_recovery(table, Path("recovery.png"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldistill.evaluation.compare.tables import ScoreTable, family, group_title, markdown_table
from ldistill.evaluation.suites import Row

LEAST_LOSS = 0.005
"""Smallest loss, in shares of the highest score, that can be recovered in a meaningful way."""


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
    """Share recovered over ``rows``.

    Raises:
        ValueError: the table has no baseline or no original.
    """
    if table.baseline is None or table.original is None:
        raise ValueError("shares recovered need a baseline and an original.")
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
    return {
        v: {group: share(table, v, rows) for group, rows in table.groups.items()} for v in variants
    }


def recovery_markdown(table: ScoreTable, remarks: Sequence[str] = ()) -> str:
    """Shares by group and by task, with what was left out and further ``remarks``."""
    variants = list(recovery(table))
    lines: list[list[str]] = []
    gaps = [f"- {remark}" for remark in remarks]
    for group, rows in table.groups.items():
        shares = [share(table, v, rows) for v in variants]
        lines.append([f"**{group_title(group)}**", *(f"**{s.text}**" for s in shares)])
        lines += [[row.name, *(share(table, v, [row]).text for v in variants)] for row in rows]
        gaps += [
            f"- {v}, {group_title(group)}: without {', '.join(s.left_out)} (missing)."
            for v, s in zip(variants, shares)
            if s.left_out
        ]
    text = markdown_table(["Share recovered", *variants], lines)
    text += (
        f"\n({table.baseline} = 0%, {table.original} = 100%. A group is the ratio of its tasks' "
        f'summed scores, each on a scale of 0 to 1. "nothing lost": {table.baseline} is less '
        f"than {LEAST_LOSS:.1%} of the scale below {table.original}.)\n"
    )
    return text + ("\n" + "\n".join(gaps) + "\n" if gaps else "")


_COLOURS = {
    "Fine-tuning": "#8a8f98",
    "Uniform KD": "#d98b3a",
    "Selective KD": "#2f6fb5",
    "": "#6aa56a",
}
_FLOOR, _CEILING = -1.5, 1.75


def plot_recovery(table: ScoreTable, target: Path) -> bool:
    """Bars: share recovered, a panel per group, a bar per variant.

    Bars beyond the axis are cut, with their true value written beside them.

    Returns:
        False when no group of any variant has a share to draw (no file is written).
    """
    shares = recovery(table)
    groups = list(table.groups)
    if not any(s.value is not None for of in shares.values() for s in of.values()):
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1.6 + 3.1 * len(groups), 1.3 + 0.42 * len(shares))
    figure, axes = plt.subplots(1, len(groups), figsize=size, sharey=True, squeeze=False)
    for axis, group in zip(axes[0], groups):
        _draw_group(axis, group, shares)
    axes[0][0].set_yticks(range(len(shares)), list(shares))
    axes[0][0].invert_yaxis()
    title = f"Share recovered: {table.baseline} = 0%, {table.original} = 100%"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(target, dpi=150, bbox_inches="tight")  # a title may be wider than the panels
    plt.close(figure)
    return True


def _draw_group(axis, group: str, shares: Mapping[str, Mapping[str, Share]]) -> None:
    values = [of[group].value for of in shares.values()]
    known = [v for v in values if v is not None]
    low = max(_FLOOR, min([0.0, *known])) - (0.45 if min([0.0, *known]) < 0 else 0.1)
    high = min(_CEILING, max([1.0, *known])) + 0.35
    for place, (variant, of) in enumerate(shares.items()):
        length = min(max(of[group].value or 0.0, _FLOOR), _CEILING)
        axis.barh(place, length, color=_COLOURS[family(variant)], height=0.66)
        _label(axis, of[group], length, place)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(low, high)
    axis.set_title(group_title(group), fontsize=10)
    axis.xaxis.get_major_locator().set_params(nbins=5)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _label(axis, found: Share, length: float, place: int) -> None:
    """The share beside its bar, or in white inside a bar that is cut at the axis."""
    cut = found.value is not None and found.value != length
    text = f"◂ {found.text}" if cut and length < 0 else f"{found.text} ▸" if cut else found.text
    rightwards = (length >= 0) != cut
    axis.annotate(
        text,
        (length, place),
        xytext=(4 if rightwards else -4, 0),
        textcoords="offset points",
        ha="left" if rightwards else "right",
        va="center",
        fontsize=8,
        color="white" if cut else "black" if found.value is not None else "#777777",
    )
