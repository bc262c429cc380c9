"""Public function of the operation: checks what it is given, then calls the registered op.

    out = shared_kv_attention(q, k, v, batch, start, position)

The teacher asks with its own queries and reads the student's keys and values in place. Only queries
that need an answer are passed, packed one after another; three integer arrays say what each sees.
"""

import os
from functools import lru_cache

import torch
from torch import Tensor

from ldistill_kernels.shared_kv_attention.checks import check_arguments
from ldistill_kernels.shared_kv_attention.ops import attention_op

KERNELS = ("auto", "triton", "reference")


def shared_kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Tensor,
    start: Tensor,
    position: Tensor,
    *,
    visible: Tensor | None = None,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    start2: Tensor | None = None,
    end2: Tensor | None = None,
    tiles: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    grad_k: Tensor | None = None,
    grad_v: Tensor | None = None,
    kernels: str = "auto",
    check: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with packed queries over a memory that stays where it is.

    Query i sees the memory positions (batch[i], j) with start[i] <= j <= position[i], and the
    positions [start2[i], end2[i]) of the second segment, under one softmax. Query head h reads
    key/value head h // (q_heads // kv_heads). A query that sees nothing (position = start - 1, or
    everything invisible) gets output 0, log-sum-exp -inf and gradient 0.

    Args:
        q: [queries, q_heads, head_dim], fp16, bf16 or fp32 (fp64 too with the reference).
        k, v: [batch, kv_heads, seq, head_dim] for layout "bhsd", [batch, seq, kv_heads, head_dim]
            for "bshd". Any strides, the last one 1. Never copied. v may have another head dim.
        batch, start, position: int32 or int64 [queries], sorted by (batch, start, position). The
            ranges of two documents of one batch row do not overlap.
        visible: bool [batch, seq]; memory positions marked False are read by nobody.
        k2, v2: [seq2, kv_heads, head_dim], the second segment, packed; v2 as wide as v.
        start2, end2: int32 or int64 [queries], non-decreasing; start2 == end2 sees nothing there.
        tiles: int32 [tiles, 2] of `plan_tiles` for the same queries, moved to their device. Makes
            the kernels faster where queries are few; changes no result but for rounding.
        window: a query sees its own memory position and window - 1 before it, no more. Of the
            second segment it sees what start2 and end2 say.
        softcap: scores become softcap * tanh(score / softcap) before the softmax.
        sinks: [q_heads], any float type: scores of a position that every query sees besides, whose
            value is 0. A query that sees nothing else gets output 0 and its sink as log-sum-exp.
            They get no gradient.
        scale: factor on q.k before the softmax; head_dim ** -0.5 unless given. Positive.
        return_lse: also return the natural log-sum-exp, fp32 [queries, q_heads] (fp64 for fp64).
        grad_k, grad_v: shaped and laid out like k and v, any float type. The backward adds dK and
            dV into them and autograd returns none for k and v. k and v must still require grad.
        kernels: "auto" takes Triton for CUDA tensors and the reference for others; "triton"
            also runs on CPU tensors under TRITON_INTERPRET=1; "reference" is plain PyTorch.
        check: look at the values of the integer arrays, which synchronises with the GPU. None
            means yes on CPU tensors, and on CUDA tensors only under LDISTILL_DEBUG=1.

    Returns:
        out [queries, q_heads, head dim of v] in q's dtype, or (out, lse).

    Raises:
        ValueError: names the argument that does not fit and what it got.
    """
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', got {layout!r}")
    if layout == "bshd":
        k, v, grad_k, grad_v = (_heads_first(t) for t in (k, v, grad_k, grad_v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    for name, limit in (("window", window), ("softcap", softcap)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    scores = scale, window or 0, float(softcap or 0)
    triton = _use_triton(kernels, q, v)
    if check is None:
        check = not q.is_cuda or os.environ.get("LDISTILL_DEBUG") == "1"
    inputs = (q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks)
    if triton and not check and _only_forward(*inputs[:3], k2, v2, grad_k, grad_v):
        out, lse = _forward_again()(inputs, *scores)
    else:
        check_arguments(*inputs, grad_k, grad_v, scale)
        out, lse = attention_op(*inputs, grad_k, grad_v, *scores, triton, check)
    return (out, lse) if return_lse else out


def _only_forward(q, k, v, k2, v2, grad_k, grad_v) -> bool:
    """Whether nothing looks at the call but itself: no autograd, no tracer, no dispatch mode."""
    if torch.compiler.is_compiling() or type(q) is not Tensor:
        return False
    if torch._C._len_torch_dispatch_stack() or grad_k is not None or grad_v is not None:
        return False
    return not torch.is_grad_enabled() or not any(
        x is not None and x.requires_grad for x in (q, k, v, k2, v2)
    )


@lru_cache
def _forward_again():
    from ldistill_kernels.shared_kv_attention.triton_fwd import forward_again

    return forward_again


def _heads_first(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() != 4 else tensor.transpose(1, 2)


def _use_triton(kernels: str, q: Tensor, v: Tensor) -> bool:
    """Which of the two implementations runs; ValueError when the wanted one cannot."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    if kernels == "reference" or (kernels == "auto" and not q.is_cuda):
        return False
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels='triton' needs CUDA tensors, got q on {q.device}; set TRITON_INTERPRET=1 "
            "before Triton is imported to run the kernels in its interpreter"
        )
    if q.dtype == torch.float64:
        raise ValueError("q is float64, which only kernels='reference' supports")
    if max(q.shape[-1], v.shape[-1]) > 256:
        raise ValueError(
            f"q and v have head dims {q.shape[-1]} and {v.shape[-1]}; the Triton kernels take up "
            "to 256"
        )
    return True
