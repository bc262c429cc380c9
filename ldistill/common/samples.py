"""The types every part of the data path shares: a turn, a sample, and a counted loss.

Readers turn each record of any data set into exactly one `Sample` or one `Drop`:

    sample = Sample("42", "docvqa", (Turn("What is the date?", "3 May"),), (png_bytes,))
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    `images` are the places of pictures in the question, as character offsets in `user`. A sample
    none of whose turns has any shows all of its pictures in front of the first question.
    """

    user: str
    assistant: str
    images: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more pictures, after a system turn where there is one.

    `images` holds encoded files (PNG or JPEG bytes), in the order in which the prompt shows them.
    `source` is the normalised source id; it decides the category and so the distillation weight.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    system: str = ""


@dataclass(frozen=True)
class Drop:
    """Something a reader gave up, and why; `unit` is "sample" or "turn", `detail` for people."""

    reason: str
    id: str
    unit: str = "sample"
    detail: str = field(default="", compare=False)


class BadImage(ValueError):
    """A picture that cannot be used. `reason` is the short name that drops are counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
