"""What the operation refuses, and how it says so: every message names the argument and the value.

`check_arguments` looks at shapes, types and devices only. `check_values` looks into the integer
arrays, which on a GPU waits for it, so the op calls it only when asked to.
"""

import torch
from torch import Tensor

from ldistill_kernels.shared_kv_attention.tiles import misfit

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_arguments(
    q, k, v, batch, start, position, visible, k2, v2, start2, end2, tiles, sinks, grad_k, grad_v,
    scale,
) -> None:  # fmt: skip
    """Raise ValueError unless shapes, dtypes, devices and strides fit. k and v are heads-first."""
    _check_floats(q, k, v)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    queries, memory = q.shape[0], (k.shape[0], k.shape[2])
    for name, index in (("batch", batch), ("start", start), ("position", position)):
        _check_index(name, index, queries, q.device)
    if visible is not None:
        _check_same(visible, "visible", memory, torch.bool, q.device)
    _check_second(q, k, v, k2, v2, start2, end2)
    if tiles is not None:
        _check_same(tiles, "tiles", (tiles.shape[0], 2), torch.int32, q.device)
        if not tiles.is_contiguous():
            raise ValueError(f"tiles must be contiguous, got strides {tiles.stride()}")
    if sinks is not None:
        _check_same(sinks, "sinks", (q.shape[1],), None, q.device)
        _check_last_stride("sinks", sinks)
        if sinks.requires_grad and torch.is_grad_enabled():
            raise ValueError("sinks get no gradient, but require one: detach them")
    for name, grad, like in (("grad_k", grad_k, k), ("grad_v", grad_v, v)):
        if grad is not None:
            _check_same(grad, name, tuple(like.shape), None, q.device)
            _check_last_stride(name, grad)
    if k.shape[0] * k.shape[2] >= 2**31 - 2**16:
        raise ValueError(f"k holds {k.shape[0]} x {k.shape[2]} positions, too many for int32")


def _check_floats(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor, dims in (("q", q, 3), ("k", k, 4), ("v", v, 4)):
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        _check_last_stride(name, tensor)
    _check_same(v, "v", (*k.shape[:3], v.shape[3]), q.dtype, q.device)
    _check_same(k, "k", tuple(k.shape), q.dtype, q.device)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head dim {k.shape[-1]}, q has {q.shape[-1]}")
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q has {q_heads} heads, not a multiple of the {kv_heads} heads of k")


def _check_second(q, k, v, k2, v2, start2, end2) -> None:
    second = {"k2": k2, "v2": v2, "start2": start2, "end2": end2}
    missing = [name for name, value in second.items() if value is None]
    if len(missing) == 4:
        return
    if missing:
        raise ValueError(f"the second segment needs k2, v2, start2 and end2; missing: {missing}")
    if k2.dim() != 3:
        raise ValueError(f"k2 must have 3 dimensions, got shape {tuple(k2.shape)}")
    for name, first in (("k2", k), ("v2", v)):
        shape = (k2.shape[0], k.shape[1], first.shape[3])
        _check_same(second[name], name, shape, q.dtype, q.device)
        _check_last_stride(name, second[name])
    for name in ("start2", "end2"):
        _check_index(name, second[name], q.shape[0], q.device)


def _check_same(tensor, name, shape, dtype, device) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if dtype is None and tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {tensor.device}")


def _check_index(name: str, index: Tensor, queries: int, device: torch.device) -> None:
    if index.dtype not in INTEGERS:
        raise ValueError(f"{name} must be int32 or int64, got {index.dtype}")
    _check_same(index, name, (queries,), index.dtype, device)
    _check_last_stride(name, index)


def _check_last_stride(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have last stride 1, got strides {tensor.stride()}")


def check_values(
    batch, start, position, start2, end2, tiles, *, memory, seq2: int, group: int
) -> None:
    """Raise ValueError unless the queries are sorted and see only what exists.

    Args:
        memory: (batch, seq) of k.
        seq2: positions of the second segment, 0 without one.
        group: query heads a key head.
    """
    if batch.numel() == 0:
        return
    batch, start, position = (x.long() for x in (batch, start, position))
    _check_range("batch", batch, 0, memory[0] - 1, "the batch rows of k")
    _check_range("start", start, 0, memory[1], "the positions of k")
    _check_range("position", position, -1, memory[1] - 1, "the positions of k")
    _first(position < start - 1, lambda i: (
        f"position[{i}] = {int(position[i])} lies before its document: start[{i}] = {int(start[i])}"
        " (start - 1 is how a query sees nothing)"
    ))  # fmt: skip
    _check_order(batch, start, position)
    if start2 is not None:
        _check_order2(start2.long(), end2.long(), seq2)
    wrong = None if tiles is None else misfit(tiles, batch, group)
    if wrong:
        raise ValueError(f"tiles does not belong to these queries: {wrong}; see plan_tiles")


def _check_order(batch: Tensor, start: Tensor, position: Tensor) -> None:
    same_batch = batch[1:] == batch[:-1]
    same = same_batch & (start[1:] == start[:-1])
    unsorted = (batch[1:] < batch[:-1]) | (same_batch & (start[1:] < start[:-1]))
    unsorted |= same & (position[1:] < position[:-1])
    _first(unsorted, lambda i: (
        f"queries must be sorted by (batch, start, position), but query {i + 1} = "
        f"{_query(batch, start, position, i + 1)} follows query {i} = "
        f"{_query(batch, start, position, i)}"
    ))  # fmt: skip
    overlap = same_batch & ~same & (position[:-1] >= start[1:])
    _first(overlap, lambda i: (
        f"position[{i}] = {int(position[i])} lies outside its document: in batch row "
        f"{int(batch[i])} the next document starts at start[{i + 1}] = {int(start[i + 1])}"
    ))  # fmt: skip


def _check_order2(start2: Tensor, end2: Tensor, seq2: int) -> None:
    for name, values in (("start2", start2), ("end2", end2)):
        _check_range(name, values, 0, seq2, "the positions of k2")
        _first(values[1:] < values[:-1], lambda i, name=name, values=values: (
            f"{name} must not decrease, but {name}[{i + 1}] = {int(values[i + 1])} follows "
            f"{int(values[i])}; a query that sees nothing repeats the value before it"
        ))  # fmt: skip
    _first(end2 < start2, lambda i: (
        f"end2[{i}] = {int(end2[i])} lies before start2[{i}] = {int(start2[i])}"
    ))  # fmt: skip


def _check_range(name: str, values: Tensor, low: int, high: int, what: str) -> None:
    _first((values < low) | (values > high), lambda i: (
        f"{name}[{i}] = {int(values[i])} is outside {low}..{high}, {what}"
    ))  # fmt: skip


def _first(bad: Tensor, message) -> None:
    if bool(bad.any()):
        raise ValueError(message(int(bad.nonzero()[0, 0])))


def _query(batch: Tensor, start: Tensor, position: Tensor, i: int) -> tuple[int, int, int]:
    return int(batch[i]), int(start[i]), int(position[i])
