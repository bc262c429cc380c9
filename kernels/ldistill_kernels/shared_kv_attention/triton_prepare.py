"""Before the backward: delta of every lane, and which queries see each tile of memory positions.

`prepare_kernel` computes delta = sum(out * grad_out) for every (query, head), lays it and the
log-sum-exp side by side as the lanes of a tile read them, and finds for every tile
of memory positions which queries see it: they are sorted, so four binary searches tell those that
see some of the tile and those that see all of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldistill_kernels.shared_kv_attention.primitives import LOG2E, load_pair, strides

TILES = 128  # tiles of memory positions of one search
REGISTERS = 128  # ptxas would rather spill two of them for the sake of occupancy


@triton.jit
def _queries_below(
    target, outer, inner, late, window, seq, shift, queries, steps, HAS_OUTER: tl.constexpr,
    HAS_LATE: tl.constexpr,
):  # fmt: skip
    """For each target: how many queries have outer[query] * seq + inner[query] + shift < target.

    HAS_LATE: for inner[query] the later of it and late[query] + 1 - window.
    """
    low = tl.zeros_like(target)  # [TILES]: a search for every target side by side
    high = low + queries
    for _ in range(steps):
        active = low < high
        middle = (low + high) // 2
        key = tl.load(inner + middle, mask=active, other=0).to(tl.int32) + shift
        if HAS_LATE:
            key = tl.maximum(
                key, tl.load(late + middle, mask=active, other=0).to(tl.int32) + 1 - window
            )
        if HAS_OUTER:
            key += tl.load(outer + middle, mask=active, other=0).to(tl.int32) * seq
        below = active & (key < target)
        low = tl.where(below, middle + 1, low)
        high = tl.where(active & (key >= target), middle, high)
    return low


@triton.jit
def _write_range(
    ranges, tile, count, search, first, last, low_outer, low, high_outer, high, window, seq, shift,
    queries, steps, HAS_OUTER: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One of four bounds: queries 0..3 see some of [first, last), queries 1..2 all of it."""
    if search < 2:
        target = tl.where(search == 0, first + 1, last)
        query = _queries_below(
            target, high_outer, high, high, window, seq, shift, queries, steps, HAS_OUTER, False
        )  # fmt: skip
    else:
        target = tl.where(search == 2, first + 1, last)
        query = _queries_below(
            target, low_outer, low, high, window, seq, 0, queries, steps, HAS_OUTER, HAS_WINDOW
        )  # fmt: skip
    tl.store(ranges + tile * 4 + search, query, mask=tile < count)


INTEGERS = (
    "queries", "q_heads", "seq", "seq2", "seq_tiles", "tiles1", "tiles2", "steps", "window",
    "stride_gn", "stride_gh", "stride_ln", "stride_lh",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def prepare_kernel(
    out, grad_out, grad_lse, lse, base2, delta, batch, start, position, start2, end2, ranges,
    queries, q_heads, seq, seq2, seq_tiles, tiles1, tiles2, steps, window,
    stride_gn, stride_gh, stride_ln, stride_lh,
    ALIGN: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, HAS_SECOND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.cdiv(queries * q_heads, BLOCK_M)
    if pid < programs:
        # Pairs lie as in `out`, [queries, q_heads]; what is written lies by key head and lane.
        pair = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = pair < queries * q_heads
        query, head = pair // q_heads, pair % q_heads
        out1, out2 = load_pair(out, pair * V_DIM, inside, E1, E2, V_DIM, True)
        offsets = tl.multiple_of(query * stride_gn + head * stride_gh, ALIGN)
        grad1, grad2 = load_pair(grad_out, offsets, inside, E1, E2, V_DIM, True)
        total = tl.sum(out1.to(tl.float32) * grad1.to(tl.float32), 1)
        if E2 > 0:
            total += tl.sum(out2.to(tl.float32) * grad2.to(tl.float32), 1)
        if HAS_GRAD_LSE:  # d lse / d score is the probability too, so it only shifts delta
            total -= tl.load(
                grad_lse + query * stride_ln + head * stride_lh, mask=inside, other=0.0
            )
        # [kv_heads, queries x GROUP]
        lane = head // GROUP * (queries * GROUP) + query * GROUP + head % GROUP
        tl.store(delta + lane, total, mask=inside)
        natural = tl.load(lse + pair, mask=inside, other=0.0)
        base = tl.where(natural == float("-inf"), 0.0, natural * LOG2E)  # -inf: masked everywhere
        tl.store(base2 + lane, base, mask=inside)
    else:
        # The steps of a search wait for one another: each of the four has programs of its own.
        search, group = (pid - programs) % 4, (pid - programs) // 4
        groups1 = tl.cdiv(tiles1, TILES)
        if group < groups1:
            tile = group * TILES + tl.arange(0, TILES)
            first = tile // seq_tiles * seq + tile % seq_tiles * BLOCK_N
            last = tl.minimum(first + BLOCK_N, (tile // seq_tiles + 1) * seq)
            _write_range(
                ranges, tile, tiles1, search, first, last, batch, start, batch, position, window,
                seq, 1, queries, steps, True, HAS_WINDOW,
            )  # fmt: skip
        elif HAS_SECOND:
            tile = (group - groups1) * TILES + tl.arange(0, TILES)
            first = tile * BLOCK_N
            last = tl.minimum(first + BLOCK_N, seq2)
            _write_range(
                ranges + tiles1 * 4, tile, tiles2, search, first, last, start2, start2, end2, end2,
                window, seq, 0, queries, steps, False, False,
            )  # fmt: skip


def prepare(
    out, grad_out, grad_lse, lse, batch, start, position, seq, start2, end2, seq2, seq_tiles,
    tiles1, tiles2, tile, group, window, values
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the preparation.

    Args:
        seq_tiles, tiles1, tiles2: tiles of `tile` positions in a batch row, in all batch rows and
            in the second segment (0: no gradients wanted there).
        values: ALIGN, V_DIM, E1, E2 and HAS_WINDOW of the backward.
    Returns: log-sum-exp in base 2 and delta, fp32 [kv_heads, queries x group], and int32
        [tiles1 + tiles2, 4]: queries 0..3 see some of a tile, queries 1..2 all of it.
    """
    queries, q_heads, v_dim = out.shape
    base2, delta = torch.empty_like(lse), torch.empty_like(lse)
    ranges = torch.empty(tiles1 + tiles2, 4, dtype=torch.int32, device=out.device)
    pairs = block_pairs(v_dim)
    grid = triton.cdiv(queries * q_heads, pairs) + 4 * (
        triton.cdiv(tiles1, TILES) + triton.cdiv(tiles2, TILES)
    )
    prepare_kernel[(grid,)](
        out, grad_out, grad_lse, lse, base2, delta, batch, start, position, start2, end2, ranges,
        queries, q_heads, seq, seq2, seq_tiles, tiles1, tiles2, queries.bit_length(), window,
        *grad_out.stride()[:2], *strides(grad_lse), **values,
        BLOCK_M=pairs, BLOCK_N=tile, TILES=TILES, GROUP=group,
        HAS_GRAD_LSE=grad_lse is not None, HAS_SECOND=start2 is not None, num_warps=4,
        maxnreg=REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    return base2, delta, ranges


def block_pairs(v_dim: int) -> int:
    """(query, head) pairs of one program of `prepare_kernel`: as many as stay in registers."""
    return max(16, min(64, 4096 // triton.next_power_of_2(v_dim)))
