"""What devices there are, how fast one computes, by its datasheet or measured, how to time it."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import torch

from ldistill.common.cards import CARDS


def unusable_gpu() -> str | None:
    """Why PyTorch cannot use the GPU that a driver shows here; None: it can, or none is meant."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not Path("/dev/nvidia0").exists() or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
        return str(error).strip().splitlines()[0].rstrip(".")
    return "it finds none"


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bf16 at least as fast as fp32: a GPU from Ampere on, or
    without one a CPU that can."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak rate of a device, FLOP/s, and where the number comes from: a GPU's datasheet where it is
    listed, otherwise the best of ten matrix products now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if rate := listed_peak(name):
            return rate, f"{name}, dense bf16 by datasheet"
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        start = seconds(device)
        a @ a
        synchronise(device)
        best = min(best, seconds(device) - start)
    return 2 * size**3 / best, "matrix product measured at start"


def listed_peak(name: str) -> float | None:
    """Rate of a card by the name that its driver gives it, whole words alone; None: not listed, or
    a slice of one, or what another word behind the name makes another card."""
    for key, card in CARDS.items():
        whole = rf"\b{re.escape(key)}\b(?! (?:Ti|D|SUPER|Laptop|Max-Q)\b)(?!.*\bMIG\b)"
        if re.search(whole, name, re.IGNORECASE):
            return card.flops
    return None


def seconds(device: torch.device) -> float:
    """Clock of a measurement: a GPU's is the wall; a CPU's is the time this process computed.

    Others on the same machine take turns with it, which the wall would count; the CPU time of all
    threads, divided by their number, is what the wall shows on an idle machine.
    """
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    return time.perf_counter()


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
