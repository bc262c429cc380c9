"""The nanoVLM checkpoint: two-way key map, strict loading, exact writing; and its inputs.

A folder with ``config.json`` and ``model.safetensors``, nothing else. The map is one-to-one except
that q, k and v of the vision tower are stacked on disk, and that a tied embedding is left out. Its
pictures are square tiles in [0, 1], with tokens that say which tile is where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ldistill.common.errors import refuse
from ldistill.common.images import ImageSettings, cut_tiles
from ldistill.common.locate import resolve
from ldistill.common.samples import Pictures, Size, Turn
from ldistill.models.lora import LowRank, updated
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.processor import Processor, check_token
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
        {"self_attn.o_proj": "attn.out_proj", "self_attn": "attn", "input_layernorm": "norm1"}
        | {"post_attention_layernorm": "norm2"},
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
    """As :func:`ldistill.models.formats.load_student`; ``partition`` is without effect: every rank
    loads it whole, as it is small, and DeepSpeed partitions it afterwards."""
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
    """As :func:`ldistill.models.formats.export_like`."""
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


# ---- inputs ----

Grid = tuple[int, int]  # rows and columns of a picture's tiles


@dataclass(frozen=True)
class ImageTokens:
    """The special tokens that stand for pictures."""

    image: str = "<|image|>"  # replaced by one embedding of the projector each
    whole: str | None = "<|global_image|>"  # opens the whole view of a picture
    tile: str = "<row_{row}_col_{col}>"  # opens one tile; rows and columns count from 1
    max_grid: int = 8  # rows and columns for which tile tokens exist

    def all(self) -> list[str]:
        """Every token, in the order of nanoVLM's vocabulary."""
        places = range(1, self.max_grid + 1)
        tiles = [self.tile.format(row=row, col=col) for row in places for col in places]
        return [self.image, *([self.whole] if self.whole else []), *tiles]

    def needed(self, tiling: bool) -> list[str]:
        """Those the tokenizer must have."""
        return self.all() if tiling else self.all()[: 1 + bool(self.whole)]

    def picture(self, grid: Grid, per_tile: int) -> str:
        """The text of one picture: its whole view, then its tiles row by row."""
        patches, places = self.image * per_tile, list(np.ndindex(grid))
        tiles = [self.tile.format(row=row + 1, col=col + 1) for row, col in places]
        seen = [self.whole or "", *(tiles if len(tiles) > 1 else ())]
        return "".join(opening + patches for opening in seen)


class NanoVLMProcessor(Processor):
    """Tokenizer, chat template and image settings of a nanoVLM.

    Raises:
        ValueError: as :class:`Processor`, or the tokenizer lacks image tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageSettings | None = None,
        tokens: ImageTokens | None = None,
    ) -> None:
        images, self.tokens = images or ImageSettings(), tokens or ImageTokens()
        vocabulary = tokenizer.get_vocab()
        literals = [token for token in self.tokens.all() if token in vocabulary]
        super().__init__(tokenizer, images, self.tokens.image, literals)
        self._check_tokens(vocabulary)

    def _check_tokens(self, vocabulary: Mapping[str, int]) -> None:
        grid, most = self.images.max_side // self.images.tile_size, self.tokens.max_grid
        needed = self.tokens.needed(self.images.tiling)
        missing = [token for token in needed if token not in vocabulary]
        cases = {
            f"max_side {self.images.max_side} gives up to {grid} x {grid} tiles, but tile tokens "
            f"exist for {most} x {most}: lower max_side": self.images.tiling and grid > most,
            f"the tokenizer lacks the image tokens {missing[:4]} ({len(missing)} in all): add "
            "them with extra_special_tokens": missing,
        }
        refuse(cases)

    def picture_texts(self, sizes: Sequence[Size]) -> list[str]:
        """Numbered where there are several, as nanoVLM does it."""
        per_tile = self.images.tokens_per_tile
        texts = [self.tokens.picture(self.images.grid(*size), per_tile) for size in sizes]
        if len(texts) < 2:
            return texts
        return [f"<image: {number}>{text}" for number, text in enumerate(texts)]

    def _messages(
        self, turns: Sequence[Turn], shown: Sequence[str], system: str = ""
    ) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": self.plain(system)}] if system else []
        for turn, pieces in zip(turns, self._pieces(turns, len(shown)), strict=True):
            asked = "".join(piece if isinstance(piece, str) else shown[piece] for piece in pieces)
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": self.plain(turn.assistant)})
        return messages

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """``pixel_values``: float32 [tiles, 3, S, S] in [0, 1]."""
        tiles = [cut_tiles(image, self.images)[0] for image in images]
        return {"pixel_values": torch.cat(tiles)} if tiles else {}

    def _picture_parts(self) -> dict[str, object]:
        # max_images only selects samples: no ids change.
        images = {k: v for k, v in asdict(self.images).items() if k != "max_images"}
        return {"image tokens": asdict(self.tokens), "image settings": images}


def load_processor(name: str | Path, tokenizer: str | None = None, **settings) -> NanoVLMProcessor:
    """As :func:`ldistill.models.formats.load_processor`; the tokenizer is the configuration's
    ``lm_tokenizer`` unless another is given, ``settings`` are fields of :class:`ImageSettings`."""
    config = NanoVLMConfig.load(resolve(name, weights=False))
    source = resolve(tokenizer or config.lm_tokenizer, weights=False)
    tok = AutoTokenizer.from_pretrained(source, extra_special_tokens=dict(config.vlm_extra_tokens))
    tok.chat_template = config.lm_chat_template
    tok.pad_token = tok.eos_token
    for offset, token in enumerate(config.vlm_extra_tokens.values()):
        check_token(tok, token, config.lm_base_vocab_size + offset, source)
    values = {
        "tile_size": config.vit_img_size,
        "tokens_per_tile": config.mp_image_token_length,
        "max_side": config.max_img_size,
        "resize_to_max_side": config.resize_to_max_side_len,
        "tiling": False,  # the paper's untiled single image
        "max_images": 1,
    }
    return NanoVLMProcessor(tok, ImageSettings(**(values | settings)), _image_tokens(config))


def _image_tokens(config: NanoVLMConfig) -> ImageTokens:
    """Early checkpoints (nanoVLM-222M) have 17 tokens: tiles of 4 × 4, none for the whole view."""
    tokens = config.vlm_extra_tokens
    places = sum(token.startswith("<row_") for token in tokens.values())
    return ImageTokens(
        tokens["image_token"], tokens.get("global_image_token"), max_grid=math.isqrt(places)
    )
