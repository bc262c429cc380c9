"""`ldistill doctor`, the GPU's part: devices, CUDA toolkit, Triton kernels."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata

from ldistill.tools.doctor.system import OK, PROBLEM, WARNING, Line, driver_present, output


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
    """One small call of each Triton kernel, compared with the reference."""
    import torch

    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        version = "not installed"
    if not torch.cuda.is_available():
        yield Line(OK, "triton", f"{version}; unused on a CPU: the PyTorch reference runs")
        return
    for name, error_of in (("attention", attention_error), ("loss", loss_error)):
        yield _kernel(name, version, error_of)


def _kernel(name: str, version: str, error_of: Callable[[str, str], float]) -> Line:
    what = f"{name} kernel"
    try:
        error = error_of("cuda", "triton")
    except Exception as failure:
        first = (str(failure).strip().splitlines() or [""])[0][:160]
        advice = "Triton needs gcc and Python's headers; till then train with --kernels reference."
        found = f"triton {version}; {type(failure).__name__}: {first}"
        return Line(PROBLEM, what, found, advice)
    if error < 1e-2:
        return Line(OK, what, f"triton {version}; it compiles and agrees with the reference")
    advice = "train with --kernels reference and report this GPU."
    return Line(PROBLEM, what, f"triton {version}; off by {error:.1g}", advice)


def attention_error(device: str, kind: str) -> float:
    """Largest difference of `shared_kv_attention` from its reference."""
    import torch

    from ldistill_kernels import shared_kv_attention

    generator = torch.Generator(device).manual_seed(0)
    shape = (1, 2, 32, 64)
    k, v = (torch.randn(shape, generator=generator, device=device).half() for _ in range(2))
    q = torch.randn(8, 4, 64, generator=generator, device=device).half()
    zero, last = torch.zeros(8, dtype=torch.int64, device=device), torch.arange(8, device=device)
    ours, plain = (
        shared_kv_attention(q, k, v, zero, zero, last + 20, kernels=kernels)
        for kernels in (kind, "reference")
    )
    return (ours - plain).abs().max().item()


def loss_error(device: str, kind: str) -> float:
    """Largest relative difference of `distill_loss`, and of its gradients, from its reference."""
    import torch

    from ldistill_kernels import distill_loss

    generator = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    h_s, h_t, w_s, w_t = made(16, 64), made(16, 64), made(320, 64) / 8, made(256, 64) / 8
    labels = torch.arange(16, device=device) * 15
    found = []
    for kernels in (kind, "reference"):
        hidden, head = h_s.clone().requires_grad_(), w_s.clone().requires_grad_()
        result = distill_loss(
            hidden, head, h_t, w_t, labels,
            ce_weight=0.3, kd_weight=0.7, temperature=4.0, kernels=kernels,
        )  # fmt: skip
        result.loss.backward()
        found.append((result.loss.detach(), hidden.grad, head.grad))
    pairs = zip(*found, strict=True)
    return max(((ours - plain).abs().max() / plain.abs().max()).item() for ours, plain in pairs)
