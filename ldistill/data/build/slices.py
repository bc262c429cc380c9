"""Building a source in slices, on any number of machines, and joining them to the same bytes.

    build_slice(inputs, "shards/", processor, options, Slice(2, 8))    # each machine its own
    join_slices("shards/")                                             # once, when all are built

A slice is a resumable build of its own, over a range of the input's rows, in
`{out}/.slices/{number}-of-{count}/{source}`. Where a shard ends depends on every row before it, so
joining copies the finished samples, in order, into shards cut anew: no picture is opened, nothing
is tokenised, and what comes out is what one machine would have built.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from ldistill.common.samples import Processor
from ldistill.data.archive import INDEX_NAME, SAMPLES_NAME, hash_file, read_range
from ldistill.data.build.build_types import Advance, BuildOptions, SourceInput, SourceReport
from ldistill.data.build.builder import SourceWriter, build, check_room
from ldistill.data.build.state import Counts
from ldistill.data.build.workers import Prepared
from ldistill.data.store import SLICES_NAME

KEY = "slice"
SPEC = ("format", "source", "category", "input", "options", "processor", "max_images")
ABOUT = ("processor_parts", "image_settings", "origin")


@dataclass(frozen=True)
class Slice:
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """The slice that `2/8` means. Raises ValueError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.number <= part.count:
            raise ValueError(f"bad slice {text!r}: write it like 2/8, from 1/8 to 8/8")
        return part

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.number:04d}-of-{self.count:04d}"

    def of(self, entry: SourceInput) -> SourceInput:
        """The rows of an input that belong to this slice."""
        assert entry.rows_end is not None
        first = (self.number - 1) * entry.rows_end // self.count
        end = self.number * entry.rows_end // self.count
        last = self.number == self.count  # whatever lies beyond the number of rows promised

        def rows(start: int) -> Iterator[tuple[int, Any]]:
            stream = entry.rows(max(start, first))
            return stream if last else takewhile(lambda item: item[0] < end, stream)

        return replace(
            entry,
            rows=rows,
            identity={**entry.identity, KEY: [self.number, self.count]},
            length=None if entry.length is None else entry.length // self.count,
            bytes=entry.bytes // self.count,
            may_be_empty=True,
        )


def build_slice(
    inputs: Iterable[SourceInput],
    out: str | Path,
    processor: Processor,
    options: BuildOptions,
    part: Slice,
    advance: Advance = lambda source, rows: None,
) -> list[SourceReport]:
    """Build one slice of every source; what `build` raises, and ValueError where it cannot be cut.

    A source that has been joined already is left as it is, if it is of the same input.
    """
    out, whole, slices = Path(out), [], []
    for entry in inputs:
        countable = entry.rows_end is not None and entry.identity
        if not countable or options.max_samples is not None:
            raise ValueError(
                f"{entry.source} cannot be cut into slices: "
                + (
                    "--max-samples counts from the first row on. Leave it or the slice out"
                    if countable
                    else "its input does not say how many rows it has. Build it in one piece, or "
                    "download it and build from the files"
                )
            )
        joined = (out / entry.source / INDEX_NAME).exists() and not options.overwrite
        (whole if joined else slices).append(entry if joined else part.of(entry))
    places = ((whole, out), (slices, out / SLICES_NAME / part.name))
    reports = [build(some, at, processor, options, advance) for some, at in places if some]
    return [report for some in reports for report in some]


def join_slices(
    out: str | Path, sources: Sequence[str] | None = None, *, overwrite: bool = False
) -> list[SourceReport]:
    """Join the slices of every source, or of those named; nothing to do where it has been done.

    Raises ValueError for slices that are missing, damaged or of different inputs,
    FileNotFoundError where there is nothing at all, OSError when the disk is full.
    """
    out = Path(out)
    found = sorted({p.parent.name for p in (out / SLICES_NAME).glob(f"*/*/{INDEX_NAME}")})
    wanted = found if sources is None else list(sources)
    built = {path.parent.name for path in out.glob(f"*/{INDEX_NAME}")}
    absent = [name for name in wanted if name not in found and name not in built]
    if absent or not (wanted or built):
        raise FileNotFoundError(
            f"no slices{' of ' if absent else ''}{', '.join(absent)} in {out}: build some with "
            "`ldistill shards build ... --slice 1/8`"
        )
    return [_join(name, out, overwrite) for name in wanted if name in found]


