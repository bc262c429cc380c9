"""Speed of `shared_kv_attention` against what one would use instead.

    python kernels/benchmarks/attention.py                     # the work shapes, on a GPU
    python kernels/benchmarks/attention.py --device cpu        # small shapes, anywhere
    python kernels/benchmarks/attention.py --shapes packed-b32 --csv out.csv --plot out.png
    python kernels/benchmarks/attention.py --warm              # compile all of it in parallel
    python kernels/benchmarks/attention.py --shapes dense-4k --sweep     # try other tiles

Before a provider is timed its result (and gradients) are compared with fp64; one that fails is
not timed. Arithmetic is counted on visible pairs, 2.5 times as much in the backward; bytes are
what must be read and written once. Shares are of a large matrix product and a large copy timed
in the same run. Masks and index arrays are ready beforehand; copies that a provider needs count.
Milliseconds are the GPU's, which starts when the host has launched the call; the host's own time
is the column `launch us`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import torch
import torch._functorch.config
from attention_plot import plot
from attention_providers import PROVIDERS, Attention, Problem, ours
from common import ahead, append_csv, ceilings, machine, measure, print_table, reason
from torch import Tensor

from ldistill_kernels.shared_kv_attention.configs import BackwardConfig, Config, override
from ldistill_kernels.shared_kv_attention.reference import reference_forward
from ldistill_kernels.testing import make_case, pack_documents

GATE_ERROR = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """One point of the grid. `queries`: how many a document may have, its share, None for all."""

    batch: int
    seq: int
    heads: tuple[int, int] = (15, 5)
    head_dim: int = 64
    lengths: tuple[int, ...] = ()
    queries: tuple[int, ...] | float | None = None

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        generator, lengths = torch.Generator().manual_seed(0), list(self.lengths or (self.seq,))
        counts = list(self.queries) if isinstance(self.queries, tuple) else [self.seq]
        documents = pack_documents(self.batch, self.seq, lengths, counts, generator)
        if isinstance(self.queries, float):
            documents = [
                [(start, length, max(1, round(length * self.queries))) for start, length, _ in row]
                for row in documents
            ]
        case = make_case(
            documents, seq=self.seq, heads=self.heads, head_dim=self.head_dim, device=device
        )
        return Problem(case.cast(dtype), dense=not self.lengths and self.queries is None)


LENGTHS, QUERIES = (120, 150, 180, 210, 240), (5, 10, 20, 50)  # as the recipes' data packs
GPU_SHAPES = {  # what the goals are about first: a run that is short of time leaves out the rest
    "packed-b32": Shape(32, 1024, lengths=LENGTHS, queries=QUERIES),
    "packed-b8-5tokens": Shape(8, 1024, lengths=LENGTHS, queries=(5,)),
    "packed-b8-20percent": Shape(8, 1024, lengths=LENGTHS, queries=0.2),
    "dense-4k": Shape(2, 4096),
    "dense-4k-d128": Shape(2, 4096, (32, 32), 128),
    "packed-b32-5tokens": Shape(32, 1024, lengths=LENGTHS, queries=(5,)),
    "dense-8k": Shape(1, 8192),
    "packed-7b": Shape(8, 1024, (32, 32), 128, LENGTHS, QUERIES),
    "packed-b128": Shape(128, 1024, lengths=LENGTHS, queries=QUERIES),
    "packed-b8": Shape(8, 1024, lengths=LENGTHS, queries=QUERIES),
    "dense-2k": Shape(4, 2048),
    "dense-1k": Shape(8, 1024),
    "packed-tiny": Shape(32, 1024, lengths=(16, 24, 32), queries=(2, 4, 8)),
    "dense-4k-13b": Shape(2, 4096, (40, 40), 128),
}
CPU_SHAPES = {
    "packed-small": Shape(2, 512, (6, 2), lengths=LENGTHS, queries=QUERIES),
    "packed-small-5tokens": Shape(2, 512, (6, 2), lengths=LENGTHS, queries=(5,)),
    "packed-small-20percent": Shape(2, 512, (6, 2), lengths=LENGTHS, queries=0.2),
    "packed-wide": Shape(1, 512, (4, 4), 128, LENGTHS, QUERIES),
    **{f"dense-{seq}": Shape(1, seq, (6, 2)) for seq in (128, 256, 512)},
}


@lru_cache(maxsize=1)
def drawn(name: str, device: str, dtype: torch.dtype) -> Problem:
    return (GPU_SHAPES | CPU_SHAPES)[name].problem(device, dtype)


def inputs(problem: Problem) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in problem.case.positional[:3])


def exact(problem: Problem) -> tuple[Tensor, ...]:
    """Output and gradients of q, k, v in fp64, for an output gradient of ones."""
    leaves = [x.detach().double().requires_grad_() for x in problem.case.positional[:3]]
    out, _ = reference_forward(*leaves, *problem.case.positional[3:])
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


# A compiled provider must keep what its forward saved: timing runs one backward many times, which
# PyTorch refuses where the first may write over it. Gate and timing share what is compiled.
keep_saved = torch._functorch.config.patch(donated_buffer=False)


def results(attend: Attention, problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    leaves = inputs(problem)
    out = attend(*leaves)
    return (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))) if backward else (out,)


@keep_saved
def gate(attend: Attention, problem: Problem, truth: tuple[Tensor, ...]) -> float:
    """Largest relative error over what `truth` holds: the output, then dq, dk, dv."""
    actual = results(attend, problem, len(truth) > 1)
    return max(float((a.detach() - t).norm() / t.norm()) for a, t in zip(actual, truth))


def work(problem: Problem, backward: bool) -> tuple[float, float]:
    """(floating-point operations, bytes that must move)."""
    q, k = problem.case.q, problem.case.k
    flops = 4 * problem.pairs * q.shape[1] * q.shape[2]
    memory = problem.positions * k.shape[1] * k.shape[3] * k.element_size()
    rows = q.numel() * q.element_size()
    if backward:  # q, out, grad read and dq written; k, v read and dk, dv written whole
        return 2.5 * flops, 4 * rows + 2 * memory + 2 * k.numel() * k.element_size()
    return flops, 2 * rows + 2 * memory


def launch_us(function: Any, calls: int = 30) -> float:
    """Host time of one call: what a layer costs when the GPU is faster than Python."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return host / calls * 1e6


