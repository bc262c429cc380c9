"""The chunk loop: logits of a bounded number of rows at a time, gradients formed on the spot.

Rows with a teacher and rows without form chunks of their own, so a row without one never touches
the teacher's head, and the number of chunks follows from shapes alone: nothing is read back from
the device. The logits buffers are reused by every chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ldistill_kernels.distill_loss.matmul import (
    add_weight_gradient,
    compute_dtype,
    input_gradient,
    project,
)
from ldistill_kernels.distill_loss.rows import Chunk, RowInputs, RowOutputs, RowSettings

LOGITS_BYTES = {"cuda": 384 << 20, "cpu": 128 << 20}
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 64, 4096
FP16_PEAK = 1024.0  # largest gradient weight in fp16: far from both ends of its range

RowStep = Callable[..., tuple[Tensor, Tensor | None]]


class Problem(NamedTuple):
    """One call, checked and with every per-row argument as an fp32 `[rows]` tensor."""

    h_s: Tensor
    w_s: Tensor
    h_t: Tensor | None
    w_t: Tensor | None  # already cut to the compared vocabulary
    labels: Tensor
    ce_weight: Tensor
    kd_weight: Tensor
    temperature: Tensor
    kd_rows: Tensor | None
    t_squared: bool
    ignore_index: int
    chunk_rows: int
    grad_h: bool
    grad_w: bool


class Solution(NamedTuple):
    """Loss, per-row results, and the gradients of the loss (empty where not wanted)."""

    loss: Tensor
    rows: RowOutputs
    grad_h_s: Tensor
    grad_w_s: Tensor
    grad_h_t: Tensor


def default_chunk_rows(device: str, vocab_s: int, vocab_t: int) -> int:
    """Rows whose fp32 logits fill the device's budget, in steps of 64."""
    budget = LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"])
    rows = budget // (4 * max(vocab_s + vocab_t, 1)) // 64 * 64
    return min(max(rows, MIN_CHUNK_ROWS), MAX_CHUNK_ROWS)


def other_rows(kd_rows: Tensor, rows: int) -> Tensor:
    """The rows of `range(rows)` that sorted `kd_rows` leaves out, without a host synchronisation.

    `kd_rows[k] - k` rows are missing before the k-th one, so the j-th missing row is j plus the
    number of teacher rows that have at most j missing rows before them.
    """
    missing = torch.arange(rows - kd_rows.numel(), device=kd_rows.device)
    gaps = kd_rows - torch.arange(kd_rows.numel(), device=kd_rows.device)
    return missing + torch.searchsorted(gaps, missing, right=True)


def plan(problem: Problem) -> Iterator[Chunk]:
    """Chunks that cover every row once: first those with a teacher, then the others."""
    rows, step = problem.h_s.shape[0], problem.chunk_rows
    paired = 0 if problem.h_t is None else problem.h_t.shape[0]
    others = None
    if 0 < paired < rows:
        others = other_rows(problem.kd_rows, rows)
    for lo in range(0, paired, step):
        index = None if paired == rows else problem.kd_rows
        yield Chunk(lo, min(lo + step, paired), index, teacher=True)
    for lo in range(0, rows - paired, step):
        yield Chunk(lo, min(lo + step, rows - paired), others, teacher=False)


def solve(problem: Problem, settings: RowSettings, step: RowStep) -> Solution:
    """Loss, diagnostics and gradients of one call; `step` does the rows of a chunk."""
    ignored = problem.labels == problem.ignore_index
    inputs, peak = _row_inputs(problem, ignored, settings)
    result = _allocate(problem, settings)
    buffers = _Buffers(problem)
    for chunk in plan(problem):
        _solve_chunk(problem, settings, chunk, inputs, result, buffers, step)
    _finish_rows(problem, ignored, result.rows)
    if peak is not None:
        for grad in (result.grad_h_s, result.grad_w_s, result.grad_h_t):
            grad.mul_(peak)
    return result._replace(loss=_total(problem, ignored, result.rows))


def _row_inputs(
    problem: Problem, ignored: Tensor, settings: RowSettings
) -> tuple[RowInputs, Tensor | None]:
    """Gradient weights per row; for fp16 gradients, divided by the returned scale."""
    tau = problem.temperature
    kl_weight = problem.kd_weight * (tau if problem.t_squared else 1.0 / tau)
    ce_grad = problem.ce_weight.masked_fill(ignored, 0.0)
    kl_grad = kl_weight.masked_fill(ignored, 0.0)
    peak = None
    if settings.grad_dtype == torch.float16 and ce_grad.numel():
        peak = (ce_grad + kl_grad).max() / FP16_PEAK
        peak = torch.where(peak > 0, peak, 1.0)
        ce_grad, kl_grad = ce_grad / peak, kl_grad / peak
    return RowInputs(problem.labels, ce_grad, kl_grad, 1.0 / tau), peak


