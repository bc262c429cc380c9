"""lmms-eval's results files in a folder: which there are, and which are of a run's own student."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = "_results.json"
# Tasks write others of that ending: submissions/coco_captions_val2014_alg_results.json, a list.
_NAME = re.compile(rf"\d{{8}}_\d{{6}}{re.escape(RESULTS)}")
_STEP = re.compile(r"(?:eval/)?step-(\d+)/")

Record = tuple[Path, dict[str, Any]]
"""A results file and its content."""


def results_files(folder: Path, inside: str = "**") -> Iterator[Path]:
    """lmms-eval's own results files, in the folders below that ``inside`` matches."""
    return (path for path in folder.glob(f"{inside}/*{RESULTS}") if _NAME.fullmatch(path.name))


def load_results(path: Path) -> dict[str, Any]:
    """Content of a results file; ValueError where it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["results"], dict):
            raise TypeError("no results in it")
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a results file of lmms-eval ({error}): evaluate again, or remove it to "
            "compare without it."
        ) from error
    return record


def model_of(record: Mapping[str, Any]) -> str:
    return str(record.get("model_name") or record.get("config", {}).get("model_args") or "")


def model_args_of(record: Mapping[str, Any]) -> dict[str, str]:
    arguments = str(record.get("config", {}).get("model_args") or "").split(",")
    return dict(part.split("=", 1) for part in arguments if "=" in part)


def tasks_of(record: Mapping[str, Any]) -> list[str]:
    """Names of real tasks: groups of tasks have results but no configuration."""
    configs = record.get("configs") or record["results"]
    return [task for task in record["results"] if task in configs]


def of_run(folder: Path, files: list[Record]) -> tuple[list[Record], str | None]:
    """Results of a run's own student, else of its last step evaluated; and what to say of it.

    ``folder`` is the run's or its ``eval``. Where there are steps, what lies outside of them and
    is of one model is the student's, wherever the run lay at that time.
    """
    steps: dict[int, list[Record]] = {}
    outside = []
    for path, record in files:
        if step := _STEP.match(path.relative_to(folder).as_posix()):
            steps.setdefault(int(step[1]), []).append((path, record))
        else:
            outside.append((path, record))
    students = [folder, folder.parent] if steps else [folder]
    final = _of_models(files, [place / "student" for place in students])
    if steps and len({model_of(record) for _, record in outside}) == 1:
        final = final or outside
    if final:
        left = len(files) - len(final)
        note = f"results of {left} other evaluations in {folder} (steps in between) left aside."
        return final, note if left else None
    if steps and not outside:
        last = max(steps)
        return steps[last], f"evaluated during training, at step {last}."
    return [], None


def _of_models(files: list[Record], students: list[Path]) -> list[Record]:
    wanted = {student.resolve() for student in students}
    return [
        (path, record)
        for path, record in files
        if (model := model_of(record)) and Path(model).expanduser().resolve() in wanted
    ]
