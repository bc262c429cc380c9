"""Plain PyTorch version of the operation: the meaning of the kernel, and what CPU training runs.

Works in fp64 and on any device, and autograd goes through it. Queries are taken document by
document (neighbouring small documents of a batch row together), so the cost follows the visible
pairs and no mask over the whole batch exists. Heads are never repeated: the query heads of a group
become rows of one matmul. `reference_backward` writes the same gradients out, which saves keeping
the probabilities; the tests hold it against autograd.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldistill_kernels.shared_kv_attention import cpu

MERGE_PAIRS = 1 << 12  # (query, position) pairs: below, a Python step costs more than the sum
MAX_QUERIES = 512  # queries of one step: bounds the score block to heads x 512 x document


@dataclass(frozen=True)
class Group:
    """Queries [first, last) of one batch row and the memory [low, high), [low2, high2) they see."""

    first: int
    last: int
    batch: int
    low: int
    high: int
    low2: int
    high2: int


def reference_forward(
    q, k, v, batch, start, position, visible=None, k2=None, v2=None, start2=None, end2=None,
    sinks=None, scale=None, window=0, softcap=0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention as `shared_kv_attention` defines it, differentiable by autograd.

    Args: as there, with k and v [batch, kv_heads, seq, head_dim]; 0 stands for no window or cap.
    Returns: out [queries, q_heads, head dim of v] in q's dtype, lse [queries, q_heads] in fp32 or
        fp64.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    plain = not softcap and sinks is None and v.shape[-1] == q.shape[-1]
    # Per KV head, scaled once: [kv_heads, queries, group heads, head_dim].
    heads = (q.to(_compute_dtype(q)) * scale).unflatten(1, (k.shape[1], -1)).transpose(0, 1)
    for step in _steps(window, batch, start, position, visible, start2, end2):
        group = step.group
        keys, values = _memory(group, step.unseen, k, v, k2, v2)
        asking = heads[:, group.first : group.last]  # [kv_heads, queries, group heads, head_dim]
        if plain and cpu.fits(heads, keys, values):
            out, lse = cpu.fused_attention(asking, keys, values, step.hidden)
        else:
            scores = asking.flatten(1, 2) @ keys.mT
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.unflatten(1, (*step.hidden.shape[:1], -1))
            scores = scores.masked_fill(step.hidden, -torch.inf)
            if sinks is not None:  # [kv_heads, queries, group heads, positions + 1]
                sink = sinks.to(scores.dtype).view(scores.shape[0], 1, -1, 1)
                scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1)
                nothing = values.new_zeros(values.shape[0], 1, values.shape[2])
                values = torch.cat([values, nothing], 1)
            scores = scores.flatten(1, 2)
            out, lse = torch.softmax(scores, -1) @ values, torch.logsumexp(scores, -1)
            out, lse = _unpack(out, group), _unpack(lse[..., None], group).squeeze(-1)
        if step.blind is not None:
            out = out.masked_fill(step.blind[:, None, None], 0.0)
            nothing = -torch.inf if sinks is None else sinks.to(lse.dtype)
            lse = torch.where(step.blind[:, None], nothing, lse)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    if not outs:
        lse = q.new_empty(q.shape[:2], dtype=_compute_dtype(q))
        return q.new_empty(*q.shape[:2], v.shape[-1]), lse
    return torch.cat(outs), torch.cat(lses)


@dataclass(frozen=True)
class Step:
    """A group with what its queries see; the same for every layer of a model."""

    group: Group
    hidden: Tensor  # bool [queries, 1, positions]; all False for a query that sees nothing
    unseen: Tensor | None
    blind: Tensor | None  # bool [queries] that see nothing; None when all see something


_last: tuple[int, tuple, list[Step]] = (0, (), [])


def _steps(window: int, *columns: Tensor | None) -> list[Step]:
    """Steps of a call, kept for the next one: the layers of a model ask with the same tensors."""
    global _last
    width, known, steps = _last
    if width == window and len(known) == len(columns) and all(map(_is_same, known, columns)):
        return steps
    steps = [_step(group, window, *columns) for group in query_groups(*columns[:3], *columns[4:])]
    _last = (window, tuple(map(_mark, columns)), steps)
    return steps


def _mark(column: Tensor | None) -> tuple:
    """What tells a tensor from another, and from itself after a change in place."""
    return (None, 0) if column is None else (weakref.ref(column), _version(column))


def _is_same(mark: tuple, column: Tensor | None) -> bool:
    if column is None or mark[0] is None:
        return column is mark[0]
    return mark[0]() is column and mark[1] == _version(column)


def _version(column: Tensor) -> int | float:
    # Inference tensors keep no count of their changes: never equal, so never reused.
    return float("nan") if column.is_inference() else column._version


def _step(group: Group, window, batch, start, position, visible, start2, end2) -> Step:
    mask = _mask(group, window, start, position, visible, start2, end2)
    blind = ~mask.any(1)
    some = bool(blind.any())
    hidden = ~(mask | blind[:, None]) if some else ~mask
    return Step(group, hidden[:, None], _unseen(mask), blind if some else None)


def reference_backward(
    grad_out, grad_lse, q, k, v, batch, start, position, visible, k2, v2, start2, end2, out, lse,
    scale, window=0, softcap=0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, k2 and v2, in fp32 (fp64 for fp64), from what the forward returned."""
    grads = [None if x is None else torch.zeros(x.shape, dtype=_compute_dtype(q), device=q.device)
             for x in (q, k, v, k2, v2)]  # fmt: skip
    q_group = q.shape[1] // k.shape[1]
    for group in query_groups(batch, start, position, start2, end2):
        mask = _mask(group, window, start, position, visible, start2, end2)
        keys, values = _memory(group, _unseen(mask), k, v, k2, v2)
        queries, lse_packed = _pack(q, group, k.shape[1]), _pack(lse[..., None], group, k.shape[1])
        grad, outs = (_pack(x, group, k.shape[1]) for x in (grad_out, out))
        scores = queries @ keys.mT * scale
        if softcap:
            bent = torch.tanh(scores / softcap)
            scores = softcap * bent
        scores = scores.masked_fill(~mask.repeat_interleave(q_group, dim=0), -torch.inf)
        weights = torch.exp(scores - lse_packed.masked_fill(lse_packed == -torch.inf, 0.0))
        delta = (grad * outs).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - _pack(grad_lse[..., None], group, k.shape[1])
        grad_scores = weights * (grad @ values.mT - delta) * scale
        if softcap:
            grad_scores = grad_scores * (1 - bent.square())
        grads[0][group.first : group.last] = _unpack(grad_scores @ keys, group)
        _add(grads[1], grads[3], grad_scores.mT @ queries, group)
        _add(grads[2], grads[4], weights.mT @ grad, group)
    return tuple(grads)


