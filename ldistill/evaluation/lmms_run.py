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
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import ldistill
from ldistill.common.locate import resolve
from ldistill.evaluation.answerer_loading import kind_of, model_folder
from ldistill.evaluation.lmms_faults import check_before, explain
from ldistill.evaluation.lmms_results import (
    EVALUATION,
    merge,
    read_evaluation,
    read_results,
    scores_of,
)
from ldistill.evaluation.suites import SUITES, suite

LOG = "lmms_eval.log"
CONFIG = "lmms_eval.yaml"
# What lmms-eval splits its arguments at, or takes for the bounds of what it must not split.
_SPLITS = frozenset(",'\"{}[]")
_PACKAGES = ("ldistill", "lmms-eval", "torch", "transformers", "datasets")
# Of a launcher, of which this process may be a rank: lmms-eval would take itself for that rank.
_LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"}
_LAUNCHER |= {"GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE"}
_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "ROLE_", "OMPI_COMM_", "PMI_", "PMIX_")


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated, on what, and where to."""

    student: str
    """Model folder, run folder, ``pkg://`` or hub id: nanoVLM, Hugging Face VLM or bare LM."""
    out: Path
    """Folder of the results."""
    suite: str | None = None
    """A suite; its tasks come before `tasks`."""
    tasks: tuple[str, ...] = ()
    """Further tasks, any that lmms-eval or `include_paths` know."""
    limit: int | None = None
    """Documents of every task, to try things out."""
    batch_size: int | None = None
    """Default: the suite's own (1 for the paper's tasks)."""
    include_paths: tuple[Path, ...] = ()
    """Folders with tasks of one's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the lmms-eval model: ``dtype``, ``tiling``, ``tokenizer``, ``pictures``, ..."""
    processes: int | None = None
    """Default: one for every visible GPU, one on a CPU."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set for the subprocess, ``CUDA_VISIBLE_DEVICES`` for one."""
    items_per_task: int | None = None
    """Of the tiny suite; default the benchmark's own number."""

    @property
    def all_tasks(self) -> tuple[str, ...]:
        own = suite(self.suite).tasks if self.suite else ()
        return tuple(dict.fromkeys((*own, *self.tasks)))


