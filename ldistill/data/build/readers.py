"""From one record of a public data set to one Sample, or one Drop that says why not.

| layout | fields |
|---|---|
| The Cauldron, FineVision | `images`, `texts` of {user, assistant}; FineVision rates every turn |
| LLaVA, ShareGPT | `image` or `images`, `conversations` of {from, value} |
| chat | `images`, `messages` of {role, content}; content is text or a list of typed parts |
| pairs | `prompt` and `response` or `completion`, `user` and `assistant`, and the like |

`<image>` in a question of the last three, or a part of type `image`, is where a picture stands. A
`Reader` is a small picklable object that runs in the workers of a build: it returns one Sample or
one Drop, after a Drop for each turn left out.

    items = Reader("docvqa")(0, {"images": [{"bytes": ..., "path": None}], "texts": [...]})
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldistill.common.samples import BadImage, Drop, Sample, Turn

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
IMAGE_MARK = "<image>"
ROLES = dict.fromkeys(("user", "human", "prompter"), "user") | {"system": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("user", "assistant"),
    ("question", "answer"),
    ("instruction", "output"),
)

EMPTY_ANSWER = "empty answer"
LOW_RATING = "rating below the minimum"
LONE_TURN = "question or answer alone"
NO_TEXT = "turn without text"
MALFORMED = "malformed record"
MISSING_IMAGE = "missing image"
OTHER_MARKS = "other number of image marks than pictures"

Record = Mapping[str, Any]
Items = list[Sample | Drop]
ALONE = ...
"""Stands for the missing half of a question or answer at a conversation's end."""


