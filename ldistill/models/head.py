"""A language-model head that can be called with the operation to run on its weight.

Under ZeRO-3 a weight is whole only while its own module is being called. The fused loss needs the
weight, not the logits; so the head is called with the loss as the operation, and DeepSpeed's hooks
gather the weight before and release it after, in forward and in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class LMHead(nn.Linear):
    """``head(hidden)`` gives logits; ``head(hidden, op)`` gives ``op(hidden, weight)``."""

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
