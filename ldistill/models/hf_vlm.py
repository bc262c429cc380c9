"""LLaVA and SmolVLM students: transformers' own classes, whole, with this program's entrances.

    LLaVA-1.5   CLIP → two linear layers → Llama (Vicuna), or SigLIP, Mistral, Qwen2 in their place
    SmolVLM     SigLIP → pixel shuffle and one linear layer → Llama (SmolLM2); Idefics3's classes

The model is kept as transformers built it, under ``vlm``; the parts it is made of are properties.
`hf_vlm_format` reads and writes the checkpoint, `hf_vlm_processor` makes its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ldistill.common.partition import partitioned_by
from ldistill.models.head import LMHead
from ldistill.models.rotary import keep_float32
from ldistill.models.student import Student


@dataclass(frozen=True)
class Family:
    """Where one of transformers' VLM classes keeps its parts (attributes of ``vlm.model``).

    image_dims: leading dimensions of the pixel values that its ``get_image_features`` takes.
    """

    vision: str
    projector: str
    backbone: str
    image_dims: int


_IDEFICS3 = Family("vision_model", "connector", "text_model", 2)
FAMILIES = {
    "llava": Family("vision_tower", "multi_modal_projector", "language_model", 1),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
}


class HFVLM(Student):
    """A student around one of transformers' ``...ForConditionalGeneration``."""

    def __init__(self, vlm: PreTrainedModel) -> None:
        super().__init__()
        self.vlm = vlm
        self.family = FAMILIES[vlm.config.model_type]
        self.vlm.lm_head = LMHead.wrap(vlm.lm_head)
        keep_float32(self.backbone.rotary_emb)
        self.image_token_id = vlm.config.image_token_id
        self.tokens_per_tile = tokens_per_tile(vlm.config)
        self.tile_size = vlm.config.vision_config.image_size
        self.base_vocab_size = None  # the configuration doesn't keep it

    @property
    def config(self) -> PretrainedConfig:
        """transformers' configuration of the whole model."""
        return self.vlm.config

    @property
    def vision(self) -> nn.Module:
        """The vision tower."""
        return getattr(self.vlm.model, self.family.vision)

    @property
    def projector(self) -> nn.Module:
        """From patches to embeddings."""
        return getattr(self.vlm.model, self.family.projector)

    @property
    def backbone(self) -> PreTrainedModel:
        """The decoder without its head."""
        return getattr(self.vlm.model, self.family.backbone)

    @property
    def lm_head(self) -> LMHead:
        """Head of the decoder."""
        return self.vlm.lm_head

    def project(self, pixel_values: Tensor) -> Tensor:
        """[tiles, 3, S, S], normalised → [tiles × tokens per tile, hidden], by transformers."""
        pixels = pixel_values.to(self.backbone.dtype)
        if self.family.image_dims == 2:  # Idefics3 counts samples and their images
            pixels = pixels[None]
        features = self.vlm.model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        return torch.cat(list(features)).flatten(0, -2)

    def causal_lm(self) -> PreTrainedModel:
        """A ``...ForCausalLM`` of the decoder's kind around this student's decoder and head."""
        with torch.device("meta"), partitioned_by(None):
            shell = AutoModelForCausalLM.from_config(self.backbone.config)
        shell.model, shell.lm_head = self.backbone, self.lm_head
        return shell.train(self.training)


def tokens_per_tile(config: PretrainedConfig) -> int:
    """Image tokens that the projector makes of one tile."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    if config.model_type != "llava":
        return patches // config.scale_factor**2
    class_token = vision.model_type == "clip_vision_model"
    return patches + class_token - (config.vision_feature_select_strategy == "default")
