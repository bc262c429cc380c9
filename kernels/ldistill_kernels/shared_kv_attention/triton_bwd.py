"""Triton backward: after a small preparation, all gradients in one launch, without atomics.

The first programs own a tile of keys and values each and walk over its queries (`triton_prepare`
found them) and the heads of the group; the others own a tile of queries and walk over its memory
like the forward. Every gradient element has one owner that adds in a fixed order, so results are
bit-identical from run to run.
"""

import triton
import triton.language as tl

from ldistill_kernels.shared_kv_attention.primitives import (
    NOTHING,
    add_product,
    bend,
    column_mask,
    full_part,
    load_pair,
    memory_spans,
    next_run,
    product,
    run_at,
    second_spans,
    store_pair,
    table_lanes,
    whole_run,
    zero_pair,
)


@triton.jit
def _query_inputs(
    q, grad_out, lse, delta, lanes, head, stride_qn, stride_qh, stride_gn, stride_gh,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    """Queries, output gradients, log-sum-exp in base 2 and delta of lanes of one key head."""
    query, q_head = (lanes // GROUP).to(tl.int64), head * GROUP + lanes % GROUP
    q_offsets = tl.multiple_of(query * stride_qn + q_head.to(tl.int64) * stride_qh, ALIGN)
    q1, q2 = load_pair(q, q_offsets, query >= 0, D1, D2, HEAD_DIM, False)
    grad_offsets = tl.multiple_of(query * stride_gn + q_head.to(tl.int64) * stride_gh, ALIGN)
    grad1, grad2 = load_pair(grad_out, grad_offsets, query >= 0, E1, E2, V_DIM, False)
    return q1, q2, grad1, grad2, tl.load(lse + lanes), tl.load(delta + lanes)


@triton.jit
def _add_queries(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, columns, q, grad_out, lse, delta,
    batch, start, position, batches, seq, first_lane, last_lane, head, scale2, cap2, window,
    stride_qn, stride_qh, stride_gn, stride_gh,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    MASKED: tl.constexpr, SECOND: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK_M lanes give to the gradients of a tile of keys and values."""
    lanes = first_lane + tl.arange(0, BLOCK_M)
    inside = lanes < last_lane
    lanes = tl.minimum(lanes, last_lane - 1)
    q1, q2, grad1, grad2, base, deltas = _query_inputs(
        q, grad_out, lse, delta, lanes, head, stride_qn, stride_qh, stride_gn, stride_gh,
        ALIGN, GROUP, HEAD_DIM, D1, D2, V_DIM, E1, E2,
    )  # fmt: skip
    # Transposed, [columns, lanes]: both products below then take it as their left side.
    scores = product(k1, k2, q1, q2, D2)
    if HAS_CAP:
        scores = bend(scores, scale2)
        scale2 = cap2
    weights = tl.exp2(scores * scale2 - base[None, :])  # the forward's probabilities, again
    if MASKED:
        query = lanes // GROUP
        if SECOND:
            low, high = second_spans(query, start, position, seq)
        else:
            low, high = memory_spans(
                query, batch, start, position, batches, seq, window, HAS_WINDOW
            )  # fmt: skip
        seen = (columns[:, None] >= low[None, :]) & (columns[:, None] < high[None, :])
        seen = seen & inside[None, :]
        weights = tl.where(seen, weights, 0.0)
    if DV:  # dV = P^T dO
        dv1, dv2 = add_product(dv1, dv2, weights.to(grad1.dtype), grad1, grad2, E2)
    if DK:  # dK = dS^T Q, with dS = P (dO V^T - delta)
        grad_weights = product(v1, v2, grad1, grad2, E2) - deltas[None, :]
        grad_scores = weights * grad_weights
        if HAS_CAP:  # `scores` is tanh here, and this its slope
            grad_scores *= 1.0 - scores * scores
        if MASKED:  # a value nobody reads may be NaN, and 0 * NaN is not 0
            grad_scores = tl.where(seen, grad_scores, 0.0)
        grad_scores = grad_scores.to(q1.dtype)
        dk1, dk2 = add_product(dk1, dk2, grad_scores, q1, q2, D2)
    return dk1, dk2, dv1, dv2


@triton.jit
def _memory_gradients(
    q, k, v, batch, start, position, visible, grad_out, lse, delta, ranges, dk, dv,
    column, origin, end, base_k, base_v, base_dk, base_dv, batches, seq, head, scale, scale2, cap2,
    window, stride_qn, stride_qh, stride_gn, stride_gh, stride_k, stride_v, stride_dk, stride_dv,
    stride_visible,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V_DIM: tl.constexpr,
    E1: tl.constexpr, E2: tl.constexpr, HAS_VISIBLE: tl.constexpr, SECOND: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """dK and dV of the columns [column, column + BLOCK_N) of one head; `ranges` at their entry."""
    # Lanes [first, last) see some of these columns, [full_first, full_last) see all of them.
    first, full_first = tl.load(ranges) * GROUP, tl.load(ranges + 1) * GROUP
    full_last, last = tl.load(ranges + 2) * GROUP, tl.load(ranges + 3) * GROUP
    seen = last > first  # a tile that no query sees is not read, and nothing is added to it
    columns = column + tl.arange(0, BLOCK_N)
    place = (columns - origin).to(tl.int64)
    keep = column_mask(columns, end, place * stride_visible, visible, True, HAS_VISIBLE) & seen
    k_offsets = tl.multiple_of(base_k + place * stride_k, ALIGN)
    v_offsets = tl.multiple_of(base_v + place * stride_v, ALIGN)
    k1, k2 = load_pair(k, k_offsets, keep, D1, D2, HEAD_DIM, True)  # [columns, head dim]
    v1, v2 = load_pair(v, v_offsets, keep, E1, E2, V_DIM, True)
    dk1, dk2 = zero_pair(BLOCK_N, D1, D2)
    dv1, dv2 = zero_pair(BLOCK_N, E1, E2)
    before = tl.cdiv(full_first - first, BLOCK_M)  # tiles with queries that see a part only
    full = tl.maximum(full_last - first - before * BLOCK_M, 0) // BLOCK_M
    # Tiles of lanes that need no mask first, in one loop; those before and behind in another.
    for i in tl.range(before, before + full):
        dk1, dk2, dv1, dv2 = _add_queries(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, columns, q, grad_out, lse, delta,
            batch, start, position, batches, seq, first + i * BLOCK_M, last, head, scale2,
            cap2, window, stride_qn, stride_qh, stride_gn, stride_gh, ALIGN, GROUP, BLOCK_M,
            HEAD_DIM, D1, D2, V_DIM, E1, E2, False, SECOND, DK, DV, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
    for i in tl.range(0, tl.cdiv(last - first, BLOCK_M) - full):
        i = tl.where(i < before, i, i + full)
        dk1, dk2, dv1, dv2 = _add_queries(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, columns, q, grad_out, lse, delta,
            batch, start, position, batches, seq, first + i * BLOCK_M, last, head, scale2,
            cap2, window, stride_qn, stride_qh, stride_gn, stride_gh, ALIGN, GROUP, BLOCK_M,
            HEAD_DIM, D1, D2, V_DIM, E1, E2, True, SECOND, DK, DV, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
    exists = columns < end
    if DK:
        dk1, dk2 = _finish(dk1, dk2, keep, scale, D2)
        offsets = tl.multiple_of(base_dk + place * stride_dk, ALIGN)
        written = exists & seen if ADD_K else exists
        store_pair(dk, offsets, written, dk1, dk2, D1, D2, HEAD_DIM, ADD_K)
    if DV:
        dv1, dv2 = _finish(dv1, dv2, keep, 1.0, E2)
        offsets = tl.multiple_of(base_dv + place * stride_dv, ALIGN)
        written = exists & seen if ADD_V else exists
        store_pair(dv, offsets, written, dv1, dv2, E1, E2, V_DIM, ADD_V)


@triton.jit
def _finish(first, second, keep, scale, D2: tl.constexpr):
    """Scaled gradients, zero where nobody may read (unmasked queries wrote rubbish there)."""
    first = tl.where(keep[:, None], first * scale, 0.0)
    if D2 > 0:
        second = tl.where(keep[:, None], second * scale, 0.0)
    return first, second


@triton.jit
def _add_columns(
    dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, high, k, v, visible, base_k, base_v,
    stride_k, stride_v, stride_visible, column, origin, end, scale2, cap2,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    MASKED: tl.constexpr, HAS_VISIBLE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK_N columns give to the gradients of a tile of queries."""
    columns = column + tl.arange(0, BLOCK_N)
    place = (columns - origin).to(tl.int64)
    keep = column_mask(columns, end, place * stride_visible, visible, MASKED, HAS_VISIBLE)
    k_offsets = tl.multiple_of(base_k + place * stride_k, ALIGN)
    v_offsets = tl.multiple_of(base_v + place * stride_v, ALIGN)
    k1, k2 = load_pair(k, k_offsets, keep, D1, D2, HEAD_DIM, MASKED or HAS_VISIBLE)
    v1, v2 = load_pair(v, v_offsets, keep, E1, E2, V_DIM, MASKED or HAS_VISIBLE)
    scores = product(q1, q2, k1, k2, D2)
    if HAS_CAP:
        scores = bend(scores, scale2)
        scale2 = cap2
    weights = tl.exp2(scores * scale2 - base[:, None])
    if MASKED:
        seen = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
        if HAS_VISIBLE:
            seen = seen & keep[None, :]
        weights = tl.where(seen, weights, 0.0)
    elif HAS_VISIBLE:
        weights = tl.where(keep[None, :], weights, 0.0)
    # [lanes, columns]: dS, and dQ = dS K.
    grad_scores = weights * (product(grad1, grad2, v1, v2, E2) - deltas[:, None])
    if HAS_CAP:
        grad_scores *= 1.0 - scores * scores
    return add_product(dq1, dq2, grad_scores.to(k1.dtype), k1, k2, D2)


@triton.jit
def _query_run(
    dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, high, first, full_end, end, k, v, visible,
    base_k, base_v, seq, stride_kb, stride_k, stride_vb, stride_v, stride_visible_b,
    stride_visible, scale2, cap2,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The columns [first, end) of one batch row, as in the forward."""
    b = first // seq
    origin = b * seq
    row_k, row_v = base_k + b.to(tl.int64) * stride_kb, base_v + b.to(tl.int64) * stride_vb
    visible_row = visible
    if HAS_VISIBLE:
        visible_row = visible + b.to(tl.int64) * stride_visible_b
    limit = tl.minimum(high, end)
    begin, middle = full_part(first, full_end, end, low, BLOCK_N, HAS_WINDOW)
    if HAS_WINDOW:
        for column in tl.range(first, begin, BLOCK_N):
            dq1, dq2 = _add_columns(
                dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, limit, k, v, visible_row,
                row_k, row_v, stride_k, stride_v, stride_visible, column, origin, end, scale2,
                cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, True, HAS_VISIBLE, HAS_CAP,
            )  # fmt: skip
    for column in tl.range(begin, middle, BLOCK_N):
        dq1, dq2 = _add_columns(
            dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, limit, k, v, visible_row,
            row_k, row_v, stride_k, stride_v, stride_visible, column, origin, end, scale2,
            cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, False, HAS_VISIBLE, HAS_CAP,
        )  # fmt: skip
    for column in tl.range(middle, end, BLOCK_N):
        dq1, dq2 = _add_columns(
            dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, limit, k, v, visible_row,
            row_k, row_v, stride_k, stride_v, stride_visible, column, origin, end, scale2,
            cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, True, HAS_VISIBLE, HAS_CAP,
        )  # fmt: skip
    return dq1, dq2


@triton.jit
def _query_segment(
    dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, high, k, v, visible, base_k, base_v, seq,
    stride_kb, stride_k, stride_vb, stride_v, stride_visible_b, stride_visible, scale2, cap2,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    ONE_RUN: tl.constexpr,
):  # fmt: skip
    """All runs of one segment, as in the forward."""
    first = tl.min(low, 0)
    if ONE_RUN:
        end, full_end = whole_run(first, low, high, seq, HAS_WINDOW)
        dq1, dq2 = _query_run(
            dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, high, first, full_end, end, k, v,
            visible, base_k, base_v, seq, stride_kb, stride_k, stride_vb, stride_v,
            stride_visible_b, stride_visible, scale2, cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2,
            V_DIM, E1, E2, HAS_VISIBLE, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
    else:
        while first < NOTHING:
            end, full_end = run_at(first, low, high, HAS_WINDOW)
            dq1, dq2 = _query_run(
                dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, high, first, full_end, end, k,
                v, visible, base_k, base_v, seq, stride_kb, stride_k, stride_vb, stride_v,
                stride_visible_b, stride_visible, scale2, cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2,
                V_DIM, E1, E2, HAS_VISIBLE, HAS_WINDOW, HAS_CAP,
            )  # fmt: skip
            first = next_run(end, low, high)
    return dq1, dq2


@triton.jit
def _query_gradients(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, grad_out, lse, delta, dq,
    first_lane, last_lane, head, batches, seq, seq2, scale, scale2, cap2, window,
    stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_visible_b, stride_visible_n, stride_k2n, stride_k2h, stride_v2n, stride_v2h,
    stride_gn, stride_gh, stride_dqn, stride_dqh,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_VISIBLE: tl.constexpr,
    HAS_SECOND: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    ONE_RUN: tl.constexpr,
):  # fmt: skip
    """dQ of the lanes [first_lane, last_lane), BLOCK_M at most."""
    lanes = first_lane + tl.arange(0, BLOCK_M)
    inside = lanes < last_lane
    lanes = tl.minimum(lanes, last_lane - 1)
    query = lanes // GROUP
    low, high = memory_spans(query, batch, start, position, batches, seq, window, HAS_WINDOW)
    q1, q2, grad1, grad2, base, deltas = _query_inputs(
        q, grad_out, lse, delta, lanes, head, stride_qn, stride_qh, stride_gn, stride_gh,
        ALIGN, GROUP, HEAD_DIM, D1, D2, V_DIM, E1, E2,
    )  # fmt: skip
    dq1, dq2 = zero_pair(BLOCK_M, D1, D2)
    dq1, dq2 = _query_segment(
        dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, high, k, v, visible,
        head * stride_kh, head * stride_vh, seq, stride_kb, stride_kn, stride_vb, stride_vn,
        stride_visible_b, stride_visible_n, scale2, cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM,
        E1, E2, HAS_VISIBLE, HAS_WINDOW, HAS_CAP, ONE_RUN,
    )  # fmt: skip
    if HAS_SECOND:
        low, high = second_spans(query, start2, end2, seq2)
        dq1, dq2 = _query_segment(
            dq1, dq2, q1, q2, grad1, grad2, base, deltas, low, high, k2, v2, visible,
            head * stride_k2h, head * stride_v2h, NOTHING, 0, stride_k2n, 0, stride_v2n, 0, 0,
            scale2, cap2, ALIGN, BLOCK_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, False, False, HAS_CAP,
            ONE_RUN,
        )  # fmt: skip
    dq1, dq2 = _finish(dq1, dq2, inside, scale, D2)  # the scale once, behind all sums
    offsets = query.to(tl.int64) * stride_dqn
    offsets = tl.multiple_of(offsets + (head * GROUP + lanes % GROUP) * stride_dqh, ALIGN)
    store_pair(dq, offsets, inside, dq1, dq2, D1, D2, HEAD_DIM, False)


INTEGERS = (
    "queries", "batches", "seq", "seq2", "kv_heads", "seq_tiles", "tiles1", "tiles2", "window",
    "stride_qn", "stride_qh", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
    "stride_vn", "stride_visible_b", "stride_visible_n", "stride_k2n", "stride_k2h", "stride_v2n",
    "stride_v2h", "stride_gn", "stride_gh", "stride_dqn", "stride_dqh", "stride_dkb", "stride_dkh",
    "stride_dkn", "stride_dvb", "stride_dvh", "stride_dvn", "stride_dk2n", "stride_dk2h",
    "stride_dv2n", "stride_dv2h",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def backward_kernel(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, grad_out, lse, delta,
    ranges, dq, dk, dv, dk2, dv2, queries, batches, seq, seq2, kv_heads, seq_tiles, tiles1, tiles2,
    scale, scale2, cap2, window,
    stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_visible_b, stride_visible_n, stride_k2n, stride_k2h, stride_v2n, stride_v2h,
    stride_gn, stride_gh, stride_dqn, stride_dqh, stride_dkb, stride_dkh, stride_dkn,
    stride_dvb, stride_dvh, stride_dvn, stride_dk2n, stride_dk2h, stride_dv2n, stride_dv2h,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V_DIM: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    DQ_M: tl.constexpr, SMALL_M: tl.constexpr, DQ_N: tl.constexpr,
    DKV_M: tl.constexpr, DKV_N: tl.constexpr, HAS_VISIBLE: tl.constexpr,
    HAS_SECOND: tl.constexpr, HAS_TILES: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK2: tl.constexpr, DV2: tl.constexpr,
    ADD_K: tl.constexpr, ADD_V: tl.constexpr,
):  # fmt: skip
    # Programs by their first number: tiles of memory, tiles of the second segment, tiles of lanes.
    tile = tl.program_id(0) // kv_heads
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    lse += head * queries * GROUP  # of this key head, by lane
    delta += head * queries * GROUP
    if tile < tiles1:
        if DK or DV:
            b = (tile // seq_tiles).to(tl.int64)
            origin = (tile // seq_tiles) * seq
            visible_row = visible
            if HAS_VISIBLE:
                visible_row = visible + b * stride_visible_b
            _memory_gradients(
                q, k, v, batch, start, position, visible_row, grad_out, lse, delta,
                ranges + tile * 4, dk, dv, origin + tile % seq_tiles * DKV_N, origin, origin + seq,
                b * stride_kb + head * stride_kh, b * stride_vb + head * stride_vh,
                b * stride_dkb + head * stride_dkh, b * stride_dvb + head * stride_dvh,
                batches, seq, head, scale, scale2, cap2, window, stride_qn, stride_qh, stride_gn,
                stride_gh, stride_kn, stride_vn, stride_dkn, stride_dvn, stride_visible_n,
                ALIGN, GROUP, DKV_M, DKV_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, HAS_VISIBLE, False,
                DK, DV, ADD_K, ADD_V, HAS_WINDOW, HAS_CAP,
            )  # fmt: skip
    elif tile < tiles1 + tiles2:
        if DK2 or DV2:
            _memory_gradients(
                q, k2, v2, batch, start2, end2, visible, grad_out, lse, delta,
                ranges + tile * 4, dk2, dv2, (tile - tiles1) * DKV_N, 0, seq2,
                head * stride_k2h, head * stride_v2h, head * stride_dk2h, head * stride_dv2h,
                batches, seq2, head, scale, scale2, cap2, window, stride_qn, stride_qh, stride_gn,
                stride_gh, stride_k2n, stride_v2n, stride_dk2n, stride_dv2n, 0,
                ALIGN, GROUP, DKV_M, DKV_N, HEAD_DIM, D1, D2, V_DIM, E1, E2, False, True,
                DK2, DV2, False, False, False, HAS_CAP,
            )  # fmt: skip
    elif DQ:
        tile -= tiles1 + tiles2
        if HAS_TILES:
            first_lane, last_lane = table_lanes(tiles, tile, queries * GROUP, DQ_M)
            if last_lane - first_lane > SMALL_M:
                _query_gradients(
                    q, k, v, batch, start, position, visible, k2, v2, start2, end2, grad_out, lse,
                    delta, dq, first_lane, last_lane, head, batches, seq, seq2, scale, scale2,
                    cap2, window, stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb,
                    stride_vh, stride_vn, stride_visible_b, stride_visible_n, stride_k2n,
                    stride_k2h, stride_v2n, stride_v2h, stride_gn, stride_gh, stride_dqn,
                    stride_dqh, ALIGN, GROUP, HEAD_DIM, D1, D2, V_DIM, E1, E2, DQ_M, DQ_N,
                    HAS_VISIBLE, HAS_SECOND, HAS_WINDOW, HAS_CAP, True,
                )  # fmt: skip
            elif SMALL_M > 0 and last_lane > first_lane:
                _query_gradients(
                    q, k, v, batch, start, position, visible, k2, v2, start2, end2, grad_out, lse,
                    delta, dq, first_lane, last_lane, head, batches, seq, seq2, scale, scale2,
                    cap2, window, stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb,
                    stride_vh, stride_vn, stride_visible_b, stride_visible_n, stride_k2n,
                    stride_k2h, stride_v2n, stride_v2h, stride_gn, stride_gh, stride_dqn,
                    stride_dqh, ALIGN, GROUP, HEAD_DIM, D1, D2, V_DIM, E1, E2, SMALL_M, DQ_N,
                    HAS_VISIBLE, HAS_SECOND, HAS_WINDOW, HAS_CAP, True,
                )  # fmt: skip
        else:
            # Late queries (long spans) first, as in the forward.
            first_lane = (tl.num_programs(0) // kv_heads - tiles1 - tiles2 - 1 - tile) * DQ_M
            _query_gradients(
                q, k, v, batch, start, position, visible, k2, v2, start2, end2, grad_out, lse,
                delta, dq, first_lane, queries * GROUP, head, batches, seq, seq2, scale, scale2,
                cap2, window, stride_qn, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb,
                stride_vh, stride_vn, stride_visible_b, stride_visible_n, stride_k2n, stride_k2h,
                stride_v2n, stride_v2h, stride_gn, stride_gh, stride_dqn, stride_dqh, ALIGN,
                GROUP, HEAD_DIM, D1, D2, V_DIM, E1, E2, DQ_M, DQ_N, HAS_VISIBLE, HAS_SECOND,
                HAS_WINDOW, HAS_CAP, False,
            )  # fmt: skip
