"""A batch against the same rows laid out by plain loops."""

from collections import Counter

import numpy as np
import pytest
import torch

from ldistill.data.collate import Collate, LoadedDocument, LoadedPack
from ldistill.models.processor import IGNORE, Document

PAD = 9


def document(sample, length, tiles=0, source=0):
    ids = np.arange(length, dtype=np.int32) + 100 * sample
    labels = np.where(np.arange(length) % 3, IGNORE, ids + 1).astype(np.int32)
    pixels = torch.full((tiles, 3, 8, 8), float(sample)) if tiles else None
    return LoadedDocument(sample, source, Document(ids, labels), pixels)


@pytest.fixture
def packs():
    return [
        LoadedPack([document(1, 4, 1), document(2, 3, 0, 1)], Counter({"corrupt sample": 1})),
        LoadedPack([], Counter({"corrupt sample": 1, "missing image": 1})),
        LoadedPack([document(3, 9, 2, 1)]),
    ]


@pytest.mark.parametrize(("length", "width"), [(12, 12), (None, 9)])
def test_rows(packs, length, width):
    batch = Collate(PAD, 8, length)(packs)
    for row, pack in enumerate(packs):
        ids, labels, positions, documents = [], [], [], []
        for number, loaded in enumerate(pack.documents):
            size = len(loaded.document.input_ids)
            ids += loaded.document.input_ids.tolist()
            labels += loaded.document.labels.tolist()
            positions += range(size)
            documents += [number] * size
        tail = width - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [PAD] * tail
        assert batch["labels"][row].tolist() == labels + [IGNORE] * tail
        assert batch["position_ids"][row].tolist() == positions + list(range(tail))
        assert batch["document_ids"][row].tolist() == documents + [-1] * tail
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert (batch[name].dtype, batch[name].shape) == (torch.int64, (3, width))


def test_document_table_finds_every_document(packs):
    batch = Collate(PAD, 8, 12)(packs)
    columns = ("doc_batch", "doc_start", "doc_length", "doc_source", "doc_sample")
    table = [tuple(values) for values in torch.stack([batch[c] for c in columns], 1).tolist()]
    assert table == [(0, 0, 4, 0, 1), (0, 4, 3, 1, 2), (2, 0, 9, 1, 3)]
    for row, start, length, _, sample in table:
        ids = batch["input_ids"][row, start : start + length]
        assert ids.tolist() == [100 * sample + i for i in range(length)]


def test_tiles_come_in_the_order_of_the_documents(packs):
    batch = Collate(PAD, 8, 12)(packs)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 3.0, 3.0]


def test_drops_add_up(packs):
    assert Collate(PAD, 8, 12)(packs)["drops"] == {"corrupt sample": 2, "missing image": 1}


def test_text_alone_and_nothing_at_all():
    batch = Collate(PAD, 8)([LoadedPack([document(1, 4)])])
    assert batch["pixel_values"].shape == (0, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    empty = Collate(PAD, 8)([LoadedPack()])
    assert empty["input_ids"].tolist() == [[PAD]]
    assert empty["document_ids"].tolist() == [[-1]]
    assert empty["doc_sample"].shape == (0,)


def test_a_pack_wider_than_the_rows_is_refused(packs):
    with pytest.raises(ValueError, match="a pack of 9 tokens does not fit rows of 8"):
        Collate(PAD, 8, 8)(packs)
