"""Triton forward: one program per tile of lanes and key/value head.

The lanes of a tile are (query, head of the group) pairs, laid end to end, so a group of three heads
fills 128 lanes without a gap and each key is loaded once for the whole group. Softmax runs online
in base 2. Tiles of columns that every query sees skip the mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldistill_kernels.shared_kv_attention.checks import check_arguments
from ldistill_kernels.shared_kv_attention.configs import (
    forward_config,
    is_dense,
    overridden,
    split_head_dim,
)
from ldistill_kernels.shared_kv_attention.primitives import (
    LN2,
    LOG2E,
    NOTHING,
    add_product,
    alignment,
    bend,
    column_mask,
    full_part,
    lane_blocks,
    lane_programs,
    load_pair,
    memory_spans,
    next_run,
    product,
    run_at,
    score_factors,
    second_spans,
    store_pair,
    strides,
    table_lanes,
    whole_run,
    zero_pair,
)

KEPT = 64  # launches: a step asks for few, the next step's number of queries is another


@triton.jit
def _attend_columns(
    acc1, acc2, peak, total, q1, q2, low, high, k, v, visible, base_k, base_v, stride_k, stride_v,
    stride_visible, column, origin, end, scale2, cap2,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    MASKED: tl.constexpr, HAS_VISIBLE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over BLOCK_N columns."""
    columns = column + tl.arange(0, BLOCK_N)  # numbers on the line of all batch rows
    place = (columns - origin).to(tl.int64)  # within the row; x a stride may exceed 2^31
    keep = column_mask(columns, end, place * stride_visible, visible, MASKED, HAS_VISIBLE)
    offsets_k = tl.multiple_of(base_k + place * stride_k, ALIGN)
    k1, k2 = load_pair(k, offsets_k, keep, D1, D2, HEAD_DIM, MASKED or HAS_VISIBLE)
    scores = product(q1, q2, k1, k2, D2)  # [lanes, columns], fp32
    if HAS_CAP:
        scores = bend(scores, scale2)
        scale2 = cap2
    if MASKED:
        seen = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
        if HAS_VISIBLE:
            seen = seen & keep[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    elif HAS_VISIBLE:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    # Scaled behind the maximum, once a lane instead of once a pair: the scale is positive.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale2)
    base = new_peak
    if MASKED or HAS_VISIBLE:  # nothing seen so far: -inf - -inf must not happen
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale2 - base[:, None])
    shrink = tl.exp2(peak - base)  # [lanes]: what was summed so far is relative to the old peak
    total = total * shrink + tl.sum(weights, 1)
    acc1 = acc1 * shrink[:, None]
    if E2 > 0:
        acc2 = acc2 * shrink[:, None]
    offsets_v = tl.multiple_of(base_v + place * stride_v, ALIGN)
    v1, v2 = load_pair(v, offsets_v, keep, E1, E2, V_DIM, MASKED or HAS_VISIBLE)
    acc1, acc2 = add_product(acc1, acc2, weights.to(v1.dtype), v1, v2, E2)
    return acc1, acc2, new_peak, total


