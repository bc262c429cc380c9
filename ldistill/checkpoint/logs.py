"""Logs that a run's checkpoints are cut back to: a JSON line a step, durable before they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldistill.checkpoint.folder import sync, write_durably
from ldistill.common.errors import TransientError, writing


class StepLog:
    """A JSONL file of one rank's, a line a step; a resumed run continues where it left.

    What a full or failing disk refuses is kept as ``problem`` and not raised: the rank tells the
    others at the next step or save, so that none is left in a collective.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: TransientError | None = None
        self._unsynced = False

    def append(self, record: Mapping[str, Any]) -> None:
        if self.problem is not None:  # nothing may follow a line that was cut
            return
        self._unsynced = True
        try:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except TransientError as error:
            self.problem = error

    def sync(self) -> None:
        """Make what was appended durable. Raises TransientError: some could not be written."""
        if self.problem is not None:
            raise self.problem
        if self._unsynced:
            with writing(self.path):
                sync(self.path)
                sync(self.path.parent)
            self._unsynced = False


def rewrite_records(path: Path, last_step: int) -> None:
    """Cut a JSONL file of steps back to ``last_step``, all at once or not at all."""
    kept = [r for r in read_metrics(path) if r["step"] <= last_step]
    write_durably(path, "".join(json.dumps(r) + "\n" for r in kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Records of a ``metrics.jsonl``; an unfinished last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
