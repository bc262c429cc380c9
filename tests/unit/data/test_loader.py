"""Plans and loaders: nothing vanishes, ranks and workers change nothing, position is a number."""

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import assert_same_batches, make_processor, make_samples, picture

from ldistill.common.samples import Sample, Turn
from ldistill.data.archive import BadSample
from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex
from ldistill.data.loader import PackSampler, make_loader, truncate
from ldistill.data.order import NO_ANSWER_LEFT, TOO_LONG, Order
from ldistill.models.processor import IGNORE, Document

LIMIT = 128
EMPTY = torch.zeros(0, 3, 32, 32)
LONG = Turn("go on", " ".join("abcdefghij") * 12)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    samples = {
        "docvqa": make_samples("docvqa", 60),
        "vsr": make_samples("vsr", 40, images=2),
        "vqav2": make_samples("vqav2", 20, images=0),
    }
    build_shards(
        samples, root, make_processor(max_images=2), options=BuildOptions(shard_bytes=30_000)
    )
    return root


@pytest.fixture
def root(built, tmp_path):
    """A copy to damage."""
    return shutil.copytree(built, tmp_path / "shards")


@pytest.fixture(scope="module")
def processor():
    return make_processor(max_images=2)


# plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_every_document_once_and_flows_into_the_next(built, packing):
    order = Order(ShardIndex.load(built), limit=LIMIT, packing=packing, shuffle_window=3)
    sizes = [len(order.epoch(e)) for e in range(3)]
    stream = list(islice(order.packs_from(0), sum(sizes)))
    start = 0
    for size in sizes:
        documents = np.concatenate(stream[start : start + size])
        assert sorted(documents.tolist()) == list(range(120))
        start += size
    assert not np.array_equal(np.concatenate(stream[: sizes[0]]), order.epoch(1).documents)
    for first in (0, 1, sizes[0] - 1, sizes[0], sizes[0] + 5, sizes[0] + sizes[1]):
        resumed = list(islice(order.packs_from(first), 4))
        assert all(map(np.array_equal, resumed, stream[first : first + 4]))


