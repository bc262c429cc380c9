"""From an order to batches: which rank takes which packs, and who reads them.

    loader = make_loader(index, processor, limit=1024, batch_size=4, rank=0, world_size=2)
    for batch in loader: ...

Step t of a run with G packs per step consumes packs [tG, (t + 1)G) of the order's stream, and rank
r of R takes r, r + R, ...; so a run resumes with `start_pack = tG` on any number of ranks that
divides G, and sees the same samples in the same order. Batches do not depend on the workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldistill.common.samples import IGNORE, BadImage, Document, Processor
from ldistill.data.archive import BadSample
from ldistill.data.collate import Batch, Collate, LoadedDocument, LoadedPack
from ldistill.data.index import ShardIndex
from ldistill.data.order import Order, OverLong
from ldistill.data.remote.read_ahead import FetchingSampler, settle_reads
from ldistill.data.worker_signals import outlive_signals

OnBadSample = Literal["error", "drop"]


class PackSampler(Sampler[list[np.ndarray]]):
    """Batches of packs for one rank, from `start_pack` on, without end or up to `stop_pack`.

    Lives in the main process; each item is a list of `batch_size` arrays of sample numbers.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_pack: int = 0,
        stop_pack: int | None = None,
    ) -> None:
        self.order, self.batch_size = order, batch_size
        self.rank, self.world_size = rank, world_size
        self.start_pack, self.stop_pack = start_pack, stop_pack

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        stop = None if self.stop_pack is None else max(0, self.stop_pack - self.start_pack)
        packs = islice(self.order.packs_from(self.start_pack), self.rank, stop, self.world_size)
        while batch := list(islice(packs, self.batch_size)):
            yield batch


@dataclass
class PackedDataset(Dataset[LoadedPack]):
    """Reads, checks and tokenises the documents of a pack; runs in the workers.

    `on_bad_sample`: "error" stops at the first bad sample (the loader raises its BadSample with
    shard, key and reason), "drop" counts it under its reason and goes on. Documents above `limit`
    tokens are cut there. A store that fails stops the run in either case.
    """

    index: ShardIndex
    processor: Processor
    limit: int
    on_bad_sample: OnBadSample = "error"

    def __getitems__(self, packs: list[np.ndarray]) -> list[LoadedPack]:
        """The packs of a batch, whose samples a remote store gives several at a time."""
        if self.index.store.remote:
            samples = np.concatenate(packs).tolist()
            self.index.store.expect(self.index.locate(sample)[:2] for sample in samples)
        return [self[pack] for pack in packs]

    def __getitem__(self, samples: np.ndarray) -> LoadedPack:
        pack = LoadedPack()
        for sample in np.asarray(samples).tolist():
            try:
                pack.documents.append(self.load(sample))
            except BadSample as error:
                if self.on_bad_sample == "error":
                    return LoadedPack(error=error)
                pack.drops[error.reason] += 1
            except OSError as error:
                return LoadedPack(error=error)
        return pack

    def load(self, sample: int) -> LoadedDocument:
        """One document with its pictures. Raises BadSample."""
        shard, record, key = self.index.locate(sample)
        stored = self.index.read(sample)
        processor = self.processor
        try:
            images = [processor.load_image(data) for data in stored.images]
            sizes = [image.size for image in images]
            document = processor.encode(stored.turns, sizes, stored.system)
            pictures = processor.pictures(images)
        except BadImage as error:
            raise BadSample(error.reason, shard.path, key, error.detail) from error
        if len(document.input_ids) != record["tokens"]:
            detail = f"{len(document.input_ids)} tokens instead of {record['tokens']}"
            raise BadSample("other length than in the index", shard.path, key, detail)
        rotary = processor.rotary(document.input_ids, pictures)
        kept = truncate(document, self.limit)
        if (document.input_ids[len(kept.input_ids) :] == processor.image_token_id).any():
            detail = f"{len(document.input_ids)} tokens, cut at {self.limit}"
            raise BadSample("picture beyond the length limit", shard.path, key, detail)
        rotary = None if rotary is None else rotary[:, : len(kept.input_ids)]
        return LoadedDocument(sample, shard.source, kept, pictures, rotary)


def truncate(document: Document, limit: int) -> Document:
    """The first `limit` tokens; the last row loses its label with the token it pointed to."""
    if len(document.input_ids) <= limit:
        return document
    labels = document.labels[:limit].copy()
    labels[-1] = IGNORE
    return Document(document.input_ids[:limit], labels)


class PackLoader(DataLoader):
    """A DataLoader that raises in this process what a worker found wrong with a sample."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if "error" in batch:
                raise batch["error"]
            yield batch


def make_loader(
    index: ShardIndex,
    processor: Processor,
    *,
    limit: int,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_pack: int = 0,
    stop_pack: int | None = None,
    packing: bool = True,
    over_long: OverLong = "drop",
    on_bad_sample: OnBadSample = "error",
    shuffle_window: int = 64,
    num_workers: int = 0,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
    prefetch_factor: int | None = None,
    order: Order | None = None,
) -> PackLoader:
    """A loader of this rank's micro-batches (see `collate`), endless unless `stop_pack` is set.

    Checks before the first batch that the shards were built for `processor` and are whole, so a
    wrong folder fails at once (ValueError, FileNotFoundError). `order` reuses one already made.
    """
    index.check(processor)
    index.check_files()
    if order is None:
        order = Order(
            index,
            limit=limit,
            seed=seed,
            over_long=over_long,
            packing=packing,
            shuffle_window=shuffle_window,
        )
    assert order.limit == limit
    sampler: Sampler[list[np.ndarray]] = PackSampler(
        order,
        batch_size,
        rank=rank,
        world_size=world_size,
        start_pack=start_pack,
        stop_pack=stop_pack,
    )
    if index.store.remote:
        settle_reads(index, order, world_size)
        if index.store.whole:
            sampler = FetchingSampler(sampler, index)
    return PackLoader(
        PackedDataset(index, processor, limit, on_bad_sample),
        batch_sampler=sampler,
        collate_fn=Collate(processor.pad_token_id, limit if packing else None),
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=outlive_signals,
        # Else its workers' seed is drawn from the run's own random numbers, and again on resuming.
        generator=torch.Generator(),
    )
