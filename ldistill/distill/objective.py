"""The objective: cross-entropy and distillation over supervised rows, and what to log of them.

    L = (1/N) Σ_i [ (1-α) CE_i + α τ² KL( softmax(z_T/τ) ‖ softmax(z_S/τ) ) ]

N counts the supervised rows of the *global* batch, all ranks and accumulation steps, so neither
the loss nor its gradient depends on how a batch is cut (the paper's section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldistill.distill.gating import GATES, gate
from ldistill.distill.targets import SupervisedRows
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
    "gate",
)


class RowWeights(NamedTuple):
    """Weights of CE and KD, [rows] each, and the gates in them, [kd rows] or None."""

    ce: Tensor
    kd: Tensor
    gates: Tensor | None


@dataclass(frozen=True)
class Objective:
    """How CE and KL are mixed; see ``ldistill.recipe`` for what each switch means."""

    mix: str = "convex"
    t_squared: bool = True
    kl: str = "forward"
    kernels: str = "auto"
    gate: str = "none"

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {self.mix!r}.")
        if self.kl not in DIVERGENCES:
            raise ValueError(f"kl must be one of {', '.join(DIVERGENCES)}, got {self.kl!r}.")
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}.")

    def weights(self, rows: SupervisedRows, gates: Tensor | None = None) -> RowWeights:
        """CE and KD weight of every supervised row, before the division by N.

        Args:
            rows: with their α.
            gates: what α is multiplied by, float32 [kd rows]; None for 1.
        """
        alpha = rows.alpha
        if gates is not None:
            alpha = alpha.index_copy(0, rows.kd_rows, alpha[rows.kd_rows] * gates)
        ce = 1 - alpha if self.mix == "convex" else torch.ones_like(alpha)
        kd = torch.zeros_like(alpha)
        kd[rows.kd_rows] = alpha[rows.kd_rows]
        return RowWeights(ce, kd, gates)

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

        def losses(
            h_s: Tensor, w_s: Tensor, h_t: Tensor | None, w_t: Tensor | None
        ) -> tuple[DistillLoss, RowWeights]:
            gates = None
            if h_t is not None and self.gate != "none":
                gates = gate(self.gate, h_t, w_t, rows.label[rows.kd_rows])
            weights = self.weights(rows, gates)
            result = distill_loss(
                h_s,
                w_s.to(h_s.dtype),
                h_t,
                None if w_t is None else w_t.to(h_t.dtype),
                rows.label,
                ce_weight=weights.ce / total_rows,
                kd_weight=None if h_t is None else weights.kd / total_rows,
                temperature=rows.temperature,
                kd_targets=None if h_t is None else rows.kd_rows,
                kl=self.kl,
                t_squared=self.t_squared,
                kernels=self.kernels,
            )
            return result, weights

        if teacher_hidden is None:
            result, weights = head(hidden, lambda h, w: losses(h, w, None, None))
        else:
            # The teacher's head is entered within the student's: both weights are whole there.
            result, weights = head(
                hidden,
                lambda h, w: teacher.head(teacher_hidden, lambda ht, wt: losses(h, w, ht, wt)),
            )
        metrics = self._metrics(result, rows, weights, sources)
        return result.loss, metrics

    @torch.no_grad()
    def _metrics(
        self, result: DistillLoss, rows: SupervisedRows, weights: RowWeights, sources: int
    ) -> Tensor:
        sums = torch.zeros(sources, len(COLUMNS), device=rows.label.device)
        ones = torch.ones_like(rows.alpha)
        by_row = [ones, weights.ce * result.ce, result.ce, result.student_label, result.extra_mass]
        sums[:, :5].index_add_(0, rows.source, torch.stack([c.float() for c in by_row], dim=1))
        if result.kl is not None and result.kl.numel():
            kd = rows.kd_rows
            scale = rows.temperature[kd] ** 2 if self.t_squared else 1.0
            by_kd = [
                torch.ones_like(result.kl),
                result.kl,
                result.teacher_student,
                result.teacher_label,
                torch.ones_like(result.kl) if weights.gates is None else weights.gates,
            ]
            source = rows.source[kd]
            sums[:, 5:].index_add_(0, source, torch.stack([c.float() for c in by_kd], dim=1))
            sums[:, 1].index_add_(0, source, (weights.kd[kd] * scale * result.kl).float())
        return sums
