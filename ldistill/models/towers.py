"""Vision towers by their sizes, whatever transformers' configurations call them."""

from __future__ import annotations

from math import ceil, prod
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from ldistill.common.samples import Pictures
from ldistill.models.hf_vlm import bare_model, cut_tiles

PICTURE = (640, 480)
"""Width and height of the picture that plans are made for, in families that take any size."""
_SIZES = torch.tensor([PICTURE[::-1]])


class Tower(NamedTuple):
    """Sizes of a vision tower; ``patches`` of one tile, or of one picture where it takes any size;
    ``tiles`` of the usual picture, in families that always cut it."""

    hidden_size: int
    intermediate_size: int
    layers: int
    patch_size: int
    patches: int
    any_size: bool
    tiles: int = 1


def tower_of(config: PretrainedConfig) -> Tower:
    """Of a whole student's configuration, or of its tower's."""
    vision = getattr(config, "vision_config", config)
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    inter = getattr(vision, "intermediate_size", None) or int(hidden * vision.mlp_ratio)
    layers = getattr(vision, "num_hidden_layers", None) or vision.depth
    patch, side = (_one(getattr(vision, n, None)) for n in ("patch_size", "image_size"))
    any_size = _merge(config) > 1 or side is None or vision.model_type == "pixtral"
    rows, cols = _cells(config, patch) if any_size else (1, 1)
    patches = rows * cols * _merge(config) ** 2 if any_size else (side // patch) ** 2
    tiles = cut_tiles(config, {"image_sizes": _SIZES})[0] if _always_cut(config) else 1
    return Tower(hidden, inter, layers, patch, patches, any_size, tiles)


def picture_tokens(config: PretrainedConfig) -> int:
    """Positions in the decoder of one tile; of the usual picture in families without tiles, or that
    always cut."""
    tower = tower_of(config)
    if _always_cut(config):  # what the model's own code makes of the usual picture's tiles
        tiles, how = torch.zeros(tower.tiles, tower.patches, 1), {"image_newline": torch.zeros(1)}
        if config.model_type == "llava_next":
            how["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        return len(bare_model(config).pack_image_features([tiles], _SIZES, **how)[0][0])
    if tower.any_size:
        return prod(_cells(config, tower.patch_size))
    if fixed := getattr(config, "mm_tokens_per_image", None):
        return fixed
    if ratio := getattr(config, "downsample_ratio", None):
        return int(tower.patches * ratio**2)
    for name in ("scale_factor", "downsample_factor"):
        if hasattr(config, name):
            return tower.patches // getattr(config, name) ** 2
    whole = config.vision_config.model_type == "clip_vision_model"
    kept = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return tower.patches + (whole and kept)


def one_picture(config: PretrainedConfig) -> Pictures:
    """Tensors of one blank tile, or of one usual picture, as the family's processor makes them."""
    tower, kind, vision = tower_of(config), config.model_type, config.vision_config
    patch, merge = tower.patch_size, _merge(config)
    rows, cols = (cells * merge for cells in _cells(config, patch))
    if vision.model_type == "pixtral":
        size = rows * patch, cols * patch
        return {"pixel_values": torch.ones(1, 3, *size), "image_sizes": torch.tensor([size])}
    if tower.any_size:
        width = 3 * getattr(vision, "temporal_patch_size", 1) * patch**2
        each = (3, patch, patch) if kind == "kimi_k25" else (width,)
        pixels, grid = torch.ones(rows * cols, *each), torch.tensor([[1, rows, cols]])
        merged = {"image_merge_sizes": torch.tensor([merge])} if kind == "video_llama_3" else {}
        return {"pixel_values": pixels, "image_grid_thw": grid, **merged}
    side = _one(vision.image_size)
    if _always_cut(config):
        alone = {"batch_num_images": torch.tensor([1])} if kind == "llava_onevision" else {}
        pixels = torch.ones(1, tower.tiles, 3, side, side)
        return {"pixel_values": pixels, "image_sizes": _SIZES, **alone}
    if kind in ("idefics3", "smolvlm"):
        mask = torch.ones(1, 1, side, side, dtype=torch.int64)
        return {"pixel_values": torch.ones(1, 1, 3, side, side), "pixel_attention_mask": mask}
    return {"pixel_values": torch.ones(1, 3, side, side)}


def _always_cut(config: PretrainedConfig) -> bool:
    return hasattr(config, "image_grid_pinpoints")


def _cells(config: PretrainedConfig, patch: int) -> tuple[int, int]:
    """Rows and columns of positions that the usual picture becomes."""
    cell = patch * _merge(config)
    return ceil(PICTURE[1] / cell), ceil(PICTURE[0] / cell)


def _merge(config: PretrainedConfig) -> int:
    """Patches a side that become one position, of towers that take pictures of any size."""
    vision = getattr(config, "vision_config", config)
    names = ("spatial_merge_size", "merge_kernel_size")
    found = (getattr(c, name, None) for name in names for c in (config, vision))
    return _one(next(filter(None, found), 1))


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value