def _join(source: str, out: Path, overwrite: bool) -> SourceReport:
    folders = _find_slices(out, source)
    metas = [_read_slice(folder) for folder in folders]
    specs = [_whole_spec(meta) for meta in metas]
    if odd := [folder for folder, spec in zip(folders, specs, strict=True) if spec != specs[0]]:
        raise ValueError(
            f"{odd[0]} is of another input or other options than {folders[0]}: build it again "
            "with --overwrite"
        )

    def stored(done: Counts) -> Iterator[Prepared]:
        for folder, meta in zip(folders, metas, strict=True):
            yield from _stored(folder, meta, done.next_row)

    about = {name: metas[0][name] for name in ABOUT}
    writer = SourceWriter(out / source, specs[0], about, overwrite)
    if not writer.built:
        check_room(out, sum(shard["bytes"] for meta in metas for shard in meta["shards"]))
    lost = {n: sum((Counter(m[n]) for m in metas), Counter()) for n in ("drops", "turn_drops")}
    lost["first_drops"] = dict(
        item for meta in reversed(metas) for item in meta.get("first_drops", {}).items()
    )
    report = writer.run(stored, lost=lost)
    for folder in folders:
        shutil.rmtree(folder)
        for parent in (folder.parent, folder.parent.parent):
            if not any(parent.iterdir()):
                parent.rmdir()
    return report


def _stored(folder: Path, meta: dict[str, Any], start: int) -> Iterator[Prepared]:
    """The finished samples of a slice from row `start` on."""
    samples = np.load(folder / SAMPLES_NAME, mmap_mode="r")
    for record in samples[np.searchsorted(samples["row"], start) :]:
        path = folder / meta["shards"][record["shard"]]["url"]
        block = read_range(str(path), int(record["offset"]), int(record["size"]))
        _check_unchanged(path, zlib.crc32(block) == record["crc32"])
        sizes = {name: int(record[name]) for name in ("tokens", "supervised", "prompt", "tiles")}
        yield Prepared(int(record["row"]), block, **sizes)


def _find_slices(out: Path, source: str) -> list[Path]:
    """Folders of a source's slices, in order. Raises ValueError when one is missing."""
    indices = (out / SLICES_NAME).glob(f"*-of-*/{source}/{INDEX_NAME}")
    found = {path.parents[1].name: path.parent for path in indices}
    counts = sorted({int(name.partition("-of-")[2]) for name in found})
    names = [Slice(number, counts[-1]).name for number in range(1, counts[-1] + 1)]
    missing = [str(n) for n, name in enumerate(names, start=1) if name not in found]
    if len(counts) > 1:
        problem = (
            f"of different builds in {out / SLICES_NAME} (of "
            f"{' and of '.join(map(str, counts))}): remove those not meant"
        )
    else:
        problem = f"that are not built, {', '.join(missing)} of {counts[0]}: run `ldistill shards "
        problem += f"build ... --slice {missing[0]}/{counts[0]}` to its end" if missing else ""
    if len(counts) > 1 or missing:
        raise ValueError(f"{source} has slices {problem}")
    return [found[name] for name in names]


def _read_slice(folder: Path) -> dict[str, Any]:
    meta, table = json.loads((folder / INDEX_NAME).read_text()), folder / SAMPLES_NAME
    _check_unchanged(table, hash_file(table) == meta["samples_sha256"])
    return meta


def _check_unchanged(path: Path, unchanged: bool) -> None:
    if not unchanged:
        number, _, count = path.parents[1].name.partition("-of-")
        raise ValueError(
            f"{path} changed since it was built: build it again with --slice "
            f"{int(number)}/{int(count)} --overwrite"
        )


def _whole_spec(meta: dict[str, Any]) -> dict[str, Any]:
    """What the bytes of the whole source depend on."""
    spec = {key: meta[key] for key in SPEC}
    return spec | {"input": {k: v for k, v in spec["input"].items() if k != KEY}}
