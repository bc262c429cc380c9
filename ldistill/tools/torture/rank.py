"""One rank of a tortured run: the process that trains, and the faults put into it.

The ranks are forked from a server that has imported everything already, so that a restart costs
seconds. What they run is `train.main` with a command line, as under DeepSpeed's launcher.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import deepspeed  # noqa: F401  imported once, in the fork server

import ldistill.training.run  # noqa: F401
from ldistill.checkpoint.logs import read_metrics
from ldistill.common.run_files import METRICS
from ldistill.data import archive
from ldistill.train import main

FIRED = "torture: the fault happened"
"""Printed by a rank when its fault first hits a read: one that never does proves nothing."""


@dataclass(frozen=True)
class Fault:
    """What is wrong inside the ranks.

    ``slow``: every read of a sample takes ``amount`` seconds. ``flaky``: every fifth sample fails
    ``amount`` times before it can be read. ``broken``: from the tenth on, none can be.
    ``file_size``: no file may grow beyond ``amount`` bytes. ``hold``: once the run in ``folder``
    has logged step ``amount``, no sample is read until its ``gate`` exists.
    """

    kind: Literal["slow", "flaky", "broken", "file_size", "hold"]
    amount: float = 0
    folder: Path = Path()

    @property
    def gate(self) -> Path:
        return self.folder.with_suffix(".go")


def last_step(run: Path) -> int:
    """The last step that a run logged; 0 before the first."""
    records = read_metrics(run / METRICS)
    return records[-1]["step"] if records else 0


def run_rank(place: dict[str, str], argv: list[str], log: str, fault: Fault | None) -> None:
    """Be a rank: environment ``place``, command line ``argv``, output to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(place)
    # What a fork server starts would start its own children from a fork server, too: data workers
    # would then be no children of their rank, as they are in a run that a launcher starts.
    multiprocessing.set_start_method("fork", force=True)
    if fault is not None:
        _inject(fault)
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


def _inject(fault: Fault) -> None:
    if fault.kind == "file_size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.amount), resource.RLIM_INFINITY))
        return
    read, reads, fired = archive.read_once, itertools.count(1), itertools.count()
    failures: Counter[tuple[str, int]] = Counter()

    def flaky(place: tuple[str, int]) -> bool:
        failures[place] = (failures[place] + 1) % (int(fault.amount) + 1)
        return zlib.crc32(repr(place).encode()) % 5 == 0 and failures[place] > 0

    hits = {
        "slow": lambda place: True,
        "broken": lambda place: next(reads) > 10,
        "hold": lambda place: not fault.gate.exists() and last_step(fault.folder) >= fault.amount,
        "flaky": flaky,
    }[fault.kind]

    def faulty(path: str, offset: int, size: int) -> bytes:
        if hits((path, offset)):
            if next(fired) == 0:
                print(FIRED, flush=True)
            if fault.kind in ("broken", "flaky"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            time.sleep(fault.amount if fault.kind == "slow" else 0)
            while fault.kind == "hold" and not fault.gate.exists():
                time.sleep(0.01)
        return read(path, offset, size)

    archive.read_once = faulty
