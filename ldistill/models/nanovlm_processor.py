"""Inputs of a nanoVLM: square tiles in [0, 1], tokens that say which tile is where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ldistill.common.documents import Pictures, Size
from ldistill.common.images import ImageSettings, cut_tiles
from ldistill.common.samples import Turn
from ldistill.models.processor import Processor

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

Grid = tuple[int, int]
"""(rows, cols) of a picture's tiles."""


@dataclass(frozen=True)
class ImageTokens:
    """The special tokens that stand for pictures."""

    image: str = "<|image|>"
    """Replaced by one embedding of the projector each."""
    whole: str | None = "<|global_image|>"
    """Opens the whole view of a picture; None: no such token."""
    tile: str = "<row_{row}_col_{col}>"
    """Opens one tile of a tiled picture; rows and columns count from 1."""
    max_grid: int = 8
    """Rows and columns for which tile tokens exist."""

    def all(self) -> list[str]:
        """Every token, in the order of nanoVLM's vocabulary."""
        places = range(1, self.max_grid + 1)
        tiles = [self.tile.format(row=row, col=col) for row in places for col in places]
        return [self.image, *([self.whole] if self.whole else []), *tiles]

    def needed(self, tiling: bool) -> list[str]:
        """Those the tokenizer must have."""
        return self.all() if tiling else self.all()[: 1 + bool(self.whole)]

    def picture(self, grid: Grid, per_tile: int) -> str:
        """The text of one picture: its whole view, then its tiles row by row."""
        rows, cols = grid
        patches = self.image * per_tile
        text = (self.whole or "") + patches
        if rows * cols > 1:
            text += "".join(
                self.tile.format(row=row + 1, col=col + 1) + patches
                for row in range(rows)
                for col in range(cols)
            )
        return text


class NanoVLMProcessor(Processor):
    """Tokenizer, chat template and image settings of a nanoVLM.

    Raises:
        ValueError: as :class:`Processor`, or the tokenizer lacks image tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageSettings | None = None,
        tokens: ImageTokens | None = None,
    ) -> None:
        images, self.tokens = images or ImageSettings(), tokens or ImageTokens()
        vocabulary = tokenizer.get_vocab()
        literals = [token for token in self.tokens.all() if token in vocabulary]
        super().__init__(tokenizer, images, self.tokens.image, literals)
        self._check_tokens(vocabulary)

    def _check_tokens(self, vocabulary: Mapping[str, int]) -> None:
        grid, most = self.images.max_side // self.images.tile_size, self.tokens.max_grid
        needed = self.tokens.needed(self.images.tiling)
        missing = [token for token in needed if token not in vocabulary]
        if self.images.tiling and grid > most:
            raise ValueError(
                f"max_side {self.images.max_side} gives up to {grid} x {grid} tiles, but tile "
                f"tokens exist for {most} x {most}: lower max_side"
            )
        if missing:
            raise ValueError(
                f"the tokenizer lacks the image tokens {missing[:4]} ({len(missing)} in all): add "
                "them with extra_special_tokens"
            )

    def picture_texts(self, sizes: Sequence[Size]) -> list[str]:
        """Numbered where there are several, as nanoVLM does it."""
        per_tile = self.images.tokens_per_tile
        texts = [self.tokens.picture(self.images.grid(*size), per_tile) for size in sizes]
        if len(texts) < 2:
            return texts
        return [f"<image: {number}>{text}" for number, text in enumerate(texts)]

    def _messages(
        self, turns: Sequence[Turn], shown: Sequence[str], system: str = ""
    ) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": self.plain(system)}] if system else []
        for turn, pieces in zip(turns, self._pieces(turns, len(shown)), strict=True):
            asked = "".join(piece if isinstance(piece, str) else shown[piece] for piece in pieces)
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": self.plain(turn.assistant)})
        return messages

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """``pixel_values``: float32 [tiles, 3, S, S] in [0, 1]."""
        tiles = [cut_tiles(image, self.images)[0] for image in images]
        return {"pixel_values": torch.cat(tiles)} if tiles else {}

    def _picture_parts(self) -> dict[str, object]:
        # max_images only selects samples: no ids change.
        images = {k: v for k, v in asdict(self.images).items() if k != "max_images"}
        return {"image tokens": asdict(self.tokens), "image settings": images}
