"""Vision towers by their sizes, whatever transformers' configurations call them."""

from __future__ import annotations

from math import ceil, prod
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from ldistill.common.documents import Pictures

PICTURE = (640, 480)
"""Width and height of the picture that plans are made for, in families that take any size."""


class Tower(NamedTuple):
    """Sizes of a vision tower; ``patches`` of one tile, or of one picture where it takes any."""

    hidden_size: int
    intermediate_size: int
    layers: int
    patch_size: int
    patches: int
    any_size: bool


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
    return Tower(hidden, inter, layers, patch, patches, any_size)


def picture_tokens(config: PretrainedConfig) -> int:
    """Positions in the decoder of one tile, or of one usual picture where there are no tiles."""
    tower = tower_of(config)
    if tower.any_size:
        return prod(_cells(config, tower.patch_size))
    if fixed := getattr(config, "mm_tokens_per_image", None):
        return fixed
    if config.model_type in ("idefics3", "smolvlm"):
        return tower.patches // config.scale_factor**2
    if ratio := getattr(config, "downsample_ratio", None):
        return int(tower.patches * ratio**2)
    if factor := getattr(config, "downsample_factor", None):
        return tower.patches // factor**2
    whole = config.vision_config.model_type == "clip_vision_model"
    kept = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return tower.patches + (whole and kept)


def one_picture(config: PretrainedConfig) -> Pictures:
    """Tensors of one blank tile, or of one usual picture, as the family's processor makes them.

    Raises:
        ValueError: a family whose tensors depend on more than a size.
    """
    tower, merge = tower_of(config), _merge(config)
    rows, cols = (cells * merge for cells in _cells(config, tower.patch_size))
    if config.vision_config.model_type == "pixtral":
        size = rows * tower.patch_size, cols * tower.patch_size
        return {"pixel_values": torch.ones(1, 3, *size), "image_sizes": torch.tensor([size])}
    if config.model_type in _GRIDS:
        width = 3 * config.vision_config.temporal_patch_size * tower.patch_size**2
        grid = torch.tensor([[1, rows, cols]])
        return {"pixel_values": torch.ones(rows * cols, width), "image_grid_thw": grid}
    if tower.any_size or hasattr(config, "image_grid_pinpoints"):
        raise ValueError(
            f"benchmarks make no pictures for {config.model_type}, whose tensors depend on how it "
            "cuts each of them: measure another pair, or train a few steps on shards."
        )
    side = _one(config.vision_config.image_size)
    nested = (1,) if config.model_type in ("idefics3", "smolvlm") else ()
    return {"pixel_values": torch.ones(1, *nested, 3, side, side)}


_GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v")


def _cells(config: PretrainedConfig, patch: int) -> tuple[int, int]:
    """Rows and columns of positions that the usual picture becomes."""
    cell = patch * _merge(config)
    return ceil(PICTURE[1] / cell), ceil(PICTURE[0] / cell)


def _merge(config: PretrainedConfig) -> int:
    """Patches a side that become one position, of towers that take pictures of any size."""
    vision = getattr(config, "vision_config", config)
    names = ("spatial_merge_size", "merge_kernel_size")
    found = [getattr(c, name, None) for name in names for c in (config, vision)]
    return next((_one(value) for value in found if value), 1)


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value
