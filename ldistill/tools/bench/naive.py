"""Distillation over shared K/V as one would first write it, to measure ours against.

The stock LM is continued over the student's cache, with nothing but transformers and PyTorch: the
student's K/V become its cache. Hence the teacher runs every position of the batch, its
attention repeats the student's K/V over the query heads and concatenates them with its own, a
dense mask says who sees whom, and the logits of both models exist in full. The loss is the same.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ldistill.distill.attention import SharedKV, recording
from ldistill.distill.distiller import Distiller, student_inputs
from ldistill.distill.targets import Supervision
from ldistill.models.flops import StepCounts


def naive_loss(
    distiller: Distiller, batch: dict[str, Tensor], supervision: Supervision, total: float
) -> Tensor:
    """The scalar that ``distiller(batch, supervision, total, True)["loss"]`` is, the long way.

    Holds for the defaults: scope ``full``, detached, convex mix, τ², forward KL.
    """
    with recording(distiller.slots) as recorded:
        hidden = distiller.student(**student_inputs(batch))
        shared = recorded().detach()
    student = distiller.student.lm_head(hidden).float().flatten(0, 1)
    teacher = teacher_logits(distiller.teacher.lm, batch, shared).float().flatten(0, 1)
    targets = supervision.targets
    ce = F.cross_entropy(student, batch["labels"].flatten(), reduction="none")[targets.flat]
    loss = ((1 - targets.alpha) * ce).sum()
    taught, tau = targets.taught, targets.temperature[targets.taught, None]
    kd = targets.flat[taught]
    log_p = F.log_softmax(teacher[kd] / tau, dim=-1)
    log_q = F.log_softmax(student[kd, : teacher.shape[1]] / tau, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (loss + (targets.alpha[taught] * tau[:, 0] ** 2 * kl).sum()) / total


@torch.no_grad()
def teacher_logits(lm: PreTrainedModel, batch: dict[str, Tensor], shared: SharedKV) -> Tensor:
    """Logits [batch, seq, vocab] of the LM continued over the student's cache."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(shared.keys, shared.values, strict=True)):
        cache.update(k, v, layer)
    return lm(
        # Picture tokens have no embedding in the LM; any token does, nobody reads what comes there.
        input_ids=batch["input_ids"].clamp(max=lm.config.vocab_size - 1),
        position_ids=batch["position_ids"],
        attention_mask=_mask(batch["document_ids"]),
        **{_cache_argument(lm): cache},
    ).logits


def _cache_argument(lm: PreTrainedModel) -> str:
    """The name of the cache in `forward`; transformers changed it within version 5."""
    parameters = inspect.signature(lm.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _mask(documents: Tensor) -> Tensor:
    """bool [batch, 1, seq, 2 seq]: earlier positions of the same document in the student's half.

    The LM's own half stays dark: with scope ``full`` every position's K/V are the student's.
    """
    seq = documents.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=documents.device).tril()
    same = (documents[:, :, None] == documents[:, None, :]) & causal
    return torch.cat([same, torch.zeros_like(same)], dim=-1)[:, None]


def naive_counts(counts: StepCounts) -> StepCounts:
    """What this way runs where the other ran ``counts``: teacher and heads everywhere."""
    return StepCounts(
        positions=counts.positions,
        pairs=counts.pairs,
        tiles=counts.tiles,
        targets=counts.positions,
        queries=counts.positions,
        query_pairs=counts.pairs,
        taught=counts.positions,
    )
