"""`ldistill train` and `ldistill scripts`: starting runs where there is no repository."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

import ldistill
from ldistill.train import main as run_training

PACKAGE = Path(ldistill.__file__).parent  # with configurations and scripts, also where installed
CONFIGS = PACKAGE / "ds_configs"
# Options of DeepSpeed's launcher, with a value and without. All else is train.py's.
VALUED = "--num_gpus --num_accelerators --num_nodes --hostfile -H --include -i --exclude -e "
VALUED += "--master_addr --master_port --node_rank --launcher --launcher_args --ssh_port "
VALUED += "--bind_core_list --enable_each_rank_log"
ALONE = "--bind_cores_to_rank --force_multi --no_ssh --no_ssh_check"


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
    with suppress(OSError), socket.create_server(("", usual)):  # which has SO_REUSEADDR
        return []
    with socket.create_server(("", 0)) as probe:
        return ["--master_port", str(probe.getsockname()[1])]


def launch_command(args: list[str]) -> list[str]:
    """DeepSpeed's launcher, its options, the installed `train.py` and what is meant for it."""
    launcher, own, rest = [], [], iter(args)
    for arg in rest:
        name, _, value = arg.partition("=")
        if name == "--deepspeed":
            own += [name, *map(_configuration, [value] if value else islice(rest, 1))]
        elif name in VALUED.split():
            launcher += [arg] if value else [arg, *islice(rest, 1)]
        else:
            (launcher if name in ALONE.split() else own).append(arg)
    if "--deepspeed" not in own:
        own = ["--deepspeed", str(CONFIGS / "zero2.json"), *own]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *launcher]
    return [*runner, str(PACKAGE / "train.py"), *own]


def _configuration(value: str) -> str:
    shipped = CONFIGS / f"{value}.json"  # of which the name is enough
    return str(shipped) if shipped.is_file() and not Path(value).exists() else value


scripts = typer.Typer(help="Write the shipped job scripts into a folder.", no_args_is_help=True)


@scripts.command()
def slurm(out: Annotated[Path, typer.Option(help="Folder, without these scripts.")]) -> None:
    """Write OUT/slurm and OUT/ds_configs: submit from OUT with `sbatch slurm/selective.sh`."""
    for name in ("slurm", "ds_configs"):
        if (out / name).exists():
            raise ValueError(f"{out / name} exists: choose another --out, or move it away.")
        shutil.copytree(PACKAGE / name, out / name, ignore=shutil.ignore_patterns("*.log", "*.pyc"))
    (out / "slurm" / "logs").mkdir(exist_ok=True)  # SLURM opens a job's log before the job starts
    typer.echo(f"cd {out} && sbatch slurm/selective.sh")
