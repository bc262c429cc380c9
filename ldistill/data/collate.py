"""From the documents of some packs to one batch of tensors.

A batch row is a pack: documents side by side, positions restarting in each, padding at the end.

    input_ids, position_ids, labels, document_ids    int64 [B, S]
    doc_batch, doc_start, doc_length, doc_source, doc_sample    int64 [documents], row-major
    pixel_values    float32 [tiles, 3, H, W], in the order of the image tokens; [0, 3, H, W] if none
    drops           {reason: count} of samples given up while reading

`labels` are already shifted (the token after this one, -100 = none), `document_ids` count from 0
in each row and are -1 in the padding, whose positions restart at 0 like a document's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ldistill.data.archive import BadSample
from ldistill.models.processor import IGNORE, Document

Batch = dict[str, Any]


@dataclass(frozen=True)
class LoadedDocument:
    """A document ready for a batch; `pixels` is float32 [tiles, 3, H, W] or None."""

    sample: int
    source: int
    document: Document
    pixels: torch.Tensor | None = None


@dataclass
class LoadedPack:
    """The documents of one pack and the samples it lost, by reason.

    `error` is what must stop the run; it travels with the pack so that the main process can raise
    it as it is, instead of a worker's traceback.
    """

    documents: list[LoadedDocument] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    error: BadSample | OSError | None = None


@dataclass(frozen=True)
class Collate:
    """Turns a list of `LoadedPack` into a batch.

    `length` fixes S (the length limit of packed rows); None pads to the longest row. A pack with
    an error gives {"error": error} instead of a batch.
    """

    pad_token_id: int
    tile_size: int
    length: int | None = None

    def __call__(self, packs: Sequence[LoadedPack]) -> Batch:
        if errors := [pack.error for pack in packs if pack.error is not None]:
            return {"error": errors[0]}
        lengths = [[len(d.document.input_ids) for d in pack.documents] for pack in packs]
        longest = max((sum(row) for row in lengths), default=0)
        width = self.length or max(longest, 1)
        if longest > width:
            raise ValueError(f"a pack of {longest} tokens does not fit rows of {width}")
        rows = self._rows(packs, width)
        documents = [document for pack in packs for document in pack.documents]
        drops: Counter[str] = Counter()
        for pack in packs:
            drops.update(pack.drops)
        return {
            **{name: torch.from_numpy(values) for name, values in rows.items()},
            **_document_table(lengths, documents),
            "pixel_values": self._pixels(documents),
            "drops": dict(drops),
        }

    def _rows(self, packs: Sequence[LoadedPack], width: int) -> dict[str, np.ndarray]:
        shape = (len(packs), width)
        rows = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORE, dtype=np.int64),
            "document_ids": np.full(shape, -1, dtype=np.int64),
        }
        for row, pack in enumerate(packs):
            start = 0
            for number, loaded in enumerate(pack.documents):
                end = start + len(loaded.document.input_ids)
                rows["input_ids"][row, start:end] = loaded.document.input_ids
                rows["position_ids"][row, start:end] = np.arange(end - start)
                rows["labels"][row, start:end] = loaded.document.labels
                rows["document_ids"][row, start:end] = number
                start = end
            rows["position_ids"][row, start:] = np.arange(width - start)
        return rows

    def _pixels(self, documents: Sequence[LoadedDocument]) -> torch.Tensor:
        tiles = [loaded.pixels for loaded in documents if loaded.pixels is not None]
        if not tiles:
            return torch.zeros(0, 3, self.tile_size, self.tile_size)
        return torch.cat(tiles)


def _document_table(
    lengths: list[list[int]], documents: Sequence[LoadedDocument]
) -> dict[str, torch.Tensor]:
    """Where each document lies and where it came from, int64 [documents] each."""
    starts = [sum(row[:number]) for row in lengths for number in range(len(row))]
    columns = {
        "doc_batch": [number for number, row in enumerate(lengths) for _ in row],
        "doc_start": starts,
        "doc_length": [length for row in lengths for length in row],
        "doc_source": [loaded.source for loaded in documents],
        "doc_sample": [loaded.sample for loaded in documents],
    }
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
