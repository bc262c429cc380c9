"""What computes the same loss as `distill_loss`, from the same heads, and the floor below all.

A provider takes the `Heads` of one measurement and returns the scalar loss; its gradients are those
of autograd. A measurement is cross-entropy plus forward KL, every target with a teacher, or ("ce")
cross-entropy alone, as targets of sources that do not distil have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from common import Registry
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldistill_kernels import distill_loss
from ldistill_kernels.distill_loss.testing import plain_distill_loss

ALPHA, TEMPERATURE = 0.5, 2.0


@dataclass(frozen=True)
class Shape:
    """One point of the grid; student and teacher alike."""

    hidden: int
    vocab: int
    targets: int
    kind: str = "distill"

    @property
    def products(self) -> int:
        """Those that nobody can avoid: projections, and the gradients of the student's."""
        return 4 if self.kind == "distill" else 3

    @property
    def flops(self) -> int:
        """Of these products."""
        return self.products * 2 * self.hidden * self.vocab * self.targets


@dataclass
class Heads:
    """States, heads and labels of one measurement."""

    h_s: Tensor
    w_s: Tensor
    h_t: Tensor | None
    w_t: Tensor | None
    labels: Tensor

    @classmethod
    def draw(cls, shape: Shape, device: str, dtype: torch.dtype) -> Heads:
        """Random ones whose logits have a standard deviation of about 2."""
        gen = torch.Generator(device).manual_seed(0)

        def normal(length: int, std: float) -> Tensor:
            values = torch.randn(length, shape.hidden, generator=gen, device=device)
            return (values * std).to(dtype)

        std = 2.0 * shape.hidden**-0.5
        labels = torch.randint(shape.vocab, (shape.targets,), generator=gen, device=device)
        h_s, w_s = normal(shape.targets, 1.0), normal(shape.vocab, std)
        teacher = None, None
        if shape.kind == "distill":
            teacher = normal(shape.targets, 1.0), normal(shape.vocab, std)
        return cls(h_s.requires_grad_(), w_s.requires_grad_(), *teacher, labels)

    def first(self, targets: int) -> Heads:
        """The first targets, as leaves of their own."""
        h_t = None if self.h_t is None else self.h_t[:targets]
        return Heads(self.h_s[:targets].detach().requires_grad_(), self.w_s, h_t,
                     self.w_t, self.labels[:targets])  # fmt: skip

    def double(self) -> Heads:
        h_s, w_s, h_t, w_t = (
            None if x is None else x.detach().double()
            for x in (self.h_s, self.w_s, self.h_t, self.w_t)
        )
        return Heads(h_s.requires_grad_(), w_s.requires_grad_(), h_t, w_t, self.labels)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.h_s, self.w_s, self.h_t, self.w_t, self.labels

    @property
    def weights(self) -> dict[str, float]:
        targets = self.labels.numel()
        if self.h_t is None:
            return {"ce_weight": 1 / targets}
        return {"ce_weight": (1 - ALPHA) / targets, "kd_weight": ALPHA / targets,
                "temperature": TEMPERATURE}  # fmt: skip


Loss = Callable[[Heads], Tensor]
PROVIDERS = Registry()  # name -> Loss; those whose name ends in " ce" know no teacher
TEACHER_ONLY = ("liger",)


def suited(names: list[str], kind: str) -> dict[str, Loss]:
    """The providers among `names` that compute this kind of loss."""
    return {
        name: PROVIDERS[name]
        for name in names
        if not (name in TEACHER_ONLY if kind == "ce" else name.endswith(" ce"))
    }


@PROVIDERS.add("ours")
def ours(heads: Heads) -> Tensor:
    return distill_loss(*heads.tensors, **heads.weights).loss


@PROVIDERS.add("plain")
def plain(heads: Heads) -> Tensor:
    """Materialised logits, plain PyTorch, gradients from autograd."""
    return plain_distill_loss(*heads.tensors, **heads.weights)[0]


@PROVIDERS.add("chunked-autograd")
def chunked_autograd(heads: Heads, targets: int = 1024) -> Tensor:
    """As training libraries in plain PyTorch do it: products in the dtype of the heads, the rest in
    fp32, a chunk of targets at a time, recomputed in the backward."""
    weights, total = heads.weights, 0.0

    def part(h_s: Tensor, w_s: Tensor, h_t: Tensor | None, labels: Tensor) -> Tensor:
        student = (h_s @ w_s.t()).float()
        ce = weights["ce_weight"] * F.cross_entropy(student, labels, reduction="sum")
        if h_t is None:
            return ce
        log_q = F.log_softmax(student / TEMPERATURE, -1)
        log_p = F.log_softmax((h_t @ heads.w_t.t()).float() / TEMPERATURE, -1)
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return ce + weights["kd_weight"] * TEMPERATURE**2 * kl

    for lo in range(0, heads.labels.numel(), targets):
        span = slice(lo, lo + targets)
        h_t = None if heads.h_t is None else heads.h_t[span]
        total = total + checkpoint(part, heads.h_s[span], heads.w_s, h_t, heads.labels[span],
                                   use_reentrant=False)  # fmt: skip
    return total


@PROVIDERS.add("liger", package="liger_kernel")
def liger(heads: Heads) -> Tensor:
    """Liger's chunked distillation loss, which contains the cross-entropy."""
    return _liger_module()(heads.h_s, heads.w_s, heads.h_t, heads.w_t, heads.labels)


@lru_cache
def _liger_module() -> torch.nn.Module:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA * TEMPERATURE**2, beta=0.0,
        temperature=TEMPERATURE, compiled=torch.cuda.is_available(),
    )  # fmt: skip


@PROVIDERS.add("liger ce", package="liger_kernel", on_gpu=True)
def liger_ce(heads: Heads) -> Tensor:
    """Liger's chunked cross-entropy, its gradient of the head summed in fp32 as ours is."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return loss(heads.w_s, heads.h_s, heads.labels)


@PROVIDERS.add("cce ce", package="cut_cross_entropy", on_gpu=True)
def cut_cross_entropy(heads: Heads) -> Tensor:
    """Cut Cross Entropy: no logits at all, recomputed in the backward."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(heads.h_s, heads.w_s, heads.labels)


def floor(heads: Heads) -> tuple[Tensor, ...]:
    """The products in the dtype of the heads, and nothing else."""
    with torch.no_grad():
        logits = heads.h_s @ heads.w_s.t()
        teacher = () if heads.h_t is None else (heads.h_t @ heads.w_t.t(),)
        return logits @ heads.w_s, logits.t() @ heads.h_s, *teacher
