"""`ldistill train` and `ldistill scripts`: starting runs where there is no repository.

An installed package holds the DeepSpeed configurations and the SLURM scripts as well. `ldistill
train` is `deepspeed ldistill/train.py` with the installed `train.py`, and with `zero2` where no
configuration is named.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

import ldistill
from ldistill.train import main as run_training

PACKAGE = Path(ldistill.__file__).parent
CONFIGS = PACKAGE / "ds_configs"
# Options of DeepSpeed's launcher; with True they take a value. All else is train.py's.
LAUNCHER = {
    "--num_gpus": True,
    "--num_accelerators": True,
    "--num_nodes": True,
    "--hostfile": True,
    "-H": True,
    "--include": True,
    "-i": True,
    "--exclude": True,
    "-e": True,
    "--master_addr": True,
    "--master_port": True,
    "--node_rank": True,
    "--launcher": True,
    "--launcher_args": True,
    "--ssh_port": True,
    "--bind_core_list": True,
    "--enable_each_rank_log": True,
    "--bind_cores_to_rank": False,
    "--force_multi": False,
    "--no_ssh": False,
    "--no_ssh_check": False,
}


def train(context: typer.Context) -> None:
    """Train, from anywhere: `deepspeed ldistill/train.py` with the launcher's options (--num_gpus).

    Without --deepspeed it takes `zero2`; a bare name, such as zero3, is a shipped configuration.
    --help lists what a run may be told.
    """
    if {"-h", "--help", "--help_all"} & set(context.args):
        raise typer.Exit(run_training(context.args))
    command = launch_command([*free_port(context.args), *context.args])
    if not any(Path("/dev", name).exists() for name in ("nvidia0", "kfd", "dxg")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it must guess
    print("starting DeepSpeed's launcher ...", flush=True)
    os.execv(command[0], command)


def free_port(args: list[str], usual: int = 29500) -> list[str]:
    """An option for another port, where none is named and another run listens at the usual one."""
    if any(arg.startswith("--master_port") for arg in args):
        return []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind(("", usual))
            return []
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ["--master_port", str(probe.getsockname()[1])]


def launch_command(args: list[str]) -> list[str]:
    """DeepSpeed's launcher, its options, the installed `train.py` and what is meant for it."""
    script = str(PACKAGE / "train.py")
    launcher, own = _split(args)
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *launcher]
    return [*runner, script, *_configured(own)]


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    launcher: list[str] = []
    own: list[str] = []
    rest = iter(args)
    for arg in rest:
        takes_value = LAUNCHER.get(arg.split("=")[0])
        if takes_value is None:
            own.append(arg)
            continue
        launcher.append(arg)
        if takes_value and "=" not in arg:
            launcher.extend([value] if (value := next(rest, None)) is not None else [])
    return launcher, own


def _configured(own: list[str]) -> list[str]:
    """With a DeepSpeed configuration: a shipped one by its name, or zero2 where none is given."""
    found = False
    for place, arg in enumerate(own):
        name, _, value = arg.partition("=")
        if name != "--deepspeed":
            continue
        found = True
        at_value = place if value else place + 1
        value = value or (own[at_value] if at_value < len(own) else "")
        shipped = CONFIGS / f"{value}.json"
        if not Path(value).exists() and shipped.is_file():
            own[at_value] = f"--deepspeed={shipped}" if at_value == place else str(shipped)
    return own if found else ["--deepspeed", str(CONFIGS / "zero2.json"), *own]


scripts = typer.Typer(help="Write the shipped job scripts into a folder.", no_args_is_help=True)


@scripts.callback()
def _scripts() -> None:
    """Kinds of scripts; there is one today."""


@scripts.command()
def slurm(
    out: Annotated[Path, typer.Option(help="Folder; new, or without these scripts.")],
) -> None:
    """Write OUT/slurm and OUT/ds_configs: submit from OUT with `sbatch slurm/selective.sh`."""
    for name in ("slurm", "ds_configs"):
        if (out / name).exists():
            raise ValueError(f"{out / name} exists: choose another --out, or move it away.")
        shutil.copytree(PACKAGE / name, out / name, ignore=shutil.ignore_patterns("*.log", "*.pyc"))
    (out / "slurm" / "logs").mkdir(exist_ok=True)  # SLURM opens a job's log before the job starts
    typer.echo(f"cd {out} && sbatch slurm/selective.sh")
