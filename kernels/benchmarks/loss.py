"""Speed and memory of `distill_loss` against what one would use instead.

    python kernels/benchmarks/loss.py                          # the full grid, on a GPU
    python kernels/benchmarks/loss.py --device cpu             # small shapes, anywhere
    python kernels/benchmarks/loss.py --hidden 960 --vocab 49152 --csv out.csv --png out.png

One measurement is forward and backward of cross-entropy plus forward KL at temperature 2, every
row with a teacher, student and teacher of one size. Before a provider is timed its gradients are
compared with fp64 on a few rows; one that fails is not timed. `floor` is the four matrix products
that nobody can avoid (two projections, two gradients), without any loss: speeds are quoted as
multiples of it. Peak memory is what a call needs beyond its inputs, its gradients included.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Timing, append_csv, ceilings, machine, measure, print_table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldistill_kernels import distill_loss
from ldistill_kernels.distill_loss.testing import plain_distill_loss

ALPHA, TEMPERATURE = 0.5, 2.0
GATE_ROWS, GATE_ERROR = 128, 0.03
GPU_GRID = {"hidden": [576, 960, 2048, 4096], "vocab": [49152, 128256],
            "rows": [1024, 2048, 4096, 8192, 16384, 32768]}  # fmt: skip
CPU_GRID = {"hidden": [64, 256], "vocab": [8192], "rows": [256, 1024]}


@dataclass(frozen=True)
class Shape:
    """One point of the grid; student and teacher alike."""

    hidden: int
    vocab: int
    rows: int

    @property
    def flops(self) -> int:
        """Of the four products."""
        return 8 * self.hidden * self.vocab * self.rows


@dataclass
class Heads:
    """States, heads and labels of one measurement."""

    h_s: Tensor
    w_s: Tensor
    h_t: Tensor
    w_t: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, shape: Shape, device: str, dtype: torch.dtype) -> Heads:
        """Random ones whose logits have a standard deviation of about 2."""
        gen = torch.Generator(device).manual_seed(0)

        def normal(rows: int, std: float) -> Tensor:
            values = torch.randn(rows, shape.hidden, generator=gen, device=device)
            return (values * std).to(dtype)

        std = 2.0 * shape.hidden**-0.5
        labels = torch.randint(shape.vocab, (shape.rows,), generator=gen, device=device)
        return cls(normal(shape.rows, 1.0).requires_grad_(),
                   normal(shape.vocab, std).requires_grad_(),
                   normal(shape.rows, 1.0), normal(shape.vocab, std), labels)  # fmt: skip

    def head_rows(self, rows: int) -> Heads:
        """The first rows, as leaves of their own."""
        return Heads(self.h_s[:rows].detach().requires_grad_(), self.w_s, self.h_t[:rows],
                     self.w_t, self.labels[:rows])  # fmt: skip

    def double(self) -> Heads:
        values = (x.detach().double() for x in (self.h_s, self.w_s, self.h_t, self.w_t))
        h_s, w_s, h_t, w_t = values
        return Heads(h_s.requires_grad_(), w_s.requires_grad_(), h_t, w_t, self.labels)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.h_s, self.w_s, self.h_t, self.w_t, self.labels

    @property
    def weights(self) -> dict[str, float]:
        rows = self.labels.numel()
        return {"ce_weight": (1 - ALPHA) / rows, "kd_weight": ALPHA / rows,
                "temperature": TEMPERATURE}  # fmt: skip


Loss = Callable[[Heads], Tensor]


def ours(heads: Heads) -> Tensor:
    return distill_loss(*heads.tensors, **heads.weights).loss


def plain(heads: Heads) -> Tensor:
    """Materialised logits, plain PyTorch, gradients from autograd."""
    return plain_distill_loss(*heads.tensors, **heads.weights)[0]


def chunked_autograd(heads: Heads, rows: int = 1024) -> Tensor:
    """As training libraries in plain PyTorch do it: fp32 chunks, recomputed in the backward."""
    weights, total = heads.weights, 0.0

    def part(h_s: Tensor, w_s: Tensor, h_t: Tensor, labels: Tensor) -> Tensor:
        student, teacher = h_s.float() @ w_s.float().t(), h_t.float() @ heads.w_t.float().t()
        ce = F.cross_entropy(student, labels, reduction="sum")
        log_q = F.log_softmax(student / TEMPERATURE, -1)
        log_p = F.log_softmax(teacher / TEMPERATURE, -1)
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return weights["ce_weight"] * ce + weights["kd_weight"] * TEMPERATURE**2 * kl

    for lo in range(0, heads.labels.numel(), rows):
        span = slice(lo, lo + rows)
        total = total + checkpoint(part, heads.h_s[span], heads.w_s, heads.h_t[span],
                                   heads.labels[span], use_reentrant=False)  # fmt: skip
    return total


def liger() -> Loss:
    """Liger's chunked distillation loss, which contains the cross-entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA * TEMPERATURE**2, beta=0.0,
        temperature=TEMPERATURE, compiled=torch.cuda.is_available(),
    )  # fmt: skip
    return lambda heads: module(heads.h_s, heads.w_s, heads.h_t, heads.w_t, heads.labels)


