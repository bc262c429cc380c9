"""Reading what lmms-eval wrote: scores and samples of one variant.

lmms-eval (0.7.3) writes ``{time}_results.json`` and ``{time}_samples_{task}.jsonl`` beside it. A
folder may hold several of them (one per suite, or a repeated run): every task counts once, the
newest. A samples file has one line per document and filter: ``doc_id``, ``input`` (the prompt),
``target`` (always a string), ``filtered_resps`` and the metrics under their names; the document and
its pictures are not in it (see `task_data`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ldistill.evaluation.suites import OTHER, Row, rows_of_tasks

_RESULTS = "_results.json"
# Tasks write others of that ending: submissions/coco_captions_val2014_alg_results.json, a list.
_NAME = re.compile(rf"\d{{8}}_\d{{6}}{re.escape(_RESULTS)}")
_STEP = re.compile(r"(?:eval/)?step-(\d+)/")
_NOT_METRICS = {"doc_id", "doc", "doc_hash", "target", "arguments", "input", "input_media", "resps"}
_NOT_METRICS |= {"filtered_resps", "token_counts"}
_ERRORS = ("_stderr", "_stderr_clt", "_stderr_clustered")
_NOT_NAMES = {"eval", "evaluation", "results", "student", "lmms_eval"}

Record = tuple[Path, dict[str, Any]]  # a results file and its content


class Sample(NamedTuple):
    """One document of a task as one variant answered it."""

    doc_id: int
    question: str
    target: str
    answer: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """One task of one variant."""

    task: str
    scores: Mapping[str, Any]  # `metric,filter` → number, as lmms-eval aggregated it
    config: Mapping[str, Any]  # of the task: data set, split, output type
    expected: int | None  # documents that were to be answered
    available: int | None  # documents the task has
    path: Path  # the results file
    higher_is_better: Mapping[str, bool]
    model_args: Mapping[str, str]  # ``pretrained``, ``dtype``, ``tiling``, ...

    @property
    def samples_path(self) -> Path:
        time = self.path.name.removesuffix(_RESULTS)
        return self.path.with_name(f"{time}_samples_{self.task}.jsonl")

    @property
    def limited(self) -> bool:
        """Whether only a part of the task's documents was asked for."""
        return None not in (self.expected, self.available) and self.expected < self.available

    def samples(self, filter: str = "none") -> dict[int, Sample]:
        """Document → sample, for the answers that passed that filter; empty without a file."""
        # A document's lines follow one another in the order of the filters.
        filters = list(dict.fromkeys(key.split(",", 1)[1] for key in self.scores if "," in key))
        place = filters.index(filter) if filter in filters else 0
        return {doc: lines[place] for doc, lines in self._lines[0].items() if len(lines) > place}

    @property
    def unreadable(self) -> int:
        """Lines of the samples file that are no samples: a file that was cut off."""
        return self._lines[1]

    @cached_property
    def _lines(self) -> tuple[dict[int, list[Sample]], int]:
        found: dict[int, list[Sample]] = defaultdict(list)
        bad = 0
        text = self.samples_path.read_text("utf-8") if self.samples_path.is_file() else ""
        for line in filter(str.strip, text.split("\n")):
            try:
                record = json.loads(line)
                asked, doc_id = record.get("input", ""), int(record["doc_id"])
                asked = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
                answer, target = _answer(record["filtered_resps"]), str(record["target"])
            except (KeyError, TypeError, ValueError):
                bad += 1
                continue
            metrics = {k: v for k, v in record.items() if k not in _NOT_METRICS}
            found[doc_id].append(Sample(doc_id, asked, target, answer, metrics))
        return found, bad


def _answer(responses: Any) -> str:
    """The text that was scored; for multiple choice the number of the likeliest choice."""
    if not isinstance(responses, list) or not responses:
        return responses if isinstance(responses, str) else ""
    if all(isinstance(response, list) and len(response) == 2 for response in responses):
        losses = [float(loss) for loss, _ in responses]
        return f"choice {losses.index(min(losses))}"
    return _answer(responses[0])


def results_files(folder: Path, inside: str = "**") -> Iterator[Path]:
    """lmms-eval's own results files, in the folders below that ``inside`` matches."""
    return (path for path in folder.glob(f"{inside}/*{_RESULTS}") if _NAME.fullmatch(path.name))


