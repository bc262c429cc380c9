"""Comparison of `distill_loss` with its plain fp64 twin, shared by its test files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldistill_kernels.distill_loss import DistillLoss, distill_loss
from ldistill_kernels.distill_loss.testing import plain_distill_loss

LEAVES = ("h_s", "w_s", "h_t")


def as_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in fp64 on the CPU, cut off from the originals."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value

    return {name: convert(value) for name, value in inputs.items()}


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Make hidden states and the student's head require gradients; return them by name."""
    return {name: inputs[name].requires_grad_() for name in LEAVES if inputs[name] is not None}


def relative(got: Tensor, want: Tensor) -> float:
    """Largest deviation against the largest wanted entry."""
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def fp64_gradients(inputs: dict[str, Any], **options: Any) -> tuple[tuple, dict[str, Tensor]]:
    """(loss, ce, kl) and gradients by name, from materialised fp64 logits and autograd."""
    exact = as_double(inputs)
    wanted = leaves(exact)
    results = plain_distill_loss(**exact, **options)
    return results, dict(zip(wanted, torch.autograd.grad(results[0], wanted.values())))


def gradients(inputs: dict[str, Any], **options: Any) -> tuple[DistillLoss, dict[str, Tensor]]:
    """Result of `distill_loss` and its gradients by name."""
    wanted = leaves(inputs)
    out = distill_loss(**inputs, **options)
    return out, dict(zip(wanted, torch.autograd.grad(out.loss, wanted.values())))


def assert_matches_fp64(
    inputs: dict[str, Any], tolerance: float, run: dict[str, Any] | None = None, **options: Any
) -> None:
    """Loss, per-row values and every gradient within `tolerance`; `run` reaches only our op."""
    (loss, ce, kl), want = fp64_gradients(inputs, **options)
    out, got = gradients(inputs, **options, **(run or {}))
    assert relative(out.loss, loss) < tolerance
    assert relative(out.ce, ce) < tolerance
    assert relative(out.kl, kl) < tolerance
    for name, grad in got.items():
        assert grad.dtype == inputs[name].dtype
        assert grad.shape == inputs[name].shape
        assert relative(grad, want[name]) < tolerance, name
