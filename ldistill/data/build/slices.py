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

from ldistill.data.archive import hash_file, read_range
from ldistill.data.build.build_types import Advance, BuildOptions, SourceInput, SourceReport
from ldistill.data.build.builder import PLAN_KEYS, SourceBuild, build, check_room
from ldistill.data.build.workers import Convert, Prepared, Workers, keep
from ldistill.data.store import INDEX_NAME, SAMPLES_NAME, SLICES_NAME
from ldistill.models.processor import Processor

KEY = "slice"


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
        """The rows of an input that belong to this slice. Raises ValueError."""
        if entry.rows_end is None or not entry.identity:
            raise ValueError(
                f"{entry.source} cannot be cut into slices: its input does not say how many rows "
                "it has. Build it in one piece, or download it and build from the files"
            )
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
    if options.max_samples is not None:
        raise ValueError("max_samples counts from the first row on: leave it or the slice out")
    out, whole, slices = Path(out), [], []
    for entry in inputs:
        joined = (out / entry.source / INDEX_NAME).exists() and not options.overwrite
        (whole if joined else slices).append(entry if joined else part.of(entry))
    places = ((whole, out), (slices, out / SLICES_NAME / part.name))
    reports = [build(some, at, processor, options, advance) for some, at in places if some]
    return [report for some in reports for report in some]


def join_slices(
    out: str | Path,
    sources: Sequence[str] | None = None,
    *,
    overwrite: bool = False,
    advance: Advance = lambda source, rows: None,
) -> list[SourceReport]:
    """Join the slices of every source, or of those named; nothing to do where it has been done.

    Raises ValueError for slices that are missing, damaged or of different inputs,
    FileNotFoundError where there is nothing at all, OSError when the disk is full.
    """
    out = Path(out)
    found = sorted({p.parent.name for p in (out / SLICES_NAME).glob(f"*/*/{INDEX_NAME}")})
    wanted = found if sources is None else list(sources)
    built = {path.parent.name for path in out.glob(f"*/{INDEX_NAME}")}
    if absent := [name for name in wanted if name not in found and name not in built]:
        raise FileNotFoundError(f"no slices of {', '.join(absent)} in {out}")
    if not wanted and not built:
        raise FileNotFoundError(f"no slices in {out}: build some with `shards build --slice 1/8`")
    joins = [Join(name, out, overwrite, advance) for name in wanted if name in found]
    return [join.run() for join in joins]


class Stored:
    """Stands in for `Workers` where samples are finished already."""

    def map(
        self, rows: Iterable[tuple[int, Any]], convert: Convert, source: str
    ) -> Iterator[Prepared]:
        """The rows themselves: each is a `Prepared`."""
        return (prepared for _, prepared in rows)


class Join(SourceBuild):
    """The build of a source from its slices instead of from its input."""

    workers: Workers | Stored

    def __init__(self, source: str, out: Path, overwrite: bool, advance: Advance) -> None:
        self.slices = find_slices(out, source)
        self.metas = [_read_slice(folder) for folder in self.slices]
        plans = [_whole_plan(meta) for meta in self.metas]
        if odd := [s for s, plan in zip(self.slices, plans, strict=True) if plan != plans[0]]:
            raise ValueError(
                f"{odd[0]} is of another input or other options than {self.slices[0]}: build it "
                "again with --overwrite"
            )
        self.whole_plan = plans[0]
        options = BuildOptions(**self.whole_plan["options"], overwrite=overwrite)
        entry = SourceInput(
            source=source,
            category=self.whole_plan["category"],
            rows=self._stored,
            convert=keep,
            identity=self.whole_plan["input"],
            length=sum(meta["samples"] for meta in self.metas),
            bytes=sum(shard["bytes"] for meta in self.metas for shard in meta["shards"]),
        )
        super().__init__(entry, out, None, options, Stored(), advance)

    def run(self) -> SourceReport:
        """Join, then remove the slices."""
        if not (self.folder / INDEX_NAME).exists() or self.options.overwrite:
            check_room(self.folder, self.entry.bytes)
        report = super().run()
        for folder in self.slices:
            shutil.rmtree(folder)
            for parent in (folder.parent, folder.parent.parent):
                if not any(parent.iterdir()):
                    parent.rmdir()
        return report

    def _make_plan(self) -> dict[str, Any]:
        return self.whole_plan

    def _of_processor(self) -> dict[str, Any]:
        return {name: self.metas[0][name] for name in ("processor_parts", "image_settings")}

    def _finish(self) -> None:
        self.progress.drops = sum((Counter(m["drops"]) for m in self.metas), Counter())
        self.progress.turn_drops = sum((Counter(m["turn_drops"]) for m in self.metas), Counter())
        super()._finish()

    def _stored(self, start: int) -> Iterator[tuple[int, Prepared]]:
        """(row, finished sample) of all slices in order, from row `start` on."""
        for folder, meta in zip(self.slices, self.metas, strict=True):
            names = [shard["url"] for shard in meta["shards"]]
            samples = np.load(folder / SAMPLES_NAME, mmap_mode="r")
            for record in samples[np.searchsorted(samples["row"], start) :]:
                path = folder / names[record["shard"]]
                block = read_range(str(path), int(record["offset"]), int(record["size"]))
                if zlib.crc32(block) != record["crc32"]:
                    raise ValueError(f"{path} changed since it was built: {_again(folder)}")
                counts = {n: int(record[n]) for n in ("tokens", "supervised", "prompt", "tiles")}
                yield int(record["row"]), Prepared(int(record["row"]), block, **counts)


def find_slices(out: Path, source: str) -> list[Path]:
    """Folders of a source's slices, in order. Raises ValueError when one is missing."""
    found = {p.parent.parent.name: p.parent for p in _indices(out / SLICES_NAME, source)}
    counts = {int(name.partition("-of-")[2]) for name in found}
    if len(counts) > 1:
        raise ValueError(
            f"{source} has slices of different builds in {out / SLICES_NAME} (of "
            f"{' and of '.join(map(str, sorted(counts)))}): remove those not meant"
        )
    [count] = counts
    names = [Slice(number, count).name for number in range(1, count + 1)]
    if missing := [str(n) for n, name in enumerate(names, start=1) if name not in found]:
        raise ValueError(
            f"slices {', '.join(missing)} of {count} of {source} are not built: run `ldistill "
            f"shards build ... --slice {missing[0]}/{count}` to its end"
        )
    return [found[name] for name in names]


def _indices(root: Path, source: str) -> list[Path]:
    return list(root.glob(f"*-of-*/{source}/{INDEX_NAME}"))


def _read_slice(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / INDEX_NAME).read_text())
        whole = hash_file(folder / SAMPLES_NAME) == meta["samples_sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is damaged ({error!r}): {_again(folder)}") from error
    if not whole:
        raise ValueError(f"{folder / SAMPLES_NAME} changed since it was built: {_again(folder)}")
    return meta


def _again(folder: Path) -> str:
    number, _, count = folder.parent.name.partition("-of-")
    return f"build it again with --slice {int(number)}/{int(count)} --overwrite"


def _whole_plan(meta: dict[str, Any]) -> dict[str, Any]:
    """The plan that the whole source would have."""
    plan = {key: meta[key] for key in PLAN_KEYS}
    return plan | {"input": {k: v for k, v in plan["input"].items() if k != KEY}}
