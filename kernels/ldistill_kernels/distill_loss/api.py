"""`distill_loss`: language-model head, cross-entropy and distillation divergence in one call.

A *target* is a supervised position. The logits of [targets, vocabulary] never exist as a whole:
chunks of targets pass through the heads, their loss and gradients are formed at once, and only the
gradients of the hidden states and of the student's head remain. Sources of the objective: arXiv
2604.00829 (selective distillation), 1503.02531 (temperature and its square), 2306.13649
(generalised Jensen-Shannon divergence).

    out = distill_loss(h_s, w_s, h_t, w_t, labels, ce_weight=0.3, kd_weight=0.7, temperature=4.0)
    out.loss.backward()
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldistill_kernels.distill_loss import checks, chunked
from ldistill_kernels.distill_loss.function import DistillLossFunction


class DistillLoss(NamedTuple):
    """The loss, and per-target results that carry no gradient."""

    loss: Tensor  # fp32 scalar
    ce: Tensor  # [targets] cross-entropy over the student's vocabulary; 0 where ignored
    kl: Tensor  # [taught] divergence at the target's temperature, unweighted; 0 where ignored
    teacher_student: Tensor  # [taught] bool: the teacher's best token is the student's best, too,
    # among the first `vocab`
    teacher_label: Tensor  # [taught] bool: the teacher's best token is the label
    student_label: Tensor  # [targets] bool: no token has a larger logit than the label
    extra_mass: Tensor  # [targets] student's probability of tokens from `vocab` on, temperature 1


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
    chunk_targets: int | None = None,
    kernels: str = "auto",
) -> DistillLoss:
    """Weighted sum of cross-entropy and divergence over targets, with gradients.

        loss = sum_i ce_weight[i] CE_i + kd_weight[i] (temperature[i]^2 if t_squared else 1) KL_i

    Nothing is normalised inside: put 1 / N into the weights. Logits are fp32 (fp64 for fp64
    inputs), the head's gradient is summed in fp32 and rounded once.

    Args:
        h_s: [targets, hidden_s] student states after the final norm.
        w_s: [vocab_s, hidden_s] student's head, same dtype; may be tied to the embedding. It is
            read in the forward only.
        h_t: [taught, hidden_t] teacher states of the targets that distil, or None. Receives a
            gradient when it requires one; `w_t` never does.
        w_t: [vocab_t, hidden_t] teacher's head, or None.
        labels: int64 [targets]; one that is `ignore_index` takes its target out, divergence
            included.
        ce_weight, kd_weight, temperature: one number, or a float tensor [targets]. `kd_weight` as a
            number holds for the targets that have a teacher.
        kd_targets: int64 [taught] sorted and unique, the targets that `h_t` belongs to. None: to
            all of them, in order.
        vocab: number of leading tokens that the divergence compares; default: all of the
            teacher's. Softmaxes of the divergence run over these tokens only.
        kl: "forward" KL(teacher | student), "reverse" KL(student | teacher), or "jsd":
            beta KL(teacher | m) + (1 - beta) KL(student | m) with the mixture
            m = beta teacher + (1 - beta) student.
        logit_scale_s, softcap_s, logit_scale_t, softcap_t: what the student's and the teacher's
            models do to the product x of state and head: logits are logit_scale x, with a softcap
            softcap tanh(logit_scale x / softcap). Whether best tokens agree is judged by x.
        chunk_targets: targets per chunk; default: as many as fit the device's budget for logits.
        kernels: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "reference".

    Raises:
        ValueError: names the argument that does not fit. Checks that read values (labels, signs,
            order of `kd_targets`) run on CPU tensors, and on CUDA ones with LDISTILL_DEBUG=1.
    """
    values = checks.checks_values(h_s.device)
    checks.check_options(kl, beta, chunk_targets, kernels)
    checks.check_scaling("s", logit_scale_s, softcap_s)
    checks.check_scaling("t", logit_scale_t, softcap_t)
    checks.check_tensors(h_s, w_s, labels)
    checks.check_teacher(h_s, h_t, w_t)
    checks.check_kd_targets(h_s, h_t, kd_targets, values)
    checks.check_labels(labels, w_s.shape[0], ignore_index, values)
    vocab = checks.resolve_vocab(w_s, w_t, vocab)
    taught = 0 if h_t is None else h_t.shape[0]
    checks.check_kd_weight(kd_weight, taught, h_t)
    ce_weights = checks.per_target("ce_weight", ce_weight, h_s, values)
    kd_weights = temperatures = None
    if kd_weight is not None:
        kd_weights = checks.per_target("kd_weight", kd_weight, h_s, values)
        if isinstance(kd_weight, Tensor) and taught < h_s.shape[0]:
            checks.check_kd_coverage(kd_weights, labels, kd_targets, ignore_index, values)
    if h_t is None:
        kd_weights = None  # all zero
    else:
        temperatures = checks.per_target("temperature", temperature, h_s, values, positive=True)
    if taught == h_s.shape[0]:
        kd_targets = None  # sorted and unique: all of them, in order
    device, chunks = h_s.device.type, (chunk_targets, chunk_targets)
    if chunk_targets is None:
        chunks = [chunked.chunk_targets(device, n) for n in (w_s.shape[0] + vocab, w_s.shape[0])]
    grad = torch.is_grad_enabled()
    arguments = (
        h_s, w_s, h_t, w_t, labels, ce_weights, kd_weights, temperatures, kd_targets, vocab, kl,
        beta, t_squared, logit_scale_s, softcap_s or 0.0, logit_scale_t, softcap_t or 0.0,
        ignore_index, *chunks, checks.use_triton(kernels, h_s),
        grad and h_s.requires_grad, grad and w_s.requires_grad,
        grad and h_t is not None and h_t.requires_grad,
    )  # fmt: skip
    if not any(arguments[-3:]):
        return DistillLoss(*torch.ops.ldistill.distill_loss(*arguments)[:7])
    return DistillLoss(*DistillLossFunction.apply(*arguments))
