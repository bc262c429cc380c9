"""What a launcher may have got wrong, found before anything is loaded; and who tells an error.

Ranks are started by DeepSpeed's launcher, torchrun or SLURM (`slurm/common.sh`); all of them say
through the environment which rank this is and where rank 0 listens.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ldistill.common import ranks
from ldistill.common.device import unusable_gpu
from ldistill.common.errors import exit_code, refuse
from ldistill.common.telling import telling

# Whether there is a CUDA runtime is said in our own words, where it matters.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
CLOCK_TOLERANCE = 60.0
"""Seconds that the clocks of two machines may differ: the newest checkpoint is found by name and
time, logs are put in order, and munge refuses what is older than some minutes."""
PATIENCE = 10.0
"""Seconds that another rank leaves to rank 0 to tell an error that both have."""


def check_launch() -> None:
    """Refuse a launch that cannot work, before anything is loaded."""
    asked = os.environ.get("LDISTILL_GPUS_PER_NODE") or 0  # set by slurm/common.sh
    check_gpus(int(asked), torch.cuda.device_count())
    if reason := unusable_gpu():
        raise ValueError(
            f"there is a GPU, and PyTorch {torch.__version__} cannot use it ({reason}): install a "
            "build for its driver (https://pytorch.org/get-started/locally), or train on the CPU "
            "with CUDA_VISIBLE_DEVICES=''."
        )
    if os.environ.get("RANK") != "0" or "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        return
    port = int(os.environ.get("MASTER_PORT", "29500"))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))  # without listening: another rank may be trying already
        except OSError as error:
            raise OSError(
                f"port {port} of {socket.gethostname()}, where rank 0 would listen, is in use "
                f"({error.strerror}), probably by another run. Choose another: MASTER_PORT=N "
                "before sbatch, or deepspeed --master_port N."
            ) from error


def check_gpus(asked: int, seen: int) -> None:
    """Compare GPUs of the job on this node with those that torch sees and with the ranks here."""
    host, here = socket.gethostname(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    cases = {
        f"the job asked for {asked} GPUs a node, but PyTorch finds none on {host}: check the "
        "driver there with nvidia-smi (inside the container, if there is one) and leave the "
        f"node out with sbatch --exclude={host}; for a run on CPUs submit with "
        "--gpus-per-node=0.": asked and not seen,
        f"{here} ranks on {host} for {asked} GPUs asked for and {seen} that PyTorch finds: "
        "submit with --ntasks-per-node and --gpus-per-node the same, and let every rank see all "
        "GPUs of its node (no --gpus-per-task, no --gpu-bind).": (
            asked and not here == asked <= seen
        ),
    }
    refuse(cases)


def check_launcher(driven: int) -> None:
    """Refuse one process for several GPUs: transformers would split batches by threads."""
    if driven > 1:
        raise ValueError(
            f"no launcher started this, and PyTorch sees {driven} GPUs: start it with `deepspeed "
            f"ldistill/train.py ...` or `torchrun --nproc_per_node {driven} ldistill/train.py "
            "...` for one rank a GPU, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def check_clocks() -> None:
    """Raise ValueError on every rank where two clocks are more than `CLOCK_TOLERANCE` apart.
    All ranks call it together."""
    ranks.wait()
    clocks = sorted((now, host) for host, now in ranks.gather((socket.gethostname(), time.time())))
    (first, behind), (last, ahead) = clocks[0], clocks[-1]
    if (apart := last - first) > CLOCK_TOLERANCE:
        raise ranks.shared(
            ValueError(
                f"the clock of {ahead} is {apart:.0f} s ahead of {behind}'s: have both follow a "
                "time server (timedatectl, chronyc tracking), or leave one out with sbatch "
                "--exclude."
            )
        )


def announce_compiling() -> None:
    """Say, before DeepSpeed compiles an op for this machine, that it does; one rank a machine."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    load = OpBuilder.jit_load

    def told(self: Any, verbose: bool = True) -> Any:
        compiled = is_compiled(self.name)
        if not compiled and compiler() is None:
            raise OSError(
                f"no C++ compiler to build DeepSpeed's {self.name} with: apt install g++ (or conda "
                "install gxx)."
            )
        if compiled or os.environ.get("LOCAL_RANK", "0") != "0":
            return load(self, verbose)
        note = "once on this machine; one to three minutes"
        with telling(f"compiling DeepSpeed's {self.name}", note=note):
            return load(self, verbose)

    OpBuilder.jit_load = told


def is_compiled(op: str) -> bool:
    """Whether DeepSpeed's op was compiled on this machine, for this PyTorch."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(op, verbose=False), f"{op}.so").exists()


def compiler() -> str | None:
    """Path of the C++ compiler that builds ops; None: there is none."""
    names = (os.environ.get("CXX") or "c++", "g++")
    return next((path for name in names if (path := shutil.which(name))), None)


def leave_code(code: int) -> None:
    """Write the exit code of a run that ends early where the job's script asked for it.

    A launcher tells the highest code of its ranks, and those that it kills have 128 and more.
    """
    if file := os.environ.get("LDISTILL_EXIT_FILE"):  # set by slurm/common.sh
        Path(file).write_text(f"{code}\n", encoding="utf-8")


def tell(error: BaseException) -> None:
    """Print an error once, whatever number of ranks has it; call it last, on each of them.

    A launcher kills every rank when the first one leaves. So ranks that share an error leave
    together, after rank 0 has told it; and a rank with an error that may be its own waits a moment
    before it tells: if rank 0 has the same, there is nothing left to tell.
    """
    rank = int(os.environ.get("RANK", "0"))
    shared = getattr(error, "of_all_ranks", False)
    place = ""
    if rank != 0 and not shared:
        time.sleep(PATIENCE)
        place = f" on rank {rank} ({socket.gethostname()})"
    if rank == 0 or not shared:
        print(f"\nerror{place}: {error}", file=sys.stderr, flush=True)
        leave_code(exit_code(error))
    if shared:
        ranks.wait()
