"""What computes the same attention as `shared_kv_attention`, and what each must copy to do so.

A provider is made from a `Problem` once: masks, index arrays and compiled functions are ready
before the clock starts. It returns a function of (q, k, v) -> out, packed rows in and out, with
k and v where the student left them: every gather, pad and scatter is inside and is charged.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from common import Registry
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldistill_kernels import plan_tiles, shared_kv_attention
from ldistill_kernels.testing import AttentionCase

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
PROVIDERS = Registry()  # name -> function of a Problem that gives an Attention


@dataclass
class Problem:
    """A case with the index arrays that the baselines need. Documents end with their last row."""

    case: AttentionCase
    dense: bool  # one document per batch row, and every position is a row

    @cached_property
    def documents(self) -> list[tuple[int, int, int, int, int]]:
        """(batch row, start, end, first row, last row) of each document that has rows."""
        table = torch.stack([x.long() for x in self.case.positional[3:]]).cpu()
        edges = (table[:2, 1:] != table[:2, :-1]).any(0).nonzero().flatten() + 1
        edges = [0, *edges.tolist(), table.shape[1]]
        b, start, position = table.tolist()
        return [
            (b[i], start[i], position[j - 1] + 1, i, j)
            for i, j in itertools.pairwise(edges)
            if j > i
        ]

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.case.q.shape[1] // self.case.k.shape[1]

    @cached_property
    def tiles(self) -> Tensor | None:
        """The table of tiles, which training makes where it plans its queries."""
        index, memory = self.case.positional[3:], self.case.k.shape[::2]  # (batch, seq)
        tiles = plan_tiles(*(x.cpu() for x in index), group=self.group, memory=memory)
        return tiles if tiles is None else tiles.to(self.case.q.device)

    @cached_property
    def pairs(self) -> int:
        """Visible (row, position) pairs, which is what the arithmetic is counted on."""
        return int((self.case.position.long() - self.case.start.long() + 1).sum())

    @cached_property
    def positions(self) -> int:
        """Memory positions that some row sees."""
        return sum(end - start for _, start, end, _, _ in self.documents)

    @cached_property
    def batch_rows(self) -> Slots:
        """Rows of each batch row, padded."""
        counts = torch.bincount(self.case.batch.long(), minlength=self.case.k.shape[0])
        return Slots.of(counts.cumsum(0) - counts, counts, limit=len(self.case.batch))

    @cached_property
    def mask(self) -> Tensor:
        """bool [batch, 1, rows of a batch row, seq]; rows of padding see position 0."""
        rows = self.batch_rows
        columns = torch.arange(self.case.k.shape[2], device=rows.valid.device)
        start, position = (torch.where(rows.valid, x[rows.read], 0)
                           for x in self.case.positional[4:])  # fmt: skip
        return ((columns >= start[..., None]) & (columns <= position[..., None]))[:, None]

    def unpack(self, q: Tensor) -> Tensor:
        """Packed rows -> [batch, heads, rows of a batch row, head_dim]; a view where all exist."""
        if self.dense:
            return q.unflatten(0, (self.case.k.shape[0], -1)).transpose(1, 2)
        return self.batch_rows.fill(q).transpose(1, 2)

    def pack(self, out: Tensor) -> Tensor:
        """The way back."""
        out = out.transpose(1, 2)
        return out.flatten(0, 1) if self.dense else self.batch_rows.empty(out)


@dataclass(frozen=True)
class Slots:
    """A padded batch [groups, longest] of what lies packed, and the ways there and back.

    Indices are numbers, not masks, which would make the host wait; padding reads what comes next.
    """

    read: tuple[Tensor, ...]  # x[read] fills all slots
    valid: Tensor  # bool [groups, longest]
    filled: tuple[Tensor, ...]  # the slots that are no padding
    source: tuple[Tensor, ...]  # where in x those come from, nothing twice

    @classmethod
    def of(cls, first: Tensor, counts: Tensor, limit: int, outer: Tensor | None = None) -> Slots:
        """Slots for [first, first + count) of each group; `outer` is an index before that one."""
        steps = torch.arange(int(counts.max()), device=first.device)
        index = (first[:, None] + steps).clamp_max(limit - 1)
        read = (index,) if outer is None else (outer[:, None].expand_as(index), index)
        valid = steps < counts[:, None]
        return cls(read, valid, valid.nonzero(as_tuple=True), tuple(x[valid] for x in read))

    def fill(self, x: Tensor) -> Tensor:
        return Move.apply(x, self.read, self.filled, self.source)

    def empty(self, padded: Tensor) -> Tensor:
        return Move.apply(padded, self.filled, None, self.filled)


class Move(torch.autograd.Function):
    """x[read], whose gradient is copied back, not added up: no wanted row is read twice.

    PyTorch's own gradient of an index sorts it or adds with atomics, which nobody who is after
    speed would pay for.
    """

    @staticmethod
    def forward(ctx, x: Tensor, read: tuple, wanted: tuple | None, source: tuple) -> Tensor:
        ctx.shape, ctx.wanted, ctx.source = x.shape, wanted, source
        return x[read]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad if ctx.wanted is None else grad[ctx.wanted]
        back = grad.new_zeros(ctx.shape)
        back[ctx.source] = grad
        return back, None, None, None


@PROVIDERS.add("ours")
def ours(problem: Problem) -> Attention:
    index, tiles = problem.case.positional[3:], problem.tiles
    return lambda q, k, v: shared_kv_attention(q, k, v, *index, tiles=tiles, check=False)


@PROVIDERS.add("ours two segments")
def ours_two_segments(problem: Problem) -> Attention:
    """The same result with the later half of each document in a packed second segment."""
    case, ranges, length = problem.case, [], 0
    for b, start, end, first, last in problem.documents:
        middle = (start + end) // 2
        ranges.append((b, middle, end, first, last, length))
        length += end - middle
    device = case.q.device
    batch = torch.cat([torch.full((r[2] - r[1],), r[0]) for r in ranges]).to(device)
    place = torch.cat([torch.arange(r[1], r[2]) for r in ranges]).to(device)
    middle, start2 = (
        torch.cat([torch.full((r[4] - r[3],), r[i]) for r in ranges]).to(device) for i in (1, 5)
    )
    k2, v2 = case.k[batch, :, place].clone(), case.v[batch, :, place].clone()
    position = torch.minimum(case.position.long(), middle - 1)
    end2 = start2 + (case.position.long() - middle + 1).clamp_min(0)
    options = {"k2": k2, "v2": v2, "start2": start2, "end2": end2}
    options |= {"tiles": problem.tiles, "check": False}
    return lambda q, k, v: shared_kv_attention(q, k, v, case.batch, case.start, position, **options)


@PROVIDERS.add("plain")
def plain(problem: Problem) -> Attention:
    """Matmul, masked softmax, matmul, heads repeated: what one writes first."""
    mask, group = problem.mask, problem.group

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = (problem.unpack(q) @ k.mT).float() * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
        return problem.pack(weights @ v)

    return attend


@PROVIDERS.add("sdpa")
def sdpa(problem: Problem) -> Attention:
    """SDPA over whole batch rows: causal flash where all rows are there, else with a mask."""
    mask = None if problem.dense else problem.mask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            problem.unpack(q), k, v, attn_mask=mask, is_causal=problem.dense, enable_gqa=True
        )
        return problem.pack(out)

    return attend


@PROVIDERS.add("sdpa repeat")
def sdpa_repeat(problem: Problem) -> Attention:
    """The same with key and value heads repeated, which reaches kernels that know no groups."""
    attend, group = sdpa(problem), problem.group
    return lambda q, k, v: attend(q, *(x.repeat_interleave(group, dim=1) for x in (k, v)))


@PROVIDERS.add("sdpa cudnn", on_gpu=True)
def sdpa_cudnn(problem: Problem) -> Attention:
    """The same, heads repeated, with cuDNN's kernel and no other."""
    attend = sdpa_repeat(problem)

    def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v)

    return forced


