"""Stopping a run on request so that it can go on later as if it had never stopped.

A run is asked by SIGTERM or SIGUSR1 to any of its ranks, or by a file that appears (`--stop_file`,
`$LDISTILL_STOP_FILE`). The request travels in the one reduction that every step begins with; after
that step a checkpoint is saved, `stopped.json` in the run's folder says so, and `train.py` exits
with `STOPPED_EXIT_CODE`. SIGINT and SIGKILL end a run at once.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerState

from ldistill.common import ranks
from ldistill.data.worker_signals import STOP_SIGNALS
from ldistill.training.callbacks import close_wandb
from ldistill.training.launch import leave_code

STOPPED_EXIT_CODE = 85
STOPPED = "stopped.json"


class Stopped(Exception):
    """The run was asked to stop and its checkpoint is saved."""


class StopRequest(TrainerCallback):
    """Whether the ranks of a run were asked to stop, and whether they all know.

    The Trainer's loop ends after the step in which they agreed, with a checkpoint.
    """

    def __init__(self, stop_file: str | Path | None = None) -> None:
        named = stop_file or os.environ.get("LDISTILL_STOP_FILE")
        self.stop_file = Path(named) if named else None
        self.agreed = False
        self._signal: str | None = None

    @property
    def asked(self) -> str | None:
        """What asked this rank, in words."""
        if self._signal is None and self.stop_file and ranks.is_first() and self.stop_file.exists():
            return f"the file {self.stop_file}"
        return self._signal

    @contextmanager
    def listening(self, folder: Path) -> Iterator[None]:
        """While training runs, signals are requests. `stopped.json` of an earlier stop goes."""
        if ranks.is_first():
            (folder / STOPPED).unlink(missing_ok=True)
        # Only the main thread may handle signals; the file works in any.
        numbers = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None and ranks.is_first():
            # To stderr past its buffer, which a handler must not touch.
            os.write(2, b"\nasked to stop: a checkpoint is saved after this step\n")
        self._signal = signal.Signals(number).name

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it may take longer than there is

    def raise_if_stopped(self, state: TrainerState, folder: Path) -> None:
        """Raise Stopped on every rank, if before the last step, after rank 0 has closed everything
        that a killed process loses; every rank calls it."""
        if not self.agreed or state.global_step >= state.max_steps:
            return
        why = next(filter(None, ranks.gather(self.asked)), "the stop file")  # which may be gone
        stopped = Stopped(
            f"stopped on request ({why}); {folder / f'checkpoint-{state.global_step}'} is saved. "
            "Go on with the same command and --resume_from_checkpoint auto."
        )
        if ranks.is_first():
            record = {"step": state.global_step, "of": state.max_steps, "why": why}
            (folder / STOPPED).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if self.stop_file is not None:
                self.stop_file.unlink(missing_ok=True)  # answered; the next start is a new one
            close_wandb()
            leave_code(STOPPED_EXIT_CODE)
            print(f"\n{stopped}", flush=True)
        ranks.wait()  # a launcher may kill the other ranks as soon as one has left
        raise stopped
