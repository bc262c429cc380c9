"""From one record of a public data set to one Sample, or one Drop that says why not.

The Cauldron and FineVision keep rows of `images` and `texts`; FineVision adds quality ratings per
turn. LLaVA JSON keeps a path and a list of messages. Each reader is a small picklable object:
`reader(row_number, record)` runs in the workers of a build and returns one Sample or one Drop,
after a Drop for each turn left out.

    items = Cauldron("docvqa")(0, {"images": [{"bytes": ..., "path": None}], "texts": [...]})
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldistill.common.samples import BadImage, Drop, Sample, Turn

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
IMAGE_MARK = "<image>"

EMPTY_ANSWER = "empty answer"
LOW_RATING = "rating below the minimum"
MALFORMED = "malformed record"
MISSING_IMAGE = "missing image"

Record = Mapping[str, Any]
Items = list[Sample | Drop]


@dataclass(frozen=True)
class Cauldron:
    """The Cauldron: `images`, and `texts` of {user, assistant, source}.

    The source id is the config's name: the nested `source` holds display names.
    """

    source: str

    def __call__(self, row: int, record: Record) -> Items:
        return assemble(self.source, str(row), lambda: self.turns(record), lambda: images(record))

    def turns(self, record: Record) -> Iterator[Turn | str]:
        """Each turn, or the reason for leaving it out."""
        for text in record["texts"]:
            yield Turn(text["user"], text["assistant"])


@dataclass(frozen=True)
class FineVision(Cauldron):
    """FineVision: The Cauldron's columns and `<name>_ratings`, one rating per turn.

    `minimum` maps rating names to the lowest value that is kept; a turn without a rating is kept.
    """

    minimum: Mapping[str, int] = field(default_factory=dict)

    def turns(self, record: Record) -> Iterator[Turn | str]:
        """Each turn, or the reason for leaving it out."""
        for number, turn in enumerate(super().turns(record)):
            yield turn if self._good(record, number) else LOW_RATING

    def _good(self, record: Record, number: int) -> bool:
        for name, least in self.minimum.items():
            ratings = record.get(f"{name}_ratings") or []
            if number < len(ratings) and ratings[number] is not None and ratings[number] < least:
                return False
        return True


@dataclass(frozen=True)
class LlavaJson:
    """LLaVA JSON: {id, image, conversations: [{from: human|gpt, value}]}; no image: text only.

    `root` is the folder that image paths start from; `image` may be a list of paths.
    """

    source: str
    root: str

    def __call__(self, row: int, record: Record) -> Items:
        name = str(record.get("id", row)) if isinstance(record, Mapping) else str(row)
        return assemble(self.source, name, lambda: self.turns(record), lambda: self.images(record))

    def turns(self, record: Record) -> Iterator[Turn | str]:
        """Each turn. Raises ValueError unless human and gpt alternate."""
        messages = record["conversations"]
        roles = [message["from"] for message in messages]
        if roles != ["human", "gpt"] * (len(messages) // 2):
            raise ValueError(f"roles {roles} instead of human and gpt in turn")
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            text = question["value"]
            marked = IMAGE_MARK in text
            yield Turn(text.replace(IMAGE_MARK, "").strip() if marked else text, answer["value"])

    def images(self, record: Record) -> tuple[bytes, ...]:
        """The files of the record's pictures. Raises BadImage."""
        named = record.get("image") or []
        paths = [named] if isinstance(named, str) else list(named)
        if not paths and any(IMAGE_MARK in m["value"] for m in record["conversations"]):
            raise BadImage(MISSING_IMAGE, f"{IMAGE_MARK} in the text, but no image named")
        return tuple(read_file(Path(self.root) / path) for path in paths)


def assemble(
    source: str,
    name: str,
    turns: Callable[[], Iterator[Turn | str]],
    pictures: Callable[[], tuple[bytes, ...]],
) -> Items:
    """One Sample or Drop from the (lazy) turns and pictures of a record, and drops of turns."""
    left_out: list[Drop] = []
    kept: list[Turn] = []
    try:
        for turn in turns():
            problem = turn if isinstance(turn, str) else _problem(turn)
            if problem:
                left_out.append(Drop(problem, name, unit="turn"))
            else:
                kept.append(turn)
        if not kept:
            reasons = {drop.reason for drop in left_out}
            return [*left_out, Drop(reasons.pop() if len(reasons) == 1 else "no turns", name)]
        return [*left_out, Sample(name, source, tuple(kept), pictures())]
    except BadImage as error:
        return [*left_out, Drop(error.reason, name)]
    except (KeyError, TypeError, ValueError, AttributeError):
        return [Drop(MALFORMED, name)]


def _problem(turn: Turn) -> str | None:
    if not isinstance(turn.user, str) or not isinstance(turn.assistant, str):
        raise TypeError("a turn without text")
    return None if turn.assistant.strip() else EMPTY_ANSWER


def images(record: Record) -> tuple[bytes, ...]:
    """Pictures of a row of The Cauldron or FineVision. Raises BadImage."""
    return tuple(_image_bytes(image) for image in record.get("images") or [])


def _image_bytes(image: Mapping[str, Any] | None) -> bytes:
    if image and image.get("bytes"):
        return image["bytes"]
    if image and image.get("path"):
        return read_file(Path(image["path"]))
    raise BadImage(MISSING_IMAGE, "neither bytes nor a path")


def read_file(path: Path) -> bytes:
    """Bytes of a picture file. Raises BadImage when it is not there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(MISSING_IMAGE, str(error)) from error


def check_ratings(minimum: Mapping[str, int]) -> dict[str, int]:
    """The minimum ratings, or ValueError for a name that FineVision does not rate."""
    for name in minimum:
        if name not in RATINGS:
            raise ValueError(f"unknown rating {name!r}: known are {', '.join(RATINGS)}")
    return dict(minimum)


def detect_format(columns: Iterable[str]) -> str:
    """ "finevision" or "cauldron" by the columns; ValueError when it is neither."""
    names = set(columns)
    if not {"images", "texts"} <= names:
        raise ValueError(
            f"columns {', '.join(sorted(names))}: expected images and texts, as in The Cauldron "
            "and FineVision"
        )
    return "finevision" if any(f"{name}_ratings" in names for name in RATINGS) else "cauldron"
