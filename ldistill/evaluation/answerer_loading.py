"""Which kind of model a folder holds, and the answerer for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ldistill.common.locate import resolve
from ldistill.common.run_files import RECIPE
from ldistill.evaluation.answerers import Answerer, LMAnswerer, StudentAnswerer, VLMAnswerer
from ldistill.models.weights import read_model, refuse_misfit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_folder(name: str) -> Path:
    """Folder of a model; of a training run, the student it left.

    Raises:
        FileNotFoundError: no such folder, and nothing the hub has.
    """
    folder = resolve(name)
    student = folder / "student"
    of_run = not (folder / "config.json").is_file() and (student / "config.json").is_file()
    return student if of_run else folder


def tiled_in_training(name: str) -> bool:
    """Whether the run that left this model cut its pictures into tiles; False of any other model.

    Raises:
        FileNotFoundError: no such model.
    """
    folder = model_folder(name).resolve().parent  # of a run, or of its checkpoint
    for recipe in (folder / RECIPE, folder.parent / RECIPE):
        if recipe.is_file():
            return bool((yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("tiling"))
    return False


def kind_of(folder: Path) -> str:
    """``nanovlm``, ``vlm`` or ``lm``, as the folder's ``config.json`` says.

    Raises:
        FileNotFoundError: no ``config.json``.
        ValueError: a model that is none of the three.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a model folder.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if "vit_hidden_dim" in config:
        return "nanovlm"
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if "model_type" not in config:
        raise ValueError(f"{path} names no model_type: neither a nanoVLM nor a transformers model.")
    cls = type(AutoConfig.from_pretrained(folder))
    if cls in AutoModelForImageTextToText._model_mapping:
        return "vlm"
    if cls in AutoModelForCausalLM._model_mapping:
        return "lm"
    raise ValueError(f"{folder} is a {config['model_type']!r} model: neither a VLM nor an LM.")


def load_answerer(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    tokenizer: str | None = None,
    tiling: bool | None = None,
    pictures: str = "error",
    chat_template: str | None = None,
) -> Answerer:
    """A model of whichever kind its folder holds.

    Args:
        name: folder, ``pkg://`` or hub id.
        device: where it runs.
        dtype: ``auto`` (bfloat16 on a GPU, float32 on a CPU) or torch's name of a type.
        tokenizer: default the model's own.
        tiling: cut large pictures into tiles (nanoVLM, SmolVLM); None: as the run that left the
            model did (`tiled_in_training`).
        pictures: LM alone: ``error`` or ``drop``.
        chat_template: file with a chat template, for a VLM or LM that has none.

    Raises:
        FileNotFoundError, ValueError: no such model, or one that cannot be used.
    """
    folder, torch_type = model_folder(name), _dtype(dtype, torch.device(device))
    kind = kind_of(folder)
    tiling = tiled_in_training(name) if tiling is None else tiling
    if kind == "nanovlm":
        from ldistill.models.nanovlm_format import load_nanovlm, load_processor

        processor = load_processor(folder, tokenizer, tiling=tiling)
        return StudentAnswerer(load_nanovlm(folder).to(device, torch_type), processor)
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    template = Path(chat_template).read_text(encoding="utf-8") if chat_template else None
    if kind == "vlm":
        processor = AutoProcessor.from_pretrained(folder)
        processor.chat_template = template or processor.chat_template
        if tokenizer:
            processor.tokenizer = _tokenizer_for(processor, tokenizer)
        model = _whole(AutoModelForImageTextToText, folder, torch_type)
        return VLMAnswerer(model.to(device), processor, tiling)
    tok = AutoTokenizer.from_pretrained(resolve(tokenizer) if tokenizer else folder)
    tok.chat_template = template or tok.chat_template
    model = _whole(AutoModelForCausalLM, folder, torch_type)
    return LMAnswerer(model.to(device), tok, pictures)


def _whole(auto: Any, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose every weight comes from its folder: random ones would be scored as well."""
    model, problems, _ = read_model(auto, folder, dtype=dtype)
    refuse_misfit(folder, problems)
    return model


def _tokenizer_for(processor: Any, name: str) -> Any:
    """Another tokenizer for a VLM's processor, if it knows the picture's token by the same id."""
    from transformers import AutoTokenizer

    own, other = processor.tokenizer, AutoTokenizer.from_pretrained(resolve(name))
    token = getattr(processor, "image_token", None)
    token = getattr(token, "content", token)
    if token and other.convert_tokens_to_ids(token) != own.convert_tokens_to_ids(token):
        raise ValueError(
            f"tokenizer {name!r} gives {token} another id than the model's own: it is not the "
            "tokenizer this model was trained with."
        )
    other.chat_template = own.chat_template or other.chat_template
    return other


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be auto or a torch type such as bfloat16, got {name!r}.")
    return dtype
