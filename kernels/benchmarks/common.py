"""What the kernel benchmarks share: providers, timing, ceilings of the machine, tables, figures.

PROVIDERS = Registry()

@PROVIDERS.add("flash-attn", package="flash_attn")
def flash_attn(problem): ...

timing = measure(lambda: step(x), "cuda", repeats=20)
print_table(records); append_csv("out.csv", records)
"""

from __future__ import annotations

import csv
import importlib.util
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

SECONDS = 3.0  # of repeats of one measurement, where the number of repeats allows
FLUSH_BYTES = 256 * 2**20  # written before each repeat, so that no repeat starts from a warm cache
HEAD_START = 5_000_000  # cycles the GPU waits before each repeat, about 3 ms: see _cuda_times


class Registry(dict[str, Callable[..., Any]]):
    """Name -> provider, in the order of the table; `missing` says which cannot run here and why."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: dict[str, str] = {}
        self.on_gpu: set[str] = set()

    def add(
        self, name: str, package: str | None = None, on_gpu: bool = False
    ) -> Callable[[Any], Any]:
        """Decorator that registers a provider; one whose package is not installed is missing.

        `on_gpu`: it runs nowhere else.
        """

        def register(provider: Any) -> Any:
            if package and importlib.util.find_spec(package) is None:
                self.missing[name] = f"{package} is not installed"
            else:
                self[name] = provider
            if on_gpu:
                self.on_gpu.add(name)
            return provider

        return register

    def here(self, device: str) -> list[str]:
        """Names of those that run on a device."""
        return [name for name in self if device != "cpu" or name not in self.on_gpu]

    def print_missing(self) -> None:
        for name, reason in self.missing.items():
            print(f"{name}: left out, {reason}")


def ahead(
    function: Callable[..., str], jobs: list[tuple], seconds: float | None, workers: int | None
) -> dict[tuple, str]:
    """function(*job) of every job in processes of their own, so that what it compiles is on disk.

    Returns what it returned, "" or what is wrong with the job, of those that ended in time.
    """
    ends, done = time.monotonic() + (seconds or 1e9), {}
    workers = min(workers or os.cpu_count() or 1, max(len(jobs), 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        for job, future in zip(jobs, futures):
            try:
                done[job] = future.result(timeout=max(ends - time.monotonic(), 0))
            except TimeoutError:
                future.cancel()
            except BrokenProcessPool as error:  # a compiler that crashed takes the others with it
                done[job] = reason(error)
    return done


def reason(error: Exception) -> str:
    """An error in a cell of a table."""
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:80]


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
    """Time a function: twice to warm up, then up to `repeats` times from a cold cache.

    A slow function is repeated as often as fits into SECONDS, three times at least.
    """
    cuda = torch.device(device).type == "cuda"
    function()
    repeats = min(max(repeats, 2), max(3, int(SECONDS / _seconds(function, cuda))))
    times = (_cuda_times if cuda else _cpu_times)(function, repeats)
    # Inclusive: of few repeats the other method extrapolates, below zero even.
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), low, high, _peak_mib(function) if cuda else None)


def _seconds(function: Callable[[], Any], cuda: bool) -> float:
    """Roughly what one call takes, launches included."""
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return max(time.perf_counter() - begin, 1e-6)


def _cpu_times(function: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def _cuda_times(function: Callable[[], Any], repeats: int) -> list[float]:
    """Events around each call, from a cold cache.

    The GPU waits before the first event until the host has launched most of the call, so that no
    provider is charged for Python between its kernels; a host that waits for results still is.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        flush.zero_()
        torch.cuda._sleep(HEAD_START)
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
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "triton": version,
            "commit": _commit()}  # fmt: skip


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def print_table(records: list[dict[str, Any]], hidden: tuple[str, ...] = ()) -> None:
    """One line per record, columns in order of first appearance, empty and hidden ones left out."""
    columns = dict.fromkeys(
        name for record in records for name, value in record.items() if value not in (None, "")
    )
    columns = [name for name in columns if name not in hidden]
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


def pyplot() -> Any:
    """Matplotlib without a display, in the style of all figures; None, said so, without it."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed")
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#e4e6ea", "axes.axisbelow": True, "legend.frameon": False,
        "legend.fontsize": 8, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8,
        "ytick.labelsize": 8, "axes.prop_cycle": mpl.cycler(color=COLOURS),
    })  # fmt: skip
    return plt


# Told apart by readers who are colour-blind, too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")


def colours(records: list[dict[str, Any]]) -> dict[str, str]:
    """One colour per provider, the same in every panel."""
    names = dict.fromkeys(record["provider"] for record in records if "provider" in record)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def save(figure: Any, path: str, records: list[dict[str, Any]]) -> None:
    """Write a figure, under it where its numbers come from."""
    about = ", ".join(f"{key} {records[0][key]}" for key in ("device", "torch", "triton", "commit"))
    figure.supxlabel(about, fontsize=7, color="#5a606b")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


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
