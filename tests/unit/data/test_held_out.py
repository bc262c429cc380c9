"""What is held out: a share by what a document is, whatever the shards, seeds and epochs."""

from fractions import Fraction

import numpy as np
import pytest
from helpers_data import make_processor, make_samples, write_fake_index

from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.held_out import held_out, parse_share
from ldistill.data.index import ShardIndex
from ldistill.data.order import Order


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    root = tmp_path_factory.mktemp("index")
    rng = np.random.default_rng(0)
    for name, size, shard in (("docvqa", 3000, 250), ("vsr", 2000, 90)):
        write_fake_index(root, name, rng.integers(12, 90, size), shard)
    return ShardIndex.load(root)


def test_the_share_is_met_in_every_source(index):
    for share in (0.01, 0.1, 0.5):
        mask = held_out(index, parse_share(str(share)))
        assert np.array_equal(mask, held_out(index, parse_share(f"{100 * share:g}%")))
        for number in range(2):
            of_source = mask[slice(*index.source_starts[number : number + 2])]
            error = 4 * (share * (1 - share) / len(of_source)) ** 0.5
            assert of_source.mean() == pytest.approx(share, abs=error)
    small, large = (held_out(index, Fraction(n, 100)) for n in (1, 5))
    assert (small <= large).all(), "a larger share holds out what a smaller one did"


@pytest.mark.parametrize("mix", [None, "vsr=2"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_what_is_left_comes_in_the_order_of_before(index, epoch, mix):
    held = held_out(index, Fraction(1, 10))
    options = {"limit": 90, "packing": False, "shuffle_window": 5, "seed": 3, "mix": mix}
    whole = Order(index, **options).epoch(epoch).documents
    left = Order(index, chosen=~held, **options).epoch(epoch).documents
    assert np.array_equal(left, whole[~held[whole]])
    validation = Order(index, limit=90, chosen=held)
    assert sorted(validation.epoch(0).documents) == np.flatnonzero(held).tolist()
    summary = validation.summary()
    assert (summary.samples, summary.documents) == (held.sum(), held.sum())


def test_shards_built_otherwise_hold_out_the_same(tmp_path):
    found = []
    for name, size, count in (("one", 2**20, 60), ("many", 3000, 60), ("longer", 9000, 90)):
        processor = make_processor(tokens_per_tile=4 if name == "one" else 9)
        samples = {"vsr": make_samples("vsr", count, images=0)}
        build_shards(samples, tmp_path / name, processor, options=BuildOptions(shard_bytes=size))
        index = ShardIndex.load(tmp_path / name)
        mask = held_out(index, Fraction(1, 5))
        found.append({index.locate(n)[2] for n in np.flatnonzero(mask)})
    assert found[0] == found[1] == {key for key in found[2] if int(key[-9:]) < 60}
    assert 4 < len(found[0]) < 20


@pytest.mark.parametrize("text", ["0", "1", "100%", "150%", "-1%", "many", "", "1/0", "nan"])
def test_a_share_that_is_none(text):
    with pytest.raises(ValueError, match="write a share of the documents"):
        parse_share(text)


def test_nothing_held_out_and_nothing_left_are_sentences(index, tmp_path):
    with pytest.raises(ValueError, match=r"validation 1e-07 of 5000 documents is none"):
        held_out(index, Fraction(1, 10_000_000))
    write_fake_index(tmp_path, "vsr", np.array([20]), 1)
    write_fake_index(tmp_path, "docvqa", np.full(50, 20), 10)
    with pytest.raises(ValueError, match="holds out all 1 documents of vsr"):
        held_out(ShardIndex.load(tmp_path), Fraction(99, 100))
