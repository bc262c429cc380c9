"""The checkpoint formats a student can come in, told apart by the folder's ``config.json``.

A new family is a new module and an entry in ``FORMATS``; everything else goes through the four
functions below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldistill.common.locate import resolve
from ldistill.models import hf_vlm_format, hf_vlm_processor, nanovlm_format
from ldistill.models.hf_vlm import FAMILIES
from ldistill.models.lora import LowRank
from ldistill.models.processor import Processor
from ldistill.models.student import Student


class Format(NamedTuple):
    """How one family of checkpoints is recognised, read and written."""

    name: str  # what users call it
    reads: Callable[[Mapping[str, Any]], bool]  # whether a ``config.json`` is of this family
    load: Callable[..., Student]  # (folder, partition, dtype)
    load_processor: Callable[..., Processor]  # (folder, tokenizer, **image settings)
    export_like: Callable[[Path, Mapping[str, Tensor | LowRank], Path], None]  # as below


FORMATS = (
    Format(
        "nanoVLM",
        nanovlm_format.reads,
        nanovlm_format.load_nanovlm,
        nanovlm_format.load_processor,
        nanovlm_format.export_like,
    ),
    Format(
        f"transformers' {', '.join(FAMILIES)}",
        hf_vlm_format.reads,
        hf_vlm_format.load_hf_vlm,
        hf_vlm_processor.load_processor,
        hf_vlm_format.export_like,
    ),
)


def format_of(folder: Path) -> Format:
    """Format of a checkpoint folder.

    Raises:
        FileNotFoundError: no ``config.json``.
        ValueError: a configuration that no format reads, with the reason where there is one.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a student checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy it again.") from error
    for candidate in FORMATS:
        if candidate.reads(config):
            return candidate
    kind = f"a {config['model_type']!r} model" if config.get("model_type") else "without model_type"
    lm = "vision_config" not in config and "text_config" not in config
    reason = ": it has no vision tower (is it the teacher? --student and --teacher swapped?)"
    raise ValueError(
        f"student {str(folder)!r} is {kind}, which is not supported{reason if lm else ''}. "
        f"Supported: {'; '.join(candidate.name for candidate in FORMATS)}."
    )


def load_student(
    name: str | Path, *, partition: bool = False, dtype: torch.dtype = torch.float32
) -> Student:
    """Student from a folder or hub id.

    Args:
        name: folder, ``pkg://`` or hub id.
        partition: let a living ZeRO-3 configuration partition the weights while they load (every
            rank must do so together); False: whole, whatever runs.
        dtype: of the weights in memory.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: an unsupported kind of model, or one that does not fit its configuration.
    """
    folder = resolve(name)
    return format_of(folder).load(folder, partition=partition, dtype=dtype)


def load_processor(name: str | Path, tokenizer: str | None = None, **settings: Any) -> Processor:
    """Tokenizer, chat template and image settings of a student.

    Args:
        name: student folder or hub id.
        tokenizer: folder or hub id of a tokenizer, if not the student's own.
        settings: ``tiling``, ``max_images``.
    """
    folder = resolve(name, weights=False)
    return format_of(folder).load_processor(folder, tokenizer, **settings)


def export_like(base: Path, updates: Mapping[str, Tensor | LowRank], folder: Path) -> None:
    """The checkpoint at ``base`` with trained weights in it, written to ``folder``.

    Args:
        base: folder the training began from; gives all that was not trained, bit for bit.
        updates: whole tensors, or low-rank additions, by the student's parameter names.
        folder: where to write.
    """
    format_of(base).export_like(base, updates, folder)
