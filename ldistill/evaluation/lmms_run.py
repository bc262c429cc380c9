"""Run lmms-eval as a subprocess, look at what it left, and say what it says.

lmms-eval reports success whatever happens, waits for ever where one of several ranks fails, and
takes the environment of a training job for its own. So it gets a clean environment, its output goes
to a log, and its results count only when every task has its score and all of its samples. What was
asked and what came out stands in ``eval.json``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

import ldistill
from ldistill.common.errors import did_you_mean, refuse
from ldistill.evaluation.compare import results
from ldistill.evaluation.compare.ocrbench import row_score
from ldistill.evaluation.scorer import kind_of, model_folder
from ldistill.evaluation.suites import GROUPS, ROWS, SUITES, rows_of_tasks, suite

EVALUATION = "eval.json"
LOG = "lmms_eval.log"
# What lmms-eval splits its arguments at, or takes for the bounds of what it must not split.
_SPLITS = frozenset(",'\"{}[]")
# Of a launcher, of which this process may be a rank: lmms-eval would take itself for that rank.
_LAUNCHER = re.compile(
    r"(LOCAL_|NODE_|GROUP_)?RANK|(LOCAL_|GROUP_)?WORLD_SIZE|MASTER_(ADDR|PORT)|CROSS_(RANK|SIZE)"
    r"|(TORCHELASTIC|ACCELERATE|FSDP|ROLE|OMPI_COMM|PMI|PMIX)_.*"
)
_CAPTIONS = ("coco", "nocaps", "flickr30k", "textcaps")
_UNREACHABLE = re.compile(
    r"OfflineModeIsEnabled|ConnectionError|Couldn't reach|LocalEntryNotFoundError|"
    r"DatasetNotFoundError|Couldn't find (?:any data file|the dataset|cache)|Max retries exceeded|"
    r"Name or service not known|Temporary failure in name resolution|MaxRetryError|GatedRepoError"
)
_LAST_ERROR = re.compile(r"(?m)^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Enabled)\b.*)$")


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated, on what, and where to."""

    student: str  # model folder, run folder, pkg:// or hub id: nanoVLM, Hugging Face VLM or bare LM
    out: Path  # folder of the results
    suite: str | None = None  # its tasks come before `tasks`
    tasks: tuple[str, ...] = ()  # any that lmms-eval or `include_paths` know
    limit: int | None = None  # documents of every task, to try things out
    batch_size: int | None = None  # default: the suite's own (1 for the paper's tasks)
    include_paths: tuple[Path, ...] = ()  # folders with tasks of one's own
    options: Mapping[str, Any] = field(default_factory=dict)  # of `load_scorer`
    processes: int | None = None  # default: one for every visible GPU, one on a CPU
    environment: Mapping[str, str] = field(default_factory=dict)  # set for the subprocess
    items_per_task: int | None = None  # of a suite that makes its own tasks; default its own number

    @property
    def all_tasks(self) -> tuple[str, ...]:
        own = suite(self.suite).tasks if self.suite else ()
        return tuple(dict.fromkeys((*own, *self.tasks)))


def evaluate(
    asked: Evaluation,
    give_up: Callable[[], bool] = lambda: False,
    run: Callable[[Evaluation, Path], int] | None = None,
) -> dict[str, Any]:
    """Run an evaluation; returns the content of ``eval.json``.

    Args:
        asked: what, on what, and where to.
        give_up: asked once a second; when true, lmms-eval is ended and InterruptedError raised.
        run: takes a configuration file, writes `LOG`, gives the exit status; default a new process.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it cannot run (see `check`), failed, or left something incomplete: then
            ``eval.json`` says what is there.
    """
    folder = model_folder(asked.student).resolve()
    kind = kind_of(folder)
    check(asked, folder)
    config = _config(asked, folder, kind)
    earlier = _earlier(asked, config["model_args"])
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "lmms_eval.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    began = time.time()
    status = run(asked, path) if run else _run(asked, path, give_up)
    found = read_results(asked.out, asked.all_tasks, since=began)

    versions = dict.fromkeys(("ldistill", "lmms-eval", "torch", "transformers", "datasets"))
    for package in versions:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    result = {
        "student": asked.student,
        "folder": str(folder),
        "suite": asked.suite,
        "tasks": list(asked.all_tasks),
        "limit": asked.limit,
        **{name: config[name] for name in ("model", "model_args", "batch_size")},
        "versions": versions,
        "seconds": round(time.time() - began, 1),
        "complete": not found["missing"],
        **found,
        "groups": {},
    }
    merge(result, earlier)
    text = json.dumps(result, indent=2) + "\n"
    (asked.out / EVALUATION).write_text(text, encoding="utf-8")
    if not found["missing"]:
        return result
    log = asked.out / LOG
    lines = [f"the evaluation of {asked.student} is not complete (exit status {status})."]
    if cause := explain(log.read_text(encoding="utf-8", errors="replace"), asked.all_tasks):
        lines.append(cause)
    if there := [task for task in asked.all_tasks if task not in found["missing"]]:
        lines += [f"  {task}: {reason}" for task, reason in found["missing"].items()]
        lines.append(f"Complete, and comparable: {', '.join(there)}.")
    raise ValueError("\n".join([*lines, f"lmms-eval's own words: {log}"]))


