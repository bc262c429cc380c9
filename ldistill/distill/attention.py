"""The student's attention, and its keys and values as views: the *shared K/V* of the teacher.

transformers lets an attention function be registered by name. Ours notes the rotated keys and the
values on their way into the real one and changes nothing, so the shared K/V are the very storage
that the student's attention read: no copy, no repeated heads (the paper's section 3.1).

A slot per attention module, not a list by layer index, keeps `torch.compile` from specialising the
decoder block on its index: one graph serves all layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
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
from transformers.utils import is_flash_attn_2_available

from ldistill.common.device import has_fast_bf16
from ldistill.common.errors import refuse

logger = logging.getLogger(__name__)

Backend = Literal["auto", "sdpa", "flash_attention_2", "varlen", "flex_attention", "eager"]
PACKED = ("flash_attention_2", "varlen")
"""Backends that take documents by their boundaries (:func:`document_boundaries`), not by a mask."""


# PyTorch 2.11 takes fewer key heads as they come, later ones want to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@dataclass(eq=False, slots=True)
class KVSlot:
    """Where one attention module leaves its keys and values."""

    active: bool = False
    key: Tensor | None = None
    value: Tensor | None = None


@dataclass
class SharedKV:
    """Keys and values of one student forward.

    ``keys[l]``, ``values[l]``: [batch, kv_heads, seq, head_dim] in the student's dtype, keys
    rotated; views of what the student's attention of layer l read.
    """

    keys: list[Tensor]
    values: list[Tensor]

    def detach(self) -> SharedKV:
        """The same storage outside the student's graph (``kv_grad: detached``)."""
        return SharedKV([k.detach() for k in self.keys], [v.detach() for v in self.values])


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
    # From [batch, heads, seq, head_dim] to what flash-attn wants: heads behind positions, views.
    output = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        _as_wide(value, key).transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scaling,
        attn_implementation="flash_attention_2",
        **kwargs,
    )
    return output[..., : value.shape[-1]], None


def _as_wide(value: Tensor, key: Tensor) -> Tensor:
    """Values [..., value_dim], with zeros behind narrow ones: [..., head_dim]; else themselves."""
    missing = key.shape[-1] - value.shape[-1]
    return F.pad(value, (0, missing)) if missing else value


def _varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs,
) -> tuple[Tensor, None]:
    """PyTorch's own variable-length attention over the documents of a packed batch."""
    # Transposed back to how the projections left them, so flattening copies nothing:
    # [batch, heads, seq, head_dim] → [batch × seq, heads, head_dim].
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, _as_wide(value, key)))
    lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    # A window counts the position itself, this kernel only those before it; -1 is no window.
    before = sliding_window - 1 if sliding_window else -1
    options = _GROUPED if k.shape[1] != q.shape[1] else {}
    out = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(before, 0), **options)
    out = out[..., : value.shape[-1]]
    # [batch, seq, heads, value_dim]
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def shared_sdpa_mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> Tensor | None:
    """SDPA's mask in the dtype it adds to scores.

    Given a boolean one, SDPA widens it anew in every layer, and autograd keeps every copy until
    backward; this one tensor serves all layers.
    """
    visible = sdpa_mask(*args, **kwargs)  # bool [batch, 1, queries, keys]
    if visible is None:  # plain causal: SDPA's own flag does without a mask
        return None
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _recording(attend: Callable) -> Callable:
    def attention(module, query, key, value, attention_mask, **kwargs):
        # Under autocast the projections give 16-bit tensors and RoPE's float32 tables widen two of
        # them; attention would narrow them again, unseen. Done here, the shared K/V have one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        slot = getattr(module, "kv_slot", None)
        if slot is not None and slot.active:
            slot.key, slot.value = key, value  # [batch, kv_heads, seq, head_dim], before repeating
        return attend(module, query, key, value, attention_mask, **kwargs)

    return attention


_ATTENTIONS = {
    "sdpa": (sdpa_attention_forward, shared_sdpa_mask),
    "eager": (None, eager_mask),  # the decoder's own, see `attach`
    "flash_attention_2": (_flash_attention_2, flash_attention_mask),
    "varlen": (_varlen, None),
    "flex_attention": (flex_attention_forward, flex_attention_mask),
}


def choose_attention(asked: Backend, dtype: torch.dtype, device: str) -> str:
    """``auto`` is a variable-length kernel where one runs, else ``sdpa``.

    flash-attn's where it is installed, else PyTorch's own; both compute in bf16 or fp16 alone, on
    GPUs from Ampere on. ``flex_attention`` compiles at the first step; whether it pays is for
    `ldistill bench step --attention auto` to measure.

    Args:
        asked: of a recipe.
        dtype, device: that the student computes in and on.

    Raises:
        ValueError: a backend that does not run here.
    """
    varlen = device == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_fast_bf16()
    flash = device == "cuda" and is_flash_attn_2_available()
    if asked == "auto":
        return ("flash_attention_2" if flash else "varlen") if varlen else "sdpa"
    cases = {
        "attention is flash_attention_2, but flash-attn is not installed or there is no GPU: "
        "pip install flash-attn --no-build-isolation, or leave --attention at sdpa.": (
            asked == "flash_attention_2" and not flash
        ),
        "attention is varlen, which computes in bf16 or fp16 on a GPU from Ampere on: give "
        "--bf16 true there, or choose sdpa.": asked == "varlen" and not varlen,
    }
    refuse(cases)
    return asked