@keep_saved
def timed(attend: Attention, problem: Problem, backward: bool, options: Any) -> dict[str, Any]:
    """The measured columns of one record."""
    leaves = inputs(problem)
    if backward:
        out = attend(*leaves)
        ones = torch.ones_like(out)

        def function() -> Any:
            return torch.autograd.grad(out, leaves, ones, retain_graph=True)
    else:

        def function() -> Any:
            with torch.no_grad():
                return attend(*leaves)

    timing = measure(function, options.device, options.repeats)
    top = ceilings(options.device, options.torch_dtype)
    flops, moved = work(problem, backward)
    tflops, tbytes = flops / timing.median / 1e9, moved / timing.median / 1e9
    columns = timing.columns()
    if problem.case.q.is_cuda:
        columns["launch us"] = launch_us(function)
    return columns | {"TFLOP/s": tflops, "of matmul": tflops / top.tflops, "TB/s": tbytes,
                      "of copy": tbytes / top.tbytes, "flop/byte": flops / moved}  # fmt: skip


def records(name: str, options: Any) -> Iterator[dict[str, Any]]:
    """One record per provider and pass; a provider that cannot run says why."""
    problem = drawn(name, options.device, options.torch_dtype)
    truth = exact(problem)
    _, _, seq, head_dim = problem.case.k.shape
    for provider in options.providers:
        head = {"shape": name, "seq": seq, "head dim": head_dim, "provider": provider}
        torch.compiler.reset()
        try:
            attend = PROVIDERS[provider](problem)
            # Of two segments the second takes its part of dk and dv.
            count = 2 if provider == "ours two segments" else len(truth)
            error = gate(attend, problem, truth[: count if "backward" in options.passes else 1])
            if not error <= GATE_ERROR[options.torch_dtype]:
                yield head | {"note": f"off by {error:.1%}, not timed"}
                continue
            for kind in options.passes:
                columns = timed(attend, problem, kind == "backward", options)
                yield head | {"pass": kind} | columns | {"error": error}
        except Exception as error:  # a peer that lacks a shape must not end the run
            yield head | {"note": reason(error)}


