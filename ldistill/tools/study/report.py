"""What a study says: `results.json`, one page of Markdown, two pictures.

`results.json` holds arm → task or group → {mean, std, seeds}, std being the sample deviation over
seeds (0 for one), and under `setting` and `cost` what was chosen and what its training took.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldistill.checkpoint.logs import read_metrics
from ldistill.common.run_files import METRICS
from ldistill.evaluation.compare.report import p_value
from ldistill.evaluation.compare.tables import (
    ScoreTable,
    markdown_table,
    recovery_markdown,
    score_table,
)
from ldistill.evaluation.suites import suite
from ldistill.tools.study.files import Run, Study
from ldistill.tools.study.running import Workplace, cost
from ldistill.tools.study.scores import Scores, paired_tests, summary

RESULTS, REPORT = "results.json", "report.md"
TRADE_OFF, CURVES = "language_vs_reading.png", "loss_curves.png"
SMOOTHING = 5  # logged points per point of a curve
Results = Mapping[str, Mapping[str, Any]]


def write_report(place: Workplace, problems: Sequence[str], out: Path, command: str) -> list[Path]:
    """Everything there is to say about what is finished so far; returns the files in ``out``.

    ``problems`` are sentences on what is missing, ``command`` is what one types to get the same.
    Raises ValueError, with the first problem: nothing was evaluated.
    """
    study, finished = place.study, list(place.finished())
    chosen: dict[str, list[Run]] = {}
    for arm in study.arms:
        best = place.chosen(arm)
        if runs := [run for run in finished if replace(run, seed=1) == best]:
            chosen[arm.name] = runs
    scores = {name: [place.scores(run) for run in runs] for name, runs in chosen.items()}
    if place.start_scores.rows:
        scores = {study.start: [place.start_scores], **scores}
    if not scores:
        raise ValueError(f"nothing was evaluated. {' '.join(problems[:1])}")
    results = {name: summary(study, of) for name, of in scores.items()}
    for name, runs in chosen.items():
        costs = [cost(place.folder(run)) for run in runs]
        mean = {unit: statistics.fmean(of[unit] for of in costs) for unit in costs[0]}
        results[name] |= {"setting": dict(runs[0].setting), "cost": mean}
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in finished:
        own = summary(study, [place.scores(run)])
        if run.seed == 1 and len(run.arm.settings) > 1 and (point := _point(study, own)):
            curves.setdefault(run.arm.name, []).append(point)
    (along, up), drawn = _axes(study), {}
    if plot_trade_off(study, results, curves, out / TRADE_OFF):
        drawn[TRADE_OFF] = f"{up.capitalize()} against {along}, one point per arm"
    metrics = {name: place.folder(runs[0]) / METRICS for name, runs in chosen.items()}
    if plot_curves(metrics, out / CURVES):
        drawn[CURVES] = "Cross-entropy and KL over training"
    text = markdown(study, scores, results, command, problems, drawn)
    (out / REPORT).write_text(text, encoding="utf-8")
    return [out / name for name in (REPORT, RESULTS, *drawn)]


def markdown(
    study: Study,
    scores: Mapping[str, Sequence[Scores]],
    results: Results,
    command: str,
    problems: Sequence[str],
    pictures: Mapping[str, str],
) -> str:
    """The report as one page."""
    table = _table(study, scores)
    counts = sorted({len(of) for name, of in scores.items() if name != study.start}) or [1]
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    part = f", of which {study.validation:.0%} chose the settings" if study.validation else ""
    parts = [
        f"# {study.title}",
        f"`{command}`\n\nSeeds: {seeds}. Scores on held-out items{part}; changes are against "
        f"`{study.baseline}`, `{study.start}` is the student before training.",
        table.markdown(),
    ]
    if table.baseline and table.original:
        parts += ["## Share of the loss recovered", recovery_markdown(table)]
        parts += ["## In short", _verdict(study, results)]
    parts += [f"![{caption}]({file})" for file, caption in pictures.items()]
    if trained := {name: of for name, of in results.items() if "cost" in of}:
        parts += ["## Settings and cost", _costs(trained)]
    if tests := paired_tests(study, scores):
        head = ["arm", "group", "documents", "difference", "won", "lost", "p", "p (Holm)"]
        lines = []
        for name, group, pair, corrected in tests:
            counts = [f"{pair.samples:,}", f"{pair.difference:+.3f}", pair.won, pair.lost]
            lines.append([name, group, *counts, p_value(pair.p), p_value(corrected)])
        parts += [
            "## Document by document",
            f"Against `{study.baseline}`; a document's score is "
            "its mean over seeds. p is the exact sign test on won and lost; Holm's "
            f"correction is over these {len(lines)} tests.",
            markdown_table(head, lines, 2),
        ]
    if problems:
        parts += ["## What is missing", "\n".join(f"- {problem}" for problem in problems)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(study: Study, scores: Mapping[str, Sequence[Scores]]) -> ScoreTable:
    found = [row for of in scores.values() for run in of for row in run.rows]
    listed = dict.fromkeys([*(suite(study.suite).rows if study.suite else ()), *found])
    values = {
        name: {row.id: [run.of(row) for run in of if row in run.rows] for row in listed}
        for name, of in scores.items()
    }
    roles = {"baseline": study.baseline, "original": study.start}
    known = {role: name for role, name in roles.items() if name in scores}
    return score_table(values, listed, **known)


def _axes(study: Study) -> tuple[str, str]:
    """Groups along and up: what is read, and what of language is left."""
    if study.axes:
        return tuple(study.axes)
    if {"reading", "language"} <= study.groups.keys():
        return "reading", "language"
    names = [*study.groups, *study.groups][:2] or ["", ""]
    return names[1], names[0]


def _point(study: Study, of_arm: Mapping[str, Any]) -> tuple[float, float] | None:
    x, y = _axes(study)
    return (of_arm[x]["mean"], of_arm[y]["mean"]) if x in of_arm and y in of_arm else None


def _verdict(study: Study, results: Results) -> str:
    """Every arm in a line: language recovered, reading kept."""
    along, up = _axes(study)
    points = {name: point for name, of in results.items() if (point := _point(study, of))}
    if not {study.baseline, study.start} <= points.keys():
        return f"Not every arm has {up} and {along}."
    (before, base), (_, top) = points[study.baseline], points[study.start]
    lost = top - base
    lines = [f"`{study.baseline}` costs {lost:.3f} of {up} ({top:.3f} → {base:.3f}).", ""]
    for name, (x, y) in points.items():
        if name not in (study.baseline, study.start):
            share = f"{(y - base) / lost:.0%} of it" if lost > 0 else "nothing was lost"
            kept = f"`{study.baseline}` has none"
            if before:  # below 0 are likelihoods, of which there is no share
                kept = f"{x / before:.1%} of" if before > 0 else f"{x - before:+.3f} against"
                kept += f" `{study.baseline}`'s"
            mark = " **(the method)**" if name == study.main else ""
            lines.append(f"- `{name}`{mark}: {up} {y:.3f} ({share}), {along} {x:.3f} ({kept}).")
    return "\n".join(lines)


def _costs(results: Results) -> str:
    lines = []
    for name, of in results.items():
        setting = ", ".join(f"{key} {value}" for key, value in of["setting"].items()) or "its own"
        steps, tokens, flops, seconds = of["cost"].values()
        told = f"{flops:.2e}" if flops or not steps else "not logged"
        lines.append(
            [name, setting, f"{steps:,.0f}", f"{tokens:,.0f}", told, f"{seconds / 60:.1f}"]
        )
    head = ["arm", "setting", "steps", "tokens", "FLOPs", "minutes"]
    return markdown_table(head, lines, 2) + "\nTraining of one seed; merging takes none.\n"


def plot_trade_off(
    study: Study,
    results: Results,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    target: Path,
) -> bool:
    """A point per arm with its deviation, the curve of its settings, and the Pareto front.

    Without points there is no file, and False.
    """
    along, up = _axes(study)
    points = {name: of for name, of in results.items() if _point(study, of)}
    if not points:
        return False
    figure = Figure(figsize=(6.4, 4.6))
    axis = figure.add_subplot(xlabel=f"{along} (mean score)", ylabel=f"{up} (mean score)")
    for index, (name, of) in enumerate(points.items()):
        x, y, own = of[along], of[up], name == study.main
        how = {"color": f"C{index % 10}", "markersize": 12 if own else 7, "label": name}
        how["marker"] = "D" if name == study.start else "*" if own else "o"
        if x["seeds"] > 1:
            how |= {"xerr": x["std"], "yerr": y["std"], "capsize": 3}
        axis.errorbar(x["mean"], y["mean"], linestyle="none", **how)
        if name in curves:
            axis.plot(*zip(*curves[name]), color=how["color"], marker=".", linewidth=1, alpha=0.7)
    front, highest = [], -math.inf
    for x, y in sorted({_point(study, of) for of in points.values()}, reverse=True):
        if y > highest:
            front, highest = [*front, (x, y)], y
    axis.plot(*zip(*front), color="black", linewidth=0.8, linestyle=":", zorder=0)
    axis.grid(alpha=0.3)
    _save(figure, axis, target)
    return True


def plot_curves(metrics: Mapping[str, Path], target: Path) -> bool:
    """CE and KL over steps of the arms that distil (the paper's Figure 2); False without."""
    curves = {name: read_metrics(path) for name, path in metrics.items()}
    curves = {name: records for name, records in curves.items() if any("kd" in r for r in records)}
    if not curves:
        return False
    figure = Figure(figsize=(10.5, 3.8))
    titles = {"ce": "cross-entropy (nats)", "kd": "KL to the teacher (nats)"}
    for place, (key, title) in enumerate(titles.items(), 1):
        axis = figure.add_subplot(1, 2, place, xlabel="step", ylabel=title)
        for name, records in curves.items():
            steps, values = zip(*((r["step"], r[key]) for r in records if key in r))
            ends = range(1, len(values) + 1)
            smooth = [statistics.fmean(values[max(0, end - SMOOTHING) : end]) for end in ends]
            axis.plot(steps, smooth, label=name, linewidth=1.3)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    _save(figure, axis, target)
    return True


def _save(figure: Figure, axis: Axes, target: Path) -> None:
    """With the names of its lines beside its last part."""
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(target, dpi=150, bbox_inches="tight")
