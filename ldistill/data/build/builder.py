"""Building shards: WebDataset tars with an index per source, resumable and the same every time.

    build_shards({"docvqa": samples}, "shards/", processor)

Layout: `{out}/{source}/{source}-{split}-000000.tar`, ..., `samples.npy`, and last `index.json`,
without which a source does not count as built. A build that was killed goes on after the last
shard whose bytes still have the recorded hash (see `ledger`). The bytes depend on the input and
the options, never on the number of workers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ldistill import sources as known_sources
from ldistill.common.errors import disk_full
from ldistill.common.samples import Drop, Sample
from ldistill.data.archive import SAMPLE_DTYPE, ShardFile, ShardWriter, hash_file
from ldistill.data.build.build_types import Advance, BuildOptions, SourceInput, SourceReport
from ldistill.data.build.progress import (
    FinishedShard,
    Ledger,
    Progress,
    digest,
    is_whole,
    write_text,
)
from ldistill.data.build.workers import Prepared, Workers, keep
from ldistill.data.index import FORMAT, INDEX_NAME, SAMPLES_NAME
from ldistill.models.processor import Processor

LEAST_ROOM = 64 * 1024 * 1024
PLAN_KEYS = ("format", "source", "category", "input", "options", "processor", "max_images")


def build_shards(
    samples_by_source: Mapping[str, Iterable[Sample | Drop]],
    out: str | Path,
    processor: Processor,
    *,
    extra: Mapping[str, str] | None = None,
    options: BuildOptions | None = None,
    identity: Mapping[str, Any] | None = None,
) -> list[SourceReport]:
    """Build shards from samples at hand; `extra` declares categories of sources beyond the 17.

    Pass an `identity` that changes with the samples to make a killed build resumable.
    """
    inputs = [
        SourceInput(
            source=source,
            category=known_sources.category_of(source, dict(extra or {})),
            rows=lambda start, samples=samples: islice(enumerate(samples), start, None),
            convert=keep,
            identity=dict(identity or {}),
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

    Raises ValueError for a source without usable samples, FileExistsError for a folder that
    holds other shards, OSError when the disk is full.
    """
    out, inputs = Path(out), list(inputs)
    for entry in inputs:
        _check_source_name(entry.source)
    whole = 0 if options.max_samples else sum(_still_needed(entry, out) for entry in inputs)
    check_room(out, max(whole, min(options.shard_bytes, LEAST_ROOM)))
    with Workers(processor, options.workers) as workers:
        return [SourceBuild(e, out, processor, options, workers, advance).run() for e in inputs]


