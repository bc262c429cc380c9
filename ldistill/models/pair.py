"""A student and the LM it was built on: load both, check that they fit, say what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from ldistill.common.locate import resolve
from ldistill.distill.teacher import Teacher, load_lm
from ldistill.models.fit import check_pair, check_tokenizers
from ldistill.models.formats import export_like, format_of
from ldistill.models.lora import weight_updates
from ldistill.models.processor import Processor
from ldistill.models.student import Student


@dataclass
class Pair:
    """A student with its processor and, where the recipe distils, its teacher."""

    student: Student
    processor: Processor
    teacher: Teacher | None
    student_folder: Path
    teacher_folder: Path | None

    def export(self, trained: Mapping[str, Tensor], folder: Path) -> None:
        """Write the student with trained parameters in it, in the format it came in.

        Args:
            trained: whole tensors, of :func:`ldistill.models.state.gather_trained`.
            folder: where to write.
        """
        export_like(self.student_folder, weight_updates(self.student, trained), folder)


def load_pair(
    student: str,
    teacher: str | None,
    *,
    tokenizer: str | None = None,
    kernels: str = "auto",
    zero_init: dict[str, Any] | None = None,
    partition: bool = False,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    **image_settings: Any,
) -> Pair:
    """Load a pair from folders or hub ids and check that its decoders fit.

    Args:
        student: checkpoint of a nanoVLM, LLaVA or SmolVLM (see ``ldistill.models.formats``).
        teacher: the LM it was built on; None loads no teacher (a run on labels alone).
        tokenizer: tokenizer to use; default the student's own.
        kernels: ``auto``, ``triton`` or ``reference``.
        zero_init: DeepSpeed configuration that partitions the teacher while it loads.
        partition: let a living ZeRO-3 configuration partition the student while it loads.
        dtype: of the student's weights in memory.
        max_length: longest row, for decoders with a sliding window; None: all their positions.
        image_settings: ``tiling``: cut large pictures into tiles.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        ValueError: an unsupported model, decoders or tokenizers that differ (every differing field
            is named), or a checkpoint with missing or unknown keys.
    """
    student_folder = resolve(student)
    format_ = format_of(student_folder)
    teacher_folder = resolve(teacher) if teacher is not None else None
    lm_config = _lm_config(teacher_folder) if teacher_folder else None
    processor = format_.load_processor(student_folder, tokenizer, **image_settings)
    model = format_.load(student_folder, partition=partition, dtype=dtype)
    if teacher_folder is None:
        return Pair(model, processor, None, student_folder, None)
    check_pair(model.backbone.config, lm_config, model.base_vocab_size, max_length)
    check_tokenizers(processor.tokenizer, teacher_folder, lm_config.vocab_size)
    lm = load_lm(teacher_folder, zero_init)
    return Pair(model, processor, Teacher(lm, kernels), student_folder, teacher_folder)


def _lm_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"teacher {str(folder)!r} holds no config.json: not a checkpoint.")
    values, _ = PretrainedConfig.get_config_dict(folder)
    if "model_type" not in values:
        raise ValueError(
            f"teacher {str(folder)!r} has no model_type in its config.json: the teacher is a "
            "language model in transformers' format (are --student and --teacher swapped?)."
        )
    if "vision_config" in values:
        raise ValueError(
            f"teacher {str(folder)!r} is a {values['model_type']!r} model, which sees: the teacher "
            "is the language model the student was built on."
        )
    return AutoConfig.from_pretrained(folder)


def freeze_vision(student: Student) -> None:
    """Vision tower frozen; projector and decoder trained (the paper's Table 4)."""
    student.requires_grad_(True)
    student.vision.requires_grad_(False).eval()
