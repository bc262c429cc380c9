"""Order and packs: complete, within the limit, well filled, and functions of their inputs alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_data import table5_lengths, write_fake_index
from hypothesis import given, settings
from hypothesis import strategies as st

from ldistill.data.packing import epoch_order, pack, scramble, single

SIZES = np.array([5, 0, 7, 3, 11, 2, 6])


def splitmix(value, *salts):
    """SplitMix64 in Python's integers, one value at a time."""
    mask = 2**64 - 1
    for salt in (*salts, 0):
        value = (value + salt + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value


def test_scramble_is_splitmix():
    values = [0, 1, 2, 10**12]
    expected = [splitmix(value, 42, 7) for value in values]
    assert scramble(np.array(values), 42, 7).tolist() == expected
    # The published first output of SplitMix64 from state 0.
    assert splitmix(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_order_is_a_permutation_that_stays_within_windows_of_shards(window):
    order = epoch_order(SIZES, seed=3, epoch=1, window=window)
    assert sorted(order.tolist()) == list(range(SIZES.sum()))
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)[order]
    first_seen = list(dict.fromkeys(shard_of.tolist()))
    last = {shard: np.flatnonzero(shard_of == shard)[-1] for shard in first_seen}
    first = {shard: np.flatnonzero(shard_of == shard)[0] for shard in first_seen}
    for shard in first_seen:
        open_with_it = [
            s for s in first_seen if first[s] <= last[shard] and last[s] >= first[shard]
        ]
        assert len(open_with_it) <= 2 * window - 1
    if window == 1:
        assert all(last[s] - first[s] + 1 == SIZES[s] for s in first_seen)


def test_order_depends_on_seed_and_epoch_only():
    orders = {
        (seed, epoch): tuple(epoch_order(SIZES, seed, epoch, 3))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    np.random.seed(5)
    assert tuple(epoch_order(SIZES, 0, 1, 3)) == orders[0, 1]


def test_order_is_the_same_for_ever():
    """A resumed run relies on it: a change here breaks every run under way."""
    assert epoch_order(np.array([4, 3]), seed=1, epoch=2, window=2).tolist() == [
        3,
        4,
        0,
        5,
        2,
        6,
        1,
    ]


def test_order_refuses_an_empty_window():
    with pytest.raises(ValueError, match="at least one shard"):
        epoch_order(SIZES, 0, 0, 0)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=80),
    slack=st.integers(0, 40),
    window=st.integers(1, 90),
    seed=st.integers(0, 9),
)
def test_packs_hold_every_document_once_within_the_limit(lengths, slack, window, seed):
    lengths = np.array(lengths, dtype=np.int64)
    limit = int(lengths.max(initial=1)) + slack
    order = np.argsort(scramble(np.arange(len(lengths)), seed))
    packs = pack(lengths, order, limit, window)
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))
    for number in range(len(packs)):
        assert len(packs[number]) >= 1
        assert lengths[packs[number]].sum() <= limit


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([700, 900, 324, 500, 124, 524], [[0, 2], [1, 4], [3, 5]]),
        ([600, 100, 124, 300, 1000, 24], [[0, 3, 2], [1, 5], [4]]),
        ([512, 512, 1024, 1024], [[0, 1], [2], [3]]),
        ([424, 300, 300, 10, 10, 10], [[0, 1, 2], [3, 4, 5]]),
    ],
    ids=["one partner", "two partners", "none needed", "two of a size"],
)
def test_documents_that_fill_a_pack_find_each_other(lengths, expected):
    packs = pack(np.array(lengths), np.arange(len(lengths)), 1024)
    assert [packs[n].tolist() for n in range(len(packs))] == expected


def test_a_document_above_the_limit_is_refused():
    with pytest.raises(AssertionError):
        pack(np.array([3, 9]), np.array([0, 1]), 8)


def test_single_gives_each_document_its_own_pack():
    packs = single(np.array([4, 2, 0]))
    assert [packs[n].tolist() for n in range(len(packs))] == [[4], [2], [0]]


@pytest.mark.parametrize("image_tokens", [64, 0])
@pytest.mark.parametrize("limit", [1024, 2048])
def test_rows_are_over_99_percent_real_on_the_papers_lengths(limit, image_tokens):
    lengths = table5_lengths(60_000, image_tokens)
    order = np.argsort(scramble(np.arange(len(lengths)), 0), kind="stable")
    order = order[lengths[order] <= limit]
    packs = pack(lengths, order, limit)
    assert lengths[packs.documents].sum() / (len(packs) * limit) >= 0.99


def test_packs_keep_to_the_order():
    """Reading stays local, and no pack lies far from where its documents were drawn."""
    lengths = table5_lengths(40_000)
    lengths = lengths[lengths <= 1024]
    order = np.argsort(scramble(np.arange(len(lengths)), 0), kind="stable")
    packs = pack(lengths, order, 1024, window=500)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    firsts = np.array([place[packs[n]].min() for n in range(len(packs))])
    assert (np.diff(firsts) > 0).all()
    assert max(np.ptp(place[packs[n]]) for n in range(len(packs))) < 500


def test_packs_are_alike_over_the_epoch():
    """Little drift in lengths or in documents (and so pictures) per pack from start to end."""
    lengths = table5_lengths(60_000)
    lengths = lengths[lengths <= 1024]
    order = np.argsort(scramble(np.arange(len(lengths)), 0), kind="stable")
    packs = pack(lengths, order, 1024)
    counts = np.diff(packs.starts)
    longest = np.maximum.reduceat(lengths[packs.documents], packs.starts[:-1])
    for values in (counts, longest):
        parts = [part.mean() for part in np.array_split(values, 5)]
        assert max(parts) < 1.15 * min(parts)
    assert counts.std() < 2


ORDERING = """
import re, sys
from ldistill.data.index import ShardIndex
from ldistill.data.order import Order
summary = Order(ShardIndex.load(sys.argv[1]), limit=1024).summary()
# Not RUSAGE_SELF, which counts what the process was forked from.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
print(summary.efficiency, summary.documents, summary.samples)
"""


def test_ordering_600k_documents_is_small(tmp_path):
    lengths = table5_lengths(600_100)
    write_fake_index(tmp_path, "vsr", lengths[::2], 2500)
    write_fake_index(tmp_path, "vqav2", lengths[1::2], 2500)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", ORDERING, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    memory, efficiency, documents, samples = map(float, done.stdout.split())
    assert samples >= 600_000
    assert documents == (lengths <= 1024).sum()
    assert memory < 5e8
    assert efficiency >= 0.99
