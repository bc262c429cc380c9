"""Speed and memory of `distill_loss` against what one would use instead.

    python kernels/benchmarks/loss.py                          # the full grid, on a GPU
    python kernels/benchmarks/loss.py --device cpu             # small shapes, anywhere
    python kernels/benchmarks/loss.py --hidden 960 --vocab 49152 --csv out.csv --plot out.png
    python kernels/benchmarks/loss.py --warm                   # compile all of it in parallel
    python kernels/benchmarks/loss.py --targets 8192 --sweep   # try other blocks and chunks

One measurement is forward and backward. Of kind "distill" it is cross-entropy plus forward KL at
temperature 2, every target with a teacher, student and teacher of one size; of kind "ce"
cross-entropy alone. Before a provider is timed its gradients are compared with fp64, on as many
targets as make a second chunk; one that fails is not timed. `floor` is the matrix products that
nobody can avoid (projections, and the student's two gradients), without any loss: speeds are quoted
as multiples of it. Peak memory is what a call needs beyond its inputs, its gradients included.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import (
    Timing,
    ahead,
    append_csv,
    ceilings,
    colours,
    machine,
    measure,
    print_table,
    pyplot,
    reason,
    save,
)
from loss_providers import PROVIDERS, Heads, Loss, Shape, floor, plain, suited
from torch import Tensor

from ldistill_kernels import distill_loss
from ldistill_kernels.distill_loss.chunked import TILE, chunk_targets

GATE_ERROR = 0.03
GPU_GRID = {"hidden": [576, 960, 2048, 4096], "vocab": [49152, 128256],
            "targets": [256, 1024, 2048, 4096, 8192, 16384, 32768]}  # fmt: skip
CPU_GRID = {"hidden": [64, 256], "vocab": [8192], "targets": [256, 512, 1024]}


def forward_backward(loss: Loss, heads: Heads) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(heads), (heads.h_s, heads.w_s))


def gate(loss: Loss, heads: Heads) -> float:
    """Largest relative error of the gradients against fp64, over a chunk and a bit of the next."""
    few = heads.first(gate_targets(heads))
    want = forward_backward(plain, few.double())
    got = forward_backward(loss, few)
    return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want))


def gate_targets(heads: Heads) -> int:
    columns = heads.w_s.shape[0] + (0 if heads.w_t is None else heads.w_t.shape[0])
    chunk = chunk_targets(heads.h_s.device.type, columns)
    return min(chunk + TILE // 2, heads.labels.numel())


def measurements(
    shape: Shape, device: str, dtype: torch.dtype, chosen: dict[str, Loss], repeats: int
) -> Iterator[dict[str, Any]]:
    """One record per provider, the floor first; a provider that cannot run says why."""
    heads, at = Heads.draw(shape, device, dtype), asdict(shape)
    base = timed(lambda: floor(heads), device, repeats)
    yield record(shape, "floor", base, base.median)
    for name, loss in chosen.items():
        try:
            error = gate(loss, heads)
            if not error <= GATE_ERROR:
                yield at | {"provider": name, "note": f"gradients off by {error:.1%}, not timed"}
                continue
            timing = timed(lambda loss=loss: forward_backward(loss, heads), device, repeats)
        except Exception as error:  # a peer that lacks a shape or memory must not end the run
            yield at | {"provider": name, "note": reason(error)}
            continue
        yield record(shape, name, timing, base.median) | {"error": error}


def timed(run: Callable[[], Any], device: str, repeats: int) -> Timing:
    """`measure`, with the peak of resident memory where a CPU keeps no account of its own."""
    timing = measure(run, device, repeats)
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        timing = replace(timing, peak_mib=resident_peak_mib(run))
    return timing


def resident_peak_mib(run: Callable[[], Any]) -> float:
    """How far a run lifts the resident memory of this process, by Linux's own account."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed must not serve this one unseen
    Path("/proc/self/clear_refs").write_text("5")  # the recorded peak starts again from here
    before = _status_mib("VmRSS")
    run()
    return max(_status_mib("VmHWM") - before, 0.0)


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def record(shape: Shape, name: str, timing: Timing, floor_ms: float) -> dict[str, Any]:
    """One line of the table."""
    rate = shape.flops / timing.median / 1e9
    return asdict(shape) | {"provider": name} | timing.columns() | {
        "TFLOP/s": rate, "x floor": timing.median / floor_ms,
    }  # fmt: skip


COMPILED = ("ours", "liger", "liger ce", "cce ce")


def warm(shape: Shape, provider: str, device: str, dtype: torch.dtype) -> str:
    """Run one provider once, in a process of its own: what it compiles is then on disk."""
    try:
        forward_backward(PROVIDERS[provider], Heads.draw(shape, device, dtype))
    except Exception as error:
        return reason(error)
    return ""


# Columns of a block, warps and registers a thread of the target step; targets of a chunk.
LAUNCHES = ((1024, 4, 128), (2048, 8, 64), (2048, 8, 128), (2048, 8, 255), (4096, 16, 64),
            (4096, 16, 128), (8192, 32, 64), (4096, 8, 255))  # fmt: skip
CHUNKS = (256, 512, 1024, 1536, 2048, 4096)


