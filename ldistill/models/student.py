"""What the rest of the program needs of a student: vision tower, projector and decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ldistill.common.samples import Pictures


class LMHead(nn.Linear):
    """A head to be called with the operation to run on its weight.

    ``head(hidden)`` gives logits; ``head(hidden, op)`` gives ``op(hidden, weight)``. Under ZeRO-3 a
    weight is whole only while its own module is being called, and the fused loss needs the weight,
    not the logits: so the head is called with the loss as the operation, and DeepSpeed's hooks
    gather the weight before and release it after, in forward and in backward.
    """

    @classmethod
    def wrap(cls, linear: nn.Linear) -> LMHead:
        """The same head (same Parameter, same keys) made callable with an operation. Raises
        ValueError where it has a bias, which the fused loss does not know."""
        if linear.bias is not None:
            raise ValueError("language-model heads with a bias are not supported.")
        # Changing the class keeps identity: ties, ZeRO-3 partitions and hooks stay what they are.
        linear.__class__ = cls
        return linear

    def forward(self, hidden: Tensor, op: Callable[[Tensor, Tensor], Any] = F.linear) -> Any:
        return op(hidden, self.weight)


class _Float32Buffers:
    """Mixin: `module.to(dtype)` moves the buffers between devices but never changes their dtype."""

    def _apply(self, fn, recurse: bool = True):
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def keep_rotary_float32(model: nn.Module) -> None:
    """Make a model's rotary frequencies stay float32 when it is cast.

    DeepSpeed casts a whole module to bf16, buffers included; bf16 frequencies are off by up to
    0.4%, which at position 1000 is several radians.
    """
    for module in model.modules():
        rotary = any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
        if rotary and not isinstance(module, _Float32Buffers):
            cls = type(module)
            module.__class__ = type(f"Float32{cls.__name__}", (_Float32Buffers, cls), {})


class Student(nn.Module, ABC):
    """The model that trains. ``forward`` gives hidden states: the objective applies the head.

    A subclass offers, as modules or properties:

    vision:             the vision tower, with a transformers ``config``.
    projector:          from patches to embeddings; trained, also where it lies in the tower.
    backbone:           the decoder without its head (``layers``, ``norm``, ``config``).
    lm_head:            an :class:`LMHead`: call it, never read its weight (ZeRO-3 gathers on call).
    image_token_id:     id of the token that stands where an image embedding goes.
    base_vocab_size:    vocabulary of the LM it was built on; None where its format doesn't say.
    """

    vision: nn.Module
    projector: nn.Module
    backbone: PreTrainedModel
    lm_head: LMHead
    image_token_id: int
    base_vocab_size: int | None = None
    sees = ""  # positions that see what follows them: of a picture (``pictures``), of a ``prefix``
    lora_rank, lora_scale = 0, 0.0  # set by `ldistill.models.lora.add_lora`

    def vision_parameters(self) -> list[nn.Parameter]:
        """Those of the tower; towers of Qwen and GLM hold the projector, which is not meant."""
        projector = {id(p) for p in self.projector.parameters()}
        return [p for p in self.vision.parameters() if id(p) not in projector]

    @property
    def picture_token_ids(self) -> tuple[int, ...]:
        """Tokens at whose places stand pictures, or what the student alone has for them."""
        return (self.image_token_id,)

    @abstractmethod
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
        """Hidden states after the final norm, [batch, seq, hidden].

        Position ids that restart at 0 mark the documents of a packed row: transformers builds the
        block-diagonal mask from them when no attention mask is given. In training a batch of text
        runs tower and projector too, on a blank picture, and adds 0 times what they give: a rank
        that skipped them would miss ZeRO-3's collective gathers, and have no gradient to reduce.

        Args:
            input_ids: int64 [batch, seq].
            position_ids: int64 [batch, seq], of each token within its document.
            pictures: of the processor, in the order of the image tokens; None or {} without any.
            attention_mask: [batch, seq], 0 on padding, where rows hold one document each.
            rotary: int64 [axes, batch, seq], where rotary positions are not position ids.
            answers: bool [batch, seq], True from a document's first answer on; None: nowhere.
            packed: of :func:`ldistill.distill.attention.document_boundaries`.
        """

    def tiles(self, pictures: Pictures) -> int:
        """What the vision tower runs on: tiles, or patches where pictures are of any size."""
        return len(pictures["pixel_values"]) if pictures else 0

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pictures: Pictures | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """New tokens [batch, new] after left-padded prompts; options as in transformers'."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._generate(input_ids, pictures, mask, options)

    @abstractmethod
    def _generate(
        self, input_ids: Tensor, pictures: Pictures | None, mask: Tensor, options: dict[str, Any]
    ) -> Tensor: ...

    @abstractmethod
    def causal_lm(self) -> PreTrainedModel:
        """Decoder and head as transformers' ``...ForCausalLM``, sharing this student's modules."""
