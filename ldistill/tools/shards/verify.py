"""Checking shards: every byte against its hash, every sample decoded.

report = verify_shards("shards/"); report.problems

Shards behind a URL are fetched anew, one per worker at a time, and never taken from the cache: what
is checked is what the store has.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.progress import Progress

from ldistill.common.images import check_image
from ldistill.common.samples import BadImage
from ldistill.data.archive import BadSample, check_sample, hash_file, pread_all
from ldistill.data.index import SAMPLES_NAME, Shard, ShardIndex
from ldistill.data.store import Reading


@dataclass
class VerifyReport:
    """What was looked at and what is wrong, one sentence each."""

    sources: int = 0
    shards: int = 0
    samples: int = 0
    problems: list[str] = field(default_factory=list)


def verify_shards(
    root: str | Path,
    sources: Sequence[str] | None = None,
    workers: int = 0,
    advance: Callable[[Shard], None] = lambda shard: None,
    reading: Reading | None = None,
) -> VerifyReport:
    """Re-hash every shard, check every sample's CRC-32, JSON and pictures.

    Raises as `ShardIndex.load` does when there is no usable index; damage to shards is reported,
    not raised, and so is a remote shard that cannot be read.
    """
    index = ShardIndex.load(root, sources, reading)
    report = VerifyReport(len(index.sources), len(index.shards), len(index))
    report.problems += _damaged_tables(index) + _strays(index)
    with ExitStack() as stack:
        check = map
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, mp_context=context)
            check = stack.enter_context(pool).map
        checked = check(partial(_check_shard, index), range(len(index.shards)))
        for shard, problems in zip(index.shards, checked, strict=True):
            report.problems += problems
            advance(shard)
    return report


def verify(
    folder: str, sources: Sequence[str] | None, workers: int, reading: Reading
) -> VerifyReport:
    """Check every shard under a progress bar."""
    size = sum(shard.bytes for shard in ShardIndex.load(folder, sources, reading).shards)
    with Progress() as bar:
        task = bar.add_task("verify", total=size)
        told = lambda shard: bar.advance(task, shard.bytes)  # noqa: E731
        return verify_shards(folder, sources, workers, told, reading)


def _damaged_tables(index: ShardIndex) -> list[str]:
    return [
        f"{index.store.url(source, SAMPLES_NAME)} has another SHA-256 than in the index"
        for source, meta in index.meta.items()
        if hash_file(index.store.table(source, meta)) != meta.get("samples_sha256")
    ]


def _strays(index: ShardIndex) -> list[str]:
    listed = {shard.path for shard in index.shards}
    found = [path for source in index.sources for path in index.store.tars(source)]
    return [f"{path} is not in the index" for path in sorted(found) if path not in listed]


def _check_shard(index: ShardIndex, number: int) -> list[str]:
    shard = index.shards[number]
    try:
        file = index.store.open_shard(shard)
    except FileNotFoundError:
        return [f"{shard.path} is missing"]
    except OSError as error:
        return [f"{shard.path} cannot be read: {error}"]
    problems = []
    with file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            problems.append(f"{shard.path} has {size} bytes instead of {shard.bytes}")
        elif hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            problems.append(f"{shard.path} has another SHA-256 than in the index")
        samples = range(shard.start, shard.start + shard.samples)
        found = [_check_sample(index, sample, file.fileno()) for sample in samples]
    return problems + [problem for problem in found if problem]


def _check_sample(index: ShardIndex, sample: int, descriptor: int) -> str | None:
    shard, record, key = index.locate(sample)
    try:
        raw = pread_all(descriptor, int(record["size"]), int(record["offset"]))
        for data in check_sample(raw, shard.path, record, key).images:
            check_image(data)
    except (BadSample, OSError) as error:
        return str(error)
    except BadImage as error:
        return f"sample {key} in {shard.path}: {error}"
    return None
