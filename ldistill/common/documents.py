"""What the data path and the models share of tokenised samples.

Data never imports models: what it needs of a student's tokenizer, template and image settings is
the protocol `Processor`, which `ldistill.models.processor` implements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ldistill.common.images import ImageSettings
from ldistill.common.samples import Turn

if TYPE_CHECKING:
    import torch
    from PIL import Image

IGNORE = -100
"""The label of a position that is not supervised."""
Grid = tuple[int, int]
"""(rows, cols) of a picture's tiles."""


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
    """Tokenizer, chat template and image settings of one student, as the data path sees them."""

    images: ImageSettings
    pad_token_id: int
    parts: dict[str, str]
    """SHA-256 of what ids depend on, part by part."""

    def fingerprint(self) -> str:
        """SHA-256 over `parts`; shards carry it."""
        ...

    @property
    def takes_system(self) -> bool:
        """Whether the chat template writes a system turn."""
        ...

    def encode(
        self, turns: Sequence[Turn], tile_grids: Sequence[Grid] = (), system: str = ""
    ) -> Document:
        """Tokenise a conversation; `tile_grids` holds the (rows, cols) of each picture."""
        ...

    def load_image(self, data: bytes) -> Image.Image:
        """Decode to RGB. Raises BadImage."""
        ...

    def tiles(self, image: Image.Image) -> tuple[torch.Tensor, Grid]:
        """(float32 [tiles, 3, S, S], (rows, cols))."""
        ...
