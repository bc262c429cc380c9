"""What a study says: `results.json`, one page of Markdown, two pictures.

`results.json` holds arm → task or group → {mean, std, seeds}, std being the sample deviation over
seeds (0 for one), and under `setting` and `cost` what was chosen and what its training took.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ldistill.checkpoint.logs import read_metrics
from ldistill.common.run_files import METRICS
from ldistill.evaluation.compare import tables
from ldistill.evaluation.compare.report import p_value
from ldistill.evaluation.suites import suite
from ldistill.tools.study.files import Run, Study
from ldistill.tools.study.running import Workplace, cost
from ldistill.tools.study.scores import Scores, paired_tests, summary

RESULTS, REPORT = "results.json", "report.md"
TRADE_OFF, CURVES = "language_vs_reading.png", "loss_curves.png"
SMOOTHING = 5  # logged points per point of a curve
Results = Mapping[str, Mapping[str, Any]]
ByArm = Mapping[str, Sequence[Scores]]


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
    scores = {study.start: [place.scores()]} if place.scores().rows else {}
    scores |= {name: [place.scores(run) for run in runs] for name, runs in chosen.items()}
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
    parts = [f"# {study.title}", f"`{command}`", *_parts(study, scores, results, drawn)]
    if problems:
        parts += ["## What is missing", "\n".join(f"- {problem}" for problem in problems)]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    (out / REPORT).write_text(text, encoding="utf-8")
    return [out / name for name in (REPORT, RESULTS, *drawn)]


def _parts(study: Study, scores: ByArm, results: Results, drawn: dict[str, str]) -> Iterator[str]:
    found = [row for of in scores.values() for run in of for row in run.rows]
    listed = dict.fromkeys([*(suite(study.suite).rows if study.suite else ()), *found])
    values = {}
    for name, of in scores.items():
        values[name] = {row.id: [run.of(row) for run in of if row in run.rows] for row in listed}
    baseline, start = (name if name in scores else None for name in (study.baseline, study.start))
    table = tables.score_table(values, listed, baseline=baseline, original=start)
    counts = sorted({len(of) for name, of in scores.items() if name != study.start}) or [1]
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    part = f", of which {study.validation:.0%} chose the settings" if study.validation else ""
    told = f"Scores on held-out items{part}; changes are against `{study.baseline}`"
    yield f"Seeds: {seeds}. {told}, `{study.start}` is the student before training."
    yield table.markdown()
    if baseline and start:
        yield from ("## Share of the loss recovered", tables.recovery_markdown(table))
        yield from ("## In short", _verdict(study, results))
    yield from (f"![{caption}]({file})" for file, caption in drawn.items())
    if trained := {name: of for name, of in results.items() if "cost" in of}:
        yield from ("## Settings and cost", _costs(trained))
    if tests := paired_tests(study, scores):
        head = ["arm", "group", "documents", "difference", "won", "lost", "p", "p (Holm)"]
        lines = []
        for name, group, pair, corrected in tests:
            counts = [f"{pair.samples:,}", f"{pair.difference:+.3f}", pair.won, pair.lost]
            lines.append([name, group, *counts, p_value(pair.p), p_value(corrected)])
        yield "## Document by document"
        yield (
            f"Against `{study.baseline}`; a document's score is its mean over seeds. p is the "
            f"exact sign test on won and lost; Holm's correction is over these {len(lines)} tests."
        )
        yield tables.markdown_table(head, lines, 2)


def _axes(study: Study) -> Sequence[str]:
    """Groups along and up: what is read, and what of language is left."""
    usual = ("reading", "language")
    first, second, *_ = *study.groups, *study.groups, "", ""
    return study.axes or (usual if study.groups.keys() >= set(usual) else (second, first))


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
        counts = [f"{count:,.0f}" for count in (steps, tokens)]
        told = f"{flops:.2e}" if flops or not steps else "not logged"
        lines.append([name, setting, *counts, told, f"{seconds / 60:.1f}"])
    head = ["arm", "setting", "steps", "tokens", "FLOPs", "minutes"]
    return tables.markdown_table(head, lines, 2) + "\nTraining of one seed; merging takes none.\n"


def plot_trade_off(study: Study, results: Results, curves: Mapping[str, Any], target: Path) -> bool:
    """A point per arm with its deviation, the curve of its settings, and the Pareto front; without
    points there is no file, and False."""
    along, up = _axes(study)
    points = {name: of for name, of in results.items() if _point(study, of)}
    if not points:
        return False
    figure = Figure(figsize=(6.4, 4.6))
    axis = figure.add_subplot(xlabel=f"{along} (mean score)", ylabel=f"{up} (mean score)")
    for index, (name, of) in enumerate(points.items()):
        x, y, own = of[along], of[up], name == study.main
        how = {"color": f"C{index % 10}", "markersize": 12 if own else 7, "label": name}
        how["marker"] = "D" if name == study.start else "*" if own else "os^vP"[index // 10 % 5]
        if x["seeds"] > 1:
            how |= {"xerr": x["std"], "yerr": y["std"], "elinewidth": 0.7}
        axis.errorbar(x["mean"], y["mean"], linestyle="none", **how)
        if name in curves:
            axis.plot(*zip(*curves[name]), color=how["color"], marker=".", linewidth=1, alpha=0.7)
    front, highest = [], -math.inf
    for x, y in sorted({_point(study, of) for of in points.values()}, reverse=True):
        if y > highest:
            front, highest = [*front, (x, y)], y
    axis.plot(*zip(*front), color="black", linewidth=0.8, linestyle=":", zorder=0)
    axis.grid(alpha=0.3)
    _save(figure, target)
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
    _save(figure, target)
    return True


def _save(figure: Figure, target: Path) -> None:
    figure.axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(target, dpi=150, bbox_inches="tight")
