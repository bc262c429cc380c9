"""The nanoVLM checkpoint, ``config.json`` and ``model.safetensors``, and its inputs.

Keys are one-to-one except that q, k and v of the vision tower are stacked on disk, and that a tied
embedding is left out. Pictures are square tiles in [0, 1], with tokens that say which is where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ldistill.common.errors import refuse
from ldistill.common.images import ImageSettings, cut_tiles
from ldistill.common.locate import resolve
from ldistill.common.samples import Pictures, Size
from ldistill.models.lora import WeightUpdates, updated
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.processor import Processor, check_token
from ldistill.models.weights import open_weights, refuse_misfit, write_tensors

NAME, COPIED = "nanoVLM", "config.json"
INV_FREQ = "decoder.rotary_embd.inv_freq"
EMBEDDING = "decoder.token_embedding.weight"
HEAD = "decoder.head.weight"
_NAMES = {  # parts of keys, ours → nanoVLM's, replaced in this order
    "vision.embeddings.position_embedding.weight": (
        "vision_encoder.patch_embedding.position_embedding"
    ),
    "vision.embeddings.patch_embedding": "vision_encoder.patch_embedding.conv",
    "vision.encoder.layers": "vision_encoder.blocks",
    "vision.post_layernorm": "vision_encoder.layer_norm",
    ".layer_norm1": ".ln1",
    ".layer_norm2": ".ln2",
    "decoder.model.embed_tokens": "decoder.token_embedding",
    "decoder.model.layers": "decoder.blocks",
    "decoder.model.norm": "decoder.norm",
    "decoder.lm_head": "decoder.head",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn.o_proj": "attn.out_proj",
    "self_attn": "attn",
    "projector": "MP",
}


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is nanoVLM's."""
    return "vit_hidden_dim" in config


def disk_names(keys: Iterable[str]) -> dict[str, list[str]]:
    """nanoVLM's name of each tensor on disk, and the keys of ours that it holds, in order."""
    names: dict[str, list[str]] = {}
    for key in keys:
        name, parts = key, [key]
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        if key.startswith("vision.") and (found := re.search(r"\.[qkv]_proj\.", key)):
            name = name.replace(found[0], ".qkv_proj.")
            parts = [key.replace(found[0], f".{part}_proj.") for part in "qkv"]
        names[name] = parts
    return names


def to_disk(model: NanoVLM) -> dict[str, Tensor]:
    """A model's tensors as nanoVLM stores them."""
    state = model.state_dict()
    disk = {name: torch.cat([state[k] for k in keys]) for name, keys in disk_names(state).items()}
    disk |= {n: t.unsqueeze(0) for n, t in disk.items() if n.endswith("position_embedding")}
    if model.config.lm_tie_weights:
        del disk[EMBEDDING]
    return disk | {INV_FREQ: model.decoder.model.rotary_emb.inv_freq}


def load_student(folder: Path, *, partition: bool, dtype: torch.dtype) -> NanoVLM:
    """As :func:`ldistill.models.formats.load_student`; ``partition`` is without effect: every rank
    loads it whole, as it is small, and DeepSpeed partitions it afterwards."""
    model = NanoVLM(NanoVLMConfig.load(folder))
    with open_weights(folder / "model.safetensors") as file:
        disk = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = to_disk(model)
    problems = [f"missing {name}" for name in sorted(expected.keys() - disk.keys())]
    problems += [f"unknown {n}" for n in sorted(disk.keys() - expected.keys() - {EMBEDDING})]
    problems += [
        f"shape of {name}: {list(disk[name].shape)} in the file, "
        f"{list(expected[name].shape)} by the configuration"
        for name in sorted(expected.keys() & disk.keys())
        if disk[name].shape != expected[name].shape
    ]
    refuse_misfit(folder, problems)
    disk.setdefault(EMBEDDING, disk[HEAD])
    state, rotary = model.state_dict(), model.decoder.model.rotary_emb
    for name, keys in disk_names(state).items():
        for key, part in zip(keys, disk[name].chunk(len(keys)), strict=True):
            state[key] = part.view_as(state[key])
    model.load_state_dict(state)
    rotary.inv_freq = disk[INV_FREQ].float()
    rotary.original_inv_freq = rotary.inv_freq.clone()
    return model.to(dtype)


