"""What one target of the loss needs and gives: the contract between the chunk loop and its steps.

A step receives the fp32 logits of a chunk of targets, writes the results of each target and
replaces the logits by their gradients. `reference.py` is the step in PyTorch, `triton.py` the one
in Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward", "reverse", "jsd")


class TargetInputs(NamedTuple):
    """Per target, all `[targets]`; the last two are None in a call without a teacher."""

    labels: Tensor  # int64
    ce_weight: Tensor  # fp32
    kd_weight: Tensor | None  # fp32
    temperature: Tensor | None  # fp32


class TargetOutputs(NamedTuple):
    """Per-target results; `kl`, `teacher_student` and `teacher_label` are `[taught]`, the others
    `[targets]`. Of an ignored target every one but the teacher's and `extra_mass` is zero."""

    loss: Tensor  # the target's share of the loss
    ce: Tensor
    kl: Tensor
    teacher_student: Tensor
    teacher_label: Tensor
    student_label: Tensor
    extra_mass: Tensor


class Scaling(NamedTuple):
    """What makes logits of a product x: cap tanh(scale x / cap), or scale x where cap is 0."""

    scale: float = 1.0
    cap: float = 0.0


class Settings(NamedTuple):
    """What is the same for every target of a call."""

    vocab: int
    kl: str
    beta: float
    t_squared: bool
    ignore_index: int
    grad_student: bool
    grad_teacher: bool
    grad_dtype: torch.dtype
    scaling_s: Scaling = Scaling()
    scaling_t: Scaling = Scaling()


class Chunk(NamedTuple):
    """The student's targets `targets[start:stop]` (`start:stop` itself when `targets` is None).

    `teacher` says whether the taught targets `start:stop` are these, in the same order.
    """

    start: int
    stop: int
    targets: Tensor | None
    teacher: bool

    def index(self, lo: int = 0, hi: int | None = None) -> slice | Tensor:
        """Index of the chunk's targets lo:hi in arrays of all targets."""
        span = self.span(lo, hi)
        return span if self.targets is None else self.targets[span]

    def span(self, lo: int = 0, hi: int | None = None) -> slice:
        """Position of the chunk's targets lo:hi in `targets`, and in arrays of the taught ones."""
        return slice(self.start + lo, self.stop if hi is None else self.start + hi)
