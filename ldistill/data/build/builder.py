"""Building shards: WebDataset tars with an index per source, resumable and the same every time.

    build_shards({"docvqa": samples}, "shards/", processor)

Layout: `{out}/{source}/{source}-{split}-000000.tar`, ..., `samples.npy`, and last `index.json`,
without which a source does not count as built. A build that was killed goes on after the last
shard whose bytes still have the recorded hash (see `state`). The bytes depend on the input and
the options, never on the number of workers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ldistill import sources as known_sources
from ldistill.common.errors import writing
from ldistill.common.samples import Drop, Processor, Sample
from ldistill.data.archive import (
    INDEX_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    ShardFile,
    ShardWriter,
    hash_file,
)
from ldistill.data.build.build_types import (
    Advance,
    BuildOptions,
    InputError,
    SourceInput,
    SourceReport,
    SourcesFailed,
)
from ldistill.data.build.state import (
    BuildState,
    Counts,
    FinishedShard,
    digest,
    is_whole,
    write_text,
)
from ldistill.data.build.workers import Prepared, Workers, keep
from ldistill.data.index import FORMAT

LEAST_ROOM = 64 * 1024 * 1024


def build_shards(
    samples_by_source: Mapping[str, Iterable[Sample | Drop]],
    out: str | Path,
    processor: Processor,
    *,
    extra: Mapping[str, str] | None = None,
    options: BuildOptions | None = None,
    origin: Mapping[str, str] | None = None,
) -> list[SourceReport]:
    """Build shards from samples at hand; `extra` declares categories of sources beyond the 17.

    `origin` is that of a SourceInput, for all of them.
    """
    inputs = [
        SourceInput(
            source=source,
            category=known_sources.category_of(source, extra),
            rows=lambda start, samples=samples: islice(enumerate(samples), start, None),
            convert=keep,
            origin=dict(origin or {}),
        )
        for source, samples in samples_by_source.items()
    ]
    return build(inputs, out, processor, options or BuildOptions())


def build(
    inputs: Iterable[SourceInput],
    out: str | Path,
    processor: Processor,
    options: BuildOptions,
    advance: Advance = lambda source, rows: None,
) -> list[SourceReport]:
    """Build every source in turn. `advance(input, rows)` is called as rows are done.

    A source without usable samples, an input that cannot be read on, or a folder that holds other
    shards is a ValueError or OSError; of several sources the others are built, and then
    SourcesFailed is raised. OSError at once when the disk is full.
    """
    out, inputs = Path(out), list(inputs)
    _check_names([entry.source for entry in inputs], options.split)
    whole = 0 if options.max_samples else sum(_still_needed(entry, out) for entry in inputs)
    check_room(out, max(whole, min(options.shard_bytes, LEAST_ROOM)))
    reports: list[SourceReport] = []
    failures: dict[str, Exception] = {}
    with Workers(processor, options.workers) as workers:
        for entry in inputs:
            try:
                reports.append(_build(entry, out, processor, options, workers, advance))
            except (ValueError, FileExistsError, InputError) as error:
                failures[entry.source] = error
    if failures:
        raise SourcesFailed(reports, failures) if inputs[1:] else failures.popitem()[1]
    return reports


def _build(
    entry: SourceInput,
    out: Path,
    processor: Processor,
    options: BuildOptions,
    workers: Workers,
    advance: Advance,
) -> SourceReport:
    """Build a source, go on with it, or find it built already."""
    spec = {
        "format": FORMAT,
        "source": entry.source,
        "category": entry.category,
        "input": entry.identity,
        "options": {k: getattr(options, k) for k in ("split", "shard_bytes", "max_samples")},
        "processor": processor.fingerprint(),
        "max_images": processor.images.max_images,
    }
    about = {
        "processor_parts": processor.parts,
        "image_settings": asdict(processor.images),
        "origin": entry.origin,
    }
    limit = options.max_samples

    def prepared(done: Counts) -> Iterator[Prepared]:
        advance(entry, done.samples + done.drops.total())
        if done.samples == limit:
            return
        for result in workers.map(entry.rows(done.next_row), entry.convert, entry.source):
            advance(entry, 1)
            yield result
            if done.samples == limit:
                return

    writer = SourceWriter(out / entry.source, spec, about, options.overwrite)
    return writer.run(prepared, resumable=bool(entry.identity), may_be_empty=entry.may_be_empty)


class SourceWriter:
    """Writes one source's folder: prepared samples cut into shards, and last the index.

    `spec` is everything the bytes depend on: two builds with the same one are the same build.
    `about` is what else the index keeps, for readable errors, for readers and for model cards.
    """

    def __init__(
        self, folder: Path, spec: dict[str, Any], about: dict[str, Any], overwrite: bool
    ) -> None:
        self.folder, self.spec, self.about, self.overwrite = folder, spec, about, overwrite
        self.counts = Counts()
        self.shards: list[FinishedShard] = []

    @property
    def built(self) -> bool:
        """Whether the folder is complete and stays."""
        return (self.folder / INDEX_NAME).exists() and not self.overwrite

    def run(
        self,
        prepared: Callable[[Counts], Iterable[Prepared]],
        *,
        resumable: bool = True,
        may_be_empty: bool = False,
        lost: dict[str, Any] | None = None,
    ) -> SourceReport:
        """Write what `prepared(counts)` gives from row `counts.next_row` on.

        `lost` replaces `counts` of drops where they are known beforehand. Raises FileExistsError
        for a folder of another build, ValueError for a damaged one or for no sample at all.
        """
        if self.built:
            return self._already_built(resumable)
        if self.folder.exists() and self.overwrite:
            shutil.rmtree(self.folder)
        state = BuildState(self.folder, self.spec)
        with state.open():
            if not state.is_ours():
                self._refuse("the unfinished build of another input or other options")
            found = state.finished()
            if resumable and found:
                self.shards, self.counts = found, deepcopy(found[-1].counts)
            kept = len(self.shards)
            with writing(self.folder):
                self._write_shards(prepared(self.counts), state)
            for name, counter in (lost or {}).items():
                setattr(self.counts, name, counter)
            if not self.shards and not may_be_empty:
                drops = ", ".join(self._lost())
                shutil.rmtree(self.folder)
                raise ValueError(
                    f"no usable sample of {self.spec['source']} (dropped: "
                    f"{drops or 'nothing was read'})"
                )
            self._write_index()
            state.close()
        return self._report(self.counts.to_json(), [shard.file for shard in self.shards], kept)

    def _already_built(self, resumable: bool) -> SourceReport:
        meta = json.loads((self.folder / INDEX_NAME).read_text())
        if meta.get("plan") != digest(self.spec) or not resumable:
            self._refuse("shards of another input or other options")
        files = [ShardFile(**shard) for shard in meta["shards"]]
        if damaged := [file.url for file in files if not is_whole(self.folder, file)]:
            self._refuse(f"shards of which {', '.join(damaged)} changed since")
        return self._report(meta, files, len(files))

    def _refuse(self, what: str) -> NoReturn:
        raise FileExistsError(
            f"{self.folder} holds {what}: choose another folder, or pass --overwrite to replace it"
        )

    def _lost(self) -> Iterator[str]:
        """Each reason of dropped samples, how often, and the first record that it met."""
        for reason, count in sorted(self.counts.drops.items()):
            yield f"{count} {reason}, first {self.counts.first_drops.get(reason, '')}"

    def _report(self, counts: dict[str, Any], files: list[ShardFile], kept: int) -> SourceReport:
        return SourceReport(
            source=self.spec["source"],
            category=self.spec["category"],
            samples=counts["samples"],
            drops=counts["drops"],
            turn_drops=counts["turn_drops"],
            shards=len(files),
            bytes=sum(file.bytes for file in files),
            kept_shards=kept,
            first_drops=counts.get("first_drops", {}),
        )

    def _write_shards(self, prepared: Iterable[Prepared], state: BuildState) -> None:
        most = self.spec["options"]["shard_bytes"]
        writer: ShardWriter | None = None
        rows: list[tuple[int, ...]] = []
        try:
            for result in prepared:
                block = result.block
                if block and writer and writer.size + len(block) > most:
                    self._close_shard(writer, rows, state)
                    writer, rows = None, []
                self.counts.next_row = result.row + 1
                self.counts.count(result.drops)
                if block:
                    writer = writer or self._open_shard(most)
                    self.counts.samples += 1
                    place = (len(self.shards), *writer.add(block), result.row)
                    sizes = (result.tokens, result.supervised, result.prompt, result.tiles)
                    rows.append(place + sizes)
            if writer:
                self._close_shard(writer, rows, state)
        except BaseException:
            if writer:
                writer.abandon()
            raise

    def _open_shard(self, most: int) -> ShardWriter:
        check_room(self.folder, min(most, LEAST_ROOM))
        split = self.spec["options"]["split"]
        name = f"{self.spec['source']}-{split}-{len(self.shards):06d}.tar"
        return ShardWriter(self.folder / name)

    def _close_shard(
        self, writer: ShardWriter, rows: list[tuple[int, ...]], state: BuildState
    ) -> None:
        table = np.array(rows, dtype=SAMPLE_DTYPE)
        shard = FinishedShard(writer.finish(), table, deepcopy(self.counts))
        state.record(len(self.shards), shard)
        self.shards.append(shard)

    def _write_index(self) -> None:
        names = {shard.file.url for shard in self.shards}
        for stale in self.folder.glob("*.tar*"):  # of an interrupted build that did not resume
            if stale.name not in names:
                stale.unlink()
        part = self.folder / (SAMPLES_NAME + ".part")
        with part.open("wb") as file:
            tables = [np.empty(0, SAMPLE_DTYPE), *(shard.table for shard in self.shards)]
            np.save(file, np.concatenate(tables))
        part.replace(self.folder / SAMPLES_NAME)
        index = {
            **self.spec,
            "split": self.spec["options"]["split"],
            "plan": digest(self.spec),
            **self.about,
            **self.counts.to_json(),
            "shards": [asdict(shard.file) for shard in self.shards],
            "samples_sha256": hash_file(self.folder / SAMPLES_NAME),
        }
        write_text(self.folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")


def check_room(folder: Path, need: int) -> None:
    """Raise OSError when fewer than `need` bytes are free where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"no room on the disk of {folder}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _still_needed(entry: SourceInput, out: Path) -> int:
    """Bytes a source will take beyond what an earlier build has written of it."""
    folder = out / entry.source
    if (folder / INDEX_NAME).exists():
        return 0
    return max(0, entry.bytes - sum(path.stat().st_size for path in folder.glob("*.tar")))


def _check_names(sources: Iterable[str], split: str) -> None:
    """What shards are called after, and the keys of their samples (100 bytes in a tar)."""
    problem = ""
    for name in sources:
        size, good = len(name.encode()), name == known_sources.normalise(name)
        if not good or name.startswith("__") or not 0 < size <= 80:
            problem = (
                f"bad source id {name!r} of {size} bytes: lower case without dots, blanks or "
                "slashes, at most 80 bytes, not starting with __. Rename the file or folder that "
                "it comes from, or the `source` of its records"
            )
    if not split.replace("_", "").isalnum():
        problem = f"the split {split!r} must be letters, digits and underscores"
    if problem:
        raise ValueError(problem)
