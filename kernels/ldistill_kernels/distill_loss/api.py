"""`distill_loss`: language-model head, cross-entropy and distillation divergence in one call.

The logits of [rows, vocabulary] never exist as a whole: chunks of rows pass through the heads,
their loss and gradients are formed at once, and only the gradients of the hidden rows and of the
student's head remain. Sources of the objective: arXiv 2604.00829 (selective distillation),
1503.02531 (temperature and its square), 2306.13649 (generalised Jensen-Shannon divergence).

    out = distill_loss(h_s, w_s, h_t, w_t, labels, ce_weight=0.3, kd_weight=0.7, temperature=4.0)
    out.loss.backward()
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldistill_kernels.distill_loss import checks
from ldistill_kernels.distill_loss.chunked import default_chunk_rows
from ldistill_kernels.distill_loss.function import DistillLossFunction


class DistillLoss(NamedTuple):
    """The loss, and per-row results that carry no gradient."""

    loss: Tensor  # fp32 scalar
    ce: Tensor  # [rows] cross-entropy over the student's vocabulary; 0 where ignored
    kl: Tensor  # [rows_t] divergence at the row's temperature, no weight, no square; 0 if ignored
    teacher_student: Tensor  # [rows_t] bool: the teacher's best token is the student's best, too,
    # among the first `vocab`
    teacher_label: Tensor  # [rows_t] bool: the teacher's best token is the label
    student_label: Tensor  # [rows] bool: no token has a larger logit than the label
    extra_mass: Tensor  # [rows] student's probability of tokens from `vocab` on, temperature 1


def distill_loss(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor | None,
    w_t: Tensor | None,
    labels: Tensor,
    *,
    ce_weight: Tensor | float,
    kd_weight: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    kd_rows: Tensor | None = None,
    vocab: int | None = None,
    kl: str = "forward",
    beta: float = 0.5,
    t_squared: bool = True,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    kernels: str = "auto",
) -> DistillLoss:
    """Weighted sum of cross-entropy and divergence over rows, with gradients.

        loss = sum_i ce_weight[i] CE_i + kd_weight[i] (temperature[i]^2 if t_squared else 1) KL_i

    Nothing is normalised inside: put 1 / N into the weights. Logits are fp32 (fp64 for fp64
    inputs), the head's gradient is summed in fp32 and rounded once.

    Args:
        h_s: [rows, hidden_s] student states after the final norm.
        w_s: [vocab_s, hidden_s] student's head, same dtype; may be tied to the embedding. It is
            read in the forward only.
        h_t: [rows_t, hidden_t] teacher states of the rows that distil, or None. Receives a
            gradient when it requires one; `w_t` never does.
        w_t: [vocab_t, hidden_t] teacher's head, or None.
        labels: int64 [rows]; a row with `ignore_index` contributes nothing, divergence included.
        ce_weight, kd_weight, temperature: one number, or a float tensor [rows]. `kd_weight` as a
            number holds for the rows that have a teacher.
        kd_rows: int64 [rows_t] sorted and unique, the student row of each teacher row. None: row
            i of `h_t` belongs to row i of `h_s`.
        vocab: number of leading tokens that the divergence compares; default: all of the
            teacher's. Softmaxes of the divergence run over these tokens only.
        kl: "forward" KL(teacher | student), "reverse" KL(student | teacher), or "jsd":
            beta KL(teacher | m) + (1 - beta) KL(student | m) with the mixture
            m = beta teacher + (1 - beta) student.
        chunk_rows: rows per chunk; default: as many as fit the device's budget for logits.
        kernels: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "reference".

    Raises:
        ValueError: names the argument that does not fit. Checks that read values (labels, signs,
            order of `kd_rows`) run on CPU tensors, and on CUDA ones with LDISTILL_DEBUG=1.
    """
    checks.check_options(kl, beta, chunk_rows, kernels)
    checks.check_tensors(h_s, w_s, labels)
    checks.check_teacher(h_s, h_t, w_t)
    checks.check_kd_rows(h_s, h_t, kd_rows)
    checks.check_labels(labels, w_s.shape[0], ignore_index)
    vocab = checks.resolve_vocab(w_s, w_t, vocab)
    paired = 0 if h_t is None else h_t.shape[0]
    ce_weights = checks.per_row("ce_weight", ce_weight, h_s, positive=False)
    temperatures = checks.per_row("temperature", temperature, h_s, positive=True)
    kd_weights = _kd_weights(kd_weight, h_s, h_t, labels, kd_rows, ignore_index)
    if paired == h_s.shape[0]:
        kd_rows = None  # sorted and unique: every row in order
    if chunk_rows is None:
        compared = vocab if paired else 0
        chunk_rows = default_chunk_rows(h_s.device.type, w_s.shape[0], compared)
    grad = torch.is_grad_enabled()
    results = DistillLossFunction.apply(
        h_s, w_s, h_t, w_t, labels, ce_weights, kd_weights, temperatures, kd_rows,
        vocab, kl, beta, t_squared, ignore_index, chunk_rows, checks.use_triton(kernels, h_s),
        grad and h_s.requires_grad, grad and w_s.requires_grad,
        grad and h_t is not None and h_t.requires_grad,
    )  # fmt: skip
    return DistillLoss(*results)


def _kd_weights(
    kd_weight: Tensor | float | None,
    h_s: Tensor,
    h_t: Tensor | None,
    labels: Tensor,
    kd_rows: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """[rows] weights of the divergence; a number holds for the teacher's rows."""
    checks.check_kd_weight(kd_weight, 0 if h_t is None else h_t.shape[0], h_t)
    value = 0.0 if kd_weight is None else kd_weight
    weights = checks.per_row("kd_weight", value, h_s, positive=False)
    if isinstance(kd_weight, Tensor) and (h_t is None or h_t.shape[0] < h_s.shape[0]):
        checks.check_kd_coverage(weights, labels, kd_rows, ignore_index)
    return weights
