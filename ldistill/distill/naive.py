"""Distillation over shared K/V as one would first write it, to measure ours against.

The stock LM is continued over the student's cache, with nothing but transformers and PyTorch: the
student's K/V become its cache. Hence the teacher runs every row of the batch, its
attention repeats the student's K/V over the query heads and concatenates them with its own, a
dense mask says who sees whom, and the logits of both models exist in full. The loss is the same.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ldistill.distill.attention import KVMemory, recording
from ldistill.distill.distiller import Distiller
from ldistill.distill.targets import RowPlan
from ldistill.models.flops import StepCounts


def naive_loss(
    distiller: Distiller, batch: dict[str, Tensor], plan: RowPlan, total_rows: float
) -> Tensor:
    """The scalar that ``distiller(batch, plan, total_rows, True)["loss"]`` is, the long way.

    Holds for the defaults: scope ``full``, detached, convex mix, τ², forward KL.
    """
    with recording(distiller.slots) as recorded:
        hidden = distiller.student(batch["input_ids"], batch["position_ids"], batch["pixel_values"])
        memory = recorded().detach()
    student = distiller.student.lm_head(hidden).float().flatten(0, 1)
    teacher = teacher_logits(distiller.teacher.lm, batch, memory).float().flatten(0, 1)
    rows = plan.supervised
    ce = F.cross_entropy(student, batch["labels"].flatten(), reduction="none")[rows.flat]
    loss = ((1 - rows.alpha) * ce).sum()
    kd, tau = rows.flat[rows.kd_rows], rows.temperature[rows.kd_rows, None]
    log_p = F.log_softmax(teacher[kd] / tau, dim=-1)
    log_q = F.log_softmax(student[kd, : teacher.shape[1]] / tau, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (loss + (rows.alpha[rows.kd_rows] * tau[:, 0] ** 2 * kl).sum()) / total_rows


@torch.no_grad()
def teacher_logits(lm: PreTrainedModel, batch: dict[str, Tensor], memory: KVMemory) -> Tensor:
    """Logits [batch, seq, vocab] of the LM continued over the student's cache, row for row."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(memory.keys, memory.values, strict=True)):
        cache.update(k, v, layer)
    return lm(
        # Picture tokens have no embedding in the LM; any token does, nobody reads those rows.
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

    The LM's own half stays dark: with scope ``full`` the student remembers every position.
    """
    seq = documents.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=documents.device).tril()
    same = (documents[:, :, None] == documents[:, None, :]) & causal
    return torch.cat([same, torch.zeros_like(same)], dim=-1)[:, None]


def naive_counts(counts: StepCounts) -> StepCounts:
    """What this way runs where the other ran ``counts``: every row of teacher and heads."""
    return StepCounts(
        positions=counts.positions,
        pairs=counts.pairs,
        tiles=counts.tiles,
        rows=counts.positions,
        teacher_rows=counts.positions,
        teacher_pairs=counts.pairs,
        kd_rows=counts.positions,
    )
