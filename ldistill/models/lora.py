"""LoRA on a student's decoder: small trained matrices beside frozen weights, merged at export.

    y = W x + (alpha / rank) B A x        A: [rank, in], B: [out, rank]

peft puts the adapters into the decoder's linear layers, in place; the projector trains as always.
Keys and values pass through the adapters like everything else, so the shared K/V are what the
student's attention reads. An export adds (alpha / rank) B A to the weights the run began from: the
exported student has not one parameter more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldistill.models.student import Student

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_A = re.compile(r"(.+)\.lora_A\.default\.weight")


class LowRank(NamedTuple):
    """An addition to a weight: ``scale * b @ a``, a [rank, in], b [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


WeightUpdates = Mapping[str, Tensor | LowRank]
"""What training made of a student: whole tensors, or additions, by parameter name."""


def add_lora(student: Student, rank: int, alpha: float | None = None, seed: int = 0) -> None:
    """Freeze the decoder and give every linear layer of it that trains an adapter.

    Args:
        student: after :func:`ldistill.models.parts.train_only`.
        rank: of the adapters; ValueError below 1, or without peft.
        alpha: scale; the adapters' output is multiplied by ``alpha / rank``. Default 2 ``rank``.
        seed: of the adapters' first values: every engine and number of ranks begins alike.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1 (0: no LoRA), got {rank}.")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "--lora_rank needs peft, which is not installed: pip install 'ldistill[lora]'."
        ) from error
    alpha = 2.0 * rank if alpha is None else alpha
    trained = {n.split(".")[-2] for n, p in student.backbone.named_parameters() if p.requires_grad}
    targets = [name for name in TARGETS if name in trained]
    student.lm_head.requires_grad_(False)
    student.backbone.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student.backbone)
    student.lora_rank, student.lora_scale = rank, alpha / rank


def weight_updates(student: Student, trained: Mapping[str, Tensor]) -> WeightUpdates:
    """Trained tensors, gathered, by the parameter names that the student had without adapters."""
    updates: dict[str, Tensor | LowRank] = {}
    for name, tensor in trained.items():
        if match := _A.fullmatch(name):
            b = trained[f"{match[1]}.lora_B.default.weight"]
            updates[f"{match[1]}.weight"] = LowRank(tensor, b, student.lora_scale)
        elif ".lora_B." not in name:
            updates[name] = tensor
    return updates


def updated(base: Tensor, update: Tensor | LowRank | None) -> Tensor:
    """A weight after its update, in the dtype of ``base``; ``base`` itself where there is none."""
    if isinstance(update, LowRank):
        update = base.float() + update.scale * (update.b.float() @ update.a.float())
    return base if update is None else update.to(base.dtype)