@PROVIDERS.add("gather+sdpa")
def gather_sdpa(problem: Problem, repeat: int = 1) -> Attention:
    """Documents gathered into a padded batch of their own, then SDPA with a mask."""
    case, device = problem.case, problem.case.q.device
    batch, start, end, first, last = torch.tensor(problem.documents, device=device).T
    rows = Slots.of(first, last - first, limit=len(case.batch))
    memory = Slots.of(start, end - start, limit=case.k.shape[2], outer=batch)
    places = memory.read[1]
    position = torch.where(rows.valid, case.position[rows.read], places[:, :1])
    mask = (places[:, None] <= position[..., None]) & memory.valid[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (memory.fill(x.transpose(1, 2)).transpose(1, 2) for x in (k, v))
        if repeat > 1:
            keys, values = (x.repeat_interleave(repeat, dim=1) for x in (keys, values))
        out = F.scaled_dot_product_attention(
            rows.fill(q).transpose(1, 2), keys, values, attn_mask=mask[:, None],
            enable_gqa=repeat == 1,
        )  # fmt: skip
        return rows.empty(out.transpose(1, 2))

    return attend


@PROVIDERS.add("gather+sdpa repeat")
def gather_sdpa_repeat(problem: Problem) -> Attention:
    """The same with key and value heads repeated."""
    return gather_sdpa(problem, problem.group)


@PROVIDERS.add("flex", on_gpu=True)  # its CPU path needs a C++ compiler and knows no gradient
def flex(problem: Problem) -> Attention:
    """FlexAttention, compiled, its block mask ready."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, case = problem.batch_rows, problem.case
    start, position = (torch.where(rows.valid, x[rows.read], 0) for x in case.positional[4:])

    def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column >= start[b, row]) & (column <= position[b, row])

    sizes = (case.k.shape[0], None, rows.valid.shape[1], case.k.shape[2])
    block_mask = create_block_mask(sees, *sizes, device=str(case.q.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(problem.unpack(q), k, v, block_mask=block_mask, enable_gqa=True)
        return problem.pack(out)

    return attend


@PROVIDERS.add("varlen", on_gpu=True)
def varlen(problem: Problem) -> Attention:
    """PyTorch's own variable-length attention over contiguous copies of the documents."""
    from torch.nn.attention.varlen import varlen_attn

    # Older signatures take fewer key heads without being told.
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} | ({"enable_gqa": True} if told else {})
    return over_documents(problem, lambda *arguments: varlen_attn(*arguments, **options))