def check(asked: Evaluation, *paths: Path) -> None:
    """ValueError for what is wrong before lmms-eval starts; `paths`: what else it is handed."""
    tasks, limit, batch = asked.all_tasks, asked.limit, asked.batch_size
    absent = [path for path in asked.include_paths if not path.is_dir()]
    texts = map(str, (asked.out.resolve(), *paths, *asked.options.values()))
    odd = next((text for text in texts if _SPLITS.intersection(text)), "")
    listed = any(ep.name == "ldistill" for ep in metadata.entry_points(group="lmms_eval.models"))
    captions = ", ".join(task for task in tasks if task.startswith(_CAPTIONS))
    cases = {
        f"nothing to evaluate: give --suite ({', '.join(SUITES)}) or --tasks.": not tasks,
        f"the limit must be at least 1, got {limit}.": limit is not None and limit < 1,
        f"the batch size must be at least 1, got {batch}.": batch is not None and batch < 1,
        f"include path {', '.join(map(str, absent))} is not a folder.": absent,
        f"lmms-eval cannot take a path with {' '.join(sorted(_SPLITS.intersection(odd)))} in it: "
        f"{odd}": odd,
        "lmms-eval is not installed: pip install 'ldistill[eval]'.": find_spec("lmms_eval") is None,
        "lmms-eval cannot find ldistill: pip install -e . in the repository.": not listed,
        f"task mme asks in pairs: the limit must be even, got {limit}.": (
            limit and limit % 2 and any(fnmatchcase("mme", task) for task in tasks)
        ),
        f"task {captions}: caption scores need Java (apt install default-jre-headless; or name "
        "other tasks with --tasks and no --suite).": captions and shutil.which("java") is None,
        f"task {captions} needs pycocoevalcap: pip install pycocoevalcap.": (
            captions and find_spec("pycocoevalcap") is None
        ),
    }
    refuse(cases)


def _config(asked: Evaluation, folder: Path, kind: str) -> dict[str, Any]:
    """lmms-eval's arguments, as its own configuration file."""
    options = {"pretrained": str(folder)} | dict(asked.options)
    own = [s for s in SUITES.values() if s.make_tasks and set(s.tasks) & set(asked.all_tasks)]
    include = [path.resolve() for path in asked.include_paths]
    include += [s.make_tasks(asked.items_per_task) for s in own]
    config = {
        "model": "ldistill_nanovlm" if kind == "nanovlm" else "ldistill_hf",
        "model_args": ",".join(f"{k}={v}" for k, v in options.items() if v is not None),
        "tasks": ",".join(asked.all_tasks),
        "batch_size": asked.batch_size or (suite(asked.suite).batch_size if asked.suite else 1),
        "log_samples": True,
        "output_path": str(asked.out.resolve()),
        "timezone": "UTC",
        "verbosity": "DEBUG",  # the only level at which an exception becomes an exit status
        "limit": asked.limit,
        "include_path": [str(path) for path in include] or None,
    }
    return {name: value for name, value in config.items() if value is not None}


def _run(asked: Evaluation, config: Path, give_up: Callable[[], bool]) -> int:
    count = asked.processes or max(1, torch.cuda.device_count())
    ranks = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    command = [sys.executable, "-m", *(ranks if count > 1 else [])]
    command += ["lmms_eval", "--config", str(config), "--verbosity", "DEBUG"]
    made_here = {task for s in SUITES.values() if s.make_tasks for task in s.tasks}
    env = clean_environment(asked.environment, offline=made_here.issuperset(asked.all_tasks))
    with (asked.out / LOG).open("w", encoding="utf-8") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=1)
                if give_up():
                    raise InterruptedError(f"the evaluation of {asked.student} was given up.")
        finally:  # of one that has ended, nothing
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            process.wait()


