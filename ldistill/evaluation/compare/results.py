"""Reading what lmms-eval wrote: scores and samples of one variant.

lmms-eval (0.7.3) writes ``{time}_results.json`` and, with ``--log_samples``,
``{time}_samples_{task}.jsonl`` beside it. A folder may hold several of them (one per suite, or a
repeated run): every task counts once, the newest. A samples file has one line per document and
filter: ``doc_id``, ``input`` (the prompt), ``target`` (always a string), ``filtered_resps`` and the
metrics under their names; the document and its pictures are not in it (see `task_data`).

    variant = read_variant("lingudistill", Path("eval/lingudistill"))
    variant.tasks["ocrbench"].scores["ocrbench_accuracy,none"]
    variant.tasks["ocrbench"].samples()      # doc_id → Sample
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ldistill.evaluation.compare.result_files import (
    RESULTS,
    Record,
    load_results,
    model_args_of,
    model_of,
    of_run,
    results_files,
    tasks_of,
)

_NOT_METRICS = {"doc_id", "doc", "doc_hash", "target", "arguments", "input", "input_media"}
_NOT_METRICS |= {"resps", "filtered_resps", "token_counts"}
_NOT_NAMES = {"eval", "evaluation", "results", "student", "lmms_eval"}


@dataclass(frozen=True)
class Sample:
    """One document of a task as one variant answered it."""

    doc_id: int
    question: str
    target: str
    answer: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """One task of one variant; samples are read when asked for."""

    task: str
    scores: Mapping[str, Any]
    """``metric,filter`` → number, as lmms-eval aggregated it."""
    config: Mapping[str, Any]
    """The task's configuration: data set, split, output type."""
    expected: int | None
    """Documents that were to be answered."""
    available: int | None
    """Documents the task has."""
    path: Path
    """The results file."""
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    model_args: Mapping[str, str] = field(default_factory=dict)
    """Arguments of the lmms-eval model: ``pretrained``, ``dtype``, ``tiling``, ..."""

    @property
    def samples_path(self) -> Path:
        time = self.path.name.removesuffix(RESULTS)
        return self.path.with_name(f"{time}_samples_{self.task}.jsonl")

    @property
    def limited(self) -> bool:
        """Whether only a part of the task's documents was asked for."""
        return None not in (self.expected, self.available) and self.expected < self.available

    @property
    def filters(self) -> tuple[str, ...]:
        """Names of the filters in the order in which a document's lines follow one another."""
        keys = (key.split(",", 1)[1] for key in self.scores if "," in key)
        return tuple(dict.fromkeys(keys))

    def samples(self, filter: str = "none") -> dict[int, Sample]:
        """Document → sample, for the answers that passed that filter; empty without a file."""
        place = self.filters.index(filter) if filter in self.filters else 0
        return {doc: lines[place] for doc, lines in self._lines[0].items() if len(lines) > place}

    @property
    def unreadable(self) -> int:
        """Lines of the samples file that are no samples: a file that was cut off."""
        return self._lines[1]

    @cached_property
    def _lines(self) -> tuple[dict[int, list[Sample]], int]:
        found: dict[int, list[Sample]] = {}
        bad = 0
        if not self.samples_path.is_file():
            return found, bad
        with self.samples_path.open(encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                try:
                    sample = _sample(json.loads(line))
                except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                    bad += 1
                else:
                    found.setdefault(sample.doc_id, []).append(sample)
        return found, bad


@dataclass(frozen=True)
class Variant:
    """A trained model with a name: its tasks, and what was odd about its files."""

    name: str
    folder: Path
    model: str
    tasks: Mapping[str, TaskResult]
    notes: tuple[str, ...] = ()


def _sample(record: Mapping[str, Any]) -> Sample:
    prompt = record.get("input", "")
    return Sample(
        doc_id=int(record["doc_id"]),
        question=prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
        target=str(record["target"]),
        answer=_answer(record["filtered_resps"]),
        metrics={k: v for k, v in record.items() if k not in _NOT_METRICS},
    )


def _answer(responses: Any) -> str:
    """The text that was scored; for multiple choice the number of the likeliest choice."""
    if isinstance(responses, str):
        return responses
    if isinstance(responses, Sequence) and responses:
        if all(
            isinstance(r, Sequence) and not isinstance(r, str) and len(r) == 2 for r in responses
        ):
            losses = [_number(loss) for loss, _ in responses]
            return f"choice {losses.index(min(losses))}"
        return _answer(responses[0])
    return ""


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.inf


class NoResults(FileNotFoundError):
    """No folder, or one in which nothing was evaluated to the end."""


def read_variants(
    arguments: Iterable[str], tell: Callable[[str], None] = lambda text: None
) -> list[Variant]:
    """Variants of the command line: ``DIR`` or ``NAME=DIR`` each.

    A folder whose subfolders hold results of different models gives a variant per subfolder. Files
    (logs that `runs/*` brings along) are passed over; so is a folder that is not there or holds no
    results, as long as another does.

    Args:
        arguments: folders, named or not.
        tell: gets a sentence on each of these folders.

    Raises:
        FileNotFoundError: no folder holds results, or there is none.
        ValueError: two variants of one name, or a folder with results of several models that
            subfolders don't keep apart.
    """
    variants: list[Variant] = []
    empty: list[str] = []
    for argument in arguments:
        name, folder = _split(argument)
        if name is None and folder.is_file():
            continue
        try:
            variants += _expand(name, folder)
        except NoResults as error:
            empty.append(f"{name or _folder_name(folder)} is left out: {error}")
    if empty and not variants:
        raise NoResults("nothing to compare.\n  " + "\n  ".join(empty))
    for sentence in empty:
        tell(sentence)
    if not variants:
        raise FileNotFoundError("no folder among the arguments: give run or results folders.")
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            places = ", ".join(str(v.folder) for v in variants if v.name == name)
            raise ValueError(f"two variants are called {name!r} ({places}): name them, NAME=DIR.")
    return variants


def _split(argument: str) -> tuple[str | None, Path]:
    name, equals, folder = argument.partition("=")
    if equals and name and "/" not in name and not Path(argument).exists():
        return name, Path(folder).expanduser()
    return None, Path(argument).expanduser()


def _expand(name: str | None, folder: Path) -> list[Variant]:
    if not folder.is_dir():
        raise NoResults(f"{folder} is no folder: give run or results folders.")
    files = _found(folder)
    own = name or _folder_name(folder)
    if only := _one(own, folder, files):
        return [only]
    parts: dict[str, list[Record]] = {}
    for path, record in files:
        parts.setdefault(path.relative_to(folder).parts[0], []).append((path, record))
    if name is not None:
        raise ValueError(
            f"{folder} holds results of several models: one name, {name!r}, cannot cover "
            f"{', '.join(parts)}."
        )
    found = []
    for part, inside in parts.items():
        variant = _one(part, folder / part, inside)
        if variant is None:
            listed = ", ".join(sorted({model_of(record) for _, record in inside}))
            raise ValueError(
                f"{folder / part} holds results of several models ({listed}): give the folder of "
                "each one, NAME=DIR."
            )
        found.append(variant)
    return found


def _one(name: str, folder: Path, files: list[Record]) -> Variant | None:
    """The variant whose results these are; None where they are of several models."""
    taken, note = of_run(folder, files)
    if not taken and len({model_of(record) for _, record in files}) > 1:
        return None
    return _variant(name, folder, taken or files, (f"{name}: {note}",) if note else ())


def _folder_name(folder: Path) -> str:
    path = folder.resolve()
    while path.name in _NOT_NAMES and path.parent.name:
        path = path.parent
    return path.name


def _found(folder: Path) -> list[Record]:
    """Results files below a folder, oldest first."""
    files = [(path, load_results(path)) for path in results_files(folder)]
    if not files:
        samples = next(folder.rglob("*_samples_*.jsonl"), None)
        student = folder if (folder / "student").is_dir() else "..."
        hint = (
            f" There are samples ({samples.name}) without it: that evaluation did not finish."
            if samples
            else f" Run `ldistill eval --student {student} --out {folder / 'eval'}` first."
        )
        raise NoResults(f"{folder} holds no lmms-eval results (*{RESULTS}).{hint}")
    return sorted(files, key=lambda item: (item[0].name, str(item[0])))


def _variant(name: str, folder: Path, files: list[Record], notes: tuple[str, ...] = ()) -> Variant:
    tasks: dict[str, TaskResult] = {}
    again: set[str] = set()
    for path, record in files:
        for task in tasks_of(record):
            again |= {task} & tasks.keys()
            tasks[task] = task_result(task, path, record)
    if again:
        listed = ", ".join(sorted(again))
        notes += (f"{name}: {listed} evaluated more than once; the newest results are used.",)
    return Variant(name, folder, model_of(files[-1][1]), tasks, notes)


def task_result(task: str, path: Path, record: Mapping[str, Any]) -> TaskResult:
    """A task of a results file whose content is ``record``."""
    scores = {
        key: float(value)
        for key, value in record["results"][task].items()
        if "," in key and _is_score(key, value)
    }
    counts = record.get("n-samples", {}).get(task, {})
    return TaskResult(
        task=task,
        scores=scores,
        config=record.get("configs", {}).get(task, {}),
        expected=_count(counts.get("effective")),
        available=_count(counts.get("original")),
        path=path,
        higher_is_better=record.get("higher_is_better", {}).get(task, {}),
        model_args=model_args_of(record),
    )


def _is_score(key: str, value: Any) -> bool:
    metric = key.split(",", 1)[0]
    if metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
        return False
    return isinstance(value, (int, float)) and math.isfinite(value)


def _count(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None
