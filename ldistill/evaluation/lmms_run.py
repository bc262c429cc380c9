"""Run lmms-eval as a subprocess, look at what it left, and say what it says.

lmms-eval reports success whatever happens, waits for ever where one of several ranks fails, and
takes the environment of a training job for its own. So it gets a clean environment, its output goes
to a log, and its results count only when every task has its score and all of its samples.

    result = evaluate(Evaluation(student="runs/x/student", out=Path("eval/x"), suite="tiny"))
    result["scores"]["tiny_facts"]["value"]

The folder afterwards: ``{model}/{time}_results.json`` and ``_samples_{task}.jsonl`` as lmms-eval
writes them, ``eval.json`` (what was asked, what came out), ``lmms_eval.yaml`` and ``.log``.
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
from ldistill.evaluation import lmms_results
from ldistill.evaluation.loading import kind_of, model_folder
from ldistill.evaluation.suites import ROWS, SUITES, suite

LOG = "lmms_eval.log"
CONFIG = "lmms_eval.yaml"
# What lmms-eval splits its arguments at, or takes for the bounds of what it must not split.
_SPLITS = frozenset(",'\"{}[]")
_PACKAGES = ("ldistill", "lmms-eval", "torch", "transformers", "datasets")
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
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the lmms-eval model: ``dtype``, ``tiling``, ``tokenizer``, ``pictures``, ..."""
    processes: int | None = None  # default: one for every visible GPU, one on a CPU
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set for the subprocess, ``CUDA_VISIBLE_DEVICES`` for one."""
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
        InterruptedError: given up.
        ValueError: it cannot run (see `check`), or it ran and failed, or what it left is not
            complete. ``eval.json`` is written all the same and says what is there.
    """
    folder = model_folder(asked.student).resolve()
    kind = kind_of(folder)
    check(asked, folder)
    config = _config(asked, folder, kind)
    earlier = _earlier(asked, config["model_args"])
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / CONFIG
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    began = time.time()
    status = run(asked, path) if run else _run(asked, path, give_up)
    found = lmms_results.read_results(asked.out, asked.all_tasks, since=began)

    versions = dict.fromkeys(_PACKAGES)
    for package in versions:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)

    def relative(path: Path | None) -> str | None:
        return None if path is None else str(path.relative_to(asked.out))

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
        "missing": dict(found["missing"]),
        "results": relative(found["file"]),
        "samples": {task: relative(path) for task, path in found["samples"].items()},
        "scores": lmms_results.scores_of(found["complete"].values()),
        "groups": {},
    }
    lmms_results.merge(result, earlier)
    text = json.dumps(result, indent=2) + "\n"
    (asked.out / lmms_results.EVALUATION).write_text(text, encoding="utf-8")
    if found["missing"]:
        raise ValueError(_what_is_missing(asked, found, status))
    return result


def check(asked: Evaluation, *paths: Path) -> None:
    """Raise ValueError for what can be known to be wrong before lmms-eval starts.

    `paths` are further ones that it will be handed.
    """
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
    config: dict[str, Any] = {
        "model": "ldistill_nanovlm" if kind == "nanovlm" else "ldistill_hf",
        "model_args": ",".join(f"{k}={v}" for k, v in options.items() if v is not None),
        "tasks": ",".join(asked.all_tasks),
        "batch_size": asked.batch_size or (suite(asked.suite).batch_size if asked.suite else 1),
        "log_samples": True,
        "output_path": str(asked.out.resolve()),
        "timezone": "UTC",
        "verbosity": "DEBUG",  # the only level at which an exception becomes an exit status
    }
    if asked.limit is not None:
        config["limit"] = asked.limit
    if include:
        config["include_path"] = [str(path) for path in include]
    return config


def _run(asked: Evaluation, config: Path, give_up: Callable[[], bool]) -> int:
    """Start lmms-eval and wait; its output goes to the log. Returns the exit status."""
    count = asked.processes or max(1, torch.cuda.device_count())
    command = [sys.executable, "-m"]
    if count > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
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
    root = str(Path(ldistill.__file__).resolve().parents[1])
    paths = [root, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    env["TOKENIZERS_PARALLELISM"] = "false"
    if offline:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return env | dict(extra)


def _earlier(asked: Evaluation, arguments: str) -> dict[str, Any]:
    """An earlier ``eval.json`` there, which must be of the same model, asked the same way."""
    earlier = lmms_results.read_evaluation(asked.out)
    if not earlier or not (earlier.get("scores") or earlier.get("samples")):
        return {}  # nothing that could be mixed up
    then = earlier["model_args"], earlier["limit"]
    if then != (arguments, asked.limit):
        of = f"{then[0]} (limit {then[1]}), not of {arguments} (limit {asked.limit})"
        raise ValueError(f"{asked.out} holds an evaluation of {of}: choose another --out.")
    return earlier


def _what_is_missing(asked: Evaluation, found: Mapping[str, Any], status: int) -> str:
    log = asked.out / LOG
    lines = [f"the evaluation of {asked.student} is not complete (exit status {status})."]
    if cause := explain(log.read_text(encoding="utf-8", errors="replace"), asked.all_tasks):
        lines.append(cause)
    if there := [task for task in asked.all_tasks if task not in found["missing"]]:
        lines += [f"  {task}: {reason}" for task, reason in found["missing"].items()]
        lines.append(f"Complete, and comparable: {', '.join(there)}.")
    return "\n".join([*lines, f"lmms-eval's own words: {log}"])


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
        return _unreachable(lines, tasks)
    errors = _LAST_ERROR.findall(log)
    return f"The last error was: {errors[-1]}" if errors else None


def _unreachable(lines: Sequence[str], tasks: Sequence[str]) -> str:
    """Which tasks' data could not be fetched, as far as the log names the data set."""
    paths = _data_sets(tasks)
    hit = [task for task, path in paths.items() if any(path in line for line in lines)]
    rest = [task for task in tasks if task not in hit]
    reason = (_LAST_ERROR.findall("\n".join(lines)) or lines[-1:])[0][:200]
    text = (
        f"The data of {', '.join(hit) or 'a task'} cannot be fetched ({reason}). "
        "Fetch it once with a network (the Hugging Face cache keeps it)"
    )
    if hit and rest:
        text += f", or leave it out: --tasks {','.join(rest)} and no --suite"
    return text + "."


def _data_sets(tasks: Sequence[str]) -> dict[str, str]:
    """Task → Hugging Face data set, as lmms-eval's YAML files or those they include say.

    Only lmms-eval itself can load them (``!function``).
    """

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
