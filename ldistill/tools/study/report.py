"""What a study says: `results.json`, one page of Markdown, two pictures.

`results.json` holds variant → task → {mean, std, seeds}, and the means over the language and the
reading tasks under `language` and `reading`; std is the sample deviation over seeds (0 for one).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldistill.evaluation.compare.recovery import recovery_markdown
from ldistill.evaluation.compare.tables import ScoreTable, score_table
from ldistill.evaluation.suites import rows
from ldistill.tools.study.variants import BASELINE, MAIN, ORIGINAL
from ldistill.training.metrics import read_metrics

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Variant → row id → one score per seed."""

SUITE = "tiny"
GROUPS = {"language": "tiny_language", "reading": "tiny_reading", "vision": "tiny_vision"}
RESULTS, REPORT = "results.json", "report.md"
TRADE_OFF, CURVES = "language_vs_reading.png", "loss_curves.png"
SMOOTHING = 5  # logged points per point of a curve


def write_report(
    scores: Scores, metrics: Mapping[str, Path], out: Path, command: str
) -> list[Path]:
    """Everything there is to say about the scores so far.

    Args:
        scores: of every variant evaluated; the original among them.
        metrics: variant → its ``metrics.jsonl``.
        out: folder, made if need be.
        command: what the reader types to get the same.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = summarise(scores)
    (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    drawn = plot_trade_off(results, out / TRADE_OFF)
    curves = plot_curves(metrics, out / CURVES)
    text = markdown(scores, results, command, drawn, curves)
    (out / REPORT).write_text(text, encoding="utf-8")
    names = [REPORT, RESULTS, *([TRADE_OFF] if drawn else []), *([CURVES] if curves else [])]
    return [out / name for name in names]


def summarise(scores: Scores) -> dict[str, dict[str, dict[str, float | int]]]:
    """Variant → task or group → {mean, std, seeds}."""
    results: dict[str, dict[str, dict[str, float | int]]] = {}
    for variant, by_row in scores.items():
        series = {row.id: list(by_row[row.id]) for row in rows(SUITE) if row.id in by_row}
        for name, group in GROUPS.items():
            of_group = [by_row[r.id] for r in rows(SUITE) if r.group == group and r.id in by_row]
            if of_group:
                series[name] = [statistics.fmean(seed) for seed in zip(*of_group, strict=True)]
        results[variant] = {name: _spread(values) for name, values in series.items()}
    return results


def _spread(values: Sequence[float]) -> dict[str, float | int]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "seeds": len(values)}


def markdown(scores: Scores, results: Mapping, command: str, drawn: bool, curves: bool) -> str:
    """The report as one page."""
    table = _table(scores)
    trained = (of_variant for name, of_variant in results.items() if name != ORIGINAL)
    counts = sorted({r["seeds"] for of_variant in trained for r in of_variant.values()}) or [1]
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    parts = [
        "# The study on the tiny world",
        f"`{command}`\n\nSeeds: {seeds}. Accuracy on held-out items; changes are against "
        f"`{BASELINE}`, `{ORIGINAL}` is the student before training.",
        table.markdown(),
    ]
    if table.baseline and table.original:
        parts += ["## Share of the loss recovered", recovery_markdown(table)]
        parts += ["## In short", _verdict(results)]
    if drawn:
        parts.append(f"![Language against reading, one point per variant]({TRADE_OFF})")
    if curves:
        parts.append(f"![Cross-entropy and KL over training]({CURVES})")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(scores: Scores) -> ScoreTable:
    roles = {"baseline": BASELINE, "original": ORIGINAL}
    known = {role: name for role, name in roles.items() if name in scores}
    return score_table(scores, rows(SUITE), **known)


def _verdict(results: Mapping) -> str:
    """Every variant in a line: language recovered, reading kept."""
    base, top = results[BASELINE], results[ORIGINAL]
    lost = top["language"]["mean"] - base["language"]["mean"]
    lines = [
        f"Labels alone (`{BASELINE}`) cost {lost:.3f} of language "
        f"({top['language']['mean']:.3f} → {base['language']['mean']:.3f})."
    ]
    for name, of_variant in results.items():
        if name in (BASELINE, ORIGINAL):
            continue
        gained = of_variant["language"]["mean"] - base["language"]["mean"]
        share = f"{gained / lost:.0%} of it" if lost > 0 else "nothing was lost"
        reading, before = of_variant["reading"]["mean"], base["reading"]["mean"]
        kept = f"{reading / before:.1%} of `{BASELINE}`'s" if before else f"`{BASELINE}` has none"
        mark = " **(the method)**" if name == MAIN else ""
        lines.append(
            f"- `{name}`{mark}: language {of_variant['language']['mean']:.3f} ({share}), reading "
            f"{reading:.3f} ({kept})."
        )
    return "\n".join([lines[0], "", *lines[1:]])


def plot_trade_off(results: Mapping, target: Path) -> bool:
    """Language against reading, a point per variant with its deviation; False without points."""
    points = {n: r for n, r in results.items() if "language" in r and "reading" in r}
    if not points:
        return False
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    for index, (name, result) in enumerate(points.items()):
        x, y = result["reading"], result["language"]
        spread = {"xerr": x["std"], "yerr": y["std"], "capsize": 3} if x["seeds"] > 1 else {}
        axis.errorbar(
            x["mean"], y["mean"], **spread, color=f"C{index % 10}",
            marker="D" if name == ORIGINAL else "*" if name == MAIN else "o",
            markersize=12 if name == MAIN else 7, linestyle="none", label=name,
        )  # fmt: skip
    axis.set_xlabel("reading (mean accuracy)")
    axis.set_ylabel("language (mean accuracy)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(target, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return True


def plot_curves(metrics: Mapping[str, Path], target: Path) -> bool:
    """CE and KL over steps of the variants that distil (the paper's Figure 2); False without."""
    curves = {name: read_metrics(path) for name, path in metrics.items()}
    curves = {name: records for name, records in curves.items() if any("kd" in r for r in records)}
    if not curves:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8))
    titles = {"ce": "cross-entropy (nats)", "kd": "KL to the teacher (nats)"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, records in curves.items():
            points = [(r["step"], r[key]) for r in records if key in r]
            axis.plot(*_smooth(points), label=name, linewidth=1.3)
        axis.set_xlabel("step")
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(target, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return True


def _smooth(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Running means over a few logged points."""
    steps = [step for step, _ in points]
    values = [
        statistics.fmean(v for _, v in points[max(0, i - SMOOTHING + 1) : i + 1])
        for i in range(len(points))
    ]
    return steps, values


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
