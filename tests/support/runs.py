"""Small shards on disk and real runs over them, through the launcher a user calls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import yaml
from helpers_data import picture

from ldistill.common.samples import Sample, Turn
from ldistill.data.build.builder import build_shards
from ldistill.models.formats import load_processor
from ldistill.tools.torture.ports import discard_buffers, free_port
from ldistill.training.metrics import read_metrics

REPO = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "total",
    "receipt",
    "red",
    "green",
    "blue",
    "yes",
    "no",
    "0",
    "1",
    "2",
    "3",
]


def samples(source: str, count: int, seed: int = 0) -> list[Sample]:
    """Questions of various lengths about random pictures; every fifth sample is text alone."""
    made = []
    for number in range(count):
        words = [WORDS[(seed + number * k) % len(WORDS)] for k in range(1, 4 + number % 5)]
        turn = Turn("what is " + " ".join(words) + "?", " ".join(reversed(words)))
        images = () if number % 5 == 4 else (picture(seed=seed + number),)
        made.append(Sample(f"{source}-{number}", source, (turn,), images))
    return made


def write_shards(folder: Path, pair_root: Path, count: int = 40) -> Path:
    """Shards of two sources, counted with a pair's processor."""
    processor = load_processor(pair_root / "student")
    by_source = {name: samples(name, count, seed) for seed, name in enumerate(("docvqa", "vqav2"))}
    build_shards(by_source, folder, processor)
    return folder


def write_recipe(path: Path, pair_root: Path, shards: Path, **fields) -> Path:
    """A recipe for a few small steps; ``fields`` override."""
    values = {
        "student": str(pair_root / "student"),
        "teacher": str(pair_root / "teacher"),
        "shards": str(shards),
        "sources": "vqav2,docvqa",
        "max_length": 96,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "distil": "language",
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": None,
        "warmup_steps": 0,
        "health_steps": 2,
        "seed": 7,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_num_workers": 0,
    }
    path.write_text(yaml.safe_dump(values | fields), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """The caller's environment without a GPU and without another launch's ranks."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LDISTILL_DEBUG")
    env = {k: v for k, v in os.environ.items() if k not in ranks}
    cpu = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    _remove_dead_locks(Path(env["TORCH_EXTENSIONS_DIR"]))  # set in conftest.py, as PATH is
    return env | cpu


def _remove_dead_locks(compiled: Path) -> None:
    """A run that was killed as it compiled an op leaves a lock that all later ones would wait for.

    Whoever compiles has the lock's file open.
    """
    for lock in compiled.glob("*/lock"):
        if not any(_has_open(process, lock) for process in psutil.process_iter()):
            lock.unlink(missing_ok=True)


def _has_open(process: psutil.Process, file: Path) -> bool:
    with suppress(psutil.Error):
        return any(opened.path == str(file) for opened in process.open_files())
    return False


def finish(processes: list[subprocess.Popen[str]], timeout: int) -> list[tuple]:
    """What a run's ranks printed, to stdout and stderr, once all have ended.

    All pipes are drained at once: a rank whose pipe is full would stand still, and so all of them.
    """
    with ThreadPoolExecutor(len(processes)) as readers:
        outputs = [readers.submit(p.communicate, timeout=timeout) for p in processes]
        try:
            return [output.result() for output in outputs]
        finally:
            for process in processes:
                process.kill()


def launch(
    *args: str,
    ranks: int = 1,
    config: str | None = None,
    check: bool = True,
    timeout: int = 500,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``train.py`` on so many ranks, with the environment that DeepSpeed's launcher sets.

    The launcher itself (which imports everything twice more) is left to one test of its own.
    """
    command = [sys.executable, "ldistill/train.py", *args]
    if config is not None:
        command += ["--deepspeed", f"ds_configs/{config}.json"]
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        own = environment() | dict(env or {})
        if ranks > 1 or config is not None:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            own |= {k: str(v) for k, v in place.items()}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(ranks)}
        processes.append(
            subprocess.Popen(
                command,
                cwd=REPO,
                env=own,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        outputs = finish(processes, timeout)
    finally:
        discard_buffers(port)
    code = max(abs(process.returncode) for process in processes)
    result = subprocess.CompletedProcess(command, code, outputs[0][0], outputs[0][1])
    if check and code != 0:
        texts = "\n".join(f"{out[-2000:]}\n{err[-3000:]}" for out, err in outputs)
        raise AssertionError(texts)
    return result


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl")]
