"""A batch against the same rows laid out by plain loops."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldistill.data.collate import Collate, LoadedDocument, LoadedPack, merge
from ldistill.models.processor import IGNORE, Document

PAD = 9


def document(sample, length, tiles=0, source=0):
    ids = np.arange(length, dtype=np.int32) + 100 * sample
    labels = np.where(np.arange(length) % 3, IGNORE, ids + 1).astype(np.int32)
    pictures = {"pixel_values": torch.full((tiles, 3, 8, 8), float(sample))} if tiles else {}
    return LoadedDocument(sample, source, Document(ids, labels), pictures)


@pytest.fixture
def packs():
    return [
        LoadedPack([document(1, 4, 1), document(2, 3, 0, 1)], Counter({"corrupt sample": 1})),
        LoadedPack([], Counter({"corrupt sample": 1, "missing image": 1})),
        LoadedPack([document(3, 9, 2, 1)]),
    ]


@pytest.mark.parametrize(("length", "width"), [(12, 12), (None, 9)])
def test_rows(packs, length, width):
    batch = Collate(PAD, length)(packs)
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
    batch = Collate(PAD, 12)(packs)
    columns = ("doc_batch", "doc_start", "doc_length", "doc_source", "doc_sample")
    table = [tuple(values) for values in torch.stack([batch[c] for c in columns], 1).tolist()]
    assert table == [(0, 0, 4, 0, 1), (0, 4, 3, 1, 2), (2, 0, 9, 1, 3)]
    for row, start, length, _, sample in table:
        ids = batch["input_ids"][row, start : start + length]
        assert ids.tolist() == [100 * sample + i for i in range(length)]


def test_tiles_come_in_the_order_of_the_documents(packs):
    batch = Collate(PAD, 12)(packs)
    assert batch["pictures"]["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["pictures"]["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 3.0, 3.0]


def test_pictures_of_different_shapes_are_padded():
    one = {"pixel_values": torch.ones(1, 2, 3, 4), "sizes": torch.tensor([[3, 4]])}
    other = {"pixel_values": torch.full((2, 3, 2, 4), 2.0), "sizes": torch.tensor([[2, 4]] * 2)}
    merged = merge([one, {}, other])
    expected = torch.zeros(3, 3, 3, 4)
    expected[0, :2] = 1
    expected[1:, :, :2] = 2
    assert torch.equal(merged["pixel_values"], expected)
    assert merged["sizes"].tolist() == [[3, 4], [2, 4], [2, 4]]


def test_rotary_positions_lie_with_their_documents(packs):
    for pack in packs:
        for number, loaded in enumerate(pack.documents):
            axes = torch.arange(3)[:, None] + torch.arange(len(loaded.document.input_ids))
            pack.documents[number] = replace(loaded, rotary=axes)
    batch = Collate(PAD, 12)(packs)
    assert batch["rotary"].shape == (3, 3, 12)
    assert batch["rotary"][1, 0].tolist() == [1, 2, 3, 4, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch["rotary"][2, 2].tolist() == [*range(2, 11), 0, 1, 2]
    assert batch["answers"].tolist()[0] == [False, *[True] * 3, False, *[True] * 2, *[False] * 5]


def test_drops_add_up(packs):
    assert Collate(PAD, 12)(packs)["drops"] == {"corrupt sample": 2, "missing image": 1}


def test_text_alone_and_nothing_at_all():
    batch = Collate(PAD)([LoadedPack([document(1, 4)])])
    assert batch["pictures"] == {}
    empty = Collate(PAD)([LoadedPack()])
    assert empty["input_ids"].tolist() == [[PAD]]
    assert empty["document_ids"].tolist() == [[-1]]
    assert empty["doc_sample"].shape == (0,)


def test_a_pack_wider_than_the_rows_is_refused(packs):
    with pytest.raises(AssertionError):
        Collate(PAD, 8)(packs)
