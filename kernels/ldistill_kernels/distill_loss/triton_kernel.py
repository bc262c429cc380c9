"""The row step of the distillation loss as one Triton kernel: one program a row, two passes.

The first pass reads the row's logits once and keeps online: best logits, the three softmax sums
(student at temperature 1 and tau, teacher at tau) and the divergence. The second reads them again
and writes the gradient over them, in the width of the matrix products that follow. Columns beyond
the compared vocabulary take part in the cross-entropy alone and have loops of their own. The
Jensen-Shannon divergence needs the sums before its terms, hence a pass in between.

No atomics, nothing read back, one order of summation: equal from run to run.

`tl.maximum` of NaN and a number is the number unless told otherwise. Online maxima may drop NaN,
since the sums relative to them keep it; a result must not, or a broken row would look healthy.

Gradients narrower than the logits are written at the front of the row they come from. Columns
[a, b) occupy bytes [2a, 2b) as gradients and [4a, 4b) as logits, so a block's gradients can only
fall on logits of this and earlier blocks; the barrier before the store makes sure that every warp
has read those.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FORWARD, REVERSE, JSD = (tl.constexpr(index) for index in range(3))
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _expm1(x):
    """exp(x) - 1 that keeps its digits near 0."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))
    return tl.where(tl.abs(x) < 0.03125, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) that keeps its digits near 0."""
    series = x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * (0.25 - x * 0.2))))
    return tl.where(tl.abs(x) < 0.03125, series, tl.log(1.0 + x))


@triton.jit
def _mixture(d, beta):
    """log m/p and log m/q of m = beta p + (1 - beta) q from d = log q/p."""
    share = tl.where(d > 0, beta, 1.0 - beta)
    shared = _log1p(share * _expm1(-tl.abs(d)))
    return shared + tl.maximum(d, 0.0), shared - tl.minimum(d, 0.0)


@triton.jit
def _scan_compared(
    s_row, t_row, vocab, inv_tau, HAS_TEACHER: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr
):
    """First pass over the compared vocabulary; sums are relative to the row's largest logit.

    Sums are kept by lane and reduced once, after the loop; only the maxima are shared each block.
    Returns top_s, sum_1, sum_s, top_t, best_token (the teacher's), sum_t, cross.
    """
    lanes, scale = tl.arange(0, BLOCK), inv_tau * LOG2E
    best_s = tl.full([BLOCK], float("-inf"), tl.float32)
    best_t = tl.full([BLOCK], float("-inf"), tl.float32)
    token_t = tl.zeros([BLOCK], tl.int32)
    sum_1 = tl.zeros([BLOCK], tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)  # forward: sum p (s - t) / tau; reverse: sum q (...)
    top_s = float("-inf")
    top_t = float("-inf")
    for lo in range(0, vocab, BLOCK):
        cols = lo + lanes
        mask = cols < vocab
        s = tl.load(s_row + cols, mask=mask, other=float("-inf"))
        best_s = tl.maximum(best_s, s)
        new_s = tl.max(best_s, 0)
        sum_1 = sum_1 * tl.exp2((top_s - new_s) * LOG2E) + tl.exp2((s - new_s) * LOG2E)
        if HAS_TEACHER:
            t = tl.load(t_row + cols, mask=mask, other=float("-inf"))
            token_t = tl.where(t > best_t, cols, token_t)
            best_t = tl.maximum(best_t, t)
            new_t = tl.max(best_t, 0)
            keep_s, e_s = tl.exp2((top_s - new_s) * scale), tl.exp2((s - new_s) * scale)
            keep_t, e_t = tl.exp2((top_t - new_t) * scale), tl.exp2((t - new_t) * scale)
            sum_s = sum_s * keep_s + e_s
            sum_t = sum_t * keep_t + e_t
            # Masked lanes hold -inf in both.
            gap = (tl.where(mask, s, 0.0) - tl.where(mask, t, 0.0)) * inv_tau
            if KL == FORWARD:
                cross = cross * keep_t + e_t * gap
            if KL == REVERSE:
                cross = cross * keep_s + e_s * gap
            top_t = new_t
        top_s = new_s
    best_token = tl.min(tl.where(best_t == top_t, token_t, NO_TOKEN), 0)
    return (
        top_s, tl.sum(sum_1, 0), tl.sum(sum_s, 0),
        top_t, best_token, tl.sum(sum_t, 0), tl.sum(cross, 0),
    )  # fmt: skip


@triton.jit
def _scan_further(s_row, vocab, vocab_s, BLOCK: tl.constexpr):
    """First pass over the student's further tokens: largest logit and log-sum-exp."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    top = float("-inf")
    for lo in range(vocab, vocab_s, BLOCK):
        cols = lo + lanes
        s = tl.load(s_row + cols, mask=cols < vocab_s, other=float("-inf"))
        best = tl.maximum(best, s)
        new = tl.max(best, 0)
        total = total * tl.exp2((top - new) * LOG2E) + tl.exp2((s - new) * LOG2E)
        top = new
    return top, top + tl.log(tl.sum(total, 0))


@triton.jit
def _jsd_terms(s_row, t_row, vocab, inv_tau, lse_s, lse_t, beta, BLOCK: tl.constexpr):
    """KL(p | m) and KL(q | m), once the softmax sums are known."""
    lanes = tl.arange(0, BLOCK)
    kl_p = tl.zeros([BLOCK], tl.float32)
    kl_q = tl.zeros([BLOCK], tl.float32)
    for lo in range(0, vocab, BLOCK):
        cols = lo + lanes
        mask = cols < vocab
        s = tl.load(s_row + cols, mask=mask, other=0.0)
        t = tl.load(t_row + cols, mask=mask, other=0.0)
        m_over_p, m_over_q = _mixture((s - t) * inv_tau - (lse_s - lse_t), beta)
        kl_p -= tl.where(mask, _softmax(t, inv_tau, lse_t) * m_over_p, 0.0)
        kl_q -= tl.where(mask, _softmax(s, inv_tau, lse_s) * m_over_q, 0.0)
    return tl.sum(kl_p, 0), tl.sum(kl_q, 0)


@triton.jit
def _softmax(x, inv_tau, lse):
    return tl.exp2((x * inv_tau - lse) * LOG2E)


@triton.jit
def _divergence_grads(s, t, inv_tau, lse_s, lse_t, kl, kl_p, kl_q, beta, KL: tl.constexpr):
    """d divergence / d (s / tau) and / d (t / tau); exactly 0 for equal logits."""
    q, p = _softmax(s, inv_tau, lse_s), _softmax(t, inv_tau, lse_t)
    d = (s - t) * inv_tau - (lse_s - lse_t)
    if KL == FORWARD:
        grad_s, grad_t = q - p, -p * (d + kl)
    elif KL == REVERSE:
        grad_s, grad_t = q * (d - kl), p - q
    else:
        m_over_p, m_over_q = _mixture(d, beta)
        grad_s = (beta - 1.0) * q * (m_over_q + kl_q)
        grad_t = -beta * p * (m_over_p + kl_p)
    return grad_s, grad_t


# Strides are multiples of 64 whatever the vocabulary (`chunked._padded`). The kernel says so of
# each product: a hint on an argument is dropped, and without one no access is a vector.
UNSPECIALIZED = ["start", "stride_s", "stride_t", "stride_grad", "stride_grad_t"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def distill_rows_kernel(
    logits_ptr, teacher_ptr, grad_ptr, grad_t_ptr,
    rows_ptr, labels_ptr, ce_grad_ptr, kl_grad_ptr, inv_temperature_ptr,
    ce_ptr, kl_ptr, teacher_student_ptr, teacher_label_ptr, student_label_ptr, extra_mass_ptr,
    start, vocab_s, vocab, stride_s, stride_t, stride_grad, stride_grad_t, beta,
    HAS_ROWS: tl.constexpr, HAS_TEACHER: tl.constexpr, KL: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    at = start + pid  # position in `rows` and in teacher-aligned arrays
    row = at
    if HAS_ROWS:
        row = tl.load(rows_ptr + at)
    wide = pid.to(tl.int64)  # a chunk of logits may exceed 2^31 elements
    s_row = logits_ptr + tl.multiple_of(wide * stride_s, 64)
    t_row = teacher_ptr + tl.multiple_of(wide * stride_t, 64)
    label = tl.load(labels_ptr + row)  # int64: compared before it is narrowed
    labelled = (label >= 0) & (label < vocab_s)
    inv_tau = tl.load(inv_temperature_ptr + row)
    # Of a label that is no token, ignored or wrong, the loss is NaN; ignored rows are zeroed later.
    label_logit = tl.load(s_row + label, mask=labelled, other=float("nan"))
    label = tl.where(labelled, label, -1).to(tl.int32)

    top_s, sum_1, sum_s, top_t, best_token, sum_t, cross = _scan_compared(
        s_row, t_row, vocab, inv_tau, HAS_TEACHER, KL, BLOCK
    )
    lse_1, top, extra = top_s + tl.log(sum_1), top_s, 0.0
    if vocab < vocab_s:
        top_x, lse_x = _scan_further(s_row, vocab, vocab_s, BLOCK)
        high = tl.maximum(lse_1, lse_x, propagate_nan=tl.PropagateNan.ALL)
        low = tl.minimum(lse_1, lse_x, propagate_nan=tl.PropagateNan.ALL)
        lse_1 = high + tl.log(1.0 + tl.exp2((low - high) * LOG2E))
        extra = tl.exp2((lse_x - lse_1) * LOG2E)
        top = tl.maximum(top_s, top_x)
    tl.store(ce_ptr + row, lse_1 - label_logit)
    tl.store(student_label_ptr + row, (label_logit == top).to(tl.int8))
    tl.store(extra_mass_ptr + row, extra)

    lse_s, lse_t, kl, kl_p, kl_q = 0.0, 0.0, 0.0, 0.0, 0.0
    if HAS_TEACHER:
        lse_s = top_s * inv_tau + tl.log(sum_s)
        lse_t = top_t * inv_tau + tl.log(sum_t)
        if KL == FORWARD:
            kl = (lse_s - lse_t) - cross / sum_t
        elif KL == REVERSE:
            kl = cross / sum_s - (lse_s - lse_t)
        else:
            kl_p, kl_q = _jsd_terms(s_row, t_row, vocab, inv_tau, lse_s, lse_t, beta, BLOCK)
            kl = beta * kl_p + (1.0 - beta) * kl_q
        tl.store(kl_ptr + at, tl.maximum(kl, 0.0, propagate_nan=tl.PropagateNan.ALL))
        agree = tl.load(s_row + best_token) == top_s
        tl.store(teacher_student_ptr + at, agree.to(tl.int8))
        tl.store(teacher_label_ptr + at, (best_token == label).to(tl.int8))

    if GRAD_S or GRAD_T:
        tl.debug_barrier()  # every warp has read the logits that the loops below overwrite
        lanes = tl.arange(0, BLOCK)
        ce_grad = tl.load(ce_grad_ptr + row)
        kl_grad = tl.load(kl_grad_ptr + row)
        g_row = grad_ptr + tl.multiple_of(wide * stride_grad, 64)
        g_t_row = grad_t_ptr + tl.multiple_of(wide * stride_grad_t, 64)
        for lo in range(0, vocab, BLOCK):
            cols = lo + lanes
            mask = cols < vocab
            s = tl.load(s_row + cols, mask=mask, other=0.0)
            grad = ce_grad * (_softmax(s, 1.0, lse_1) - tl.where(cols == label, 1.0, 0.0))
            if HAS_TEACHER:
                t = tl.load(t_row + cols, mask=mask, other=0.0)
                grad_s, grad_t = _divergence_grads(
                    s, t, inv_tau, lse_s, lse_t, kl, kl_p, kl_q, beta, KL
                )
                grad += kl_grad * grad_s
            if NARROW:
                tl.debug_barrier()  # every warp has read this block
            if GRAD_S:
                tl.store(g_row + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)
            if GRAD_T:
                grad_t = (kl_grad * grad_t).to(grad_t_ptr.dtype.element_ty)
                tl.store(g_t_row + cols, grad_t, mask=mask)
        if GRAD_S:
            for lo in range(vocab, vocab_s, BLOCK):
                cols = lo + lanes
                mask = cols < vocab_s
                s = tl.load(s_row + cols, mask=mask, other=0.0)
                grad = ce_grad * (_softmax(s, 1.0, lse_1) - tl.where(cols == label, 1.0, 0.0))
                if NARROW:
                    tl.debug_barrier()
                tl.store(g_row + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)