def clean_environment(extra: Mapping[str, str], offline: bool = False) -> dict[str, str]:
    """This process's environment without any launcher's variables, and with our package on it."""
    env = {name: value for name, value in os.environ.items() if not _LAUNCHER.fullmatch(name)}
    paths = [str(Path(ldistill.__file__).resolve().parents[1]), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    env["TOKENIZERS_PARALLELISM"] = "false"
    if offline:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return env | dict(extra)


def _earlier(asked: Evaluation, arguments: str) -> dict[str, Any]:
    """An earlier ``eval.json`` there, which must be of the same model, asked the same way."""
    earlier = read_evaluation(asked.out) or {}
    if not (earlier.get("scores") or earlier.get("samples")):
        return {}  # nothing that could be mixed up
    then = earlier["model_args"], earlier["limit"]
    if then != (arguments, asked.limit):
        of = f"{then[0]} (limit {then[1]}), not of {arguments} (limit {asked.limit})"
        raise ValueError(f"{asked.out} holds an evaluation of {of}: choose another --out.")
    return earlier


def explain(log: str, tasks: Sequence[str]) -> str | None:
    """The cause of a failure, from lmms-eval's log; None when there is none to be found."""
    if found := re.search(r"Tasks? not found: ([^\n]*?)\. Try ", log):
        known = [row.task for row in ROWS]
        hint = "".join(did_you_mean(name, known, "{}") for name in found[1].split(", "))
        return (
            f"lmms-eval knows no task {found[1]}.{hint} "
            "`lmms-eval tasks` lists what it knows; --include-path adds a folder of your own."
        )
    if "OutOfMemoryError" in log or "CUDA out of memory" in log:
        return "The GPU's memory did not suffice: lower --batch-size."
    if found := re.findall(r"(?m)^RuntimeError: (task .*|batch from task .*)$", log):
        return f"The model failed on {found[-1]}"
    if lines := [line for line in log.splitlines() if _UNREACHABLE.search(line)]:
        paths = _data_sets(tasks)
        hit = [task for task, path in paths.items() if any(path in line for line in lines)]
        rest = ",".join(task for task in tasks if task not in hit)
        reason = (_LAST_ERROR.findall("\n".join(lines)) or lines[-1:])[0][:200]
        without = f", or leave it out: --tasks {rest} and no --suite" if hit and rest else ""
        return (
            f"The data of {', '.join(hit) or 'a task'} cannot be fetched ({reason}). "
            f"Fetch it once with a network (the Hugging Face cache keeps it){without}."
        )
    errors = _LAST_ERROR.findall(log)
    return f"The last error was: {errors[-1]}" if errors else None


def _data_sets(tasks: Sequence[str]) -> dict[str, str]:
    """Task → Hugging Face data set, by lmms-eval's YAML files, which only it can load."""

    def fields(path: Path) -> dict[str, str]:
        text = path.read_text(encoding="utf-8", errors="ignore")
        named = r"(?m)^(task|include|dataset_path)\s*:\s*[\"']?([^\s\"']+)"
        return dict(re.findall(named, text)[::-1])

    root = Path(find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"
    found = {}
    for path in root.rglob("*.yaml"):
        own = fields(path)
        if (task := own.get("task")) in tasks:
            while "include" in own and "dataset_path" not in own:
                path = path.with_name(own["include"])
                own = fields(path)
            found |= {task: own["dataset_path"]} if "dataset_path" in own else {}
    return found


def read_results(out: Path, tasks: tuple[str, ...], since: float = 0.0) -> dict[str, Any]:
    """The newest results below ``out``, none older than ``since`` (seconds since the epoch).

    ``results`` (file in ``out`` or None), ``samples`` (task → file in ``out``), ``scores`` (by
    row) and ``missing`` (task, group, tag or wildcard as asked → reason).
    """
    files = [p for p in results.results_files(out, "*") if p.stat().st_mtime >= since - 1]
    newest = max(files, key=lambda p: p.stat().st_mtime, default=None)
    record = results.load_results(newest) if newest else {"results": {}}
    samples, complete, missing = {}, {}, {}
    for asked in tasks:
        for task in _meant(record, asked) or [asked]:
            problem = "not among the results" if newest else "lmms-eval wrote no results"
            if task in record["results"]:
                result = results.task_result(task, newest, record)
                samples[task] = str(result.samples_path.relative_to(out))
                problem = _lacking(result)
            if problem:
                missing[asked] = problem if task == asked else f"{task}: {problem}"
            else:
                complete[task] = result
    file, scores = newest and str(newest.relative_to(out)), _scores(complete)
    return {"missing": missing, "results": file, "samples": samples, "scores": scores}


def _meant(record: Mapping[str, Any], asked: str) -> list[str]:
    """Tasks that a name stands for: its own, those of a group or a tag, or of a wildcard's."""
    found = []
    for group, below in record.get("group_subtasks", {}).items():
        for name in below:
            if name != group and fnmatchcase(group, asked):
                found += _meant(record, name) or [name]
    for task in results.tasks_of(record):
        tags = record.get("configs", {}).get(task, {}).get("tag") or []
        names = [task, tags] if isinstance(tags, str) else [task, *tags]
        if any(fnmatchcase(name, asked) for name in names):
            found.append(task)
    return list(dict.fromkeys(found))


def _lacking(result: results.TaskResult) -> str | None:
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


def _scores(found: Mapping[str, results.TaskResult]) -> dict[str, dict[str, Any]]:
    """Entries of ``eval.json`` by row: the suites' rows, and one for a task of no suite."""
    return {
        row.id: {
            "name": row.name,
            "group": row.group,
            "metric": row.key,
            "value": value,
            "top": row.top,
            "documents": found[row.task].expected or _lines(found[row.task].samples_path),
        }
        for row in (*rows_of_tasks(found), *results.other_rows(found))
        if (value := row_score(found[row.task], row)) is not None
    }


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Content of a folder's ``eval.json``, or None without one; ValueError: it is damaged."""
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

    A group's mean is over the scores that are there, each divided by the highest possible one.
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
