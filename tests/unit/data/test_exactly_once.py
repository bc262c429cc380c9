"""10,000 documents over 16 shards: each seen once an epoch, for any ranks, batches and workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_data import make_processor, write_fake_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ldistill.common.samples import Sample, Turn
from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex
from ldistill.data.loader import PackSampler, make_loader
from ldistill.data.order import Order

DOCUMENTS, SHARDS, LIMIT = 10_000, 16, 512


@pytest.fixture(scope="module")
def order(tmp_path_factory) -> Order:
    """An order over an index of 16 shards of 625 documents, whose tars are never read."""
    root = tmp_path_factory.mktemp("index")
    lengths = np.random.default_rng(0).integers(16, 120, DOCUMENTS)
    write_fake_index(root, "vqav2", lengths, DOCUMENTS // SHARDS)
    index = ShardIndex.load(root)
    assert len(index.shards) == SHARDS
    return Order(index, limit=LIMIT, shuffle_window=4)


def seen(order: Order, ranks: int, batch: int, start: int, stop: int) -> list[np.ndarray]:
    """Packs that all ranks take of [start, stop), in order."""
    parts = []
    for rank in range(ranks):
        sampler = PackSampler(
            order, batch, rank=rank, world_size=ranks, start_pack=start, stop_pack=stop
        )
        parts.append([pack for packs in sampler for pack in packs])
    assert sum(map(len, parts)) == stop - start
    return [parts[i % ranks][i // ranks] for i in range(stop - start)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ranks=st.integers(1, 24),
    batch=st.integers(1, 9),
    epoch=st.integers(0, 2),
    cut=st.floats(0, 1),
    later_ranks=st.integers(1, 24),
)
def test_each_document_once_an_epoch_across_a_change_of_ranks(
    order, ranks, batch, epoch, cut, later_ranks
):
    """A run that goes on with other ranks in mid-epoch loses nothing and repeats nothing."""
    first = sum(len(order.epoch(e)) for e in range(epoch))
    last = first + len(order.epoch(epoch))
    middle = first + int(cut * (last - first))
    packs = seen(order, ranks, batch, first, middle) + seen(order, later_ranks, batch, middle, last)
    documents = np.concatenate(packs)
    assert np.array_equal(np.sort(documents), np.arange(DOCUMENTS))
    assert np.array_equal(documents, order.epoch(epoch).documents)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Real tars: 10,000 one-word documents in 16 shards."""
    root = tmp_path_factory.mktemp("tars")
    samples = {
        source: [Sample(str(n), source, (Turn(f"{n}?", "a"),)) for n in range(DOCUMENTS // 2)]
        for source in ("docvqa", "vqav2")
    }
    # A text-only sample is a header and a block of JSON: 1 KiB; eight shards a source.
    size = 1024 * (DOCUMENTS // 16)
    build_shards(samples, root, make_processor(), options=BuildOptions(shard_bytes=size))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2), (3, 1)])
def test_every_document_is_read_once_an_epoch(shards, ranks, workers):
    index = ShardIndex.load(shards)
    assert (len(index), len(index.shards)) == (DOCUMENTS, SHARDS)
    processor = make_processor()
    order = Order(index, limit=LIMIT)
    trained: list[int] = []
    for rank in range(ranks):
        loader: DataLoader = make_loader(
            index,
            processor,
            limit=LIMIT,
            batch_size=4,
            rank=rank,
            world_size=ranks,
            stop_pack=len(order.epoch(0)),
            order=order,
            num_workers=workers,
        )
        for batch in loader:
            assert batch["drops"] == {}
            trained += batch["doc_sample"].tolist()
    assert sorted(trained) == list(range(DOCUMENTS))