def providers() -> dict[str, Loss]:
    """Name -> loss; those whose package is missing are left out."""
    found: dict[str, Loss] = {"ours": ours, "plain": plain, "chunked-autograd": chunked_autograd}
    if importlib.util.find_spec("liger_kernel"):
        found["liger"] = liger()
    return found


def forward_backward(loss: Loss, heads: Heads) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(heads), (heads.h_s, heads.w_s))


def floor(heads: Heads) -> tuple[Tensor, ...]:
    """The four products in the dtype of the heads, and nothing else."""
    with torch.no_grad():
        logits = heads.h_s @ heads.w_s.t()
        teacher = heads.h_t @ heads.w_t.t()
        return logits @ heads.w_s, logits.t() @ heads.h_s, teacher


def gate(loss: Loss, heads: Heads) -> float:
    """Largest relative error of the gradients on a few rows, against fp64."""
    few = heads.head_rows(min(GATE_ROWS, heads.labels.numel()))
    want = forward_backward(plain, few.double())
    got = forward_backward(loss, few)
    return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want))


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
        except torch.OutOfMemoryError:
            yield at | {"provider": name, "note": "out of memory"}
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
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def record(shape: Shape, name: str, timing: Timing, floor_ms: float) -> dict[str, Any]:
    """One line of the table."""
    rate = shape.flops / timing.median / 1e9
    return asdict(shape) | {"provider": name} | timing.columns() | {
        "TFLOP/s": rate, "x floor": timing.median / floor_ms,
    }  # fmt: skip


def draw(lines: list[dict[str, Any]], path: str) -> None:
    """Time over rows, one panel per pair of sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [line for line in lines if "ms" in line]
    sizes = sorted({(line["hidden"], line["vocab"]) for line in timed})
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(4 * len(sizes), 3.2), squeeze=False)
    for axis, (hidden, vocab) in zip(axes[0], sizes):
        here = [line for line in timed if (line["hidden"], line["vocab"]) == (hidden, vocab)]
        for name in dict.fromkeys(line["provider"] for line in here):
            points = [(x["rows"], x["ms"]) for x in here if x["provider"] == name]
            axis.loglog(*zip(*points), marker="o", markersize=3, label=name)
        axis.set(title=f"hidden {hidden}, vocabulary {vocab}", xlabel="rows", ylabel="ms")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("hidden", "vocab", "rows"):
        parser.add_argument(f"--{name}", type=int, nargs="+")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--providers", nargs="+")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", help="append the records to this file")
    parser.add_argument("--png", help="draw time over rows into this file")
    options = parser.parse_args(arguments)
    grid = CPU_GRID if options.device == "cpu" else GPU_GRID
    for name, values in grid.items():
        if getattr(options, name) is None:
            setattr(options, name, values)
    if options.dtype is None:  # 16-bit products are slow on most CPUs, for plain PyTorch above all
        options.dtype = "float32" if options.device == "cpu" else "bfloat16"
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print a table per shape; write CSV and PNG on request."""
    options = parse(arguments)
    found, dtype = providers(), getattr(torch, options.dtype)
    unknown = sorted(set(options.providers or ()) - set(found))
    if unknown:
        raise SystemExit(f"no provider {', '.join(unknown)} here, only {', '.join(found)}")
    chosen = {name: found[name] for name in options.providers or found}
    top = ceilings(options.device, dtype)
    where = machine(options.device) | {"dtype": options.dtype, "ceiling TFLOP/s": top.tflops}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    records = []
    for sizes in product(options.hidden, options.vocab, options.rows):
        lines = list(measurements(Shape(*sizes), options.device, dtype, chosen, options.repeats))
        print_table(lines)
        records += [line | where for line in lines]
    if options.csv:
        append_csv(options.csv, records)
    if options.png:
        draw(records, options.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
