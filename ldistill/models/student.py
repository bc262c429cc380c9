"""What the rest of the program needs of a student, whatever its family.

A student is a vision tower, a projector and a decoder. Subclasses say where these lie and how
pictures become embeddings; packed rows, text-only batches and decoding are the same for all of
them. Which checkpoints exist, and how each is read and written, is `formats`' business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class LMHead(nn.Linear):
    """A head to be called with the operation to run on its weight.

    ``head(hidden)`` gives logits; ``head(hidden, op)`` gives ``op(hidden, weight)``. Under ZeRO-3 a
    weight is whole only while its own module is being called, and the fused loss needs the weight,
    not the logits: so the head is called with the loss as the operation, and DeepSpeed's hooks
    gather the weight before and release it after, in forward and in backward.
    """

    @classmethod
    def wrap(cls, linear: nn.Linear) -> LMHead:
        """The same head (same Parameter, same keys) made callable with an operation.

        Raises:
            ValueError: the head has a bias, which the fused loss does not know.
        """
        if linear.bias is not None:
            raise ValueError("language-model heads with a bias are not supported.")
        # Changing the class keeps identity: ties, ZeRO-3 partitions and hooks stay what they are.
        linear.__class__ = cls
        return linear  # type: ignore[return-value]

    def forward(self, hidden: Tensor, op: Callable[[Tensor, Tensor], Any] = F.linear) -> Any:
        return op(hidden, self.weight)


class _Float32Buffers:
    """Mixin: `module.to(dtype)` moves the buffers between devices but never changes their dtype."""

    def _apply(self, fn, recurse: bool = True):
        kept = dict(self.named_buffers(recurse=False))  # type: ignore[attr-defined]
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def keep_rotary_float32(model: nn.Module) -> None:
    """Make a model's rotary frequencies stay float32 when it is cast.

    DeepSpeed casts a whole module to bf16, buffers included; bf16 frequencies are off by up to
    0.4%, which at position 1000 is several radians.
    """
    for module in model.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        rotary = any(name.endswith("inv_freq") for name in names)
        if rotary and not isinstance(module, _Float32Buffers):
            cls = type(module)
            module.__class__ = type(f"Float32{cls.__name__}", (_Float32Buffers, cls), {})


class Student(nn.Module):
    """The model that trains. ``forward`` gives hidden states: the objective applies the head.

    A subclass offers, as modules or properties:

    vision:             the vision tower, with a transformers ``config``.
    projector:          from patches to embeddings.
    backbone:           the decoder without its head (``layers``, ``norm``, ``config``).
    lm_head:            an :class:`LMHead`: call it, never read its weight (ZeRO-3 gathers on call).
    image_token_id:     id of the token that stands where an image embedding goes.
    tokens_per_tile:    image tokens that one tile takes.
    tile_size:          pixels of a tile's side.
    base_vocab_size:    vocabulary of the LM it was built on; None where its format doesn't say.
    """

    vision: nn.Module
    projector: nn.Module
    backbone: PreTrainedModel
    lm_head: LMHead
    image_token_id: int
    tokens_per_tile: int
    tile_size: int
    base_vocab_size: int | None
    lora_scale: float | None = None  # set by `ldistill.models.lora.add_lora`

    def project(self, pixel_values: Tensor) -> Tensor:
        """[tiles, 3, S, S] → [tiles × tokens per tile, hidden]."""

    def causal_lm(self) -> PreTrainedModel:
        """Decoder and head as transformers' ``...ForCausalLM``, sharing this student's modules."""

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Token embeddings with the image tokens' places filled by the projector, in order.

        Args:
            input_ids: int64 [batch, seq].
            pixel_values: [tiles, 3, S, S], or None or no tiles for text alone.

        Returns:
            [batch, seq, hidden].
        """
        embeds = self.backbone.get_input_embeddings()(input_ids)
        if pixel_values is None or pixel_values.shape[0] == 0:
            return embeds + self._unused_image(embeds) if self.training else embeds
        image = self.project(pixel_values).to(embeds.dtype)
        mask = (input_ids == self.image_token_id).unsqueeze(-1)
        return embeds.masked_scatter(mask, image)

    def _unused_image(self, like: Tensor) -> Tensor:
        """0, by way of vision tower and projector: every rank must run the same modules.

        A rank whose batch is text alone would otherwise skip ZeRO-3's collective gathers, and its
        projector would have no gradient to reduce. Ones, for Idefics3 takes zeros for padding.
        """
        size = self.tile_size
        blank = torch.ones(1, 3, size, size, dtype=like.dtype, device=like.device)
        return (self.project(blank) * 0).sum().to(like.dtype)  # a sum of 16-bit floats may overflow

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **attention: Tensor | int,
    ) -> Tensor:
        """Hidden states after the final norm, [batch, seq, hidden].

        Position ids that restart at 0 mark the documents of a packed row: transformers builds the
        block-diagonal mask from them when no attention mask is given.
        """
        output = self.backbone(
            inputs_embeds=self.embed(input_ids, pixel_values),
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **attention,
        )
        return output.last_hidden_state

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options,
    ) -> Tensor:
        """New tokens [batch, new] after left-padded prompts; options as in ``generate``."""
        embeds = self.embed(input_ids, pixel_values)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.causal_lm().generate(
            inputs_embeds=embeds, attention_mask=attention_mask, use_cache=True, **options
        )
