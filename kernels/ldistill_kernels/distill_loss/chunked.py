"""The chunk loop: logits of a bounded number of targets at a time, gradients formed on the spot.

Targets with a teacher and targets without form chunks of their own, so one without never touches
the teacher's head, and the number of chunks follows from shapes alone: nothing is read back from
the device. The memory of the logits is reused by every chunk.
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
from ldistill_kernels.distill_loss.targets import Chunk, Settings, TargetInputs, TargetOutputs

LOGITS_BYTES = {"cuda": 384 << 20, "cpu": 128 << 20}
TILE = 128  # rows of a tile of a large product; a chunk that fills its last one wastes nothing
MAX_CHUNK = 4096
FP16_PEAK = 1024.0  # about the largest gradient weight in fp16: far from both ends of its range

TargetStep = Callable[..., tuple[Tensor, Tensor | None]]


class Problem(NamedTuple):
    """One call, checked."""

    h_s: Tensor
    w_s: Tensor
    h_t: Tensor | None
    w_t: Tensor | None  # already cut to the compared vocabulary
    inputs: TargetInputs
    kd_targets: Tensor | None
    taught_chunk: int  # targets of a chunk with a teacher
    untaught_chunk: int
    grad_h: bool
    grad_w: bool

    @property
    def targets(self) -> int:
        return self.h_s.shape[0]

    @property
    def taught(self) -> int:
        return 0 if self.h_t is None else self.h_t.shape[0]


class Solution(NamedTuple):
    """Loss, per-target results, and the gradients of the loss (empty where not wanted)."""

    loss: Tensor
    targets: TargetOutputs
    grad_h_s: Tensor
    grad_w_s: Tensor
    grad_h_t: Tensor


def chunk_targets(device: str, vocab: int) -> int:
    """Targets whose fp32 logits, `vocab` in all heads, come closest to the device's budget.

    Whole tiles, at least one; at most a quarter more than the budget where there are more.
    """
    budget = LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"])
    tiles = budget / (4 * vocab * TILE)
    return min(max(int(min(tiles + 0.5, 1.25 * tiles)), 1) * TILE, MAX_CHUNK)


def other_targets(kd_targets: Tensor, targets: int) -> Tensor:
    """What sorted `kd_targets` leaves out of `range(targets)`, without a host synchronisation.

    `kd_targets[k] - k` targets are missing before the k-th one, so the j-th missing one is j plus
    the number of taught targets that have at most j missing ones before them.
    """
    missing = torch.arange(targets - kd_targets.numel(), device=kd_targets.device)
    gaps = kd_targets - torch.arange(kd_targets.numel(), device=kd_targets.device)
    return missing + torch.searchsorted(gaps, missing, right=True)


def plan(problem: Problem) -> Iterator[Chunk]:
    """Chunks that cover every target once: first those with a teacher, then the others."""
    targets, taught = problem.targets, problem.taught
    others = None
    if 0 < taught < targets:
        others = other_targets(problem.kd_targets, targets)
    for lo in range(0, taught, problem.taught_chunk):
        index = None if taught == targets else problem.kd_targets
        yield Chunk(lo, min(lo + problem.taught_chunk, taught), index, teacher=True)
    for lo in range(0, targets - taught, problem.untaught_chunk):
        hi = min(lo + problem.untaught_chunk, targets - taught)
        yield Chunk(lo, hi, others, teacher=False)


def solve(problem: Problem, settings: Settings, step: TargetStep) -> Solution:
    """Loss, diagnostics and gradients of one call; `step` does the targets of a chunk."""
    # fp16 gradients of small weights would vanish: solved for larger ones, scaled back at the end.
    scale = _fp16_scale(problem, settings)
    inputs = problem.inputs if scale is None else _divided(problem.inputs, scale)
    result = _allocate(problem, settings)
    buffers = _Buffers(problem)
    for number, chunk in enumerate(plan(problem)):
        _solve_chunk(problem, settings, chunk, number == 0, inputs, result, buffers, step)
    loss = result.targets.loss.sum()
    if scale is not None:
        loss *= scale
        for grad in (result.grad_h_s, result.grad_w_s, result.grad_h_t):
            grad.mul_(scale)
    return result._replace(loss=loss)


def _fp16_scale(problem: Problem, settings: Settings) -> Tensor | None:
    """What weights are divided by for gradients in fp16: a power of two, so nothing is rounded."""
    if settings.grad_dtype != torch.float16 or not problem.targets:
        return None
    _, ce, kd, tau = problem.inputs
    top = ce.max() if kd is None else (ce + kd * (tau if settings.t_squared else 1 / tau)).max()
    return torch.where(top > 0, top / torch.frexp(top).mantissa / FP16_PEAK, 1.0)


def _divided(inputs: TargetInputs, scale: Tensor) -> TargetInputs:
    kd_weight = None if inputs.kd_weight is None else inputs.kd_weight / scale
    return inputs._replace(ce_weight=inputs.ce_weight / scale, kd_weight=kd_weight)


def _allocate(problem: Problem, settings: Settings) -> Solution:
    """Room for all results: chunks write every one, and the head's gradient if there are any."""
    h_s, h_t, w_s, targets, taught = (
        problem.h_s, problem.h_t, problem.w_s, problem.targets, problem.taught
    )  # fmt: skip
    wide, flag = (
        h_s.new_empty(0, dtype=compute_dtype(h_s.dtype)),
        h_s.new_empty(0, dtype=torch.bool),
    )
    outputs = TargetOutputs(
        loss=wide.new_empty(targets),
        ce=wide.new_empty(targets),
        kl=wide.new_empty(taught),
        teacher_student=flag.new_empty(taught),
        teacher_label=flag.new_empty(taught),
        student_label=flag.new_empty(targets),
        extra_mass=wide.new_empty(targets),
    )
    # The first chunk writes the head's gradient and the others add; without targets nobody writes.
    make = torch.empty if targets else torch.zeros
    return Solution(
        loss=outputs.loss,
        targets=outputs,
        grad_h_s=grad_buffer(h_s, problem.grad_h),
        grad_w_s=make(w_s.shape if problem.grad_w else (0,), dtype=wide.dtype, device=w_s.device),
        grad_h_t=grad_buffer(h_s if h_t is None else h_t, settings.grad_teacher),
    )


