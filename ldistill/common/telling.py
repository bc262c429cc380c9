"""What a longer step of work shows while it goes on: a bar on a terminal, lines in a log.

    with telling("evaluating", total=len(items)) as told:
        told.advance()      # after each

Nobody should have to wonder whether a run hangs: in a log a line comes when the step begins and
every eight seconds; after some minutes ever more rarely, for a log is read later.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

INTERVAL = 8.0
"""Seconds between two lines in a log."""
SHARE = 0.05
"""Of the time that has passed, where that is longer."""


class Telling:
    """Lines in a log: how far a piece of work is, whenever it has said nothing for a while."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._began = self._last = time.monotonic()
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)
        self._clock.start()

    def advance(self, count: int = 1) -> None:
        self.done += count

    def line(self, text: str) -> None:
        """Print something else; the clock waits anew."""
        self._last = time.monotonic()
        print(text, flush=True)

    def end(self) -> None:
        self._over.set()
        self._clock.join()

    def _tick(self) -> None:
        while not self._over.wait(self._pause()):
            if self._pause() <= 0:
                of = "" if self.total is None else f"{self.done} of {self.total}, "
                self.line(f"{self.what}: {of}{time.monotonic() - self._began:.0f} s")

    def _pause(self) -> float:
        now = time.monotonic()
        return max(INTERVAL, SHARE * (now - self._began)) - (now - self._last)


class _Bar(Progress):
    """The same on a terminal."""

    def advance(self, count: int = 1) -> None:
        super().advance(self.task_ids[0], count)


@contextmanager
def telling(what: str, total: int | None = None, note: str = "") -> Iterator[Telling | _Bar]:
    """Show that something goes on, and how far it is if `total` and ``advance`` say."""
    if sys.stdout.isatty():
        of = () if total is None else (BarColumn(), MofNCompleteColumn())
        with _Bar(TextColumn("{task.description}"), *of, TimeElapsedColumn()) as bar:
            if note:
                bar.console.print(note)
            bar.add_task(what, total=total)
            yield bar
        return
    print(f"{what} ({note}) ..." if note else f"{what} ...", flush=True)
    told = Telling(what, total)
    try:
        yield told
    finally:
        told.end()
