"""nanoVLM student: SigLIP vision tower → pixel shuffle and one Linear → Llama decoder.

Built from transformers' own SigLIP and Llama modules, so that attention interfaces, generation and
gradient checkpointing come for free.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ldistill.common.samples import Pictures
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.student import LMHead, Student, keep_rotary_float32


class Projector(nn.Module):
    """Pixel shuffle and one Linear: s×s neighbouring patches become one image token."""

    def __init__(self, vision_size: int, hidden_size: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.proj = nn.Linear(vision_size * factor**2, hidden_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[tiles, side², vision] → [tiles, (side/s)², hidden]."""
        tiles, count, width = patches.shape
        side, s = int(count**0.5), self.factor
        x = patches.view(tiles, side // s, s, side // s, s, width)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(tiles, (side // s) ** 2, s * s * width)
        return self.proj(x)


class NanoVLM(Student):
    """nanoVLM out of transformers' modules."""

    def __init__(self, config: NanoVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = SiglipVisionModel(vision_config(config))
        self.projector = Projector(
            config.vit_hidden_dim, config.lm_hidden_dim, config.mp_pixel_shuffle_factor
        )
        self.decoder = LlamaForCausalLM(decoder_config(config))
        LMHead.wrap(self.decoder.lm_head)
        keep_rotary_float32(self.decoder)
        self.decoder.model.rotary_emb.attention_scaling = config.lm_attn_scaling
        self.image_token_id = config.image_token_id
        self.base_vocab_size = config.lm_base_vocab_size

    @property
    def backbone(self) -> LlamaModel:
        return self.decoder.model

    @property
    def lm_head(self) -> LMHead:
        return self.decoder.lm_head

    def project(self, pixel_values: Tensor) -> Tensor:
        """[tiles, 3, H, W] in [0, 1] → [tiles × tokens per tile, hidden]."""
        pixels = pixel_values.to(self.vision.embeddings.patch_embedding.weight.dtype)
        patches = self.vision(pixels).last_hidden_state  # no graph where vision is frozen
        return self.projector(patches).flatten(0, 1)

    def embed(self, input_ids: Tensor, pictures: Pictures | None = None) -> Tensor:
        """Token embeddings [batch, seq, hidden], those of pictures in their places, in order."""
        embeds = self.backbone.get_input_embeddings()(input_ids)
        if not pictures and not self.training:
            return embeds
        if not pictures:  # add 0, by way of vision tower and projector
            blank = embeds.new_ones(1, 3, self.config.vit_img_size, self.config.vit_img_size)
            seen = self.project(blank) * 0  # first: a sum of 16-bit floats may overflow
            return embeds + seen.sum().to(embeds.dtype)
        image = self.project(pictures["pixel_values"]).to(embeds.dtype)
        mask = (input_ids == self.image_token_id).unsqueeze(-1)
        return embeds.masked_scatter(mask, image)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        pictures: Pictures | None = None,
        attention_mask: Tensor | None = None,
        *,
        rotary: Tensor | None = None,
        answers: Tensor | None = None,
        **packed: Tensor | int,
    ) -> Tensor:
        output = self.backbone(
            inputs_embeds=self.embed(input_ids, pictures),
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **packed,
        )
        return output.last_hidden_state

    def _generate(
        self, input_ids: Tensor, pictures: Pictures | None, mask: Tensor, options: dict[str, Any]
    ) -> Tensor:
        given = {"inputs_embeds": self.embed(input_ids, pictures), "attention_mask": mask}
        return self.decoder.generate(**given, use_cache=True, **options)

    def causal_lm(self) -> LlamaForCausalLM:
        return self.decoder


def vision_config(config: NanoVLMConfig) -> SiglipVisionConfig:
    """transformers' configuration of the vision tower."""
    return SiglipVisionConfig(
        hidden_size=config.vit_hidden_dim,
        intermediate_size=config.vit_inter_dim,
        num_hidden_layers=config.vit_n_blocks,
        num_attention_heads=config.vit_n_heads,
        image_size=config.vit_img_size,
        patch_size=config.vit_patch_size,
        layer_norm_eps=config.vit_ln_eps,
        attention_dropout=config.vit_dropout,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )


def decoder_config(config: NanoVLMConfig) -> LlamaConfig:
    """transformers' configuration of the decoder."""
    return LlamaConfig(
        vocab_size=config.lm_vocab_size,
        hidden_size=config.lm_hidden_dim,
        intermediate_size=config.lm_inter_dim,
        num_hidden_layers=config.lm_n_blocks,
        num_attention_heads=config.lm_n_heads,
        num_key_value_heads=config.lm_n_kv_heads,
        rms_norm_eps=config.lm_rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.lm_re_base)},
        max_position_embeddings=config.lm_max_position_embeddings,
        attention_dropout=config.lm_dropout,
        tie_word_embeddings=config.lm_tie_weights,
        hidden_act="silu",
        bos_token_id=None,
        eos_token_id=None,
    )
