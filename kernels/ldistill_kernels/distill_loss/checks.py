"""Argument checks of `distill_loss`: every message names the argument and what it got.

Checks of values read tensors back, which would stall a GPU: they run for CPU tensors, and for
CUDA tensors only with `LDISTILL_DEBUG=1`.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ldistill_kernels.distill_loss.targets import DIVERGENCES

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNELS = ("auto", "triton", "reference")


def checks_values(device: torch.device) -> bool:
    """Whether values may be read back for checking."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("LDISTILL_DEBUG") == "1"


def check_tensors(h_s: Tensor, w_s: Tensor, labels: Tensor) -> None:
    """Shapes, dtypes and devices of the student's side."""
    _check_pair("h_s", h_s, "w_s", w_s)
    if labels.dtype != torch.int64 or labels.shape != h_s.shape[:1]:
        raise ValueError(
            f"labels must be int64 [targets], {h_s.shape[0]} as in h_s, got {_describe(labels)}"
        )
    _check_device("labels", labels, h_s)


def check_teacher(h_s: Tensor, h_t: Tensor | None, w_t: Tensor | None) -> None:
    """Shapes, dtypes and devices of the teacher's side."""
    if (h_t is None) != (w_t is None):
        missing, given = ("h_t", "w_t") if h_t is None else ("w_t", "h_t")
        raise ValueError(f"{missing} is None but {given} is given: pass both or neither")
    if h_t is None:
        return
    _check_pair("h_t", h_t, "w_t", w_t)
    _check_device("h_t", h_t, h_s)
    if (h_t.dtype == torch.float64) != (h_s.dtype == torch.float64):
        raise ValueError(f"h_t is {h_t.dtype} and h_s {h_s.dtype}: float64 needs both")


def resolve_vocab(w_s: Tensor, w_t: Tensor | None, vocab: int | None) -> int:
    """Length of the vocabulary that the divergence compares."""
    vocab_s = w_s.shape[0]
    if w_t is None:
        limit = vocab_s
    else:
        limit = min(vocab_s, w_t.shape[0])
        if vocab is None and w_t.shape[0] > vocab_s:
            raise ValueError(
                f"w_t has a vocabulary of {w_t.shape[0]}, larger than the {vocab_s} of w_s: "
                "check the pair, or pass vocab to compare the first entries only"
            )
    if vocab is None:
        return limit
    if not 1 <= vocab <= limit:
        raise ValueError(f"vocab must be between 1 and {limit}, the shorter head, got {vocab}")
    return vocab


def check_kd_targets(
    h_s: Tensor, h_t: Tensor | None, kd_targets: Tensor | None, values: bool
) -> None:
    """kd_targets: the targets that have a teacher, sorted and unique."""
    if h_t is None:
        if kd_targets is not None and kd_targets.numel():
            raise ValueError(f"kd_targets names {kd_targets.numel()} targets but h_t is None")
        return
    targets, taught = h_s.shape[0], h_t.shape[0]
    if kd_targets is None:
        if targets != taught:
            raise ValueError(
                f"h_t has {taught} targets and h_s {targets}: pass kd_targets, which ones they are"
            )
        return
    if kd_targets.dtype != torch.int64 or kd_targets.shape != (taught,):
        raise ValueError(
            f"kd_targets must be int64 [{taught}], one per state in h_t, "
            f"got {_describe(kd_targets)}"
        )
    _check_device("kd_targets", kd_targets, h_s)
    if taught > targets:
        raise ValueError(
            f"kd_targets must be unique targets of h_s: {taught} given for {targets} targets"
        )
    if values and taught:
        low, high = int(kd_targets[0]), int(kd_targets[-1])
        if low < 0 or high >= targets:
            raise ValueError(f"kd_targets must lie in [0, {targets}), got {low} to {high}")
        if bool((kd_targets[1:] <= kd_targets[:-1]).any()):
            raise ValueError("kd_targets must be sorted and unique")


def check_labels(labels: Tensor, vocab_s: int, ignore_index: int, values: bool) -> None:
    """Every label lies in the student's vocabulary or is ignore_index."""
    if not values:
        return
    wrong = ((labels < 0) | (labels >= vocab_s)) & (labels != ignore_index)
    if bool(wrong.any()):
        target = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocab_s}) or be ignore_index {ignore_index}, "
            f"got {int(labels[target])} at target {target}"
        )


