"""Mixtures: every document exactly as often as asked, shares that are met, order as without one."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from helpers_data import write_fake_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldistill.data.index import ShardIndex
from ldistill.data.loader import PackSampler
from ldistill.data.mixture import parse_mix, repeats_of
from ldistill.data.order import Order

LIMIT = 256
SIZES = {"docvqa": 300, "vqav2": 170, "vsr": 41}


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    """Three sources in shards of 60, 30 and 9; some documents are too long."""
    root = tmp_path_factory.mktemp("index")
    rng = np.random.default_rng(0)
    for (name, size), shard in zip(SIZES.items(), (60, 30, 9), strict=True):
        write_fake_index(root, name, rng.integers(12, 270, size), shard)
    return ShardIndex.load(root)


def usable(index: ShardIndex, number: int) -> list[int]:
    first, last = index.source_starts[number : number + 2]
    return [n for n in range(first, last) if index.lengths[n] <= LIMIT]


amounts = st.one_of(
    st.integers(1, 3).map(Fraction),
    st.fractions(Fraction(1, 20), 4, max_denominator=50),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    repeats=st.tuples(amounts, amounts, amounts),
    seed=st.integers(0, 5),
    window=st.integers(1, 9),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    cut=st.floats(0, 1),
)
def test_each_document_comes_exactly_as_often_as_asked(index, repeats, seed, window, ranks, cut):
    """Three epochs on two numbers of ranks, against counting by hand."""
    mix = ",".join(f"{name}={r}" for name, r in zip(SIZES, repeats, strict=True))
    order = Order(index, limit=LIMIT, seed=seed, shuffle_window=window, mix=mix)
    ends = np.cumsum([0, *(len(order.epoch(epoch)) for epoch in range(3))])
    middle = int(cut * ends[-1])
    packs = taken(order, ranks[0], 0, middle) + taken(order, ranks[1], middle, int(ends[-1]))
    assert all(index.lengths[pack].sum() <= LIMIT for pack in packs)
    total: Counter[int] = Counter()
    for epoch in range(3):
        counts = Counter(np.concatenate(packs[ends[epoch] : ends[epoch + 1]]).tolist())
        total += counts
        for number, repeat in enumerate(repeats):
            documents = usable(index, number)
            asked = [repeat * len(documents) * e // 1 for e in (epoch, epoch + 1)]
            assert sum(counts[d] for d in documents) == asked[1] - asked[0]
            assert {counts[d] for d in documents} <= {repeat // 1, -(-repeat // 1)}
            often = [total[d] for d in documents]
            assert max(often) - min(often) <= 1, "over epochs no document is preferred"
        assert counts.keys() <= {d for n in range(3) for d in usable(index, n)}


def taken(order: Order, ranks: int, start: int, stop: int) -> list[np.ndarray]:
    """Packs [start, stop) as that many ranks take them."""
    samplers = [
        iter(PackSampler(order, 1, rank=r, world_size=ranks, start_pack=start, stop_pack=stop))
        for r in range(ranks)
    ]
    return [next(samplers[n % ranks])[0] for n in range(stop - start)]


def test_an_epoch_takes_another_subset_than_the_one_before(index):
    order = Order(index, limit=LIMIT, mix="docvqa=0.5")
    halves = [set(np.flatnonzero(order.counts(epoch)[:300])) for epoch in range(3)]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == set(usable(index, 0))
    again = Order(index, limit=LIMIT, mix="docvqa=0.5")
    assert np.array_equal(again.epoch(1).documents, order.epoch(1).documents)
    other = Order(index, limit=LIMIT, mix="docvqa=0.5", seed=1)
    assert not np.array_equal(other.counts(0), order.counts(0))


def test_a_mixture_of_ones_is_none(index):
    """Runs from before mixtures go on as they were."""
    plain, ones = Order(index, limit=LIMIT), Order(index, limit=LIMIT, mix="vqav2=1,vsr=1.0")
    for epoch in range(2):
        assert np.array_equal(plain.epoch(epoch).documents, ones.epoch(epoch).documents)
    assert plain.identity == ones.identity != Order(index, limit=LIMIT, mix="vsr=2").identity


def test_repeats_lie_apart(index):
    """A second time is another visit to the shard: hardly ever in the pack of the first."""
    order = Order(index, limit=LIMIT, mix="vqav2=2,docvqa=2,vsr=2", shuffle_window=4)
    packs = list(islice(order.packs_from(0), len(order.epoch(0))))
    twice = sum(len(set(pack.tolist())) < len(pack) for pack in packs)
    assert twice < 0.05 * len(packs)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(50, 10_000), min_size=2, max_size=5),
    shares=st.lists(st.integers(1, 60), min_size=1, max_size=4),
)
def test_shares_are_of_the_epochs_tokens_or_refused(tokens, shares):
    names = [f"s{n}" for n in range(len(tokens))]
    named = dict(zip(names, shares[: len(tokens)]))
    mix = parse_mix(",".join(f"{name}={share}%" for name, share in named.items()))
    sizes, asked = dict(zip(names, tokens)), sum(named.values())
    rest = sum(size for name, size in sizes.items() if name not in named)
    if not rest and asked == 100:
        return  # has a test of its own
    if not (rest and asked < 100):
        with pytest.raises(ValueError, match="shares of" if rest else "sum to"):
            repeats_of(mix, names, [50] * len(tokens), tokens)
        return
    whole = Fraction(100 * rest, 100 - asked)
    if any(
        not Fraction(1, 50) <= whole * share / 100 / sizes[n] <= 1 for n, share in named.items()
    ):
        with pytest.raises(ValueError, match=r"times what it has|less than one"):
            repeats_of(mix, names, [50] * len(tokens), tokens)
        return
    repeats = repeats_of(mix, names, [50] * len(tokens), tokens)
    read = [r * size for r, size in zip(repeats, tokens, strict=True)]
    for name, part, repeat in zip(names, read, repeats, strict=True):
        expected = Fraction(named[name], 100) if name in named else repeat * sizes[name] / whole
        assert part / sum(read) == expected
        assert name in named or repeat == 1


def test_shares_of_all_sources_read_as_much_as_the_scarcest_allows():
    mix = parse_mix("a=50%,b=30%,c=20%")
    repeats = repeats_of(mix, ["a", "b", "c"], [90, 90, 90], [1000, 300, 1000])
    assert repeats == [Fraction(1, 2), 1, Fraction(1, 5)]


def test_the_summary_says_what_an_epoch_reads(index):
    order = Order(index, limit=LIMIT, mix="vqav2=10%,docvqa=2")
    summary, documents = order.summary(), order.epoch(0).documents
    assert summary.documents == len(documents)
    assert summary.tokens == index.lengths[documents].sum()
    for number, line in enumerate(summary.sources.values()):
        chosen = documents[index.source_of(documents) == number]
        assert line["documents"] == len(chosen)
        assert line["tokens"] == index.lengths[chosen].sum()
        assert line["share"] == line["tokens"] / summary.tokens
    assert summary.sources["vqav2"]["share"] == pytest.approx(0.1, abs=0.02)
    assert summary.sources["docvqa"]["repeats"] == 2
    assert f"{len(documents)} documents out of 511 samples" in str(summary)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("vqa=2", "names vqa, which this run does not read. Did you mean 'vqav2'"),
        ("vqav2", "mix 'vqav2': write source=2"),
        ("vqav2=often", "mix 'vqav2=often': write source=2"),
        ("vqav2=0", "above 0; a source is left out with --sources"),
        ("vqav2=nan", "mix 'vqav2=nan': write"),
        ("convex", "and KD combine is --combine"),
        ("vqav2=2,VQAv2=3", "mix names vqav2 twice"),
        ("vsr=0.001", "mix vsr is less than one of its"),
        ("vsr=90%", "tokens is .* times what it has: ask for less, or .* repeat with vsr="),
        ("vsr=60%,docvqa=40%", "shares of 100%, which leaves nothing to the other sources"),
        ("vsr=40%,docvqa=40%,vqav2=10%", "gives every source a share, and they sum to 90%"),
    ],
)
def test_a_mixture_that_cannot_be_is_a_sentence(index, mix, message):
    with pytest.raises(ValueError, match=message):
        Order(index, limit=LIMIT, mix=mix)
