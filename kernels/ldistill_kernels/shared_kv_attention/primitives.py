"""Triton pieces that the forward and the backward share: spans of queries, loads, products.

A memory position has one flat number, batch row x seq + position, so what a query sees is a
half-open interval [low, high) of one line. Queries are sorted, hence the intervals of a tile form
one run per document; `next_run` walks from run to run with scalars only, and the columns of a run
are read in an inner loop that Triton can pipeline. Every column of a run is seen by some query.

A head dim is held as two tiles, the second absent (`D2 == 0`) when the first covers it.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ldistill_kernels.shared_kv_attention.tiles import SMALL_TILE, TABLE_LANES

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
NOTHING = tl.constexpr(2**31 - 1)  # low = high = NOTHING: a query that sees nothing
TILE = tl.constexpr(TABLE_LANES)


@triton.jit
def memory_spans(
    query, batch, start, position, batches, seq, window, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """[low, high) of each query in the flat memory; never outside it, whatever the arrays hold."""
    b = tl.load(batch + query).to(tl.int32)  # [lanes]
    low = tl.maximum(tl.load(start + query).to(tl.int32), 0)
    high = tl.minimum(tl.load(position + query).to(tl.int32), seq - 1) + 1
    if HAS_WINDOW:
        low = tl.maximum(low, high - window)
    sees = (b >= 0) & (b < batches) & (high > low)
    return tl.where(sees, b * seq + low, NOTHING), tl.where(sees, b * seq + high, NOTHING)


@triton.jit
def second_spans(query, start2, end2, seq2):
    """[low, high) of each query in the second segment."""
    low = tl.maximum(tl.load(start2 + query).to(tl.int32), 0)
    high = tl.minimum(tl.load(end2 + query).to(tl.int32), seq2)
    return tl.where(high > low, low, NOTHING), tl.where(high > low, high, NOTHING)


@triton.jit
def run_at(first, low, high, HAS_WINDOW: tl.constexpr):
    """End of the run that starts at `first`, and the end of its part that all queries see.

    In a window each query of a document starts later than the one before: the run is that of all
    that start before the first of them ends.
    """
    inside = low <= first
    if HAS_WINDOW:
        inside = low < tl.max(tl.where(inside, high, 0), 0)
    # Lanes of later documents have not begun: they bound neither end.
    full_end = tl.maximum(tl.min(tl.where(inside, high, first), 0), first)
    return tl.max(tl.where(inside, high, 0), 0), full_end


@triton.jit
def next_run(end, low, high):
    """First column at or after `end` that some query sees, NOTHING when there is none."""
    return tl.min(tl.where(high > end, tl.maximum(low, end), NOTHING), 0)


@triton.jit
def whole_run(first, low, high, seq, HAS_WINDOW: tl.constexpr):
    """End of what any lane sees, and of its part that all see, where `first` is the least `low`.

    For lanes of one batch row: their documents, if several, are walked as one run. The end stays
    in the batch row of `first` whatever lanes there are.
    """
    origin = first // seq * seq
    end = tl.max(tl.where(high < NOTHING, high, 0), 0)
    end = origin + tl.minimum(end - origin, seq)
    last_low = tl.max(low, 0)
    one_document = last_low < tl.min(high, 0) if HAS_WINDOW else last_low <= first
    # Where no lane sees anything `first` is NOTHING and the end 0: no part may reach beyond it.
    return end, tl.minimum(tl.where(one_document, tl.min(high, 0), first), end)


@triton.jit
def full_part(
    first, full_end, end, low, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """Where in a run the tiles of columns begin and end that every lane sees."""
    begin = first
    if HAS_WINDOW:  # in whole tiles from `first` on, so that every loop has the same step
        begin += tl.cdiv(tl.minimum(tl.max(low, 0), end) - first, BLOCK_N) * BLOCK_N
    return begin, begin + tl.maximum(full_end - begin, 0) // BLOCK_N * BLOCK_N


@triton.jit
def table_lanes(tiles, tile, lanes, BLOCK_M: tl.constexpr):
    """[first, last) of a program; entries of the table wider than BLOCK_M have several programs."""
    PARTS: tl.constexpr = TILE // BLOCK_M  # programs of an entry, some of them without lanes
    entry = tiles + tile // PARTS * 2
    first = tl.maximum(tl.load(entry), 0) + tile % PARTS * BLOCK_M
    return first, tl.minimum(tl.minimum(tl.load(entry + 1), lanes), first + BLOCK_M)


@triton.jit
def load_tile(
    base, offsets, keep, D0: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """[len(offsets), D] elements from column D0 on; zeros where not kept or beyond the head dim."""
    d = D0 + tl.arange(0, D)
    pointers = base + offsets[:, None] + d[None, :]
    # Masked only where something lies outside: a plain load has no predicates to compute.
    if D0 + D > HEAD_DIM:
        inside = d[None, :] < HEAD_DIM
        if MASKED:
            inside = inside & keep[:, None]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_pair(
    base, offsets, keep, D1: tl.constexpr, D2: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Both tiles of a head dim; the second repeats the first when there is none."""
    first = load_tile(base, offsets, keep, 0, D1, HEAD_DIM, MASKED)
    second = first
    if D2 > 0:
        second = load_tile(base, offsets, keep, D1, D2, HEAD_DIM, MASKED)
    return first, second


