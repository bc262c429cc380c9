"""What one row of the loss needs and gives: the contract between the chunk loop and its row steps.

A row step receives the fp32 logits of a chunk of rows, writes the per-row results and replaces
the logits by their gradients. `reference.py` is the step in PyTorch, `triton.py` in Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward", "reverse", "jsd")


class RowInputs(NamedTuple):
    """Per student row, all `[rows]`; weights are zero where the label is ignored."""

    labels: Tensor  # int64
    ce_grad: Tensor  # fp32: weight of d CE / d logits
    kl_grad: Tensor  # fp32: weight of d KL / d (logits / temperature)
    inv_temperature: Tensor  # fp32


class RowOutputs(NamedTuple):
    """Per-row results; `ce`, `student_label`, `extra_mass` `[rows]`, the others `[rows_t]`."""

    ce: Tensor
    kl: Tensor
    teacher_student: Tensor
    teacher_label: Tensor
    student_label: Tensor
    extra_mass: Tensor


class RowSettings(NamedTuple):
    """What is the same for every row of a call."""

    vocab: int
    kl: str
    beta: float
    grad_student: bool
    grad_teacher: bool
    grad_dtype: torch.dtype


class Chunk(NamedTuple):
    """Student rows `rows[start:stop]` (or `start:stop` itself when `rows` is None) of one call.

    `teacher` says whether teacher rows `start:stop` belong to them, in the same order.
    """

    start: int
    stop: int
    rows: Tensor | None
    teacher: bool

    def index(self, lo: int = 0, hi: int | None = None) -> slice | Tensor:
        """Index of the chunk's rows lo:hi in student-aligned arrays."""
        span = self.span(lo, hi)
        return span if self.rows is None else self.rows[span]

    def span(self, lo: int = 0, hi: int | None = None) -> slice:
        """Position of the chunk's rows lo:hi in `rows`, and in teacher-aligned arrays."""
        return slice(self.start + lo, self.stop if hi is None else self.start + hi)
