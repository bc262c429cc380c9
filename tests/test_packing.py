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


def test_partners_that_fill_a_pack_find_each_other():
    lengths = np.array([700, 100, 900, 324, 500, 124, 524])
    packs = pack(lengths, np.arange(7), 1024)
    filled = [lengths[packs[n]].sum() for n in range(len(packs))]
    assert sorted(filled) == [100, 1024, 1024, 1024]


def test_a_document_above_the_limit_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, above the limit of 8"):
        pack(np.array([3, 9]), np.array([0, 1]), 8)


def test_single_gives_each_document_its_own_pack():
    packs = single(np.array([4, 2, 0]))
    assert [packs[n].tolist() for n in range(len(packs))] == [[4], [2], [0]]


@pytest.mark.parametrize("image_tokens", [64, 0])
@pytest.mark.parametrize("limit", [1024, 2048])
def test_rows_are_over_97_percent_real_on_the_papers_lengths(limit, image_tokens):
    lengths = table5_lengths(60_000, image_tokens)
    order = np.argsort(scramble(np.arange(len(lengths)), 0), kind="stable")
    order = order[lengths[order] <= limit]
    packs = pack(lengths, order, limit)
    assert lengths[packs.documents].sum() / (len(packs) * limit) >= 0.97


def test_lengths_show_no_trend_within_a_window():
    lengths = table5_lengths(40_000)
    lengths = lengths[lengths <= 1024]
    order = np.argsort(scramble(np.arange(len(lengths)), 0), kind="stable")[:8192]
    packs = pack(lengths, order, 1024)
    longest = np.array([lengths[packs[n]].max() for n in range(len(packs))])
    counts = np.array([len(packs[n]) for n in range(len(packs))])
    places = np.arange(len(packs))
    assert abs(np.corrcoef(places, longest)[0, 1]) < 0.1
    assert abs(np.corrcoef(places, counts)[0, 1]) < 0.1


PLAN = """
import resource, sys, time
from ldistill.data.index import ShardIndex
from ldistill.data.plan import Plan
start = time.monotonic()
summary = Plan(ShardIndex.load(sys.argv[1]), limit=1024).summary()
print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(summary.efficiency, summary.documents, summary.samples)
"""


def test_planning_600k_documents_is_quick_and_small(tmp_path):
    lengths = table5_lengths(600_100)
    write_fake_index(tmp_path, "vsr", lengths[::2], 2500)
    write_fake_index(tmp_path, "vqav2", lengths[1::2], 2500)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PLAN, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    seconds, memory, efficiency, documents, samples = map(float, done.stdout.split())
    assert samples >= 600_000
    assert documents == (lengths <= 1024).sum()
    assert seconds < 60
    assert memory < 2e9
    assert efficiency >= 0.97
