"""The types every part of the data path shares: a turn, a sample, a counted loss, a document.

Readers turn each record of any data set into exactly one `Sample` or one `Drop`:

    sample = Sample("42", "docvqa", (Turn("What is the date?", "3 May"),), (png_bytes,))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

IGNORE = -100
"""The label of a position that is not supervised."""
Size = tuple[int, int]
"""(width, height) of a picture in pixels: all that its place in the text depends on."""
Pictures = dict[str, "Tensor"]
"""What a vision tower takes of some pictures, by the names that its model gives it."""


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


@dataclass(frozen=True)
class Document:
    """Token ids of one sample. `labels[i]` is the token after i where that one is supervised.

    Both int32 [n]; elsewhere, and at the last position, the label is -100.
    """

    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def supervised(self) -> int:
        """Positions that carry a label."""
        return int((self.labels != IGNORE).sum())

    @property
    def prompt(self) -> int:
        """Positions before the first one that carries a label (all when none does)."""
        places = np.flatnonzero(self.labels != IGNORE)
        return int(places[0]) if len(places) else len(self.labels)


class Processor(Protocol):
    """Tokenizer, chat template and image settings of one student, as the data path sees them.

    Data never imports models: `ldistill.models.processor` implements it.
    """

    images: Any
    """A dataclass: at least `tiling`, `max_images`, `tokens_per_tile`."""
    image_token_id: int
    pad_token_id: int
    parts: dict[str, str]
    """SHA-256 of what ids depend on, part by part."""

    def fingerprint(self) -> str:
        """SHA-256 over `parts`; shards carry it."""

    @property
    def takes_system(self) -> bool:
        """Whether the chat template writes a system turn."""

    def encode(
        self, turns: Sequence[Turn], sizes: Sequence[Size] = (), system: str = ""
    ) -> Document:
        """Tokenise a conversation about pictures of these sizes; BadImage: one cannot be used."""

    def load_image(self, data: bytes) -> Image.Image:
        """Decode to RGB. Raises BadImage."""

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Tensors of a document's pictures, in order; none of none. Raises BadImage."""

    def rotary(self, input_ids: np.ndarray, pictures: Pictures) -> Tensor | None:
        """Rotary positions int64 [axes, n] where a student has several axes; None: they count."""
