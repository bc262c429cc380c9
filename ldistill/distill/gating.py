"""How far to trust the teacher, token by token: an option beyond the paper.

The teacher reads the picture through the student's memory and may misread it. A gate g in [0, 1]
scales each distilling row's α, so that a row where the teacher is unsure, or contradicts the label,
leans on its label instead:

* ``agreement``:  g = p_T(label) / max p_T: 1 where the label is what the teacher would say;
* ``confidence``: g = max p_T: 1 where the teacher is sure, right or wrong.

p_T is the teacher's distribution at temperature 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATES = ("none", "agreement", "confidence")
_ROWS_AT_ONCE = 1024  # logits of so many rows exist at a time


@torch.no_grad()
def gate(kind: str, hidden: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    """The gate of every distilling row.

    Args:
        kind: ``agreement`` or ``confidence``.
        hidden: teacher states, [kd rows, hidden].
        weight: the teacher's head, [teacher vocabulary, hidden].
        label: int64 [kd rows]; one that the teacher does not know counts as contradicted.

    Returns:
        float32 [kd rows] in [0, 1].
    """
    parts = [
        _gate(kind, (h @ weight.to(h.dtype).T).float(), y)
        for h, y in zip(hidden.split(_ROWS_AT_ONCE), label.split(_ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _gate(kind: str, logits: Tensor, label: Tensor) -> Tensor:
    best = logits.amax(-1)
    if kind == "confidence":
        return torch.exp(best - logits.logsumexp(-1))
    known = label < logits.shape[1]
    own = logits.gather(1, torch.where(known, label, 0)[:, None])[:, 0]
    return torch.exp(own - best) * known
