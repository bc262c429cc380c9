"""LLaVA and SmolVLM checkpoints: read by transformers, written back file by file.

An export is a copy of the folder in which only trained tensors differ: same safetensors files and
index, same keys and dtypes, configuration, tokenizer and templates byte for byte. Tensors go
through one at a time, so that a 13B export needs the memory of one shard.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ldistill.common.images import ImageSettings
from ldistill.common.locate import resolve
from ldistill.common.partition import partitioned_by, partitioned_by_the_run
from ldistill.models.formats import StudentFormat, weight_files
from ldistill.models.hf_vlm import FAMILIES, HFVLM, tokens_per_tile
from ldistill.models.hf_vlm_processor import (
    HFProcessor,
    Idefics3Settings,
    Idefics3Tokens,
    LlavaTokens,
)
from ldistill.models.lora import LowRank, updated
from ldistill.models.weights import open_weights, read_model, refuse_misfit

logger = logging.getLogger(__name__)

# Names on disk, older first: LLaVA's checkpoints keep those of transformers before 4.52.
_RENAMED = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.", "model.vision_tower."),
)
_PREFIX = "vlm."  # of our parameter names before transformers'


def parameter_name(key: str) -> str:
    """Our name of a tensor on disk (of the decoder or the projector)."""
    for disk, current in _RENAMED:
        if key.startswith(disk):
            return _PREFIX + current + key.removeprefix(disk)
    return _PREFIX + key


def load_hf_vlm(
    name: str | Path, *, partition: bool = False, dtype: torch.dtype = torch.float32
) -> HFVLM:
    """Student from a folder or hub id.

    Args:
        name: folder or hub id.
        partition: let a living ZeRO-3 configuration partition the weights while they load.
        dtype: of the weights in memory, whatever they are on disk.

    Raises:
        FileNotFoundError: no such checkpoint, or a weight file is missing.
        ValueError: weights that do not fit the configuration, or cannot be read.
    """
    folder = resolve(name)
    disk = _disk_shapes(folder)
    with partitioned_by_the_run() if partition else partitioned_by(None):
        vlm, problems, unused = read_model(AutoModelForImageTextToText, folder, dtype=dtype)
    model = HFVLM(vlm)
    refuse_misfit(folder, problems + _unwritable(model, disk))
    if unused:
        kept = ", ".join(unused[:5])
        logger.warning("%s: tensors kept on export but not used: %s", folder, kept)
    return model


def _disk_shapes(folder: Path) -> dict[str, list[int]]:
    shapes = {}
    for name in weight_files(folder):
        with open_weights(folder / name) as file:
            for key in file.keys():  # noqa: SIM118
                shapes[key] = file.get_slice(key).get_shape()
    return shapes


def _unwritable(model: HFVLM, disk: Mapping[str, list[int]]) -> list[str]:
    """Parameters of decoder and projector that an export would find no tensor for."""
    stored = {parameter_name(key): shape for key, shape in disk.items()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)  # a tied pair is stored once
    vision = {id(p) for p in model.vision.parameters()}
    shapes = {id(p): list(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
    return [
        f"no tensor of shape {shapes[key]} for {aliases[0].removeprefix(_PREFIX)}"
        for key, aliases in names.items()
        if key not in vision and shapes[key] not in [stored.get(name) for name in aliases]
    ]


def export_like(base: Path, updates: Mapping[str, Tensor | LowRank], folder: Path) -> None:
    """Copy a checkpoint folder with trained tensors in it.

    Args:
        base: folder the training began from.
        updates: whole tensors, or low-rank additions, by our parameter names.
        folder: where to write; its files are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = weight_files(base)
    for path in base.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            shutil.copyfile(path, folder / path.name)
    for name in weights:
        with safe_open(base / name, framework="pt") as file:
            tensors = {
                key: updated(file.get_tensor(key), updates.get(parameter_name(key)))
                for key in file.keys()  # noqa: SIM118
            }
            metadata = dict(file.metadata() or {})
        whole = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        save_file(whole, folder / name, metadata=metadata or None)


def load_processor(
    name: str | Path, tokenizer: str | None = None, *, tiling: bool = False, max_images: int = 1
) -> HFProcessor:
    """Tokenizer, chat template and image processor of a student.

    Args:
        name: student folder or hub id.
        tokenizer: folder or hub id of a tokenizer, if not the student's own.
        tiling: cut large pictures into tiles (SmolVLM's image splitting).
        max_images: pictures of a sample that are used.

    Raises:
        ValueError: tiling asked of a model that has none, no chat template, or another tokenizer.
    """
    folder = resolve(name, weights=False)
    config = AutoConfig.from_pretrained(folder)
    source = resolve(tokenizer, weights=False) if tokenizer else folder
    try:
        tok = AutoTokenizer.from_pretrained(source)
        image_processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"the processor of {str(folder)!r} cannot be loaded: {error}") from error
    values, _ = ProcessorMixin.get_processor_dict(folder)
    tok.chat_template = values.get("chat_template") or tok.chat_template
    family = _IMAGES[config.model_type]
    images, tokens, options = family(config, image_processor, tiling, max_images)
    _check_image_token(tok, tokens.image, config, source)
    return HFProcessor(tok, image_processor, images, tokens, options)


def _llava_images(
    config: PretrainedConfig, image_processor: Any, tiling: bool, max_images: int
) -> tuple[ImageSettings, LlavaTokens, dict[str, Any]]:
    if tiling:
        raise ValueError(
            "tiling: LLaVA-1.5 sees a picture as one tile; leave --tiling out, or use SmolVLM."
        )
    side = config.vision_config.image_size
    settings = ImageSettings(side, tokens_per_tile(config), max_side=side, max_images=max_images)
    return settings, LlavaTokens(), {}


def _idefics3_images(
    config: PretrainedConfig, image_processor: Any, tiling: bool, max_images: int
) -> tuple[Idefics3Settings, Idefics3Tokens, dict[str, Any]]:
    side = config.vision_config.image_size
    settings = Idefics3Settings(
        side,
        tokens_per_tile(config),
        max_side=image_processor.size["longest_edge"],
        tiling=tiling,
        max_images=max_images,
    )
    return settings, Idefics3Tokens(), {"do_image_splitting": tiling}


_IMAGES = {"llava": _llava_images, "idefics3": _idefics3_images, "smolvlm": _idefics3_images}


def _check_image_token(
    tokenizer: PreTrainedTokenizerBase, token: str, config: PretrainedConfig, source: Path
) -> None:
    got = tokenizer.convert_tokens_to_ids(token)
    if got != config.image_token_id:
        raise ValueError(
            f"tokenizer {str(source)!r} gives {token} id {got}, the student expects "
            f"{config.image_token_id}: it is not the tokenizer this student was trained with."
        )


def _reads(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in FAMILIES


FORMAT = StudentFormat(
    f"transformers' {', '.join(FAMILIES)} (LLaVA-1.5, SmolVLM)",
    _reads,
    load_hf_vlm,
    load_processor,
    export_like,
)
