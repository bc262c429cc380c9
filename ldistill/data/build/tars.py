"""WebDataset tars of others as input: CC12M, DataComp, Energon's crude layout.

    for row, sample in tar_rows([Path("cc12m/00000.tar")], 0): TarReader("cc12m")(row, sample)

Neighbours whose names are alike up to the first dot are a sample: pictures, and a conversation or
pair in `json`, or a caption in `txt` or as the `json`'s `caption` or `text`. A caption answers
`CAPTION_PROMPT`. Nothing is unpacked, and no pickled member is read: its sample is dropped.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from ldistill.common.samples import Drop
from ldistill.data.build.build_types import InputError
from ldistill.data.build.readers import MALFORMED, MISSING_IMAGE, PAIRS, Items, Reader

CAPTION_PROMPT = "Describe the picture."
PICKLED = "pickled member, never read"
PICKLES = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})
IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
TEXTS = frozenset({"json", "txt"})
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")

Members = dict[str, bytes]
"""``{what follows a name's first dot, in lower case: content}``; content only of what is used."""


def tar_rows(files: Sequence[Path], start: int) -> Iterator[tuple[int, tuple[str, Members]]]:
    """(number, (key, members)) of the samples from `start` on, tar after tar. Raises InputError."""
    row = 0
    for file in files:
        try:
            with tarfile.open(file) as tar:
                named = ((_NAME.fullmatch(info.name), info) for info in tar if info.isfile())
                named = ((match, info) for match, info in named if match)
                for key, group in groupby(named, lambda pair: pair[0][1]):
                    members = {match[2].lower(): info for match, info in group}
                    if row >= start:
                        yield (
                            row,
                            (key, {name: _read(tar, name, members[name]) for name in members}),
                        )
                    row += 1
                tar.fileobj.seek(tar.offset)  # to `tarfile` a cut header is an end like any other
                if len(tar.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                    raise EOFError("it has no end")
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{file} cannot be read on after sample {row} ({error}): fetch it again or leave "
                "it out; finished shards are kept"
            ) from error


def _read(tar: tarfile.TarFile, name: str, info: tarfile.TarInfo) -> bytes:
    used = name.rpartition(".")[2] in IMAGES | TEXTS
    return tar.extractfile(info).read() if used else b""  # type: ignore[union-attr]


@dataclass(frozen=True)
class TarReader:
    """Reads the samples of tars to one Sample or Drop, as `Reader` does with records."""

    source: str

    def __call__(self, row: int, sample: tuple[str, Members]) -> Items:
        key, members = sample
        if pickles := sorted(name for name in members if name.rpartition(".")[2] in PICKLES):
            return [Drop(PICKLED, key, detail=", ".join(pickles))]
        pictures = {n: data for n, data in members.items() if n.rpartition(".")[2] in IMAGES}
        try:
            record = _record(members)
            if "caption" in record and not pictures:
                return [Drop(MISSING_IMAGE, key, detail="a caption alone")]
            record = {"id": key} | _with_pictures(record, PurePosixPath(key).name, pictures)
        except (ValueError, TypeError, AttributeError) as error:
            return [Drop(MALFORMED, key, detail=f"{type(error).__name__}: {error}")]
        return Reader(self.source)(row, record)


def _record(members: Members) -> dict[str, Any]:
    """What is said in a sample, as a record of a known layout. Raises ValueError."""
    record = json.loads(members["json"]) if "json" in members else {}
    if isinstance(record, list):
        return {"conversations": record}
    layouts = ({"texts"}, {"conversations"}, {"messages"}, *map(set, PAIRS))
    if any(layout <= record.keys() for layout in layouts):
        return record
    told = (
        members["txt"].decode() if "txt" in members else record.get("caption", record.get("text"))
    )
    if told is None:
        raise ValueError(f"members {', '.join(members)}: no caption and no conversation")
    return {"prompt": CAPTION_PROMPT, "response": told, "caption": told}


def _with_pictures(record: dict[str, Any], stem: str, pictures: Members) -> dict[str, Any]:
    """The record with the tar's pictures: those that a part names there, the others in order.

    A file outside of the tar is never looked for, whatever the record names.
    """
    left = dict(pictures)

    def inside(part: Any) -> Any:
        if not isinstance(part, dict) or "image" not in str(part.get("type")):
            return part
        named = part.get("image") or part.get("image_url") or part.get("path")
        named = named.get("url") if isinstance(named, dict) else named
        if isinstance(named, str) and named.startswith("data:"):
            return part
        name = PurePosixPath(str(named)).name.lower().removeprefix(f"{stem.lower()}.")
        own = {"image": {"bytes": left.pop(name)}} if name in left else {}
        return {"type": "image"} | own

    def said(message: Any) -> Any:
        parts = message.get("content")
        return (
            message | {"content": list(map(inside, parts))} if isinstance(parts, list) else message
        )

    record = {k: v for k, v in record.items() if k != "image"}
    for name in ("messages", "conversations", "prompt", "completion"):
        if isinstance(record.get(name), list):
            record[name] = [said(message) for message in record[name]]
    return record | {"images": list(left.values())}