def against_ours(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By pass, each with its time as a multiple of ours: what a record says at a glance."""
    ours = {r["pass"]: r["ms"] for r in found if r["provider"] == "ours" and "ms" in r}
    for record in found:
        if "ms" in record and record["pass"] in ours:
            record["x ours"] = record["ms"] / ours[record["pass"]]
    return sorted(found, key=lambda record: record.get("pass", ""), reverse=True)


COMPILED = ("ours", "ours two segments", "flex")


@keep_saved
def warm(name: str, provider: str, passes: tuple, device: str, dtype: torch.dtype) -> str:
    """Run one provider once, in a process of its own: what it compiles is then on disk."""
    try:
        problem = drawn(name, device, dtype)
        results(PROVIDERS[provider](problem), problem, "backward" in passes)
    except Exception as error:
        return reason(error)
    return ""


# Registers a thread with which a multiprocessor holds three blocks of 4 warps, or two of 8.
LIMIT = {4: 168, 8: 128}
# Tiles worth a try, with and without a limit on their registers.
SWEEP = {
    "forward": [
        Config(m, n, warps, stages, limit)
        for m, n, warps in ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 4),
                            (128, 64, 8), (128, 128, 8))
        for stages in (2, 3, 4)
        for limit in (None, LIMIT[warps])
    ],
    "backward": [
        BackwardConfig(*dq, *dkv, warps, stages, limit)
        for dq, dkv in (((64, 32), (32, 64)), ((64, 64), (32, 64)), ((64, 64), (64, 64)),
                        ((128, 32), (32, 128)), ((128, 64), (32, 64)), ((128, 64), (32, 128)),
                        ((128, 64), (64, 128)))
        for warps, limit in ((4, None), (4, LIMIT[4]), (8, None))
        for stages in (1, 2)
    ],
}  # fmt: skip
Tile = Config | BackwardConfig | None  # None: the shipped one


def with_tile(kind: str, tile: Tile) -> Any:
    return override(**{kind: tile}) if tile else nullcontext()


def try_tile(name: str, kind: str, tile: Tile, device: str, dtype: torch.dtype) -> str:
    """Compile one tile, in a process of its own; what is wrong with it, or ""."""
    try:
        problem = drawn(name, device, dtype)
        with with_tile(kind, tile):
            results(ours(problem), problem, kind == "backward")
    except Exception as error:  # tiles that need too much shared memory
        return reason(error)
    return ""


def sweep(options: Any, ends: float) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Per shape the records of ours with other tiles; the tables in configs.py are made from them.

    Tiles are compiled in parallel first, for half of the time at most.
    """
    about = options.device, options.torch_dtype
    jobs = [
        (name, kind, tile, *about)
        for name in options.shapes
        for kind in options.passes
        for tile in (None, *SWEEP[kind])
    ]
    wrong = dict.fromkeys(jobs, "")
    if options.device != "cpu":
        wrong = ahead(try_tile, jobs, (ends - time.monotonic()) / 2, options.workers)
    for name in options.shapes:
        truth, found = None, []
        for job in (job for job in jobs if job[0] == name):
            _, kind, tile, *_ = job
            if time.monotonic() > ends:
                print(f"{name}: time is up, the {kind} tiles from {tile} on are left out")
                break
            head = {"shape": name, "pass": kind, "config": tile_name(tile)}
            if wrong.get(job, "not compiled in time"):
                found.append(head | {"note": wrong.get(job, "not compiled in time")})
                continue
            problem = drawn(name, *about)
            truth = truth or exact(problem)
            found.append(head | time_tile(problem, kind, tile, truth, options))
        yield name, sorted(found, key=lambda record: (record["pass"], record.get("ms", 1e9)))


def tile_name(tile: Tile) -> str:
    return "x".join(str(x) for x in astuple(tile) if x is not None) if tile else "shipped"


def time_tile(
    problem: Problem, kind: str, tile: Tile, truth: tuple[Tensor, ...], options: Any
) -> dict[str, Any]:
    """The measured columns of one tile, or a note."""
    try:
        with with_tile(kind, tile):
            attend = ours(problem)
            error = gate(attend, problem, truth if kind == "backward" else truth[:1])
            if error <= GATE_ERROR[options.torch_dtype]:
                return timed(attend, problem, kind == "backward", options)
            return {"note": f"off by {error:.1%}, not timed"}
    except Exception as error:
        return {"note": reason(error)}


def winners(name: str, found: list[dict[str, Any]]) -> Iterator[str]:
    """What a sweep says about a shape: the best tile of each pass, and what it gains."""
    for kind in dict.fromkeys(record["pass"] for record in found):
        times = {r["config"]: r["ms"] for r in found if r["pass"] == kind and "ms" in r}
        if "shipped" in times:
            best = min(times, key=times.get)
            yield f"{name} {kind}: {best} takes {times[best] / times['shipped']:.2f} of the shipped"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=[*GPU_SHAPES, *CPU_SHAPES])
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS))
    parser.add_argument("--passes", nargs="+", choices=["forward", "backward"],
                        default=["forward", "backward"])  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warm", action="store_true", help="compile in parallel, time nothing")
    parser.add_argument("--sweep", action="store_true", help="time ours with other tiles")
    parser.add_argument("--workers", type=int, help="processes that compile; default: all cores")
    parser.add_argument("--seconds", type=float, help="start no new shape or tile after this long")
    parser.add_argument("--csv", help="append the records to this file")
    parser.add_argument(
        "--plot", help="draw times, throughput over length and the roofline here (PNG)"
    )
    options = parser.parse_args(arguments)
    cpu = options.device == "cpu"
    options.shapes = options.shapes or list(CPU_SHAPES if cpu else GPU_SHAPES)
    options.providers = options.providers or PROVIDERS.here(options.device)
    options.torch_dtype = getattr(torch, options.dtype or ("float32" if cpu else "bfloat16"))
    return options


