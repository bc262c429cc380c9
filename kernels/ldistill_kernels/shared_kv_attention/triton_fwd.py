"""Triton forward: one program per tile of packed rows and key/value head.

The rows of a tile are (token, head of the group) pairs, laid end to end, so a group of three heads
fills 128 rows without a gap and each key is loaded once for the whole group. Softmax runs online
in base 2. Tiles of columns that every row sees skip the mask.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldistill_kernels.shared_kv_attention.configs import (
    forward_config,
    is_dense,
    split_head_dim,
)
from ldistill_kernels.shared_kv_attention.primitives import (
    LN2,
    NOTHING,
    add_product,
    alignment,
    column_mask,
    load_pair,
    memory_spans,
    next_run,
    product,
    run_at,
    second_spans,
    store_pair,
    strides,
    zero_pair,
)

BASE2 = math.log2(math.e)  # folded into the scale: exp(x) = exp2(x * BASE2)


@triton.jit
def _attend_columns(
    acc1, acc2, peak, total, q1, q2, low, high, k, v, visible, base_k, base_v, stride_k, stride_v,
    stride_visible, column, origin, end, scale2,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, HAS_VISIBLE: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over BLOCK_N columns."""
    columns = column + tl.arange(0, BLOCK_N)
    place = (columns - origin).to(tl.int64)
    keep = column_mask(columns, end, place * stride_visible, visible, MASKED, HAS_VISIBLE)
    offsets_k = tl.multiple_of(base_k + place * stride_k, ALIGN)
    k1, k2 = load_pair(k, offsets_k, keep, D1, D2, HEAD_DIM, MASKED or HAS_VISIBLE)
    scores = product(q1, q2, k1, k2, D2)
    if MASKED:
        seen = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
        if HAS_VISIBLE:
            seen = seen & keep[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    elif HAS_VISIBLE:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale2)
    base = new_peak
    if MASKED or HAS_VISIBLE:  # nothing seen so far: -inf - -inf must not happen
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale2 - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc1 = acc1 * shrink[:, None]
    if D2 > 0:
        acc2 = acc2 * shrink[:, None]
    offsets_v = tl.multiple_of(base_v + place * stride_v, ALIGN)
    v1, v2 = load_pair(v, offsets_v, keep, D1, D2, HEAD_DIM, MASKED or HAS_VISIBLE)
    acc1, acc2 = add_product(acc1, acc2, weights.to(v1.dtype), v1, v2, D2)
    return acc1, acc2, new_peak, total


@triton.jit
def _attend_segment(
    acc1, acc2, peak, total, q1, q2, low, high, k, v, visible, base_k, base_v, seq,
    stride_kb, stride_k, stride_vb, stride_v, stride_visible_b, stride_visible, scale2,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    HEAD_DIM: tl.constexpr, HAS_VISIBLE: tl.constexpr,
):  # fmt: skip
    """All runs of one segment; base_k and base_v lead to the head in batch row 0."""
    first = tl.min(low, 0)
    while first < NOTHING:
        end, full_end = run_at(first, low, high)
        b = first // seq
        origin = b * seq
        row_k, row_v = base_k + b.to(tl.int64) * stride_kb, base_v + b.to(tl.int64) * stride_vb
        visible_row = visible
        if HAS_VISIBLE:
            visible_row = visible + b.to(tl.int64) * stride_visible_b
        limit = tl.minimum(high, end)  # columns after the end belong to the next run
        middle = first + (full_end - first) // BLOCK_N * BLOCK_N
        for column in tl.range(first, middle, BLOCK_N):
            acc1, acc2, peak, total = _attend_columns(
                acc1, acc2, peak, total, q1, q2, low, limit, k, v, visible_row, row_k, row_v,
                stride_k, stride_v, stride_visible, column, origin, end, scale2,
                ALIGN, BLOCK_N, D1, D2, HEAD_DIM, False, HAS_VISIBLE,
            )  # fmt: skip
        for column in tl.range(middle, end, BLOCK_N):
            acc1, acc2, peak, total = _attend_columns(
                acc1, acc2, peak, total, q1, q2, low, limit, k, v, visible_row, row_k, row_v,
                stride_k, stride_v, stride_visible, column, origin, end, scale2,
                ALIGN, BLOCK_N, D1, D2, HEAD_DIM, True, HAS_VISIBLE,
            )  # fmt: skip
        first = next_run(end, low, high)
    return acc1, acc2, peak, total


