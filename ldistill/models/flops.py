"""Floating-point operations of a training step: what MFU is counted with.

MFU is *model* FLOPs over time and peak: what the step asks for, not all that was executed. A
multiply-add is two operations. In the student a product of a trained weight counts three times its
forward (result, gradient of the input, gradient of the weight), that of a frozen one twice, as in a
decoder with LoRA, whose adapters are added. A vision tower that does not train and the teacher run
forward alone; the teacher runs on its queries, without k and v projections where the scope is
``full``. Attention counts visible pairs.

Not counted: what activation checkpointing recomputes, the teacher's forward of the health check,
norms, activations and softmax. Counted although it is not needed: the gradient of the projector's
input, or of the pixels where the vision tower trains, far below 1%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ldistill.models.parts import trained_share
from ldistill.models.student import Student
from ldistill.models.towers import Tower, tower_of


@dataclass(frozen=True)
class StepCounts:
    """What a step ran, over one rank."""

    positions: int  # [batch × seq] the decoder ran, padding included
    pairs: int  # visible (query, key) pairs of the student's attention, one head
    tiles: int  # images the vision tower ran
    targets: int  # positions with a label (the student's head ran there)
    queries: int = 0  # positions the teacher ran
    query_pairs: int = 0  # (query, key) pairs of the teacher's attention
    taught: int = 0  # positions its head ran
    image_tokens: int = 0  # positions of pictures; set where the tiles are a real batch's


def head_dim(config: Any) -> int:
    """Width of one head of a decoder."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def decoder_layer_weights(config: Any, with_kv: bool = True) -> int:
    """Weights of the matrix products in one decoder layer."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads * with_kv
    return config.hidden_size * (heads * head_dim(config) + 3 * config.intermediate_size)


def adapter_weights(config: Any, rank: int) -> int:
    """Weights of LoRA adapters on every linear layer of one decoder layer."""
    heads = config.num_attention_heads + config.num_key_value_heads
    sides = 7 * config.hidden_size + 2 * heads * head_dim(config) + 3 * config.intermediate_size
    return rank * sides


def step_flops(
    config: Any,
    counts: StepCounts,
    *,
    vision_flops_per_tile: float,
    projector_weights: int,
    tokens_per_tile: float,
    kv_scope: str = "full",
    lora_rank: int = 0,
    trained: float = 1.0,
    head_trained: bool = True,
    vision_trained: bool = False,
) -> float:
    """FLOPs of one rank's step.

    Args:
        config: the decoder's transformers configuration.
        counts: what was run.
        vision_flops_per_tile: forward pass of the vision tower on one tile.
        kv_scope: ``full`` leaves out the teacher's k and v projections.
        lora_rank: of adapters in the decoder; 0: none.
        trained: share of the decoder layers' weights that trains.
    """
    layers, width = config.num_hidden_layers, config.num_attention_heads * head_dim(config)
    head = config.hidden_size * config.vocab_size
    products = (2 + trained) * 2 * layers * decoder_layer_weights(config) * counts.positions
    products += (2 + head_trained) * 2 * head * counts.targets
    adapters = 2 * layers * adapter_weights(config, lora_rank) * counts.positions
    attention = layers * 4 * width * counts.pairs
    projector = 2 * projector_weights * tokens_per_tile * counts.tiles
    student = products + 3 * (adapters + attention + projector)
    vision = (3 if vision_trained else 1) * vision_flops_per_tile * counts.tiles
    teacher = layers * (
        2 * decoder_layer_weights(config, kv_scope != "full") * counts.queries
        + 4 * width * counts.query_pairs
    )
    teacher += 2 * head * counts.taught
    return student + vision + teacher


def student_flops(student: Student, counts: StepCounts, kv_scope: str = "full") -> float:
    """:func:`step_flops` of a student, from its configuration alone: under ZeRO-3 a rank holds no
    parameter whole. Of towers that take pictures of any size, ``counts.tiles`` are patches, and the
    attention among these is not counted."""
    tower = tower_of(student.vision.config)
    vision = 2 * linear_weights(student.vision) if tower.any_size else vision_flops(tower)
    return step_flops(
        student.backbone.config,
        counts,
        vision_flops_per_tile=vision,
        projector_weights=linear_weights(student.projector),
        tokens_per_tile=counts.image_tokens / max(counts.tiles, 1),
        kv_scope=kv_scope,
        lora_rank=student.lora_rank,
        trained=trained_share(student.backbone.layers),
        head_trained=student.lm_head.weight.requires_grad,
        vision_trained=any(p.requires_grad for p in student.vision_parameters()),
    )


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers within."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in layers)


def vision_flops(tower: Tower) -> float:
    """Forward FLOPs of a tower on one tile, or on one usual picture where it takes any size."""
    hidden, patches = tower.hidden_size, tower.patches
    layer = 4 * hidden * hidden + 2 * hidden * tower.intermediate_size
    embed = 3 * tower.patch_size**2 * hidden
    attention = 4 * hidden * patches * patches
    return tower.layers * (2 * layer * patches + attention) + 2 * embed * patches


def count_step(student: Student, batch: dict[str, Any], supervision: Any) -> StepCounts:
    """Counts of a micro-batch, from tensors that still lie on the CPU."""
    lengths = batch["doc_length"]
    targets, queries = supervision.targets, supervision.queries
    # Scopes other than `full` see own positions instead of the student's, but as many.
    return StepCounts(
        positions=batch["input_ids"].numel(),
        pairs=int((lengths * (lengths + 1) // 2).sum()),
        tiles=student.tiles(batch["pictures"]),
        targets=len(targets),
        queries=len(queries),
        query_pairs=int((queries.index - queries.start + 1).sum()),
        taught=targets.taught.numel(),
        image_tokens=int((batch["input_ids"] == student.image_token_id).sum()),
    )
