"""`ldistill bench data`: what it costs to turn shards into batches, against what one would use.

Rounds are interleaved (every loader and number of workers once a round), so that a change of the
machine's load meets all of them; CPU seconds, of this process and its workers, say more on a shared
machine. Memory is a worker's own: pages that only it has and that cannot be dropped.

Every loader decodes pictures with the processor, tokenises with it, and collates with the collator
of training, one document a row; what differs is how samples are found, read and shuffled.

- `ours`: the order of training (shuffled within a window of shards), exact resumption.
- `ours-packed`: the same with documents packed into rows, as training reads them.
- `webdataset`: its usual recipe, shards shuffled, then a shuffle buffer.
- `datasets`: `load_dataset("webdataset", streaming=True)` with a shuffle buffer.

The last two cannot resume exactly and get no credit or blame for it here.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import webdataset as wds
from datasets import load_dataset
from torch.utils.data import DataLoader

from ldistill.common.samples import Turn
from ldistill.data.collate import Batch, Collate, LoadedDocument, LoadedPack
from ldistill.data.index import ShardIndex
from ldistill.data.loader import make_loader, truncate
from ldistill.data.store import INDEX_NAME, SAMPLES_NAME
from ldistill.models.formats import load_processor
from ldistill.models.processor import Processor
from ldistill.tools.bench.report import Row, device_name, median
from ldistill.tools.pairs import student_of

# ---- the loaders ----


@dataclass(frozen=True)
class LoaderSetup:
    """What every loader is given."""

    index: ShardIndex
    processor: Processor
    batch: int  # documents (packed: rows that hold about as many)
    limit: int
    buffer: int  # samples of the shuffle buffer of the loaders that have one

    @property
    def paths(self) -> list[str]:
        return [shard.path for shard in self.index.shards]

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Samples as tar readers give them, {extension: content}; one document a row."""
        return Collate(self.processor.pad_token_id)([self._load(sample) for sample in samples])

    def _load(self, members: Mapping[str, Any]) -> LoadedPack:
        processor, record = self.processor, members["json"]
        record = json.loads(record) if isinstance(record, bytes) else record
        turns = tuple(Turn(turn["user"], turn["assistant"]) for turn in record["turns"])
        several = record.get("images")
        described = several or ([record["image"]] if record.get("image") else [])
        places = [f"{n}." if several else "" for n in range(1, len(described) + 1)]
        contents = [members[f"{p}{d['format']}"] for p, d in zip(places, described, strict=True)]
        files = [c if isinstance(c, bytes) else c["bytes"] for c in contents]
        images = [processor.load_image(data) for data in files]
        document = truncate(processor.encode(turns, [i.size for i in images]), self.limit)
        return LoadedPack([LoadedDocument(0, 0, document, processor.pictures(images))])


# Each runs without end.


def ours(setup: LoaderSetup, workers: int, packing: bool = False) -> Iterable[Batch]:
    length = float(setup.index.lengths.mean()) if packing else setup.limit
    batch = max(1, round(setup.batch * length / setup.limit))
    how = {"limit": setup.limit, "batch_size": batch, "packing": packing, "num_workers": workers}
    return make_loader(setup.index, setup.processor, over_long="truncate", **how)


def webdataset(setup: LoaderSetup, workers: int) -> Iterable[Batch]:
    if workers > len(setup.paths):
        raise ValueError(f"webdataset gives whole shards to workers: {len(setup.paths)} shards")
    shards = wds.WebDataset(setup.paths, shardshuffle=len(setup.paths), seed=0)
    samples = shards.repeat().shuffle(setup.buffer)
    batches = samples.batched(setup.batch, collation_fn=setup.collate)
    return DataLoader(batches, batch_size=None, num_workers=workers)


def datasets(setup: LoaderSetup, workers: int) -> Iterable[Batch]:
    stream = load_dataset("webdataset", data_files=setup.paths, split="train", streaming=True)
    stream = stream.decode(False).shuffle(seed=0, buffer_size=setup.buffer).repeat(None)
    return DataLoader(stream, setup.batch, num_workers=workers, collate_fn=setup.collate)


LOADERS: dict[str, Callable[[LoaderSetup, int], Iterable[Batch]]] = {
    "ours": ours,
    "ours-packed": partial(ours, packing=True),
    "webdataset": webdataset,
    "datasets": datasets,
}


def open_setup(
    shards: str, student: str, tokenizer: str | None, sources: Sequence[str] | None, *sizes: int
) -> LoaderSetup:
    """Shards and the processor of the student (or of a recipe's) that they were built for.

    Raises as `ShardIndex.load` and `load_processor` do, and ValueError when the two do not fit.
    """
    index = ShardIndex.load(shards, sources)
    images = {name: index.image_settings[name] for name in ("tiling", "max_images")}
    processor = load_processor(student_of(student), tokenizer, **images)
    index.check(processor)
    return LoaderSetup(index, processor, *sizes)


# ---- what they cost ----

Cell = tuple[int, str]  # number of workers, loader
Measured = dict[str, float]
"""samples_per_s, tokens_per_s, mb_per_s, cpu_ms (a sample, of all processes), own_mib and rss_mib
(of one worker, or of this process without workers)."""