def evaluate(asked: Evaluation, give_up: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run an evaluation; returns the content of ``eval.json``.

    Args:
        asked: what, on what, and where to.
        give_up: asked once a second; when true, lmms-eval is ended and InterruptedError raised.

    Raises:
        FileNotFoundError: no such model or include path.
        InterruptedError: given up.
        ValueError: it cannot run (nothing asked for, lmms-eval or Java missing, unknown suite), or
            it ran and failed, or what it left is not complete. ``eval.json`` is written all the
            same and says what is there.
    """
    folder = model_folder(asked.student)
    kind = kind_of(folder)
    check(asked)
    arguments = _arguments(asked, folder)
    asked.out.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(asked, arguments)
    include = _include_paths(asked, folder, kind)
    config = _config(asked, kind, arguments, include)
    path = asked.out / CONFIG
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    began = time.time()
    status = _run(asked, path, give_up)
    found = read_results(asked.out, asked.all_tasks, since=began)
    result = _describe(asked, folder, config, found, time.time() - began)
    merge(result, earlier)
    (asked.out / EVALUATION).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if found["missing"]:
        raise ValueError(_what_is_missing(asked, found, status))
    return result


def check(asked: Evaluation) -> None:
    """Everything that can be known to be wrong before lmms-eval starts; ValueError says what."""
    if not asked.all_tasks:
        raise ValueError(f"nothing to evaluate: give --suite ({', '.join(SUITES)}) or --tasks.")
    for name, value in (("limit", asked.limit), ("batch size", asked.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"the {name} must be at least 1, got {value}.")
    for path in asked.include_paths:
        if not path.is_dir():
            raise FileNotFoundError(f"include path {path} is not a folder.")
    _refuse_splits(asked.out.resolve())
    check_before(asked.all_tasks, asked.limit)


def _refuse_splits(*values: Any) -> None:
    for text in map(str, values):
        if found := sorted(_SPLITS.intersection(text)):
            raise ValueError(f"lmms-eval cannot take a path with {' '.join(found)} in it: {text}")


# ---- the subprocess ----


def _arguments(asked: Evaluation, folder: Path) -> str:
    given = {"pretrained": str(folder.resolve())} | dict(asked.options)
    arguments = {name: value for name, value in given.items() if value is not None}
    _refuse_splits(*arguments.values())
    return ",".join(f"{name}={value}" for name, value in arguments.items())


def _config(asked: Evaluation, kind: str, arguments: str, include: list[str]) -> dict[str, Any]:
    """lmms-eval's arguments, as its own configuration file."""
    chosen = suite(asked.suite).batch_size if asked.suite else 1
    config: dict[str, Any] = {
        "model": "ldistill_nanovlm" if kind == "nanovlm" else "ldistill_hf",
        "model_args": arguments,
        "tasks": ",".join(asked.all_tasks),
        "batch_size": asked.batch_size or chosen,
        "log_samples": True,
        "output_path": str(asked.out.resolve()),
        "timezone": "UTC",
        "verbosity": "DEBUG",  # the only level at which an exception becomes an exit status
    }
    if asked.limit is not None:
        config["limit"] = asked.limit
    if include:
        config["include_path"] = include
    return config


def _include_paths(asked: Evaluation, folder: Path, kind: str) -> list[str]:
    paths = [path.resolve() for path in asked.include_paths]
    if any(task.startswith("tiny_") for task in asked.all_tasks):
        from ldistill.evaluation.item_tasks import chat_renderer
        from ldistill.tiny.benchmark import ITEMS_PER_TASK
        from ldistill.tiny.eval_tasks import prepare_tasks

        render = chat_renderer(_chat_owner(folder, kind, asked.options.get("tokenizer")))
        count = asked.items_per_task or ITEMS_PER_TASK
        paths.append(prepare_tasks(render, items_per_task=count))
    return [str(path) for path in paths]


def _chat_owner(folder: Path, kind: str, tokenizer: str | None) -> Any:
    """The tokenizer or processor that holds the model's chat template."""
    if kind == "nanovlm":
        from ldistill.models.nanovlm_format import load_processor

        return load_processor(folder, tokenizer).tokenizer
    from transformers import AutoProcessor, AutoTokenizer

    if kind == "vlm":
        return AutoProcessor.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(resolve(tokenizer) if tokenizer else folder)


def _run(asked: Evaluation, config: Path, give_up: Callable[[], bool]) -> int:
    """Start lmms-eval and wait; its output goes to the log. Returns the exit status."""
    count = asked.processes or _gpus(asked.environment)
    command = [sys.executable, "-m"]
    if count > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    command += ["lmms_eval", "--config", str(config), "--verbosity", "DEBUG"]
    with (asked.out / LOG).open("w", encoding="utf-8") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        process = subprocess.Popen(
            command,
            env=clean_environment(asked.environment, offline=_all_local(asked)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=1)
                if give_up():
                    raise InterruptedError(f"the evaluation of {asked.student} was given up.")
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
        process.wait()


def _all_local(asked: Evaluation) -> bool:
    return all(task.startswith("tiny_") for task in asked.all_tasks)


def clean_environment(extra: Mapping[str, str], offline: bool = False) -> dict[str, str]:
    """This process's environment without any launcher's variables, and with our package on it."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith(_LAUNCHERS)
    }
    root = str(Path(ldistill.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([root, *_split(env.get("PYTHONPATH"))]))
    env["TOKENIZERS_PARALLELISM"] = "false"
    if offline:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return env | dict(extra)


def _split(paths: str | None) -> list[str]:
    return [path for path in (paths or "").split(os.pathsep) if path]


def _gpus(environment: Mapping[str, str]) -> int:
    """Visible GPUs, at least 1 process."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return max(1, len([d for d in environment["CUDA_VISIBLE_DEVICES"].split(",") if d]))
    import torch

    return max(1, torch.cuda.device_count())


# ---- what came of it ----


def _describe(
    asked: Evaluation,
    folder: Path,
    config: Mapping[str, Any],
    found: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    def relative(path: Path | None) -> str | None:
        return None if path is None else str(path.relative_to(asked.out))

    return {
        "student": asked.student,
        "folder": str(folder.resolve()),
        "suite": asked.suite,
        "tasks": list(asked.all_tasks),
        "limit": asked.limit,
        "model": config["model"],
        "model_args": config["model_args"],
        "batch_size": config["batch_size"],
        "versions": {name: _version(name) for name in _PACKAGES},
        "seconds": round(seconds, 1),
        "complete": not found["missing"],
        "missing": dict(found["missing"]),
        "results": relative(found["file"]),
        "samples": {task: relative(path) for task, path in found["samples"].items()},
        "scores": scores_of(found["complete"].values()),
        "groups": {},
    }


def _earlier(asked: Evaluation, arguments: str) -> dict[str, Any]:
    """An earlier ``eval.json`` there, which must be of the same model, asked the same way."""
    earlier = read_evaluation(asked.out)
    if not earlier or not (earlier.get("scores") or earlier.get("samples")):
        return {}  # nothing that could be mixed up
    then, now = (earlier["model_args"], earlier["limit"]), (arguments, asked.limit)
    if then != now:
        raise ValueError(
            f"{asked.out} holds an evaluation of {then[0]} (limit {then[1]}), this one is of "
            f"{now[0]} (limit {now[1]}): choose another --out."
        )
    return earlier


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _what_is_missing(asked: Evaluation, found: Mapping[str, Any], status: int) -> str:
    log = asked.out / LOG
    cause = explain(log.read_text(encoding="utf-8", errors="replace"), asked.all_tasks)
    there = [task for task in asked.all_tasks if task not in found["missing"]]
    lines = [f"the evaluation of {asked.student} is not complete (exit status {status})."]
    if cause:
        lines.append(cause)
    if there:
        lines += [f"  {task}: {reason}" for task, reason in found["missing"].items()]
        lines.append(f"Complete, and comparable: {', '.join(there)}.")
    lines.append(f"lmms-eval's own words: {log}")
    return "\n".join(lines)
