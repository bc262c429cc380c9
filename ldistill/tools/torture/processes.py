"""Starting, watching and killing the ranks of real runs.

with Ranks(argv, ranks=2, logs=folder) as run:
    run.wait_for(lambda: last_step(run_folder) >= 5); run.kill(0); code = run.finish()
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from ldistill.tiny.prepare import default_cache
from ldistill.tools.torture import rank as rank_module
from ldistill.tools.torture.ports import discard_buffers, free_port
from ldistill.tools.torture.rank import Fault, run_rank

_QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
TIMED_OUT = 124
_OPS = "TORCH_EXTENSIONS_DIR"
_POLL = 0.01
_GRACE = 5.0


def _ops_folder() -> Path:
    """Where DeepSpeed compiles its ops: a lock there would have other environments wait."""
    return default_cache() / "ops" / f"{zlib.crc32(sys.prefix.encode()):08x}"


def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([rank_module.__name__])
    return context


class Ranks:
    """The ranks of one start of a run.

    Args:
        argv: command line of `train.py`.
        ranks: how many; they talk over gloo on the loopback device.
        logs: folder for their output, appended to.
        fault: what is wrong inside them.
    """

    def __init__(
        self, argv: Sequence[str], *, ranks: int, logs: Path, fault: Fault | None = None
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"rank-{number}.log" for number in range(ranks)]
        for log in self._logs:
            log.touch()
        self._began = [log.stat().st_size for log in self._logs]
        self._port, context = str(free_port()), _server()
        quiet = _QUIET | {_OPS: os.environ.get(_OPS) or str(_ops_folder())}
        before = {k: os.environ.get(k) for k in quiet}
        os.environ.update(quiet)  # the fork server keeps the environment it is started with
        try:
            self._processes = [
                context.Process(
                    target=run_rank,
                    args=(_place(number, ranks, self._port), list(argv), str(log), fault),
                    daemon=False,
                )
                for number, log in enumerate(self._logs)
            ]
            for process in self._processes:
                process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self.finish(grace=0)
        discard_buffers(self._port)

    @property
    def count(self) -> int:
        """Ranks that were started."""
        return len(self._processes)

    def children(self, number: int) -> list[int]:
        """Process ids that a rank started: its data workers."""
        pid = self._processes[number].pid
        listed = Path(f"/proc/{pid}/task/{pid}/children")
        return [int(word) for word in listed.read_text().split()] if listed.exists() else []

    def alive(self) -> bool:
        """Whether all ranks still run."""
        return all(process.is_alive() for process in self._processes)

    def wait_for(self, happened: Callable[[], bool], timeout: float = 300) -> bool:
        """Wait until ``happened`` or a rank ends; whether it happened."""
        end = time.monotonic() + timeout
        while not (done := happened()) and self.alive() and time.monotonic() < end:
            time.sleep(_POLL)
        return done

    def kill(self, number: int | None = None) -> None:
        """kill -9 one rank, or all of them."""
        for process in self._processes if number is None else [self._processes[number]]:
            process.kill()

    def finish(self, timeout: float = 300, grace: float = _GRACE) -> int:
        """Wait for the end; when a rank fails, the rest go after a while, as under a launcher.

        Returns:
            0, or the first failing rank's exit status: positive, or minus the signal; TIMED_OUT
            where the run did not end in time.
        """
        end = time.monotonic() + timeout
        code = 0
        while any(process.is_alive() for process in self._processes):
            failed = [p.exitcode for p in self._processes if p.exitcode]
            if failed and not code:
                code, end = failed[0], min(end, time.monotonic() + grace)
            if time.monotonic() > end:
                code = code or TIMED_OUT
                self.kill()
            time.sleep(_POLL)
        for process in self._processes:
            process.join()
            code = code or process.exitcode or 0
        return code

    def output(self) -> str:
        """What the ranks said since this start."""
        texts = []
        for log, start in zip(self._logs, self._began, strict=True):
            with log.open("rb") as file:
                file.seek(start)
                texts.append(file.read().decode(errors="replace"))
        return "\n".join(texts)


def _place(number: int, ranks: int, port: str) -> dict[str, str]:
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    named = {key: str(value) for key, value in place.items()}
    return named | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