def _allocate(problem: Problem, settings: RowSettings) -> Solution:
    h_s, h_t, w_s = problem.h_s, problem.h_t, problem.w_s
    rows, paired = h_s.shape[0], 0 if h_t is None else h_t.shape[0]
    wide, device = compute_dtype(h_s.dtype), h_s.device
    per_row = RowOutputs(
        ce=torch.zeros(rows, dtype=wide, device=device),
        kl=torch.zeros(paired, dtype=wide, device=device),
        teacher_student=torch.zeros(paired, dtype=torch.bool, device=device),
        teacher_label=torch.zeros(paired, dtype=torch.bool, device=device),
        student_label=torch.zeros(rows, dtype=torch.bool, device=device),
        extra_mass=torch.zeros(rows, dtype=wide, device=device),
    )
    return Solution(
        loss=torch.zeros((), dtype=wide, device=device),
        rows=per_row,
        grad_h_s=grad_buffer(h_s, problem.grad_h),
        grad_w_s=torch.zeros(w_s.shape if problem.grad_w else (0,), dtype=wide, device=device),
        grad_h_t=grad_buffer(h_t if h_t is not None else h_s, settings.grad_teacher),
    )


def grad_buffer(hidden: Tensor, wanted: bool) -> Tensor:
    """Room for the gradient of hidden rows; fp16 could underflow before a loss scale applies."""
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return torch.zeros(hidden.shape if wanted else (0,), dtype=dtype, device=hidden.device)


class _Buffers:
    """Logits of one chunk, allocated once per call."""

    def __init__(self, problem: Problem) -> None:
        wide = compute_dtype(problem.h_s.dtype)
        rows = min(problem.chunk_rows, problem.h_s.shape[0])
        self.student = _padded(rows, problem.w_s.shape[0], wide, problem.h_s.device)
        self.teacher = None
        if problem.h_t is not None and problem.h_t.shape[0]:
            rows = min(problem.chunk_rows, problem.h_t.shape[0])
            self.teacher = _padded(rows, problem.w_t.shape[0], wide, problem.h_s.device)


def _padded(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Rows start on 256-byte boundaries: odd vocabularies keep aligned matrix products.
    width = -(-vocab // 64) * 64
    return torch.empty(rows, width, dtype=dtype, device=device)[:, :vocab]


def _solve_chunk(
    problem: Problem,
    settings: RowSettings,
    chunk: Chunk,
    inputs: RowInputs,
    result: Solution,
    buffers: _Buffers,
    step: RowStep,
) -> None:
    size, span, index = chunk.stop - chunk.start, chunk.span(), chunk.index()
    hidden, logits = problem.h_s[index], buffers.student[:size]
    project(hidden, problem.w_s, logits)
    teacher = None
    if chunk.teacher:
        teacher = buffers.teacher[:size]
        project(problem.h_t[span], problem.w_t, teacher)
    grad, grad_t = step(logits, teacher, chunk, inputs, result.rows, settings)
    if problem.grad_h:
        dtype = result.grad_h_s.dtype
        result.grad_h_s[index] = input_gradient(grad, problem.w_s, dtype)
    if problem.grad_w:
        add_weight_gradient(result.grad_w_s, grad, hidden)
    if settings.grad_teacher and chunk.teacher:
        result.grad_h_t[span] = input_gradient(grad_t, problem.w_t, result.grad_h_t.dtype)


def _finish_rows(problem: Problem, ignored: Tensor, rows: RowOutputs) -> None:
    """An ignored row reports no loss and no hit."""
    rows.ce.masked_fill_(ignored, 0.0)
    rows.student_label.masked_fill_(ignored, False)
    if rows.kl.numel():
        rows.kl.masked_fill_(_paired(problem, ignored), 0.0)


def _paired(problem: Problem, values: Tensor) -> Tensor:
    """The entries of a `[rows]` array that belong to the teacher's rows."""
    return values if problem.h_t.shape[0] == values.shape[0] else values[problem.kd_rows]


def _total(problem: Problem, ignored: Tensor, rows: RowOutputs) -> Tensor:
    loss = _weighted_sum(problem.ce_weight.masked_fill(ignored, 0.0), rows.ce)
    if rows.kl.numel():
        weight = problem.kd_weight
        weight = weight * problem.temperature.square() if problem.t_squared else weight
        loss = loss + _weighted_sum(_paired(problem, weight.masked_fill(ignored, 0.0)), rows.kl)
    return loss


def _weighted_sum(weight: Tensor, value: Tensor) -> Tensor:
    # A weight of zero removes the row even when its value is not finite.
    return torch.where(weight > 0, weight * value, 0.0).sum()
