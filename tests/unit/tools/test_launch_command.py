"""`ldistill train` and `ldistill scripts`: what a package offers without a repository."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.tools.launch import CONFIGS, PACKAGE, free_port, launch_command

TRAIN = str(PACKAGE / "train.py")
RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]


def test_without_a_configuration_it_is_zero2():
    assert launch_command([]) == [*RUNNER, TRAIN, "--deepspeed", str(CONFIGS / "zero2.json")]


@pytest.mark.parametrize("option", [["--num_gpus", "2"], ["--num_gpus=2"], ["-i", "a@b:0,1"]])
@pytest.mark.parametrize("first", [True, False])
def test_launcher_options_reach_the_launcher_wherever_they_stand(option, first):
    own = ["--deepspeed", "x.json", "--max_steps", "3"]
    args = [*option, *own] if first else [*own, *option]
    assert launch_command(args) == [*RUNNER, *option, TRAIN, *own]


@pytest.mark.parametrize("typed", [["--deepspeed", "zero3"], ["--deepspeed=zero3"]])
def test_a_bare_name_is_a_shipped_configuration(typed):
    command = launch_command([*typed, "--max_steps", "3"])
    assert str(CONFIGS / "zero3.json") in " ".join(command)
    assert command[-2:] == ["--max_steps", "3"]


def test_a_file_of_the_user_is_left_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("zero3").write_text("{}")
    assert launch_command(["--deepspeed", "zero3"])[-2:] == ["--deepspeed", "zero3"]


def test_a_second_run_on_a_machine_listens_elsewhere():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        option, port = free_port(["--max_steps", "3"], taken)
        assert option == "--master_port"
        assert int(port) != taken
        assert free_port(["--master_port=1"], taken) == []
    assert free_port([], taken) == []  # the usual one, where nobody is


def test_help_needs_no_launcher():
    done = CliRunner().invoke(app, ["train", "--num_gpus", "2", "--help"])
    assert done.exit_code == 0, done.output
    assert "--kv_scope" in done.output


def test_scripts_are_those_of_the_repository(tmp_path):
    done = CliRunner().invoke(app, ["scripts", "slurm", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for folder, pattern in (("slurm", "*.sh"), ("ds_configs", "*.json")):
        written = {p.name: p.read_bytes() for p in (tmp_path / folder).glob(pattern)}
        assert written == {p.name: p.read_bytes() for p in (PACKAGE / folder).glob(pattern)}
        assert written
    assert (tmp_path / "slurm" / "logs").is_dir()


def test_scripts_overwrite_nothing(tmp_path):
    (tmp_path / "slurm").mkdir()
    done = CliRunner().invoke(app, ["scripts", "slurm", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert isinstance(done.exception, ValueError)
