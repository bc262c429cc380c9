"""Vision towers by their sizes, whatever transformers' configurations call them."""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

from transformers import PretrainedConfig

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
    patches = ceil(PICTURE[0] / patch) * ceil(PICTURE[1] / patch) if any_size else None
    return Tower(hidden, inter, layers, patch, patches or (side // patch) ** 2, any_size)


def picture_tokens(config: PretrainedConfig) -> int:
    """Positions in the decoder of one tile, or of one usual picture where there are no tiles."""
    tower = tower_of(config)
    if tower.any_size:
        cell = tower.patch_size * _merge(config)
        return ceil(PICTURE[0] / cell) * ceil(PICTURE[1] / cell)
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


def _merge(config: PretrainedConfig) -> int:
    """Patches a side that become one position, of towers that take pictures of any size."""
    vision = getattr(config, "vision_config", config)
    names = ("spatial_merge_size", "merge_kernel_size")
    found = [getattr(c, name, None) for name in names for c in (config, vision)]
    return next((_one(value) for value in found if value), 1)


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value
