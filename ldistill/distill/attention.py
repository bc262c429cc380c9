"""The student's keys and values, layer by layer, as views: what the teacher reads.

transformers lets an attention function be registered by name. Ours notes the rotated keys and the
values on their way into the real one and changes nothing, so the memory shares storage with what
the student's attention read: no copy, no repeated heads (the paper's section 3.1).

A slot per attention module, not a list by layer index, keeps `torch.compile` from specialising the
decoder block on its index: one graph serves all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

PREFIX = "ldistill_"
BACKENDS = ("auto", "sdpa", "flash_attention_2", "flex_attention", "eager")


class KVSlot:
    """Where one attention module leaves its keys and values."""

    __slots__ = ("active", "key", "value")

    def __init__(self) -> None:
        self.active = False
        self.key: Tensor | None = None
        self.value: Tensor | None = None


@dataclass
class KVMemory:
    """Keys and values of one student forward.

    ``keys[l]``, ``values[l]``: [batch, kv_heads, seq, head_dim] in the student's dtype, keys
    rotated; views of what the student's attention of layer l read.
    """

    keys: list[Tensor]
    values: list[Tensor]

    def detach(self) -> KVMemory:
        """The same storage outside the student's graph (``kv_grad: detached``)."""
        return KVMemory([k.detach() for k in self.keys], [v.detach() for v in self.values])


def _flash_attention_2(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """flash-attn through transformers, called by its real name (ours would not be found)."""
    output = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scaling,
        attn_implementation="flash_attention_2",
        **kwargs,
    )
    return output, None


def shared_sdpa_mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> Tensor | None:
    """SDPA's mask in the dtype it adds to scores.

    Given a boolean one, SDPA widens it anew in every layer, and autograd keeps every copy until
    backward; this one tensor serves all layers.
    """
    visible = sdpa_mask(*args, **kwargs)
    if visible is None:
        return None
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _recording(attend: Callable) -> Callable:
    def attention(module, query, key, value, attention_mask, **kwargs):
        # Under autocast the projections give 16-bit tensors and RoPE's float32 tables widen two of
        # them; attention would narrow them again, unseen. Done here, the memory has one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        slot = getattr(module, "kv_slot", None)
        if slot is not None and slot.active:
            slot.key, slot.value = key, value
        return attend(module, query, key, value, attention_mask, **kwargs)

    return attention


_ATTENTIONS = {
    "sdpa": (sdpa_attention_forward, shared_sdpa_mask),
    "eager": (eager_attention_forward, eager_mask),
    "flash_attention_2": (_flash_attention_2, flash_attention_mask),
    "flex_attention": (flex_attention_forward, flex_attention_mask),
}


def choose_attention(asked: str) -> str:
    """``auto`` is flash-attn's variable-length kernel where it is installed, else ``sdpa``.

    flash-attn computes in bf16 or fp16 alone. ``flex_attention`` compiles at the first step, and
    whether it pays is for `ldistill bench step --attention auto` to measure, which tries them all.
    """
    if asked != "auto":
        return asked
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def attach(decoder: PreTrainedModel, backend: str = "sdpa") -> list[KVSlot]:
    """Make a transformers decoder leave its keys and values in slots, one per layer.

    Args:
        decoder: of the Llama kind (``layers[l].self_attn``), with or without its head.
        backend: ``sdpa``, ``flash_attention_2`` (needs flash-attn), ``flex_attention`` (compiled
            at first use), ``eager``, or ``auto`` for :func:`choose_attention`.

    Raises:
        ValueError: unknown backend, or flash-attn asked for and not installed.
    """
    backend = choose_attention(backend)
    if backend not in _ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "flash_attention_2":
        _require_flash_attn()
    name = PREFIX + backend
    attend, mask = _ATTENTIONS[backend]
    ALL_ATTENTION_FUNCTIONS.register(name, _recording(attend))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    backbone = decoder.base_model
    backbone.config._attn_implementation = name
    slots = []
    for layer in backbone.layers:
        slot = KVSlot()
        layer.self_attn.kv_slot = slot
        slots.append(slot)
    return slots


def _require_flash_attn() -> None:
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise ValueError(
            "attention is flash_attention_2, but flash-attn is not installed or there is no GPU: "
            "pip install flash-attn --no-build-isolation, or leave --attention at sdpa."
        )


@contextmanager
def recording(slots: list[KVSlot]) -> Iterator[Callable[[], KVMemory]]:
    """Record within the block; the yielded function gives the memory of the last forward.

    Recomputation under gradient checkpointing happens after the block, so it records nothing.
    """
    for slot in slots:
        slot.active = True
    try:
        yield lambda: _collect(slots)
    finally:
        for slot in slots:
            slot.active, slot.key, slot.value = False, None, None


def _collect(slots: list[KVSlot]) -> KVMemory:
    missing = [index for index, slot in enumerate(slots) if slot.key is None]
    if missing:
        raise ValueError(
            f"layers {missing} left no keys and values: this decoder does not go through "
            "transformers' attention interface."
        )
    return KVMemory([slot.key for slot in slots], [slot.value for slot in slots])


def packed_flash_kwargs(position_ids: Tensor) -> dict[str, Tensor | int]:
    """Document boundaries of packed rows for flash-attn's variable-length kernel.

    Args:
        position_ids: int64 [batch, seq], restarting at 0 in every document.
    """
    starts = torch.nonzero(position_ids.flatten() == 0).flatten().to(torch.int32)
    total = torch.tensor([position_ids.numel()], dtype=torch.int32, device=position_ids.device)
    boundaries = torch.cat([starts, total])
    longest = position_ids.shape[1]
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