def save_nanovlm(model: NanoVLM, folder: Path) -> None:
    """Write a model as a nanoVLM checkpoint folder, in the dtypes it has."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = {EMBEDDING: HEAD} if model.config.lm_tie_weights else None
    write_tensors(folder / "model.safetensors", to_disk(model), tied)
    (folder / "config.json").write_text(model.config.to_json(), encoding="utf-8")


class Revision:
    """What training made of each tensor of a folder, see `formats.export_like`."""

    def __init__(self, base: Path, updates: WeightUpdates) -> None:
        self._updates = updates
        with torch.device("meta"):
            self._names = disk_names(NanoVLM(NanoVLMConfig.load(base)).state_dict())

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        keys = self._names.get(name)
        if keys is None:  # rotary frequencies
            return tensor
        parts = zip(keys, tensor.chunk(len(keys)), strict=True)
        return torch.cat([updated(part, self._updates.get(k)).view_as(part) for k, part in parts])


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

    def picture(self, grid: Grid, per_tile: int) -> str:
        """The text of one picture: its whole view, then its tiles row by row."""
        patches, places = self.image * per_tile, list(np.ndindex(grid))
        tiles = [self.tile.format(row=row + 1, col=col + 1) for row, col in places]
        seen = [self.whole or "", *(tiles if len(tiles) > 1 else ())]
        return "".join(opening + patches for opening in seen)


class NanoVLMProcessor(Processor):
    """Tokenizer, chat template and image settings of a nanoVLM. Raises ValueError as
    :class:`Processor` does, or where the tokenizer lacks image tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageSettings | None = None,
        tokens: ImageTokens | None = None,
    ) -> None:
        images, self.tokens = images or ImageSettings(), tokens or ImageTokens()
        vocabulary = tokenizer.get_vocab().keys()
        super().__init__(tokenizer, images, self.tokens.image, vocabulary & set(self.tokens.all()))
        grid, most = images.max_side // images.tile_size, self.tokens.max_grid
        needed = None if images.tiling else 1 + bool(self.tokens.whole)
        missing = [token for token in self.tokens.all()[:needed] if token not in vocabulary]
        cases = {
            f"max_side {images.max_side} gives up to {grid} x {grid} tiles, but tile tokens "
            f"exist for {most} x {most}: lower max_side": images.tiling and grid > most,
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

    def _content(self, pieces: Sequence[str | int], shown: Sequence[str]) -> str:
        return "".join(piece if isinstance(piece, str) else shown[piece] for piece in pieces)

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """``pixel_values``: float32 [tiles, 3, S, S] in [0, 1]."""
        tiles = [cut_tiles(image, self.images)[0] for image in images]
        return {"pixel_values": torch.cat(tiles)} if tiles else {}

    def _picture_parts(self) -> dict[str, object]:
        # max_images only selects samples: no ids change.
        images = {k: v for k, v in asdict(self.images).items() if k != "max_images"}
        return {"image tokens": asdict(self.tokens), "image settings": images}


def load_processor(folder: Path, tokenizer: str | None, **settings: Any) -> NanoVLMProcessor:
    """As :func:`ldistill.models.formats.load_processor`; the tokenizer is the configuration's
    ``lm_tokenizer`` unless another is given, ``settings`` are fields of :class:`ImageSettings`."""
    config = NanoVLMConfig.load(folder)
    source = resolve(tokenizer or config.lm_tokenizer, weights=False)
    extra = config.vlm_extra_tokens
    tok = AutoTokenizer.from_pretrained(source, extra_special_tokens=dict(extra))
    tok.chat_template = config.lm_chat_template
    tok.pad_token = tok.eos_token
    for offset, token in enumerate(extra.values()):
        check_token(tok, token, config.lm_base_vocab_size + offset, source)
    values = {
        "tile_size": config.vit_img_size,
        "tokens_per_tile": config.mp_image_token_length,
        "max_side": config.max_img_size,
        "resize_to_max_side": config.resize_to_max_side_len,
        "tiling": False,  # the paper's untiled single image
        "max_images": 1,
    }
    # Early checkpoints (nanoVLM-222M) have tiles of 4 × 4, and no token for the whole view.
    most = math.isqrt(sum(token.startswith("<row_") for token in extra.values()))
    tokens = ImageTokens(extra["image_token"], extra.get("global_image_token"), max_grid=most)
    return NanoVLMProcessor(tok, ImageSettings(**(values | settings)), tokens)
