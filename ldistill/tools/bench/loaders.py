"""The loaders that `ldistill bench data` compares, on the same shards with the same processing.

Every one of them decodes pictures with the processor, tokenises with it, and collates with the
collator of training, one document a row; what differs is how samples are found, read and shuffled.

- `ours`: the plan's order (shuffled within a window of shards), exact resumption.
- `ours-packed`: the same with documents packed into rows, as training reads them.
- `webdataset`: its usual recipe, shards shuffled, then a shuffle buffer.
- `datasets`: `load_dataset("webdataset", streaming=True)` with a shuffle buffer.

The last two cannot resume exactly and get no credit or blame for it here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldistill.common.samples import Turn
from ldistill.data.collate import Batch, Collate, LoadedDocument, LoadedPack
from ldistill.data.index import ShardIndex
from ldistill.data.loader import make_loader
from ldistill.models.processor import Processor


@dataclass(frozen=True)
class LoaderSetup:
    """What every loader is given."""

    index: ShardIndex
    processor: Processor
    batch: int
    """Documents a batch (packed: rows that hold about as many)."""
    limit: int
    buffer: int
    """Samples of the shuffle buffer of the loaders that have one."""
    seed: int = 0

    @property
    def paths(self) -> list[str]:
        """Every shard's path or URL."""
        return [shard.path for shard in self.index.shards]

    @property
    def collate(self) -> Collate:
        """One document a row."""
        return Collate(self.processor.pad_token_id, self.processor.images.tile_size)


def ours(setup: LoaderSetup, workers: int, packing: bool = False) -> Iterable[Batch]:
    """This project's loader, without end."""
    batch = setup.batch
    if packing:
        batch = max(1, round(batch * float(setup.index.lengths.mean()) / setup.limit))
    return make_loader(
        setup.index,
        setup.processor,
        limit=setup.limit,
        batch_size=batch,
        seed=setup.seed,
        packing=packing,
        over_long="truncate",
        num_workers=workers,
    )


def webdataset(setup: LoaderSetup, workers: int) -> Iterable[Batch]:
    """Stock webdataset, without end."""
    import webdataset as wds

    shards = wds.WebDataset(setup.paths, shardshuffle=len(setup.paths), seed=setup.seed)
    samples = shards.repeat().shuffle(setup.buffer)
    documents = samples.map(partial(_from_tar, processor=setup.processor, limit=setup.limit))
    batches = documents.batched(setup.batch, collation_fn=setup.collate)
    return DataLoader(batches, batch_size=None, num_workers=workers)


def datasets(setup: LoaderSetup, workers: int) -> Iterable[Batch]:
    """Hugging Face datasets' streaming reader of the same tars, without end."""
    from datasets import load_dataset

    stream = load_dataset("webdataset", data_files=setup.paths, split="train", streaming=True)
    stream = stream.decode(False).shuffle(seed=setup.seed, buffer_size=setup.buffer).repeat(None)
    make = partial(_collate_tars, setup.processor, setup.limit, setup.collate)
    return DataLoader(stream, batch_size=setup.batch, num_workers=workers, collate_fn=make)


def _collate_tars(
    processor: Processor, limit: int, collate: Collate, rows: Sequence[Mapping[str, Any]]
) -> Batch:
    return collate([_from_tar(row, processor, limit) for row in rows])


def _from_tar(members: Mapping[str, Any], processor: Processor, limit: int) -> LoadedPack:
    """A sample as tar readers give it, {extension: content}, decoded and tokenised."""
    from ldistill.data.loader import truncate

    record = members["json"]
    record = json.loads(record) if isinstance(record, bytes) else record
    turns = tuple(Turn(turn["user"], turn["assistant"]) for turn in record["turns"])
    several = record.get("images")
    described = several or ([record["image"]] if record.get("image") else [])
    places = [f"{n}." if several else "" for n in range(1, len(described) + 1)]
    contents = [members[f"{p}{d['format']}"] for p, d in zip(places, described, strict=True)]
    files = [c if isinstance(c, bytes) else c["bytes"] for c in contents]
    cut = [processor.tiles(processor.load_image(data)) for data in files]
    document = truncate(processor.encode(turns, [grid for _, grid in cut]), limit)
    pixels = torch.cat([tiles for tiles, _ in cut]) if cut else None
    return LoadedPack([LoadedDocument(0, 0, document, pixels)])


LOADERS: dict[str, Callable[[LoaderSetup, int], Iterable[Batch]]] = {
    "ours": ours,
    "ours-packed": partial(ours, packing=True),
    "webdataset": webdataset,
    "datasets": datasets,
}
