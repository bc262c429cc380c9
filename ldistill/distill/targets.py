"""Which positions are supervised, which of them meet the teacher, and what each query sees.

Worked out on the CPU from a batch and the source weights, once per micro-batch: the number of
targets decides tensor shapes, and finding it on the GPU would stall it.

A *target* is a position whose next token carries a label. A *query* is a position the teacher
computes: with ``kv_scope`` ``full`` just the targets of distilling sources, because such a query
depends on no other query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldistill.models.processor import IGNORE
from ldistill.sources import SourceWeights

Scope = Literal["full", "prompt", "visual", "own"]
Known = Callable[[Tensor], Tensor]
"""int64 token ids → bool, whether the teacher knows them."""


class _Tensors:
    """Dataclass of tensors that moves as one."""

    def to(self, device: torch.device, non_blocking: bool = True):
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        moved = (v if v is None else v.to(device, non_blocking=non_blocking) for v in values)
        return type(self)(*moved)


@dataclass
class Queries(_Tensors):
    """Positions the teacher computes, sorted by document.

    token, rotary:        int64 [queries]: input token and RoPE position.
    batch, start, index:  int64 [queries]: batch row, its document's first position, its own one.
    visible:              bool [batch, seq] | None: shared K/V that may be read (None: all).
    own:                  int64 [own] | None: queries whose own keys and values other queries see.
    start2, end2:         int64 [queries] | None: range of ``own`` that a query sees.
    wanted:               int64 [taught] | None: queries whose logits are wanted (None: all).
    tiles:                int32 [tiles, 2] | None: how the attention kernel cuts the queries.
    """

    token: Tensor
    rotary: Tensor
    batch: Tensor
    start: Tensor
    index: Tensor
    visible: Tensor | None = None
    own: Tensor | None = None
    start2: Tensor | None = None
    end2: Tensor | None = None
    wanted: Tensor | None = None
    tiles: Tensor | None = None

    def __len__(self) -> int:
        return self.token.shape[0]

    def first_own_within(self, window: int, seq: int) -> Tensor:
        """``start2`` for a layer whose queries see ``window`` positions, themselves included, of
        batch rows of length ``seq``."""
        flat = self.batch * seq + self.index  # [queries], ascending
        first = torch.searchsorted(flat[self.own], flat - window + 1)
        return torch.maximum(self.start2, first)


@dataclass
class Targets(_Tensors):
    """Positions that carry a label, in the order of the flattened batch.

    flat:      int64 [targets]: index into the flattened [batch × seq].
    label:     int64 [targets]: the next token.
    source:    int64 [targets]: index into ``SourceWeights.names``.
    alpha, temperature: float32 [targets].
    taught:    int64 [taught]: those that distil (α > 0), as indices into the targets.
    """

    flat: Tensor
    label: Tensor
    source: Tensor
    alpha: Tensor
    temperature: Tensor
    taught: Tensor

    def __len__(self) -> int:
        return self.flat.shape[0]


@dataclass
class Supervision(_Tensors):
    """All that the objective must know about a micro-batch's positions."""

    targets: Targets
    queries: Queries


def supervise(
    batch: dict[str, Tensor], weights: SourceWeights, scope: Scope, known: Known
) -> Supervision:
    """Targets and queries of a micro-batch.

    Args:
        batch: of ``ldistill.data.collate``; ``doc_source`` indexes ``weights.names``.
        weights: α and τ by source.
        scope: of the shared K/V.
        known: of token ids, which have an embedding of the teacher's; the others stand for
            pictures, or are the student's own.
    """
    labels = batch["labels"].flatten()  # [batch × seq], as are all that follow until `flat`
    flat = torch.nonzero(labels != IGNORE).flatten()
    source = batch["doc_source"][_document_at(batch)[flat]]  # [targets] from here on
    alpha = torch.tensor(weights.alpha, dtype=torch.float32)[source]
    temperature = torch.tensor(weights.temperature, dtype=torch.float32)[source]
    taught = torch.nonzero((alpha > 0) & known(batch["input_ids"].flatten()[flat])).flatten()
    targets = Targets(flat, labels[flat], source, alpha, temperature, taught)
    return Supervision(targets, queries_for(batch, flat[taught], scope, known))


def queries_for(batch: dict[str, Tensor], wanted: Tensor, scope: Scope, known: Known) -> Queries:
    """What the teacher must compute to give its logits at ``wanted`` positions.

    Args:
        batch: as for :func:`supervise`.
        wanted: int64 [taught], flat positions, ascending.
        scope: ``full``, ``prompt``, ``visual``, or ``own`` (text alone, no shared K/V at all: what
            the teacher knows without the picture).
        known: as for :func:`supervise`.
    """
    if scope == "full":
        return _gather(batch, wanted)
    # Here the teacher has keys and values of its own at some positions (`own_at`), which later
    # queries of the document read: so these positions are queries too, wanted or not.
    ids, doc = batch["input_ids"].flatten(), _document_at(batch)
    distilling = torch.zeros(int(doc.max()) + 2, dtype=torch.bool)  # the last one for padding, -1
    distilling[doc[wanted]] = True
    text = known(ids) & (doc >= 0) & distilling[doc]
    # Its own text under `prompt` is the answer, one after each target; else all of the text.
    answer = F.pad(batch["labels"][:, :-1] != IGNORE, (1, 0)).flatten()
    own_at = answer & text if scope == "prompt" else text
    visible = torch.zeros_like(own_at) if scope == "own" else ~own_at
    flat = torch.nonzero(own_at.index_fill(0, wanted, True)).flatten()
    queries = _gather(batch, flat)
    # [batch × seq] → [batch, seq], as the kernel has the shared K/V.
    queries.visible = visible.view(batch["input_ids"].shape)
    # Own positions are numbered through the batch; a query sees those of its document up to itself.
    queries.own = torch.nonzero(own_at[flat]).flatten()
    queries.end2 = own_at[flat].cumsum(0)  # [queries]: own ones up to here, itself included
    first_of_document = torch.searchsorted(doc[flat], doc[flat])
    queries.start2 = F.pad(queries.end2, (1, 0))[first_of_document]
    queries.wanted = torch.searchsorted(flat, wanted)
    return queries


def _gather(batch: dict[str, Tensor], flat: Tensor) -> Queries:
    seq = batch["input_ids"].shape[1]
    index, place = flat % seq, batch["position_ids"].flatten()[flat]
    # Queries stand at text, where all axes of a rotary position are equal.
    rotary = batch["rotary"][0].flatten()[flat] if "rotary" in batch else place
    return Queries(batch["input_ids"].flatten()[flat], rotary, flat // seq, index - place, index)


def _document_at(batch: dict[str, Tensor]) -> Tensor:
    """Document number over the whole micro-batch of every flat position; -1 on padding."""
    documents = batch["document_ids"]  # [batch, seq], numbered row by row
    counts = torch.bincount(batch["doc_batch"], minlength=documents.shape[0])
    offset = F.pad(counts.cumsum(0)[:-1], (1, 0))
    return torch.where(documents >= 0, documents + offset[:, None], -1).flatten()
