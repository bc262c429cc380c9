"""Small shards on disk and real runs over them, through the launcher a user calls."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from ldistill.checkpoint.logs import read_metrics
from ldistill.tools.torture import world
from ldistill.tools.torture.world import discard_buffers, free_port

REPO = Path(__file__).resolve().parents[2]
_OWN = threading.local()
"""Of this thread: `zygote`, which ends when its input does, with this process."""


def write_shards(folder: Path, pair_root: Path, count: int = 40) -> Path:
    """Shards of two sources, counted with a pair's processor."""
    documents = {"docvqa": count, "vqav2": count}
    student = pair_root / "student"
    return world.write_shards(folder, documents, student=student, shard_bytes=2**30)


def write_recipe(path: Path, pair_root: Path, shards: Path, **fields) -> Path:
    """A recipe for a few small steps; ``fields`` override."""
    values = yaml.safe_load(world.RECIPE.read_text(encoding="utf-8")) | {
        "student": str(pair_root / "student"),
        "teacher": str(pair_root / "teacher"),
        "shards": str(shards),
        "sources": "vqav2,docvqa",
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": None,
        "health_steps": 2,
        "seed": 7,
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


def run_ranks(script: Path, *arguments: object, ranks: int = 2) -> None:
    """A Python program as so many gloo ranks on this machine, each of which must end well."""
    port, processes = str(free_port()), []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        env = environment() | {k: str(v) for k, v in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=env, cwd=REPO, **pipes))
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-3000:]


def launch(
    *args: str,
    ranks: int = 1,
    config: str | None = None,
    check: bool = True,
    timeout: int = 500,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``train.py`` on so many ranks, with the environment that DeepSpeed's launcher sets.

    The launcher itself is left to tests of its own. Loading the libraries takes longer than a small
    run, so the ranks are forked from a process that has them: they share its hash seed, which ranks
    of `test_stopping` and `test_torture` do not.
    """
    words, port = [*args], free_port()
    if config is not None:
        words += ["--deepspeed", f"ds_configs/{config}.json"]
    with tempfile.TemporaryDirectory() as folder:
        files = [
            [Path(folder, f"{rank}.{name}") for name in ("out", "err")] for rank in range(ranks)
        ]
        places = []
        for rank, (out, err) in enumerate(files):
            own = environment() | dict(env or {})
            if ranks > 1 or config is not None:
                own |= world.place(rank, ranks, port)
            places.append({"env": own, "out": str(out), "err": str(err)})
        try:
            statuses = _ask({"words": words, "timeout": timeout, "ranks": places})
        finally:
            discard_buffers(port)
        texts = [[file.read_text("utf-8", "replace") for file in own] for own in files]
    code = max(map(abs, statuses))
    if check and code != 0:
        said = (f"{out[-2000:]}\n{err[-3000:]}" for out, err in texts)
        raise AssertionError(f"exit statuses {statuses}\n" + "\n".join(said))
    return subprocess.CompletedProcess(["ldistill/train.py", *words], code, *texts[0])


def _ask(request: dict) -> list[int]:
    """Exit statuses of the ranks of a request, from this thread's zygote."""
    if (zygote := getattr(_OWN, "zygote", None)) is None:
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        mine, its = socket.socketpair()
        options = {"stdin": its, "env": environment(), "cwd": REPO, "start_new_session": True}
        zygote = _OWN.zygote = subprocess.Popen(command, **options), mine.makefile("rw")
        its.close()
    process, talk = zygote
    try:
        print(json.dumps(request), file=talk, flush=True)
        return json.loads(talk.readline())
    except BaseException:  # a test that takes too long: its ranks end, and its answer is not read
        os.killpg(process.pid, signal.SIGKILL)
        _OWN.zygote = None
        raise


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