def grad_buffer(hidden: Tensor, wanted: bool) -> Tensor:
    """Room for the gradient of hidden states; fp16 could underflow before a loss scale applies."""
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return torch.empty(hidden.shape if wanted else (0,), dtype=dtype, device=hidden.device)


class _Buffers:
    """Memory for the logits of one chunk, allocated once per call."""

    def __init__(self, problem: Problem) -> None:
        self.vocab_s = problem.w_s.shape[0]
        self.vocab_t = 0 if problem.w_t is None else problem.w_t.shape[0]
        taught = min(problem.taught_chunk, problem.taught)
        untaught = min(problem.untaught_chunk, problem.targets - problem.taught)
        wide_s, wide_t = padded(self.vocab_s), padded(self.vocab_t)
        size = max(taught * (wide_s + wide_t), untaught * wide_s)
        dtype = compute_dtype(problem.h_s.dtype)
        self.memory = torch.empty(size, dtype=dtype, device=problem.h_s.device)

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """The student's `[c, vocab_s]` and, if the chunk has one, the teacher's `[c, vocab_t]`."""
        size = chunk.stop - chunk.start
        student = self._part(0, size, self.vocab_s)
        if not chunk.teacher:
            return student, None
        return student, self._part(size * padded(self.vocab_s), size, self.vocab_t)

    def _part(self, start: int, size: int, vocab: int) -> Tensor:
        return self.memory[start:].as_strided((size, vocab), (padded(vocab), 1))


def padded(vocab: int) -> int:
    """Elements from one row of logits to the next, 256 bytes or a multiple: products like that."""
    return -(-vocab // 64) * 64


def _solve_chunk(
    problem: Problem,
    settings: Settings,
    chunk: Chunk,
    first: bool,
    inputs: TargetInputs,
    result: Solution,
    buffers: _Buffers,
    step: TargetStep,
) -> None:
    span, index = chunk.span(), chunk.index()
    hidden = problem.h_s[index]  # [c, hidden]; a view where targets are a range
    logits, teacher = buffers.logits(chunk)  # [c, vocab_s], [c, vocab]: the last chunk's memory
    project(hidden, problem.w_s, logits)
    if chunk.teacher:
        project(problem.h_t[span], problem.w_t, teacher)
    # The gradients lie where the logits were: nothing of size [c, vocab] is allocated.
    grad, grad_t = step(logits, teacher, chunk, inputs, result.targets, settings)
    if problem.grad_h:
        value = input_gradient(grad, problem.w_s)
        # A slice converts as it copies; an index does not.
        narrow = value if chunk.targets is None else value.to(result.grad_h_s.dtype)
        result.grad_h_s[index] = narrow
    if problem.grad_w:
        add_weight_gradient(result.grad_w_s, grad, hidden, first)
    if settings.grad_teacher and chunk.teacher:
        result.grad_h_t[span] = input_gradient(grad_t, problem.w_t)
