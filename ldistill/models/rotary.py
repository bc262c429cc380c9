"""Rotary frequencies that stay float32 when a model is cast.

DeepSpeed casts the whole module to bf16, buffers included; bf16 frequencies are off by up to 0.4%,
which at position 1000 is several radians.
"""

from __future__ import annotations

from torch import nn


class _Float32Buffers:
    """Mixin: `module.to(dtype)` moves the buffers between devices but never changes their dtype."""

    def _apply(self, fn, recurse: bool = True):
        kept = dict(self.named_buffers(recurse=False))  # type: ignore[attr-defined]
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def keep_float32(rotary: nn.Module) -> nn.Module:
    """The same rotary embedding, of whatever class, with buffers that no cast rounds."""
    if not isinstance(rotary, _Float32Buffers):
        cls = type(rotary)
        rotary.__class__ = type(f"Float32{cls.__name__}", (_Float32Buffers, cls), {})
    return rotary
