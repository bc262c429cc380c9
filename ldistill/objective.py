"""The objective: cross-entropy and distillation over supervised rows, and what to log of them.

    L = (1/N) Σ_i [ (1-α) CE_i + α τ² KL( softmax(z_T/τ) ‖ softmax(z_S/τ) ) ]

N counts the supervised rows of the *global* batch, all ranks and accumulation steps, so neither
the loss nor its gradient depends on how a batch is cut (the paper's section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldistill.rows import SupervisedRows
from ldistill_kernels import DistillLoss, distill_loss

MIXES = ("convex", "additive")
DIVERGENCES = ("forward", "reverse", "jsd")

# Columns of the metrics matrix, all sums over rows.
COLUMNS = (
    "rows",
    "loss",
    "ce",
    "student_label",
    "extra_mass",
    "kd_rows",
    "kl",
    "teacher_student",
    "teacher_label",
)


@dataclass(frozen=True)
class Objective:
    """How CE and KL are mixed; see ``ldistill.recipe`` for what each switch means."""

    mix: str = "convex"
    t_squared: bool = True
    kl: str = "forward"
    kernels: str = "auto"

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {self.mix!r}.")
        if self.kl not in DIVERGENCES:
            raise ValueError(f"kl must be one of {', '.join(DIVERGENCES)}, got {self.kl!r}.")

    def weights(self, rows: SupervisedRows) -> tuple[Tensor, Tensor]:
        """CE and KD weight of every supervised row, before the division by N."""
        ce = 1 - rows.alpha if self.mix == "convex" else torch.ones_like(rows.alpha)
        kd = torch.zeros_like(rows.alpha)
        kd[rows.kd_rows] = rows.alpha[rows.kd_rows]
        return ce, kd

    def __call__(
        self,
        hidden: Tensor,
        head: Any,
        rows: SupervisedRows,
        *,
        teacher_hidden: Tensor | None,
        teacher: Any,
        total_rows: float,
        sources: int,
    ) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch as its share of the global batch.

        Args:
            hidden: student states of the supervised rows, [rows, hidden].
            head: the student's ``LMHead``.
            rows: labels, α, τ, and which rows distil.
            teacher_hidden: [kd rows, hidden]; None: no rank distils in this micro-batch.
            teacher: whose head goes with it.
            total_rows: N.
            sources: number of sources, for the metrics.

        Returns:
            The scalar loss and detached sums by source, float32 [sources, len(COLUMNS)].
        """
        ce_weight, kd_weight = self.weights(rows)

        def losses(h_s: Tensor, w_s: Tensor, h_t: Tensor | None, w_t: Tensor | None) -> DistillLoss:
            return distill_loss(
                h_s,
                w_s.to(h_s.dtype),
                h_t,
                None if w_t is None else w_t.to(h_t.dtype),
                rows.label,
                ce_weight=ce_weight / total_rows,
                kd_weight=None if h_t is None else kd_weight / total_rows,
                temperature=rows.temperature,
                kd_rows=None if h_t is None else rows.kd_rows,
                kl=self.kl,
                t_squared=self.t_squared,
                kernels=self.kernels,
            )

        if teacher_hidden is None:
            result = head(hidden, lambda h, w: losses(h, w, None, None))
        else:
            # The teacher's head is entered within the student's: both weights are whole there.
            result = head(
                hidden,
                lambda h, w: teacher.head(teacher_hidden, lambda ht, wt: losses(h, w, ht, wt)),
            )
        metrics = self._metrics(result, rows, ce_weight, kd_weight, sources)
        return result.loss, metrics

    @torch.no_grad()
    def _metrics(
        self, result: DistillLoss, rows: SupervisedRows, ce_w: Tensor, kd_w: Tensor, sources: int
    ) -> Tensor:
        sums = torch.zeros(sources, len(COLUMNS), device=rows.label.device)
        ones = torch.ones_like(rows.alpha)
        by_row = [ones, ce_w * result.ce, result.ce, result.student_label, result.extra_mass]
        sums[:, :5].index_add_(0, rows.source, torch.stack([c.float() for c in by_row], dim=1))
        if result.kl is not None and result.kl.numel():
            kd = rows.kd_rows
            scale = rows.temperature[kd] ** 2 if self.t_squared else 1.0
            by_kd = [
                torch.ones_like(result.kl),
                result.kl,
                result.teacher_student,
                result.teacher_label,
            ]
            source = rows.source[kd]
            sums[:, 5:].index_add_(0, source, torch.stack([c.float() for c in by_kd], dim=1))
            sums[:, 1].index_add_(0, source, (kd_w[kd] * scale * result.kl).float())
        return sums
