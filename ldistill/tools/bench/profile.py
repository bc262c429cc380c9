"""Where a training step's time goes: vision, student, teacher, loss, backward, optimizer, data.

One more step of every mode runs with the device waited for at every border, which costs a little:
the parts tell proportions, the rounds of ``bench_step`` tell time. *Data* is planning the rows and
moving the batch; reading and decoding pictures is what `ldistill bench data` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

PARTS = ("data", "vision", "student", "teacher", "loss", "backward", "optimizer")
_COLOURS = ("#9aa5b1", "#6c5b7b", "#355c7d", "#c06c84", "#f8b195", "#4f8a8b", "#d9b44a")


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
        """Time what runs inside."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Begin a part; the one around it stops."""
        self._lap()
        self._open.append(name)

    def leave(self) -> None:
        """End the part begun last."""
        self._lap()
        self._open.pop()

    def _lap(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def on_module(self, module: nn.Module, name: str) -> Iterator[None]:
        """Time a module's forward while inside."""
        before = module.register_forward_pre_hook(lambda *_: self.enter(name))
        after = module.register_forward_hook(lambda *_: self.leave())
        try:
            yield
        finally:
            before.remove()
            after.remove()

    @contextmanager
    def on_method(self, owner: Any, method: str, name: str) -> Iterator[None]:
        """Time a method of one object while inside."""
        real = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return real(*args, **kwargs)

        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)


def profile_step(bench: Any, mode: str, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of every part of one step.

    Args:
        bench: a ``StepBench``.
        mode: which step.
        clock: seconds, after waiting for the device.
    """
    watch, distiller = Stopwatch(clock), bench.distiller
    with ExitStack() as watched:
        enter = watched.enter_context
        enter(watch.on_method(bench, "plan", "data"))
        enter(watch.on_module(distiller.student, "student"))
        enter(watch.on_module(distiller.student.vision, "vision"))
        if distiller.teacher is not None:
            enter(watch.on_method(distiller.teacher, "hidden", "teacher"))  # ours
            enter(watch.on_module(distiller.teacher.lm, "teacher"))  # naive
        with watch.part("data"):
            bench.move_batch()
        with watch.part("loss"):
            loss = bench.loss(mode)
        with watch.part("backward"):
            loss.backward()
        with watch.part("optimizer"):
            bench.update()
    return {name: seconds * 1e3 for name, seconds in watch.seconds.items()}


def draw_profile(results: list[Any], title: str, path: Path) -> None:
    """A bar per mode, cut into its parts, as a picture.

    Args:
        results: ``StepResult``s with their parts.
        title: what was measured.
        path: of the picture; its ending says the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.55 * len(results)), layout="constrained")
    names = [result.mode for result in results]
    left = [0.0] * len(results)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        widths = [result.parts[part] for result in results]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.62)
        longest = max(sum(result.parts.values()) for result in results)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.05 * longest:
                share = width / sum(results[row].parts.values())
                axes.text(start + width / 2, row, f"{share:.0%}", ha="center", va="center",
                          color="white", fontsize=8)  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one step")
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
