"""The four matrix products of the loss: fp32 results and sums from operands of any float dtype.

CUDA devices multiply 16-bit operands on tensor cores and keep the fp32 accumulator as the result
(`out_dtype`). CPUs have no such product and are slow in 16 bits, so there a block of the
head at a time is widened to fp32: exact, and the extra memory does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 4 << 20  # 16 MiB of widened head


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on_tensor_cores(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows of `weight` with their values in `dtype`."""
    rows, width = weight.shape
    step = rows if weight.dtype == dtype else max(256, BLOCK_ELEMENTS // max(width, 1))
    for lo in range(0, rows, max(step, 1)):
        span = slice(lo, min(lo + step, rows))
        yield span, weight[span].to(dtype)


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out `[c, vocab]` = hidden `[c, width]` @ weight `[vocab, width]`^T."""
    if _on_tensor_cores(hidden, weight):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        return
    hidden = hidden.to(out.dtype)
    for span, block in _blocks(weight, out.dtype):
        torch.mm(hidden, block.t(), out=out[:, span])


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad `[c, vocab]` @ weight `[vocab, width]`, a sum in fp32: whoever keeps it rounds it."""
    if _on_tensor_cores(grad, weight):
        # A 16-bit result may be summed in 16 bits between the parts of a long inner dimension.
        return torch.mm(grad, weight, out_dtype=torch.float32)
    wide = compute_dtype(grad.dtype)
    grad = grad.to(wide)
    out = grad.new_zeros(grad.shape[0], weight.shape[1])
    for span, block in _blocks(weight, wide):
        out.addmm_(grad[:, span], block)
    return out


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
    """total `[vocab, width]` += grad `[c, vocab]`^T @ hidden `[c, width]`, summed in fp32.

    The `first` product is written over whatever `total` holds: a head is too large to be read, and
    zeroed before that, for nothing.
    """
    if not _on_tensor_cores(grad, hidden):
        wide = grad.to(total.dtype).t(), hidden.to(total.dtype)
        torch.mm(*wide, out=total) if first else total.addmm_(*wide)
    elif first:
        torch.mm(grad.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, grad.t(), hidden, out_dtype=total.dtype, out=total)
