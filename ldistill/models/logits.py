"""From the product of state and head to logits: what some decoders do to it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from transformers import PretrainedConfig


class LogitScaling(NamedTuple):
    """Logits are ``scale`` times the product, then, with a soft cap c, c tanh(logits / c)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> LogitScaling:
        """Of a decoder's configuration: Granite divides, Cohere multiplies, Gemma 2 caps.

        VLM classes of transformers leave it out where the decoder's own class has it; training
        takes the decoder's, for that is what its weights were trained with.
        """
        divisor = getattr(config, "logits_scaling", None) or 1.0
        scale = (getattr(config, "logit_scale", None) or 1.0) / divisor
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, product: Tensor) -> Tensor:
        """Logits, in the shape and dtype of the product."""
        logits = product if self.scale == 1.0 else product * self.scale
        cap = self.softcap
        return logits if cap is None else cap * (logits / cap).tanh()
