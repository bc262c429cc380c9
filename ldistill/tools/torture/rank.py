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

import deepspeed  # noqa: F401  imported once, in the fork server

import ldistill.training.run  # noqa: F401
from ldistill.data import archive
from ldistill.tools.torture.history import last_step
from ldistill.train import main

FIRED = "torture: the fault happened"
"""Printed by a rank when its fault first hits a read: one that never does proves nothing."""


@dataclass(frozen=True)
class Fault:
    """What is wrong inside the ranks.

    ``slow``: every read of a sample takes ``amount`` seconds. ``flaky``: every fifth sample fails
    ``amount`` times before it can be read. ``broken``: from the tenth on, none can be.
    ``file_size``: no file may grow beyond ``amount`` bytes. ``hold``: once the run in ``folder``
    has logged step ``amount``, no sample is read until `release` lets it go on.
    """

    kind: str
    amount: float = 0
    folder: Path = Path()


def release(fault: Fault) -> None:
    """Let the ranks of a ``hold`` go on."""
    _gate(fault).touch()


def _gate(fault: Fault) -> Path:
    return fault.folder.with_suffix(".go")


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
    sys.stderr.flush()
    os._exit(code)


def _inject(fault: Fault) -> None:
    if fault.kind == "file_size":
        limit = int(fault.amount)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return
    if fault.kind == "hold":
        _hold(fault)
        return
    read, reads, fired = archive.read_once, itertools.count(1), itertools.count()
    failures: Counter[tuple[str, int]] = Counter()

    def fails(path: str, offset: int) -> bool:
        number, place = next(reads), (path, offset)
        if fault.kind == "broken":
            return number > 10
        if fault.kind != "flaky" or zlib.crc32(repr(place).encode()) % 5:
            return False
        failures[place] = (failures[place] + 1) % (int(fault.amount) + 1)
        return failures[place] > 0

    def faulty(path: str, offset: int, size: int) -> bytes:
        failing = fails(path, offset)
        if (failing or fault.kind == "slow") and next(fired) == 0:
            print(FIRED, flush=True)
        if fault.kind == "slow":
            time.sleep(fault.amount)
        if failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read(path, offset, size)

    archive.read_once = faulty


def _hold(fault: Fault) -> None:
    read, gate, fired = archive.read_once, _gate(fault), itertools.count()

    def held(path: str, offset: int, size: int) -> bytes:
        while not gate.exists() and last_step(fault.folder) >= fault.amount:
            if next(fired) == 0:
                print(FIRED, flush=True)
            time.sleep(0.01)
        return read(path, offset, size)

    archive.read_once = held
