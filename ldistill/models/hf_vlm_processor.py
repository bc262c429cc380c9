"""Inputs of LLaVA and SmolVLM students: the checkpoint's own template, tokenizer and pictures.

The chat template is the one in the checkpoint's folder, so a prompt has the ids that transformers'
processor gives it. Training needs an end mark behind every answer; where the template writes none
(LLaVA's), the tokenizer's end-of-text token is put there, as in LLaVA's own training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldistill.common.images import ImageSettings
from ldistill.common.samples import Turn
from ldistill.models.processor import Grid, ImageTokens, Processor

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

_LARGEST = 4096  # no picture is made larger than this before it is cut (transformers' Idefics3)


@dataclass(frozen=True)
class LlavaTokens(ImageTokens):
    """A picture is a run of ``<image>``."""

    image: str = "<image>"
    whole: str | None = None


@dataclass(frozen=True)
class Idefics3Tokens(ImageTokens):
    """Tiles first, a line a row, then the whole view; a fence around each."""

    image: str = "<image>"
    whole: str | None = "<global-img>"
    max_grid: int = 6
    fence: str = "<fake_token_around_image>"

    def all(self) -> list[str]:
        """Every token."""
        return [*super().all(), self.fence]

    def needed(self, tiling: bool) -> list[str]:
        """Those the tokenizer must have."""
        return [*super().needed(tiling), self.fence]

    def picture(self, grid: Grid, per_tile: int) -> str:
        """The text of one picture, as transformers' Idefics3 processor writes it."""
        rows, cols = grid
        patches, text = self.image * per_tile, ""
        if rows * cols > 1:
            for row in range(1, rows + 1):
                for col in range(1, cols + 1):
                    text += self.fence + self.tile.format(row=row, col=col) + patches
                text += "\n"
            text += "\n"
        return text + self.fence + (self.whole or "") + patches + self.fence


@dataclass(frozen=True)
class Idefics3Settings(ImageSettings):
    """Idefics3's way from a picture's size to its tiles; ``max_side`` is its longest edge."""

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a tiled picture: the long side to ``max_side``, then whole tiles."""
        width, height = _scale(width, height, self.max_side)
        if max(width, height) > _LARGEST:
            width, height = _shrink(width, height, _LARGEST)
        ratio, side = width / height, self.tile_size
        if width >= height:
            width = _up(width, side)
            return width, _up(int(width / ratio), side)
        height = _up(height, side)
        return _up(int(height * ratio), side), height


def _scale(width: int, height: int, longest: int) -> tuple[int, int]:
    """The long side to ``longest``, the short one by the ratio, to an even number."""
    ratio = width / height
    if width >= height:
        short = int(longest / ratio)
        return longest, max(short + short % 2, 1)
    short = int(longest * ratio)
    return max(short + short % 2, 1), longest


def _shrink(width: int, height: int, longest: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height:
        return longest, max(int(longest / ratio), 1)
    return max(int(longest * ratio), 1), longest


def _up(size: int, side: int) -> int:
    return math.ceil(size / side) * side


class HFProcessor(Processor):
    """Tokenizer, chat template and image processor of a transformers VLM.

    Args:
        tokenizer: fast, its ``chat_template`` the one of the checkpoint's processor.
        image_processor: transformers'.
        images: tile size and tokens.
        tokens: how a picture stands in the text.
        options: passed to the image processor with every picture.

    Raises:
        ValueError: as :class:`Processor`, or the template does not render pictures and answers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        images: ImageSettings,
        tokens: ImageTokens,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(tokenizer, images, tokens)
        self.image_processor, self._options = image_processor, dict(options)
        self._end = ""
        self._prefix, mark = self._around_answer()
        if not mark:
            if tokenizer.eos_token is None:
                raise ValueError("neither chat template nor tokenizer ends an answer: no eos_token")
            self._end = mark = tokenizer.eos_token
        known = tokenizer.get_vocab().get(mark)
        stops = [tokenizer.eos_token_id, known]
        self._stops = list(dict.fromkeys(i for i in stops if i is not None))

    def _around_answer(self) -> tuple[str, str]:
        """What the template writes before an answer, and behind it without the blanks there."""
        messages = self._messages([Turn("question", "answer")], [])
        asked = self._render(messages[:1], generation=True)
        before, found, mark = self._render(messages).rpartition("answer")
        if not found or "question" not in asked or not before.startswith(asked):
            raise ValueError(
                "the chat template does not render user and assistant text given as a list of "
                "{type: text, text: ...}: it is not the template of a vision-language model"
            )
        return before.removeprefix(asked), mark.strip()

    @property
    def answer_prefix(self) -> str:
        """A blank in both families: ``ASSISTANT: answer``, ``Assistant: answer``."""
        return self._prefix

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens at which an answer ends: the tokenizer's and the template's."""
        return self._stops

    def _messages(self, turns: Sequence[Turn], grids: Sequence[Grid]) -> list[dict[str, Any]]:
        messages = []
        for number, turn in enumerate(turns):
            pictures = [{"type": "image", "grid": grid} for grid in grids] if number == 0 else []
            asked = [*pictures, {"type": "text", "text": self.clean(turn.user)}]
            messages.append({"role": "user", "content": asked})
            answer = {"type": "text", "text": self.clean(turn.assistant) + self._end}
            messages.append({"role": "assistant", "content": [answer]})
        return messages

    def _render(self, messages: list[dict[str, Any]], generation: bool = False) -> str:
        text = super()._render(messages, generation)
        if self._end and not generation:
            text = text.rstrip()  # what follows the end mark starts the next turn
        first, *rest = text.split(self.tokens.image)
        parts = [part for m in messages for part in m["content"] if part["type"] == "image"]
        if len(rest) != len(parts):
            raise ValueError(
                f"the chat template writes {self.tokens.image} {len(rest)} times for {len(parts)} "
                "pictures: it is not the template of this family"
            )
        per_tile = self.images.tokens_per_tile
        pictures = [self.tokens.picture(part["grid"], per_tile) for part in parts]
        return first + "".join(p + after for p, after in zip(pictures, rest, strict=True))

    def _tokenise(self, text: str, **options: Any) -> Any:
        """With the tokenizer's start token, unless the template wrote it (transformers' rule)."""
        start = self.tokenizer.bos_token
        written = start is not None and text.startswith(start)
        return self.tokenizer(text, add_special_tokens=not written, verbose=False, **options)

    def tiles(self, image: Image.Image) -> tuple[torch.Tensor, Grid]:
        """(float32 [tiles, 3, S, S], normalised by the image processor; (rows, cols))."""
        grid = self.images.grid(*image.size)
        made = self.image_processor(images=[image], return_tensors="pt", **self._options)
        pixels = made["pixel_values"]
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        side = self.images.tile_size
        if pixels.shape != (self.images.tiles(grid), 3, side, side):
            raise ValueError(
                f"the image processor made {list(pixels.shape)} of a picture of {image.size}, the "
                f"vision tower takes {[self.images.tiles(grid), 3, side, side]}: its "
                "preprocessor_config.json is not of this model"
            )
        return pixels, grid
