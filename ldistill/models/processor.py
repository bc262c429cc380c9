"""From turns and pictures to token ids, labels and tiles.

The chat template alone decides where an answer starts and ends: it is rendered turn by turn, the
whole text is tokenised once, and character offsets carry the borders over to tokens. So the ids
are those of the tokenizer's own `apply_chat_template`, and any template whose rendering of a
conversation extends that of its beginning works, not only the one of SmolLM2.

    processor = Processor(tokenizer, ImageSettings())
    document = processor.encode(sample.turns, [(1, 1)])
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldistill.common.images import ImageSettings, cut_tiles, open_image
from ldistill.common.samples import Turn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
Grid = tuple[int, int]


@dataclass(frozen=True)
class ImageTokens:
    """The special tokens that stand for pictures. The defaults are nanoVLM's."""

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


@dataclass(frozen=True)
class Document:
    """Token ids of one sample. `labels[i]` is the token after i where that one is supervised.

    Both int32 [n]; elsewhere, and at the last position, the label is -100.
    """

    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def supervised(self) -> int:
        """Rows that carry a label."""
        return int((self.labels != IGNORE).sum())

    @property
    def prompt(self) -> int:
        """Rows before the first one that carries a label (all rows when none does)."""
        rows = np.flatnonzero(self.labels != IGNORE)
        return int(rows[0]) if len(rows) else len(self.labels)


class Processor:
    """Tokenizer, chat template and image settings of one student.

    `tokenizer` is a fast transformers tokenizer that has a chat template and the image tokens as
    single tokens; ValueError otherwise.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageSettings | None = None,
        tokens: ImageTokens | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.images = images or ImageSettings()
        self.tokens = tokens or ImageTokens()
        vocabulary = tokenizer.get_vocab() if getattr(tokenizer, "is_fast", False) else {}
        self._check_tokenizer(vocabulary)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(self.tokens.image)
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else (tokenizer.eos_token_id or 0)
        known = [token for token in self.tokens.all() if token in vocabulary]
        self._literal = re.compile("|".join(re.escape(token) for token in known))

    def _check_tokenizer(self, vocabulary: Mapping[str, int]) -> None:
        if not vocabulary:
            raise ValueError("the tokenizer must be a fast one: labels need character offsets")
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: set tokenizer.chat_template")
        grid = self.images.max_side // self.images.tile_size
        if self.images.tiling and grid > self.tokens.max_grid:
            raise ValueError(
                f"max_side {self.images.max_side} gives up to {grid} x {grid} tiles, but tile "
                f"tokens exist for {self.tokens.max_grid} x {self.tokens.max_grid}: lower max_side"
            )
        needed = self.tokens.needed(self.images.tiling)
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer lacks the image tokens {missing[:4]} ({len(missing)} in all): add "
                "them with extra_special_tokens"
            )

    # text ------------------------------------------------------------------------------------

    def image_text(self, grids: Sequence[Grid]) -> str:
        """The text that stands for the pictures, in front of the first question."""
        text = ""
        for number, grid in enumerate(grids):
            if len(grids) > 1:
                text += f"<image: {number}>"
            text += self.tokens.picture(grid, self.images.tokens_per_tile)
        return text

    def clean(self, text: str) -> str:
        """Text without literal image tokens, which would be taken for pictures."""
        while self._literal.search(text):  # cutting one token out may join the halves of another
            text = self._literal.sub("", text)
        return text

    def _messages(self, turns: Sequence[Turn], grids: Sequence[Grid]) -> list[dict[str, Any]]:
        messages = []
        for turn in turns:
            messages.append({"role": "user", "content": self.clean(turn.user)})
            messages.append({"role": "assistant", "content": self.clean(turn.assistant)})
        if messages:
            messages[0]["content"] = self.image_text(grids) + messages[0]["content"]
        return messages

    def _render(self, messages: list[dict[str, Any]], generation: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )

    def _tokenise(self, text: str, **options: Any) -> Any:
        """Ids of rendered text: its template has written every special token it needs."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)

    def _answer_spans(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Character spans [start, end) of the answers with the end mark the template gives them."""
        spans = []
        for answer in range(1, len(messages), 2):
            before = self._render(messages[:answer], generation=True)
            after = self._render(messages[: answer + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template rewrites earlier turns when a conversation goes on, so the "
                    "answers cannot be located in it: use another template"
                )
            spans.append((len(before), len(after)))
        return spans

    # ids -------------------------------------------------------------------------------------

    def encode(self, turns: Sequence[Turn], tile_grids: Sequence[Grid] = ()) -> Document:
        """Tokenise a conversation; `tile_grids` holds the (rows, cols) of each picture.

        A token is supervised when it ends inside an answer or its end mark. Raises ValueError when
        there is no turn or the template is unsuitable.
        """
        if not turns:
            raise ValueError("a document needs at least one turn")
        messages = self._messages(turns, tile_grids)
        text = self._render(messages)
        coded = self._tokenise(text, return_offsets_mapping=True)
        ids = np.asarray(coded["input_ids"], dtype=np.int32)
        ends = np.asarray(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1]
        target = np.zeros(len(ids), dtype=bool)
        for start, end in self._answer_spans(messages, text):
            target |= (ends > start) & (ends <= end)
        self._check_image_tokens(ids, tile_grids)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        labels[:-1][target[1:]] = ids[1:][target[1:]]
        return Document(ids, labels)

    def _check_image_tokens(self, ids: np.ndarray, grids: Sequence[Grid]) -> None:
        found = int((ids == self.image_token_id).sum())
        wanted = sum(self.images.tiles(grid) for grid in grids) * self.images.tokens_per_tile
        if found != wanted:
            raise ValueError(
                f"{found} image tokens after tokenising instead of {wanted}: the chat template or "
                "the tokenizer changes the image text"
            )

    def prompt(
        self, turns_so_far: Sequence[Turn], question: str, grids: Sequence[Grid] = ()
    ) -> np.ndarray:
        """Ids (int32 [n]) of a conversation up to where the next answer is to be generated."""
        messages = self._messages([*turns_so_far, Turn(question, "")], grids)[:-1]
        text = self._render(messages, generation=True)
        return np.asarray(self._tokenise(text)["input_ids"], dtype=np.int32)

    @property
    def answer_prefix(self) -> str:
        """What the template writes between the generation prompt and an answer."""
        return ""

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens at which an answer ends."""
        return [self.tokenizer.eos_token_id]

    # pictures --------------------------------------------------------------------------------

    def load_image(self, data: bytes) -> Image.Image:
        """Decode to RGB; raises BadImage for a broken picture or a decompression bomb."""
        return open_image(data)

    def tiles(self, image: Image.Image) -> tuple[torch.Tensor, Grid]:
        """(float32 [tiles, 3, S, S] in [0, 1], (rows, cols)); untiled: one tile, (1, 1)."""
        return cut_tiles(image, self.images)

    # identity --------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> dict[str, str]:
        """SHA-256 of what ids depend on, part by part, so that an error can say what differs."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # Callers switch padding and truncation, and max_images only selects samples: no ids change.
        vocabulary = {k: v for k, v in backend.items() if k not in ("padding", "truncation")}
        return {
            "tokenizer": _sha(vocabulary),
            "chat template": _sha(self.tokenizer.chat_template),
            "image tokens": _sha(asdict(self.tokens)),
            "image settings": _sha(
                {k: v for k, v in asdict(self.images).items() if k != "max_images"}
            ),
        }

    def fingerprint(self) -> str:
        """SHA-256 over tokenizer, template and image settings; shards carry it."""
        return _sha(self.parts)


def _sha(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
