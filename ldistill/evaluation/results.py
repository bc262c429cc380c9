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
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

RESULTS = "_results.json"
_NOT_METRICS = {"doc_id", "doc", "doc_hash", "target", "arguments", "input", "input_media"}
_NOT_METRICS |= {"resps", "filtered_resps", "token_counts"}
_STEP = re.compile(r"(?:^|/)step-(\d+)/")
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
    files = _result_files(folder)
    own = name or _folder_name(folder)
    taken, note = _of_run(folder, files)
    if taken or len({_model(record) for _, record in files}) == 1:
        notes = (f"{own}: {note}",) if note else ()
        return [_variant(own, folder, taken or files, notes)]
    parts: dict[str, list[tuple[Path, dict]]] = {}
    for path, record in files:
        parts.setdefault(path.relative_to(folder).parts[0], []).append((path, record))
    for part, inside in parts.items():
        several = {_model(record) for _, record in inside}
        if len(several) > 1:
            listed = ", ".join(sorted(several))
            raise ValueError(
                f"{folder / part} holds results of several models ({listed}): give the folder of "
                "each one, NAME=DIR."
            )
    if name is not None:
        raise ValueError(
            f"{folder} holds results of several models: one name, {name!r}, cannot cover "
            f"{', '.join(parts)}."
        )
    return [_variant(part, folder / part, inside) for part, inside in parts.items()]


def _folder_name(folder: Path) -> str:
    path = folder.resolve()
    while path.name in _NOT_NAMES and path.parent.name:
        path = path.parent
    return path.name


def _of_run(
    folder: Path, files: list[tuple[Path, dict]]
) -> tuple[list[tuple[Path, dict]], str | None]:
    """Results of a run's own student, else of its last step evaluated; and what to say of it."""
    student = (folder / "student").resolve()
    steps: dict[int, list[tuple[Path, dict]]] = {}
    final = []
    for path, record in files:
        if (model := _model(record)) and Path(model).expanduser().resolve() == student:
            final.append((path, record))
        elif step := _STEP.search(path.relative_to(folder).as_posix()):
            steps.setdefault(int(step[1]), []).append((path, record))
    if final:
        left = len(files) - len(final)
        note = f"results of {left} other evaluations in {folder} (steps in between) left aside."
        return final, note if left else None
    if steps and sum(map(len, steps.values())) == len(files):
        last = max(steps)
        return steps[last], f"evaluated during training, at step {last}."
    return [], None


def _model(record: Mapping[str, Any]) -> str:
    return str(record.get("model_name") or record.get("config", {}).get("model_args") or "")


def _result_files(folder: Path) -> list[tuple[Path, dict]]:
    """Results files below a folder, oldest first."""
    files = [(path, _load(path)) for path in folder.rglob(f"*{RESULTS}")]
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


def _load(path: Path) -> dict[str, Any]:
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


def _variant(
    name: str, folder: Path, files: list[tuple[Path, dict]], notes: tuple[str, ...] = ()
) -> Variant:
    tasks: dict[str, TaskResult] = {}
    again: set[str] = set()
    for path, record in files:
        for task in _tasks(record):
            again |= {task} & tasks.keys()
            tasks[task] = _task(task, path, record)
    if again:
        listed = ", ".join(sorted(again))
        notes += (f"{name}: {listed} evaluated more than once; the newest results are used.",)
    return Variant(name, folder, _model(files[-1][1]), tasks, notes)


def _tasks(record: Mapping[str, Any]) -> list[str]:
    """Names of real tasks: groups of tasks have results but no configuration."""
    configs = record.get("configs") or record["results"]
    return [task for task in record["results"] if task in configs]


def _task(task: str, path: Path, record: Mapping[str, Any]) -> TaskResult:
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
    )


def _is_score(key: str, value: Any) -> bool:
    metric = key.split(",", 1)[0]
    if metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
        return False
    return isinstance(value, (int, float)) and math.isfinite(value)


def _count(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None