# What a decoder or its pictures may ask for that some backends do not compute.
_CANNOT = {
    "sdpa": {"soft caps", "sinks"},
    "flash_attention_2": {"sinks", "positions that see what follows"},
    "varlen": {"soft caps", "sinks", "positions that see what follows", "dropout"},
    "flex_attention": {"dropout"},
    "eager": set(),
}


def fitting_attention(backend: str, decoder: PreTrainedModel, both_ways: bool, device: str) -> str:
    """The backend, or where it cannot compute this student's attention one that can; says so.

    Args:
        backend: what :func:`choose_attention` gives, so not ``auto``.
        decoder: of the student.
        both_ways: whether some positions (a picture's) see what follows them.
        device: the type of device that it computes on.
    """
    wanted = {
        "positions that see what follows": both_ways,
        "soft caps": getattr(decoder.config, "attn_logit_softcapping", None),
        "dropout": getattr(decoder.config, "attention_dropout", 0),
        "sinks": hasattr(decoder.layers[0].self_attn, "sinks"),
    }
    needs = {need for need, there in wanted.items() if there}
    if not (lacking := needs & _CANNOT[backend]):
        return backend
    able = ["sdpa", "flex_attention", "eager"] if device == "cuda" else ["sdpa", "eager"]
    other = next(name for name in able if not needs & _CANNOT[name])
    logger.warning(
        "attention %s has no %s, which this student's attention has: %s computes it.",
        backend, " and no ".join(sorted(lacking)), other,
    )  # fmt: skip
    return other


def attach(decoder: PreTrainedModel, backend: str = "sdpa") -> list[KVSlot]:
    """Make a transformers decoder leave its keys and values in slots, one per layer.

    Args:
        decoder: with attention modules in ``layers[l].self_attn``, with or without its head.
        backend: what :func:`fitting_attention` gives.
    """
    name = f"ldistill_{backend}"
    attend, mask = _ATTENTIONS[backend]
    backbone = decoder.base_model
    if attend is None:  # soft caps and sinks are in those of the models that have them
        own = import_module(type(backbone.layers[0].self_attn).__module__)
        attend, name = own.eager_attention_forward, f"{name}_{backbone.config.model_type}"
    ALL_ATTENTION_FUNCTIONS.register(name, _recording(attend))
    if mask is not None:  # without one by that name transformers makes no mask
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    backbone.config._attn_implementation = name
    slots = [KVSlot() for _ in backbone.layers]
    for layer, slot in zip(backbone.layers, slots):
        layer.self_attn.kv_slot = slot
    return slots


@contextmanager
def recording(slots: list[KVSlot]) -> Iterator[Callable[[], SharedKV]]:
    """Record within the block; the yielded function gives the K/V of the last forward.

    Recomputation under gradient checkpointing happens after the block, so it records nothing.
    """

    def collect() -> SharedKV:
        if missing := [index for index, slot in enumerate(slots) if slot.key is None]:
            raise ValueError(
                f"layers {missing} left no keys and values: this decoder does not go through "
                "transformers' attention interface."
            )
        return SharedKV([slot.key for slot in slots], [slot.value for slot in slots])

    for slot in slots:
        slot.active = True
    try:
        yield collect
    finally:
        for slot in slots:
            slot.active, slot.key, slot.value = False, None, None


def document_boundaries(position_ids: Tensor) -> dict[str, Tensor | int]:
    """Where documents begin in packed rows, by transformers' names, for the ``PACKED`` backends.

    Args:
        position_ids: int64 [batch, seq], restarting at 0 in every document.

    Returns:
        ``cu_seq_lens_*``: int32 [documents + 1] over the flattened batch; ``max_length_*``.
    """
    # Rows end to end, [batch × seq]: a document begins wherever the count is 0 again; padding
    # counts on by itself, as one more document that nobody reads.
    starts = torch.nonzero(position_ids.flatten() == 0).flatten().to(torch.int32)
    boundaries = F.pad(starts, (0, 1), value=position_ids.numel())  # [documents + 1]
    longest = position_ids.shape[1]  # a bound; the true one would have to be waited for
    lengths = {"cu_seq_lens": boundaries, "max_length": longest}
    return {f"{name}_{side}": value for name, value in lengths.items() for side in "qk"}
