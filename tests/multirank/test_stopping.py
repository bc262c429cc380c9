"""Stopping on request: one rank is asked, all stop at one step, and the run goes on as if never."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pairs import write_pair
from runs import (
    REPO,
    discard_buffers,
    environment,
    finish,
    free_port,
    launch,
    losses,
    write_recipe,
    write_shards,
)

from ldistill.checkpoint.logs import read_metrics
from ldistill.training.stopping import STOPPED_EXIT_CODE, StopRequest

STEPS = 200  # a busy machine, too, asks a run to stop before it ends
STARTED: list[tuple[str, list[subprocess.Popen[str]]]] = []
"""Port and ranks of each run that the test began."""


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever became of a test: its ranks end, and their buffers in shared memory go."""
    STARTED.clear()
    yield
    for port, processes in STARTED:
        for process in processes:
            process.kill()
            process.wait()
        discard_buffers(port)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stopping")
    write_pair(root / "pair")
    write_shards(root / "shards", root / "pair")
    write_recipe(
        root / "recipe.yaml", root / "pair", root / "shards", max_steps=STEPS, save_steps=1000,
        dataloader_num_workers=1, health_steps=0,
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def undisturbed(world) -> Path:
    folder = world / "undisturbed"
    launch(*arguments(world, folder), ranks=2)
    return folder


def arguments(world: Path, folder: Path, *more: str) -> list[str]:
    return ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(folder), *more]


def start(world: Path, folder: Path, *more: str, ranks: int = 2, **env: str) -> list:
    """The ranks of a run."""
    port, processes = str(free_port()), []
    STARTED.append((port, processes))
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        own = environment() | {k: str(v) for k, v in place.items()} | env
        processes.append(
            subprocess.Popen(
                [sys.executable, "ldistill/train.py", *arguments(world, folder, *more)],
                cwd=REPO, env=own | {"MASTER_ADDR": "127.0.0.1"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return processes


def said(processes: list) -> list[str]:
    """What each rank printed, once all have ended."""
    return [output for output, _ in finish(processes, timeout=400)]


def wait_for_step(folder: Path, step: int) -> None:
    """Until a run has logged a step."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and len(losses(folder)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder} did not come to step {step}")


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def check_stopped(folder: Path, why: str) -> int:
    """What a stopped run leaves; its step."""
    mark = json.loads((folder / "stopped.json").read_text())
    assert why in mark["why"]
    assert steps(folder) == list(range(1, mark["step"] + 1))
    assert 0 < mark["step"] < mark["of"] == STEPS
    assert [p.name for p in folder.glob("checkpoint-*")] == [f"checkpoint-{mark['step']}"]
    assert not (folder / "student").exists()
    return mark["step"]


def test_signal_to_all_processes_of_one_rank_stops_both_and_resuming_changes_nothing(
    world, undisturbed
):
    """A scheduler signals whatever a rank started: data workers, the service of wandb.

    The workers must live until the checkpoint is saved; wandb dies and takes nothing with it.
    """
    folder = world / "signalled"
    wandb = {"WANDB_MODE": "offline", "WANDB_DIR": str(world / "signalled-wandb")}
    (world / "signalled-wandb").mkdir()
    processes = start(world, folder, "--report_to", "wandb", **wandb)
    wait_for_step(folder, 3)
    first = psutil.Process(processes[0].pid)
    children = first.children(recursive=True)
    assert len(children) > 1  # a data worker, wandb's service
    for process in (*children, first):
        process.send_signal(signal.SIGTERM)
    outputs = said(processes)
    assert [p.returncode for p in processes] == [STOPPED_EXIT_CODE] * 2, outputs
    assert "is saved" in outputs[0]
    check_stopped(folder, "SIGTERM")
    launch(*arguments(world, folder, "--resume_from_checkpoint", "true"), ranks=2)
    assert not (folder / "stopped.json").exists()
    assert (folder / "student" / "model.safetensors").is_file()
    assert steps(folder) == list(range(1, STEPS + 1))
    assert losses(folder) == losses(undisturbed)


def test_a_stop_file_stops_the_run_and_wandb_goes_on_in_the_same_run(world):
    folder, stop = world / "filed", world / "please-stop"
    wandb = {"WANDB_MODE": "offline", "WANDB_DIR": str(world), "LDISTILL_STOP_FILE": str(stop)}
    options = ("--report_to", "wandb")
    processes = start(world, folder, *options, ranks=1, **wandb)
    wait_for_step(folder, 1)
    stop.touch()
    outputs = said(processes)
    assert processes[0].returncode == STOPPED_EXIT_CODE, outputs
    mark = json.loads((folder / "stopped.json").read_text())
    assert str(stop) in mark["why"]
    assert not stop.exists(), "an answered request would stop the next start, too"
    resume = ("--resume_from_checkpoint", "true", "--stop_file", str(world / "never"))
    launch(*arguments(world, folder, *options, *resume), env=wandb)
    run_id = (folder / "wandb_run_id").read_text().strip()
    found = sorted((world / "wandb").glob("offline-run-*"))
    assert [p.name.rpartition("-")[2] for p in found] == [run_id] * 2


def test_a_request_at_the_last_step_leaves_a_finished_run(world):
    """Asked after the run's last step has begun, there is nothing left to stop."""
    stop = world / "at-the-end"
    stop.touch()
    folder = world / "ended"
    launch(*arguments(world, folder, "--max_steps", "1", "--stop_file", str(stop)))
    assert (folder / "student" / "model.safetensors").is_file()
    assert not (folder / "stopped.json").exists()


def test_deepspeed_passes_the_exit_code_on(world):
    """The launcher's exit status is the ranks', so a script can tell a stop from a failure."""
    stop, folder = world / "early", world / "launched"
    stop.touch()
    port = str(free_port())
    STARTED.append((port, []))
    command = ["deepspeed", "--num_gpus", "2", "--master_port", port]
    command += ["ldistill/train.py", "--deepspeed", "ds_configs/zero2.json"]
    command += arguments(world, folder, "--stop_file", str(stop))
    result = subprocess.run(
        command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == STOPPED_EXIT_CODE, result.stdout + result.stderr
    assert check_stopped(folder, str(stop)) == 1


def test_listening_restores_what_signals_did_before(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    with request.listening(tmp_path):
        assert not request.asked
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.asked == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) == before
