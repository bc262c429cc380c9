"""Under what variants were scored, where it is not the same: model options, sample counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ldistill.evaluation.compare.results import TaskResult, Variant
from ldistill.evaluation.compare.tables import ScoreTable
from ldistill.evaluation.suites import Row

_DEFAULTS = {"dtype": "auto", "tiling": "False"}


def model_options(result: TaskResult) -> dict[str, str]:
    """Options of the lmms-eval model beside the model itself, without those that change nothing."""
    return {
        name: value
        for name, value in result.model_args.items()
        if name != "pretrained" and _DEFAULTS.get(name) != value
    }


def unlike_options(variants: Sequence[Variant], rows: Iterable[Row]) -> list[str]:
    """A sentence for each way in which the options of variants differ, with its tasks."""
    where: dict[str, list[str]] = {}
    for task in dict.fromkeys(row.task for row in rows):
        options = {v.name: model_options(v.tasks[task]) for v in variants if task in v.tasks}
        differ = _differing(options.values())
        if differ:
            each = (f"{name} {_text(own, differ)}" for name, own in options.items())
            where.setdefault("; ".join(each), []).append(task)
    return [
        f"Evaluated with different model options: {each} ({', '.join(tasks)})."
        for each, tasks in where.items()
    ]


def _differing(options: Iterable[Mapping[str, str]]) -> list[str]:
    options = list(options)
    names = dict.fromkeys(name for own in options for name in own)
    return [name for name in names if len({own.get(name) for own in options}) > 1]


def _text(own: Mapping[str, str], names: Iterable[str]) -> str:
    given = [f"{name}={own[name]}" for name in names if name in own]
    return ", ".join(given) or "without"


def unlike_samples(variants: Sequence[Variant], table: ScoreTable) -> list[str]:
    """A sentence for each row whose shares recovered mix scores of different sample counts."""
    said = []
    for row in table.rows:
        found = {v.name: v.tasks[row.task].expected for v in variants if table.cell(v.name, row)}
        counts = {name: count for name, count in found.items() if count is not None}
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{counts[v]:,} for {v}" for v in table.variants if v in counts)
            said.append(f"{row.name}: scores of different samples ({each}), also in its group.")
    return said