def test_the_plan_follows_the_seed(built):
    index = ShardIndex.load(built)
    first, again, other = (Order(index, limit=LIMIT, seed=s).epoch(0).documents for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_summary_counts_add_up(built):
    index = ShardIndex.load(built)
    summary = Order(index, limit=LIMIT).summary()
    assert (summary.samples, summary.documents, summary.drops) == (120, 120, {})
    assert summary.tokens == index.lengths.sum()
    assert summary.efficiency == summary.tokens / (summary.packs * LIMIT) > 0.9
    assert "120 of 120 samples" in str(summary)
    assert Order(index, limit=LIMIT, packing=False).summary().packs == 120


def test_long_documents_are_dropped_truncated_or_refused(built):
    index = ShardIndex.load(built)
    limit = int(np.sort(index.lengths)[-6])
    long = int((index.lengths > limit).sum())
    dropped = Order(index, limit=limit).summary()
    assert (dropped.drops, dropped.documents) == ({TOO_LONG: long}, 120 - long)
    cut = Order(index, limit=limit, over_long="truncate").summary()
    assert (cut.drops, cut.truncated, cut.documents) == ({}, long, 120)
    with pytest.raises(ValueError, match=rf"{long} documents are longer than the limit of {limit}"):
        Order(index, limit=limit, over_long="error")
    assert Order(index, limit=int(index.lengths.max()), over_long="error").summary().drops == {}


def test_a_document_cut_before_its_answer_is_dropped(tmp_path, processor):
    question = Turn("why " * 50, "because")
    samples = [
        *make_samples("vsr", 5),
        Sample("q", "vsr", (question,)),
        Sample("l", "vsr", (LONG,)),
    ]
    build_shards({"vsr": samples}, tmp_path, processor)
    summary = Order(ShardIndex.load(tmp_path), limit=LIMIT, over_long="truncate").summary()
    assert (summary.drops, summary.truncated, summary.documents) == ({NO_ANSWER_LEFT: 1}, 1, 6)


@pytest.mark.parametrize("prompt", range(4, 10))
def test_truncation_and_its_plan_agree_at_the_border(prompt):
    """A document keeps a label after truncation exactly when its prompt ends before limit - 1."""
    labels = np.full(12, IGNORE, dtype=np.int32)
    labels[prompt:11] = 7
    cut = truncate(Document(np.arange(12, dtype=np.int32), labels), 8)
    assert len(cut.input_ids) == len(cut.labels) == 8
    assert cut.labels[-1] == IGNORE
    assert (cut.supervised > 0) == (prompt < 8 - 1)


def test_impossible_plans_are_refused(built):
    index = ShardIndex.load(built)
    with pytest.raises(ValueError, match="no document of docvqa fits the limit of 12 tokens"):
        Order(index, limit=12)


# ranks and position ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "batch"), [(1, 8), (2, 4), (4, 2), (2, 2), (8, 1)])
def test_steps_consume_the_same_packs_on_any_number_of_ranks(built, ranks, batch):
    order = Order(ShardIndex.load(built), limit=LIMIT)
    per_step = 8
    stream = [tuple(pack) for pack in islice(order.packs_from(0), 8 * per_step)]
    samplers = [iter(PackSampler(order, batch, rank=r, world_size=ranks)) for r in range(ranks)]
    for step in range(8):
        taken = [[] for _ in range(ranks)]
        for _ in range(per_step // (ranks * batch)):
            for rank, sampler in enumerate(samplers):
                taken[rank] += [tuple(pack) for pack in next(sampler)]
        window = stream[step * per_step : (step + 1) * per_step]
        assert [taken[i % ranks][i // ranks] for i in range(per_step)] == window


def test_a_sampler_resumes_at_a_pack_and_stops_at_one(built):
    order = Order(ShardIndex.load(built), limit=LIMIT)
    size = len(order.epoch(0))
    options = {"rank": 1, "world_size": 2, "stop_pack": 2 * size}
    whole = list(PackSampler(order, 3, **options))
    resumed = list(PackSampler(order, 3, start_pack=12, **options))
    assert [len(b) for b in resumed] == [len(b) for b in whole[2:]]
    for one, other in zip(resumed, whole[2:], strict=True):
        assert all(map(np.array_equal, one, other))


# loaders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_batches_hold_the_documents_as_the_processor_encodes_them(built, processor, packing):
    index = ShardIndex.load(built)
    loader = make_loader(index, processor, limit=LIMIT, batch_size=2, stop_pack=12, packing=packing)
    for batch in loader:
        tiles = []
        for number, sample in enumerate(batch["doc_sample"].tolist()):
            stored = index.read(sample)
            cut = [_tiles(processor, data) for data in stored.images]
            tiles += cut
            document = processor.encode(stored.turns, [(1, 1)] * len(cut))
            row, start = batch["doc_batch"][number], batch["doc_start"][number]
            place = slice(start, start + batch["doc_length"][number])
            assert batch["input_ids"][row, place].tolist() == document.input_ids.tolist()
            assert batch["labels"][row, place].tolist() == document.labels.tolist()
            assert index.sources[batch["doc_source"][number]] == stored.source
        assert bool(tiles) == bool(batch["pictures"])
        if tiles:
            assert torch.equal(batch["pictures"]["pixel_values"], torch.cat(tiles))
        per_tile = processor.images.tokens_per_tile
        image_tokens = (batch["input_ids"] == processor.image_token_id).sum()
        assert image_tokens == per_tile * len(batch["pictures"].get("pixel_values", ()))
        if packing:
            assert batch["input_ids"].shape == (2, LIMIT)
        else:
            assert batch["input_ids"].shape[1] == batch["doc_length"].max()


def _tiles(processor, data):
    return processor.pictures([processor.load_image(data)])["pixel_values"]


def test_tiled_pictures_match_their_tokens(tmp_path):
    processor = make_processor(tiling=True, max_images=2)
    pictures = [(picture(40, 30), picture(64, 64)), (picture(90, 20),), ()]
    samples = [Sample(str(n), "vsr", (Turn("q", "a"),), p) for n, p in enumerate(pictures)]
    build_shards({"vsr": samples}, tmp_path, processor)
    index = ShardIndex.load(tmp_path)
    [batch] = make_loader(index, processor, limit=256, batch_size=1, stop_pack=1)
    grids = {(40, 30): (3, 4), (64, 64): (4, 4), (90, 20): (1, 4)}
    assert len(batch["pictures"]["pixel_values"]) == sum(
        rows * cols + 1 for rows, cols in grids.values()
    )
    tile = 0
    for number, sample in enumerate(batch["doc_sample"].tolist()):
        place = slice(batch["doc_start"][number], None)
        row = batch["input_ids"][batch["doc_batch"][number], place][: batch["doc_length"][number]]
        count = int((row == processor.image_token_id).sum()) // processor.images.tokens_per_tile
        cut = [_tiles(processor, data) for data in pictures[sample]]
        assert torch.equal(
            batch["pictures"]["pixel_values"][tile : tile + count], torch.cat([*cut, EMPTY])
        )
        tile += count
    assert tile == len(batch["pictures"]["pixel_values"])


def test_workers_change_nothing(built, processor):
    index = ShardIndex.load(built)
    options = {"limit": LIMIT, "batch_size": 2, "stop_pack": 16, "start_pack": 3}
    plain = list(make_loader(index, processor, **options))
    for workers in (1, 2):
        with_workers = make_loader(index, processor, num_workers=workers, **options)
        assert_same_batches(plain, with_workers)


def test_spawned_workers_change_nothing(built, processor):
    index = ShardIndex.load(built)
    options = {"limit": LIMIT, "batch_size": 2, "stop_pack": 4}
    plain = list(make_loader(index, processor, **options))
    spawned = make_loader(
        index, processor, num_workers=1, multiprocessing_context="spawn", **options
    )
    assert_same_batches(plain, spawned)


def test_resuming_gives_the_batches_of_the_uninterrupted_run(built, processor):
    index = ShardIndex.load(built)
    size = len(Order(index, limit=LIMIT).epoch(0))
    options = {"limit": LIMIT, "batch_size": 2, "stop_pack": size + 8}
    whole = list(make_loader(index, processor, **options))
    for done in (1, size // 2, size // 2 + 2):
        resumed = make_loader(index, processor, start_pack=2 * done, **options)
        assert_same_batches(resumed, whole[done:])


def test_a_picture_beyond_the_length_limit_is_a_bad_sample(tmp_path):
    """Its features would go to the places of the next document's."""
    processor, turns = make_processor(max_images=2), (LONG, Turn("and this?", "no", (0,)))
    build_shards({"vsr": [Sample("l", "vsr", turns, (picture(),))]}, tmp_path, processor)
    options = {"limit": 64, "batch_size": 1, "over_long": "truncate", "stop_pack": 1}
    with pytest.raises(BadSample, match="picture beyond the length limit"):
        list(make_loader(ShardIndex.load(tmp_path), processor, **options))


def test_truncated_documents_in_a_batch(tmp_path, processor):
    build_shards({"vsr": [Sample("l", "vsr", (LONG,), (picture(),))]}, tmp_path, processor)
    index = ShardIndex.load(tmp_path)
    loader = make_loader(
        index, processor, limit=64, batch_size=1, over_long="truncate", stop_pack=1
    )
    [batch] = loader
    document = processor.encode((LONG,), [(1, 1)])
    assert len(document.input_ids) > 64
    assert batch["input_ids"][0].tolist() == document.input_ids[:64].tolist()
    assert batch["labels"][0].tolist() == [*document.labels[:63].tolist(), IGNORE]


def test_a_loader_checks_shards_before_the_first_batch(root, processor):
    index = ShardIndex.load(root)
    with pytest.raises(ValueError, match="built for another student"):
        make_loader(index, make_processor(tile_size=64), limit=LIMIT, batch_size=1)
    tar = root / "vsr/vsr-train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"vsr-train-000000\.tar has 5000 bytes instead"):
        make_loader(index, processor, limit=LIMIT, batch_size=1)


# bad samples -------------------------------------------------------------------------------------


def damage(root, index, sample, where=0.5):
    """Flip one byte of a sample; its size stays."""
    shard, record, key = index.locate(sample)
    with Path(shard.path).open("r+b") as file:
        file.seek(int(record["offset"]) + int(record["size"] * where))
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 255]))
    return shard, key


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_stops_the_run_with_its_place(root, processor, workers):
    index = ShardIndex.load(root)
    shard, key = damage(root, index, 17)
    loader = make_loader(index, processor, limit=LIMIT, batch_size=4, num_workers=workers)
    message = f"^sample {key} in {shard.path}: corrupt sample"
    with pytest.raises(BadSample, match=message) as caught:
        list(islice(loader, 60))
    assert (caught.value.reason, caught.value.key) == ("corrupt sample", key)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_can_be_dropped_and_is_counted(root, processor, workers):
    index = ShardIndex.load(root)
    for sample in (3, 17, 80):
        damage(root, index, sample)
    size = len(Order(index, limit=LIMIT).epoch(0))
    loader = make_loader(
        index,
        processor,
        limit=LIMIT,
        batch_size=4,
        stop_pack=size,
        on_bad_sample="drop",
        num_workers=workers,
    )
    trained, drops = [], Counter()
    for batch in loader:
        trained += batch["doc_sample"].tolist()
        drops.update(batch["drops"])
    assert drops == {"corrupt sample": 3}
    assert sorted([*trained, 3, 17, 80]) == list(range(120))


def test_a_shard_that_vanishes_during_the_run(root, processor):
    index = ShardIndex.load(root)
    options = {
        "limit": LIMIT,
        "batch_size": 1,
        "stop_pack": len(Order(index, limit=LIMIT).epoch(0)),
    }
    loader = make_loader(index, processor, on_bad_sample="drop", **options)
    shard = index.shards[-1]
    shutil.move(shard.path, shard.path + ".gone")
    drops = Counter()
    for batch in loader:
        drops.update(batch["drops"])
    assert drops == {"unreadable shard": shard.samples}


def test_a_shard_cut_during_the_run(root, processor):
    index = ShardIndex.load(root)
    options = {
        "limit": LIMIT,
        "batch_size": 1,
        "stop_pack": len(Order(index, limit=LIMIT).epoch(0)),
    }
    loader = make_loader(index, processor, on_bad_sample="drop", **options)
    last = index.shards[-1]
    start = int(index.samples["offset"][last.start + last.samples - 1])
    with Path(last.path).open("r+b") as file:
        file.truncate(start + 10)
    drops = Counter()
    for batch in loader:
        drops.update(batch["drops"])
    assert drops == {"truncated shard": 1}
