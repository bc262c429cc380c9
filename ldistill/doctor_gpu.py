"""`ldistill doctor`, the GPU's part: devices, CUDA toolkit, Triton kernels."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from importlib import metadata

from ldistill.doctor_system import OK, PROBLEM, WARNING, Line, driver_present, output


def gpus() -> Iterator[Line]:
    """GPUs, their memory and bf16, or the CPU that stands in."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _gpu(torch, index)
        return
    cores, memory = len(os.sched_getaffinity(0)), _memory_gib()
    found = f"none; training runs on the CPU ({cores} cores, {memory:.0f} GiB), bf16 included"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if driver_present() and not hidden:
        built = torch.version.cuda or "none: a CPU build"
        advice = f"torch is built for CUDA {built}: install a matching driver or torch build."
        yield Line(WARNING, "GPU", "there is one, but torch cannot use it", advice)
    yield Line(OK, "GPU", found)


def _gpu(torch, index: int) -> Iterator[Line]:
    free, total = (bytes_ / 2**30 for bytes_ in torch.cuda.mem_get_info(index))
    name = f"GPU {index}"
    found = f"{torch.cuda.get_device_name(index)}, {free:.0f} of {total:.0f} GiB free"
    if free < total / 2:
        yield Line(WARNING, name, found, "another process holds most of it: see nvidia-smi.")
    else:
        yield Line(OK, name, found)
    if torch.cuda.get_device_capability(index) < (8, 0):
        yield Line(WARNING, "bf16", "not on this GPU", "train with --bf16 false --fp16 true.")
    else:
        yield Line(OK, "bf16", "supported")


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def toolkit() -> Iterator[Line]:
    """CUDA_HOME's compiler against torch's CUDA: DeepSpeed refuses to build over a difference."""
    import torch

    if not torch.cuda.is_available():
        return
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    ours = str(torch.version.cuda)
    if nvcc is None:
        advice = "only the *_offload configs need it: install the CUDA toolkit, set CUDA_HOME."
        yield Line(WARNING, "CUDA toolkit", f"none (torch has CUDA {ours})", advice)
        return
    match = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
    found = ".".join(match.groups()) if match else "unknown"
    if found.split(".")[0] == ours.split(".")[0]:
        yield Line(OK, "CUDA toolkit", f"{found} (torch has {ours})")
    else:
        advice = f"DeepSpeed builds no ops like that: point CUDA_HOME at a CUDA {ours} toolkit."
        yield Line(WARNING, "CUDA toolkit", f"{found}, but torch has {ours}", advice)


def kernels() -> Iterator[Line]:
    """One small call of the Triton kernels, compared with the reference."""
    import torch

    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        version = "not installed"
    if not torch.cuda.is_available():
        yield Line(OK, "triton", f"{version}; unused on a CPU: the PyTorch reference runs")
        return
    try:
        error = _kernel_error(torch)
    except Exception as failure:
        first = (str(failure).strip().splitlines() or [""])[0][:160]
        advice = "Triton needs gcc and Python's headers; till then train with --kernels reference."
        yield Line(PROBLEM, "triton", f"{version}; {type(failure).__name__}: {first}", advice)
        return
    if error < 1e-2:
        yield Line(OK, "triton", f"{version}; kernels compile and agree with the reference")
    else:
        advice = "train with --kernels reference and report this GPU."
        yield Line(PROBLEM, "triton", f"{version}; kernels are off by {error:.1g}", advice)


def _kernel_error(torch) -> float:
    from ldistill_kernels import shared_kv_attention

    generator = torch.Generator("cuda").manual_seed(0)
    shape, device = (1, 2, 32, 64), torch.device("cuda")
    k, v = (torch.randn(shape, generator=generator, device=device).half() for _ in range(2))
    q = torch.randn(8, 4, 64, generator=generator, device=device).half()
    zero, last = torch.zeros(8, dtype=torch.int64, device=device), torch.arange(8, device=device)
    ours, plain = (
        shared_kv_attention(q, k, v, zero, zero, last + 20, kernels=kind)
        for kind in ("triton", "reference")
    )
    return (ours - plain).abs().max().item()