def compile_ahead(options: Any) -> None:
    """What `--warm` does."""
    providers = [name for name in options.providers if name in COMPILED]
    about = tuple(options.passes), options.device, options.torch_dtype
    jobs = [(name, provider, *about) for name in options.shapes for provider in providers]
    done = ahead(warm, jobs, options.seconds, options.workers)
    for name, provider, *_ in jobs:
        wrong = done.get((name, provider, *about), "not compiled in time")
        print(f"{name} {provider}: {wrong or 'compiled'}")


def measured(options: Any, ends: float) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Per shape the records of all providers."""
    for name in options.shapes:
        if time.monotonic() > ends:
            print(f"\n{name}: left out, {options.seconds:.0f} seconds are over")
        else:
            yield name, against_ours(list(records(name, options)))


def main(arguments: list[str] | None = None) -> None:
    """Print a table per shape; CSV and plot on request."""
    options = parse(arguments)
    ends = time.monotonic() + (options.seconds or float("inf"))
    if options.warm:
        return compile_ahead(options)
    about = machine(options.device)
    top = ceilings(options.device, options.torch_dtype)
    print(*(f"{key} {value}" for key, value in about.items()), sep=", ")
    print(f"ceilings: {top.tflops:.3g} TFLOP/s {options.torch_dtype}, {top.tbytes:.3g} TB/s")
    PROVIDERS.print_missing()
    everything = []
    for name, found in (sweep if options.sweep else measured)(options, ends):
        print(f"\n{name}: {(GPU_SHAPES | CPU_SHAPES)[name]}")
        print_table(found, hidden=("shape", "seq", "head dim"))
        if options.sweep:
            print(*winners(name, found), sep="\n")
        sys.stdout.flush()
        everything += [about | {"dtype": str(options.torch_dtype)} | record for record in found]
        if options.csv and found:  # a sweep may have had no time for this shape
            append_csv(options.csv, everything[-len(found) :])
    if options.plot and not options.sweep:
        plot(everything, top, options.plot)


if __name__ == "__main__":
    main()