@PROVIDERS.add("flash-attn", package="flash_attn", on_gpu=True)
def flash_attn(problem: Problem) -> Attention:
    """FlashAttention's variable-length function over contiguous copies of the documents."""
    from flash_attn import flash_attn_varlen_func

    return over_documents(problem, partial(flash_attn_varlen_func, causal=True))


def over_documents(problem: Problem, function: Callable[..., Tensor]) -> Attention:
    """A function of packed (q, k, v, bounds of q, k, longest of q, k), causal from the end."""
    documents, device = problem.documents, problem.case.q.device
    lengths = torch.tensor([[d[4] - d[3], d[2] - d[1]] for d in documents])
    bounds = F.pad(lengths.cumsum(0), (0, 0, 1, 0)).int().to(device)
    longest = lengths.max(0).values.tolist()
    batch = torch.cat([torch.full((d[2] - d[1],), d[0]) for d in documents]).to(device)
    places = torch.cat([torch.arange(d[1], d[2]) for d in documents]).to(device)
    cu_q, cu_k, memory = bounds[:, 0].contiguous(), bounds[:, 1].contiguous(), (batch, places)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (Move.apply(x.transpose(1, 2), memory, None, memory) for x in (k, v))
        return function(q, keys, values, cu_q, cu_k, *longest)

    return attend
