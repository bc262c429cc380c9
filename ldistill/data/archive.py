"""One sample as a run of bytes inside a WebDataset tar: writing it, reading it back.

A shard is a plain tar that stock `webdataset` reads. All members of a sample lie side by side, so
one range read (`read_range`) fetches a sample whole, and its CRC-32 is checked before anything is
parsed. Owner, mode and time are constants: the same sample always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ldistill.common.samples import Sample, Turn

T = TypeVar("T")
INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.npy"
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
PAUSES = (0.1, 1.0)
"""Seconds before a read that failed is tried again; after the last, the sample is unreadable."""
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # number of the shard within its source
        ("offset", "<u8"),  # where the sample's members start in the tar
        ("size", "<u8"),  # bytes of the members, headers and padding included
        ("crc32", "<u4"),  # over those bytes
        ("row", "<u8"),  # row of the input; the key is {source}-{row:09d}
        ("tokens", "<u4"),  # length of the document, image tokens included
        ("supervised", "<u4"),  # positions that carry a label
        ("prompt", "<u4"),  # positions before the first that carries a label
        ("tiles", "<u2"),  # image tokens of all pictures, in the student's `tokens_per_tile`
    ]
)
MOST_TILES = int(np.iinfo(np.uint16).max)


class BadSample(ValueError):
    """A stored sample that cannot be used. `reason` is what drops are counted under."""

    def __init__(self, reason: str, shard: str, key: str, detail: str = "") -> None:
        super().__init__(f"sample {key} in {shard}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.shard, self.key, self.detail = reason, shard, key, detail

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.shard, self.key, self.detail)


def sample_key(source: str, row: int) -> str:
    """Name shared by the members of a sample."""
    return f"{source}-{row:09d}"


def pack_sample(key: str, sample: Sample, described: list[dict[str, int | str]]) -> bytes:
    """Tar members of a sample; `described` holds {width, height, format} of each picture."""
    record: dict[str, object] = {"id": sample.id, "source": sample.source}
    if sample.system:
        record["system"] = sample.system
    record["turns"] = [
        {"user": turn.user, "assistant": turn.assistant}
        | ({"images": list(turn.images)} if turn.images else {})
        for turn in sample.turns
    ]
    if len(described) == 1:
        record["image"] = described[0]
    elif described:
        record["images"] = described
    members = []
    for number, (image, data) in enumerate(zip(described, sample.images, strict=True), start=1):
        place = f"{number}." if len(described) > 1 else ""
        members.append((f"{key}.{place}{image['format']}", data))
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    members.append((f"{key}.json", text.encode()))
    return b"".join(_member(name, data) for name, data in members)


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header + data + bytes(-len(data) % BLOCK)


def unpack_sample(raw: bytes, shard: str, key: str) -> Sample:
    """The sample of `pack_sample`'s bytes. Raises BadSample for anything unexpected in them."""
    reason = "unreadable sample"
    try:
        members = _members(raw)
        record = json.loads(members[f"{key}.json"])
        turns = tuple(
            Turn(turn["user"], turn["assistant"], tuple(turn.get("images", ())))
            for turn in record["turns"]
        )
        described = record.get("images", [record["image"]] if "image" in record else [])
        places = [f"{n}." if len(described) > 1 else "" for n in range(1, len(described) + 1)]
        names = [f"{key}.{n}{d['format']}" for n, d in zip(places, described, strict=True)]
        head, reason = (record["id"], record["source"], turns), "missing image"
        return Sample(*head, tuple(members[name] for name in names), record.get("system", ""))
    except (KeyError, TypeError, ValueError) as error:
        raise BadSample(reason, shard, key, repr(error)) from error


def _members(raw: bytes) -> dict[str, bytes]:
    """{name: content} of a run of tar members as `_member` writes them.

    `tarfile` does the same in a tenfold of the time, which every sample would pay.
    """
    members, place = {}, 0
    while place < len(raw):
        header = raw[place : place + BLOCK]
        start, size = place + BLOCK, int(header[124:136].rstrip(b"\0 "), 8)
        members[header[:100].rstrip(b"\0").decode()] = raw[start : start + size]
        place = start + size + -size % BLOCK
    return members


@dataclass(frozen=True)
class ShardFile:
    """A finished shard as its source's index lists it; `url` is relative to the index."""

    url: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A shard of an index: path or URL, its source's number, its first sample's global number."""

    path: str
    source: int
    start: int
    samples: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes one tar beside its final name and renames it when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.samples = 0
        self._sha = hashlib.sha256()
        self._part = path.with_name(path.name + ".part")
        self._file = self._part.open("wb")

    def add(self, block: bytes) -> tuple[int, int, int]:
        """Append a sample's members; returns its (offset, size, crc32)."""
        offset = self.size
        self._write(block)
        self.samples += 1
        return offset, len(block), zlib.crc32(block)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.size += len(data)

    def finish(self) -> ShardFile:
        """Write the end mark, make the file durable and give it its name."""
        self._write(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.path)
        return ShardFile(self.path.name, self.samples, self.size, self._sha.hexdigest())

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self._file.close()
        self._part.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, tried again when it fails.

    An error is waited out, since network storage stumbles now and then; a missing file is not.
    Raises OSError.
    """
    for pause in PAUSES:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`, read `patiently`; fewer at its end. Raises OSError."""
    return patiently(lambda: read_once(path, offset, size))


def read_once(path: str, offset: int, size: int) -> bytes:
    """`read_range` without patience.

    Files are opened anew, which costs little beside decoding a picture, so a shard that was
    replaced is never read through an old descriptor.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return pread_all(descriptor, size, offset)
    finally:
        os.close(descriptor)


def pread_all(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes of an open file from `offset`; fewer at its end. Raises OSError."""
    parts, end = [], offset + size
    while offset < end and (part := os.pread(descriptor, end - offset, offset)):
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_sample(raw: bytes, shard: str, record: np.void, key: str) -> Sample:
    """A sample from its bytes, CRC-32 checked. Raises BadSample naming shard, key and reason."""
    if zlib.crc32(raw) == record["crc32"]:
        return unpack_sample(raw, shard, key)
    reason, detail = "corrupt sample", "its checksum is not the one in the index"
    if len(raw) < record["size"]:
        reason, detail = "truncated shard", f"{len(raw)} of {record['size']} bytes"
    raise BadSample(reason, shard, key, detail)
