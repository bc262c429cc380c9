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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldistill.common.documents import IGNORE, Document, Grid
from ldistill.common.images import ImageSettings, cut_tiles, open_image
from ldistill.common.samples import Turn

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase

STAND_IN = 0x10_0000
"""The first of the private characters (plane 16) that stand for control tokens in data."""
STAND_INS = re.compile("[\U00100000-\U0010fffd]")


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
        self._literal = _any_of(token for token in self.tokens.all() if token in vocabulary)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        template = str(tokenizer.chat_template)
        self._control = [t.content for t in added if t.special or t.content in template]
        self._control_text = _any_of(self._control)

    def _check_tokenizer(self, vocabulary: Mapping[str, int]) -> None:
        grid, most = self.images.max_side // self.images.tile_size, self.tokens.max_grid
        needed = self.tokens.needed(self.images.tiling)
        missing = [token for token in needed if token not in vocabulary]
        problem = None
        if not vocabulary:
            problem = "the tokenizer must be a fast one: labels need character offsets"
        elif not self.tokenizer.chat_template:
            problem = "the tokenizer has no chat template: set tokenizer.chat_template"
        elif self.images.tiling and grid > most:
            problem = (
                f"max_side {self.images.max_side} gives up to {grid} x {grid} tiles, but tile "
                f"tokens exist for {most} x {most}: lower max_side"
            )
        elif missing:
            problem = (
                f"the tokenizer lacks the image tokens {missing[:4]} ({len(missing)} in all): add "
                "them with extra_special_tokens"
            )
        if problem:
            raise ValueError(problem)

    # text ------------------------------------------------------------------------------------

    def image_text(self, grids: Sequence[Grid]) -> str:
        """The text that stands for the pictures, one after the other."""
        return "".join(self._picture_text(number, grids) for number in range(len(grids)))

    def _picture_text(self, number: int, grids: Sequence[Grid]) -> str:
        text = self.tokens.picture(grids[number], self.images.tokens_per_tile)
        return f"<image: {number}>{text}" if len(grids) > 1 else text

    def clean(self, text: str) -> str:
        """Text without literal image tokens, which would be taken for pictures."""
        while self._literal.search(text):  # cutting one token out may join the halves of another
            text = self._literal.sub("", text)
        return text

    def plain(self, text: str) -> str:
        """Clean text whose control tokens are stand-ins that `_coded` makes plain text again.

        A data set must not be able to write a turn's end: what looks like one is words.
        """
        text = self.clean(text)
        return self._control_text.sub(lambda m: chr(STAND_IN + self._control.index(m[0])), text)

    def _pieces(self, turns: Sequence[Turn], grids: Sequence[Grid]) -> list[list[str | int]]:
        """Each question as text and the numbers of pictures, in order; text is always last."""
        placed, shown, pieces = any(turn.images for turn in turns), 0, []
        for turn in turns:
            places = turn.images if placed else (0,) * (len(grids) if not pieces else 0)
            start, question = 0, []
            for place in places:
                question += [self.plain(turn.user[start:place])] if place > start else []
                question.append(shown)
                start, shown = place, shown + 1
            pieces.append([*question, self.plain(turn.user[start:])])
        return pieces

    def _messages(
        self, turns: Sequence[Turn], grids: Sequence[Grid], system: str = ""
    ) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": self.plain(system)}] if system else []
        for turn, pieces in zip(turns, self._pieces(turns, grids), strict=True):
            asked = [p if isinstance(p, str) else self._picture_text(p, grids) for p in pieces]
            messages.append({"role": "user", "content": "".join(asked)})
            messages.append({"role": "assistant", "content": self.plain(turn.assistant)})
        return messages

    @cached_property
    def takes_system(self) -> bool:
        """Whether the chat template writes a system turn."""
        try:
            return "be brief" in self._render(self._messages([Turn("q", "a")], [], "be brief"))
        except Exception:  # templates raise by themselves what their language has
            return False

    def _render(self, messages: list[dict[str, Any]], generation: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )

    def _tokenise(self, text: str, **options: Any) -> Any:
        """Ids of rendered text: its template has written every special token it needs."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)

    def _coded(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32 [n]) of rendered text, and where in it each token ends (int64 [n])."""
        coded = self._tokenise(text, return_offsets_mapping=True)
        ids, spans = coded["input_ids"], coded["offset_mapping"]
        if STAND_INS.search(text):
            ids, spans = self._as_words(text, ids, spans)
        ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2)[:, 1]
        return np.asarray(ids, dtype=np.int32), ends

    def _as_words(
        self, text: str, ids: list[int], spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of the words behind each stand-in, for the tokens of the stand-in itself."""
        made, places, done = [], [], 0
        for token, (start, end) in zip(ids, spans, strict=True):
            words = [token]
            if STAND_INS.search(text, start, end):
                words = self._words(text[start:end]) if end > done else []
                done = end
            made += words
            places += [(start, end)] * len(words)
        return made, places

    def _words(self, text: str) -> list[int]:
        """Ids of text with stand-ins, as the tokenizer gives to plain words in a line."""
        text = STAND_INS.sub(lambda m: self._control[ord(m[0]) - STAND_IN], text)

        def split(text: str) -> list[int]:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            return self.tokenizer(text, verbose=False, **options)["input_ids"]

        line, before = split("\n" + text), split("\n")  # in a line, no blank is put in front
        ids = line[len(before) :] if line[: len(before)] == before else split(text)
        control = set(self.tokenizer.convert_tokens_to_ids(self._control))
        # Turn marks that a tokenizer does not call special are found even so, unless cut in two.
        return ids if control.isdisjoint(ids) else split(text[:1]) + split(text[1:])

    def _answer_spans(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Character spans [start, end) of the answers with the end mark the template gives them."""
        spans = []
        answers = (n for n, message in enumerate(messages) if message["role"] == "assistant")
        for answer in answers:
            before = self._render(messages[:answer], generation=True)
            last = answer + 1 == len(messages)  # rendered already, which is most of the work
            after = text if last else self._render(messages[: answer + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template rewrites earlier turns when a conversation goes on, so the "
                    "answers cannot be located in it: use another template"
                )
            spans.append((len(before), len(after)))
        return spans

    # ids -------------------------------------------------------------------------------------

    def encode(
        self, turns: Sequence[Turn], tile_grids: Sequence[Grid] = (), system: str = ""
    ) -> Document:
        """Tokenise a conversation; `tile_grids` holds the (rows, cols) of each picture.

        A token is supervised when it ends inside an answer or its end mark. Raises ValueError when
        there is no turn or the template is unsuitable.
        """
        if not turns:
            raise ValueError("a document needs at least one turn")
        messages = self._messages(turns, tile_grids, system)
        text = self._render(messages)
        ids, ends = self._coded(text)
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
        return self._coded(self._render(messages, generation=True))[0]

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


def check_token(tokenizer: PreTrainedTokenizerBase, token: str, want: int, source: Path) -> None:
    """Refuse a tokenizer that gives one of a student's image tokens another id than it expects.

    Raises:
        ValueError: with both ids.
    """
    if (got := tokenizer.convert_tokens_to_ids(token)) != want:
        raise ValueError(
            f"tokenizer {str(source)!r} gives {token} id {got}, the student expects {want}: it is "
            "not the tokenizer this student was trained with."
        )


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the tokens; with none, nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _sha(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
