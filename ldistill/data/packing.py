"""The order of samples in an epoch, and the packs that documents travel in.

Order is a function of (seed, epoch) and the index alone; packs are a function of the order and the
length limit. Nothing here depends on ranks, workers or library versions of a random generator, so
a run can be resumed anywhere by one counter.

    order = epoch_order(index.shard_sizes, seed=0, epoch=0, window=64)
    packs = pack(index.lengths, order, limit=1024)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PACK_WINDOW = 4096
"""Documents ahead among which partners for a pack are sought."""
REACH = 64
"""Documents that a pack may pass over in search of the next one that still fits."""
COPY = 2**40
"""Beyond all sample numbers: tells the second time of a sample from the first in the shuffle."""


def scramble(values: np.ndarray, *salts: int) -> np.ndarray:
    """Pseudo-random uint64 of each value (SplitMix64), the same on every machine and version."""
    with np.errstate(over="ignore"):
        mixed = values.astype(np.uint64)
        for salt in (*salts, 0):
            mixed = mixed + np.uint64(salt % 2**64) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def epoch_order(
    shard_sizes: np.ndarray,
    seed: int,
    epoch: int,
    window: int,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Every sample number as often as `counts` [samples] says (default once), int64 [sum].

    Shards are shuffled, then samples within each run of `window` shards, so that a reader stays
    near a few files at a time. `shard_sizes` lists the samples of each shard in index order. A
    sample comes again at another visit to its shard, which is shuffled like a shard of its own.
    """
    if window < 1:
        raise ValueError(f"the shuffle window must be at least one shard, got {window}")
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    counts = np.ones(starts[-1], dtype=np.int64) if counts is None else counts
    copies, shards = shard_visits(starts, counts)
    visits = np.argsort(scramble(shards + copies * COPY, seed, epoch, 1), kind="stable")
    pieces = []
    for first in range(0, len(visits), window):
        members, numbers = [], []
        for copy, shard in zip(*(a[visits[first : first + window]] for a in (copies, shards))):
            there = np.flatnonzero(counts[starts[shard] : starts[shard + 1]] > copy)
            members.append(there + starts[shard])
            numbers.append(members[-1] + copy * COPY)
        samples = np.concatenate(members)
        keys = scramble(np.concatenate(numbers), seed, epoch, 2)
        pieces.append(samples[np.argsort(keys, kind="stable")])
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def shard_visits(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copy and shard (int64 each) of all visits: each shard, again while a sample is left in it."""
    copies, shards = [], []
    for copy in range(max(1, int(counts.max(initial=0)))):
        left = np.concatenate([[0], np.cumsum(counts > copy)])[starts]
        there = np.flatnonzero((np.diff(left) > 0) | (copy == 0))
        copies.append(np.full(len(there), copy))
        shards.append(there)
    return np.concatenate(copies), np.concatenate(shards)


@dataclass(frozen=True)
class Packs:
    """Packs of one epoch: pack i holds `documents[starts[i]:starts[i + 1]]` (int64)."""

    documents: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.documents[self.starts[number] : self.starts[number + 1]]


def pack(lengths: np.ndarray, order: np.ndarray, limit: int, window: int = PACK_WINDOW) -> Packs:
    """Pack the documents of `order`, each once, into packs of at most `limit` tokens.

    A pack takes documents in their order until little room is left, then one or two from the
    `window` documents ahead that fill it exactly. So a pack is a fair sample of the order (the
    number of pictures in it varies little), reading stays local, and hardly a token is padding.
    `lengths` [samples] is indexed by `order`; none is above the limit.
    """
    order = np.asarray(order, dtype=np.int64)
    sizes = np.asarray(lengths)[order].astype(np.int64)
    assert sizes.max(initial=0) <= limit
    places: list[int] = []
    counts: list[int] = []
    for members in _fill(sizes, limit, window):
        places += members
        counts.append(len(members))
    documents = order[np.asarray(places, dtype=np.int64)]
    return Packs(documents, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


def _fill(sizes: np.ndarray, limit: int, window: int) -> Iterator[list[int]]:
    """Packs as lists of places in `sizes`."""
    shelf = _Shelf(sizes.tolist(), limit)
    little = 2 * int(sizes.mean()) if len(sizes) else 0
    for first in range(len(sizes)):
        shelf.stock(first + window)
        if shelf.gone[first]:
            continue
        members = [shelf.take(shelf.sizes[first])]
        room = limit - shelf.sizes[first]
        while largest := shelf.largest(room):
            if exact := shelf.exact(room, pairs=room <= little):
                members += map(shelf.take, exact)
                break
            size = (room > little and shelf.next_fitting(first, room)) or largest
            members.append(shelf.take(size))
            room -= size
        yield members


class _Shelf:
    """The documents ahead, by size; finding a size, or two that sum to it, is a few shifts.

    Bit s of `_have` is set while a document of size s is there; `_mirror` is the same reversed,
    so that sizes a with a partner of size room - a are the common bits of one and the other,
    shifted.
    """

    def __init__(self, sizes: list[int], limit: int) -> None:
        self.sizes, self.limit = sizes, limit
        self.gone = bytearray(len(sizes))
        self._by_size: list[deque[int]] = [deque() for _ in range(limit + 1)]
        self._have = self._mirror = self._stocked = 0

    def stock(self, end: int) -> None:
        """Put the documents before place `end` on the shelf."""
        for place in range(self._stocked, min(end, len(self.sizes))):
            size = self.sizes[place]
            if not self._by_size[size]:
                self._flip(size)
            self._by_size[size].append(place)
        self._stocked = max(self._stocked, min(end, len(self.sizes)))

    def _flip(self, size: int) -> None:
        self._have ^= 1 << size
        self._mirror ^= 1 << (self.limit - size)

    def take(self, size: int) -> int:
        """Remove the earliest document of a size that is there; returns its place."""
        place = self._by_size[size].popleft()
        if not self._by_size[size]:
            self._flip(size)
        self.gone[place] = True
        return place

    def largest(self, room: int) -> int:
        """The largest size that fits into `room`, 0 when none does."""
        return max(0, (self._have & ((2 << room) - 1)).bit_length() - 1)

    def exact(self, room: int, pairs: bool) -> tuple[int, ...]:
        """One size, or with `pairs` two, that fill `room` exactly; empty when there are none."""
        if self._have >> room & 1:
            return (room,)
        if not pairs:
            return ()
        partnered = self._have & (self._mirror >> (self.limit - room)) & ((1 << room) - 1)
        half = room // 2
        if room % 2 == 0 and partnered >> half & 1 and len(self._by_size[half]) < 2:
            partnered ^= 1 << half
        size = partnered.bit_length() - 1
        return (size, room - size) if size > 0 else ()

    def next_fitting(self, place: int, room: int) -> int:
        """The size of the next document after `place` that is there and fits; 0 beyond `REACH`."""
        for following in range(place + 1, min(place + REACH, self._stocked)):
            if not self.gone[following] and self.sizes[following] <= room:
                return self.sizes[following]
        return 0


def single(order: np.ndarray) -> Packs:
    """One document per pack."""
    return Packs(np.asarray(order, dtype=np.int64), np.arange(len(order) + 1, dtype=np.int64))
