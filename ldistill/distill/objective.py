"""The objective: cross-entropy and distillation over targets, and what to log of them.

    L = (1/N) Σ_i [ (1-α) CE_i + α τ² KL( softmax(z_T/τ) ‖ softmax(z_S/τ) ) ]

N counts the targets of the *global* batch, all ranks and accumulation steps, so neither the loss
nor its gradient depends on how a batch is cut (the paper's section 3.2). A function of states and
heads' weights alone: who calls it sees to it that the weights are whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldistill.distill.targets import Targets
from ldistill.models.logits import LogitScaling
from ldistill_kernels import DistillLoss, distill_loss

Combination = Literal["convex", "additive"]
Divergence = Literal["forward", "reverse", "jsd"]
Gate = Literal["none", "agreement", "confidence"]

# Columns of the metrics matrix, all sums over targets (called rows in what a run logs).
_OF_ALL = ("rows", "loss", "ce", "student_label", "extra_mass")
_OF_TAUGHT = ("kd_rows", "kl", "teacher_student", "teacher_label", "gate")
COLUMNS = (*_OF_ALL, *_OF_TAUGHT)


@dataclass(frozen=True)
class Objective:
    """How CE and KL are mixed; see ``ldistill.recipe`` for what each switch means."""

    combine: Combination = "convex"
    t_squared: bool = True
    kl: Divergence = "forward"
    kernels: str = "auto"
    gate: Gate = "none"

    def __call__(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor] | None,
        targets: Targets,
        *,
        total: float,
        sources: int,
        scaling: LogitScaling = LogitScaling(),
        teacher_scaling: LogitScaling = LogitScaling(),
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
        alpha, taught = targets.alpha, targets.taught  # [targets], indices [taught]
        gates = torch.ones_like(taught, dtype=alpha.dtype)
        if h_t is not None:
            w_t = w_t.to(h_t.dtype)  # a head may be kept wider than the states
            if self.gate != "none":
                gates = gate(self.gate, h_t, w_t, targets.label[taught], teacher_scaling)
                alpha = alpha.index_copy(0, taught, alpha[taught] * gates)
        # Weights of every target, before the division by N.
        ce = 1 - alpha if self.combine == "convex" else torch.ones_like(alpha)
        # A target may have α and yet no teacher: what it predicts from is the student's own token.
        kd = torch.zeros_like(alpha).index_copy(0, taught, alpha[taught])
        result = distill_loss(
            h_s,
            w_s.to(h_s.dtype),
            h_t,
            w_t,
            targets.label,
            # Divided by N here, so that the sum over micro-batches and ranks is the global loss.
            ce_weight=ce / total,
            kd_weight=None if h_t is None else kd / total,
            temperature=targets.temperature,
            kd_targets=None if h_t is None else taught,
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
        return result.loss, self._metrics(result, targets, ce, kd, gates, sources)

    @torch.no_grad()
    def _metrics(
        self, r: DistillLoss, targets: Targets, ce: Tensor, kd: Tensor, gates: Tensor, sources: int
    ) -> Tensor:
        sums, taught = torch.zeros(sources, len(COLUMNS), device=ce.device), targets.taught
        of_all = [torch.ones_like(ce), ce * r.ce, r.ce, r.student_label, r.extra_mass]
        _add_by_source(sums[:, : len(_OF_ALL)], targets.source, of_all)  # each [targets]
        if len(r.kl):
            source = targets.source[taught]
            of_taught = [torch.ones_like(r.kl), r.kl, r.teacher_student, r.teacher_label, gates]
            _add_by_source(sums[:, len(_OF_ALL) :], source, of_taught)  # each [taught]
            # The KD part of the column `loss`, whose CE part was added with all targets.
            scale = targets.temperature[taught] ** 2 if self.t_squared else 1.0
            sums[:, 1].index_add_(0, source, (kd[taught] * scale * r.kl).float())
        return sums


def _add_by_source(sums: Tensor, source: Tensor, columns: list[Tensor]) -> None:
    sums.index_add_(0, source, torch.stack([c.float() for c in columns], dim=1))


@torch.no_grad()
def gate(kind: str, hidden: Tensor, weight: Tensor, label: Tensor, scaling: LogitScaling) -> Tensor:
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
    gates, at_once = [], 1024  # teacher logits of so many targets exist at a time
    for h, y in zip(hidden.split(at_once), label.split(at_once)):
        logits = scaling((h @ weight.T).float())  # [targets, vocabulary]
        best = logits.amax(-1)
        if kind == "confidence":
            gates.append(torch.exp(best - logits.logsumexp(-1)))
        else:
            known = y < logits.shape[1]
            own = logits.gather(1, torch.where(known, y, 0)[:, None])[:, 0]
            gates.append(torch.exp(own - best) * known)
    return torch.cat(gates)
