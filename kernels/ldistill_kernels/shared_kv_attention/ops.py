"""The operation as PyTorch sees it: schema, shapes for tracing, autograd.

Forward and backward are two library ops. Inside them everything may happen that a tracer cannot
follow (host code over documents, Triton launches), so `torch.compile(fullgraph=True)` and CUDA
graphs take the operation as one node. Gradients go through an `autograd.Function` registered
under the Autograd key, which costs half the CPU time of `register_autograd`.
"""

import torch
from torch import Tensor

from ldistill_kernels.shared_kv_attention.checks import check_values
from ldistill_kernels.shared_kv_attention.reference import reference_backward, reference_forward

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor batch, Tensor start, Tensor position, Tensor? visible, "
    "Tensor? k2, Tensor? v2, Tensor? start2, Tensor? end2, Tensor? tiles, "
)
_library = torch.library.Library("ldistill", "FRAGMENT")
_library.define(
    f"shared_kv_attention({_INPUTS}Tensor? sinks, Tensor? grad_k, Tensor? grad_v, float scale, "
    "int window, float softcap, bool triton, bool check) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"shared_kv_attention_backward(Tensor grad_out, Tensor? grad_lse, {_INPUTS}"
    "Tensor(a!)? grad_k, Tensor(b!)? grad_v, Tensor out, Tensor lse, bool[] needs, float scale, "
    "int window, float softcap, bool triton) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
attention_op = torch.ops.ldistill.shared_kv_attention.default
backward_op = torch.ops.ldistill.shared_kv_attention_backward.default


def _forward(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks, grad_k, grad_v,
    scale, window, softcap, triton, check,
):  # fmt: skip
    if check:
        seq2 = 0 if k2 is None else k2.shape[0]
        memory, group = (k.shape[0], k.shape[2]), q.shape[1] // k.shape[1]
        check_values(
            batch, start, position, start2, end2, tiles, memory=memory, seq2=seq2, group=group
        )
    if not triton:
        return reference_forward(
            q, k, v, batch, start, position, visible, k2, v2, start2, end2, sinks, scale, window,
            softcap,
        )  # fmt: skip
    from ldistill_kernels.shared_kv_attention.triton_fwd import attention_forward

    return attention_forward(
        q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks, scale,
        window, softcap,
    )  # fmt: skip


def _backward(
    grad_out, grad_lse, q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles,
    grad_k, grad_v, out, lse, needs, scale, window, softcap, triton,
):  # fmt: skip
    if triton:
        from ldistill_kernels.shared_kv_attention.launch_bwd import attention_backward

        return attention_backward(
            grad_out, grad_lse, q, k, v, batch, start, position, visible, k2, v2, start2, end2,
            tiles, grad_k, grad_v, out, lse, needs, scale, window, softcap,
        )  # fmt: skip
    grads = reference_backward(
        grad_out, grad_lse, q, k, v, batch, start, position, visible, k2, v2, start2, end2, out,
        lse, scale, window, softcap,
    )  # fmt: skip
    for buffer, grad in ((grad_k, grads[1]), (grad_v, grads[2])):
        if buffer is not None:
            buffer.copy_(buffer.to(grad.dtype) + grad)
    wanted = _wanted(needs, grad_k, grad_v)
    inputs = (q, k, v, k2, v2)
    return tuple(
        torch.empty_like(x).copy_(grad) if want else q.new_empty(0)
        for x, grad, want in zip(inputs, grads, wanted, strict=True)
    )


def _wanted(needs: list[bool], grad_k: Tensor | None, grad_v: Tensor | None) -> list[bool]:
    """Which of dq, dk, dv, dk2, dv2 come back as tensors of their own."""
    return [needs[0], needs[1] and grad_k is None, needs[2] and grad_v is None, *needs[3:]]


def _fake_forward(q, k, v, *others):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=lse_dtype)


def _fake_backward(
    grad_out, grad_lse, q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles,
    grad_k, grad_v, out, lse, needs, scale, window, softcap, triton,
):  # fmt: skip
    wanted = _wanted(needs, grad_k, grad_v)
    inputs = (q, k, v, k2, v2)
    return tuple(
        torch.empty_like(x) if want else q.new_empty(0)
        for x, want in zip(inputs, wanted, strict=True)
    )


class _Attention(torch.autograd.Function):
    """Autograd of the forward op; k and v get no gradient when buffers take it."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attention_op(*args)
        ctx.set_materialize_grads(False)
        # The buffers are written in the backward: saving them would trip the version check.
        ctx.save_for_backward(*args[:12], out, lse)
        ctx.buffers, ctx.scores, ctx.triton = args[13:15], args[15:18], args[18]
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        *inputs, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 20
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 7, 8)]
        grads = backward_op(
            grad_out, grad_lse, *inputs, *ctx.buffers, out, lse, needs, *ctx.scores, ctx.triton
        )
        wanted = _wanted(needs, *ctx.buffers)
        dq, dk, dv, dk2, dv2 = (x if want else None for x, want in zip(grads, wanted, strict=True))
        return dq, dk, dv, None, None, None, None, dk2, dv2, *((None,) * 11)


def _autograd(*args):
    if torch.is_grad_enabled() and any(
        args[i] is not None and args[i].requires_grad for i in (0, 1, 2, 7, 8)
    ):
        return _Attention.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_op(*args)


_library.impl("shared_kv_attention", _forward, "CompositeExplicitAutograd")
_library.impl("shared_kv_attention", _autograd, "Autograd")
_library.impl("shared_kv_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ldistill::shared_kv_attention", _fake_forward, lib=_library)
torch.library.register_fake("ldistill::shared_kv_attention_backward", _fake_backward, lib=_library)
