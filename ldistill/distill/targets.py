"""Which rows are supervised, which of them meet the teacher, and what each teacher row sees.

Worked out on the CPU from a batch and the source weights, once per micro-batch: the number of rows
decides tensor shapes, and finding it on the GPU would stall it.

A *supervised row* is a position whose next token carries a label. A *teacher row* is a position
the teacher computes: with ``kv_scope`` ``full`` just the supervised rows of distilling sources,
because such a row depends on no other teacher row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ldistill.sources import SourceWeights

SCOPES = ("full", "prompt", "visual")
IGNORE = -100


class _Tensors:
    """Dataclass of tensors that moves as one."""

    def to(self, device: torch.device):
        moved = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, (Tensor, _Tensors)):
                value = (
                    value.to(device, non_blocking=True)
                    if isinstance(value, Tensor)
                    else value.to(device)
                )
            moved[f.name] = value
        return type(self)(**moved)


@dataclass
class TeacherRows(_Tensors):
    """Rows the teacher computes, sorted by document.

    token, rotary:        int64 [rows]: input token and RoPE position.
    batch, start, index:  int64 [rows]: memory row, first memory position of the document, own one.
    visible:              bool [batch, seq] | None: memory positions the teacher may read.
    own:                  int64 [own] | None: rows whose own keys and values other rows see.
    start2, end2:         int64 [rows] | None: range of ``own`` that a row sees.
    logits:               int64 [kd rows] | None: rows whose logits are wanted (None: all).
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
    logits: Tensor | None = None

    def __len__(self) -> int:
        return self.token.shape[0]


@dataclass
class SupervisedRows(_Tensors):
    """Rows that carry a label, in row-major order.

    flat:      int64 [rows]: index into the flattened [batch × seq].
    label:     int64 [rows]: the next token.
    source:    int64 [rows]: index into ``SourceWeights.names``.
    alpha, temperature: float32 [rows].
    kd_rows:   int64 [kd rows]: those with α > 0, as indices into the supervised rows.
    """

    flat: Tensor
    label: Tensor
    source: Tensor
    alpha: Tensor
    temperature: Tensor
    kd_rows: Tensor

    def __len__(self) -> int:
        return self.flat.shape[0]


@dataclass
class RowPlan(_Tensors):
    """All that the objective must know about a micro-batch's rows."""

    supervised: SupervisedRows
    teacher: TeacherRows


def plan_rows(
    batch: dict[str, Tensor], weights: SourceWeights, scope: str, teacher_vocab: int
) -> RowPlan:
    """Rows of a micro-batch.

    Args:
        batch: of ``ldistill.data.collate``; ``doc_source`` indexes ``weights.names``.
        weights: α and τ by source.
        scope: ``full``, ``prompt`` or ``visual``.
        teacher_vocab: tokens from this id on have no teacher embedding: image positions.
    """
    labels, source_at = batch["labels"], _source_at(batch)
    flat = torch.nonzero(labels.flatten() != IGNORE).flatten()
    source = source_at.flatten()[flat]
    alpha = torch.tensor(weights.alpha, dtype=torch.float32)
    temperature = torch.tensor(weights.temperature, dtype=torch.float32)
    known = batch["input_ids"].flatten()[flat] < teacher_vocab
    kd_rows = torch.nonzero((alpha[source] > 0) & known).flatten()
    supervised = SupervisedRows(
        flat, labels.flatten()[flat], source, alpha[source], temperature[source], kd_rows
    )
    teacher = teacher_rows(batch, flat[kd_rows], scope, teacher_vocab)
    return RowPlan(supervised, teacher)


def teacher_rows(
    batch: dict[str, Tensor], wanted: Tensor, scope: str, teacher_vocab: int
) -> TeacherRows:
    """Teacher rows whose logits at ``wanted`` positions are asked for.

    Args:
        batch: as for :func:`plan_rows`.
        wanted: int64 [kd rows], flat positions, ascending.
        scope: ``full``, ``prompt``, ``visual``, or ``own`` (text alone, no student memory at all:
            what the teacher knows without the picture).
        teacher_vocab: as for :func:`plan_rows`.
    """
    if scope == "full":
        return _gather(batch, wanted)
    ids = batch["input_ids"].flatten()
    doc = _global_document(batch)
    distilling = torch.zeros(int(doc.max()) + 2, dtype=torch.bool)
    distilling[doc[wanted]] = True
    text = (ids < teacher_vocab) & (doc >= 0) & distilling[doc]
    if scope == "prompt":
        own_at = _answer_positions(batch["labels"]).flatten() & text
        visible = ~own_at
    elif scope in ("visual", "own"):
        own_at = text
        visible = ~own_at if scope == "visual" else torch.zeros_like(own_at)
    else:
        raise ValueError(f"kv_scope must be one of {', '.join(SCOPES)}, got {scope!r}.")
    needed = own_at.clone()
    needed[wanted] = True
    rows = _gather(batch, torch.nonzero(needed).flatten())
    rows.visible = visible.view(batch["input_ids"].shape)
    _attach_own(rows, torch.nonzero(needed).flatten(), own_at, doc, wanted)
    return rows


def _gather(batch: dict[str, Tensor], flat: Tensor) -> TeacherRows:
    seq = batch["input_ids"].shape[1]
    rotary = batch["position_ids"].flatten()[flat]
    index = flat % seq
    return TeacherRows(
        token=batch["input_ids"].flatten()[flat],
        rotary=rotary,
        batch=flat // seq,
        start=index - rotary,
        index=index,
    )


def _attach_own(
    rows: TeacherRows, flat: Tensor, own_at: Tensor, doc: Tensor, wanted: Tensor
) -> None:
    """Number the rows with keys and values of their own and say which of them each row sees."""
    is_own = own_at[flat]
    rows.own = torch.nonzero(is_own).flatten()
    rows.end2 = is_own.long().cumsum(0)
    first_of_doc = torch.searchsorted(doc[flat], doc[flat], right=False)
    before = torch.cat([torch.zeros(1, dtype=torch.long), rows.end2])
    rows.start2 = before[first_of_doc]
    rows.logits = torch.searchsorted(flat, wanted)


def _source_at(batch: dict[str, Tensor]) -> Tensor:
    """Source of every position, [batch, seq] (0 on padding, where nothing is supervised)."""
    doc = _global_document(batch).view(batch["input_ids"].shape)
    padded = torch.cat([batch["doc_source"], torch.zeros(1, dtype=torch.long)])
    return padded[doc]


def _global_document(batch: dict[str, Tensor]) -> Tensor:
    """Document number over the whole micro-batch of every flat position; -1 on padding."""
    documents = batch["document_ids"]
    rows = documents.shape[0]
    counts = torch.bincount(batch["doc_batch"], minlength=rows)
    offset = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)[:-1]])
    return torch.where(documents >= 0, documents + offset[:, None], -1).flatten()


def _answer_positions(labels: Tensor) -> Tensor:
    """Positions of the labelled tokens themselves: one after each supervised row."""
    answer = torch.zeros_like(labels, dtype=torch.bool)
    answer[:, 1:] = labels[:, :-1] != IGNORE
    return answer