@dataclass(frozen=True)
class Reader:
    """Reads the records of one source, whatever their layout.

    `root` is the folder that image paths start from. `minimum` maps FineVision's rating names to
    the lowest value that is kept; a turn without a rating is kept.
    """

    source: str
    root: str = ""
    minimum: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, row: int, record: Record) -> Items:
        name = str(row)
        left_out: list[Drop] = []
        try:
            rows = "texts" in record  # of The Cauldron: no ids, and the text has no marks
            name = name if rows else str(record.get("id", row))
            system, pairs = _pairs(record)
            asked = [_pieces(question, marked=not rows) for question, _ in pairs]
            pictures = _pictures(record, [ref for _, named in asked for ref in named])
            kept: list[Turn] = []
            shown: list[Any] = []
            waiting: list[Any] = []  # pictures of turns left out, for the next that is kept
            for number, ((pieces, named), (_, answer)) in enumerate(zip(asked, pairs, strict=True)):
                waiting += [next(pictures) if ref is None else ref for ref in named]
                problem, answer = self._problem(record, number, pieces, answer)
                if problem:
                    left_out.append(Drop(problem, name, "turn"))
                    continue
                text, places = _placed(pieces)
                kept.append(Turn(text, answer, (0,) * (len(waiting) - len(places)) + places))
                shown += waiting
                waiting = []
            if not kept:
                reasons = {drop.reason for drop in left_out}
                return [*left_out, Drop(reasons.pop() if len(reasons) == 1 else "no turns", name)]
            if not any(turn.images for turn in kept[1:]) and not any(kept[0].images):
                kept[0] = Turn(kept[0].user, kept[0].assistant)  # all in front, as by default
            files = tuple(_file(image, self.root) for image in [*shown, *pictures])
            return [*left_out, Sample(name, self.source, tuple(kept), files, system)]
        except BadImage as error:
            return [*left_out, Drop(error.reason, name, detail=error.detail)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            detail = f"{type(error).__name__}: {error}"
            if not isinstance(record, Mapping):
                detail = f"no object: {str(record)[:60]!r}"
            return [Drop(MALFORMED, name, detail=detail)]

    def _problem(
        self, record: Record, number: int, pieces: list[str] | None, answer: Any
    ) -> tuple[str | None, str]:
        """Why a turn is left out, if it is, and the text of its answer."""
        for name, least in self.minimum.items():
            ratings = record.get(f"{name}_ratings") or []
            if number < len(ratings) and ratings[number] is not None and ratings[number] < least:
                return LOW_RATING, ""
        if pieces is ALONE or answer is ALONE:
            return LONE_TURN, ""
        text = _text(answer)
        if pieces is None or text is None:
            return NO_TEXT, ""
        return (None if text.strip() else EMPTY_ANSWER), text


def _pairs(record: Record) -> tuple[str, list[tuple[Any, Any]]]:
    """The system turn's text, and questions with answers; `ALONE` for one missing at an end."""
    if "texts" in record:
        return "", [(text["user"], text["assistant"]) for text in record["texts"]]
    said = _said(record)
    system = [record["system"]] if record.get("system") else []
    while said and said[0][0] == "system":
        system.append(_text(said.pop(0)[1]) or "")
    if said and said[0][0] == "assistant":
        said.insert(0, ("user", ALONE))
    if said and said[-1][0] == "user":
        said.append(("assistant", ALONE))
    roles = [role for role, _ in said]
    if roles != ["user", "assistant"] * (len(said) // 2):
        raise ValueError(f"roles {', '.join(map(str, roles))}: not user and assistant in turn")
    contents = [content for _, content in said]
    return "\n".join(system), list(zip(contents[::2], contents[1::2], strict=True))


def _said(record: Record) -> list[tuple[str, Any]]:
    """(role, content) of every message."""
    lists = (record.get(name) for name in ("conversations", "messages"))
    listed = next((found for found in lists if found is not None), None)
    for question, answer in PAIRS if listed is None else ():
        if question in record and answer in record:
            asked, said = record[question], record[answer]
            if isinstance(asked, list):  # TRL's prompt and completion: messages themselves
                listed = [*asked, *said]
                break
            if question == "instruction" and record.get("input"):
                asked = f"{asked}\n{record['input']}"
            return [("user", asked), ("assistant", said)]
    if listed is None:
        raise ValueError(f"fields {', '.join(map(str, record))}: no known layout")
    said = []
    for message in listed:
        role = message["from"] if "from" in message else message["role"]
        said.append((ROLES.get(role, role), message["value" if "value" in message else "content"]))
    return said


def _text(content: Any) -> str | None:
    """Text of a content; a number is text, the text parts of a list are joined."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    if not isinstance(content, int | float):
        raise TypeError(f"{type(content).__name__} instead of text")
    return json.dumps(content)


def _pieces(content: Any, marked: bool) -> tuple[Any, list[Any]]:
    """Text between the pictures of a question, and what each picture's part names.

    None in place of a name stands for the next of the record's pictures.
    """
    if content is ALONE:
        return ALONE, []
    if isinstance(content, list):
        pieces, named = [""], []
        for part in content:
            if "image" in part["type"]:
                image = part.get("image") or part.get("image_url") or part.get("path")
                named.append(image.get("url", image) if isinstance(image, Mapping) else image)
                pieces.append("")
            else:
                pieces[-1] += part["text"]
        return pieces, named
    text = _text(content)
    if text is None:
        return None, []
    pieces = text.split(IMAGE_MARK) if marked else [text]
    return pieces, [None] * (len(pieces) - 1)


def _placed(pieces: list[str]) -> tuple[str, tuple[int, ...]]:
    """A question's text, without the blanks around it and its pictures, and where those stand."""
    if len(pieces) == 1:
        return pieces[0], ()
    text, places = pieces[0].lstrip(), []
    for piece in [*pieces[1:-1], pieces[-1].rstrip()]:
        places.append(len(text))
        text += piece if text else piece.lstrip()
    return text, tuple(places)


def _pictures(record: Record, named: list[Any]) -> Iterator[Any]:
    """The record's own pictures, as many as marks ask for. Raises BadImage."""
    found = record.get("images") or record.get("image") or []
    found = [found] if isinstance(found, str | bytes | Mapping) else list(found)
    asked = sum(ref is None for ref in named)
    if named and asked != len(found):
        reason = OTHER_MARKS if found else MISSING_IMAGE
        raise BadImage(reason, f"{asked} places for pictures, {len(found)} pictures")
    return iter(found)


def _file(image: Any, root: str) -> bytes:
    """Bytes of a picture given as bytes, by path, or in a data URI. Raises BadImage."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    try:
        if isinstance(image, str) and image.startswith("data:"):
            return base64.b64decode(image.partition(",")[2], validate=True)
        return image if isinstance(image, bytes) and image else Path(root, image).read_bytes()
    except (OSError, ValueError, TypeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise BadImage(MISSING_IMAGE, f"{str(image)[:200]}: {problem}") from error