class SourceBuild:
    """The build of one source."""

    def __init__(
        self,
        entry: SourceInput,
        out: Path,
        processor: Processor | None,
        options: BuildOptions,
        workers: Any,
        advance: Advance,
    ) -> None:
        self.entry, self.processor, self.options = entry, processor, options
        self.workers, self.advance = workers, advance
        self.folder = out / entry.source
        self.plan = self._make_plan()
        self.ledger = Ledger(self.folder, self.plan)
        self.progress = Progress()
        self.shards: list[FinishedShard] = []

    def _make_plan(self) -> dict[str, Any]:
        """Everything the bytes depend on; two builds with the same plan are the same build."""
        options = asdict(self.options)
        return {
            "format": FORMAT,
            "source": self.entry.source,
            "category": self.entry.category,
            "input": self.entry.identity,
            "options": {k: options[k] for k in ("split", "shard_bytes", "max_samples")},
            "processor": self.processor.fingerprint(),
            "max_images": self.processor.images.max_images,
        }

    def run(self) -> SourceReport:
        """Build, resume, or find the source built already."""
        if self.options.overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        if (self.folder / INDEX_NAME).exists():
            return self._already_built()
        with self.ledger.open():
            kept = self._resume()
            self._write_shards()
            self._finish()
        files = [shard.file for shard in self.shards]
        return self._report(self.progress.counts(), files, kept)

    def _already_built(self) -> SourceReport:
        meta = json.loads((self.folder / INDEX_NAME).read_text())
        if meta.get("plan") != digest(self.plan) or not self.entry.identity:
            raise FileExistsError(
                f"{self.folder} holds shards of another input or other options: choose another "
                "folder, or pass --overwrite to replace them"
            )
        files = [ShardFile(**shard) for shard in meta["shards"]]
        damaged = [file.url for file in files if not is_whole(self.folder, file)]
        if damaged:
            raise ValueError(
                f"{self.folder} is built, but {', '.join(damaged)} changed since: pass --overwrite"
            )
        return self._report(meta, files, len(files))

    def _report(
        self, counts: dict[str, Any], files: list[ShardFile], kept_shards: int
    ) -> SourceReport:
        return SourceReport(
            source=self.entry.source,
            category=self.entry.category,
            samples=counts["samples"],
            drops=counts["drops"],
            turn_drops=counts["turn_drops"],
            shards=len(files),
            bytes=sum(file.bytes for file in files),
            kept_shards=kept_shards,
        )

    def _resume(self) -> int:
        """Take over what an earlier build finished; the number of its shards."""
        found = self.ledger.resume()
        self.shards = found if self.entry.identity else []
        if self.shards:
            self.progress = deepcopy(self.shards[-1].progress)
            self.advance(self.entry, self.progress.samples + self.progress.drops.total())
        return len(self.shards)

    def _write_shards(self) -> None:
        writer: ShardWriter | None = None
        rows: list[tuple[int, ...]] = []
        try:
            for result in self._results():
                block = result.block
                if block and writer and writer.size + len(block) > self.options.shard_bytes:
                    self._close_shard(writer, rows)
                    writer, rows = None, []
                self.progress.next_row = result.row + 1
                self.progress.count(result.drops)
                if block:
                    writer = writer or self._open_shard()
                    self.progress.samples += 1
                    rows.append(self._index_row(result, writer.add(block)))
            if writer:
                self._close_shard(writer, rows)
        except BaseException as error:
            if writer:
                writer.abandon()
            if disk_full(error):
                raise OSError(
                    f"no room left on the disk of {self.folder}: free some and run the same "
                    "command again; finished shards are kept"
                ) from error
            raise

    def _results(self) -> Iterator[Prepared]:
        limit = self.options.max_samples
        if limit is not None and self.progress.samples >= limit:
            return
        rows = self.entry.rows(self.progress.next_row)
        for result in self.workers.map(rows, self.entry.convert, self.entry.source):
            self.advance(self.entry, 1)
            yield result
            if limit is not None and self.progress.samples >= limit:
                return

    def _open_shard(self) -> ShardWriter:
        check_room(self.folder, min(self.options.shard_bytes, LEAST_ROOM))
        name = f"{self.entry.source}-{self.options.split}-{len(self.shards):06d}.tar"
        return ShardWriter(self.folder / name)

    def _index_row(self, result: Prepared, place: tuple[int, int, int]) -> tuple[int, ...]:
        counts = (result.tokens, result.supervised, result.prompt, result.tiles)
        return (len(self.shards), *place, result.row, *counts)

    def _close_shard(self, writer: ShardWriter, rows: list[tuple[int, ...]]) -> None:
        table = np.array(rows, dtype=SAMPLE_DTYPE)
        shard = FinishedShard(writer.finish(), table, deepcopy(self.progress))
        self.ledger.record(len(self.shards), shard)
        self.shards.append(shard)

    def _finish(self) -> None:
        if not self.shards and not self.entry.may_be_empty:
            lost = ", ".join(f"{n} {reason}" for reason, n in self.progress.drops.items())
            shutil.rmtree(self.folder)
            raise ValueError(
                f"no usable sample of {self.entry.source} (dropped: {lost or 'nothing was read'})"
            )
        names = {shard.file.url for shard in self.shards}
        for stale in self.folder.glob("*.tar*"):  # of an interrupted build that did not resume
            if stale.name not in names:
                stale.unlink()
        part = self.folder / (SAMPLES_NAME + ".part")
        with part.open("wb") as file:
            tables = [np.empty(0, SAMPLE_DTYPE), *(shard.rows for shard in self.shards)]
            np.save(file, np.concatenate(tables))
        part.replace(self.folder / SAMPLES_NAME)
        index = self._index() | {"samples_sha256": hash_file(self.folder / SAMPLES_NAME)}
        write_text(self.folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")
        self.ledger.close()

    def _index(self) -> dict[str, Any]:
        return {
            **self.plan,
            "split": self.options.split,
            "plan": digest(self.plan),
            **self._of_processor(),
            **self.progress.counts(),
            "shards": [asdict(shard.file) for shard in self.shards],
        }

    def _of_processor(self) -> dict[str, Any]:
        """What the index keeps of the processor, for readable errors and for readers."""
        parts, images = self.processor.parts, self.processor.images
        return {"processor_parts": parts, "image_settings": asdict(images)}


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


def _check_source_name(name: str) -> None:
    good = name == known_sources.normalise(name) and "." not in name and not name.startswith("__")
    if not good or not 0 < len(name) <= 80:
        raise ValueError(
            f"bad source id {name!r}: lower case without dots, blanks or slashes, at most 80 "
            "characters, not starting with __"
        )
