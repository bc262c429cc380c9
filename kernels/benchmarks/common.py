"""What the kernel benchmarks share: timing, ceilings of the machine, table and CSV.

timing = measure(lambda: step(x), "cuda", repeats=20)
print_table(records); append_csv("out.csv", records)
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # written before each repeat, so that no repeat starts from a warm cache


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call (median, 20th and 80th percentile) and its peak memory."""

    median: float
    low: float
    high: float
    peak_mib: float | None  # beyond what was allocated before the call; None on a CPU

    def columns(self) -> dict[str, Any]:
        return {"ms": self.median, "ms p20": self.low, "ms p80": self.high,
                "peak MiB": self.peak_mib}  # fmt: skip


def measure(function: Callable[[], Any], device: str, repeats: int = 20) -> Timing:
    """Time a function: twice to warm up, then `repeats` times from a cold cache."""
    for _ in range(2):
        function()
    cuda = torch.device(device).type == "cuda"
    times = (_cuda_times if cuda else _cpu_times)(function, repeats)
    low, *_, high = statistics.quantiles(times, n=5) if repeats > 1 else times * 2
    return Timing(statistics.median(times), low, high, _peak_mib(function) if cuda else None)


def _cpu_times(function: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def _cuda_times(function: Callable[[], Any], repeats: int) -> list[float]:
    """Events around each call; flushing the cache also hides the launch cost of the call."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _peak_mib(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in this run: a large matrix product and a large copy."""

    tflops: float
    tbytes: float


@lru_cache
def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measured once a run and dtype."""
    large = torch.device(device).type == "cuda"
    n = 8192 if large else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, 10)
    source = torch.empty(2**30 if large else 2**25, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, 10)
    return Ceilings(2 * n**3 / product.median / 1e9, 2 * source.numel() / copy.median / 1e9)


@lru_cache
def machine(device: str) -> dict[str, str]:
    """Device, versions and commit, for every line of a CSV."""
    try:
        import triton

        version = triton.__version__
    except ModuleNotFoundError:
        version = "none"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "triton": version,
            "commit": commit.stdout.strip() or "unknown"}  # fmt: skip


def print_table(records: list[dict[str, Any]]) -> None:
    """One line per record, columns in order of first appearance."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    lines = [columns, *([_text(record.get(name)) for name in columns] for record in records)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip())


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else _whole(value)


def _whole(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def append_csv(path: str, records: list[dict[str, Any]]) -> None:
    """Append records to a CSV, written anew when its columns differ."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    file, old = Path(path), []
    if file.exists():
        with file.open(newline="") as lines:
            old = list(csv.DictReader(lines))
    columns = list(dict.fromkeys([*(old[0] if old else []), *columns]))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows([*old, *records])