def query_groups(batch, start, position, start2=None, end2=None) -> Iterator[Group]:
    """Cut the queries into steps: whole documents, small neighbours merged, long ones cut."""
    columns = [batch, start, position] + ([] if start2 is None else [start2, end2])
    table = torch.stack([x.long() for x in columns]).cpu()
    queries = table.shape[1]
    if queries == 0:
        return
    changes = (table[:2, 1:] != table[:2, :-1]).any(0).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), queries]
    host, first = table.tolist(), 0
    for end, after in zip(edges[1:], [*edges[2:], None], strict=True):
        if after is not None and host[0][end] == host[0][first]:
            span = host[2][after - 1] + 1 - host[1][first]
            if (after - first) * span <= MERGE_PAIRS:
                continue
        yield from _cut(host, first, end)
        first = end


def _cut(host: list[list[int]], first: int, last: int) -> Iterator[Group]:
    for begin in range(first, last, MAX_QUERIES):
        end = min(begin + MAX_QUERIES, last)
        low, high = min(host[1][begin:end]), max(host[2][begin:end]) + 1
        low2, high2 = (min(host[3][begin:end]), max(host[4][begin:end])) if host[3:] else (0, 0)
        yield Group(begin, end, host[0][begin], low, max(low, high), low2, max(low2, high2))


def _mask(group: Group, window, start, position, visible, start2, end2) -> Tensor:
    """bool [queries, positions of both segments]: what each query of the group sees."""
    queries = slice(group.first, group.last)
    columns = torch.arange(group.low, group.high, device=start.device)
    mask = (columns >= start[queries, None]) & (columns <= position[queries, None])
    if window:
        mask = mask & (columns > position[queries, None] - window)
    if visible is not None:
        mask = mask & visible[group.batch, group.low : group.high]
    if start2 is None:
        return mask
    columns = torch.arange(group.low2, group.high2, device=start.device)
    second = (columns >= start2[queries, None]) & (columns < end2[queries, None])
    return torch.cat([mask, second], dim=1)


def _unseen(mask: Tensor) -> Tensor | None:
    """bool [positions] nobody reads; None when all are read."""
    unseen = ~mask.any(0)
    return unseen if bool(unseen.any()) else None


def _memory(group: Group, unseen: Tensor | None, k, v, k2, v2) -> tuple[Tensor, Tensor]:
    """Keys and values the group may see, [kv_heads, positions, head_dim], unseen ones zeroed."""
    parts = []
    for first, second in ((k, k2), (v, v2)):
        part = first[group.batch, :, group.low : group.high]
        if second is not None:
            part = torch.cat([part, second[group.low2 : group.high2].transpose(0, 1)], dim=1)
        if unseen is not None:  # what nobody reads may hold anything, NaN too
            part = part.masked_fill(unseen[:, None], 0.0)
        parts.append(part.to(_compute_dtype(k)))
    return parts[0], parts[1]


def _pack(x: Tensor, group: Group, kv_heads: int) -> Tensor:
    """[queries, q_heads, d] -> [kv_heads, queries * group heads, d]."""
    x = x[group.first : group.last].to(_compute_dtype(x))
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _unpack(x: Tensor, group: Group) -> Tensor:
    """[kv_heads, queries * group heads, d] -> [queries, q_heads, d]."""
    return x.unflatten(1, (group.last - group.first, -1)).transpose(0, 1).flatten(1, 2)


def _add(first: Tensor, second: Tensor | None, grad: Tensor, group: Group) -> None:
    """Add a group's [kv_heads, positions, d] to the gradients of the two segments."""
    length = group.high - group.low
    first[group.batch, :, group.low : group.high] += grad[:, :length]
    if second is not None:
        second[group.low2 : group.high2] += grad[:, length:].transpose(0, 1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
