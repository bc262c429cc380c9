"""The target step of the distillation loss as one Triton kernel: one program a target, two passes.

The first pass reads the target's row of logits once and keeps online: best logits, the three
softmax sums (student at temperature 1 and tau, teacher at tau) and the divergence. The second reads
the row again and writes the gradient over it, in the width of the matrix products that follow.
Columns beyond the compared vocabulary take part in the cross-entropy alone and have loops of their
own. The Jensen-Shannon divergence needs the sums before its terms, hence a pass in between.

Bound by memory, so what counts is that loads are always under way. Each pass loads a block while it
works on the one before. In the first pass every thread keeps sums relative to a maximum of its own,
so warps wait for each other once, at its end. The second pass walks from the end of the row to its
beginning: what the first has read last is still in the L2 cache.

No atomics, nothing read back, one order of summation: equal from run to run.

`tl.maximum` of NaN and a number is the number unless told otherwise. Online maxima may drop NaN,
since the sums relative to them keep it; a result must not, or a broken row would look healthy.

Gradients narrower than the logits are written into the back half of the row they come from. Columns
[a, b) of a row that has room for W occupy bytes [2W + 2a, 2W + 2b) as gradients and [4a, 4b) as
logits, and W >= a: a block's gradients can only fall on logits of this block and of those behind
it. The barrier before the store makes sure that every warp has read those.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FORWARD, REVERSE, JSD = (tl.constexpr(index) for index in range(3))
VECTOR = tl.constexpr(4)  # columns of a 16-byte load
# What masked columns hold, the same in student and teacher: below any logit by so much that its
# exponential is 0, and unlike -inf it leaves no NaN in the difference of two such columns.
LOW = tl.constexpr(-1e30)


@triton.jit
def _expm1(x):
    """exp(x) - 1 that keeps its digits near 0."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))
    return tl.where(tl.abs(x) < 0.03125, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def _logits(x, SCALE: tl.constexpr, CAP: tl.constexpr):
    """CAP tanh(SCALE x / CAP), or SCALE x where CAP is 0."""
    if SCALE != 1.0:
        x = x * SCALE
    if CAP != 0.0:
        # Off by a rounding of CAP, which is what it leaves of a logit of its size.
        small = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / CAP))
        size = (1.0 - small) / (1.0 + small) * CAP
        x = tl.where(x < 0, -size, size)
    return x


