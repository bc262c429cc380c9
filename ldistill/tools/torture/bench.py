"""The workbench of a torture: how real runs are started, spoiled, watched, killed and compared.

bench = Bench(folder)
with bench.start(run) as ranks:
    ranks.wait_for(lambda: last_step(run) >= 5); ranks.kill(0); code = ranks.finish()
bench.undisturbed().require(bench.complete(run))

Ranks are forked from a server that has imported all this already, so that a restart costs seconds.
What they run is `train.main` with a command line, as under DeepSpeed's launcher.
"""

from __future__ import annotations

import errno
import itertools
import math
import multiprocessing
import os
import resource
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import deepspeed  # noqa: F401  imported once, in the fork server

import ldistill
import ldistill.training.run
from ldistill.checkpoint.logs import read_metrics
from ldistill.common.locate import default_cache
from ldistill.common.run_files import METRICS
from ldistill.data import archive
from ldistill.tools.torture import world
from ldistill.train import main
from ldistill.training.callbacks import read_samples

TIMED_OUT = 124
FIRED = "torture: the fault happened"
"""Printed by a rank when its fault first hits a read: one that never does proves nothing."""
_CONFIGS = Path(ldistill.__file__).parent / "ds_configs"
_ORDINARY = {"documents": {"docvqa": 48, "vqav2": 48}}
_QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


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


def run_rank(place: dict[str, str], argv: list[str], log: Path, fault: Fault | None) -> None:
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


class Ranks:
    """One start of a run: ranks of ``train.py argv`` over gloo, output appended to ``logs``."""

    def __init__(self, argv: list[str], ranks: int, logs: Path, fault: Fault | None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"rank-{number}.log" for number in range(ranks)]
        for log in self._logs:
            log.touch()
        self._said = [log.stat().st_size for log in self._logs]
        self._port, context = world.free_port(), multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        # DeepSpeed compiles its ops there: a lock elsewhere would have other environments wait.
        own = default_cache() / "ops" / f"{zlib.crc32(sys.prefix.encode()):08x}"
        ops = {"TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or str(own)}
        self.began, self.processes = time.time(), []
        with mock.patch.dict(os.environ, _QUIET | ops):  # the fork server keeps it
            for number, log in enumerate(self._logs):
                args = (world.place(number, ranks, self._port), argv, log, fault)
                self.processes.append(context.Process(target=run_rank, args=args))
                self.processes[-1].start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.finish(grace=0)
        world.discard_buffers(self._port)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait_for(self, happened: Callable[[], bool], timeout: float = 300) -> bool:
        """Wait until ``happened`` or a rank ends; whether it happened."""
        end = time.monotonic() + timeout
        while not (done := happened()) and self.alive() and time.monotonic() < end:
            time.sleep(0.01)
        return done

    def kill(self, number: int | None = None) -> None:
        for process in self.processes if number is None else [self.processes[number]]:
            process.kill()

    def finish(self, timeout: float = 300, grace: float = 5.0) -> int:
        """Wait for the end; when a rank fails, the rest go after ``grace``, as under a launcher.

        Returns 0, the first failing rank's exit status (minus the signal that killed it), or
        TIMED_OUT.
        """
        end, code = time.monotonic() + timeout, 0
        while any(process.is_alive() for process in self.processes):
            failed = [p.exitcode for p in self.processes if p.exitcode]
            if failed and not code:
                code, end = failed[0], min(end, time.monotonic() + grace)
            if time.monotonic() > end:
                code = code or TIMED_OUT
                self.kill()
            time.sleep(0.01)
        return code or next((p.exitcode for p in self.processes if p.exitcode), 0)

    def output(self) -> str:
        said = (log.read_bytes()[start:] for log, start in zip(self._logs, self._said))
        return b"\n".join(said).decode(errors="replace")


def check(holds: object, otherwise: str) -> None:
    """RuntimeError says why a run did not hold."""
    if not holds:
        raise RuntimeError(otherwise)


@dataclass(frozen=True)
class History:
    """What a run did: loss and samples of every step, these in the order of the data."""

    losses: dict[int, float]
    samples: dict[int, list[list[str]]]

    @classmethod
    def of(cls, run: Path) -> History:
        """The history a run folder tells of. Raises RuntimeError for a step that is told twice."""
        told = [(record["step"], record["loss"]) for record in read_metrics(run / METRICS)]
        losses = dict(told)
        check(len(losses) == len(told), f"{run / METRICS} has steps twice: {[s for s, _ in told]}")
        return cls(losses, read_samples(run))

    def require(self, other: History, tolerance: float = 0.0) -> str:
        """Says that another history is the same; RuntimeError names the first step that is not."""
        for step in sorted(self.losses.keys() | other.losses.keys()):
            mine, theirs = (h.losses.get(step, math.nan) for h in (self, other))
            check(abs(mine - theirs) <= tolerance, f"loss of step {step}: {theirs}, not {mine}")
            same = self.samples.get(step) == other.samples.get(step)
            check(same, f"samples of step {step} differ")
        return "same losses and samples"


@dataclass
class Bench:
    root: Path  # a folder of its own; shards, run folders and logs go there
    ranks: int = 2
    steps: int = 12
    stage: int = 2
    timeout: float = 600  # seconds after which a run counts as one that hangs
    details: dict[str, Any] = field(default_factory=dict)  # what a trial tells beside its outcome

    def shards(self, name: str = "shards", **mixture: Any) -> Path:
        """Shards of a mixture (see `write_shards`), written once."""
        folder = self.root / name
        return folder if folder.exists() else world.write_shards(folder, **mixture or _ORDINARY)

    def start(
        self,
        run: Path,
        *,
        shards: Path | None = None,
        ranks: int | None = None,
        stage: int | None = None,
        fault: Fault | None = None,
        **fields: object,
    ) -> Ranks:
        """Start a run, or go on with it; ``fields`` are of its recipe."""
        fields = {
            "recipe": world.RECIPE,
            "shards": shards or self.shards(),
            "output_dir": run,
            "deepspeed": _CONFIGS / f"zero{stage or self.stage}.json",
            "resume_from_checkpoint": "auto",
            "max_steps": self.steps,
            "log_samples": True,
            "use_cpu": True,
            **fields,
        }
        argv = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
        return Ranks(argv, ranks or self.ranks, self.root / "logs" / run.name, fault)

    def complete(self, run: Path, **options: Any) -> History:
        """Run to the end, with the options of `start`; RuntimeError where that or a fault fails."""
        with self.start(run, **options) as ranks:
            code, said = ranks.finish(self.timeout), ranks.output()
        check(code == 0, f"{run.name} ended with {code}:\n{said[-3000:]}")
        check(not options.get("fault") or FIRED in said, f"{run.name}: its fault never happened")
        return History.of(run)

    def undisturbed(self, name: str = "undisturbed", **options: Any) -> History:
        """The run that nothing happens to; run once under its name.

        Raises ChildProcessError: it fails, so that nothing can be tried on this machine.
        """
        run = self.root / name
        if (run / "student").exists():
            return History.of(run)
        try:
            return self.complete(run, **options)
        except RuntimeError as error:
            raise ChildProcessError(f"no run ends well here, even undisturbed: {error}") from error

    def fresh(self, name: str) -> Path:
        """A run folder that holds nothing."""
        run = self.root / name
        shutil.rmtree(run, ignore_errors=True)
        return run
