"""Which kind of model a folder holds, and the scorer for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from ldistill.common.locate import resolve
from ldistill.common.run_files import RECIPE
from ldistill.evaluation.scorer import LMScorer, Scorer, StudentScorer, VLMScorer, image_token
from ldistill.models.formats import load_processor, load_student
from ldistill.models.weights import read_model, refuse_misfit


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
    """Whether the run that left this model cut its pictures into tiles; False without a run."""
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
    named = config.get("model_type")
    cls = type(transformers.AutoConfig.from_pretrained(folder)) if named else None
    for kind, auto in (("vlm", AutoModelForImageTextToText), ("lm", AutoModelForCausalLM)):
        if cls in auto._model_mapping:
            return kind
    raise ValueError(f"{folder} is of model_type {named!r}: neither a VLM nor an LM.")


def load_scorer(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    tokenizer: str | None = None,
    tiling: bool | None = None,
    pictures: str = "error",
    chat_template: str | None = None,
) -> Scorer:
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
    folder, device = model_folder(name), torch.device(device)
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch_type = usual if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(torch_type, torch.dtype):
        raise ValueError(f"dtype must be auto or a torch type such as bfloat16, got {dtype!r}.")
    kind = kind_of(folder)
    tiling = tiled_in_training(name) if tiling is None else tiling
    if kind == "nanovlm":
        processor = load_processor(folder, tokenizer, tiling=tiling)
        return StudentScorer(load_student(folder, dtype=torch_type).to(device), processor)
    template = Path(chat_template).read_text(encoding="utf-8") if chat_template else None
    other = AutoTokenizer.from_pretrained(resolve(tokenizer)) if tokenizer else None
    if kind == "lm":
        tok = other or AutoTokenizer.from_pretrained(folder)
        tok.chat_template = template or tok.chat_template
        lm = _whole(AutoModelForCausalLM, folder, torch_type)
        return LMScorer(lm.to(device), tok, pictures)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.chat_template = template or processor.chat_template
    if other:
        own, token = processor.tokenizer, image_token(processor)
        if token and other.convert_tokens_to_ids(token) != own.convert_tokens_to_ids(token):
            raise ValueError(f"tokenizer {tokenizer!r} gives {token} another id than the model's.")
        other.chat_template = own.chat_template or other.chat_template
        processor.tokenizer = other
    vlm = _whole(AutoModelForImageTextToText, folder, torch_type)
    return VLMScorer(vlm.to(device), processor, tiling)


def _whole(auto: Any, folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model whose every weight comes from its folder: random ones would be scored as well."""
    model, problems, _ = read_model(auto, folder, dtype=dtype)
    refuse_misfit(folder, problems)
    return model
