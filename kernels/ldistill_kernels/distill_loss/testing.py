"""An independent, plain PyTorch twin of `distill_loss`, and inputs to try both on.

The twin holds all logits and leaves the gradients to autograd: the reference of the tests (in
fp64) and the baseline of the benchmark.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_distill_loss(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor | None,
    w_t: Tensor | None,
    labels: Tensor,
    *,
    ce_weight: Tensor | float,
    kd_weight: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    kd_targets: Tensor | None = None,
    vocab: int | None = None,
    kl: str = "forward",
    beta: float = 0.5,
    t_squared: bool = True,
    logit_scale_s: float = 1.0,
    softcap_s: float | None = None,
    logit_scale_t: float = 1.0,
    softcap_t: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce [targets], kl [taught]) with materialised logits; arguments as `distill_loss`."""
    wide = torch.promote_types(h_s.dtype, torch.float32)
    ones = torch.ones(h_s.shape[0], dtype=wide, device=h_s.device)
    student = _scaled(F.linear(h_s, w_s).to(wide), logit_scale_s, softcap_s)
    ce = F.cross_entropy(student, labels, reduction="none", ignore_index=ignore_index)
    loss = (ones * ce_weight * ce).sum()
    if h_t is None:
        return loss, ce, ce[:0]
    pairs = slice(None) if kd_targets is None else kd_targets  # a view, where all are taught
    vocab = w_t.shape[0] if vocab is None else vocab
    tau = (ones * temperature)[pairs, None]
    log_q = F.log_softmax(student[pairs, :vocab] / tau, -1)
    scaling_t = logit_scale_t, softcap_t
    log_p = F.log_softmax(_scaled(F.linear(h_t, w_t[:vocab]).to(wide), *scaling_t) / tau, -1)
    divergence = _divergence(log_p, log_q, kl, beta)
    divergence = divergence.masked_fill(labels[pairs] == ignore_index, 0.0)
    weight = (ones * kd_weight)[pairs] * (tau.squeeze(1) ** 2 if t_squared else 1.0)
    return loss + (weight * divergence).sum(), ce, divergence


def _scaled(product: Tensor, scale: float, cap: float | None) -> Tensor:
    if cap is not None:
        return cap * torch.tanh(scale / cap * product)
    return product if scale == 1.0 else scale * product


def _divergence(log_p: Tensor, log_q: Tensor, kl: str, beta: float) -> Tensor:
    def between(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if kl == "forward":
        return between(log_p, log_q)
    if kl == "reverse":
        return between(log_q, log_p)
    mixture = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1.0 - beta))
    return beta * between(log_p, mixture) + (1.0 - beta) * between(log_q, mixture)


def make_inputs(
    targets: int,
    taught: int,
    vocab_s: int,
    vocab_t: int,
    *,
    hidden_s: int = 32,
    hidden_t: int = 24,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    ignored: float = 0.1,
    scale: float = 2.0,
) -> dict[str, Any]:
    """Random arguments of `distill_loss`: `taught` of the targets have a teacher, some are ignored.

    `scale` is about the standard deviation of the logits.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=gen, dtype=torch.float64) * std).to(device, dtype)

    wide = torch.promote_types(dtype, torch.float32)
    labels = torch.randint(vocab_s, (targets,), generator=gen)
    labels[torch.rand(targets, generator=gen) < ignored] = -100
    chosen = torch.randperm(targets, generator=gen)[:taught].sort().values
    kd_weight = torch.zeros(targets, dtype=wide)
    kd_weight[chosen] = torch.rand(taught, generator=gen, dtype=wide)
    return {
        "h_s": normal(targets, hidden_s),
        "w_s": normal(vocab_s, hidden_s, std=scale * hidden_s**-0.5),
        "h_t": normal(taught, hidden_t) if taught else None,
        "w_t": normal(vocab_t, hidden_t, std=scale * hidden_t**-0.5) if taught else None,
        "labels": labels.to(device),
        "ce_weight": torch.rand(targets, generator=gen, dtype=wide).to(device),
        "kd_weight": kd_weight.to(device),
        "temperature": (1.0 + 3.0 * torch.rand(targets, generator=gen, dtype=wide)).to(device),
        "kd_targets": chosen.to(device) if taught else None,
    }
