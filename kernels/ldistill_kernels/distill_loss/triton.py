"""Launch of the Triton row step (`triton_kernel.py`), its block sizes and its compile cases."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ldistill_kernels.compile_check import CompileCase
from ldistill_kernels.distill_loss.rows import (
    DIVERGENCES,
    Chunk,
    RowInputs,
    RowOutputs,
    RowSettings,
)
from ldistill_kernels.distill_loss.triton_kernel import UNSPECIALIZED, distill_rows_kernel


def compile_cases() -> list[CompileCase]:
    """Every divergence in bf16, the other gradient widths, and a vocabulary without alignment."""
    variants = [("bf16", "ce", 49152), ("bf16", "ce", None), ("bf16", "forward", None)]
    variants += [("bf16", kl, 49152) for kl in DIVERGENCES]
    variants += [("bf16", f"{kl} through", 49152) for kl in DIVERGENCES]
    variants += [("fp16", "forward", 49152), ("fp32", "forward", 49152)]
    return [_compile_case(*variant) for variant in variants]


def _compile_case(grad: str, variant: str, vocab: int | None) -> CompileCase:
    """`vocab` None stands for one that is no multiple of 16, where loads are not vectors."""
    kl = variant.split()[0]
    block, warps = launch_config(49152)
    constants = {
        "HAS_ROWS": True, "HAS_TEACHER": kl != "ce", "GRAD_S": True, "GRAD_T": kl != variant,
        "KL": 0 if kl == "ce" else DIVERGENCES.index(kl), "NARROW": grad != "fp32", "BLOCK": block,
    } | ({"vocab": vocab} if vocab else {})  # fmt: skip
    types = {name: "*fp32" for name in distill_rows_kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(("rows_ptr", "labels_ptr"), "*i64")
    types |= dict.fromkeys(("grad_ptr", "grad_t_ptr"), f"*{grad}")
    types |= dict.fromkeys(("teacher_student_ptr", "teacher_label_ptr", "student_label_ptr"), "*i8")
    types |= dict.fromkeys(UNSPECIALIZED, "i32")
    types |= {"vocab_s": "i32", "vocab": "i32", "beta": "fp32"}
    types = {name: kind for name, kind in types.items() if name not in constants}
    name = f"loss rows {grad} {variant} vocab {vocab or 'any'}"
    return CompileCase(
        name, __name__, "distill_rows_kernel", types, constants, num_warps=warps, core=True
    )


def launch_config(vocab: int) -> tuple[int, int]:
    """(columns per block, warps): eight columns a thread, whatever the device.

    The kernel is bound by memory and uses no shared memory beyond its reductions, so one choice
    serves all devices; a block of the whole vocabulary would spill (a known trap of such kernels).
    """
    block = min(2048, max(128, triton.next_power_of_2(vocab)))
    return block, max(1, block // 256)


def row_step(
    logits: Tensor,
    teacher: Tensor | None,
    chunk: Chunk,
    inputs: RowInputs,
    outputs: RowOutputs,
    settings: RowSettings,
) -> tuple[Tensor, Tensor | None]:
    """Replace logits `[c, vocab_s]` and teacher logits `[c, vocab]` by their gradients.

    Returns the gradients in `settings.grad_dtype`, at the front of each row of the same memory.
    """
    grad = _front(logits, settings.grad_dtype)
    grad_t = None if teacher is None else _front(teacher, settings.grad_dtype)
    other, other_grad = (logits, grad) if teacher is None else (teacher, grad_t)
    assert all(x.stride(0) % 64 == 0 for x in (logits, other)), "the kernel says so of the strides"
    block, warps = launch_config(settings.vocab)
    with torch.cuda.device_of(logits):
        distill_rows_kernel[(logits.shape[0],)](
            logits, other, grad, other_grad,
            inputs.labels if chunk.rows is None else chunk.rows, *inputs,
            outputs.ce, outputs.kl, *(_bytes(flag) for flag in outputs[2:5]), outputs.extra_mass,
            chunk.start, logits.shape[1], settings.vocab,
            logits.stride(0), other.stride(0), grad.stride(0), other_grad.stride(0),
            settings.beta,
            HAS_ROWS=chunk.rows is not None, HAS_TEACHER=teacher is not None,
            KL=DIVERGENCES.index(settings.kl), GRAD_S=settings.grad_student,
            GRAD_T=settings.grad_teacher and teacher is not None,
            NARROW=settings.grad_dtype.itemsize < logits.dtype.itemsize,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return grad, grad_t


def _front(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of each row's first columns, seen as `dtype`."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _bytes(flags: Tensor) -> Tensor:
    return flags.view(torch.int8)
