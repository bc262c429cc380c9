"""What lmms-eval left in a folder: scores, samples, and what is missing of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ldistill.evaluation.compare import results as recorded
from ldistill.evaluation.compare.ocrbench import row_score
from ldistill.evaluation.compare.results import TaskResult
from ldistill.evaluation.suites import GROUPS, rows_of_tasks

EVALUATION = "eval.json"


def read_results(out: Path, tasks: tuple[str, ...], since: float = 0.0) -> dict[str, Any]:
    """The newest results below ``out``, none older than ``since`` (seconds since the epoch).

    Returns:
        ``file`` (path or None), ``samples`` (task → file), ``complete`` (task → `TaskResult`) and
        ``missing`` (task, group, tag or wildcard as asked → reason).
    """
    files = [p for p in recorded.results_files(out, "*") if p.stat().st_mtime >= since - 1]
    if not files:
        missing = dict.fromkeys(tasks, "lmms-eval wrote no results")
        return {"file": None, "samples": {}, "complete": {}, "missing": missing}
    newest = max(files, key=lambda p: p.stat().st_mtime)
    record = recorded.load_results(newest)
    samples, complete, missing = {}, {}, {}
    for asked in tasks:
        for task in _meant(record, asked) or [asked]:
            problem = "not among the results"
            if task in record["results"]:
                result = recorded.task_result(task, newest, record)
                samples[task], problem = result.samples_path, _lacking(result)
            if problem:
                missing[asked] = problem if task == asked else f"{task}: {problem}"
            else:
                complete[task] = result
    return {"file": newest, "samples": samples, "complete": complete, "missing": missing}


def _meant(record: Mapping[str, Any], asked: str) -> list[str]:
    """Tasks that a name stands for: its own, those of a group or a tag, or of a wildcard's."""
    groups, configs = record.get("group_subtasks", {}), record.get("configs", {})
    found = [
        task
        for group, below in groups.items()
        if below and fnmatchcase(group, asked)
        for name in below
        if name != group
        for task in _meant(record, name) or [name]
    ]
    for task in recorded.tasks_of(record):
        tags = configs.get(task, {}).get("tag") or []
        names = [task, tags] if isinstance(tags, str) else [task, *tags]
        if any(fnmatchcase(name, asked) for name in names):
            found.append(task)
    return list(dict.fromkeys(found))


def _lacking(result: TaskResult) -> str | None:
    """Scores or samples that are not there; of a limited task one of several rows may have none."""
    expected = rows_of_tasks([result.task])
    lacking = [row.key for row in expected if row.key not in result.scores]
    if lacking and not (result.limited and len(lacking) < len(expected)):
        return f"no score {', '.join(lacking)}"
    wanted, found = result.expected or 0, _lines(result.samples_path)
    if found and found >= wanted and not (wanted and found % wanted):
        return None
    return f"{found} samples of {wanted} in {result.samples_path.name}"


def _lines(path: Path) -> int:
    text = path.read_bytes() if path.is_file() else b""
    return sum(1 for line in text.split(b"\n") if line.strip())


def scores_of(results: Iterable[TaskResult]) -> dict[str, dict[str, Any]]:
    """Entries of ``eval.json`` by row: the suites' rows, and one for a task of no suite."""
    found = {result.task: result for result in results}
    known = rows_of_tasks(found)
    of_suites = {row.task for row in known}
    others = [recorded.other_row(own) for task, own in found.items() if task not in of_suites]
    return {
        row.id: {
            "name": row.name,
            "group": row.group,
            "metric": row.key,
            "value": value,
            "top": row.top,
            "documents": found[row.task].expected or _lines(found[row.task].samples_path),
        }
        for row in (*known, *others)
        if (value := row_score(found[row.task], row)) is not None
    }


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Content of a folder's ``eval.json``, or None without one.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["model_args"], record["limit"], record["complete"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and evaluate again what it was to hold."
        ) from error
    return record


def merge(result: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Keep what an earlier evaluation of the same model left of other tasks; mean by group.

    What failed then and was not asked again still counts as missing. A group's mean is over the
    scores that are there, each divided by the highest possible one.
    """
    again = {*result["tasks"], *result["samples"]}
    for part in ("samples", "scores", "missing"):
        before = earlier.get(part, {})
        others = {key: value for key, value in before.items() if key.split(":")[0] not in again}
        result[part] = others | result[part]
    result["complete"] = not result["missing"]
    for group in GROUPS:
        shares = [s["value"] / s["top"] for s in result["scores"].values() if s["group"] == group]
        if shares:
            result["groups"][group] = sum(shares) / len(shares)
