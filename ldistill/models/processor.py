"""From turns and pictures to token ids and labels: what the processors of all families share.

The chat template alone decides where an answer starts and ends: it is rendered turn by turn, the
whole text is tokenised once, and character offsets carry the borders over to tokens. So the ids
are those of the tokenizer's own `apply_chat_template`, and any template works whose rendering of a
conversation extends that of its beginning.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldistill.common.errors import refuse
from ldistill.common.images import open_image
from ldistill.common.samples import IGNORE, Document, Pictures, Size, Turn

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

STAND_IN = 0x10_0000
"""The first of the private characters (plane 16) that stand for control tokens in data."""
STAND_INS = re.compile("[\U00100000-\U0010fffd]")


class Processor(ABC):
    """Tokenizer, chat template and pictures of one student.

    Args:
        tokenizer: a fast one of transformers, with a chat template.
        images: a dataclass with at least ``tiling``, ``max_images`` and ``tokens_per_tile``.
        image_token: stands where an embedding of a picture goes.
        literals: tokens that stand for pictures, image_token among them: data holds none.

    Raises:
        ValueError: the tokenizer is slow, or has no chat template.
    """

    answer_prefix = ""
    """What the template writes between the generation prompt and an answer."""
    _end = ""  # put behind answers where the template puts nothing

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: Any,
        image_token: str,
        literals: Set[str],
    ) -> None:
        slow, template = not getattr(tokenizer, "is_fast", False), tokenizer.chat_template
        cases = {
            "the tokenizer must be a fast one: labels need character offsets": slow,
            "the tokenizer has no chat template: set tokenizer.chat_template": not template,
        }
        refuse(cases)
        self.tokenizer, self.images = tokenizer, images
        self.image_token, self.literals = image_token, literals
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else (tokenizer.eos_token_id or 0)
        self.stop_token_ids: list[int] = [tokenizer.eos_token_id]  # at which an answer ends
        self._literal = _any_of(self.literals)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        self._control = [t.content for t in added if t.special or t.content in str(template)]
        self._control_text = _any_of(self._control)

    # what a family has to say ------------------------------------------------------------------

    @abstractmethod
    def picture_texts(self, sizes: Sequence[Size]) -> list[str]:
        """The text that stands for each of a document's pictures. Raises BadImage."""

    @abstractmethod
    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Tensors of a document's RGB pictures, in order; {} of none. Raises BadImage."""

    @abstractmethod
    def _content(self, pieces: Sequence[str | int], shown: Sequence[str]) -> Any:
        """A message's content: texts, and numbers of pictures, the text of each in `shown`."""

    def rotary(self, input_ids: np.ndarray, pictures: Pictures) -> Tensor | None:
        """Rotary positions int64 [axes, n] where the student has several axes; None: they count."""
        return None

    # text --------------------------------------------------------------------------------------

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

    def _messages(
        self, turns: Sequence[Turn], shown: Sequence[str], system: str = ""
    ) -> list[dict[str, Any]]:
        """Messages for the chat template; `shown` is the text of each picture."""
        said: list[tuple[str, list[str | int]]] = []
        if system:
            said.append(("system", [self.plain(system)]))
        for turn, pieces in zip(turns, self._pieces(turns, len(shown)), strict=True):
            said += [("user", pieces), ("assistant", [self.plain(turn.assistant) + self._end])]
        return [{"role": role, "content": self._content(what, shown)} for role, what in said]

    def _pieces(self, turns: Sequence[Turn], pictures: int) -> list[list[str | int]]:
        """Each question as text and the numbers of pictures, in order; text is always last."""
        placed, shown, pieces = any(turn.images for turn in turns), 0, []
        for turn in turns:
            places = turn.images if placed else (0,) * (pictures if not pieces else 0)
            start, question = 0, []
            for place in places:
                question += [self.plain(turn.user[start:place])] if place > start else []
                question.append(shown)
                start, shown = place, shown + 1
            pieces.append([*question, self.plain(turn.user[start:])])
        return pieces

    @cached_property
    def takes_system(self) -> bool:
        """Whether the chat template writes a system turn."""
        try:
            return "be brief" in self._render(self._messages([Turn("q", "a")], [], "be brief"))
        except Exception:  # templates raise by themselves what their language has
            return False

    def _render(self, messages: list[dict[str, Any]], generation: bool = False) -> str:
        how = {"tokenize": False, "add_generation_prompt": generation}
        return self.tokenizer.apply_chat_template(messages, **how)

    def _begins(self, text: str) -> bool:
        """Whether rendered text has every special token that it needs at its start."""
        return True

    def _coded(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32 [n]) of rendered text, and where in it each token ends (int64 [n])."""
        how = {"add_special_tokens": not self._begins(text), "return_offsets_mapping": True}
        coded = self.tokenizer(text, verbose=False, **how)
        ids, spans = coded["input_ids"], coded["offset_mapping"]
        if STAND_INS.search(text):
            ids, spans = zip(*self._as_words(text, ids, spans), strict=True)
        ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2)[:, 1]
        return np.asarray(ids, dtype=np.int32), ends

    def _as_words(self, text: str, ids: list[int], spans: list[tuple[int, int]]) -> Iterator[Any]:
        """Each id and span, for the tokens of a stand-in those of the words behind it."""
        done = 0
        for token, (start, end) in zip(ids, spans, strict=True):
            words = [token]
            if STAND_INS.search(text, start, end):
                words = self._words(text[start:end]) if end > done else []
                done = end
            yield from ((word, (start, end)) for word in words)

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
        for answer in [n for n, m in enumerate(messages) if m["role"] == "assistant"]:
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
        self, turns: Sequence[Turn], sizes: Sequence[Size] = (), system: str = ""
    ) -> Document:
        """Tokenise a conversation; `sizes` holds the (width, height) of each picture.

        A token is supervised when it ends inside an answer or its end mark. Raises ValueError when
        there is no turn or the template is unsuitable, BadImage for a picture that is refused.
        """
        if not turns:
            raise ValueError("a document needs at least one turn")
        shown = self.picture_texts(sizes)
        messages = self._messages(turns, shown, system)
        text = self._render(messages)
        ids, ends = self._coded(text)
        target = np.zeros(len(ids), dtype=bool)
        for start, end in self._answer_spans(messages, text):
            target |= (ends > start) & (ends <= end)
        found = int((ids == self.image_token_id).sum())
        if found != (wanted := sum(text.count(self.image_token) for text in shown)):
            raise ValueError(
                f"{found} image tokens after tokenising instead of {wanted}: the chat template or "
                "the tokenizer changes the image text"
            )
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        labels[:-1][target[1:]] = ids[1:][target[1:]]
        return Document(ids, labels)

    def prompt(
        self, turns_so_far: Sequence[Turn], question: str, sizes: Sequence[Size] = ()
    ) -> np.ndarray:
        """Ids (int32 [n]) of a conversation up to where the next answer is to be generated."""
        shown = self.picture_texts(sizes)
        messages = self._messages([*turns_so_far, Turn(question, "")], shown)[:-1]
        return self._coded(self._render(messages, generation=True))[0]

    load_image = staticmethod(open_image)

    # identity --------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> dict[str, str]:
        """SHA-256 of what ids depend on, part by part, so that an error can say what differs."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # Callers switch padding and truncation: no ids change.
        vocabulary = {k: v for k, v in backend.items() if k not in ("padding", "truncation")}
        parts = {"tokenizer": vocabulary, "chat template": self.tokenizer.chat_template}
        return {name: _sha(value) for name, value in (parts | self._picture_parts()).items()}

    @abstractmethod
    def _picture_parts(self) -> dict[str, object]:
        """What the text of a picture depends on, by name, as JSON knows it."""

    def fingerprint(self) -> str:
        """SHA-256 over tokenizer, template and image settings; shards carry it."""
        return _sha(self.parts)


def check_token(tokenizer: PreTrainedTokenizerBase, token: str, want: int, source: Path) -> None:
    """Refuse a tokenizer that gives one of a student's image tokens another id: ValueError."""
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
