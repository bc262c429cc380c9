"""The target step of the distillation loss in plain PyTorch, for any device and for fp64.

It works through the chunk in tiles of a few targets, so that its temporaries stay in the cache and
add nothing to the memory of the chunk. With `x = logits / temperature`, `p` the teacher's and `q`
the student's softmax, and the log-ratio `d = log q - log p`:

    forward  KL(p | q) = -sum p d            gradient to x of the student  q - p
    reverse  KL(q | p) =  sum q d            q (d - KL)
    jsd      beta KL(p | m) + (1 - beta) KL(q | m),  m = beta p + (1 - beta) q   (GKD, 2306.13649)
                                             (1 - beta) q (log q/m - KL(q | m))

`d` is taken from the difference of the logits, so equal logits give exactly 0 everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldistill_kernels.distill_loss.targets import (
    Chunk,
    Scaling,
    Settings,
    TargetInputs,
    TargetOutputs,
)

TILE_ELEMENTS = 1 << 18  # 1 MiB of fp32: a handful of such tiles stays in the cache


def target_step(
    logits: Tensor,
    teacher: Tensor | None,
    chunk: Chunk,
    inputs: TargetInputs,
    outputs: TargetOutputs,
    settings: Settings,
) -> tuple[Tensor, Tensor | None]:
    """Replace logits `[c, vocab_s]` and teacher logits `[c, vocab]` by their gradients.

    Returns the gradients (the same memory; meaningful only where `settings` asks for them).
    """
    tile = max(1, TILE_ELEMENTS // logits.shape[1])
    for lo in range(0, logits.shape[0], tile):
        hi = min(lo + tile, logits.shape[0])
        index, span = chunk.index(lo, hi), chunk.span(lo, hi)
        target = _heeded(inputs, index, settings)
        student, taught = logits[lo:hi], None if teacher is None else teacher[lo:hi]
        best = _best(student, taught, settings.vocab)
        _write_hits(student, best, target, index, span, outputs)
        slope_s, slope_t = _scale(student, settings.scaling_s), None
        if taught is not None:
            slope_t = _scale(taught, settings.scaling_t)
        if slope_s is not None or slope_t is not None:
            best = _best(student, taught, settings.vocab)
        softmax = _cross_entropy(student, best, target, index, outputs, settings)
        kl_grad = None
        if taught is not None:
            place = index, span
            kl_grad = _divergence(student, taught, best, target, place, outputs, settings)
            if settings.grad_teacher and slope_t is not None:
                taught.mul_(slope_t)
        if settings.grad_student:
            _write_grad(student, softmax, target, kl_grad)
            if slope_s is not None:
                student.mul_(slope_s)
    return logits, teacher


def _scale(logits: Tensor, scaling: Scaling) -> Tensor | float | None:
    """Make logits of products in place; returns the derivative, None where that is 1."""
    scale, cap = scaling
    if scale != 1.0:
        logits.mul_(scale)
    if cap:
        logits.div_(cap).tanh_()
        slope = (1.0 - logits.square()).mul_(scale)
        logits.mul_(cap)
        return slope
    return None if scale == 1.0 else scale


def _heeded(inputs: TargetInputs, index: slice | Tensor, settings: Settings) -> TargetInputs:
    """The inputs of a tile, weights zero where the label is ignored."""
    tile = TargetInputs(*(None if value is None else value[index] for value in inputs))
    ignored = tile.labels == settings.ignore_index
    kd_weight = None if tile.kd_weight is None else tile.kd_weight.masked_fill(ignored, 0.0)
    return tile._replace(ce_weight=tile.ce_weight.masked_fill(ignored, 0.0), kd_weight=kd_weight)


def _share(weight: Tensor, value: Tensor) -> Tensor:
    # A weight of zero removes the target even when its value is not finite.
    return torch.where(weight > 0, weight * value, 0.0)


class _Best(NamedTuple):
    """Largest logits of a tile's targets, and the teacher's best token."""

    compared: Tensor  # the student's among the first `vocab`
    student: Tensor
    teacher: Tensor | None
    token: Tensor | None


def _best(student: Tensor, teacher: Tensor | None, vocab: int) -> _Best:
    compared = top = student[:, :vocab].amax(-1)
    if vocab < student.shape[1]:
        top = torch.maximum(compared, student[:, vocab:].amax(-1))
    best_t, token = (None, None) if teacher is None else teacher.max(-1)
    return _Best(compared, top, best_t, token)


def _write_hits(
    student: Tensor,
    best: _Best,
    target: TargetInputs,
    index: slice | Tensor,
    span: slice,
    out: TargetOutputs,
) -> None:
    """Whether best tokens agree, before scale and cap: those keep the order until they saturate."""
    out.student_label[index] = _labelled(student, target.labels) == best.student
    if best.token is not None:
        out.teacher_student[span] = _at(student, best.token) == best.compared
        out.teacher_label[span] = best.token == target.labels


def _cross_entropy(
    logits: Tensor,
    best: _Best,
    target: TargetInputs,
    index: slice | Tensor,
    out: TargetOutputs,
    settings: Settings,
) -> Tensor:
    """Cross-entropy of one tile and the mass of further tokens; returns the student's softmax."""
    softmax = torch.softmax(logits, -1)
    ce = _log_sum_exp(best.student, softmax) - _labelled(logits, target.labels)
    out.loss[index] = _share(target.ce_weight, ce)
    out.ce[index] = ce.masked_fill_(target.labels == settings.ignore_index, 0.0)
    out.extra_mass[index] = softmax[:, settings.vocab :].sum(-1)
    return softmax


