"""What a run exits with: a mistake that must be put right, or a failure that may pass by itself."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from pairs import write_pair
from runs import REPO, environment, write_recipe, write_shards

from ldistill.checkpoint.saver import CheckpointError
from ldistill.common.errors import exit_code, worker_died
from ldistill.data.remote.reader import Refused, Unreachable


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such recipe"), 2),
        (FileNotFoundError("no shards"), 2),
        (FloatingPointError("not finite"), 2),
        (Refused("denied"), 2),
        (Unreachable("failed 10 times"), 75),
        (CheckpointError("no room"), 75),
        (OSError(errno.ENOSPC, "No space left on device"), 75),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (PermissionError(errno.EACCES, "Permission denied"), 2),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code


def test_other_runtime_errors_stay_what_they_are():
    assert worker_died(RuntimeError("shapes differ")) is None
    assert worker_died(ValueError("DataLoader worker (pid 1)")) is None


def test_a_killed_data_worker_is_a_sentence_and_may_be_tried_again(tmp_path):
    write_pair(tmp_path / "pair")
    write_shards(tmp_path / "shards", tmp_path / "pair")
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tmp_path / "pair", tmp_path / "shards",
        max_steps=100_000, save_steps=100_000, dataloader_num_workers=1,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "ldistill/train.py", "--recipe", str(recipe)]
    command += ["--output_dir", str(tmp_path / "run")]
    run = subprocess.Popen(
        command, cwd=REPO, env=environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while not (metrics.is_file() and metrics.read_text().count("\n")):
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.05)
        workers = [p for p in psutil.Process(run.pid).children(recursive=True) if _works(p)]
        assert workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        said = run.communicate(timeout=300)[1]
    finally:
        run.kill()
    assert run.returncode == 75, said
    assert "Traceback" not in said
    assert "a data worker " in said
    assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1


def _works(process: psutil.Process) -> bool:
    """A fork of the run, or its child by another way to start; not what keeps semaphores."""
    command = " ".join(process.cmdline())
    return "resource_tracker" not in command and "forkserver" not in command
