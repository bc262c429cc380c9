"""Checking shards: every byte against its hash, every sample decoded.

Shards behind a URL are fetched anew, one per worker at a time, and never taken from the cache: what
is checked is what the store has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context

from ldistill.common.images import check_image
from ldistill.common.samples import BadImage
from ldistill.data.archive import BadSample, check_sample, hash_file, pread_all
from ldistill.data.index import SAMPLES_NAME, ShardIndex


def verify_shards(index: ShardIndex, workers: int = 0) -> Iterator[list[str]]:
    """Sentences on what is wrong: with the folder, then with one shard after another.

    Every shard is hashed again, of every sample CRC-32, JSON and pictures are checked.
    """
    store, listed = index.store, {shard.path for shard in index.shards}
    damaged = [
        f"{store.url(source, SAMPLES_NAME)} has another SHA-256 than in the index"
        for source, meta in index.meta.items()
        if hash_file(store.table(source, meta)) != meta.get("samples_sha256")
    ]
    tars = sorted(path for source in index.sources for path in store.tars(source))
    yield damaged + [f"{path} is not in the index" for path in tars if path not in listed]
    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn) if workers > 1 else nullcontext()
    with pool as running:
        check = running.map if running else map
        try:
            yield from check(partial(_check_shard, index), range(len(index.shards)))
        except BrokenProcessPool as error:
            raise OSError("a worker died, for want of memory perhaps: fewer --workers") from error


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
