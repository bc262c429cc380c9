"""How the ranks of a run write a checkpoint together, and fail together.

    saver = Saver(folder, about, keep=2)
    saver.save(step, write)      # every rank; write() puts this rank's files into saver.root

A rank whose disk is full does not raise in the midst of a collective, where the others would wait
for it: what fails is noted, all go on to the end, tell one another, and raise the same sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldistill.checkpoint import folder as checkpoint_folder
from ldistill.checkpoint.logs import StepLog
from ldistill.checkpoint.resuming import foreign_code
from ldistill.common import ranks
from ldistill.common.errors import TransientError


class CheckpointError(TransientError):
    """A checkpoint could not be written; the ones before it are untouched."""


class Saver:
    """Writes the checkpoints of a run folder.

    Args:
        folder: the run's.
        about: what the manifest says of the run (see `describe`).
        keep: complete checkpoints to keep; None for all.
        logs: this rank's, which a checkpoint is cut back to: durable before it is.
        best: step and value of the best evaluation up to a step, whose checkpoint is kept besides.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        keep: int | None,
        logs: Sequence[StepLog] = (),
        best: Callable[[int], tuple[int, float] | None] | None = None,
    ) -> None:
        self.folder, self.about, self.keep, self.logs, self._best = folder, about, keep, logs, best
        self.root = folder / checkpoint_folder.WRITING  # where the Trainer puts `checkpoint-N`
        self._failures: list[str] = []
        self._checked = False

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Note what the disk refuses instead of raising it, so that collectives stay in step."""
        try:
            yield
        # The first is agreed upon already; of the others collectives are out of step as it is.
        except (FloatingPointError, torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError
            first = (str(error).splitlines() or [""])[0]
            self._failures.append(f"{type(error).__name__}: {first}")

    def save(self, step: int, write: Callable[[], None]) -> Path:
        """Write, seal and publish the checkpoint of a step; every rank must call it.

        Raises CheckpointError on every rank, when any of them could not write.
        """
        self._failures.clear()
        target = self.root / f"checkpoint-{step}"
        files: dict[str, Any] = {}
        with self._together(step):
            if ranks.is_first():
                checkpoint_folder.begin(self.folder, step)
        with self._together(step):
            write()
            self.sync_logs()
        with self._together(step):
            files = checkpoint_folder.seal(target, ranks.index(), ranks.count())
        parts = ranks.gather(files)
        with self._together(step):
            if ranks.is_first():
                merged = {name: entry for part in parts for name, entry in part.items()}
                checkpoint_folder.publish(target, step, merged, self.about)
        path = self.folder / target.name
        if ranks.is_first():
            self._tidy(path)
        ranks.wait_for_first()
        return path

    def sync_logs(self) -> None:
        """Make this rank's logs durable. Raises TransientError: one could not be written."""
        for log in self.logs:
            log.sync()

    def _tidy(self, path: Path) -> None:
        """What may fail without harm to the checkpoint that was just published."""
        try:
            checkpoint_folder.retire(self.folder, self.keep, self._best)
            # Said at the first checkpoint, not after days: this run would refuse its own.
            if not self._checked and (reason := foreign_code(path)):
                ranks.say(f"warning: {path.name} cannot be resumed from: {reason}")
            self._checked = True
        except OSError as error:
            ranks.say(f"warning: older checkpoints in {self.folder} could not be removed: {error}")

    @contextmanager
    def _together(self, step: int) -> Iterator[None]:
        """Go on where every rank could do its part; else clear away, and raise on all."""
        with self.attempt():
            yield

        def told(found: dict[int, list[str]]) -> CheckpointError:
            rank, [text, *_] = next(iter(found.items()))
            if ranks.is_first():
                with suppress(OSError):  # of the same disk: what is told is why nothing was saved
                    checkpoint_folder.clear(self.folder)  # make room
            last = "earlier ones are untouched"
            with suppress(OSError):
                good = checkpoint_folder.complete(self.folder)
                last = "there is no earlier one"
                if good:
                    last = f"{good[0].path.name} is complete and untouched"
            return CheckpointError(
                f"checkpoint-{step} could not be written to {self.folder} (rank {rank}: {text}); "
                f"{last}. Make room or mend the disk, then go on with --resume_from_checkpoint "
                "auto."
            )

        ranks.relay(self._failures, told)

    def guard(self, engine: Any) -> None:
        """Let a DeepSpeed engine write through :meth:`attempt`, without its scripts."""
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        attempt = self.attempt

        class GuardedEngine(TorchCheckpointEngine):
            """DeepSpeed's own, with failures noted and files synced by the rank that wrote them."""

            def makedirs(self, path: str, exist_ok: bool = False) -> None:
                with attempt():
                    Path(path).mkdir(parents=True, exist_ok=exist_ok)

            def save(self, state_dict: Any, path: str) -> None:
                with attempt():
                    torch.save(state_dict, path)
                    checkpoint_folder.sync(Path(path))

        if type(engine.checkpoint_engine) is not TorchCheckpointEngine:
            return
        engine.checkpoint_engine = GuardedEngine()
        # It drops executables that unpickle the folder into it; the student lies beside them.
        engine._copy_recovery_script = lambda path: None
        # `latest` is written by rank 0 while the others wait in a barrier: we write it ourselves.
        engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)
