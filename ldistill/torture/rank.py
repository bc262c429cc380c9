"""One rank of a tortured run: the process that trains, and the faults put into it.

The ranks are forked from a server that has imported everything already, so that a restart costs
seconds. What they run is `train.main` with a command line, as under DeepSpeed's launcher.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import time
import zlib
from dataclasses import dataclass

import deepspeed  # noqa: F401  imported once, in the fork server

import ldistill.run  # noqa: F401
from ldistill.data import archive
from ldistill.train import main


@dataclass(frozen=True)
class Fault:
    """What is wrong inside the ranks.

    ``slow``: every read of a sample takes ``amount`` seconds. ``flaky``: every fifth sample fails
    ``amount`` times before it can be read. ``broken``: from the tenth on, none can be.
    ``file_size``: no file may grow beyond ``amount`` bytes.
    """

    kind: str
    amount: float = 0


def run_rank(place: dict[str, str], argv: list[str], log: str, fault: Fault | None) -> None:
    """Be a rank: environment ``place``, command line ``argv``, output to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(place)
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
    read, calls = archive.read_range, [0]
    failed: dict[tuple[str, int], int] = {}

    def faulty(path: str, offset: int, size: int) -> bytes:
        calls[0] += 1
        if fault.kind == "slow":
            time.sleep(fault.amount)
        place = (path, offset)
        if fault.kind == "flaky" and zlib.crc32(repr(place).encode()) % 5 == 0:
            failed[place] = failed.get(place, 0) + 1
            if failed[place] <= fault.amount:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            failed.pop(place)
        if fault.kind == "broken" and calls[0] > 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read(path, offset, size)

    archive.read_range = faulty
