"""From the documents of some packs to one batch of tensors.

A batch row is a pack: documents side by side, positions restarting in each, padding at the end.

    input_ids, position_ids, labels, document_ids    int64 [B, S]
    doc_batch, doc_start, doc_length, doc_source, doc_sample    int64 [documents], row-major
    answers     bool [B, S], True from a document's first answer on
    rotary      int64 [axes, B, S], only of students whose rotary positions have several axes
    pictures    {name: tensor} as the student's processor makes them, in the order of the image
                tokens: along the first dimension, padded with 0 in the others; {} without any
    drops       {reason: count} of samples given up while reading

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

from ldistill.common.samples import IGNORE, Document, Pictures
from ldistill.data.archive import BadSample

Batch = dict[str, Any]


@dataclass(frozen=True)
class LoadedDocument:
    """A document ready for a batch; `rotary` is int64 [axes, n] where there are several."""

    sample: int
    source: int
    document: Document
    pictures: Pictures = field(default_factory=dict)
    rotary: torch.Tensor | None = None


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
    length: int | None = None

    def __call__(self, packs: Sequence[LoadedPack]) -> Batch:
        if errors := [pack.error for pack in packs if pack.error is not None]:
            return {"error": errors[0]}
        lengths = [[len(d.document.input_ids) for d in pack.documents] for pack in packs]
        longest = max((sum(row) for row in lengths), default=0)
        width = self.length or max(longest, 1)
        assert longest <= width
        rows = self._rows(packs, width)
        documents = [document for pack in packs for document in pack.documents]
        drops: Counter[str] = Counter()
        for pack in packs:
            drops.update(pack.drops)
        return {
            **{name: torch.from_numpy(values) for name, values in rows.items()},
            **_rotary(packs, rows["position_ids"]),
            **_document_table(lengths, documents),
            "pictures": merge([document.pictures for document in documents]),
            "drops": dict(drops),
        }

    def _rows(self, packs: Sequence[LoadedPack], width: int) -> dict[str, np.ndarray]:
        shape = (len(packs), width)
        rows = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORE, dtype=np.int64),
            "document_ids": np.full(shape, -1, dtype=np.int64),
            "answers": np.zeros(shape, dtype=bool),
        }
        for row, pack in enumerate(packs):
            start = 0
            for number, loaded in enumerate(pack.documents):
                end = start + len(loaded.document.input_ids)
                rows["input_ids"][row, start:end] = loaded.document.input_ids
                rows["position_ids"][row, start:end] = np.arange(end - start)
                rows["labels"][row, start:end] = loaded.document.labels
                rows["document_ids"][row, start:end] = number
                rows["answers"][row, start + loaded.document.prompt + 1 : end] = True
                start = end
            rows["position_ids"][row, start:] = np.arange(width - start)
        return rows


def merge(pictures: Sequence[Pictures]) -> Pictures:
    """The pictures of several documents as one; their shapes are padded with 0."""
    merged: Pictures = {}
    for name in dict.fromkeys(name for some in pictures for name in some):
        tensors = [some[name] for some in pictures if name in some]
        largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        merged[name] = torch.cat([_padded(t, largest) for t in tensors])
    return merged


def _padded(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    behind = [(0, size - own) for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(more for _, more in behind):
        return tensor
    return torch.nn.functional.pad(tensor, [n for pair in reversed(behind) for n in pair])


def _rotary(packs: Sequence[LoadedPack], positions: np.ndarray) -> dict[str, torch.Tensor]:
    axes = {len(d.rotary) for pack in packs for d in pack.documents if d.rotary is not None}
    if not axes:
        return {}
    rotary = torch.from_numpy(positions).expand(axes.pop(), -1, -1).clone()
    for row, pack in enumerate(packs):
        start = 0
        for loaded in pack.documents:
            end = start + len(loaded.document.input_ids)
            rotary[:, row, start:end] = loaded.rotary
            start = end
    return {"rotary": rotary}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all of its tensors on a device, those of its pictures too."""
    return {
        name: to_device(value, device)
        if isinstance(value, dict)
        else value.to(device, non_blocking=True)
        for name, value in batch.items()
        if name != "drops"
    }


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
