"""The order of samples in an epoch, and the packs that documents travel in.

Order is a function of (seed, epoch) and the index alone; packs are a function of the order and the
length limit. Nothing here depends on ranks, workers or library versions of a random generator, so
a run can be resumed anywhere by one counter.

    order = epoch_order(index.shard_sizes, seed=0, epoch=0, window=64)
    packs = pack(index.lengths, order, limit=1024)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PACK_WINDOW = 8192
"""Documents among which partners for a pack are sought: enough for rows that are over 99% full."""


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


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """Every sample number once, int64 [samples].

    Shards are shuffled, then samples within each run of `window` shards, so that a reader stays
    near a few files at a time. `shard_sizes` lists the samples of each shard in index order.
    """
    if window < 1:
        raise ValueError(f"the shuffle window must be at least one shard, got {window}")
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shard_keys = scramble(np.arange(len(sizes)), seed, epoch, 1)
    shards = np.argsort(shard_keys, kind="stable")
    sample_keys = scramble(np.arange(starts[-1]), seed, epoch, 2)
    pieces = []
    for first in range(0, len(shards), window):
        members = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]]
        samples = np.concatenate(members)
        pieces.append(samples[np.argsort(sample_keys[samples], kind="stable")])
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


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

    Best fit, longest first, within runs of `window` documents of the order. The packs of a window
    follow the place of their longest document in the order, so that lengths show no trend.
    `lengths` [samples] is indexed by `order`. Raises ValueError for a document above the limit.
    """
    order = np.asarray(order, dtype=np.int64)
    sizes = np.asarray(lengths)[order].astype(np.int64)
    if len(sizes) and sizes.max() > limit:
        worst = int(order[sizes.argmax()])
        raise ValueError(f"sample {worst} has {sizes.max()} tokens, above the limit of {limit}")
    places: list[int] = []
    counts: list[int] = []
    for first in range(0, len(order), window):
        for members in _fill(sizes[first : first + window], limit):
            places.extend(first + member for member in members)
            counts.append(len(members))
    documents = order[np.asarray(places, dtype=np.int64)]
    return Packs(documents, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


def _fill(sizes: np.ndarray, limit: int) -> Iterator[list[int]]:
    """Packs of one window as lists of places, in the order of their longest document."""
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(limit + 1)]
    rooms = 0  # bit r is set while some open pack has room r: finding the best fit is two shifts
    values = sizes.tolist()
    for place in np.argsort(-sizes, kind="stable").tolist():
        size = values[place]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            packs[number].append(place)
        else:
            room, number = limit, len(packs)
            packs.append([place])
        if room > size:
            by_room[room - size].append(number)
            rooms |= 1 << (room - size)
    return iter(sorted(packs, key=lambda members: members[0]))


def single(order: np.ndarray) -> Packs:
    """One document per pack."""
    return Packs(np.asarray(order, dtype=np.int64), np.arange(len(order) + 1, dtype=np.int64))
