"""Models of a benchmark: a pair's shapes with random weights, made on the device they run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ldistill.bench_batch import BatchShape
from ldistill.pair_shapes import teacher_config
from ldistill.students.nanovlm import NanoVLM
from ldistill.students.nanovlm_config import NanoVLMConfig


def random_student(config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A student of a configuration.

    Args:
        config: of ``pair_shapes.student_config``.
        device, dtype: weights are drawn there, so that the CPU never holds a copy.

    Raises:
        ValueError: no student class takes this configuration.
    """
    if not isinstance(config, NanoVLMConfig):
        raise ValueError(
            f"no student class for a {type(config).__name__} here: bench one of tiny, nanovlm-460m."
        )
    with _made_as(device, dtype):
        return NanoVLM(config)


def random_lm(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A teacher of the student decoder's shape over the base vocabulary."""
    with _made_as(device, dtype):
        return AutoModelForCausalLM.from_config(teacher_config(config))


def batch_shape(config: Any) -> BatchShape:
    """What a benchmark's batch depends on of a student's configuration."""
    return BatchShape.of(config)


@contextmanager
def _made_as(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
