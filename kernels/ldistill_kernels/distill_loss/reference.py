"""The row step of the distillation loss in plain PyTorch, for any device and for fp64.

It works through the chunk in tiles of a few rows, so that its temporaries stay in the cache and
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

from ldistill_kernels.distill_loss.rows import Chunk, RowInputs, RowOutputs, RowSettings

TILE_ELEMENTS = 1 << 18  # 1 MiB of fp32: a handful of such tiles stays in the cache


def row_step(
    logits: Tensor,
    teacher: Tensor | None,
    chunk: Chunk,
    inputs: RowInputs,
    outputs: RowOutputs,
    settings: RowSettings,
) -> tuple[Tensor, Tensor | None]:
    """Replace logits `[c, vocab_s]` and teacher logits `[c, vocab]` by their gradients.

    Returns the gradients (the same memory; meaningful only where `settings` asks for them).
    """
    tile = max(1, TILE_ELEMENTS // logits.shape[1])
    for lo in range(0, logits.shape[0], tile):
        hi = min(lo + tile, logits.shape[0])
        index = chunk.index(lo, hi)
        row = RowInputs(*(value[index] for value in inputs))
        student, kl_grad = _student(logits[lo:hi], row, index, outputs, settings), None
        if teacher is not None:
            span, tile_t = chunk.span(lo, hi), teacher[lo:hi]
            kl_grad = _divergence(logits[lo:hi], tile_t, student, row, span, outputs, settings)
        if settings.grad_student:
            _write_grad(logits[lo:hi], student, row, kl_grad)
    return logits, teacher


class _Student(NamedTuple):
    """Of a tile's student rows: softmax at temperature 1, largest of the first `vocab` logits."""

    softmax: Tensor
    best: Tensor


def _student(
    logits: Tensor, row: RowInputs, index: slice | Tensor, out: RowOutputs, settings: RowSettings
) -> _Student:
    """Cross-entropy and the student's diagnostics of one tile."""
    vocab = settings.vocab
    best = logits[:, :vocab].amax(-1)
    top = best
    if vocab < logits.shape[1]:
        top = torch.maximum(best, logits[:, vocab:].amax(-1))
    softmax = torch.softmax(logits, -1)
    column = _column(row.labels, logits)
    labelled = _at(logits, column).masked_fill(column != row.labels, torch.nan)
    out.ce[index] = _log_sum_exp(top, softmax) - labelled
    out.student_label[index] = labelled == top
    out.extra_mass[index] = softmax[:, vocab:].sum(-1)
    return _Student(softmax, best)


def _log_sum_exp(top: Tensor, softmax: Tensor) -> Tensor:
    # The largest probability is at least 1 / vocab, so its logarithm is safe.
    return top - softmax.amax(-1).log()


def _divergence(
    logits: Tensor,
    teacher: Tensor,
    student: _Student,
    row: RowInputs,
    span: slice,
    out: RowOutputs,
    settings: RowSettings,
) -> Tensor | None:
    """KL of one tile; returns its gradient `[tile, vocab]` to the student's logits."""
    best_t, best_token = teacher.max(-1)
    out.teacher_student[span] = _at(logits, best_token) == student.best
    out.teacher_label[span] = best_token == row.labels
    scale = row.inv_temperature.unsqueeze(1)
    x_s, x_t = logits[:, : settings.vocab] * scale, teacher.mul_(scale)
    q, p = torch.softmax(x_s, -1), torch.softmax(x_t, -1)
    lse_s = _log_sum_exp(student.best * row.inv_temperature, q)
    lse_t = _log_sum_exp(best_t * row.inv_temperature, p)
    log_ratio = x_s.sub_(x_t).sub_((lse_s - lse_t).unsqueeze(1))
    weight = row.kl_grad.unsqueeze(1)
    kl, grad_s, grad_t = _GRADIENTS[settings.kl](p, q, log_ratio, settings)
    out.kl[span] = kl.clamp(min=0)
    if settings.grad_teacher:
        torch.mul(grad_t, weight, out=teacher)
    return grad_s.mul_(weight) if settings.grad_student else None


def _column(labels: Tensor, logits: Tensor) -> Tensor:
    """A column that exists; another than the label where that is no token, ignored or wrong."""
    return labels.clamp(0, logits.shape[1] - 1)


def _at(values: Tensor, columns: Tensor) -> Tensor:
    return values.gather(1, columns.unsqueeze(1)).squeeze(1)


def _forward_kl(p: Tensor, q: Tensor, d: Tensor, settings: RowSettings) -> tuple[Tensor, ...]:
    kl = -torch.linalg.vecdot(p, d)
    grad_t = -p * (d + kl.unsqueeze(1)) if settings.grad_teacher else None
    return kl, q.sub_(p), grad_t


def _reverse_kl(p: Tensor, q: Tensor, d: Tensor, settings: RowSettings) -> tuple[Tensor, ...]:
    kl = torch.linalg.vecdot(q, d)
    grad_t = p.sub_(q) if settings.grad_teacher else None
    return kl, d.sub_(kl.unsqueeze(1)).mul_(q), grad_t


def _jsd(p: Tensor, q: Tensor, d: Tensor, settings: RowSettings) -> tuple[Tensor, ...]:
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


def _write_grad(logits: Tensor, student: _Student, row: RowInputs, kl_grad: Tensor | None) -> None:
    """logits <- ce_grad (softmax - onehot), plus `kl_grad` in the first columns."""
    torch.mul(student.softmax, row.ce_grad.unsqueeze(1), out=logits)
    column = _column(row.labels, logits).unsqueeze(1)
    logits.scatter_add_(1, column, -row.ce_grad.unsqueeze(1))
    if kl_grad is not None:
        logits[:, : kl_grad.shape[1]].add_(kl_grad)
