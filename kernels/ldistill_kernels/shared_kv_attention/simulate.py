"""How well tiles are filled and how long the longest chain of steps is, counted without a GPU.

    python -m ldistill_kernels.shared_kv_attention.simulate

Runs the kernels themselves in Triton's interpreter with the arithmetic of a step replaced by a
count, so what is counted is their own schedule. Lengths are drawn as in the paper's Table 5.

`fill` is the share of the computed (lane, position) pairs that are visible, of the backward in its
dQ and in its dK/dV programs. `makespan` is when the last program ends, counted in steps: programs
start in the order of the launch on two places of each of 132 multiprocessors, and each program and
each of its runs costs two steps more. A step of 16 lanes counts like one of 64 or 128, and nothing
here is a measured time.
"""

import argparse
import heapq
import inspect
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from ldistill_kernels import plan_tiles, shared_kv_attention
from ldistill_kernels.shared_kv_attention import triton_bwd, triton_fwd
from ldistill_kernels.shared_kv_attention.configs import (
    backward_table,
    forward_table,
    is_dense,
    override,
)
from ldistill_kernels.testing import AttentionCase, make_case

HOPPER, HEAD_DIM, HEADS = 227, 64, (15, 5)
PLACES = 132 * 2
STARTUP = 2  # steps that a program, and that each run, costs beside its own
# Text tokens (median, 95th percentile, longest) of the sources that distil, then of the others.
LANGUAGE = (
    (60, 100, 116), (187, 307, 321), (35, 56, 664), (102, 425, 1974), (118, 549, 15171),
    (197, 705, 972), (58, 192, 673), (26, 80, 98),
)  # fmt: skip
DOCUMENT = (
    (88, 225, 329), (35, 92, 134), (90, 265, 357), (97, 234, 310), (102, 124, 162), (21, 30, 35),
    (34, 48, 56), (126, 182, 217), (70, 241, 292),
)  # fmt: skip
PICTURE, SHORTEST = 66, 12  # tokens of a picture with what precedes it, of the shortest text


def documents(rows: int, seq: int, answer: int | float, seed: int = 0) -> list:
    """Documents as `make_case` takes them, of both categories in turn; one category is asked for.

    `answer` is a number of tokens, or a share of the document.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rows):
        row, start = [], 0
        while seq - start >= PICTURE + SHORTEST:
            asked = bool(rng.integers(2))
            sources = LANGUAGE if asked else DOCUMENT
            median, p95, longest = sources[rng.integers(len(sources))]
            text = median * math.exp(math.log(p95 / median) / 1.645 * rng.standard_normal())
            length = min(PICTURE + max(int(min(text, longest)), SHORTEST), seq - start)
            count = answer if isinstance(answer, int) else round(answer * length)
            row.append((start, length, min(count, length - PICTURE) if asked else 0))
            start += length
        found.append(row)
    return found


@dataclass
class Schedule:
    """What the programs of one launch did."""

    steps: Counter = field(default_factory=Counter)  # by program
    runs: Counter = field(default_factory=Counter)
    pairs: Counter = field(default_factory=Counter)  # (lane, position) pairs by kind of step
    programs: int = 0

    def makespan(self) -> int:
        """When the last program ends: each starts where a place is free first."""
        free = [0] * PLACES
        for program in range(self.programs):
            cost = self.steps[program] + STARTUP * (self.runs[program] + 1)
            heapq.heapreplace(free, free[0] + cost)
        return max(free)


@contextmanager
def recorded() -> Iterator[Schedule]:
    """The kernels with the arithmetic of their steps replaced by a record of them."""
    found = Schedule()

    def step(module, name: str, results: int) -> None:
        signature = inspect.signature(getattr(module, name).fn)

        def record(*values):
            given = signature.bind(*values).arguments
            lanes, columns = given.get("low"), given.get("columns")
            height = given["BLOCK_M"] if lanes is None else lanes.shape[0]
            width = given["BLOCK_N"] if columns is None else columns.shape[0]
            found.steps[interpreter_builder.grid_idx[0]] += 1
            found.pairs[name] += int(height) * int(width)
            found.programs = interpreter_builder.grid_dim[0]
            return values[:results]

        patches.enter_context(mock.patch.object(module, name, record))

    def run(module, name: str) -> None:
        original = getattr(module, name)

        def record(*values):
            found.runs[interpreter_builder.grid_idx[0]] += 1
            return original(*values)

        patches.enter_context(mock.patch.object(module, name, record))

    with ExitStack() as patches:
        step(triton_fwd, "_attend_columns", 4)
        step(triton_bwd, "_add_columns", 2)
        step(triton_bwd, "_add_queries", 4)
        for module in (triton_fwd, triton_bwd):
            run(module, "run_at")
            run(module, "whole_run")
        yield found


def simulate(case: AttentionCase, tiles: Tensor | None) -> Iterator[tuple[str, dict]]:
    """(pass, what its launch did) with the tiles that sm_90 takes for bf16."""
    dense = tiles is None and is_dense(len(case.batch), case.k.shape[0], case.k.shape[2])
    forward = forward_table()[HOPPER, HEAD_DIM, 2, dense]
    backward = backward_table()[HOPPER, HEAD_DIM, 2]
    visible = int((case.position - case.start + 1).sum()) * case.q.shape[1]
    leaves = [x.requires_grad_() for x in case.positional[:3]]
    with override(forward=forward, backward=backward):
        with recorded() as schedule:
            out = shared_kv_attention(
                *leaves, *case.positional[3:], tiles=tiles, kernels="triton", check=False
            )
        yield "forward", _columns(schedule, visible, ("_attend_columns",))
        with recorded() as schedule:
            out.sum().backward()
        yield "backward", _columns(schedule, visible, ("_add_columns", "_add_queries"))


def _columns(schedule: Schedule, visible: int, kinds: tuple[str, ...]) -> dict:
    return {
        "programs": schedule.programs,
        "steps": sum(schedule.steps.values()),
        "fill": [visible / schedule.pairs[kind] for kind in kinds],
        "makespan": schedule.makespan(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="simulate", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32], help="batch rows")
    parser.add_argument("--answers", nargs="+", default=["5", "0.2"], help="tokens, or a share")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--heads", type=int, nargs=2, default=HEADS, help="query and key heads")
    options = parser.parse_args(arguments)
    print(
        f"{'batch':<22} {'pass':<9} {'tiles':<6} {'programs':>8} {'steps':>7} fill       makespan"
    )
    for rows in options.rows:
        for answer in options.answers:
            count = float(answer) if "." in answer else int(answer)
            name = f"{rows}x{options.seq} " + (
                f"{count:.0%}" if "." in answer else f"{count} tokens"
            )
            case = make_case(
                documents(rows, options.seq, count), seq=options.seq, heads=tuple(options.heads)
            )
            group = options.heads[0] // options.heads[1]
            table = plan_tiles(*case.positional[3:], group=group, memory=(rows, options.seq))
            for label, tiles in (("none", None), ("table", table)):
                for kind, found in simulate(case, tiles):
                    fill = " / ".join(f"{share:.0%}" for share in found["fill"])
                    print(
                        f"{name:<22} {kind:<9} {label:<6} "
                        f"{found['programs']:>8} {found['steps']:>7} {fill:<10} "
                        f"{found['makespan']:>8}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
