"""Where a training step's time goes: vision, student, teacher, loss, backward, optimizer, data.

One more step of every mode runs with the device waited for at every border, which costs a little:
the parts tell proportions, the rounds of ``measure_step`` tell time. *Data* is choosing the targets
and moving the batch; reading and decoding pictures is what `ldistill bench data` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

PARTS = ("data", "vision", "student", "teacher", "loss", "backward", "optimizer")


class Stopwatch:
    """Seconds by part; a part within another counts for itself alone.

    Args:
        clock: gives seconds, everything given to the device being done.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._clock, self._open = clock, []
        self._last = clock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what runs inside; the part around it stops."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def on(self, owner: Any, method: str, name: str) -> Iterator[None]:
        """Time a method of one object while inside."""
        real = getattr(owner, method)

        @wraps(real)  # the naive way asks for the forward's signature
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return real(*args, **kwargs)

        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)


def profile_step(bench: Any, mode: str, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of every part of one step of a ``StepBench``; the clock is a stopwatch's."""
    watch, distiller = Stopwatch(clock), bench.distiller
    with ExitStack() as watched:
        enter = watched.enter_context
        enter(watch.on(bench, "targets", "data"))
        enter(watch.on(distiller.student, "forward", "student"))
        enter(watch.on(distiller.student.vision, "forward", "vision"))
        if distiller.teacher is not None:
            enter(watch.on(distiller.teacher, "hidden", "teacher"))  # ours
            enter(watch.on(distiller.teacher.lm, "forward", "teacher"))  # naive
        with watch.part("data"):
            bench.move_batch()
        with watch.part("loss"):
            loss = bench.loss(mode)
        with watch.part("backward"):
            loss.backward()
        with watch.part("optimizer"):
            bench.update()
    return {name: seconds * 1e3 for name, seconds in watch.seconds.items()}
