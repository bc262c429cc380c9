"""The workbench of a torture: how real runs are started, watched, killed and compared.

bench = Bench(folder)
with bench.start(run) as ranks:
    ranks.wait_for(lambda: last_step(run) >= 5); ranks.kill(0); code = ranks.finish()
bench.undisturbed().require(bench.complete(run))
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import ldistill
from ldistill.checkpoint.logs import read_metrics
from ldistill.common.locate import default_cache
from ldistill.common.run_files import METRICS
from ldistill.tools.torture import world
from ldistill.tools.torture.rank import FIRED, Fault, run_rank
from ldistill.training.callbacks import read_samples

TIMED_OUT = 124
_CONFIGS = Path(ldistill.__file__).parent / "ds_configs"
_ORDINARY = {"documents": {"docvqa": 48, "vqav2": 48}}
_QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


class Ranks:
    """The ranks of one start of a run: ``train.py argv``, over gloo on the loopback device.

    Their output is appended to ``logs``; ``fault`` is what is wrong inside them.
    """

    def __init__(self, argv: Sequence[str], ranks: int, logs: Path, fault: Fault | None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"rank-{number}.log" for number in range(ranks)]
        self._said = [log.stat().st_size if log.exists() else 0 for log in self._logs]
        self._port, context = world.free_port(), multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([run_rank.__module__])
        # DeepSpeed compiles its ops there: a lock elsewhere would have other environments wait.
        own = default_cache() / "ops" / f"{zlib.crc32(sys.prefix.encode()):08x}"
        ops = {"TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or str(own)}
        self.began, self._processes = time.time(), []
        with mock.patch.dict(os.environ, _QUIET | ops):  # the fork server keeps it
            for number, log in enumerate(self._logs):
                place = world.place(number, ranks, self._port)
                args = (place, list(argv), str(log), fault)
                self._processes.append(context.Process(target=run_rank, args=args))
                self._processes[-1].start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.finish(grace=0)
        world.discard_buffers(self._port)

    def children(self, number: int) -> list[int]:
        """Process ids that a rank started: its data workers."""
        pid = self._processes[number].pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def alive(self) -> bool:
        """Whether all ranks still run."""
        return all(process.is_alive() for process in self._processes)

    def wait_for(self, happened: Callable[[], bool], timeout: float = 300) -> bool:
        """Wait until ``happened`` or a rank ends; whether it happened."""
        end = time.monotonic() + timeout
        while not (done := happened()) and self.alive() and time.monotonic() < end:
            time.sleep(0.01)
        return done

    def kill(self, number: int | None = None) -> None:
        """kill -9 one rank, or all of them."""
        for process in self._processes if number is None else [self._processes[number]]:
            process.kill()

    def finish(self, timeout: float = 300, grace: float = 5.0) -> int:
        """Wait for the end; when a rank fails, the rest go after a while, as under a launcher.

        Returns:
            0, or the first failing rank's exit status: positive, or minus the signal; TIMED_OUT
            where the run did not end in time.
        """
        end, code = time.monotonic() + timeout, 0
        while any(process.is_alive() for process in self._processes):
            failed = [p.exitcode for p in self._processes if p.exitcode]
            if failed and not code:
                code, end = failed[0], min(end, time.monotonic() + grace)
            if time.monotonic() > end:
                code = code or TIMED_OUT
                self.kill()
            time.sleep(0.01)
        return code or next((p.exitcode for p in self._processes if p.exitcode), 0)

    def output(self) -> str:
        """What the ranks said since this start."""
        logs = [(log, start) for log, start in zip(self._logs, self._said) if log.exists()]
        return "\n".join(log.read_bytes()[start:].decode(errors="replace") for log, start in logs)


def check(holds: bool, otherwise: str) -> None:
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
        records = read_metrics(run / METRICS)
        losses = {r["step"]: r["loss"] for r in records}
        steps = [r["step"] for r in records]
        check(len(losses) == len(records), f"{run / METRICS} has steps twice: {steps}")
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
    """Where runs are tortured."""

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
        """Run to the end, with the options of `start`.

        Raises:
            RuntimeError: it failed (the end of what it said is in the message), or its fault never
                happened.
        """
        with self.start(run, **options) as ranks:
            code, said = ranks.finish(self.timeout), ranks.output()
        check(code == 0, f"{run.name} ended with {code}:\n{said[-3000:]}")
        hit = options.get("fault") is None or FIRED in said
        check(hit, f"{run.name}: its fault never happened")
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
