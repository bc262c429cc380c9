"""The optimizer's groups, and what holds of them when a run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from ldistill.models.student import Student


class Rates(NamedTuple):
    """A learning rate for each part of a student."""

    vision: float
    projector: float
    decoder: float


def parameter_groups(student: Student, rates: Rates, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: vision, projector, decoder with rates of their own; no decay on norms."""
    groups = []
    known: set[int] = set()
    parts = (student.projector, student.vision, student)  # a tower may hold the projector
    for part, rate in zip(parts, (rates.projector, rates.vision, rates.decoder)):
        trained = [p for p in part.parameters() if p.requires_grad and id(p) not in known]
        known.update(map(id, trained))
        matrices = [p for p in trained if len(_shape(p)) > 1 and _shape(p).numel()]
        vectors = [p for p in trained if len(_shape(p)) <= 1]
        for params, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if params:
                groups.append({"params": params, "lr": rate, "weight_decay": decay})
    return groups


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also while ZeRO-3 holds only a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def hold_options(
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    groups: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> None:
    """Let this start's rates and options hold, which a checkpoint's have just replaced.

    Unchanged ones are the same to the bit. DeepSpeed's ZeRO-3, which gives all groups the options
    of the first when it loads the universal format, is put right by the same.

    ``groups`` are those of :func:`parameter_groups` as this start asks for them, ``options`` what
    all of them share, such as ``betas``. Schedules that are no function of the step keep their own.
    """
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [group["lr"] for group in groups]
        shares = [share(schedule.last_epoch) for share in schedule.lr_lambdas]
        schedule._last_lr = [r * s for r, s in zip(schedule.base_lrs, shares, strict=True)]
    rates = schedule.get_last_lr()
    for group, wanted, rate in zip(optimizer.param_groups, groups, rates, strict=True):
        group |= {name: value for name, value in options.items() if name in group}
        group["weight_decay"] = wanted["weight_decay"]
        group["initial_lr"], group["lr"] = wanted["lr"], rate
