"""Checking shards on disk: every byte against its hash, every sample decoded.

report = verify_shards("shards/"); report.problems
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ldistill.data.archive import BadSample, hash_file
from ldistill.data.images import check_image
from ldistill.data.index import SAMPLES_NAME, Shard, ShardIndex
from ldistill.data.samples import BadImage


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
) -> VerifyReport:
    """Re-hash every shard, check every sample's CRC-32, JSON and pictures.

    Raises as `ShardIndex.load` does when there is no usable index; damage to shards is reported,
    not raised.
    """
    index = ShardIndex.load(root, sources)
    report = VerifyReport(len(index.sources), len(index.shards), len(index))
    report.problems += _damaged_tables(index) + _strays(index)
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            checked = pool.map(_check_shard, [index] * len(index.shards), range(len(index.shards)))
            _collect(report, index, checked, advance)
    else:
        checked = (_check_shard(index, number) for number in range(len(index.shards)))
        _collect(report, index, checked, advance)
    return report


def _collect(report: VerifyReport, index: ShardIndex, checked, advance) -> None:
    for shard, problems in zip(index.shards, checked, strict=True):
        report.problems += problems
        advance(shard)


def _damaged_tables(index: ShardIndex) -> list[str]:
    paths = {index.root / source / SAMPLES_NAME: index.meta[source] for source in index.sources}
    return [
        f"{path} has another SHA-256 than in the index"
        for path, meta in paths.items()
        if hash_file(path) != meta.get("samples_sha256")
    ]


def _strays(index: ShardIndex) -> list[str]:
    listed = {shard.path for shard in index.shards}
    found = [str(p) for source in index.sources for p in (index.root / source).glob("*.tar*")]
    return [f"{path} is not in the index" for path in sorted(found) if path not in listed]


def _check_shard(index: ShardIndex, number: int) -> list[str]:
    shard = index.shards[number]
    path = Path(shard.path)
    if not path.is_file():
        return [f"{path} is missing"]
    problems = []
    if path.stat().st_size != shard.bytes:
        problems.append(f"{path} has {path.stat().st_size} bytes instead of {shard.bytes}")
    elif hash_file(path) != shard.sha256:
        problems.append(f"{path} has another SHA-256 than in the index")
    for sample in range(shard.start, shard.start + shard.samples):
        if problem := _check_sample(index, sample):
            problems.append(problem)
    return problems


def _check_sample(index: ShardIndex, sample: int) -> str | None:
    try:
        stored = index.read(sample)
        for data in stored.images:
            check_image(data)
    except BadSample as error:
        return str(error)
    except BadImage as error:
        shard, _, key = index.locate(sample)
        return f"sample {key} in {shard.path}: {error}"
    return None
