"""The nanoVLM checkpoint: two-way key map, strict loading, exact writing.

A folder with ``config.json`` and ``model.safetensors``, nothing else. The map is one-to-one except
that q, k and v of the vision tower are stacked on disk, and that a tied embedding is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldistill.common.locate import resolve
from ldistill.models.formats import StudentFormat
from ldistill.models.lora import LowRank, updated
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.processor import ImageSettings, Processor
from ldistill.models.weights import open_weights, refuse_misfit

INV_FREQ = "decoder.rotary_embd.inv_freq"
EMBEDDING = "decoder.token_embedding.weight"
HEAD = "decoder.head.weight"

# (nanoVLM, transformers) as regular expressions over whole keys; \1 is the layer, \2 the rest.
_RULES: tuple[tuple[str, str], ...] = (
    ("vision_encoder.patch_embedding.conv", "vision.embeddings.patch_embedding"),
    ("vision_encoder.layer_norm", "vision.post_layernorm"),
    ("decoder.token_embedding", "decoder.model.embed_tokens"),
    ("decoder.head", "decoder.lm_head"),
    ("decoder.norm", "decoder.model.norm"),
    ("MP.proj", "projector.proj"),
)
_VISION = ("vision_encoder.blocks", "vision.encoder.layers")
_DECODER = ("decoder.blocks", "decoder.model.layers")
_IN_VISION = (
    ("ln1", "layer_norm1"),
    ("ln2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
)
_IN_DECODER = (
    ("attn.out_proj", "self_attn.o_proj"),
    ("attn", "self_attn"),
    ("norm1", "input_layernorm"),
    ("norm2", "post_attention_layernorm"),
)


def to_disk_key(key: str) -> str:
    """nanoVLM's name of one of our parameters (q, k, v of the vision tower keep their own name)."""
    if key == "vision.embeddings.position_embedding.weight":
        return "vision_encoder.patch_embedding.position_embedding"
    for disk, ours in _RULES:
        if key.startswith(ours + "."):
            return disk + key.removeprefix(ours)
    for (disk, ours), inner in ((_VISION, _IN_VISION), (_DECODER, _IN_DECODER)):
        if match := re.fullmatch(rf"{re.escape(ours)}\.(\d+)\.(.+)", key):
            layer, rest = match.groups()
            for disk_part, our_part in inner:
                if rest.startswith(our_part + "."):
                    rest = disk_part + rest.removeprefix(our_part)
                    break
            return f"{disk}.{layer}.{rest}"
    raise ValueError(f"no nanoVLM name for {key!r}.")


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
    _write(disk, config, read_metadata(path), folder)


def _write(
    disk: dict[str, Tensor], config: NanoVLMConfig, metadata: dict[str, str] | None, folder: Path
) -> None:
    # safetensors refuses tensors that share storage, and views of a stacked q, k, v do.
    disk = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in disk.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(disk, folder / "model.safetensors", metadata=metadata or None)
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")


def load_processor(name: str | Path, tokenizer: str | None = None, **settings) -> Processor:
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
    for offset, (key, token) in enumerate(config.vlm_extra_tokens.items()):
        want, got = config.lm_base_vocab_size + offset, tok.convert_tokens_to_ids(token)
        if want != got:
            raise ValueError(
                f"tokenizer {str(source)!r} gives {token} ({key}) id {got}, the student expects "
                f"{want}: it is not the tokenizer this student was trained with."
            )
    return Processor(tok, image_settings(config, **settings))


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
    problems += list(_shape_problems(disk, expected))
    refuse_misfit(folder, problems)


def _shape_problems(disk: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[str]:
    for name in sorted(set(expected) & set(disk)):
        if disk[name].shape != expected[name].shape:
            want, got = list(expected[name].shape), list(disk[name].shape)
            yield f"shape of {name}: {got} in the file, {want} by the configuration"


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file (nanoVLM records the tied pair there)."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _reads(config: Mapping[str, Any]) -> bool:
    return "vit_hidden_dim" in config


FORMAT = StudentFormat("nanoVLM", _reads, load_nanovlm, load_processor, export_like)