INTEGERS = (
    "rows", "batches", "seq", "rows2", "kv_heads",
    "stride_qr", "stride_qh", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
    "stride_vn", "stride_visible_b", "stride_visible_n", "stride_k2n", "stride_k2h", "stride_v2n",
    "stride_v2h",
)  # fmt: skip


# Sizes change from step to step: a new one must not compile a new variant. What loads need to
# know about strides is in ALIGN.
@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, out, lse,
    rows, batches, seq, rows2, kv_heads, scale2,
    stride_qr, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_visible_b, stride_visible_n, stride_k2n, stride_k2h, stride_v2n, stride_v2h,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, HAS_SECOND: tl.constexpr,
):  # fmt: skip
    # Heads side by side, late rows (long spans) first: the long programs do not end up last.
    head = tl.program_id(0) % kv_heads
    tile = tl.num_programs(0) // kv_heads - 1 - tl.program_id(0) // kv_heads
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = packed < rows * GROUP
    packed = tl.minimum(packed, rows * GROUP - 1)  # the tail repeats the last row
    row, q_head = packed // GROUP, head * GROUP + packed % GROUP
    low, high = memory_spans(row, batch, start, position, batches, seq)
    q_offsets = row.to(tl.int64) * stride_qr + q_head.to(tl.int64) * stride_qh
    q_offsets = tl.multiple_of(q_offsets, ALIGN)
    q1, q2 = load_pair(q, q_offsets, inside, D1, D2, HEAD_DIM, False)
    acc1, acc2 = zero_pair(BLOCK_M, D1, D2)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    head = head.to(tl.int64)
    acc1, acc2, peak, total = _attend_segment(
        acc1, acc2, peak, total, q1, q2, low, high, k, v, visible, head * stride_kh,
        head * stride_vh, seq, stride_kb, stride_kn, stride_vb, stride_vn, stride_visible_b,
        stride_visible_n, scale2, ALIGN, BLOCK_N, D1, D2, HEAD_DIM, HAS_VISIBLE,
    )  # fmt: skip
    if HAS_SECOND:
        low, high = second_spans(row, start2, end2, rows2)
        acc1, acc2, peak, total = _attend_segment(
            acc1, acc2, peak, total, q1, q2, low, high, k2, v2, visible, head * stride_k2h,
            head * stride_v2h, NOTHING, 0, stride_k2n, 0, stride_v2n, 0, 0, scale2,
            ALIGN, BLOCK_N, D1, D2, HEAD_DIM, False,
        )  # fmt: skip
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    place = row.to(tl.int64) * (kv_heads * GROUP) + q_head
    natural = (peak + tl.log2(tl.where(empty, 1.0, total))) * LN2
    tl.store(lse + place, tl.where(empty, float("-inf"), natural), mask=inside)
    acc1 = acc1 * inverse[:, None]
    if D2 > 0:
        acc2 = acc2 * inverse[:, None]
    store_pair(out, place * HEAD_DIM, inside, acc1, acc2, D1, D2, HEAD_DIM, False)


def attention_forward(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, scale
) -> tuple[Tensor, Tensor]:
    """Launch the forward; arguments as `shared_kv_attention`, k and v heads-first.

    Returns: out [rows, q_heads, head_dim] in q's dtype, lse fp32 [rows, q_heads].
    """
    rows, q_heads, head_dim = q.shape
    batches, kv_heads, seq = k.shape[:3]
    out = q.new_empty(q.shape)
    lse = torch.empty(rows, q_heads, dtype=torch.float32, device=q.device)
    if rows == 0:
        return out, lse
    config = forward_config(q.device, head_dim, q.element_size(), is_dense(rows, batches, seq))
    group, (d1, d2) = q_heads // kv_heads, split_head_dim(head_dim)
    grid = (triton.cdiv(rows * group, config.block_m) * kv_heads,)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[grid](
            q, k, v, batch, start, position, visible, k2, v2, start2, end2, out, lse,
            rows, batches, seq, 0 if k2 is None else k2.shape[0], kv_heads, scale * BASE2,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *strides(visible), *strides(k2),
            *strides(v2),
            ALIGN=alignment(q, k, v, k2, v2), GROUP=group, HEAD_DIM=head_dim, D1=d1, D2=d2,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HAS_VISIBLE=visible is not None, HAS_SECOND=k2 is not None,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
