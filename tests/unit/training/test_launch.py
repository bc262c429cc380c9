"""What differs between machines or was launched wrongly: one sentence, on every rank, at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
from pairs import write_pair
from runs import REPO, environment, free_port, write_recipe, write_shards

from ldistill.common import ranks
from ldistill.common.device import unusable_gpu
from ldistill.train import main
from ldistill.training.launch import (
    announce_compiling,
    check_clocks,
    check_gpus,
    check_launch,
    check_launcher,
)


def test_a_shard_folder_missing_on_one_node_is_named(tmp_path):
    """Two ranks with working folders of their own stand for two nodes with disks of their own."""
    write_pair(tmp_path / "pair")
    for node in ("0", "1"):
        (tmp_path / node).mkdir()
    write_shards(tmp_path / "0" / "shards", tmp_path / "pair", count=8)
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "pair", Path("shards"))
    command = [sys.executable, str(REPO / "ldistill" / "train.py"), "--recipe", str(recipe)]
    command += ["--output_dir", str(tmp_path / "out")]
    port, processes = str(free_port()), []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = environment() | place | {"MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                command, cwd=tmp_path / rank, env=env, stderr=subprocess.PIPE, text=True
            )
        )
    errors = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert f"error: on {socket.gethostname()} (rank 1), but not elsewhere: no shards" in errors[0]
    assert "error" not in errors[1], "what all ranks share is told once"
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_several_gpus_need_a_launcher():
    check_launcher(0)
    check_launcher(1)
    with pytest.raises(ValueError, match="sees 4 GPUs: start it with `deepspeed"):
        check_launcher(4)


def test_a_port_in_use_is_named(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        assert main([]) == 2
    message = capsys.readouterr().err
    assert f"port {port} of {socket.gethostname()}" in message
    assert "MASTER_PORT=N" in message


@pytest.mark.parametrize(
    ("ranks_here", "asked", "seen", "sentence"),
    [
        (8, 8, 0, "finds none"),
        (1, 8, 8, "--ntasks-per-node and --gpus-per-node the same"),
        (8, 8, 1, "no --gpus-per-task"),
        (8, 8, 8, None),
        (4, 0, 0, None),
        (1, 1, 4, None),
    ],
)
def test_gpus_asked_for_and_found(monkeypatch, ranks_here, asked, seen, sentence):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
    if sentence is None:
        check_gpus(asked, seen)
        return
    with pytest.raises(ValueError, match=sentence):
        check_gpus(asked, seen)


def test_clocks_apart_are_named(monkeypatch):
    monkeypatch.setattr(ranks, "gather", lambda own: [("n1", 1000.0), ("n2", 1095.0), own])
    monkeypatch.setattr("ldistill.training.launch.time.time", lambda: 1001.0)
    with pytest.raises(ValueError, match=r"clock of n2 is 95 s ahead of n1's"):
        check_clocks()
    monkeypatch.setattr(ranks, "gather", lambda own: [("n1", 1000.0), own])
    check_clocks()


def test_an_error_of_another_rank_is_told_with_its_place(monkeypatch, capsys):
    """Rank 3 alone has it: after a moment in which rank 0 would have told the same, it tells."""
    waited = []
    monkeypatch.setattr("ldistill.training.launch.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "8")
    assert main(["--recipe", "no-such-recipe"]) == 2
    assert f"error on rank 3 ({socket.gethostname()}): no recipe" in capsys.readouterr().err
    assert waited


def test_a_gpu_that_pytorch_cannot_use_is_a_sentence_not_a_slow_run_on_the_cpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this one can be used")
    there = Path.exists
    monkeypatch.setattr(Path, "exists", lambda p: str(p) == "/dev/nvidia0" or there(p))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "NVIDIA" in unusable_gpu() or "CUDA" in unusable_gpu()  # in PyTorch's own words
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES=''\.$") as raised:
        check_launch()
    assert "\n" not in str(raised.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU is meant
    check_launch()


def test_an_op_without_a_compiler_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(OpBuilder, "jit_load", OpBuilder.jit_load)  # put back afterwards
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    announce_compiling()
    with pytest.raises(OSError, match=r"no C\+\+ compiler .* apt install g\+\+"):
        CPUAdamBuilder().jit_load()
