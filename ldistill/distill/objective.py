"""The objective: cross-entropy and distillation over targets, and what to log of them.

    L = (1/N) Σ_i [ (1-α) CE_i + α τ² KL( softmax(z_T/τ) ‖ softmax(z_S/τ) ) ]

N counts the targets of the *global* batch, all ranks and accumulation steps, so neither the loss
nor its gradient depends on how a batch is cut (the paper's section 3.2). A function of states and
heads' weights alone: who calls it sees to it that the weights are whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldistill.distill.targets import Targets
from ldistill.models.logits import LogitScaling
from ldistill_kernels import DistillLoss, distill_loss

Combination = Literal["convex", "additive"]
Divergence = Literal["forward", "reverse", "jsd"]
Gate = Literal["none", "agreement", "confidence"]
NO_SCALING = LogitScaling()
_AT_ONCE = 1024  # teacher logits of so many targets exist at a time, for a gate

# Columns of the metrics matrix, all sums over targets (called rows in what a run logs).
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


class Weights(NamedTuple):
    """Weights of CE and KD, [targets] each, and the gates in them, [taught] or None."""

    ce: Tensor
    kd: Tensor
    gates: Tensor | None


@dataclass(frozen=True)
class Objective:
    """How CE and KL are mixed; see ``ldistill.recipe`` for what each switch means."""

    combine: Combination = "convex"
    t_squared: bool = True
    kl: Divergence = "forward"
    kernels: str = "auto"
    gate: Gate = "none"

    def weights(self, targets: Targets, gates: Tensor | None = None) -> Weights:
        """CE and KD weight of every target, before the division by N.

        Args:
            targets: with their α.
            gates: what α is multiplied by, float32 [taught]; None for 1.
        """
        alpha, taught = targets.alpha, targets.taught  # [targets], indices [taught]
        if gates is not None:
            alpha = alpha.index_copy(0, taught, alpha[taught] * gates)
        ce = 1 - alpha if self.combine == "convex" else torch.ones_like(alpha)
        # A target may have α and yet no teacher: what it predicts from is the student's own token.
        kd = torch.zeros_like(alpha)
        kd[taught] = alpha[taught]
        return Weights(ce, kd, gates)

    def __call__(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor] | None,
        targets: Targets,
        *,
        total: float,
        sources: int,
        scaling: LogitScaling = NO_SCALING,
        teacher_scaling: LogitScaling = NO_SCALING,
    ) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch as its share of the global batch.

        Args:
            student: states [targets, hidden] and the head's weight [vocabulary, hidden].
            teacher: states [taught, hidden of the teacher] and its head's weight; None: no rank
                distils in this micro-batch.
            targets: labels, α, τ, and which of them are taught.
            total: N.
            sources: number of sources, for the metrics.
            scaling, teacher_scaling: of the student's and the teacher's logits.

        Returns:
            The scalar loss and detached sums by source, float32 [sources, len(COLUMNS)].
        """
        # h: [targets, hidden] and [taught, hidden of the teacher]; w: [vocabulary, hidden].
        (h_s, w_s), (h_t, w_t) = student, teacher or (None, None)
        gates = None
        if h_t is not None:
            w_t = w_t.to(h_t.dtype)  # a head may be kept wider than the states
            if self.gate != "none":
                gates = gate(self.gate, h_t, w_t, targets.label[targets.taught], teacher_scaling)
        weights = self.weights(targets, gates)
        result = distill_loss(
            h_s,
            w_s.to(h_s.dtype),
            h_t,
            w_t,
            targets.label,
            # Divided by N here, so that the sum over micro-batches and ranks is the global loss.
            ce_weight=weights.ce / total,
            kd_weight=None if h_t is None else weights.kd / total,
            temperature=targets.temperature,
            kd_targets=None if h_t is None else targets.taught,
            # Either may have rows behind its tokens that stand for none (InternVL's are fewer).
            vocab=None if h_t is None else min(len(w_s), len(w_t)),
            kl=self.kl,
            t_squared=self.t_squared,
            logit_scale_s=scaling.scale,
            softcap_s=scaling.softcap,
            logit_scale_t=teacher_scaling.scale,
            softcap_t=teacher_scaling.softcap,
            kernels=self.kernels,
        )
        return result.loss, self._metrics(result, targets, weights, sources)

    @torch.no_grad()
    def _metrics(
        self, result: DistillLoss, targets: Targets, weights: Weights, sources: int
    ) -> Tensor:
        sums = torch.zeros(sources, len(COLUMNS), device=targets.label.device)
        ones = torch.ones_like(targets.alpha)
        of_all = [ones, weights.ce * result.ce, result.ce, result.student_label, result.extra_mass]
        _add_by_source(sums[:, :5], targets.source, of_all)  # each [targets]
        if result.kl is not None and result.kl.numel():
            taught, ones = targets.taught, torch.ones_like(result.kl)
            gates = ones if weights.gates is None else weights.gates
            of_taught = [ones, result.kl, result.teacher_student, result.teacher_label, gates]
            source = targets.source[taught]
            _add_by_source(sums[:, 5:], source, of_taught)  # each [taught]
            # The KD part of the column `loss`, whose CE part was added with all targets.
            scale = targets.temperature[taught] ** 2 if self.t_squared else 1.0
            sums[:, 1].index_add_(0, source, (weights.kd[taught] * scale * result.kl).float())
        return sums


def _add_by_source(sums: Tensor, source: Tensor, columns: list[Tensor]) -> None:
    sums.index_add_(0, source, torch.stack([c.float() for c in columns], dim=1))


@torch.no_grad()
def gate(
    kind: str,
    hidden: Tensor,
    weight: Tensor,
    label: Tensor,
    scaling: LogitScaling = NO_SCALING,
) -> Tensor:
    """How far to trust the teacher, target by target: an option beyond the paper.

    The teacher reads the picture through the student's keys and values and may misread it. A gate
    g in [0, 1] scales each taught target's α, so that one where the teacher is unsure, or
    contradicts the label, leans on its label instead. With p_T the teacher's distribution at
    temperature 1:

    * ``agreement``:  g = p_T(label) / max p_T: 1 where the label is what the teacher would say;
    * ``confidence``: g = max p_T: 1 where the teacher is sure, right or wrong.

    Args:
        kind: ``agreement`` or ``confidence``.
        hidden: teacher states, [taught, hidden].
        weight: the teacher's head, [teacher vocabulary, hidden].
        label: int64 [taught]; one that the teacher does not know counts as contradicted.
        scaling: of the teacher's logits.

    Returns:
        float32 [taught].
    """
    parts = [
        _gate(kind, scaling((h @ weight.T).float()), y)
        for h, y in zip(hidden.split(_AT_ONCE), label.split(_AT_ONCE), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _gate(kind: str, logits: Tensor, label: Tensor) -> Tensor:
    best = logits.amax(-1)  # [taught, vocabulary] → [taught]
    if kind == "confidence":
        return torch.exp(best - logits.logsumexp(-1))
    known = label < logits.shape[1]
    own = logits.gather(1, torch.where(known, label, 0)[:, None])[:, 0]
    return torch.exp(own - best) * known
