"""What to read of remote shards, and when: the way from an order to bytes on this machine.

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

Ranged, a worker has all samples of its batch under way at a time, besides the batches that the
DataLoader prefetches. Whole, a thread of every rank fetches shards one window before their first
sample is due; if that was too late, the reader of the sample fetches it, or waits for the process
that does. Order, packs and resumption know nothing of any of this.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler

from ldistill.data.archive import Shard
from ldistill.data.index import ShardIndex
from ldistill.data.order import Order
from ldistill.data.remote.store import RemoteStore

if TYPE_CHECKING:
    from ldistill.data.loader import PackSampler

WORTHWHILE = 0.5
"""The share of a shard that a machine must need for fetching it whole."""
RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def settle_reads(index: ShardIndex, order: Order, world_size: int) -> str:
    """Decide how a remote index is read by this machine; returns a sentence that says so."""
    store = index.store
    assert isinstance(store, RemoteStore)
    if store.reading.reads == "auto":
        needed = order.used_bytes * local_ranks(world_size) / world_size
        sizes = sorted((shard.bytes for shard in index.shards), reverse=True)
        two_windows = sum(sizes[: 2 * order.shuffle_window])
        store.whole = needed > WORTHWHILE * sum(sizes) and two_windows <= store.cache.room()
    if store.whole:
        return f"shards of {store.root} are fetched whole into {store.cache.folder}"
    return f"samples are read from {store.root} as ranges"


def local_ranks(world_size: int) -> int:
    """Ranks on this machine, as the launcher says; one where it does not say."""
    told = next((os.environ[name] for name in RANKS_HERE if os.environ.get(name)), "1")
    return min(int(told), world_size)


class FetchingSampler(Sampler[list[np.ndarray]]):
    """The batches of a `PackSampler`; a thread fetches the shards they need into the cache.

    The thread walks the stream of packs one window ahead of the batches. What it cannot fetch it
    leaves: whoever reads a sample of that shard will be told why.
    """

    def __init__(self, packs: PackSampler, index: ShardIndex) -> None:
        self.packs, self.index = packs, index

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        due: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        threading.Thread(target=self._fetch, args=(due,), name="shards", daemon=True).start()
        try:
            for batch, shards in zip(self.packs, self.shards_due()):
                for shard in shards:
                    due.put(shard)
                yield batch
        finally:
            due.put(None)

    def shards_due(self) -> Iterator[list[Shard]]:
        """For each batch the shards to have in the cache soon, in the order of their need."""
        order, shards = self.packs.order, self.index.shards
        starts = [shard.start for shard in shards]
        ahead = order.packs_from(self.packs.start_pack)
        coming = order.packs_of_window()
        while True:
            coming += self.packs.batch_size * self.packs.world_size
            samples = np.concatenate(list(islice(ahead, coming)))
            numbers = np.searchsorted(starts, samples, side="right") - 1
            yield [shards[number] for number in dict.fromkeys(numbers.tolist())]
            coming = 0

    def _fetch(self, due: queue.SimpleQueue[Shard | None]) -> None:
        while (shard := due.get()) is not None:
            with suppress(Exception):
                self.index.store.fetch_shard(shard)  # type: ignore[union-attr]
