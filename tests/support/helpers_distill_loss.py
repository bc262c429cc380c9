"""Comparison of `distill_loss` with its plain fp64 twin, shared by its test files."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from ldistill_kernels.distill_loss import DistillLoss, distill_loss
from ldistill_kernels.distill_loss.testing import make_inputs, plain_distill_loss

LEAVES = ("h_s", "w_s", "h_t")
KLS = ("forward", "reverse", "jsd")


def random_case(
    seed: int, targets: int, vocab: int, device: str = "cpu"
) -> tuple[dict, dict, dict]:
    """(inputs, options, options of ours alone) with everything drawn up to the given sizes."""
    draw = random.Random(seed)
    targets, vocab_s = draw.randint(1, targets), draw.randint(2, vocab)
    vocab_t = draw.choice([vocab_s, draw.randint(1, vocab_s), draw.randint(vocab_s, 2 * vocab_s)])
    shared = min(vocab_s, vocab_t)
    options = {
        "kl": draw.choice(KLS),
        "beta": draw.uniform(0.05, 0.95),
        "t_squared": draw.random() < 0.7,
        "vocab": draw.choice([shared, draw.randint(1, shared)]),
    }
    for head in "st":
        options[f"logit_scale_{head}"] = draw.choice([1.0, 1.0, draw.uniform(0.05, 2.0)])
        options[f"softcap_{head}"] = draw.choice([None, None, draw.uniform(1.0, 40.0)])
    taught = draw.choice([0, targets, draw.randint(0, targets)])
    inputs = make_inputs(
        targets, taught, vocab_s, vocab_t, device=device,
        hidden_s=draw.randint(1, 40), hidden_t=draw.randint(1, 40), seed=seed,
        ignored=draw.choice([0.0, 0.3, 1.0]), scale=draw.choice([0.1, 2.0, 20.0]),
    )  # fmt: skip
    return inputs, options, {"chunk_targets": draw.randint(1, targets + 1)}


def as_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in fp64, cut off from the originals."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.double() if value.is_floating_point() else value

    return {name: convert(value) for name, value in inputs.items()}


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Make hidden states and the student's head require gradients; return them by name."""
    return {name: inputs[name].requires_grad_() for name in LEAVES if inputs[name] is not None}


def relative(got: Tensor, want: Tensor) -> float:
    """Largest deviation against the largest wanted entry."""
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
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
    """Loss, per-target values and every gradient within `tolerance`; `run` reaches only our op."""
    (loss, ce, kl), want = fp64_gradients(inputs, **options)
    out, got = gradients(inputs, **options, **(run or {}))
    assert relative(out.loss, loss) < tolerance
    assert relative(out.ce, ce) < tolerance
    # KL is a difference of log-sum-exps: fp32 leaves it a few roundings of those.
    rounding = 4e-6 if out.kl.dtype == torch.float32 else 1e-12
    assert_close(out.kl.double(), kl.detach(), rtol=tolerance, atol=rounding)
    for name, grad in got.items():
        assert grad.dtype == inputs[name].dtype
        assert grad.shape == inputs[name].shape
        assert relative(grad, want[name]) < tolerance, name


def assert_equals_teach_nothing(inputs: dict[str, Any], **options: Any) -> None:
    """A student that is its own teacher: no divergence, no gradient, agreement everywhere."""
    same = {"h_t": inputs["h_s"].clone(), "w_t": inputs["w_s"].clone(), "ce_weight": 0.0}
    out, grads = gradients(inputs | same, **options)
    assert out.loss == 0
    assert torch.count_nonzero(out.kl) == 0
    assert all(grad.abs().max() <= 1e-6 for grad in grads.values())
    assert out.teacher_student.all()


def assert_near_teacher_is_exact(inputs: dict[str, Any], near: Tensor, **options: Any) -> None:
    """The gradients of a student close to its teacher's head `near`, within 0.5% of fp64."""
    inputs = inputs | {"h_t": inputs["h_s"].clone(), "w_t": near, "ce_weight": 0.0}
    _, want = fp64_gradients(inputs, kl=options["kl"])
    _, got = gradients(inputs, **options)
    for name, grad in got.items():
        error = (grad.double() - want[name]).norm() / want[name].norm()
        assert error <= 0.005, name
