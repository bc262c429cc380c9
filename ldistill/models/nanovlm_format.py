"""The nanoVLM checkpoint: two-way key map, strict loading, exact writing.

A folder with ``config.json`` and ``model.safetensors``, nothing else. The map is one-to-one except
that q, k and v of the vision tower are stacked on disk, and that a tied embedding is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldistill.common.images import ImageSettings
from ldistill.common.locate import resolve
from ldistill.models.lora import LowRank, updated
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.nanovlm_processor import ImageTokens, NanoVLMProcessor
from ldistill.models.processor import check_token
from ldistill.models.weights import open_weights, refuse_misfit

INV_FREQ = "decoder.rotary_embd.inv_freq"
EMBEDDING = "decoder.token_embedding.weight"
HEAD = "decoder.head.weight"

# Prefixes of keys, ours → nanoVLM's.
_PREFIXES = {
    "vision.embeddings.patch_embedding": "vision_encoder.patch_embedding.conv",
    "vision.post_layernorm": "vision_encoder.layer_norm",
    "decoder.model.embed_tokens": "decoder.token_embedding",
    "decoder.lm_head": "decoder.head",
    "decoder.model.norm": "decoder.norm",
    "projector.proj": "MP.proj",
}
# The same within a layer, and where the layers lie.
_LAYERS = {
    "vision.encoder.layers": (
        "vision_encoder.blocks",
        {"layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.out_proj": "attn.out_proj"},
    ),
    "decoder.model.layers": (
        "decoder.blocks",
        {
            "self_attn.o_proj": "attn.out_proj",
            "self_attn": "attn",
            "input_layernorm": "norm1",
            "post_attention_layernorm": "norm2",
        },
    ),
}


def to_disk_key(key: str) -> str:
    """nanoVLM's name of one of our parameters (q, k, v of the vision tower keep their own name)."""
    if key == "vision.embeddings.position_embedding.weight":
        return "vision_encoder.patch_embedding.position_embedding"
    for ours, (disk, inner) in _LAYERS.items():
        if key.startswith(ours + "."):
            layer, rest = key.removeprefix(ours + ".").split(".", 1)
            return f"{disk}.{layer}.{_renamed(rest, inner) or rest}"
    return _renamed(key, _PREFIXES)


def _renamed(key: str, prefixes: Mapping[str, str]) -> str | None:
    found = (ours for ours in prefixes if key.startswith(ours + "."))
    return next((prefixes[ours] + key.removeprefix(ours) for ours in found), None)


