"""The checkpoint formats a student can come in, told apart by the folder's ``config.json``.

A format is a :class:`StudentFormat`; a new family is a new module that has one and a line in
``_MODULES``. Everything else goes through the four functions below.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldistill.common.locate import resolve
from ldistill.models.weights import open_weights

if TYPE_CHECKING:
    from ldistill.models.lora import LowRank
    from ldistill.models.processor import Processor
    from ldistill.models.student import Student

_MODULES = ("ldistill.models.nanovlm_format", "ldistill.models.hf_vlm_format")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}  # others are computed in float32


@dataclass(frozen=True)
class StudentFormat:
    """How one family of checkpoints is recognised, read and written.

    name:            what users call it.
    reads:           whether a ``config.json`` is of this family.
    load:            (folder, partition, dtype) → student.
    load_processor:  (folder, tokenizer, **image settings) → processor.
    export_like:     (base folder, updates by parameter name, target folder): the base checkpoint
                     with the updates in it, same keys, shapes, dtypes and configuration.
    """

    name: str
    reads: Callable[[Mapping[str, Any]], bool]
    load: Callable[..., Student]
    load_processor: Callable[..., Processor]
    export_like: Callable[[Path, Mapping[str, Tensor | LowRank], Path], None]


def format_of(folder: Path) -> StudentFormat:
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
    formats = [importlib.import_module(name).FORMAT for name in _MODULES]
    for candidate in formats:
        if candidate.reads(config):
            return candidate
    supported = "; ".join(candidate.name for candidate in formats)
    raise ValueError(
        f"student {str(folder)!r} is {_kind(config)}, which is not supported{_reason(config)}. "
        f"Supported: {supported}."
    )


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    return f"a {kind!r} model" if kind else "a model without model_type"


def _reason(config: Mapping[str, Any]) -> str:
    """Why a VLM that is otherwise of the right kind cannot share its keys with its LM."""
    text = config.get("text_config") or config
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if "mrope_section" in rope:
        return (
            ": its decoder rotates keys along several axes (multi-axis RoPE), which its LM, whose "
            "positions are one number, cannot query"
        )
    if "vision_config" not in config and "text_config" not in config:
        return ": it has no vision tower (is it the teacher? --student and --teacher swapped?)"
    return ""


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


def weight_files(folder: Path) -> list[str]:
    """Names of a checkpoint's safetensors files: one, or as many as its index lists."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted(set(mapping.values()))


def weight_dtype(folder: Path) -> torch.dtype:
    """The floating type that most of a checkpoint's weights have on disk."""
    counts: Counter[torch.dtype] = Counter()
    for name in weight_files(folder):
        with open_weights(folder / name) as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                counts[_DTYPES.get(part.get_dtype(), torch.float32)] += prod(part.get_shape())
    return counts.most_common(1)[0][0]


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a configuration and all of its weights."""
    names = ["config.json", *weight_files(folder)] if folder.is_dir() else ["config.json"]
    return all((folder / name).is_file() for name in names)
