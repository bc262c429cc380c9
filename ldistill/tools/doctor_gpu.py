"""`ldistill doctor`, the GPU's part: devices, CUDA toolkit, Triton kernels."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from importlib import metadata

import torch

from ldistill.common.device import has_fast_bf16, unusable_gpu
from ldistill.tools.doctor import DRIVER, OK, PROBLEM, WARNING, Line, judged, output
from ldistill.training.launch import is_compiled
from ldistill_kernels import distill_loss, shared_kv_attention


def gpus() -> Iterator[Line]:
    """GPUs, their memory and bf16, or the CPU that stands in."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        found = f"{torch.cuda.get_device_name(index)}, {free:.0f} of {total:.0f} GiB free"
        advice = "another process holds most of it: see nvidia-smi."
        yield judged(free >= total / 2, f"GPU {index}", found, advice, WARNING)
        good = torch.cuda.get_device_capability(index) >= (8, 0)
        found = "supported" if good else "not on this GPU"
        yield judged(good, "bf16", found, "train with --bf16 false --fp16 true.", WARNING)
    if torch.cuda.is_available():
        return
    if (reason := unusable_gpu()) is not None:
        built = torch.version.cuda or "none: a CPU build"
        advice = f"torch is built for CUDA {built}: install a build for the driver, or train on "
        advice += "the CPU with CUDA_VISIBLE_DEVICES=''."
        yield Line(PROBLEM, "GPU", f"there is one, but torch cannot use it ({reason})", advice)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
    yield Line(OK, "GPU", f"none; training runs on the CPU ({cores})")
    fast = "as fast as fp32" if has_fast_bf16() else "slow here: recipes train in fp32"
    yield Line(OK, "bf16", fast)


def toolkit() -> Iterator[Line]:
    """CUDA_HOME's compiler against torch's CUDA: DeepSpeed refuses to build over a difference."""
    if not torch.cuda.is_available():
        return
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc, ours = shutil.which("nvcc", path=f"{CUDA_HOME}/bin"), str(torch.version.cuda)
    if nvcc is None:
        advice = "only the *_offload configs need it: install the CUDA toolkit, set CUDA_HOME."
        yield Line(WARNING, "CUDA toolkit", f"none (torch has CUDA {ours})", advice)
        return
    found, *_ = re.findall(r"release (\d+\.\d+)", output(nvcc, "--version")) or ["unknown"]
    good = found.split(".")[0] == ours.split(".")[0]
    found += f" (torch has {ours})" if good else f", but torch has {ours}"
    advice = f"DeepSpeed builds no ops like that: point CUDA_HOME at a CUDA {ours} toolkit."
    yield judged(good, "CUDA toolkit", found, advice, WARNING)


def ops() -> Iterator[Line]:
    """What DeepSpeed compiles for this machine as a run first needs it, and whether it has."""
    needs = {"cpu_adam": "the *_offload configurations"}
    if not DRIVER.exists():
        needs = {"deepspeed_shm_comm": "every run on a CPU"} | needs
    states = {True: "compiled already", False: "will be compiled once, one to three minutes"}
    for name, needed in needs.items():
        yield Line(OK, "DeepSpeed op", f"{name}, for {needed}: {states[is_compiled(name)]}")


def kernels() -> Iterator[Line]:
    """One small call of each Triton kernel, compared with the reference."""
    version = next((d.version for d in metadata.distributions(name="triton")), "not installed")
    if not torch.cuda.is_available():
        yield Line(OK, "triton", f"{version}; unused on a CPU: the PyTorch reference runs")
        return
    for name, error_of in (("attention", attention_error), ("loss", loss_error)):
        good, advice = False, "train with --kernels reference and report this GPU."
        try:
            good = (error := error_of("cuda", "triton")) < 1e-2
            found = "it compiles and agrees with the reference" if good else f"off by {error:.1g}"
        except Exception as failure:
            found = f"{type(failure).__name__}: {failure}".partition("\n")[0][:160]
            advice = "Triton needs gcc and Python's headers; till then use --kernels reference."
        yield judged(good, f"{name} kernel", f"triton {version}; {found}", advice)


def attention_error(device: str, kind: str) -> float:
    """Largest difference of `shared_kv_attention` from its reference."""
    generator = torch.Generator(device).manual_seed(0)
    made = partial(torch.randn, generator=generator, device=device)
    k, v, q = made(1, 2, 32, 64).half(), made(1, 2, 32, 64).half(), made(8, 4, 64).half()
    zero, last = torch.zeros(8, dtype=torch.int64, device=device), torch.arange(8, device=device)
    run = partial(shared_kv_attention, q, k, v, zero, zero, last + 20)
    return (run(kernels=kind) - run(kernels="reference")).abs().max().item()


def loss_error(device: str, kind: str) -> float:
    """Largest relative difference of `distill_loss`, and of its gradients, from its reference."""
    generator = torch.Generator(device).manual_seed(0)
    made = partial(torch.randn, generator=generator, device=device)
    h_s, h_t, w_s, w_t = made(16, 64), made(16, 64), made(320, 64) / 8, made(256, 64) / 8
    how = {"ce_weight": 0.3, "kd_weight": 0.7, "temperature": 4.0}
    labels = torch.arange(16, device=device) * 15
    found = []
    for kernels in (kind, "reference"):
        hidden, head = h_s.clone().requires_grad_(), w_s.clone().requires_grad_()
        result = distill_loss(hidden, head, h_t, w_t, labels, **how, kernels=kernels)
        result.loss.backward()
        found.append((result.loss.detach(), hidden.grad, head.grad))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found))
