"""Inputs and error budgets shared by the tests and the benchmarks of the kernels.

`make_case` draws a packed batch as training sees it; `naive_attention` is the slow definition with
a full mask, written independently of `reference.py`; `error_ratio` says how an error compares with
that of plain PyTorch in the same dtype.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldistill_kernels.shared_kv_attention import plan_tiles


@dataclass
class AttentionCase:
    """Arguments of one `shared_kv_attention` call: tensors, keyword tensors, and the layout."""

    q: Tensor
    k: Tensor
    v: Tensor
    batch: Tensor
    start: Tensor
    position: Tensor
    options: dict = field(default_factory=dict)

    @property
    def positional(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.batch, self.start, self.position

    def floats(self) -> dict[str, Tensor]:
        """The tensors that can have a gradient, by name."""
        floats = {"q": self.q, "k": self.k, "v": self.v}
        return floats | {name: self.options[name] for name in ("k2", "v2") if name in self.options}

    def cast(self, dtype: torch.dtype, requires_grad: bool = False) -> "AttentionCase":
        """The same case with its float tensors in another dtype, strides and values kept."""

        def convert(x, grad=requires_grad):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            y = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
            y.copy_(x.detach())
            return y.requires_grad_(grad)

        options = {
            name: convert(x, requires_grad and name in self.floats())
            for name, x in self.options.items()
        }
        return AttentionCase(*(convert(x) for x in self.positional), options)


def make_queries(
    documents: list[list[tuple[int, int, int]]], *, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Index arrays for documents per batch row, each (start, length, queries at its end).

    Returns: batch, start, position, int32 [queries].
    """
    queries = [
        (b, start, position)
        for b, row in enumerate(documents)
        for start, length, count in row
        for position in range(start + length - count, start + length)
    ]
    table = torch.tensor(queries, dtype=torch.int32, device=device).reshape(-1, 3)
    return tuple(table.T.contiguous())


def pack_documents(
    batch: int, seq: int, lengths: list[int], queries: list[int], generator: torch.Generator
) -> list[list[tuple[int, int, int]]]:
    """Fill `batch` rows of `seq` positions with documents drawn from lengths and query counts."""

    def draw(choices: list[int]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    documents = []
    for _ in range(batch):
        row, at = [], 0
        while at < seq:
            length = min(draw(lengths), seq - at)
            row.append((at, length, min(draw(queries), length)))
            at += length
        documents.append(row)
    return documents


def make_case(
    documents: list[list[tuple[int, int, int]]],
    *,
    seq: int,
    heads: tuple[int, int] = (3, 1),
    head_dim: int = 16,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "bhsd",
    device: str = "cpu",
    seed: int = 0,
    **options,
) -> AttentionCase:
    """A random case over the given documents; `heads` is (q_heads, kv_heads), `v_dim` of values."""
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    index = make_queries(documents, device=device)
    shape = (len(documents), kv_heads, seq, head_dim)
    if layout == "bshd":
        shape = (len(documents), seq, kv_heads, head_dim)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    q = draw(index[0].numel(), q_heads, head_dim)
    k, v = draw(*shape), draw(*shape[:3], v_dim or head_dim)
    return AttentionCase(q, k, v, *index, {"layout": layout} | options)


def second_segment(case: AttentionCase, *, every: int = 1, seed: int = 1) -> AttentionCase:
    """The case with a packed second segment: each document's queries also see its earlier queries.

    `every` keeps one query in so many, which leaves some queries with an empty range.
    """
    queries = case.batch.numel()
    kept = torch.arange(queries, device=case.q.device) % every == every - 1
    count = torch.cumsum(kept, 0)
    document = case.batch.long() * (1 << 32) + case.start.long()
    change = torch.ones(queries, dtype=torch.bool, device=document.device)
    change[1:] = document[1:] != document[:-1]
    before = torch.where(change, count - kept.long(), 0)
    start2 = torch.cummax(before, 0).values if queries else before
    generator = torch.Generator().manual_seed(seed)
    layout = case.options.get("layout", "bhsd")
    size = (int(kept.sum()), case.k.shape[1 if layout == "bhsd" else 2])
    k2, v2 = (
        torch.randn(*size, x.shape[-1], generator=generator).to(case.q) for x in (case.k, case.v)
    )
    options = case.options | {"k2": k2, "v2": v2, "start2": start2, "end2": count}
    return AttentionCase(*case.positional, options)


def with_tiles(case: AttentionCase) -> AttentionCase:
    """The case with a table of tiles, also where queries are so dense that it would have none."""
    kv_heads = case.k.shape[1 if case.options.get("layout", "bhsd") == "bhsd" else 2]
    index = (x.cpu() for x in case.positional[3:])
    tiles = plan_tiles(*index, group=case.q.shape[1] // kv_heads, memory=(1, 2**40))
    tiles = tiles if tiles is None else tiles.to(case.q.device)
    return AttentionCase(*case.positional, case.options | {"tiles": tiles})


def naive_attention(
    q, k, v, batch, start, position, *, visible=None, k2=None, v2=None, start2=None, end2=None,
    tiles=None, window=None, softcap=None, sinks=None, scale=None, layout="bhsd",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, with everything materialised and heads repeated: small cases only.

    Computes in the dtype it is given, softmax in at least fp32, as plain PyTorch code would.
    `tiles` changes no result.
    """
    if layout == "bshd":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    columns = torch.arange(k.shape[2], device=q.device)
    mask = (columns >= start[:, None]) & (columns <= position[:, None])
    if window is not None:
        mask = mask & (position[:, None] - columns < window)
    if visible is not None:
        mask = mask & visible[batch.long()]
    keys, values = k[batch.long()], v[batch.long()]  # [queries, kv_heads, seq, head_dim]
    if k2 is not None:
        columns = torch.arange(k2.shape[0], device=q.device)
        mask = torch.cat([mask, (columns >= start2[:, None]) & (columns < end2[:, None])], dim=1)
        keys, values = (
            torch.cat([x, y.transpose(0, 1).expand(len(x), -1, -1, -1)], dim=2)
            for x, y in ((keys, k2), (values, v2))
        )
    hidden = ~mask[:, None, :, None]
    keys, values = (
        x.masked_fill(hidden, 0.0).repeat_interleave(group, dim=1) for x in (keys, values)
    )
    scores = torch.einsum("rhd,rhnd->rhn", q, keys) * scale
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("rhn,rhnd->rhd", weights.to(q.dtype), values), lse


def error_ratio(actual: Tensor, baseline: Tensor, exact: Tensor) -> float:
    """Largest error of `actual` over that of `baseline`, both against `exact` in fp64.

    One rounding of the largest value to the dtype is added to the baseline's error, since a
    result that is right before it is rounded cannot do better.
    """
    if exact.numel() == 0:
        return 0.0
    rounding = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    budget = float((baseline.double() - exact).abs().max()) + rounding
    error = float((actual.double() - exact).abs().max())
    return error / budget if budget else (0.0 if error == 0.0 else float("inf"))
