"""Whole, full-precision weights of a student that an engine may hold in pieces."""

from __future__ import annotations

from torch import Tensor, nn


def gather_trained(student: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Trained parameters, whole, on the CPU: fp32 master weights where an optimizer holds them.

    Every rank must call it: under ZeRO each parameter is gathered from all of them, one at a time.

    Args:
        student: parameters under their own names; those that don't require gradients are left out.
        keep: whether this rank wants the result (others take part and get an empty dict).
    """
    whole: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if id(parameter) not in whole:
            tensor = _gather(parameter)
            if keep:
                tensor = tensor.detach().to("cpu", copy=True)
            whole[id(parameter)] = tensor if keep else tensor.new_empty(0)
        if keep:
            state[name] = whole[id(parameter)]
    return state


def _gather(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master
    return parameter
