"""`ldistill bench data`: what it costs to turn shards into batches, against what one would use.

Rounds are interleaved (every loader and number of workers once a round), so that a change of the
machine's load meets all of them; CPU seconds, of this process and its workers, are told beside
the clock, because on a shared machine they say more. Memory is a worker's own: pages that only
it has and that cannot be dropped. The pages of the index are the file's, shared by all workers.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ldistill.data.collate import Batch
from ldistill.data.index import FORMAT, ShardIndex
from ldistill.data.store import INDEX_NAME, SAMPLES_NAME
from ldistill.tools.bench.loaders import LOADERS, LoaderSetup


@dataclass(frozen=True)
class DataResult:
    """One loader with one number of workers; medians over the rounds.

    `cpu_ms` is CPU time per sample, of all processes. Ratios are ours (or whichever) over
    webdataset's in the same round; None where there is nothing to compare with. Memory is of one
    worker (this process without workers), in MiB, None where the system does not tell.
    """

    loader: str
    workers: int
    shards: int
    samples: int
    """Samples in the index."""
    samples_per_s: float
    tokens_per_s: float
    mb_per_s: float
    cpu_ms: float
    speed_ratio: float | None
    cpu_ratio: float | None
    own_mib: float | None
    rss_mib: float | None
    failure: str = ""


@dataclass(frozen=True)
class Measured:
    """One measurement of a loader."""

    samples_per_s: float
    tokens_per_s: float
    cpu_s_per_sample: float
    own_mib: float | None
    rss_mib: float | None


def bench_data(
    setup: LoaderSetup,
    *,
    loaders: tuple[str, ...],
    workers: tuple[int, ...],
    seconds: float,
    rounds: int,
    tell: Callable[[str], None],
) -> list[DataResult]:
    """Every loader with every number of workers, `rounds` times `seconds` long.

    Raises ValueError for an unknown loader or a negative number of workers.
    """
    if unknown := [name for name in loaders if name not in LOADERS]:
        raise ValueError(f"loaders must be among {', '.join(LOADERS)}, got {unknown[0]!r}")
    if not loaders or not workers or min(workers) < 0:
        raise ValueError(f"give some loaders and numbers of workers from 0, got {workers}")
    cells = [(count, name) for count in workers for name in loaders]
    found: dict[tuple[int, str], list[Measured]] = {cell: [] for cell in cells}
    failures: dict[tuple[int, str], str] = {}
    for number in range(rounds):
        for cell in cells:
            if cell in failures:
                continue
            count, name = cell
            try:
                found[cell].append(measure(setup, name, count, seconds))
            except Exception as error:  # another library's failure is a result, not ours
                if name.startswith("ours"):
                    raise
                failures[cell] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            rate = found[cell][-1].samples_per_s
            tell(f"round {number + 1}: {name}, {count} workers: {rate:,.1f} samples/s")
    return [_result(setup, cell, found, failures.get(cell, "")) for cell in cells]


def measure(setup: LoaderSetup, name: str, workers: int, seconds: float) -> Measured:
    """Run a loader for `seconds` after its workers have warmed up."""
    if name == "webdataset" and workers > len(setup.paths):
        raise ValueError(f"webdataset gives whole shards to workers: {len(setup.paths)} shards")
    before = {child.pid for child in multiprocessing.active_children()}
    with warnings.catch_warnings():  # more workers than cores are what is being measured
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = iter(LOADERS[name](setup, workers))
        next(batches)  # some begin only now
    try:
        for _ in range(max(1, 2 * workers - 1)):
            next(batches)
        pids = [c.pid for c in multiprocessing.active_children() if c.pid not in before]
        samples, tokens, wall, cpu = _consume(batches, [os.getpid(), *pids], seconds)
        memory = [worker_memory(pid) for pid in pids or [os.getpid()]]
    finally:
        del batches
        gc.collect()
    own, rss = (
        None if any(m is None for m in memory) else statistics.mean(m[part] for m in memory)  # type: ignore[index]
        for part in (0, 1)
    )
    return Measured(samples / wall, tokens / wall, cpu / samples, own, rss)


def _consume(
    batches: Iterator[Batch], pids: list[int], seconds: float
) -> tuple[int, int, float, float]:
    """(samples, tokens, wall seconds, CPU seconds of `pids`) of batches worth `seconds`."""
    samples = tokens = 0
    start, cpu = time.perf_counter(), sum(map(cpu_seconds, pids))
    while (wall := time.perf_counter() - start) < seconds or not samples:
        lengths = next(batches)["doc_length"]
        samples, tokens = samples + len(lengths), tokens + int(lengths.sum())
    return samples, tokens, wall, sum(map(cpu_seconds, pids)) - cpu


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; of this one alone where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.process_time() if pid == os.getpid() else 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_memory(pid: int) -> tuple[float, float] | None:
    """(own, resident) MiB of a process: private dirty pages, and all it has mapped and touched."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return sizes["Private_Dirty"], sizes["Rss"]


