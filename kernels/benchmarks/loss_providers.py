"""What computes the same loss as `distill_loss`, from the same heads, and the floor below all.

A provider takes the `Heads` of one measurement and returns the scalar loss; its gradients are
those of autograd. One measurement is cross-entropy plus forward KL, every target with a teacher.
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

    @property
    def flops(self) -> int:
        """Of the four products."""
        return 8 * self.hidden * self.vocab * self.targets


@dataclass
class Heads:
    """States, heads and labels of one measurement."""

    h_s: Tensor
    w_s: Tensor
    h_t: Tensor
    w_t: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, shape: Shape, device: str, dtype: torch.dtype) -> Heads:
        """Random ones whose logits have a standard deviation of about 2."""
        gen = torch.Generator(device).manual_seed(0)

        def normal(targets: int, std: float) -> Tensor:
            values = torch.randn(targets, shape.hidden, generator=gen, device=device)
            return (values * std).to(dtype)

        std = 2.0 * shape.hidden**-0.5
        labels = torch.randint(shape.vocab, (shape.targets,), generator=gen, device=device)
        return cls(normal(shape.targets, 1.0).requires_grad_(),
                   normal(shape.vocab, std).requires_grad_(),
                   normal(shape.targets, 1.0), normal(shape.vocab, std), labels)  # fmt: skip

    def head_targets(self, targets: int) -> Heads:
        """The first targets, as leaves of their own."""
        return Heads(self.h_s[:targets].detach().requires_grad_(), self.w_s, self.h_t[:targets],
                     self.w_t, self.labels[:targets])  # fmt: skip

    def double(self) -> Heads:
        values = (x.detach().double() for x in (self.h_s, self.w_s, self.h_t, self.w_t))
        h_s, w_s, h_t, w_t = values
        return Heads(h_s.requires_grad_(), w_s.requires_grad_(), h_t, w_t, self.labels)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.h_s, self.w_s, self.h_t, self.w_t, self.labels

    @property
    def weights(self) -> dict[str, float]:
        targets = self.labels.numel()
        return {"ce_weight": (1 - ALPHA) / targets, "kd_weight": ALPHA / targets,
                "temperature": TEMPERATURE}  # fmt: skip


Loss = Callable[[Heads], Tensor]
PROVIDERS = Registry()  # name -> Loss


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

    def part(h_s: Tensor, w_s: Tensor, h_t: Tensor, labels: Tensor) -> Tensor:
        student, teacher = (h_s @ w_s.t()).float(), (h_t @ heads.w_t.t()).float()
        ce = F.cross_entropy(student, labels, reduction="sum")
        log_q = F.log_softmax(student / TEMPERATURE, -1)
        log_p = F.log_softmax(teacher / TEMPERATURE, -1)
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return weights["ce_weight"] * ce + weights["kd_weight"] * TEMPERATURE**2 * kl

    for lo in range(0, heads.labels.numel(), targets):
        span = slice(lo, lo + targets)
        total = total + checkpoint(part, heads.h_s[span], heads.w_s, heads.h_t[span],
                                   heads.labels[span], use_reentrant=False)  # fmt: skip
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


def floor(heads: Heads) -> tuple[Tensor, ...]:
    """The four products in the dtype of the heads, and nothing else."""
    with torch.no_grad():
        logits = heads.h_s @ heads.w_s.t()
        teacher = heads.h_t @ heads.w_t.t()
        return logits @ heads.w_s, logits.t() @ heads.h_s, teacher
