"""Registration with PyTorch: the operator, its fake twin for tracing, and the autograd function.

The operator computes the loss *and* its gradients; the autograd function only scales the latter.
So the backward never reads the heads: a head gathered for the forward alone (ZeRO-3) is enough.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldistill_kernels.distill_loss import chunked, reference
from ldistill_kernels.distill_loss.matmul import compute_dtype
from ldistill_kernels.distill_loss.targets import Scaling, Settings, TargetInputs

OP = "ldistill::distill_loss"

torch.library.define(
    OP,
    "(Tensor h_s, Tensor w_s, Tensor? h_t, Tensor? w_t, Tensor labels, Tensor ce_weight, "
    "Tensor? kd_weight, Tensor? temperature, Tensor? kd_targets, int vocab, str kl, float beta, "
    "bool t_squared, float logit_scale_s, float softcap_s, float logit_scale_t, float softcap_t, "
    "int ignore_index, int taught_chunk, int untaught_chunk, bool triton, "
    "bool grad_h_s, bool grad_w_s, bool grad_h_t) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(OP, ("cpu", "cuda"))
def _distill_loss(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor | None,
    w_t: Tensor | None,
    labels: Tensor,
    ce_weight: Tensor,
    kd_weight: Tensor | None,
    temperature: Tensor | None,
    kd_targets: Tensor | None,
    vocab: int,
    kl: str,
    beta: float,
    t_squared: bool,
    logit_scale_s: float,
    softcap_s: float,
    logit_scale_t: float,
    softcap_t: float,
    ignore_index: int,
    taught_chunk: int,
    untaught_chunk: int,
    triton: bool,
    grad_h_s: bool,
    grad_w_s: bool,
    grad_h_t: bool,
) -> tuple[Tensor, ...]:
    problem = chunked.Problem(
        h_s, w_s, h_t, None if w_t is None else w_t[:vocab],
        TargetInputs(labels, ce_weight, kd_weight, temperature), kd_targets,
        taught_chunk, untaught_chunk, grad_h_s, grad_w_s,
    )  # fmt: skip
    settings = Settings(
        vocab=vocab,
        kl=kl,
        beta=beta,
        t_squared=t_squared,
        ignore_index=ignore_index,
        grad_student=grad_h_s or grad_w_s,
        grad_teacher=grad_h_t,
        grad_dtype=h_s.dtype if triton else compute_dtype(h_s.dtype),
        scaling_s=Scaling(logit_scale_s, softcap_s),
        scaling_t=Scaling(logit_scale_t, softcap_t),
    )
    # Every product below states its precision; autocast would narrow those that have no out=.
    device = h_s.device.type
    narrows = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if narrows else nullcontext():
        solution = chunked.solve(problem, settings, _target_step(triton))
    return (
        solution.loss, *solution.targets[1:], solution.grad_h_s, solution.grad_w_s,
        solution.grad_h_t,
    )  # fmt: skip


def _target_step(triton: bool) -> chunked.TargetStep:
    if not triton:
        return reference.target_step
    from ldistill_kernels.distill_loss import triton as step  # only where Triton is wanted

    return step.target_step


@torch.library.register_fake(OP)
def _fake(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor | None,
    w_t: Tensor | None,
    labels: Tensor,
    ce_weight: Tensor,
    kd_weight: Tensor | None,
    temperature: Tensor | None,
    kd_targets: Tensor | None,
    vocab: int,
    kl: str,
    beta: float,
    t_squared: bool,
    logit_scale_s: float,
    softcap_s: float,
    logit_scale_t: float,
    softcap_t: float,
    ignore_index: int,
    taught_chunk: int,
    untaught_chunk: int,
    triton: bool,
    grad_h_s: bool,
    grad_w_s: bool,
    grad_h_t: bool,
) -> tuple[Tensor, ...]:
    wide = compute_dtype(h_s.dtype)
    targets, taught = h_s.shape[0], 0 if h_t is None else h_t.shape[0]
    return (
        h_s.new_empty((), dtype=wide),
        h_s.new_empty(targets, dtype=wide),
        h_s.new_empty(taught, dtype=wide),
        h_s.new_empty(taught, dtype=torch.bool),
        h_s.new_empty(taught, dtype=torch.bool),
        h_s.new_empty(targets, dtype=torch.bool),
        h_s.new_empty(targets, dtype=wide),
        chunked.grad_buffer(h_s, grad_h_s),
        h_s.new_empty(w_s.shape if grad_w_s else (0,), dtype=wide),
        chunked.grad_buffer(h_s if h_t is None else h_t, grad_h_t),
    )


class DistillLossFunction(torch.autograd.Function):
    """Arguments as the operator's; returns the loss and the six detached per-target results."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        loss, *rest = torch.ops.ldistill.distill_loss(*args)
        targets, grads = rest[:6], rest[6:]  # gradients of h_s [targets, hidden], w_s, h_t
        ctx.save_for_backward(*grads)
        ctx.dtypes = tuple(None if arg is None else arg.dtype for arg in args[:3])
        ctx.wanted = args[-3:]
        ctx.count = len(args)
        ctx.mark_non_differentiable(*targets)
        return loss, *targets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # The loss is a scalar, so every gradient is the kept one times `grad_loss`.
        grads = [
            _scaled(grad, grad_loss, dtype) if wanted else None
            for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        ]
        return *grads, *(None for _ in range(ctx.count - 3))


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor rounded once to `dtype`, without a wide copy of a head's gradient."""
    if grad.dtype == dtype == factor.dtype:
        return grad * factor
    # One element, not a 0-d scalar: a scalar would first be rounded to the gradient's dtype.
    return torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad, dtype=dtype))