@triton.jit
def _slope(z, CAP: tl.constexpr):
    """d z / d (SCALE x) of capped logits z."""
    share = z * (1.0 / CAP)
    return 1.0 - share * share


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
    s_row, t_row, vocab, inv_tau, HAS_TEACHER: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_S: tl.constexpr, CAP_S: tl.constexpr, SCALE_T: tl.constexpr, CAP_T: tl.constexpr,
):  # fmt: skip
    """First pass over the compared vocabulary; sums are relative to the row's largest logit.

    VECTOR neighbouring columns are one load of one thread, so what is reduced over them stays in
    it, and so do the sums, each relative to the largest logit that the thread has seen so far.
    What is largest is found among the products, before SCALE and CAP: many a logit may be the cap.
    Returns the largest product, sum_1 and sum_s of the student; the largest product, its token and
    sum_t of the teacher; cross.
    """
    vector, scale = tl.arange(0, BLOCK // VECTOR), inv_tau * LOG2E
    lanes = vector[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    most_s = tl.full([BLOCK // VECTOR], LOW, tl.float32)
    most_t = tl.full([BLOCK // VECTOR], LOW, tl.float32)
    most_lo = tl.zeros([BLOCK // VECTOR], tl.int32)  # the block of the teacher's
    sum_1 = tl.zeros([BLOCK // VECTOR], tl.float32)
    sum_s = tl.zeros([BLOCK // VECTOR], tl.float32)
    sum_t = tl.zeros([BLOCK // VECTOR], tl.float32)
    cross = tl.zeros([BLOCK // VECTOR], tl.float32)  # forward: sum p (s - t); reverse: sum q (...)
    s_next = tl.load(s_row + lanes, mask=lanes < vocab, other=LOW)
    t_next = s_next
    if HAS_TEACHER:
        t_next = tl.load(t_row + lanes, mask=lanes < vocab, other=LOW)
    for lo in range(0, vocab, BLOCK):
        s, t, ahead = s_next, t_next, lo + BLOCK + lanes  # [BLOCK / VECTOR, VECTOR]
        s_next = tl.load(s_row + ahead, mask=ahead < vocab, other=LOW)
        if HAS_TEACHER:
            t_next = tl.load(t_row + ahead, mask=ahead < vocab, other=LOW)
        top_s = _logits(most_s, SCALE_S, CAP_S)
        most_s = tl.maximum(most_s, tl.max(s, 1))
        new_s = _logits(most_s, SCALE_S, CAP_S)
        s = _logits(s, SCALE_S, CAP_S)
        if CAP_S != 0.0:
            s = tl.where(lo + lanes < vocab, s, LOW)
        below_s = s - new_s[:, None]
        # Sums so far are relative to the old largest logit, of this thread alone.
        sum_1 = sum_1 * tl.exp2((top_s - new_s) * LOG2E) + tl.sum(tl.exp2(below_s * LOG2E), 1)
        if HAS_TEACHER:
            top_t, before = _logits(most_t, SCALE_T, CAP_T), most_t
            most_t = tl.maximum(most_t, tl.max(t, 1))
            most_lo = tl.where(most_t > before, lo, most_lo)
            new_t = _logits(most_t, SCALE_T, CAP_T)
            t = _logits(t, SCALE_T, CAP_T)
            if CAP_T != 0.0:
                t = tl.where(lo + lanes < vocab, t, LOW)
            keep_s, e_s = tl.exp2((top_s - new_s) * scale), tl.exp2(below_s * scale)
            keep_t, e_t = tl.exp2((top_t - new_t) * scale), tl.exp2((t - new_t[:, None]) * scale)
            sum_s = sum_s * keep_s + tl.sum(e_s, 1)
            sum_t = sum_t * keep_t + tl.sum(e_t, 1)
            if KL == FORWARD:
                cross = cross * keep_t + tl.sum(e_t * (s - t), 1)
            if KL == REVERSE:
                cross = cross * keep_s + tl.sum(e_s * (s - t), 1)
    # Over the threads, once: from each one's largest logit to that of the row.
    best_s, best_t, best_token = tl.max(most_s, 0), tl.max(most_t, 0), 0
    below_s = _logits(most_s, SCALE_S, CAP_S) - _logits(best_s, SCALE_S, CAP_S)
    below_t = _logits(most_t, SCALE_T, CAP_T) - _logits(best_t, SCALE_T, CAP_T)
    keep_s, keep_t = tl.exp2(below_s * scale), tl.exp2(below_t * scale)
    if HAS_TEACHER:
        cols = most_lo[:, None] + lanes
        t = tl.load(t_row + cols, mask=cols < vocab, other=LOW)
        # Nothing equals the largest when all are NaN; a token is read with this all the same.
        best_token = tl.minimum(tl.min(tl.where(t == best_t, cols, vocab - 1)), vocab - 1)
    return (
        best_s, tl.sum(sum_1 * tl.exp2(below_s * LOG2E), 0), tl.sum(sum_s * keep_s, 0),
        best_t, best_token, tl.sum(sum_t * keep_t, 0),
        tl.sum(cross * (keep_t if KL == FORWARD else keep_s), 0),
    )  # fmt: skip


@triton.jit
def _scan_further(
    s_row, vocab, vocab_s, BLOCK: tl.constexpr, SCALE_S: tl.constexpr, CAP_S: tl.constexpr
):
    """First pass over the student's further tokens: largest product and log-sum-exp."""
    vector = tl.arange(0, BLOCK // VECTOR)
    lanes = vector[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    most = tl.full([BLOCK // VECTOR], LOW, tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    for lo in range(vocab, vocab_s, BLOCK):
        cols = lo + lanes
        s = tl.load(s_row + cols, mask=cols < vocab_s, other=LOW)
        top = _logits(most, SCALE_S, CAP_S)
        most = tl.maximum(most, tl.max(s, 1))
        new = _logits(most, SCALE_S, CAP_S)
        s = _logits(s, SCALE_S, CAP_S)
        if CAP_S != 0.0:
            s = tl.where(cols < vocab_s, s, LOW)
        total *= tl.exp2((top - new) * LOG2E)
        total += tl.sum(tl.exp2((s - new[:, None]) * LOG2E), 1)
    best = tl.max(most, 0)
    top = _logits(best, SCALE_S, CAP_S)
    below = _logits(most, SCALE_S, CAP_S) - top
    return best, top + tl.log(tl.sum(total * tl.exp2(below * LOG2E), 0))


@triton.jit
def _jsd_terms(
    s_row, t_row, vocab, inv_tau, lse_s, lse_t, beta, BLOCK: tl.constexpr,
    SCALE_S: tl.constexpr, CAP_S: tl.constexpr, SCALE_T: tl.constexpr, CAP_T: tl.constexpr,
):  # fmt: skip
    """KL(p | m) and KL(q | m), once the softmax sums are known."""
    lanes = tl.arange(0, BLOCK)
    kl_p = tl.zeros([BLOCK], tl.float32)
    kl_q = tl.zeros([BLOCK], tl.float32)
    for lo in range(0, vocab, BLOCK):
        cols = lo + lanes
        mask = cols < vocab
        s = _logits(tl.load(s_row + cols, mask=mask, other=0.0), SCALE_S, CAP_S)
        t = _logits(tl.load(t_row + cols, mask=mask, other=0.0), SCALE_T, CAP_T)
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


@triton.jit
def _share(weight, value):
    """weight * value; a weight of zero removes the target even when its value is not finite."""
    return tl.where(weight > 0, weight * value, 0.0)


UNSPECIALIZED = ["start", "ignore_index"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def distill_targets_kernel(
    logits_ptr, teacher_ptr, grad_ptr, grad_t_ptr,
    targets_ptr, labels_ptr, ce_weight_ptr, kd_weight_ptr, temperature_ptr,
    loss_ptr, ce_ptr, kl_ptr, teacher_student_ptr, teacher_label_ptr, student_label_ptr,
    extra_mass_ptr, start, vocab_s, vocab, beta, ignore_index,
    HAS_TARGETS: tl.constexpr, HAS_TEACHER: tl.constexpr, KL: tl.constexpr,
    T_SQUARED: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, NARROW: tl.constexpr,
    BLOCK: tl.constexpr, SCALE_S: tl.constexpr, CAP_S: tl.constexpr, SCALE_T: tl.constexpr,
    CAP_T: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    at = start + pid  # position in `targets` and in arrays of the taught
    target = at
    if HAS_TARGETS:
        target = tl.load(targets_ptr + at)
    wide = pid.to(tl.int64)  # a chunk of logits may exceed 2^31 elements
    # Rows are as far apart as `chunked.padded` says. That the compiler sees it is a multiple of 64
    # makes its accesses vectors.
    s_offset = wide * ((vocab_s + 63) // 64 * 64)
    t_offset = wide * ((vocab + 63) // 64 * 64)
    s_row, t_row = logits_ptr + s_offset, teacher_ptr + t_offset
    label = tl.load(labels_ptr + target)  # int64: compared before it is narrowed
    heeded = label != ignore_index
    labelled = (label >= 0) & (label < vocab_s)
    ce_weight = tl.where(heeded, tl.load(ce_weight_ptr + target), 0.0)
    tau, inv_tau = 1.0, 1.0
    if HAS_TEACHER:
        tau = tl.load(temperature_ptr + target)
        inv_tau = 1.0 / tau
    # Of a label that is no token, and not the one to ignore, the loss is NaN.
    label_logit = tl.load(s_row + label, mask=labelled, other=float("nan"))
    label = tl.where(labelled, label, -1).to(tl.int32)

    best_s, sum_1, sum_s, best_t, best_token, sum_t, cross = _scan_compared(
        s_row, t_row, vocab, inv_tau, HAS_TEACHER, KL, BLOCK, SCALE_S, CAP_S, SCALE_T, CAP_T
    )
    top_s, top_t = _logits(best_s, SCALE_S, CAP_S), _logits(best_t, SCALE_T, CAP_T)
    lse_1, best, extra = top_s + tl.log(sum_1), best_s, 0.0
    if vocab < vocab_s:
        best_x, lse_x = _scan_further(s_row, vocab, vocab_s, BLOCK, SCALE_S, CAP_S)
        high = tl.maximum(lse_1, lse_x, propagate_nan=tl.PropagateNan.ALL)
        low = tl.minimum(lse_1, lse_x, propagate_nan=tl.PropagateNan.ALL)
        lse_1 = high + tl.log(1.0 + tl.exp2((low - high) * LOG2E))
        extra = tl.exp2((lse_x - lse_1) * LOG2E)
        best = tl.maximum(best_s, best_x)
    ce = lse_1 - _logits(label_logit, SCALE_S, CAP_S)
    loss = _share(ce_weight, ce)
    tl.store(ce_ptr + target, tl.where(heeded, ce, 0.0))
    tl.store(student_label_ptr + target, (label_logit == best).to(tl.int8))
    tl.store(extra_mass_ptr + target, extra)

    lse_s, lse_t, kl, kl_p, kl_q, kl_grad = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if HAS_TEACHER:
        lse_s = top_s * inv_tau + tl.log(sum_s)
        lse_t = top_t * inv_tau + tl.log(sum_t)
        if KL == FORWARD:  # sum p (t - s) / tau + lse_s - lse_t
            kl = (lse_s - lse_t) - cross * inv_tau / sum_t
        elif KL == REVERSE:
            kl = cross * inv_tau / sum_s - (lse_s - lse_t)
        else:
            kl_p, kl_q = _jsd_terms(
                s_row,
                t_row,
                vocab,
                inv_tau,
                lse_s,
                lse_t,
                beta,
                BLOCK,
                SCALE_S,
                CAP_S,
                SCALE_T,
                CAP_T,
            )
            kl = beta * kl_p + (1.0 - beta) * kl_q
        # Rounding may leave a divergence of equal rows just below 0.
        kl_least = tl.maximum(kl, 0.0, propagate_nan=tl.PropagateNan.ALL)
        kd_weight = tl.where(heeded, tl.load(kd_weight_ptr + target), 0.0)
        if T_SQUARED:
            kd_weight *= tau * tau
        kl_grad = kd_weight * inv_tau
        loss += _share(kd_weight, kl_least)
        tl.store(kl_ptr + at, tl.where(heeded, kl_least, 0.0))
        agree = tl.load(s_row + best_token) == best_s
        tl.store(teacher_student_ptr + at, agree.to(tl.int8))
        tl.store(teacher_label_ptr + at, (best_token == label).to(tl.int8))
    tl.store(loss_ptr + target, loss)

    if GRAD_S or GRAD_T:
        tl.debug_barrier()  # every warp has read the logits that the loops below overwrite
        lanes = tl.arange(0, BLOCK)
        ce_weight *= SCALE_S
        kl_grad_t = kl_grad * SCALE_T
        kl_grad *= SCALE_S
        g_row, g_t_row = grad_ptr + s_offset, grad_t_ptr + t_offset
        if NARROW:  # twice as many to a row
            g_row, g_t_row = g_row + s_offset, g_t_row + t_offset
        if GRAD_S:  # tokens the teacher does not have: cross-entropy alone
            last = vocab + (vocab_s - vocab - 1) // BLOCK * BLOCK
            for back in range(0, vocab_s - vocab, BLOCK):
                cols = last - back + lanes
                mask = cols < vocab_s
                s = _logits(tl.load(s_row + cols, mask=mask, other=0.0), SCALE_S, CAP_S)
                grad = ce_weight * (_softmax(s, 1.0, lse_1) - tl.where(cols == label, 1.0, 0.0))
                if CAP_S != 0.0:
                    grad *= _slope(s, CAP_S)
                if NARROW:
                    tl.debug_barrier()  # every warp has read this block
                tl.store(g_row + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        last = (vocab - 1) // BLOCK * BLOCK
        cols = last + lanes
        s_next = tl.load(s_row + cols, mask=cols < vocab, other=0.0)
        t_next = s_next
        if HAS_TEACHER:
            t_next = tl.load(t_row + cols, mask=cols < vocab, other=0.0)
        for back in range(0, vocab, BLOCK):
            cols = last - back + lanes
            s, t, ahead = s_next, t_next, cols - BLOCK
            s_next = tl.load(s_row + ahead, mask=ahead >= 0, other=0.0)
            s = _logits(s, SCALE_S, CAP_S)
            grad = ce_weight * (_softmax(s, 1.0, lse_1) - tl.where(cols == label, 1.0, 0.0))
            if HAS_TEACHER:
                t_next = tl.load(t_row + ahead, mask=ahead >= 0, other=0.0)
                t = _logits(t, SCALE_T, CAP_T)
                grad_s, grad_t = _divergence_grads(
                    s, t, inv_tau, lse_s, lse_t, kl, kl_p, kl_q, beta, KL
                )
                grad += kl_grad * grad_s
            if CAP_S != 0.0:
                grad *= _slope(s, CAP_S)
            if NARROW:
                tl.debug_barrier()  # every warp has read this block, and the next
            mask = cols < vocab
            if GRAD_S:
                tl.store(g_row + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)
            if GRAD_T:
                grad_t *= kl_grad_t
                if CAP_T != 0.0:
                    grad_t *= _slope(t, CAP_T)
                tl.store(g_t_row + cols, grad_t.to(grad_t_ptr.dtype.element_ty), mask=mask)
