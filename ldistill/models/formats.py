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
from ldistill.models import hf_vlm_format, nanovlm_format
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
        lambda config: "vit_hidden_dim" in config,
        nanovlm_format.load_nanovlm,
        nanovlm_format.load_processor,
        nanovlm_format.export_like,
    ),
    Format(
        f"transformers' {', '.join(FAMILIES)}",
        lambda config: config.get("model_type") in FAMILIES,
        hf_vlm_format.load_hf_vlm,
        hf_vlm_format.load_processor,
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
    """Student from a folder, ``pkg://`` or hub id.

    Args:
        name: where it lies.
        partition: let a living ZeRO-3 configuration partition the weights while they load (every
            rank must do so together); False: whole, whatever runs.
        dtype: of the weights in memory, whatever they are on disk.

    Raises:
        FileNotFoundError: no such checkpoint, or a weight file is missing.
        ValueError: an unsupported kind of model, or weights that cannot be read or do not fit the
            configuration: missing, unknown or misshapen, all of them listed.
    """
    folder = resolve(name)
    return format_of(folder).load(folder, partition=partition, dtype=dtype)


def load_processor(name: str | Path, tokenizer: str | None = None, **settings: Any) -> Processor:
    """Tokenizer, chat template and image settings of a student.

    Args:
        name: student folder or hub id; its weights are not read.
        tokenizer: folder or hub id of a tokenizer, if not the student's own.
        settings: ``tiling``: cut large pictures into tiles, in families that can do without;
            ``max_images``: pictures of a sample that are used.

    Raises:
        ValueError: tiling asked of a family that has none, no chat template, or a tokenizer that
            gives the image tokens other ids than the student expects.
    """
    folder = resolve(name, weights=False)
    return format_of(folder).load_processor(folder, tokenizer, **settings)


def export_like(base: Path, updates: Mapping[str, Tensor | LowRank], folder: Path) -> None:
    """The checkpoint at ``base`` with trained weights in it, written to ``folder``.

    Args:
        base: folder the training began from; gives all that was not trained, bit for bit, and
            keys, shapes, dtypes and configuration.
        updates: whole tensors in any dtype, or low-rank additions, by the student's names.
        folder: where to write; its files are replaced.
    """
    format_of(base).export_like(base, updates, folder)