def _log_sum_exp(top: Tensor, softmax: Tensor) -> Tensor:
    # The largest probability is at least 1 / vocab, so its logarithm is safe.
    return top - softmax.amax(-1).log()


def _divergence(
    logits: Tensor,
    teacher: Tensor,
    best: _Best,
    target: TargetInputs,
    place: tuple[slice | Tensor, slice],
    out: TargetOutputs,
    settings: Settings,
) -> Tensor | None:
    """KL of one tile; returns its gradient `[tile, vocab]` to the student's logits.

    `place` is where the tile's targets are among all targets and among the taught ones.
    """
    index, span = place
    tau = target.temperature
    x_s, x_t = logits[:, : settings.vocab] / tau.unsqueeze(1), teacher.div_(tau.unsqueeze(1))
    q, p = torch.softmax(x_s, -1), torch.softmax(x_t, -1)
    lse_s = _log_sum_exp(best.compared / tau, q)
    lse_t = _log_sum_exp(best.teacher / tau, p)
    log_ratio = x_s.sub_(x_t).sub_((lse_s - lse_t).unsqueeze(1))
    kl, grad_s, grad_t = _GRADIENTS[settings.kl](p, q, log_ratio, settings)
    kl = kl.clamp(min=0)
    weight = target.kd_weight * tau.square() if settings.t_squared else target.kd_weight
    out.loss[index] += _share(weight, kl)
    out.kl[span] = kl.masked_fill_(target.labels == settings.ignore_index, 0.0)
    weight = (weight / tau).unsqueeze(1)
    if settings.grad_teacher:
        torch.mul(grad_t, weight, out=teacher)
    return grad_s.mul_(weight) if settings.grad_student else None


def _column(labels: Tensor, logits: Tensor) -> Tensor:
    """A column that exists; another than the label where that is no token, ignored or wrong."""
    return labels.clamp(0, logits.shape[1] - 1)


def _labelled(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit, NaN where the label is no token."""
    column = _column(labels, logits)
    return _at(logits, column).masked_fill_(column != labels, torch.nan)


def _at(values: Tensor, columns: Tensor) -> Tensor:
    return values.gather(1, columns.unsqueeze(1)).squeeze(1)


def _forward_kl(p: Tensor, q: Tensor, d: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    kl = -torch.linalg.vecdot(p, d)
    grad_t = -p * (d + kl.unsqueeze(1)) if settings.grad_teacher else None
    return kl, q.sub_(p), grad_t


def _reverse_kl(p: Tensor, q: Tensor, d: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    kl = torch.linalg.vecdot(q, d)
    grad_t = p.sub_(q) if settings.grad_teacher else None
    return kl, d.sub_(kl.unsqueeze(1)).mul_(q), grad_t


def _jsd(p: Tensor, q: Tensor, d: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    beta = settings.beta
    # log m - log p and log m - log q for m = beta p + (1 - beta) q, without exp of a large number.
    share = torch.where(d > 0, beta, 1.0 - beta)
    shared = torch.log1p(share * torch.expm1(-d.abs()))
    m_over_p, m_over_q = shared + d.clamp(min=0), shared - d.clamp(max=0)
    kl_p, kl_q = -torch.linalg.vecdot(p, m_over_p), -torch.linalg.vecdot(q, m_over_q)
    grad_t = -beta * p * (m_over_p + kl_p.unsqueeze(1)) if settings.grad_teacher else None
    grad_s = m_over_q.add_(kl_q.unsqueeze(1)).mul_(q).mul_(beta - 1.0)
    return beta * kl_p + (1.0 - beta) * kl_q, grad_s, grad_t


_GRADIENTS = {"forward": _forward_kl, "reverse": _reverse_kl, "jsd": _jsd}


def _write_grad(
    logits: Tensor, softmax: Tensor, target: TargetInputs, kl_grad: Tensor | None
) -> None:
    """logits <- ce_weight (softmax - onehot), plus `kl_grad` in the first columns."""
    torch.mul(softmax, target.ce_weight.unsqueeze(1), out=logits)
    column = _column(target.labels, logits).unsqueeze(1)
    logits.scatter_add_(1, column, -target.ce_weight.unsqueeze(1))
    if kl_grad is not None:
        logits[:, : kl_grad.shape[1]].add_(kl_grad)
