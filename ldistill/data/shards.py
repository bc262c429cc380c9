"""Building shards: WebDataset tars with an index per source, resumable and the same every time.

    build_shards({"docvqa": samples}, "shards/", processor)

Layout: `{out}/{source}/{source}-{split}-000000.tar`, ..., `samples.npy`, and last `index.json`,
without which a source does not count as built. While a build runs, `{source}/.build/` records each
finished shard; a build that was killed goes on after the last one whose bytes still have the
recorded hash. The bytes depend on the input and the options, never on the number of workers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ldistill import sources as known_sources
from ldistill.data.archive import SAMPLE_DTYPE, ShardFile, ShardWriter, hash_file
from ldistill.data.index import FORMAT, INDEX_NAME, SAMPLES_NAME
from ldistill.data.prepare import Convert, Prepared, Workers, keep
from ldistill.data.processor import Processor
from ldistill.data.samples import Drop, Sample

WORK_NAME = ".build"
SHARD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class SourceInput:
    """One source's rows. `rows(start)` yields (number, row) from row `start` on, in fixed order.

    `convert` turns a row into one Sample or Drop, plus drops of single turns; it runs in the
    workers and must be picklable. `identity` says, in JSON, what the rows are: a build resumes
    only on the same identity. `length` is for the progress bar, `bytes` for the disk check.
    """

    source: str
    category: str
    rows: Callable[[int], Iterator[tuple[int, Any]]]
    convert: Convert
    identity: dict[str, Any] = field(default_factory=dict)
    length: int | None = None
    bytes: int = 0


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


@dataclass
class SourceReport:
    """What a build did with a source: samples read = `samples` + the sum of `drops`."""

    source: str
    samples: int
    shards: int
    bytes: int
    drops: dict[str, int]
    turn_drops: dict[str, int]
    kept_shards: int
    """Shards that an earlier build had finished."""


@dataclass
class Progress:
    """Where a build stands; recorded with every finished shard."""

    next_row: int = 0
    samples: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    turn_drops: Counter[str] = field(default_factory=Counter)

    def count(self, drops: Iterable[Drop]) -> None:
        for drop in drops:
            (self.turn_drops if drop.unit == "turn" else self.drops)[drop.reason] += 1


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
    advance: Callable[[SourceInput, int], None] = lambda source, rows: None,
) -> list[SourceReport]:
    """Build every source in turn. `advance(input, rows)` is called as rows are done.

    Raises ValueError for a source without usable samples, FileExistsError for a folder that
    holds other shards, OSError when the disk is full.
    """
    out, inputs = Path(out), list(inputs)
    for entry in inputs:
        _check_source_name(entry.source)
    need = sum(entry.bytes for entry in inputs) if options.max_samples is None else 0
    check_room(out, max(need, min(options.shard_bytes, 1 << 24)))
    with Workers(processor, options.workers) as workers:
        return [SourceBuild(e, out, processor, options, workers, advance).run() for e in inputs]


class SourceBuild:
    """The build of one source."""

    def __init__(
        self,
        entry: SourceInput,
        out: Path,
        processor: Processor,
        options: BuildOptions,
        workers: Workers,
        advance: Callable[[SourceInput, int], None],
    ) -> None:
        self.entry, self.processor, self.options = entry, processor, options
        self.workers, self.advance = workers, advance
        self.folder = out / entry.source
        self.work = self.folder / WORK_NAME
        self.plan = self._make_plan()
        self.progress = Progress()
        self.files: list[ShardFile] = []
        self.rows: list[np.ndarray] = []

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
        self.work.mkdir(parents=True, exist_ok=True)
        with _locked(self.work):
            self._resume()
            kept = len(self.files)
            self._write_shards()
            self._finish()
            return self._report(kept)

    def _already_built(self) -> SourceReport:
        meta = json.loads((self.folder / INDEX_NAME).read_text())
        if meta.get("plan") != _digest(self.plan):
            raise FileExistsError(
                f"{self.folder} holds shards of another input or other options: choose another "
                "folder, or pass --overwrite to replace them"
            )
        self.files = [ShardFile(**shard) for shard in meta["shards"]]
        damaged = [file.url for file in self.files if not self._is_whole(file)]
        if damaged:
            raise ValueError(
                f"{self.folder} is built, but {', '.join(damaged)} changed since: pass --overwrite"
            )
        self.progress = Progress(0, meta["samples"], meta["drops"], meta["turn_drops"])
        return self._report(len(self.files))

    def _report(self, kept: int) -> SourceReport:
        state, size = self.progress, sum(file.bytes for file in self.files)
        return SourceReport(
            self.entry.source,
            state.samples,
            len(self.files),
            size,
            dict(state.drops),
            dict(state.turn_drops),
            kept,
        )

    # resuming --------------------------------------------------------------------------------

    def _resume(self) -> None:
        plan_file = self.work / "plan.json"
        if plan_file.exists() and json.loads(plan_file.read_text()) != _as_json(self.plan):
            raise FileExistsError(
                f"{self.folder} holds the unfinished build of another input or other options: "
                "choose another folder, or pass --overwrite to start over"
            )
        if not plan_file.exists() or not self.entry.identity:
            _write_text(plan_file, json.dumps(self.plan, indent=1))
            return
        while (record := self._load_record(len(self.files))) is not None:
            self.progress, file, rows = record
            self.files.append(file)
            self.rows.append(rows)
        self.advance(self.entry, self.progress.next_row)

    def _load_record(self, number: int) -> tuple[Progress, ShardFile, np.ndarray] | None:
        """The record of a finished shard, if its bytes are still those recorded."""
        try:
            record = json.loads((self.work / f"{number:06d}.json").read_text())
            rows = np.load(self.work / f"{number:06d}.npy")
            file, state = ShardFile(**record["shard"]), Progress(**record["progress"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        state.drops, state.turn_drops = Counter(state.drops), Counter(state.turn_drops)
        return (state, file, rows) if self._is_whole(file) else None

    def _is_whole(self, file: ShardFile) -> bool:
        path = self.folder / file.url
        return path.is_file() and hash_file(path) == file.sha256

    # writing ---------------------------------------------------------------------------------

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
        except BaseException:
            if writer:
                writer.abandon()
            raise

    def _results(self) -> Iterator[Prepared]:
        limit = self.options.max_samples
        if limit is not None and self.progress.samples >= limit:
            return
        first = self.progress.next_row
        rows = self.entry.rows(first)
        for result in self.workers.map(rows, self.entry.convert, self.entry.source):
            self.advance(self.entry, result.row + 1 - first)
            first = result.row + 1
            yield result
            if limit is not None and self.progress.samples >= limit:
                return

    def _open_shard(self) -> ShardWriter:
        check_room(self.folder, min(self.options.shard_bytes, 1 << 30))
        name = f"{self.entry.source}-{self.options.split}-{len(self.files):06d}.tar"
        return ShardWriter(self.folder / name)

    def _index_row(self, result: Prepared, place: tuple[int, int, int]) -> tuple[int, ...]:
        counts = (result.tokens, result.supervised, result.prompt, result.tiles)
        return (len(self.files), *place, result.row, *counts)

    def _close_shard(self, writer: ShardWriter, rows: list[tuple[int, ...]]) -> None:
        table = np.array(rows, dtype=SAMPLE_DTYPE)
        file = writer.finish()
        stem = self.work / f"{len(self.files):06d}"
        np.save(stem.with_suffix(".npy"), table)
        record = {"shard": asdict(file), "progress": asdict(self.progress)}
        _write_text(stem.with_suffix(".json"), json.dumps(record))
        self.files.append(file)
        self.rows.append(table)

    def _finish(self) -> None:
        state = self.progress
        if not state.samples:
            lost = ", ".join(f"{n} {reason}" for reason, n in state.drops.items())
            shutil.rmtree(self.folder)
            raise ValueError(
                f"no usable sample of {self.entry.source} (dropped: {lost or 'nothing read'})"
            )
        part = self.folder / (SAMPLES_NAME + ".part")
        with open(part, "wb") as file:
            np.save(file, np.concatenate(self.rows))
        part.replace(self.folder / SAMPLES_NAME)
        _write_text(self.folder / INDEX_NAME, json.dumps(self._index(), indent=1) + "\n")
        shutil.rmtree(self.work)

    def _index(self) -> dict[str, Any]:
        return {
            **self.plan,
            "split": self.options.split,
            "plan": _digest(self.plan),
            "processor_parts": self.processor.parts,
            "image_settings": asdict(self.processor.images),
            "samples": self.progress.samples,
            "drops": dict(sorted(self.progress.drops.items())),
            "turn_drops": dict(sorted(self.progress.turn_drops.items())),
            "shards": [asdict(file) for file in self.files],
        }


def check_room(folder: Path, need: int) -> None:
    """Raise OSError when fewer than `need` bytes are free where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"no room on the disk of {folder}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _check_source_name(name: str) -> None:
    if (
        name != known_sources.normalise(name)
        or "." in name
        or name.startswith("__")
        or len(name) > 80
    ):
        raise ValueError(
            f"bad source id {name!r}: lower case without dots, blanks or slashes, at most 80 "
            "characters, not starting with __"
        )


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keep a second build out; the lock goes with the process, so a kill leaves none behind."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(f"another build is writing {work.parent}") from error
        yield


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
