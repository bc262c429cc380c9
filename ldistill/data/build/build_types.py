"""What a build of shards is given and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ldistill.data.build.workers import Convert

SHARD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class SourceInput:
    """One source's rows. `rows(start)` yields (number, row) from row `start` on, in fixed order.

    `convert` turns a row into one Sample or Drop, plus drops of single turns; it runs in the
    workers and must be picklable. `identity` says, in JSON, what the rows are: a build resumes
    only on the same, non-empty identity. `length` is for the progress bar, `bytes` for the check
    of the disk. `rows_end` is the number of rows, where known: all row numbers lie below it.
    """

    source: str
    category: str
    rows: Callable[[int], Iterator[tuple[int, Any]]]
    convert: Convert
    identity: dict[str, Any] = field(default_factory=dict)
    length: int | None = None
    bytes: int = 0
    rows_end: int | None = None
    may_be_empty: bool = False


@dataclass(frozen=True)
class BuildOptions:
    """How to cut shards. Everything but `workers` and `overwrite` decides the bytes."""

    split: str = "train"
    shard_bytes: int = SHARD_BYTES
    max_samples: int | None = None
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.shard_bytes < 1 or (self.max_samples is not None and self.max_samples < 1):
            raise ValueError("shard size and max_samples must be positive")
        if not self.split.replace("_", "").isalnum():
            raise ValueError(f"the split {self.split!r} must be letters, digits and underscores")


@dataclass(frozen=True)
class SourceReport:
    """What a build did with a source: samples read = `samples` + the sum of `drops`."""

    source: str
    category: str
    samples: int
    drops: dict[str, int]
    turn_drops: dict[str, int]
    shards: int
    bytes: int
    kept_shards: int
    """Shards that an earlier build had finished."""


Advance = Callable[[SourceInput, int], None]
