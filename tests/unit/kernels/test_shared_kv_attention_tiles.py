"""Tables of tiles: what they hold, in which order, and which ones are refused."""

import pytest
import torch

from ldistill_kernels import plan_tiles, shared_kv_attention
from ldistill_kernels.testing import make_case, make_queries, pack_documents

SPARSE = (1, 2**20)  # so much memory that every batch gets a table


def tiles_of(documents, group: int = 3) -> list[list[int]]:
    return plan_tiles(*make_queries(documents), group=group, memory=SPARSE).tolist()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 70])
def test_every_lane_is_in_one_tile_and_no_tile_spans_batch_rows(group):
    generator = torch.Generator().manual_seed(group)
    documents = pack_documents(5, 600, [3, 20, 90, 300], [0, 1, 5, 40], generator)
    batch, start, position = make_queries(documents)
    tiles = plan_tiles(batch, start, position, group=group, memory=SPARSE)
    assert tiles.dtype == torch.int32
    lanes = [lane for first, last in tiles.tolist() for lane in range(first, last)]
    assert sorted(lanes) == list(range(len(batch) * group))
    for first, last in tiles.tolist():
        assert 0 < last - first <= 64
        assert len(set(batch[first // group : (last - 1) // group + 1].tolist())) == 1


def test_tiles_begin_with_documents_and_the_longest_comes_first():
    documents = [[(0, 150, 5), (150, 200, 5)], [(0, 700, 30), (700, 100, 5)]]
    # 30 queries x 3 heads are 64 lanes and a rest; of the short ones the longer documents first.
    assert tiles_of(documents) == [[30, 94], [94, 120], [15, 30], [0, 15], [120, 135]]


def test_small_neighbours_share_a_tile_where_that_is_less_work():
    small = [[(20 * i, 20, 4) for i in range(6)]]
    assert tiles_of(small) == [[0, 60], [60, 72]]
    # 15 lanes each: one tile of 64 over both documents costs more than two of 16 over one each.
    assert tiles_of([[(0, 150, 5), (150, 150, 5)]]) == [[0, 15], [15, 30]]
    # Five lanes each: together they still fit 16, and no program gets longer than the longest.
    assert tiles_of([[(0, 64, 5), (64, 64, 5), (128, 800, 5)]], group=1) == [[10, 15], [0, 10]]


def test_no_table_where_there_is_nothing_to_gain():
    batch, start, position = make_queries([[(0, 100, 100)]])
    assert plan_tiles(batch, start, position, group=3, memory=(1, 100)) is None
    nothing = make_queries([[(0, 100, 0)]])
    assert plan_tiles(*nothing, group=3, memory=(1, 100)) is None


def case_and_table():
    case = make_case([[(0, 40, 5), (40, 40, 6)], [(0, 60, 4)]], seq=80, heads=(6, 2))
    return case, plan_tiles(*case.positional[3:], group=3, memory=SPARSE)


FOREIGN = {
    "group": (lambda t: plan_tiles(*make_queries([[(0, 40, 15)]]), group=2, memory=SPARSE),
              "each of the 45 lanes once"),
    "a tile less": (lambda t: t[:-1], "each of the 45 lanes once"),
    "a tile twice": (lambda t: torch.cat([t, t[:1]]), "each of the 45 lanes once"),
    "none": (lambda t: t[:0], "each of the 45 lanes once"),
    "batch rows": (lambda t: torch.tensor([[0, 45]], dtype=torch.int32), "two batch rows"),
    "backwards": (lambda t: torch.tensor([[0, 60], [60, 45]], dtype=torch.int32), "1 to 64 lanes"),
    "too wide": (lambda t: torch.tensor([[0, 70], [70, 45]], dtype=torch.int32), "1 to 64 lanes"),
    "type": (lambda t: t.long(), "tiles must be torch.int32, got torch.int64"),
    "shape": (lambda t: t[:, :1], r"tiles must have shape \(\d, 2\), got \(\d, 1\)"),
    "strides": (lambda t: t.T.contiguous().T, "tiles must be contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_table_of_other_queries_is_refused(name):
    case, tiles = case_and_table()
    change, message = FOREIGN[name]
    assert shared_kv_attention(*case.positional, tiles=tiles).isfinite().all()
    with pytest.raises(ValueError, match=message) as refused:
        shared_kv_attention(*case.positional, tiles=change(tiles))
    assert "tiles" in str(refused.value)
