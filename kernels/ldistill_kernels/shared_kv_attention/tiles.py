"""A table of tiles for sparse queries, made on the CPU where the queries are planned.

Without one a tile is so many lanes in a row, whatever documents they belong to, and every document
in it costs as much as if it had all lanes. Short answers fill such tiles badly: five tokens times
three heads are 15 lanes of 64. Tiles of a table begin where documents do, and one of up to 16 lanes
is run as that many. Small neighbours share a tile where this saves work. The longest come first, so
that no long one is left when the others are done.
"""

import itertools

import torch
from torch import Tensor

from ldistill_kernels.shared_kv_attention.configs import is_dense

TABLE_LANES = 64  # lanes, (query, head of the group) pairs, that a tile may hold
SMALL_TILE = 16  # a tile of at most so many runs as one of 16
_COLUMNS = 64  # memory positions of a step
_STARTUP = 2  # steps that a program costs before its first
_WIDE = 2  # a step of 64 lanes, in steps of 16
_CHAIN = 16  # what a shared tile may cost though no tile of one document costs so much


def plan_tiles(
    batch: Tensor, start: Tensor, position: Tensor, *, group: int, memory: tuple[int, int]
) -> Tensor | None:
    """Tiles for `shared_kv_attention(..., tiles=)`, the same for every layer of a model.

    Args:
        batch, start, position: int32 or int64 [queries] on the CPU, as passed there.
        group: query heads a key head.
        memory: (batch, seq) of k.

    Returns:
        int32 [tiles, 2]: first lane, and the one after the last, of lanes numbered
        query x group + head of the group; None where no table is needed, because there are no
        queries or so many that few tiles straddle documents.
    """
    queries = batch.shape[0]
    if queries == 0 or is_dense(queries, *memory):
        return None
    # A document ends where the batch row changes or where nothing before is seen any more.
    new = (batch[1:] != batch[:-1]) | (start[1:] > position[:-1])
    edges = [0, *(torch.nonzero(new).flatten() + 1).tolist(), queries]
    rows, starts, positions = batch.tolist(), start.tolist(), position.tolist()
    pieces = [
        (lane, min(lane + TABLE_LANES, end * group))
        for begin, end in itertools.pairwise(edges)
        for lane in range(begin * group, end * group, TABLE_LANES)
    ]

    def cost(first: int, last: int) -> int:
        span = positions[(last - 1) // group] + 1 - starts[first // group]
        steps = -(-span // _COLUMNS) + _STARTUP
        return steps * (1 if last - first <= SMALL_TILE else _WIDE)

    longest = max(_CHAIN, *(cost(*piece) for piece in pieces))
    tiles = [pieces[0]]
    for piece in pieces[1:]:
        both = (tiles[-1][0], piece[1])
        fits = (
            both[1] - both[0] <= TABLE_LANES
            and rows[both[0] // group] == rows[(both[1] - 1) // group]
        )
        if fits and cost(*both) <= min(cost(*tiles[-1]) + cost(*piece), longest):
            tiles[-1] = both
        else:
            tiles.append(piece)
    tiles.sort(key=lambda tile: -cost(*tile))
    return torch.tensor(tiles, dtype=torch.int32)


def misfit(tiles: Tensor, batch: Tensor, group: int) -> str | None:
    """What is wrong with a table for these queries; None where it fits."""
    lanes = batch.shape[0] * group
    first, last = (x.long() for x in tiles[tiles[:, 0].argsort(stable=True)].T)
    edges = torch.cat([first, last.new_tensor([lanes])])
    if not torch.equal(edges, torch.cat([last.new_zeros(1), last])):
        return f"its tiles do not hold each of the {lanes} lanes once"
    if bool(((last <= first) | (last - first > TABLE_LANES)).any()):
        return f"a tile does not have 1 to {TABLE_LANES} lanes"
    if bool((batch[first // group] != batch[(last - 1) // group]).any()):
        return "a tile holds queries of two batch rows"
    return None
