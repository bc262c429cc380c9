"""What to read of remote shards, and when: the way from a plan to bytes on this machine.

The order of samples is shuffled within a window of shards, and rank r of R takes every R-th pack.
So a rank needs 1/R of the bytes of every shard, in small pieces all over it, while a machine with
all R ranks needs every byte of every shard within one window's time. Hence two ways:

- **whole**: a shard is fetched into the cache on this machine once, in blocks and in sequence, by
  whichever process comes first; all ranks and workers here read their samples from it.
- **ranged**: a sample is one request for just its bytes.

With D bytes of samples, N machines of L ranks (R = N·L) and one epoch:

| ranks | machines | whole, D per machine | ranged, D·L/R per machine | auto |
|---|---|---|---|---|
| 1 | 1 | D in D/8 MiB requests | D in one request a sample | whole |
| 8 | 1 | D, shared by the 8 | D, D/8 a rank | whole |
| 8 | 8 | D; 8 D leave the store | D/8; D leave the store | ranged |
| 64 | 8 | D; 8 D leave the store | D/8, D/64 a rank; D leave the store | ranged |

`auto` takes whole shards where a machine needs more than half of what it would fetch, and the
cache holds two windows of shards (or all of them): two, because packing looks ahead across the
border of windows, and because the next window is fetched while this one is read. With less room
every shard would be fetched many times. Everywhere else it takes ranges. So what is read exceeds
what is needed by less than a factor of two in the worst case, and in the usual ones not at all.
Neighbouring samples are not joined into one request: of scattered picks few are neighbours.

Reading ahead follows the same plan. Ranged: a worker's next batch is under way while it decodes
the present one, besides the batches that the DataLoader prefetches. Whole: a shard is fetched by a
thread of some worker one window before its first sample is due; if that was too late, the reader
of the sample fetches it, or waits for the process that does. Order, packs and resumption know
nothing of any of this.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler

from ldistill.data.index import ShardIndex
from ldistill.data.order import Plan
from ldistill.data.remote.store import RemoteStore

if TYPE_CHECKING:
    from ldistill.data.loader import PackSampler

WORTHWHILE = 0.5
"""The share of a shard that a machine must need for fetching it whole."""


class ExpectantBatch(list[np.ndarray]):
    """Packs (arrays of sample numbers), and what will be needed after them.

    `ahead` holds sample numbers of this worker's next batch, `shards` numbers of shards to fetch.
    """

    ahead: np.ndarray
    shards: list[int]


class ReadAheadSampler(Sampler[list[np.ndarray]]):
    """The batches of a `PackSampler`, each an `ExpectantBatch`, for `workers` workers."""

    def __init__(self, packs: PackSampler, index: ShardIndex, workers: int) -> None:
        self.packs, self.index, self.workers = packs, index, max(1, workers)

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        due = self._shards_due() if remote_store(self.index).whole else None
        batches = iter(self.packs)
        # Batches go to the workers in turn, so this worker's next one is `workers` further on.
        waiting = deque(islice(batches, self.workers))
        while waiting:
            waiting.extend(islice(batches, 1))
            batch = ExpectantBatch(waiting.popleft())
            following = waiting[self.workers - 1] if len(waiting) == self.workers else []
            batch.ahead = np.concatenate([*following, np.zeros(0, dtype=np.int64)])
            batch.shards = next(due) if due else []
            yield batch

    def _shards_due(self) -> Iterator[list[int]]:
        """For each batch the shards to start fetching with it.

        A shard is due one window before its first pack. Of what is due a batch takes a quarter, so
        that a window's worth is spread over workers, and all that the batch itself needs.
        """
        step = self.packs.batch_size * self.packs.world_size
        ahead = window_packs(self.packs.plan, self.index)
        needs = shard_needs(self.packs.plan, self.index, self.packs.start_pack)
        due, coming = deque[tuple[int, int]](), next(needs)
        for position in count(self.packs.start_pack + step, step):
            while coming[0] < position + ahead:
                due.append(coming)
                coming = next(needs)
            urgent = sum(first < position for first, _ in due)
            taken = [due.popleft() for _ in range(max(urgent, -(-len(due) // 4)))]
            yield [shard for _, shard in taken]


def window_packs(plan: Plan, index: ShardIndex) -> int:
    """Packs that a window of shards yields, on average."""
    return -(-plan.size(0) * plan.shuffle_window // len(index.shards))


def shard_needs(plan: Plan, index: ShardIndex, start: int) -> Iterator[tuple[int, int]]:
    """(pack, shard): from which pack of the stream on a shard is needed; without end, in order.

    A shard that is needed both before and after pack `start` counts as needed from `start` on.
    """
    starts = np.concatenate([[0], np.cumsum(index.shard_sizes)])
    epoch, base = 0, 0
    while True:
        if base + plan.size(epoch) > start:
            packs = plan.epoch(epoch)
            shards = np.searchsorted(starts, packs.documents, side="right") - 1
            numbers = np.repeat(np.arange(base, base + len(packs)), np.diff(packs.starts))
            numbers, shards = numbers[numbers >= start], shards[numbers >= start]
            needed, first = np.unique(shards, return_index=True)
            for place in np.argsort(first, kind="stable"):
                yield int(numbers[first[place]]), int(needed[place])
        epoch, base = epoch + 1, base + plan.size(epoch)


def settle_reads(index: ShardIndex, plan: Plan, world_size: int) -> str:
    """Decide how a remote index is read by this machine; returns a sentence that says so."""
    store = remote_store(index)
    if store.reading.reads == "auto":
        needed = plan.used_bytes * local_ranks(world_size) / world_size
        worthwhile = needed > WORTHWHILE * sum(shard.bytes for shard in index.shards)
        store.whole = worthwhile and two_windows(index, plan) <= store.cache.room()
    if store.whole:
        return f"shards of {store.root} are fetched whole into {store.cache.folder}"
    return f"samples are read from {store.root} as ranges"


def remote_store(index: ShardIndex) -> RemoteStore:
    """The store of an index, which must be a remote one."""
    assert isinstance(index.store, RemoteStore)
    return index.store


def two_windows(index: ShardIndex, plan: Plan) -> int:
    """Bytes of the largest two windows of shards."""
    sizes = sorted((shard.bytes for shard in index.shards), reverse=True)
    return sum(sizes[: 2 * plan.shuffle_window])


def local_ranks(world_size: int) -> int:
    """Ranks on this machine, as the launcher says; one where it does not say."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    told = next((os.environ[name] for name in names if os.environ.get(name)), "1")
    return min(int(told), world_size)
