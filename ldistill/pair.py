"""A student and the LM it was built on: load both, check that they fit, say what does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ldistill.checkpoints import resolve
from ldistill.data.processor import Processor
from ldistill.students.nanovlm import NanoVLM
from ldistill.students.nanovlm_format import load_nanovlm, load_processor
from ldistill.teacher import Teacher, load_lm

# What must be equal for a teacher query to read a student key: name → getter on the decoder config.
_FIELDS: dict[str, Any] = {
    "num_hidden_layers": lambda c: c.num_hidden_layers,
    "hidden_size": lambda c: c.hidden_size,
    "num_attention_heads": lambda c: c.num_attention_heads,
    "num_key_value_heads": lambda c: c.num_key_value_heads,
    "head_dim": lambda c: getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
    "rope_type": lambda c: c.rope_parameters["rope_type"],
    "rope_theta": lambda c: float(c.rope_parameters["rope_theta"]),
    "rope scaling": lambda c: {
        k: v for k, v in c.rope_parameters.items() if k not in ("rope_type", "rope_theta")
    },
    "rms_norm_eps": lambda c: c.rms_norm_eps,
    "attention_bias": lambda c: bool(getattr(c, "attention_bias", False)),
}


@dataclass
class Pair:
    """A student with its processor and, where the recipe distils, its teacher."""

    student: NanoVLM
    processor: Processor
    teacher: Teacher | None
    student_folder: Path
    teacher_folder: Path | None


def load_pair(
    student: str,
    teacher: str | None,
    *,
    tokenizer: str | None = None,
    kernels: str = "auto",
    zero_init: dict[str, Any] | None = None,
    **image_settings: Any,
) -> Pair:
    """Load a pair from folders or hub ids and check that its decoders fit.

    Args:
        student: nanoVLM checkpoint.
        teacher: the LM it was built on; None loads no teacher (a run on labels alone).
        tokenizer: tokenizer to use; default the one the student's configuration names.
        kernels: ``auto``, ``triton`` or ``reference``.
        zero_init: DeepSpeed configuration that partitions the teacher while it loads.
        image_settings: ``tiling``, ``max_images``.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        ValueError: the decoders differ (every differing field is named), or a checkpoint has
            missing or unknown keys.
    """
    student_folder = resolve(student)
    model = load_nanovlm(student_folder)
    processor = load_processor(student_folder, tokenizer, **image_settings)
    if teacher is None:
        return Pair(model, processor, None, student_folder, None)
    teacher_folder = resolve(teacher)
    lm_config = _lm_config(teacher_folder)
    check_pair(model.decoder.config, lm_config, model.config.lm_base_vocab_size)
    lm = load_lm(teacher_folder, zero_init)
    return Pair(model, processor, Teacher(lm, kernels), student_folder, teacher_folder)


def _lm_config(folder: Path) -> PretrainedConfig:
    values, _ = PretrainedConfig.get_config_dict(folder)
    if values.get("model_type") != "llama":
        raise ValueError(
            f"teacher {str(folder)!r} is a {values.get('model_type')!r} model; a nanoVLM student's "
            "teacher must be a Llama-kind LM."
        )
    return AutoConfig.from_pretrained(folder)


def check_pair(student: PretrainedConfig, teacher: PretrainedConfig, base_vocab: int) -> None:
    """Refuse a pair whose decoders differ in anything a shared key depends on.

    Args:
        student: the student decoder's configuration.
        teacher: the LM's configuration.
        base_vocab: vocabulary of the LM the student was built on.

    Raises:
        ValueError: naming each differing field and both values.
    """
    rows = [(name, get(student), get(teacher)) for name, get in _FIELDS.items()]
    rows.append(("base vocabulary", base_vocab, teacher.vocab_size))
    differing = [f"{name}: student {s}, teacher {t}" for name, s, t in rows if s != t]
    if differing:
        raise ValueError(
            "student and teacher do not fit; the teacher must be the very LM the student was "
            "built on:\n  " + "\n  ".join(differing)
        )


def freeze_vision(student: NanoVLM) -> None:
    """Vision tower frozen; projector and decoder trained (the paper's Table 4)."""
    student.vision.requires_grad_(False).eval()
    student.projector.requires_grad_(True)
    student.decoder.requires_grad_(True)


def parameter_groups(
    student: NanoVLM, projector_lr: float, decoder_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups: projector and decoder with rates of their own; no decay on norms."""
    groups = []
    for module, rate in ((student.projector, projector_lr), (student.decoder, decoder_lr)):
        trained = [p for p in module.parameters() if p.requires_grad]
        for params, decay in (
            ([p for p in trained if _shape(p).numel() and len(_shape(p)) > 1], weight_decay),
            ([p for p in trained if len(_shape(p)) <= 1], 0.0),
        ):
            if params:
                groups.append({"params": params, "lr": rate, "weight_decay": decay})
    return groups


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also while ZeRO-3 holds only a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)