def _result(
    setup: LoaderSetup,
    cell: tuple[int, str],
    found: dict[tuple[int, str], list[Measured]],
    failure: str,
) -> DataResult:
    count, name = cell
    mine, theirs = found[cell], found.get((count, "webdataset"), [])

    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    rate = median([r.samples_per_s for r in mine]) or 0.0
    pairs = list(zip(mine, theirs))
    return DataResult(
        loader=name,
        workers=count,
        shards=len(setup.index.shards),
        samples=len(setup.index),
        samples_per_s=rate,
        tokens_per_s=median([r.tokens_per_s for r in mine]) or 0.0,
        mb_per_s=rate * float(setup.index.column("size").mean()) / 1e6,
        cpu_ms=1000 * (median([r.cpu_s_per_sample for r in mine]) or 0.0),
        speed_ratio=median([a.samples_per_s / b.samples_per_s for a, b in pairs]),
        cpu_ratio=median([a.cpu_s_per_sample / b.cpu_s_per_sample for a, b in pairs]),
        own_mib=median([r.own_mib for r in mine]),
        rss_mib=median([r.rss_mib for r in mine]),
        failure=failure,
    )


def open_setup(
    shards: str,
    student: str,
    tokenizer: str | None,
    sources: list[str] | None,
    *,
    batch: int,
    limit: int,
    buffer: int,
) -> LoaderSetup:
    """Shards and the processor they were built with; `student` may be "tiny".

    Raises as `ShardIndex.load` and `load_processor` do, and ValueError when the two do not fit.
    """
    from ldistill.models.formats import load_processor
    from ldistill.tiny.prepare import STUDENT

    index = ShardIndex.load(shards, sources)
    images = index.image_settings
    processor = load_processor(
        STUDENT if student == "tiny" else student,
        tokenizer,
        tiling=images.tiling,
        max_images=images.max_images,
    )
    index.check(processor)
    return LoaderSetup(index, processor, batch, limit, buffer)


def bench_growth(
    setup: LoaderSetup,
    *,
    loaders: tuple[str, ...],
    factors: tuple[int, ...],
    seconds: float,
    tell: Callable[[str], None],
) -> list[DataResult]:
    """Memory of one of two workers with the shards listed `factor` times, for every factor."""
    results = []
    for factor in factors:
        with tempfile.TemporaryDirectory() as folder:
            larger = grown(setup, factor, Path(folder))
            results += bench_data(
                larger, loaders=loaders, workers=(2,), seconds=seconds, rounds=1, tell=tell
            )
    return sorted(results, key=lambda r: (loaders.index(r.loader), r.samples))


def grown(setup: LoaderSetup, factor: int, folder: Path) -> LoaderSetup:
    """The same shards listed `factor` times over: a larger data set without a larger disk.

    Raises ValueError for shards behind a URL.
    """
    index = setup.index
    if index.store.remote:
        raise ValueError(
            "growing needs shards in a folder: the index of a URL is not ours to write"
        )
    for number, (source, meta) in enumerate(index.meta.items()):
        place = folder / source
        place.mkdir(parents=True)
        for shard in meta["shards"]:
            (place / shard["url"]).symlink_to(Path(index.store.url(source, shard["url"])).resolve())
        samples = index.source_samples(number)
        table = np.lib.format.open_memmap(
            place / SAMPLES_NAME, "w+", samples.dtype, (factor * len(samples),)
        )
        for copy in range(factor):
            part = table[copy * len(samples) : (copy + 1) * len(samples)]
            part[:] = samples
            part["shard"] += np.uint32(copy * len(meta["shards"]))
        table.flush()
        text = json.dumps({**meta, "format": FORMAT, "shards": meta["shards"] * factor})
        (place / INDEX_NAME).write_text(text)
    return replace(setup, index=ShardIndex.load(folder, index.sources))