def to_disk(state: dict[str, Tensor], inv_freq: Tensor, tied: bool) -> dict[str, Tensor]:
    """Our state dict as nanoVLM's tensors."""
    disk: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = to_disk_key(key)
        if name.endswith("position_embedding"):
            tensor = tensor.unsqueeze(0)
        disk[name] = tensor
    for name in [n for n in disk if ".self_attn.q_proj." in n]:
        parts = [disk.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        disk[name.replace("self_attn.q_proj", "attn.qkv_proj")] = torch.cat(parts)
    disk[INV_FREQ] = inv_freq
    if tied:
        disk.pop(EMBEDDING, None)
    return disk


def from_disk(disk: dict[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    """nanoVLM's tensors under our ``keys``; q, k, v unstacked, a left-out embedding restored."""
    state: dict[str, Tensor] = {}
    for key in keys:
        name = to_disk_key(key)
        if match := re.search(r"\.self_attn\.([qkv])_proj\.", name):
            stacked = disk[name.replace(match[0], ".attn.qkv_proj.")]
            state[key] = stacked.chunk(3)["qkv".index(match[1])]
        elif name == EMBEDDING and EMBEDDING not in disk:
            state[key] = disk[HEAD]
        else:
            tensor = disk[name]
            state[key] = tensor.squeeze(0) if name.endswith("position_embedding") else tensor
    return state


def load_nanovlm(
    name: str | Path, *, partition: bool = False, dtype: torch.dtype = torch.float32
) -> NanoVLM:
    """Student from a folder or hub id, strictly.

    Args:
        name: folder, ``pkg://`` or hub id.
        partition: without effect: it is small, so every rank loads it whole and DeepSpeed
            partitions it afterwards.
        dtype: of the weights.

    Raises:
        FileNotFoundError: no such checkpoint, or no ``model.safetensors`` in it.
        ValueError: missing, unknown or misshapen tensors, all of them listed.
    """
    folder = resolve(name)
    config = NanoVLMConfig.load(folder)
    model = NanoVLM(config)
    disk = _read_tensors(folder / "model.safetensors")
    state = model.state_dict()
    expected = to_disk(state, model.decoder.model.rotary_emb.inv_freq, config.lm_tie_weights)
    _check_tensors(folder, disk, expected)
    model.load_state_dict(from_disk(disk, list(state)), strict=True)
    rotary = model.decoder.model.rotary_emb
    rotary.inv_freq = disk[INV_FREQ].float()
    rotary.original_inv_freq = rotary.inv_freq.clone()
    return model.to(dtype)


def save_nanovlm(model: NanoVLM, folder: Path) -> None:
    """Write a model as a nanoVLM checkpoint folder, in the dtypes it has."""
    tied = model.config.lm_tie_weights
    disk = to_disk(model.state_dict(), model.decoder.model.rotary_emb.inv_freq, tied)
    _write(disk, model.config, {EMBEDDING: HEAD} if tied else None, folder)


def export_like(base: Path, updates: Mapping[str, Tensor | LowRank], folder: Path) -> None:
    """Write a checkpoint with the keys, shapes, dtypes and configuration of the one it came from.

    Args:
        base: folder the training began from; gives all that was not trained, bit for bit.
        updates: whole tensors by our keys, in any dtype, or low-rank additions.
        folder: where to write.
    """
    config = NanoVLMConfig.load(base)
    path = base / "model.safetensors"
    old = _read_tensors(path)
    with torch.device("meta"):
        keys = list(NanoVLM(config).state_dict())
    state = {key: updated(t, updates.get(key)) for key, t in from_disk(old, keys).items()}
    new = to_disk(state, old[INV_FREQ], EMBEDDING not in old)
    disk = {name: new[name].to(tensor.dtype) for name, tensor in old.items()}
    with open_weights(path) as file:
        metadata = file.metadata()  # nanoVLM records the tied pair there
    _write(disk, config, metadata, folder)


def _write(
    disk: dict[str, Tensor], config: NanoVLMConfig, metadata: dict[str, str] | None, folder: Path
) -> None:
    # safetensors refuses tensors that share storage, and views of a stacked q, k, v do.
    disk = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in disk.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(disk, folder / "model.safetensors", metadata=metadata or None)
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")


def load_processor(name: str | Path, tokenizer: str | None = None, **settings) -> NanoVLMProcessor:
    """Tokenizer, chat template and image settings of a student.

    Args:
        name: student folder or hub id (its ``config.json`` is enough).
        tokenizer: folder or hub id of the tokenizer; default the configuration's ``lm_tokenizer``.
        settings: :class:`ImageSettings` fields to override (``tiling``, ``max_images``).

    Raises:
        ValueError: the tokenizer gives the image tokens other ids than the student expects.
    """
    from transformers import AutoTokenizer

    config = NanoVLMConfig.load(resolve(name, weights=False))
    source = resolve(tokenizer or config.lm_tokenizer, weights=False)
    tok = AutoTokenizer.from_pretrained(source, extra_special_tokens=dict(config.vlm_extra_tokens))
    tok.chat_template = config.lm_chat_template
    tok.pad_token = tok.eos_token
    for offset, token in enumerate(config.vlm_extra_tokens.values()):
        check_token(tok, token, config.lm_base_vocab_size + offset, source)
    return NanoVLMProcessor(tok, image_settings(config, **settings), _image_tokens(config))


def _image_tokens(config: NanoVLMConfig) -> ImageTokens:
    """Early checkpoints (nanoVLM-222M) have 17 tokens: tiles of 4 × 4, none for the whole view."""
    tokens = config.vlm_extra_tokens
    places = sum(token.startswith("<row_") for token in tokens.values())
    return ImageTokens(
        tokens["image_token"], tokens.get("global_image_token"), max_grid=math.isqrt(places)
    )


def image_settings(config: NanoVLMConfig, **changes) -> ImageSettings:
    """Image settings of a configuration: the paper's untiled single image unless changed."""
    values = {
        "tile_size": config.vit_img_size,
        "tokens_per_tile": config.mp_image_token_length,
        "max_side": config.max_img_size,
        "resize_to_max_side": config.resize_to_max_side_len,
        "tiling": False,
        "max_images": 1,
    }
    return ImageSettings(**(values | changes))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _check_tensors(folder: Path, disk: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    disk = {n: t for n, t in disk.items() if n in expected or n != EMBEDDING}
    problems = [f"missing {n}" for n in sorted(set(expected) - set(disk))]
    problems += [f"unknown {n}" for n in sorted(set(disk) - set(expected))]
    problems += [
        f"shape of {name}: {list(disk[name].shape)} in the file, "
        f"{list(expected[name].shape)} by the configuration"
        for name in sorted(set(expected) & set(disk))
        if disk[name].shape != expected[name].shape
    ]
    refuse_misfit(folder, problems)


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is nanoVLM's."""
    return "vit_hidden_dim" in config
