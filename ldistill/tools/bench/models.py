"""Models of a benchmark: a pair's shapes with random weights, made on the device they run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ldistill.models.hf_vlm import HFVLM, tokens_per_tile
from ldistill.models.named_pairs import base_vocabulary, teacher_config
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.student import Student
from ldistill.tools.bench.batch import BatchShape


def random_student(config: Any, device: torch.device, dtype: torch.dtype) -> Student:
    """A student of a configuration.

    Args:
        config: of ``pair_shapes.student_config``.
        device, dtype: weights are drawn there, so that the CPU never holds a copy.
    """
    with _made_as(device, dtype):
        if isinstance(config, NanoVLMConfig):
            return NanoVLM(config)
        return HFVLM(AutoModelForImageTextToText.from_config(config))


def random_lm(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A teacher of the student decoder's shape over the base vocabulary."""
    with _made_as(device, dtype):
        return AutoModelForCausalLM.from_config(teacher_config(config))


def batch_shape(config: Any) -> BatchShape:
    """What a benchmark's batch depends on of a student's configuration."""
    if isinstance(config, NanoVLMConfig):
        tokens, size = config.mp_image_token_length, config.vit_img_size
    else:
        tokens, size = tokens_per_tile(config), config.vision_config.image_size
    return BatchShape(tokens, size, config.image_token_id, base_vocabulary(config))


@contextmanager
def _made_as(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
