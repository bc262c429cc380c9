"""Distillation over shared K/V as one would first write it, to measure ours against.

The stock LM is continued over the student's cache, with nothing but transformers and PyTorch: the
student's K/V become its cache. Hence the teacher runs every position of the batch, its
attention repeats the student's K/V over the query heads and concatenates them with its own, a
dense mask says who sees whom, and the logits of both models exist in full. The loss is the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from ldistill.distill.distiller import Distiller
from ldistill.distill.targets import Supervision
from ldistill.models.flops import StepCounts
from ldistill.models.logits import LogitScaling


def naive_loss(
    distiller: Distiller, batch: dict[str, Tensor], supervision: Supervision, total: float
) -> Tensor:
    """The scalar that ``distiller(batch, supervision, total, True)["loss"]`` is, the long way.

    Holds for the defaults: scope ``full``, detached, convex mix, τ², forward KL.
    """
    lm, cache, targets = distiller.teacher.lm, DynamicCache(), supervision.targets
    if getattr(lm.config, "kv_lora_rank", None):
        raise ValueError(
            "naive: this LM caches no keys that could be the student's: give --modes ce,ours."
        )
    hidden, shared = distiller._student(batch, True)
    scaling = LogitScaling.of(distiller.student.backbone.config)
    student = scaling(distiller.student.lm_head(hidden)).float().flatten(0, 1)
    with torch.no_grad():
        for layer, (k, v) in enumerate(zip(shared.keys, shared.values, strict=True)):
            cache.update(k, v, layer)
        teacher = lm(
            # Picture tokens have no embedding in the LM; any token does, nobody reads what comes.
            input_ids=batch["input_ids"].clamp(max=lm.config.vocab_size - 1),
            position_ids=batch["position_ids"],
            attention_mask=_masks(lm.config, batch["document_ids"]),
            cache=cache,
        )
    ce = F.cross_entropy(student, batch["labels"].flatten(), reduction="none")[targets.flat]
    loss = ((1 - targets.alpha) * ce).sum()
    taught, tau = targets.taught, targets.temperature[targets.taught, None]
    kd = targets.flat[taught]
    teacher = teacher.logits.float().flatten(0, 1)  # [batch × seq, vocab]
    log_p = F.log_softmax(teacher[kd] / tau, dim=-1)
    log_q = F.log_softmax(student[kd, : teacher.shape[1]] / tau, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (loss + (targets.alpha[taught] * tau[:, 0] ** 2 * kl).sum()) / total


def _masks(config: PreTrainedConfig, documents: Tensor) -> Tensor | dict[str, Tensor]:
    """bool [batch, 1, seq, 2 seq]: earlier positions of the same document in the student's half,
    none in the LM's own: with scope ``full`` every position's K/V are the student's. A mask by kind
    of layer where there are several, for some see no further back than their window.
    """
    place = torch.arange(documents.shape[1], device=documents.device)
    before = place[:, None] - place  # [seq, seq]: how far a key lies behind its query
    same = documents[:, :, None] == documents[:, None, :]

    def mask(window: int | None) -> Tensor:
        seen = same & (before >= 0) & (before < (window or len(place)))
        return torch.cat([seen, torch.zeros_like(seen)], dim=-1)[:, None]

    window = getattr(config, "sliding_window", None)
    usual = ["sliding_attention" if window else "full_attention"]
    kinds = getattr(config, "layer_types", None) or usual
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in set(kinds)}
    return masks if len(masks) > 1 else masks[kinds[0]]


def naive_counts(counts: StepCounts) -> StepCounts:
    """What this way runs where the other ran ``counts``: teacher and heads everywhere."""
    seq, pairs = counts.positions, counts.pairs
    return replace(counts, targets=seq, queries=seq, query_pairs=pairs, taught=seq, image_tokens=0)