def bench_data(
    setup: LoaderSetup,
    *,
    loaders: Sequence[str],
    workers: Sequence[int],
    seconds: float,
    rounds: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Every loader with every number of workers, `rounds` times `seconds` long."""
    found: dict[Cell, list[Measured]] = {cell: [] for cell in product(workers, loaders)}
    failures: dict[Cell, str] = {}
    for number in range(rounds):
        for count, name in (cell for cell in found if cell not in failures):
            try:
                measured = measure(setup, name, count, seconds)
            except Exception as error:  # another library's failure is a result, not ours
                if name.startswith("ours"):
                    raise
                failures[count, name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            found[count, name].append(measured)
            rate = measured["samples_per_s"]
            say(f"round {number + 1}: {name}, {count} workers: {rate:,.1f} samples/s")
    return [_row(setup, cell, found, failures.get(cell, "")) for cell in found]


def measure(setup: LoaderSetup, name: str, count: int, seconds: float) -> Measured:
    """Run a loader with `count` workers for `seconds` after they have warmed up."""
    before = {child.pid for child in multiprocessing.active_children()}
    with warnings.catch_warnings():  # more workers than cores are what is being measured
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = iter(LOADERS[name](setup, count))
        next(batches)  # some begin only now
    try:
        for _ in range(max(1, 2 * count - 1)):
            next(batches)
        pids = {child.pid for child in multiprocessing.active_children()} - before
        workers, samples, tokens = [psutil.Process(pid) for pid in pids], 0, 0
        everyone = [psutil.Process(), *workers]
        start, cpu = time.perf_counter(), cpu_seconds(everyone)
        while (wall := time.perf_counter() - start) < seconds or not samples:
            lengths = next(batches)["doc_length"]
            samples, tokens = samples + len(lengths), tokens + int(lengths.sum())
        cpu = cpu_seconds(everyone) - cpu
        own, rss = np.mean([worker_memory(process) for process in workers or everyone], axis=0)
    finally:
        del batches
        gc.collect()
    speed, megabytes = samples / wall, float(setup.index.column("size").mean()) / 1e6
    rates = {"samples_per_s": speed, "tokens_per_s": tokens / wall, "mb_per_s": speed * megabytes}
    return rates | {"cpu_ms": 1000 * cpu / samples, "own_mib": own, "rss_mib": rss}


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """User and system time so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def worker_memory(process: psutil.Process) -> tuple[float, float]:
    """(own, resident) MiB: private dirty pages, and all that is mapped and touched."""
    own = sum(area.private_dirty for area in process.memory_maps())
    return own / 2**20, process.memory_info().rss / 2**20


def _row(setup: LoaderSetup, cell: Cell, found: Mapping[Cell, list[Measured]], failure: str) -> Row:
    """Medians over the rounds; ratios are of the loader to webdataset in the same round."""
    workers, loader = cell
    mine, theirs = [] if failure else found[cell], found.get((workers, "webdataset"), [])

    def of(*columns: str) -> Row:
        return {column: median(one[column] for one in mine) for column in columns}

    def ratio(column: str) -> float | None:
        return median(a[column] / b[column] for a, b in zip(mine, theirs))

    return {
        "loader": loader,
        "workers": workers,
        "shards": len(setup.index.shards),
        "samples": len(setup.index),
        **of("samples_per_s", "tokens_per_s", "mb_per_s", "cpu_ms"),
        "speed_ratio": ratio("samples_per_s"),
        "cpu_ratio": ratio("cpu_ms"),
        **of("own_mib", "rss_mib"),
        "failure": failure,
        "device": device_name("cpu"),
        "batch": setup.batch,
        "max_length": setup.limit,
        "buffer": setup.buffer,
    }


def bench_growth(setup: LoaderSetup, *, factors: Sequence[int], **how: Any) -> list[Row]:
    """Memory of one of two workers with the shards listed `factor` times; `how` of `bench_data`."""
    rows = []
    for factor in factors:
        with tempfile.TemporaryDirectory() as folder:
            larger = grown(setup, factor, Path(folder))
            rows += bench_data(larger, workers=[2], rounds=1, **how)
    return sorted(rows, key=lambda row: (how["loaders"].index(row["loader"]), row["samples"]))


def grown(setup: LoaderSetup, factor: int, folder: Path) -> LoaderSetup:
    """The same shards listed `factor` times over: a larger data set without a larger disk.

    Raises ValueError for shards behind a URL.
    """
    index = setup.index
    if index.store.remote:
        raise ValueError("--grow needs shards in a folder: the index of a URL is not ours to write")
    for number, (source, meta) in enumerate(index.meta.items()):
        place, shards = folder / source, meta["shards"]
        place.mkdir(parents=True)
        for shard in shards:
            (place / shard["url"]).symlink_to(Path(index.store.url(source, shard["url"])).resolve())
        samples = index.source_samples(number)
        size = (factor * len(samples),)
        table = np.lib.format.open_memmap(place / SAMPLES_NAME, "w+", samples.dtype, size)
        for copy, part in enumerate(table.reshape(factor, -1)):
            part[:] = samples
            part["shard"] += np.uint32(copy * len(shards))
        table.flush()
        (place / INDEX_NAME).write_text(json.dumps(meta | {"shards": shards * factor}))
    return replace(setup, index=ShardIndex.load(folder, index.sources))