def variants() -> dict[str, Loss]:
    """Ours with other blocks, and with other chunks."""
    step = importlib.import_module("ldistill_kernels.distill_loss.triton")

    def launched(launch: tuple[int, int, int]) -> Loss:
        def loss(heads: Heads) -> Tensor:
            config = step.Launch(*launch)
            with mock.patch.object(step, "launch_config", return_value=config):
                return PROVIDERS["ours"](heads)

        return loss

    def chunked(targets: int) -> Loss:
        return lambda heads: (
            distill_loss(*heads.tensors, **heads.weights, chunk_targets=targets).loss
        )

    return {
        "shipped": PROVIDERS["ours"],
        **{"block " + "x".join(map(str, launch)): launched(launch) for launch in LAUNCHES},
        **{f"chunks of {targets}": chunked(targets) for targets in CHUNKS},
    }


def draw(lines: list[dict[str, Any]], path: str) -> None:
    """Time above, peak memory below, over targets; a column per pair of sizes."""
    timed, plt = [line for line in lines if "ms" in line], pyplot()
    if plt is None or not timed:
        return
    sizes = sorted({(line["hidden"], line["vocab"], line["kind"]) for line in timed})
    width = max(4 * len(sizes), 7)
    figure, axes = plt.subplots(2, len(sizes), figsize=(width, 6), squeeze=False, sharex="col",
                                sharey="row", layout="constrained")  # fmt: skip
    palette = colours([line for line in timed if line["provider"] != "floor"])
    for column, (hidden, vocab, kind) in zip(axes.T, sizes):
        size = {"hidden": hidden, "vocab": vocab, "kind": kind}
        here = [line for line in timed if size.items() <= line.items()]
        for axis, key in zip(column, ("ms", "peak MiB")):
            draw_over_targets(axis, here, key, palette)
        column[0].set_title(f"{kind}, hidden {hidden}, vocabulary {vocab}")
        column[1].set_xlabel("targets")
    axes[0][0].set_ylabel("ms, forward and backward")
    axes[1][0].set_ylabel("peak MiB beyond the inputs")
    axes[0][0].legend()
    save(figure, path, lines)
    plt.close(figure)


def draw_over_targets(
    axis: Any, lines: list[dict[str, Any]], key: str, palette: dict[str, str]
) -> None:
    for name in dict.fromkeys(line["provider"] for line in lines):
        points = sorted((x["targets"], x[key]) for x in lines if x["provider"] == name and x[key])
        if not points or (name == "floor" and key != "ms"):
            continue
        style = {"color": palette.get(name, "black"), "marker": "o", "markersize": 4}
        if name == "floor":
            style |= {"linestyle": "--", "marker": None, "label": "bare products"}
        axis.plot(*zip(*points), **{"label": name} | style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    targets = sorted({line["targets"] for line in lines})
    axis.set_xticks(targets, [str(count) for count in targets])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("hidden", "vocab", "targets"):
        parser.add_argument(f"--{name}", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", choices=["distill", "ce"], default=["distill", "ce"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--providers", nargs="+")
    parser.add_argument("--warm", action="store_true", help="compile in parallel, time nothing")
    parser.add_argument("--sweep", action="store_true", help="time ours with other blocks, chunks")
    parser.add_argument("--workers", type=int, help="processes that compile; default: all cores")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="start no new shape after this long")
    parser.add_argument("--csv", help="append the records to this file")
    parser.add_argument("--plot", help="draw time and memory over targets here (PNG)")
    options = parser.parse_args(arguments)
    grid = CPU_GRID if options.device == "cpu" else GPU_GRID
    for name, values in grid.items():
        if getattr(options, name) is None:
            setattr(options, name, values)
    if options.dtype is None:  # 16-bit products are slow on most CPUs, for plain PyTorch above all
        options.dtype = "float32" if options.device == "cpu" else "bfloat16"
    return options


def compile_ahead(
    shapes: list[Shape], names: list[str], options: argparse.Namespace, dtype: torch.dtype
) -> None:
    """What `--warm` does; kernels do not depend on the number of targets, so few are enough."""
    sizes = dict.fromkeys(replace(shape, targets=2048) for shape in shapes)
    names = [name for name in names if name in COMPILED]
    jobs = [
        (size, name, options.device, dtype) for size in sizes for name in suited(names, size.kind)
    ]
    done = ahead(warm, jobs, options.seconds, options.workers)
    for job in jobs:
        print(f"{job[0]} {job[1]}: {done.get(job, 'not compiled in time') or 'compiled'}")


def main(arguments: list[str] | None = None) -> int:
    """Print a table per shape; CSV and plot on request."""
    options = parse(arguments)
    dtype, ends = getattr(torch, options.dtype), time.monotonic() + (options.seconds or 1e9)
    here = PROVIDERS.here(options.device)
    unknown = sorted(set(options.providers or ()) - set(here))
    if unknown:
        raise SystemExit(f"no provider {', '.join(unknown)} here, only {', '.join(here)}")
    names = options.providers or here
    grid = product(options.hidden, options.vocab, options.targets, options.kinds)
    shapes = [Shape(*sizes) for sizes in grid]
    if options.warm:
        compile_ahead(shapes, names, options, dtype)
        return 0
    top = ceilings(options.device, dtype)
    where = machine(options.device) | {"dtype": options.dtype, "ceiling TFLOP/s": top.tflops}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    PROVIDERS.print_missing()
    records = []
    for shape in shapes:
        if time.monotonic() > ends:
            print(f"\n{shape}: left out, {options.seconds:.0f} seconds are over")
            continue
        chosen = variants() if options.sweep else suited(names, shape.kind)
        lines = list(measurements(shape, options.device, dtype, chosen, options.repeats))
        print(f"\n{shape}")
        print_table(lines, hidden=("hidden", "vocab", "targets", "kind"))
        records += [where | line for line in lines]
        if options.csv:
            append_csv(options.csv, records[-len(lines) :])
    if options.plot and not options.sweep:
        draw(records, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
