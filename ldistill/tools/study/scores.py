"""What the runs of a study scored: by document, by task, by group, and whether it is chance.

A document is in the validation part or in the reported part by its task and number alone. The
validation part chooses among an arm's settings; everything that is reported is of the other part.
"""

from __future__ import annotations

import json
import math
import statistics
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldistill.evaluation.compare.comparison import paired, sample_score
from ldistill.evaluation.compare.results import read_variants
from ldistill.evaluation.lmms_run import read_evaluation
from ldistill.evaluation.suites import OTHER, ROWS, Row
from ldistill.tools.study.files import Run, Study

Rows = dict[Row, dict[int, float]]
MEASURED = "measured.json"  # in a run's folder: what the study's own command scored
WHOLE = -1  # the one document of a task whose score is no mean over its samples: in both parts


@dataclass(frozen=True)
class Scores:
    """One evaluation: row → document → score, in two parts."""

    rows: Rows  # the reported part
    validation: Rows

    def of(self, row: Row) -> float:
        """The mean over the documents that are reported."""
        return statistics.fmean(self.rows[row].values())


def read_scores(folder: Path, validation: float) -> Scores:
    """Scores of a run's folder, of lmms-eval and of what the study measures itself; or none.

    Raises ValueError: its ``eval.json`` is damaged.
    """
    record, scores = read_evaluation(folder / "eval"), Scores({}, {})
    if record is None:
        return scores
    results = read_variants([f"run={folder / 'eval'}"])[0].tasks if record.get("results") else {}
    known, found = {row.id: row for row in ROWS}, {}
    for name, entry in record["scores"].items():
        metric, _, filter_ = entry["metric"].partition(",")
        own = (name, entry["name"], entry["group"], metric, filter_, entry["top"])
        row = known.get(name) or Row(*own)
        samples = results[row.task].samples(row.filter) if row.task in results else {}
        scored = {number: sample_score(sample, row) for number, sample in samples.items()}
        whole = not scored or None in scored.values()
        if whole or not math.isclose(statistics.fmean(scored.values()), entry["value"]):
            scored = {WHOLE: entry["value"]}
        found[row] = scored
    if (path := folder / MEASURED).is_file():
        for task, scored in json.loads(path.read_text(encoding="utf-8")).items():
            row = Row(task, task.replace("_", " "), OTHER, "mean")
            found[row] = {int(number): score for number, score in scored.items()}
    for row, scored in found.items():
        for number, score in scored.items():
            chooses = zlib.crc32(f"{row.task}/{number}".encode()) % 1000 < 1000 * validation
            for part, here in ((scores.rows, not chooses), (scores.validation, chooses)):
                if here or number == WHOLE:
                    part.setdefault(row, {})[number] = score
    return scores


def _in_group(study: Study, rows: Rows, group: str) -> Rows:
    """Rows whose score counts in a group of the report."""
    names = set(study.groups[group])
    return {row: documents for row, documents in rows.items() if names & {row.group, row.task}}


def group_means(study: Study, rows: Rows) -> dict[str, float]:
    """Means over the tasks of every group that has any, each task on a scale of 0 to 1."""
    means = {}
    for group in study.groups:
        if found := _in_group(study, rows, group):
            tasks = [statistics.fmean(of.values()) / row.top for row, of in found.items()]
            means[group] = statistics.fmean(tasks)
    return means


def best_setting(study: Study, runs: Sequence[tuple[Run, Scores]]) -> Run:
    """The run with the highest mean over the groups on the validation part; ties: the first."""
    means = [group_means(study, scores.validation).values() for _, scores in runs]
    quality = [statistics.fmean(found) if found else -math.inf for found in means]
    return runs[quality.index(max(quality))][0]


def summary(study: Study, runs: Sequence[Scores]) -> dict[str, dict[str, float | int]]:
    """Task or group → {mean, std, seeds} over the runs of an arm."""
    series: dict[str, list[float]] = defaultdict(list)
    for scores in runs:
        for row in scores.rows:
            series[row.id].append(scores.of(row))
        for group, mean in group_means(study, scores.rows).items():
            series[group].append(mean)
    found = {}
    for name, values in series.items():
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = {"mean": statistics.fmean(values), "std": std, "seeds": len(values)}
    return found


def paired_tests(study: Study, arms: Mapping[str, Sequence[Scores]]) -> list[tuple]:
    """Arm, group, comparison with the baseline on its documents, and Holm's corrected p.

    A document's score is its mean over the seeds, so that it counts once.
    """
    found = []
    for group in study.groups:
        base = _documents(study, arms.get(study.baseline, ()), group)
        for name, runs in arms.items():
            own = _documents(study, runs, group)
            both = sorted(base.keys() & own.keys())
            if both and name != study.baseline:
                pair = paired([base[key] for key in both], [own[key] for key in both])
                found.append((name, group, pair))
    return [(*test, p) for test, p in zip(found, holm([pair.p for *_, pair in found]))]


def _documents(study: Study, runs: Iterable[Scores], group: str) -> dict[tuple[str, int], float]:
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run in runs:
        for row, documents in _in_group(study, run.rows, group).items():
            for number, score in documents.items():
                if number != WHOLE:
                    scores[row.id, number].append(score)
    return {key: statistics.fmean(values) for key, values in scores.items()}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that hold for all tests together."""
    corrected, least = [0.0] * len(p), 0.0
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = least
    return corrected
