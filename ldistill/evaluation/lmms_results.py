"""What lmms-eval left in a folder: scores, samples, and what is missing of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldistill.evaluation.suites import GROUPS, Row, rows_of_tasks


def read_results(out: Path, tasks: tuple[str, ...], since: float = 0.0) -> dict[str, Any]:
    """The newest results below ``out``, with what is missing of some tasks.

    Returns:
        ``file`` (path or None), ``results`` (lmms-eval's dict), ``samples`` (task → file),
        ``counts`` (task → documents) and ``missing`` (task → reason).
    """
    files = [p for p in out.glob("*/*_results.json") if p.stat().st_mtime >= since - 1]
    if not files:
        reason = "lmms-eval wrote no results"
        return {
            "file": None, "results": {}, "samples": {}, "counts": {},
            "missing": dict.fromkeys(tasks, reason),
        }  # fmt: skip
    newest = max(files, key=lambda p: p.stat().st_mtime)
    results = json.loads(newest.read_text(encoding="utf-8"))
    stamp = newest.name.removesuffix("_results.json")
    samples, counts, missing = {}, {}, {}
    for task in tasks:
        if problem := _task_problem(results, task):
            missing[task] = problem
            continue
        for leaf in _leaves(results, task):
            path = newest.with_name(f"{stamp}_samples_{leaf}.jsonl")
            wanted = int(results.get("n-samples", {}).get(leaf, {}).get("effective", 0))
            found = _lines(path)
            if found < wanted or not found or (wanted and found % wanted):
                missing[task] = f"{found} samples of {wanted} in {path.name}"
            samples[leaf], counts[leaf] = path, wanted or found
    return {
        "file": newest, "results": results, "samples": samples, "counts": counts,
        "missing": missing,
    }  # fmt: skip


def _leaves(results: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    below = results.get("group_subtasks", {}).get(task) or []
    return [leaf for name in below for leaf in _leaves(results, name)] or [task]


def _task_problem(results: Mapping[str, Any], task: str) -> str | None:
    scores = results.get("results", {})
    if task not in scores and not results.get("group_subtasks", {}).get(task):
        return "not among the results"
    for row in rows_of_tasks([task]):
        value = row.value(scores)
        if value is None or not math.isfinite(value):
            return f"no score {row.key}"
    return None


def _lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def score_of(row: Row, found: Mapping[str, Any]) -> dict[str, Any]:
    """A row's entry in ``eval.json``, from what `read_results` found."""
    return {
        "name": row.name,
        "group": row.group,
        "metric": row.key,
        "value": row.value(found["results"]["results"]),
        "top": row.top,
        "documents": found["counts"].get(row.task),
    }


def merge(result: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Keep what an earlier evaluation of the same model left of other tasks; mean by group.

    A group's mean is over the scores that are there, each divided by the highest possible one.
    """
    for part in ("samples", "scores"):
        others = {
            key: value
            for key, value in earlier.get(part, {}).items()
            if key.split(":")[0] not in result["tasks"]
        }
        result[part] = others | result[part]
    for group in GROUPS:
        shares = [s["value"] / s["top"] for s in result["scores"].values() if s["group"] == group]
        if shares:
            result["groups"][group] = sum(shares) / len(shares)