def load_results(path: Path) -> dict[str, Any]:
    """Content of a results file; ValueError where it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["results"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = f"{path} is not a results file of lmms-eval ({error})"
        raise ValueError(f"{wrong}: evaluate again, or remove it.") from error
    return record


def tasks_of(record: Mapping[str, Any]) -> list[str]:
    """Names of real tasks: groups of tasks have results but no configuration."""
    configs = record.get("configs") or record["results"]
    return [task for task in record["results"] if task in configs]


def task_result(task: str, path: Path, record: Mapping[str, Any]) -> TaskResult:
    counts = record.get("n-samples", {}).get(task, {})
    arguments = str(record.get("config", {}).get("model_args") or "").split(",")
    scores = {
        key: float(value)
        for key, value in record["results"][task].items()
        if "," in key and not key.partition(",")[0].endswith(_ERRORS)
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    config = record.get("configs", {}).get(task, {})
    higher = record.get("higher_is_better", {}).get(task, {})
    counted = counts.get("effective"), counts.get("original")
    options = dict(part.split("=", 1) for part in arguments if "=" in part)
    return TaskResult(task, scores, config, *counted, path, higher, options)


def other_rows(results: Mapping[str, TaskResult]) -> list[Row]:
    """A row for each task of no suite: its first metric of which more is better."""
    rows = []
    for task in [task for task in results if not rows_of_tasks([task])]:
        keys = (key.split(",", 1) for key in results[task].scores)
        better = (key for key in keys if results[task].higher_is_better.get(key[0], True))
        rows.append(Row(task, task, OTHER, *next(better, ["score"])))
    return rows


def _model_of(record: Mapping[str, Any]) -> str:
    return str(record.get("model_name") or record.get("config", {}).get("model_args") or "")


@dataclass(frozen=True)
class Variant:
    """A trained model with a name: its tasks, and what was odd about its files."""

    name: str
    folder: Path
    model: str
    tasks: Mapping[str, TaskResult]
    notes: tuple[str, ...]


def read_variants(
    arguments: Iterable[str], tell: Callable[[str], None] = lambda text: None
) -> list[Variant]:
    """Variants of the command line: ``DIR`` or ``NAME=DIR`` each.

    A folder whose subfolders hold results of different models gives a variant per subfolder. Files
    (logs that `runs/*` brings along) are passed over; so is a folder that is not there or holds no
    results, as long as another does: `tell` gets a sentence on each.

    Raises:
        FileNotFoundError: no folder holds results, or there is none.
        ValueError: two variants of one name, or several models whose results no subfolders part.
    """
    variants: list[Variant] = []
    empty: list[str] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        named = bool(equals and name) and "/" not in name and not Path(argument).exists()
        folder = Path(path if named else argument).expanduser()
        if not named:
            if folder.is_file():
                continue
            place = folder.resolve()
            while place.name in _NOT_NAMES and place.parent.name:
                place = place.parent
            name = place.name
        try:
            variants += _of_folder(name, folder, named)
        except FileNotFoundError as error:
            empty.append(f"{name} is left out: {error}")
    if not variants:
        none = ["no folder among the arguments: give run or results folders."]
        raise FileNotFoundError("nothing to compare.\n  " + "\n  ".join(empty or none))
    for sentence in empty:
        tell(sentence)
    for name, count in Counter(variant.name for variant in variants).items():
        if count > 1:
            where = ", ".join(str(variant.folder) for variant in variants if variant.name == name)
            raise ValueError(f"two variants are called {name!r} ({where}): name them, NAME=DIR.")
    return variants


def _of_folder(name: str, folder: Path, named: bool) -> list[Variant]:
    files = [(path, load_results(path)) for path in results_files(folder)]
    if not files:
        student = folder if (folder / "student").is_dir() else "..."
        hint = f"Run `ldistill eval --student {student} --out {folder / 'eval'}` first."
        if samples := next(folder.rglob("*_samples_*.jsonl"), None):
            hint = f"There are samples ({samples.name}) without it: that evaluation did not finish."
        kind = "holds no lmms-eval results" if folder.is_dir() else "is no folder with results"
        raise FileNotFoundError(f"{folder} {kind} (*{_RESULTS}). {hint}")
    files.sort(key=lambda item: (item[0].name, str(item[0])))  # oldest first
    if only := _of_one_model(name, folder, files):
        return [only]
    each: dict[Path, Variant | None] = {}
    for place in dict.fromkeys(folder / path.relative_to(folder).parts[0] for path, _ in files):
        inside = [(path, record) for path, record in files if path.is_relative_to(place)]
        each[place] = _of_one_model(place.name, place, inside)
    mixed = [folder] if named else [place for place, found in each.items() if not found]
    if mixed:
        models = {_model_of(record) for path, record in files if path.is_relative_to(mixed[0])}
        several = f"{mixed[0]} holds results of several models ({', '.join(sorted(models))})"
        raise ValueError(f"{several}: give the folder of each one, NAME=DIR.")
    return list(each.values())


def _of_one_model(name: str, folder: Path, files: list[Record]) -> Variant | None:
    """The variant whose results these are; None where they are of several models."""
    taken, notes = _of_run(folder, files)
    if not taken and len({_model_of(record) for _, record in files}) > 1:
        return None
    taken = taken or files
    tasks: dict[str, TaskResult] = {}
    again: set[str] = set()
    for path, record in taken:
        found = {task: task_result(task, path, record) for task in tasks_of(record)}
        again |= found.keys() & tasks.keys()
        tasks |= found
    if again:
        listed = ", ".join(sorted(again))
        notes.append(f"{listed} evaluated more than once; the newest results are used.")
    notes = tuple(f"{name}: {note}" for note in notes)
    return Variant(name, folder, _model_of(taken[-1][1]), tasks, notes)


def _of_run(folder: Path, files: list[Record]) -> tuple[list[Record], list[str]]:
    """Results of a run's own student, else of its last step evaluated; and what to say of it.

    ``folder`` is the run's or its ``eval``. Where there are steps, what lies outside of them and
    is of one model is the student's, wherever the run lay at that time.
    """
    steps: dict[int, list[Record]] = defaultdict(list)
    for path, record in files:
        step = _STEP.match(path.relative_to(folder).as_posix())
        steps[int(step[1]) if step else -1].append((path, record))
    outside = steps.pop(-1, [])
    places = [folder, folder.parent] if steps else [folder]
    students = {(place / "student").resolve() for place in places}

    models = [Path(_model_of(record)).expanduser().resolve() for _, record in files]
    final = [file for file, model in zip(files, models, strict=True) if model in students]
    if steps and not final and len({_model_of(record) for _, record in outside}) == 1:
        final = outside
    if final and (left := len(files) - len(final)):
        note = f"results of {left} other evaluations in {folder} (steps in between) left aside."
        return final, [note]
    if steps and not outside and not final:
        return steps[max(steps)], [f"evaluated during training, at step {max(steps)}."]
    return final, []