@triton.jit
def _attend_run(
    acc1, acc2, peak, total, q1, q2, low, high, first, full_end, end, k, v, visible, base_k, base_v,
    seq, stride_kb, stride_k, stride_vb, stride_v, stride_visible_b, stride_visible, scale2, cap2,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The columns [first, end) of one batch row; lanes that have begun all see up to full_end."""
    b = first // seq  # a run never leaves its batch row
    origin = b * seq
    row_k, row_v = base_k + b.to(tl.int64) * stride_kb, base_v + b.to(tl.int64) * stride_vb
    visible_row = visible
    if HAS_VISIBLE:
        visible_row = visible + b.to(tl.int64) * stride_visible_b
    limit = tl.minimum(high, end)  # columns after the end belong to the next run
    begin, middle = full_part(first, full_end, end, low, BLOCK_N, HAS_WINDOW)
    # Masked until all lanes have begun (windows only), unmasked while all see all, masked again.
    if HAS_WINDOW:
        for column in tl.range(first, begin, BLOCK_N):
            acc1, acc2, peak, total = _attend_columns(
                acc1, acc2, peak, total, q1, q2, low, limit, k, v, visible_row, row_k, row_v,
                stride_k, stride_v, stride_visible, column, origin, end, scale2, cap2,
                ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, True, HAS_VISIBLE, HAS_CAP,
            )  # fmt: skip
    for column in tl.range(begin, middle, BLOCK_N):
        acc1, acc2, peak, total = _attend_columns(
            acc1, acc2, peak, total, q1, q2, low, limit, k, v, visible_row, row_k, row_v,
            stride_k, stride_v, stride_visible, column, origin, end, scale2, cap2,
            ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, False, HAS_VISIBLE, HAS_CAP,
        )  # fmt: skip
    for column in tl.range(middle, end, BLOCK_N):
        acc1, acc2, peak, total = _attend_columns(
            acc1, acc2, peak, total, q1, q2, low, limit, k, v, visible_row, row_k, row_v,
            stride_k, stride_v, stride_visible, column, origin, end, scale2, cap2,
            ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, True, HAS_VISIBLE, HAS_CAP,
        )  # fmt: skip
    return acc1, acc2, peak, total


@triton.jit
def _attend_segment(
    acc1, acc2, peak, total, q1, q2, low, high, k, v, visible, base_k, base_v, seq,
    stride_kb, stride_k, stride_vb, stride_v, stride_visible_b, stride_visible, scale2, cap2,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    ONE_RUN: tl.constexpr,
):  # fmt: skip
    """All runs of one segment; base_k and base_v lead to the head in batch row 0."""
    first = tl.min(low, 0)  # NOTHING where no lane sees anything: every loop is then empty
    if ONE_RUN:
        end, full_end = whole_run(first, low, high, seq, HAS_WINDOW)
        acc1, acc2, peak, total = _attend_run(
            acc1, acc2, peak, total, q1, q2, low, high, first, full_end, end, k, v, visible,
            base_k, base_v, seq, stride_kb, stride_k, stride_vb, stride_v, stride_visible_b,
            stride_visible, scale2, cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2,
            HAS_VISIBLE, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
    else:
        while first < NOTHING:
            end, full_end = run_at(first, low, high, HAS_WINDOW)
            acc1, acc2, peak, total = _attend_run(
                acc1, acc2, peak, total, q1, q2, low, high, first, full_end, end, k, v, visible,
                base_k, base_v, seq, stride_kb, stride_k, stride_vb, stride_v, stride_visible_b,
                stride_visible, scale2, cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2,
                HAS_VISIBLE, HAS_WINDOW, HAS_CAP,
            )  # fmt: skip
            first = next_run(end, low, high)
    return acc1, acc2, peak, total


@triton.jit
def _attend_tile(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, sinks, out, lse,
    first_lane, last_lane, head, batches, seq, seq2, kv_heads, scale2, cap2, window,
    stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_visible_b, stride_visible_n, stride_k2n, stride_k2h, stride_v2n, stride_v2h,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_VISIBLE: tl.constexpr,
    HAS_SECOND: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the lanes [first_lane, last_lane), BLOCK_M at most."""
    lanes = first_lane + tl.arange(0, BLOCK_M)
    inside = lanes < last_lane
    lanes = tl.minimum(lanes, last_lane - 1)  # the tail repeats the last lane
    query, q_head = lanes // GROUP, head * GROUP + lanes % GROUP
    low, high = memory_spans(query, batch, start, position, batches, seq, window, HAS_WINDOW)
    q_offsets = query.to(tl.int64) * stride_qn + q_head.to(tl.int64) * stride_qh
    q_offsets = tl.multiple_of(q_offsets, ALIGN)
    # [lanes, head dim], loaded once for all columns.
    q1, q2 = load_pair(q, q_offsets, inside, D1, D2, HEAD_DIM, False)
    acc1, acc2 = zero_pair(BLOCK_M, E1, E2)
    if HAS_SINKS:  # as if a value of 0 had been seen with that score
        peak = tl.load(sinks + q_head).to(tl.float32) * LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    head = head.to(tl.int64)
    acc1, acc2, peak, total = _attend_segment(
        acc1, acc2, peak, total, q1, q2, low, high, k, v, visible, head * stride_kh,
        head * stride_vh, seq, stride_kb, stride_kn, stride_vb, stride_vn, stride_visible_b,
        stride_visible_n, scale2, cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2,
        HAS_VISIBLE, HAS_WINDOW, HAS_CAP, ONE_RUN,
    )  # fmt: skip
    if HAS_SECOND:  # under the same softmax: peak and sums go on
        low, high = second_spans(query, start2, end2, seq2)
        acc1, acc2, peak, total = _attend_segment(
            acc1, acc2, peak, total, q1, q2, low, high, k2, v2, visible, head * stride_k2h,
            head * stride_v2h, NOTHING, 0, stride_k2n, 0, stride_v2n, 0, 0, scale2, cap2,
            ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, False, False, HAS_CAP, ONE_RUN,
        )  # fmt: skip
    empty = total == 0.0  # saw nothing: output 0, log-sum-exp -inf
    inverse = 1.0 / tl.where(empty, 1.0, total)
    place = query.to(tl.int64) * (kv_heads * GROUP) + q_head
    natural = (peak + tl.log2(tl.where(empty, 1.0, total))) * LN2
    tl.store(lse + place, tl.where(empty, float("-inf"), natural), mask=inside)
    acc1 = acc1 * inverse[:, None]
    if E2 > 0:
        acc2 = acc2 * inverse[:, None]
    store_pair(out, place * V_DIM, inside, acc1, acc2, E1, E2, V_DIM, False)


INTEGERS = (
    "queries", "batches", "seq", "seq2", "kv_heads", "window",
    "stride_qn", "stride_qh", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
    "stride_vn", "stride_visible_b", "stride_visible_n", "stride_k2n", "stride_k2h", "stride_v2n",
    "stride_v2h",
)  # fmt: skip


# Sizes change from step to step: a new one must not compile a new variant. What loads need to
# know about strides is in ALIGN.
@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks, out, lse,
    queries, batches, seq, seq2, kv_heads, scale2, cap2, window,
    stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_visible_b, stride_visible_n, stride_k2n, stride_k2h, stride_v2n, stride_v2h,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, SMALL_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % kv_heads  # heads side by side: they share what is read of a document
    tile = tl.program_id(0) // kv_heads
    if HAS_TILES:
        first_lane, last_lane = table_lanes(tiles, tile, queries * GROUP, BLOCK_M)
        # Both heights are in one kernel: a second launch would wait for the first to drain.
        if last_lane - first_lane > SMALL_M:
            _attend_tile(
                q, k, v, batch, start, position, visible, k2, v2, start2, end2, sinks, out, lse,
                first_lane, last_lane, head, batches, seq, seq2, kv_heads, scale2, cap2, window,
                stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                stride_vn, stride_visible_b, stride_visible_n, stride_k2n, stride_k2h, stride_v2n,
                stride_v2h, ALIGN, GROUP, HEAD_DIM, D1, D2, V_DIM, E1, E2, BLOCK_M, BLOCK_N,
                HAS_VISIBLE, HAS_SECOND, HAS_WINDOW, HAS_CAP, HAS_SINKS, True,
            )  # fmt: skip
        elif SMALL_M > 0 and last_lane > first_lane:
            _attend_tile(
                q, k, v, batch, start, position, visible, k2, v2, start2, end2, sinks, out, lse,
                first_lane, last_lane, head, batches, seq, seq2, kv_heads, scale2, cap2, window,
                stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                stride_vn, stride_visible_b, stride_visible_n, stride_k2n, stride_k2h, stride_v2n,
                stride_v2h, ALIGN, GROUP, HEAD_DIM, D1, D2, V_DIM, E1, E2, SMALL_M, BLOCK_N,
                HAS_VISIBLE, HAS_SECOND, HAS_WINDOW, HAS_CAP, HAS_SINKS, True,
            )  # fmt: skip
    else:
        # Late queries (long spans) first: the long programs do not end up last.
        first_lane = (tl.num_programs(0) // kv_heads - 1 - tile) * BLOCK_M
        _attend_tile(
            q, k, v, batch, start, position, visible, k2, v2, start2, end2, sinks, out, lse,
            first_lane, queries * GROUP, head, batches, seq, seq2, kv_heads, scale2, cap2, window,
            stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
            stride_vn, stride_visible_b, stride_visible_n, stride_k2n, stride_k2h, stride_v2n,
            stride_v2h, ALIGN, GROUP, HEAD_DIM, D1, D2, V_DIM, E1, E2, BLOCK_M, BLOCK_N,
            HAS_VISIBLE, HAS_SECOND, HAS_WINDOW, HAS_CAP, HAS_SINKS, False,
        )  # fmt: skip


def attention_forward(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks, scale, window,
    softcap,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward; arguments as `shared_kv_attention`, k and v heads-first.

    Returns: out [queries, q_heads, value dim] in q's dtype, lse fp32 [queries, q_heads].
    """
    out, lse = _outputs(q, v)
    if q.shape[0] > 0:
        with torch.cuda.device_of(q):  # Triton launches on the current device
            _launch(q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks,
                    out, lse, scale, window, softcap)  # fmt: skip
    return out, lse


# What a call was, as far as its launch depends on it -> compiled kernel, grid, numbers.
_launches: dict[tuple, tuple] = {}


def forward_again(inputs: tuple[Tensor | None, ...], *scores: float | int) -> tuple[Tensor, Tensor]:
    """`attention_forward` for the layers of a model: after the first they ask for the same launch.

    Checks the arguments, chooses a tile and has Triton look its kernel up once, and not again for
    tensors of the same shapes, strides and types: on a GPU that outruns Python this is the time.

    Args:
        inputs: the tensors of `attention_forward`, None for absent ones.
        scores: its scale, window and softcap.
    """
    call = _call(inputs, scores)
    if call not in _launches:
        check_arguments(*inputs, None, None, scores[0])
        if call is None or inputs[0].shape[0] == 0:
            return attention_forward(*inputs, *scores)
    out, lse = _outputs(inputs[0], inputs[2])
    with torch.cuda.device_of(out):
        if call in _launches:
            kernel, grid, numbers = _launches[call]
            kernel[grid](*inputs, out, lse, *numbers)
        else:
            launched = _launch(*inputs, out, lse, *scores)
            if launched[0] is not None:  # the interpreter has nothing to keep
                if len(_launches) >= KEPT:
                    _launches.clear()
                _launches[call] = launched
    return out, lse


def _call(inputs: tuple[Tensor | None, ...], scores: tuple) -> tuple | None:
    """What decides a launch; None where it is not worth keeping.

    Triton compiles for pointers that 16 divides and for others: only the former are kept.
    """
    call, pointers = [*scores], 0
    for x in inputs:
        if x is None:
            call.append(None)
        else:
            pointers |= x.data_ptr()
            call += (x.shape, x.stride(), x.dtype, x.get_device())
    return None if pointers % 16 or overridden() else tuple(call)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)


def _launch(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks, out, lse, scale,
    window, softcap,
) -> tuple:  # fmt: skip
    """Returns the compiled kernel, its grid and its arguments after the tensors."""
    queries, q_heads, head_dim = q.shape
    batches, kv_heads, seq = k.shape[:3]
    v_dim, extras = v.shape[-1], bool(window or softcap) or sinks is not None
    dense = tiles is None and is_dense(queries, batches, seq)
    plain = visible is None and k2 is None and not extras and v_dim == head_dim
    widest = max(head_dim, v_dim)
    config = forward_config(q.device, widest, q.element_size(), dense, plain)
    group = q_heads // kv_heads
    block_m, small_m = lane_blocks(config.block_m, tiles is not None)
    # A program is a tile of lanes of one key head; lanes are numbered query x group + head of it.
    grid = (lane_programs(block_m, tiles, queries * group) * kv_heads, 1, 1)
    numbers = (
        queries, batches, seq, 0 if k2 is None else k2.shape[0], kv_heads,
        *score_factors(scale, softcap), window,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *strides(visible), *strides(k2),
        *strides(v2),
        alignment(q, k, v, k2, v2), group, head_dim, *split_head_dim(head_dim), v_dim,
        *split_head_dim(v_dim), block_m, small_m, config.block_n,
        visible is not None, k2 is not None, tiles is not None, window > 0, softcap > 0,
        sinks is not None,
    )  # fmt: skip
    kernel = forward_kernel[grid](
        q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks, out, lse,
        *numbers,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
        enable_fp_fusion=True,
    )  # fmt: skip
    return kernel, grid, numbers
