"""The checkpoint formats a student can come in, told apart by the folder's ``config.json``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ldistill.common.locate import resolve
from ldistill.models import hf_vlm_format, nanovlm_format
from ldistill.models.lora import WeightUpdates
from ldistill.models.processor import Processor
from ldistill.models.student import Student
from ldistill.models.weights import open_weights, weight_files, write_tensors

FORMATS = (nanovlm_format, hf_vlm_format)
"""Each with ``NAME``, what users call it; ``reads``, whether a ``config.json`` is its; ``COPIED``,
the files that an export has besides weights; ``load_student`` and ``load_processor`` as below; and
``Revision(base, updates)``: called with a tensor's key and value, what training made of it."""


def format_of(folder: Path) -> ModuleType:
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
        f"Supported: {'; '.join(candidate.NAME for candidate in FORMATS)}."
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
    return format_of(folder).load_student(folder, partition=partition, dtype=dtype)


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


def export_like(base: Path, updates: WeightUpdates, folder: Path) -> None:
    """The checkpoint at ``base`` with trained weights in it, written to ``folder``: a copy in which
    they alone differ. Tensors go through file by file: a 13B export needs the memory of one.

    Args:
        base: folder the training began from; gives all that was not trained, bit for bit, and
            keys, shapes, dtypes and configuration.
        updates: whole tensors in any dtype, or low-rank additions, by the student's names.
        folder: where to write; its files are replaced.
    """
    format_ = format_of(base)
    revised = format_.Revision(base, updates)
    folder.mkdir(parents=True, exist_ok=True)
    for path in base.glob(format_.COPIED):
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            shutil.copyfile(path, folder / path.name)
    for name in weight_files(base):
        with open_weights(base / name) as file:
            metadata, keys = file.metadata(), file.keys()
            tensors = {key: revised(key, file.get_tensor(key)) for key in keys}
        write_tensors(folder / name, tensors, metadata)
