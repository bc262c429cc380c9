"""Launch of the Triton target step (`triton_kernel.py`), its blocks and its compile cases."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ldistill_kernels.compile_check import CompileCase
from ldistill_kernels.distill_loss.chunked import padded
from ldistill_kernels.distill_loss.targets import (
    DIVERGENCES,
    Chunk,
    Scaling,
    Settings,
    TargetInputs,
    TargetOutputs,
)
from ldistill_kernels.distill_loss.triton_kernel import UNSPECIALIZED, distill_targets_kernel


class Launch(NamedTuple):
    """How a program runs: columns of a block, warps, registers a thread at most."""

    block: int
    warps: int
    registers: int


def launch_config(vocab: int) -> Launch:
    """Eight columns a thread, whatever the device.

    The kernel is bound by memory and uses no shared memory beyond its reductions, so one choice
    serves all devices. Left alone, the compiler saves registers by loading the next block last
    thing before it is needed; a limit of 128 makes it load first, and two programs share a
    multiprocessor. More of them would have less of the L2 cache each for their second passes.
    """
    block = min(2048, max(128, triton.next_power_of_2(vocab)))
    return Launch(block, max(1, block // 256), 128)


def compile_cases() -> list[CompileCase]:
    """Every divergence in bf16, the other gradient widths, and a vocabulary without alignment."""
    variants = [("bf16", "ce", 49152), ("bf16", "ce", None), ("bf16", "forward", None)]
    variants += [("bf16", kl, 49152) for kl in DIVERGENCES]
    variants += [("bf16", f"{kl} through", 49152) for kl in DIVERGENCES]
    variants += [("fp16", "forward", 49152), ("fp32", "forward", 49152)]
    cases = [_compile_case(*variant) for variant in variants]
    scaled, capped = Scaling(0.0625), Scaling(1.0, 30.0)
    cases += [_compile_case("bf16", kl, 49152, scaled) for kl in ("ce", "forward")]
    cases += [_compile_case("bf16", kl, 49152, capped) for kl in ("ce", *DIVERGENCES)]
    return cases + [_compile_case("bf16", f"{kl} through", 49152, capped) for kl in DIVERGENCES]


def _compile_case(
    grad: str, variant: str, vocab: int | None, scaling: Scaling = Scaling()
) -> CompileCase:
    """`vocab` None stands for one that is no multiple of 16, where loads are not vectors."""
    kl = variant.split()[0]
    block, warps, registers = launch_config(49152)
    constants = {
        "HAS_TARGETS": True, "HAS_TEACHER": kl != "ce", "GRAD_S": True, "GRAD_T": kl != variant,
        "KL": 0 if kl == "ce" else DIVERGENCES.index(kl), "NARROW": grad != "fp32", "BLOCK": block,
        "T_SQUARED": True, "SCALE_S": scaling.scale, "CAP_S": scaling.cap,
        "SCALE_T": scaling.scale, "CAP_T": scaling.cap,
    } | ({"vocab": vocab} if vocab else {})  # fmt: skip
    types = {name: "*fp32" for name in distill_targets_kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(("targets_ptr", "labels_ptr"), "*i64")
    types |= dict.fromkeys(("grad_ptr", "grad_t_ptr"), f"*{grad}")
    types |= dict.fromkeys(("teacher_student_ptr", "teacher_label_ptr", "student_label_ptr"), "*i8")
    types |= dict.fromkeys(UNSPECIALIZED, "i32")
    types |= {"vocab_s": "i32", "vocab": "i32", "beta": "fp32"}
    types = {name: kind for name, kind in types.items() if name not in constants}
    name = f"loss targets {grad} {variant} vocab {vocab or 'any'}"
    if scaling != Scaling():
        name += " capped" if scaling.cap else " scaled"
    return CompileCase(
        name, __name__, "distill_targets_kernel", types, constants, num_warps=warps,
        max_registers=registers, fp_fusion=scaling == Scaling(), core=True,
    )  # fmt: skip


def target_step(
    logits: Tensor,
    teacher: Tensor | None,
    chunk: Chunk,
    inputs: TargetInputs,
    outputs: TargetOutputs,
    settings: Settings,
) -> tuple[Tensor, Tensor | None]:
    """Replace logits `[c, vocab_s]` and teacher logits `[c, vocab]` by their gradients.

    Returns the gradients in `settings.grad_dtype`, in the back half of each row of the same memory
    where that is narrower.
    """
    grad, grad_t = logits, teacher
    if settings.grad_student:
        grad = _back(logits, settings.grad_dtype)
    if settings.grad_teacher and teacher is not None:
        grad_t = _back(teacher, settings.grad_dtype)
    other, other_grad = (logits, grad) if teacher is None else (teacher, grad_t)
    assert all(x.stride(0) == padded(x.shape[1]) for x in (logits, other)), "as the kernel assumes"
    labels, ce_weight, kd_weight, temperature = inputs
    if teacher is None:
        kd_weight = temperature = ce_weight  # not read
    block, warps, registers = launch_config(settings.vocab)
    with torch.cuda.device_of(logits):
        distill_targets_kernel[(logits.shape[0],)](
            logits, other, grad, other_grad,
            labels if chunk.targets is None else chunk.targets,
            labels, ce_weight, kd_weight, temperature,
            *outputs[:3], *(_bytes(flag) for flag in outputs[3:6]), outputs.extra_mass,
            chunk.start, logits.shape[1], settings.vocab, settings.beta, settings.ignore_index,
            HAS_TARGETS=chunk.targets is not None, HAS_TEACHER=teacher is not None,
            KL=DIVERGENCES.index(settings.kl), T_SQUARED=settings.t_squared,
            GRAD_S=settings.grad_student, GRAD_T=settings.grad_teacher and teacher is not None,
            NARROW=settings.grad_dtype.itemsize < logits.dtype.itemsize,
            BLOCK=block, SCALE_S=settings.scaling_s.scale, CAP_S=settings.scaling_s.cap,
            SCALE_T=settings.scaling_t.scale, CAP_T=settings.scaling_t.cap,
            num_warps=warps, maxnreg=registers, enable_fp_fusion=fuses(settings),
        )  # fmt: skip
    return grad, grad_t


def fuses(settings: Settings) -> bool:
    """Whether products and sums may become one instruction.

    Not where a logit is itself a product: its difference from an equal one would not be 0.
    """
    return settings.scaling_s == settings.scaling_t == Scaling()


def _back(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The last part of each row's memory, as wide as its logits, seen as `dtype`."""
    if dtype == logits.dtype:
        return logits
    halves = logits.view(dtype)
    offset = halves.storage_offset() + halves.stride(0) - logits.stride(0)
    return halves.as_strided(logits.shape, halves.stride(), offset)


def _bytes(flags: Tensor) -> Tensor:
    return flags.view(torch.int8)
