"""Weights: read whole or in pieces from a checkpoint's folder, gathered whole from an engine.

Every one comes from the folder, or there is an error that says what to do: transformers itself
fills what a checkpoint lacks with random values, warns and goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ldistill.common.ranks import partitioned_by

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}  # others are computed in float32


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file, open. Raises FileNotFoundError without one, ValueError if damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: copy or download it again.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:  # no subclass of a useful one
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again.") from error


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Type, by safetensors' name, and shape of each tensor in a checkpoint's files."""
    found = {}
    for name in weight_files(folder):
        with open_weights(folder / name) as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found |= {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}
    return found


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None
) -> None:
    """Write a safetensors file, which refuses views and tensors that share storage: of copies."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, path, metadata=metadata or None)


def read_model(
    auto: Any, folder: Path, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A model by an auto class of transformers, to be used once its problems are refused.

    Returns:
        The model; a line for each weight that the folder does not give it; names of tensors in
        the folder that it has no place for.

    Raises:
        ValueError: files that cannot be read, or that transformers itself refuses.
    """
    # What does not fit is reported by our own sentences: transformers' name no tensor.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = auto.from_pretrained(folder, local_files_only=True, **options)
    except (RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise ValueError(
            f"the weights in {folder} cannot be loaded: they are damaged, or not those of its "
            f"config.json ({error}). Copy or download them again."
        ) from error
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"shape of {name}: {list(got)} in the file, {list(want)} by the configuration"
        for name, got, want in sorted(info["mismatched_keys"])
    ]
    return model, problems, sorted(info["unexpected_keys"])


def refuse_misfit(folder: Path, problems: Sequence[str]) -> None:
    """Raise ValueError with all problems of a checkpoint, if there are any."""
    if problems:
        raise ValueError(
            f"{folder} does not fit its own config.json ({len(problems)} problems):\n  "
            + "\n  ".join(problems)
        )


def load_lm(
    folder: Path, zero_init: dict[str, Any] | None = None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The original LM from a transformers folder, all of its weights and no others.

    Args:
        folder: with ``config.json`` and weights.
        zero_init: DeepSpeed configuration under whose ZeRO-3 the weights are partitioned while
            loading; None keeps them whole even where the student is being partitioned.
        config: default the folder's.

    Raises:
        OSError: a weight file is missing.
        ValueError: weights that cannot be read, or are not those of the configuration.
    """
    options = {"dtype": "auto"} | ({"config": config} if config else {})
    with partitioned_by(zero_init):
        lm, problems, unused = read_model(AutoModelForCausalLM, folder, **options)
    refuse_misfit(folder, problems + [f"unknown {name}" for name in unused])
    return lm


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
    for dtype, shape in stored(folder).values():
        counts[_DTYPES.get(dtype, torch.float32)] += prod(shape)
    return counts.most_common(1)[0][0]


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a configuration and all of its weights."""
    return all((folder / name).is_file() for name in ("config.json", *weight_files(folder)))


def gather_trained(student: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Trained parameters by name, whole, on the CPU: fp32 masters where an optimizer has them.

    Every rank must call it: under ZeRO each parameter is gathered from all of them, one at a time.
    Those that ``keep`` nothing take part and get an empty dict.
    """
    whole: dict[nn.Parameter, Tensor | None] = {}
    for parameter in [p for p in student.parameters() if p.requires_grad]:  # a tied pair once
        tensor = _gather(parameter)
        whole[parameter] = tensor.detach().to("cpu", copy=True) if keep else None
    named = student.named_parameters(remove_duplicate=False)
    return {name: whole[parameter] for name, parameter in named if keep and parameter in whole}


def _gather(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master
    return parameter
