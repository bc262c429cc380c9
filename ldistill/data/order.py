"""What a run will read: which documents, in which packs, from which pack on.

The stream of packs is endless: the packs of epoch 0, then those of epoch 1, and so on, so that no
step at an epoch's end is short. Within an epoch every usable document appears exactly once, or as
often as the mixture says. The position in the stream is one number, the count of packs already
consumed by all ranks together.

    order = Order(index, limit=1024, seed=0, mix="vqav2=2"); print(order.summary())
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np

from ldistill.data.index import ShardIndex
from ldistill.data.mixture import Amount, epoch_counts, parse_mix, repeats_of
from ldistill.data.packing import PACK_WINDOW, Packs, epoch_order, pack, shard_visits, single

TOO_LONG = "longer than the limit"
NO_ANSWER_LEFT = "no answer within the limit"
OverLong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class OrderSummary:
    """The first epoch of an order in numbers."""

    samples: int
    """Samples in the shards: usable ones + the sum of `drops`."""
    documents: int
    """Documents of the epoch: without a mixture, each usable sample once."""
    packs: int
    tokens: int
    """Tokens of the documents as trained, image tokens included."""
    efficiency: float
    """Real tokens over tokens with padding (packed rows; 1.0 for one document per row)."""
    truncated: int
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    """By source: `repeats` of its documents, `documents`, `tokens`, and their `share` of all."""
    drops: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in self.drops.items()) or "none"
        mixed = any(source["repeats"] != 1 for source in self.sources.values())
        return (
            f"{self.documents} {'documents out of' if mixed else 'of'} {self.samples} samples in "
            f"{self.packs} packs per epoch, "
            f"{self.efficiency:.1%} real tokens; dropped: {lost}; truncated: {self.truncated}"
        )


class Order:
    """Usable documents of an index and their packs, epoch by epoch.

    `over_long` says what happens to documents above `limit` tokens: "drop" and "truncate" are
    counted in the summary, "error" raises ValueError here. `shuffle_window` is in shards.
    `packing=False` gives one document per pack. `mix` says how often which source comes (see
    `mixture`). `chosen` is a mask of the samples there are (default all): what it leaves out is in
    no count.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        limit: int,
        seed: int = 0,
        over_long: OverLong = "drop",
        packing: bool = True,
        shuffle_window: int = 64,
        pack_window: int = PACK_WINDOW,
        mix: str | None = None,
        chosen: np.ndarray | None = None,
    ) -> None:
        self.limit, self.seed, self.packing = limit, seed, packing
        self.shuffle_window, self._pack_window = shuffle_window, pack_window
        self._shard_sizes = index.shard_sizes
        self._lengths = np.minimum(index.lengths, limit)
        self._chosen = np.ones(len(index), dtype=bool) if chosen is None else chosen
        self.drops: dict[str, int] = {}
        self._usable = self._select(index, over_long)
        self._sources, self._starts = index.sources, index.source_starts
        self._check_some_left(index)
        self._repeats = self._mixed(parse_mix(mix))
        # What a store has to give in an epoch.
        self.used_bytes = int((index.column("size") * self.counts(0)).sum())
        self._cache: dict[int, Packs] = {}
        self._sizes: dict[int, int] = {}

    @property
    def identity(self) -> list[int | str]:
        """What, beside the index, decides the stream of packs."""
        windows = (self.shuffle_window, self._pack_window)
        options = (self.limit, self.seed, int(self.packing), *windows)
        mix = [str(repeats) for repeats in self._repeats] if set(self._repeats) != {1} else []
        return [*options, int(self._usable.sum()), self.truncated, *mix]

    def _select(self, index: ShardIndex, over_long: OverLong) -> np.ndarray:
        """Mask of documents that take part; fills `drops`."""
        too_long = self._chosen & (index.lengths > self.limit)
        if over_long == "error" and too_long.any():
            worst = int((index.lengths * self._chosen).argmax())
            _, _, key = index.locate(worst)
            raise ValueError(
                f"{too_long.sum()} documents are longer than the limit of {self.limit} tokens (the "
                f"longest is {key} with {index.lengths[worst]}): raise the limit, or say that "
                "such documents are to be dropped or truncated"
            )
        # The last kept row's next token is cut away, so its label goes too.
        hopeless = too_long & (index.column("prompt") >= self.limit - 1)
        lost, reason = (too_long, TOO_LONG) if over_long == "drop" else (hopeless, NO_ANSWER_LEFT)
        if lost.any():
            self.drops[reason] = int(lost.sum())
        self.truncated = 0 if over_long == "drop" else int((too_long & ~lost).sum())
        return self._chosen & ~lost

    def _check_some_left(self, index: ShardIndex) -> None:
        for number, source in enumerate(index.sources):
            first, last = index.source_starts[number : number + 2]
            if self._chosen[first:last].any() and not self._usable[first:last].any():
                raise ValueError(
                    f"no document of {source} fits the limit of {self.limit} tokens (the shortest "
                    f"has {index.lengths[first:last].min()}): raise the limit or leave it out"
                )

    def _documents(self, number: int) -> np.ndarray:
        """Usable documents of a source."""
        first, last = self._starts[number : number + 2]
        return first + np.flatnonzero(self._usable[first:last])

    def _mixed(self, mix: dict[str, Amount]) -> list[Fraction]:
        documents = [self._documents(number) for number in range(len(self._sources))]
        tokens = [int(self._lengths[chosen].sum()) for chosen in documents]
        return repeats_of(mix, self._sources, [len(chosen) for chosen in documents], tokens)

    def counts(self, epoch: int) -> np.ndarray:
        """How often each sample of the shards comes in an epoch, int64 [samples]."""
        counts = np.zeros(len(self._usable), dtype=np.int64)
        for number, repeats in enumerate(self._repeats):
            documents = self._documents(number)
            counts[documents] = epoch_counts(documents, repeats, self.seed, epoch)
        return counts

    def epoch(self, number: int) -> Packs:
        """The packs of one epoch; the last two asked for are kept."""
        if number not in self._cache:
            order = epoch_order(
                self._shard_sizes, self.seed, number, self.shuffle_window, self.counts(number)
            )
            packs = single(order)
            if self.packing:
                packs = pack(self._lengths, order, self.limit, self._pack_window)
            while len(self._cache) > 1:
                self._cache.pop(next(iter(self._cache)))
            self._cache[number] = packs
            self._sizes[number] = len(packs)
        return self._cache[number]

    def size(self, number: int) -> int:
        """Packs of an epoch; unlike `epoch`, free when it was ever asked for before."""
        return self._sizes.get(number) or len(self.epoch(number))

    def packs_of_window(self) -> int:
        """Packs in which about a shuffle window of shards is read."""
        starts = np.concatenate([[0], np.cumsum(self._shard_sizes)])
        visits = len(shard_visits(starts, self.counts(0))[1])
        return -(-self.size(0) * self.shuffle_window // visits)

    def packs_from(self, start: int) -> Iterator[np.ndarray]:
        """Document numbers (int64 [n]) of pack `start`, `start + 1`, ... without end."""
        epoch = 0
        while start >= self.size(epoch):
            start -= self.size(epoch)
            epoch += 1
        while True:
            packs = self.epoch(epoch)
            for number in range(start, len(packs)):
                yield packs[number]
            epoch, start = epoch + 1, 0

    def summary(self) -> OrderSummary:
        """Counts of the first epoch."""
        packs = self.epoch(0)
        tokens = int(self._lengths[packs.documents].sum())
        sources = {name: self._of_source(n, tokens) for n, name in enumerate(self._sources)}
        efficiency = tokens / (len(packs) * self.limit) if self.packing else 1.0
        return OrderSummary(
            samples=int(self._chosen.sum()),
            documents=len(packs.documents),
            packs=len(packs),
            tokens=tokens,
            efficiency=efficiency,
            truncated=self.truncated,
            sources=sources,
            drops=dict(self.drops),
        )

    def _of_source(self, number: int, all_tokens: int) -> dict[str, float]:
        chosen = slice(*self._starts[number : number + 2])
        counts = self.counts(0)[chosen]
        tokens = int((counts * self._lengths[chosen]).sum())
        return {
            "repeats": float(self._repeats[number]),
            "documents": int(counts.sum()),
            "tokens": tokens,
            "share": tokens / all_tokens,
        }
