"""Floating-point operations of a training step: what MFU is counted with.

MFU is *model* FLOPs over time and peak: what the step asks for mathematically, not all that was
executed. A multiply-add is two operations. The student runs forward and backward: a product of a
trained weight counts three times its forward (result, gradient of the input, gradient of the
weight), that of a frozen one twice, as in a decoder with LoRA, whose adapters are added. The vision
tower and the teacher run forward alone; the teacher runs on its own rows, without k and v
projections where the scope is ``full``. Attention counts visible pairs.

Not counted: what activation checkpointing recomputes, the teacher's forward of the health check,
norms, activations and softmax. Counted although it is not needed: the gradient of the projector's
input, far below 1%.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldistill.models.student import Student

# Dense bf16 rates by the vendors' datasheets, FLOP/s.
PEAKS: dict[str, float] = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "RTX PRO 6000": 504e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "A6000": 155e12,
    "A40": 150e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Behind a name in that table these make another card of it.
_OTHER_CARDS = ("Ti", "D", "SUPER", "Laptop", "Max-Q")


@dataclass(frozen=True)
class StepCounts:
    """What a step ran, over one rank.

    Args:
        positions: [batch × seq] the decoder ran, padding included.
        pairs: visible (query, key) pairs of the student's attention, one head.
        tiles: images the vision tower ran.
        rows: supervised rows (student head).
        teacher_rows: rows the teacher ran.
        teacher_pairs: (query, key) pairs those rows saw.
        kd_rows: rows of the teacher's head.
    """

    positions: int
    pairs: int
    tiles: int
    rows: int
    teacher_rows: int = 0
    teacher_pairs: int = 0
    kd_rows: int = 0


def decoder_layer_weights(config: Any, with_kv: bool = True) -> int:
    """Weights of the matrix products in one decoder layer."""
    hidden = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q_and_o = 2 * hidden * config.num_attention_heads * head_dim
    kv = 2 * hidden * config.num_key_value_heads * head_dim if with_kv else 0
    return q_and_o + kv + 3 * hidden * config.intermediate_size


def adapter_weights(config: Any, rank: int) -> int:
    """Weights of LoRA adapters on every linear layer of one decoder layer."""
    hidden, inter = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    width, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    sides = 2 * (hidden + width) + 2 * (hidden + kv) + 3 * (hidden + inter)
    return rank * sides


def step_flops(
    config: Any,
    counts: StepCounts,
    *,
    vision_flops_per_tile: float,
    projector_weights: int,
    tokens_per_tile: int,
    kv_scope: str = "full",
    lora_rank: int = 0,
) -> float:
    """FLOPs of one rank's step.

    Args:
        config: the decoder's transformers configuration.
        counts: what was run.
        vision_flops_per_tile: forward pass of the vision tower on one tile.
        projector_weights: weights of the projector.
        tokens_per_tile: image tokens of one tile.
        kv_scope: ``full`` leaves out the teacher's k and v projections.
        lora_rank: of adapters on a decoder that is frozen with its head; 0: all of it is trained.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    )
    head = hidden * config.vocab_size
    products = 2 * layers * decoder_layer_weights(config) * counts.positions
    products += 2 * head * counts.rows
    adapters = 2 * layers * adapter_weights(config, lora_rank) * counts.positions
    attention = layers * 4 * width * counts.pairs
    projector = 2 * projector_weights * tokens_per_tile * counts.tiles
    student = (2 if lora_rank else 3) * products + 3 * (adapters + attention + projector)
    teacher = layers * (
        2 * decoder_layer_weights(config, kv_scope != "full") * counts.teacher_rows
        + 4 * width * counts.teacher_pairs
    )
    teacher += 2 * head * counts.kd_rows
    return student + vision_flops_per_tile * counts.tiles + teacher


def student_flops(student: Student, counts: StepCounts, kv_scope: str = "full") -> float:
    """:func:`step_flops` of a student, from its configuration alone.

    Shapes are not read off the parameters: under ZeRO-3 a rank holds none of them whole.
    """
    return step_flops(
        student.backbone.config,
        counts,
        vision_flops_per_tile=vision_flops(student.vision.config),
        projector_weights=linear_weights(student.projector),
        tokens_per_tile=student.tokens_per_tile,
        kv_scope=kv_scope,
        lora_rank=lora_rank(student.backbone),
    )


def lora_rank(decoder: nn.Module) -> int:
    """Rank of the adapters in a decoder; 0 without any."""
    ranks = (next(iter(m.r.values())) for m in decoder.modules() if hasattr(m, "lora_A"))
    return next(ranks, 0)


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers within."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in layers)


def vision_flops(config: Any) -> float:
    """Forward FLOPs of a SigLIP or CLIP tower on one tile."""
    hidden, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    layer = 4 * hidden * hidden + 2 * hidden * config.intermediate_size
    embed = 3 * config.patch_size**2 * hidden
    attention = 4 * hidden * patches * patches
    return config.num_hidden_layers * (2 * layer * patches + attention) + 2 * embed * patches


def count_step(batch: dict[str, Tensor], plan: Any) -> StepCounts:
    """Counts of a micro-batch, from tensors that still lie on the CPU."""
    lengths = batch["doc_length"]
    teacher = plan.teacher
    # Scopes other than `full` see own positions instead of the student's, but as many.
    return StepCounts(
        positions=batch["input_ids"].numel(),
        pairs=int((lengths * (lengths + 1) // 2).sum()),
        tiles=batch["pixel_values"].shape[0],
        rows=len(plan.supervised),
        teacher_rows=len(teacher),
        teacher_pairs=int((teacher.index - teacher.start + 1).sum()),
        kd_rows=plan.supervised.kd_rows.numel(),
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak rate of a device and where the number comes from.

    A GPU's datasheet where it is listed; otherwise a matrix product measured now.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if rate := listed_peak(name):
            return rate, f"{name}, dense bf16 by datasheet"
    return measured_flops(device, dtype), "matrix product measured at start"


def listed_peak(name: str) -> float | None:
    """Rate of a card by the name that its driver gives it, whole words alone; None: not listed."""
    others = "|".join(_OTHER_CARDS)
    for key, rate in PEAKS.items():
        if re.search(rf"\b{re.escape(key)}\b(?! (?:{others})\b)", name, re.IGNORECASE):
            return rate
    return None


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Best of ten matrix products, FLOP/s."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        start = seconds(device)
        a @ a
        synchronise(device)
        best = min(best, seconds(device) - start)
    return 2 * size**3 / best


def seconds(device: torch.device) -> float:
    """Clock of a measurement: a GPU's is the wall; a CPU's is the time this process computed.

    Others on the same machine take turns with it, which the wall would count; the CPU time of all
    threads, divided by their number, is what the wall shows on an idle machine.
    """
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    return time.perf_counter()


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
