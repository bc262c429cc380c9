"""What a build of shards is given and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldistill.data.build.workers import Convert

SHARD_BYTES = 256 * 1024 * 1024
FORMATS = ("cauldron", "finevision", "llava", "chat")


@dataclass(frozen=True)
class InputOptions:
    """What to take from an input and how to read it."""

    sources: tuple[str, ...] | None = None
    """Source ids to build, all of which must be there; None takes every source of the input."""
    format: str = "auto"
    split: str = "train"
    extra: Mapping[str, str] = field(default_factory=dict)
    """Categories of sources beyond the 17."""
    min_ratings: Mapping[str, int] = field(default_factory=dict)
    image_root: str | None = None
    """JSON: the folder that image paths start from (default: the file's)."""


@dataclass(frozen=True)
class SourceInput:
    """One source's rows. `rows(start)` yields (number, row) from row `start` on, in fixed order.

    `convert` turns a row into one Sample or Drop, plus drops of single turns; it runs in the
    workers and must be picklable. `identity` says, in JSON, what the rows are: a build resumes
    only on the same, non-empty identity. `length` is for the progress bar, `bytes` for the check
    of the disk. `rows_end` is the number of rows, where known: all row numbers lie below it.
    `origin` is what the input says of itself, for the model card: `dataset`, `licence`, `homepage`.
    """

    source: str
    category: str
    rows: Callable[[int], Iterator[tuple[int, Any]]]
    convert: Convert
    identity: dict[str, Any] = field(default_factory=dict)
    length: int | None = None
    bytes: int = 0
    rows_end: int | None = None
    origin: dict[str, str] = field(default_factory=dict)
    may_be_empty: bool = False


@dataclass(frozen=True)
class BuildOptions:
    """How to cut shards. Everything but `workers` and `overwrite` decides the bytes."""

    split: str = "train"
    shard_bytes: int = SHARD_BYTES
    max_samples: int | None = None
    workers: int = 0
    overwrite: bool = False


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
    first_drops: dict[str, str] = field(default_factory=dict)
    """For each reason of a drop the first record that it met."""


class SourcesFailed(ValueError):
    """Some of several sources could not be built; `reports` are those of the others."""

    def __init__(self, reports: list[SourceReport], failures: Mapping[str, Exception]) -> None:
        lines = [f"{source}: {error}" for source, error in failures.items()]
        super().__init__("\n".join([f"not built: {', '.join(failures)}", *lines]))
        self.reports = reports


class InputError(OSError):
    """An input that cannot be read on."""


Advance = Callable[[SourceInput, int], None]
