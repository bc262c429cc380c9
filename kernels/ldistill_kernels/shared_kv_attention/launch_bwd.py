"""The backward's launch: what is wanted, its tiles and its grid (see `triton_bwd`)."""

import torch
import triton
from torch import Tensor

from ldistill_kernels.shared_kv_attention.configs import backward_config, split_backward
from ldistill_kernels.shared_kv_attention.primitives import (
    alignment,
    lane_blocks,
    lane_programs,
    score_factors,
    strides,
)
from ldistill_kernels.shared_kv_attention.triton_bwd import backward_kernel
from ldistill_kernels.shared_kv_attention.triton_prepare import prepare


def attention_backward(
    grad_out, grad_lse, q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles,
    grad_k, grad_v, out, lse, needs, scale, window, softcap,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward.

    Args:
        needs: which of dq, dk, dv, dk2, dv2 are wanted.
        grad_k, grad_v: buffers that dK and dV are added to instead of being returned.
    Returns: dq, dk, dv, dk2, dv2, an empty tensor for each that is not wanted or was added.
    """
    # A tile that no query sees writes zeros (or, into a given buffer, nothing), so empty will do.
    grads = [  # one tensor each: results of an op must not alias
        torch.empty_like(x) if need else q.new_empty(0)
        for x, need in zip((q, k, v, k2, v2), needs, strict=True)
    ]
    targets = [*grads]
    for i, buffer in ((1, grad_k), (2, grad_v)):
        if buffer is not None:
            grads[i], targets[i] = q.new_empty(0), buffer
    if q.shape[0] == 0:
        return tuple(grad.zero_() for grad in grads)
    wanted = [needs[0], needs[1] or grad_k is not None, needs[2] or grad_v is not None, *needs[3:]]
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    added = grad_k is not None, grad_v is not None
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _launch(
            grad_out, grad_lse, q, k, v, batch, start, position, visible, k2, v2, start2, end2,
            tiles, out, lse, targets, wanted, added, scale, window, softcap,
        )  # fmt: skip
    return tuple(grads)


def _launch(
    grad_out, grad_lse, q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles,
    out, lse, targets, wanted, added, scale, window, softcap,
) -> None:  # fmt: skip
    queries, q_heads, head_dim = q.shape
    batches, kv_heads, seq = k.shape[:3]
    seq2 = 0 if k2 is None else k2.shape[0]
    v_dim, extras = v.shape[-1], bool(window or softcap)
    plain = visible is None and k2 is None and not (extras or any(added)) and v_dim == head_dim
    config = backward_config(q.device, max(head_dim, v_dim), q.element_size(), plain)
    seq_tiles = triton.cdiv(seq, config.dkv_n)  # a tile of memory never spans two batch rows
    tiles1 = batches * seq_tiles if wanted[1] or wanted[2] else 0
    tiles2 = triton.cdiv(seq2, config.dkv_n) if wanted[3] or wanted[4] else 0
    dq, dk, dv, dk2, dv2 = (x if want else None for x, want in zip(targets, wanted, strict=True))
    align = alignment(q, k, v, k2, v2, grad_out, dq, dk, dv, dk2, dv2)
    d1, d2 = split_backward(head_dim)
    e1, e2 = split_backward(v_dim)
    values = {"ALIGN": align, "V_DIM": v_dim, "E1": e1, "E2": e2, "HAS_WINDOW": window > 0}
    group = q_heads // kv_heads
    base2, delta, ranges = prepare(
        out, grad_out, grad_lse, lse, batch, start, position, seq, start2, end2, seq2, seq_tiles,
        tiles1, tiles2, config.dkv_n, group, window, values,
    )  # fmt: skip
    dq_m, small_m = lane_blocks(config.dq_m, tiles is not None)
    dq_tiles = lane_programs(dq_m, tiles, queries * group) if wanted[0] else 0
    grid = (tiles1 + tiles2 + dq_tiles) * kv_heads
    if grid == 0:
        return
    backward_kernel[(grid,)](
        q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, grad_out, base2,
        delta, ranges, dq, dk, dv, dk2, dv2, queries, batches, seq, seq2, kv_heads, seq_tiles,
        tiles1, tiles2, scale, *score_factors(scale, softcap), window,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *strides(visible), *strides(k2),
        *strides(v2), *grad_out.stride()[:2], *strides(dq), *strides(dk, 3), *strides(dv, 3),
        *strides(dk2), *strides(dv2),
        **values, HEAD_DIM=head_dim, D1=d1, D2=d2, HAS_CAP=softcap > 0, GROUP=group, DQ_M=dq_m,
        SMALL_M=small_m, DQ_N=config.dq_n, DKV_M=config.dkv_m, DKV_N=config.dkv_n,
        HAS_VISIBLE=visible is not None,
        HAS_SECOND=k2 is not None, HAS_TILES=tiles is not None, DQ=wanted[0], DK=wanted[1],
        DV=wanted[2], DK2=wanted[3], DV2=wanted[4], ADD_K=added[0], ADD_V=added[1],
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
        enable_fp_fusion=True,
    )  # fmt: skip
