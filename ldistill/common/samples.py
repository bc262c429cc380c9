"""The types every part of the data path shares: a turn, a sample, and a counted loss.

Readers turn each record of any data set into exactly one `Sample` or one `Drop`, so that
samples in = samples kept + samples dropped holds from the first step on.

    sample = Sample("42", "docvqa", (Turn("What is the date?", "3 May"),), (png_bytes,))
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more pictures.

    `images` holds encoded files (PNG or JPEG bytes), in the order in which the prompt shows them.
    `source` is the normalised source id; it decides the category and so the distillation weight.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Drop:
    """Something a reader gave up, and why; `unit` is "sample" or "turn"."""

    reason: str
    id: str
    unit: str = "sample"


class BadImage(ValueError):
    """A picture that cannot be used. `reason` is the short name that drops are counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.detail)