def check_kd_weight(kd_weight: Tensor | float | None, taught: int, h_t: Tensor | None) -> None:
    """A positive weight needs a teacher to compare with."""
    if h_t is None and isinstance(kd_weight, (int, float)) and kd_weight > 0:
        raise ValueError(f"kd_weight is {kd_weight} but h_t is None: no teacher to compare with")
    if h_t is not None and taught and kd_weight is None:
        raise ValueError("kd_weight is None but h_t is given: pass the weight of the divergence")


def check_kd_coverage(
    kd_weight: Tensor,
    labels: Tensor,
    kd_targets: Tensor | None,
    ignore_index: int,
    values: bool,
) -> None:
    """Every target with a positive kd_weight and a label has a teacher."""
    if not values:
        return
    lost = (kd_weight > 0) & (labels != ignore_index)
    if kd_targets is not None:
        lost[kd_targets] = False
    if bool(lost.any()):
        target = int(lost.nonzero()[0])
        raise ValueError(
            f"kd_weight is {float(kd_weight[target]):g} at target {target}, which has no state in "
            "h_t: add it to kd_targets or set its weight to 0"
        )


def per_target(
    name: str, value: Tensor | float, like: Tensor, values: bool, positive: bool = False
) -> Tensor:
    """`value` as one number per target of `like`, checked for sign."""
    targets, device = like.shape[0], like.device
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        low = value <= 0 if positive else value < 0
        if low or not math.isfinite(value):
            raise ValueError(f"{name} must be {_sign(positive)} and finite, got {value}")
        return torch.full((targets,), float(value), dtype=dtype, device=device)
    if value.shape != (targets,) or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a number or a float tensor [{targets}], got {_describe(value)}"
        )
    _check_device(name, value, like)
    if values:
        good = (value > 0 if positive else value >= 0) & value.isfinite()
        if not bool(good.all()):
            target = int((~good).nonzero()[0])
            raise ValueError(
                f"{name} must be {_sign(positive)} and finite, "
                f"got {float(value[target])} at target {target}"
            )
    return value.detach().to(dtype)


def check_options(kl: str, beta: float, chunk_targets: int | None, kernels: str) -> None:
    """Options that are not tensors."""
    if kl not in DIVERGENCES:
        raise ValueError(f"kl must be one of {', '.join(DIVERGENCES)}, got {kl!r}")
    if kl == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie between 0 and 1 (its limits are the two KLs), got {beta}")
    if chunk_targets is not None and chunk_targets < 1:
        raise ValueError(f"chunk_targets must be at least 1, got {chunk_targets}")
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")


def check_scaling(head: str, scale: float, cap: float | None) -> None:
    """What is done to the logits of a head."""
    for name, value in (("logit_scale", scale), ("softcap", 1.0 if cap is None else cap)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}_{head} must be positive and finite, got {value}")


def use_triton(kernels: str, h_s: Tensor) -> bool:
    """Whether the target step runs in Triton; CPU tensors can only under Triton's interpreter."""
    if kernels == "auto":
        return h_s.is_cuda and h_s.dtype != torch.float64
    if kernels == "triton":
        if h_s.dtype == torch.float64:
            raise ValueError("kernels='triton' has no float64 path: use kernels='reference'")
        if not h_s.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "kernels='triton' needs CUDA tensors (or TRITON_INTERPRET=1), "
                f"h_s is on {h_s.device}"
            )
    return kernels == "triton"


def _check_pair(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    for name, tensor in ((hidden_name, hidden), (weight_name, weight)):
        if tensor.dim() != 2 or tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be a float matrix, got {_describe(tensor)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{weight_name} must be [vocab, {hidden.shape[1]}] to fit {hidden_name}, "
            f"got {_describe(weight)} (under ZeRO-3: gather it first)"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{weight_name} has no rows: {_describe(weight)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{weight_name} is {weight.dtype} but {hidden_name} is {hidden.dtype}")
    _check_device(weight_name, weight, hidden)


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, h_s on {like.device}: move them together")


def _sign(positive: bool) -> str:
    return "positive" if positive else "at least 0"


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