@triton.jit
def store_tile(
    base, offsets, keep, tile, D0: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Write [len(offsets), D] elements from column D0 on, or add them to what is there."""
    d = D0 + tl.arange(0, D)
    pointers = base + offsets[:, None] + d[None, :]
    mask = keep[:, None] & (d[None, :] < HEAD_DIM)
    if ACCUMULATE:
        tile += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_pair(
    base, offsets, keep, first, second, D1: tl.constexpr, D2: tl.constexpr,
    HEAD_DIM: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    store_tile(base, offsets, keep, first, 0, D1, HEAD_DIM, ACCUMULATE)
    if D2 > 0:
        store_tile(base, offsets, keep, second, D1, D2, HEAD_DIM, ACCUMULATE)


@triton.jit
def product(a1, a2, b1, b2, D2: tl.constexpr):
    """a @ b^T over the head dim, in fp32: [rows of a, rows of b]."""
    # "ieee": fp32 inputs would become TF32 otherwise; 16-bit ones are not touched by it.
    total = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2 > 0:
        total = tl.dot(a2, tl.trans(b2), acc=total, input_precision="ieee")
    return total


@triton.jit
def add_product(acc1, acc2, a, b1, b2, D2: tl.constexpr):
    """acc + a @ b for both tiles of the head dim of b."""
    acc1 = tl.dot(a, b1, acc=acc1, input_precision="ieee")
    if D2 > 0:
        acc2 = tl.dot(a, b2, acc=acc2, input_precision="ieee")
    return acc1, acc2


@triton.jit
def bend(scores, scale2):
    """tanh, of scores that `scale2` takes to twice the argument in base 2."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(scores * scale2))


@triton.jit
def zero_pair(M: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    first = tl.zeros([M, D1], tl.float32)
    second = first
    if D2 > 0:
        second = tl.zeros([M, D2], tl.float32)
    return first, second


@triton.jit
def column_mask(columns, end, offsets, visible, MASKED: tl.constexpr, HAS_VISIBLE: tl.constexpr):
    """Columns of a tile that may be read at all: before the end of the run, and visible."""
    keep = columns < end
    if HAS_VISIBLE:
        keep = keep & (tl.load(visible + offsets, mask=keep, other=0) != 0)
    return keep


def alignment(*tensors: Tensor | None) -> int:
    """Power of two up to 16 that divides every stride but the last, in elements."""
    return math.gcd(16, *(s for t in tensors if t is not None for s in t.stride()[:-1]))


def strides(tensor: Tensor | None, count: int = 2) -> tuple[int, ...]:
    """The leading strides of an optional tensor."""
    return (0,) * count if tensor is None else tensor.stride()[:count]


def lane_blocks(block_m: int, table: bool) -> tuple[int, int]:
    """(lanes of a program, lanes of one for a short tile of a table, 0 where that is the same)"""
    if not table:
        return block_m, 0
    block_m = min(block_m, TABLE_LANES)
    return block_m, SMALL_TILE if block_m > SMALL_TILE else 0


def lane_programs(block_m: int, tiles: Tensor | None, lanes: int) -> int:
    """Programs of a head."""
    if tiles is None:
        return triton.cdiv(lanes, block_m)
    return tiles.shape[0] * (TABLE_LANES // block_m)


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """Factors from products to scores in base 2: one, or with a cap one inside tanh and one after.

    The first is doubled for `bend`, since tanh(x) = 1 - 2 / (1 + exp(2 x)).
    """
    base2 = math.log2(math.e)
    return (2 * scale / softcap * base2, softcap * base2) if softcap else (scale * base2, 0.0)
