"""Which goals a run reached, from its CSV files.

    python kernels/benchmarks/goals.py attention.csv loss.csv

A goal is judged by the worst of the measurements that it is about. The last line names the goals
that were not reached, and those that nothing was measured for.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import print_table

Record = dict[str, Any]
Values = Iterator[tuple[float, str]]  # what was measured, and where

COPYING = ("gather+sdpa", "gather+sdpa repeat", "flex", "varlen", "flash-attn")
REPEATING = ("sdpa repeat",)


@dataclass(frozen=True)
class Goal:
    """`measured` gives the values that must all be at least (or at most) `bound`."""

    name: str
    bound: float
    measured: Callable[[list[Record]], Values]
    at_most: bool = False

    @property
    def text(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"

    def worst(self, records: list[Record]) -> tuple[float, str] | None:
        found = list(self.measured(records))
        return (max if self.at_most else min)(found, default=None)

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def attention(
    kind: str, packed: bool, head_dim: int | None = None, least: int = 0
) -> Callable[[list[Record]], Iterator[tuple[str, dict[str, Record]]]]:
    """Of each shape the goal is about: its name, and its records of one pass by provider."""

    def shapes(records: list[Record]) -> Iterator[tuple[str, dict[str, Record]]]:
        here = [
            r
            for r in records
            if r.get("pass") == kind
            and "ms" in r
            and r["shape"].startswith("packed") == packed
            and r["seq"] >= least
            and r["head dim"] == (head_dim or r["head dim"])
        ]
        for name in dict.fromkeys(r["shape"] for r in here):
            yield name, {r["provider"]: r for r in here if r["shape"] == name}

    return shapes


def faster(shapes: Callable, peers: tuple[str, ...]) -> Callable[[list[Record]], Values]:
    """How many times as long the fastest of the peers takes."""

    def values(records: list[Record]) -> Values:
        for name, by in shapes(records):
            times = [by[peer]["ms"] for peer in peers if peer in by]
            if "ours" in by and times:
                yield min(times) / by["ours"]["ms"], name

    return values


def share(shapes: Callable) -> Callable[[list[Record]], Values]:
    def values(records: list[Record]) -> Values:
        yield from ((by["ours"]["of matmul"], name) for name, by in shapes(records) if "ours" in by)

    return values


def copied(records: list[Record]) -> Values:
    """Share of the copy's rate, of shapes that it bounds and not the matrix product's."""
    for r in records:
        if r.get("provider") == "ours" and r.get("of copy", 0) > r.get("of matmul", 0):
            yield r["of copy"], f"{r['shape']} {r['pass']}"


def segments(shapes: Callable) -> Callable[[list[Record]], Values]:
    def values(records: list[Record]) -> Values:
        for name, by in shapes(records):
            if {"ours", "ours two segments"} <= by.keys():
                yield by["ours two segments"]["ms"] / by["ours"]["ms"], name

    return values


def losses(
    value: Callable[[dict[str, Record]], float | None],
    hidden: range = range(1, 1 << 20),
    targets: int = 2048,
) -> Callable[[list[Record]], Values]:
    """`value` of the providers' records, of each size the goal is about."""

    def values(records: list[Record]) -> Values:
        here = [
            r
            for r in records
            if r.get("kind") == "distill"
            and "ms" in r
            and r["hidden"] in hidden
            and r["targets"] >= targets
        ]
        for size in dict.fromkeys((r["hidden"], r["vocab"], r["targets"]) for r in here):
            by = {r["provider"]: r for r in here if (r["hidden"], r["vocab"], r["targets"]) == size}
            found = value(by) if "ours" in by else None
            if found is not None:
                yield found, "hidden {:g}, vocabulary {:g}, {:g} targets".format(*size)

    return values


def against(peer: str, column: str, turned: bool = False) -> Callable[[dict], float | None]:
    """The peer's number as a multiple of ours; `turned`: ours of the peer's."""

    def value(by: dict[str, Record]) -> float | None:
        if peer not in by or column not in by[peer]:
            return None
        ratio = by[peer][column] / by["ours"][column]
        return 1 / ratio if turned else ratio

    return value


def extra_mib(by: dict[str, Record]) -> float | None:
    """Peak memory beyond the gradients and the fp32 sum of the head's."""
    ours = by["ours"]
    if "peak MiB" not in ours:
        return None
    return ours["peak MiB"] - ours["hidden"] * (4 * ours["vocab"] + 2 * ours["targets"]) / 2**20


LARGE = range(2048, 1 << 20)
PASSES = ("forward", "backward")
GOALS = [
    *(Goal(f"packed, {kind}, against the fastest peer", 2, faster(attention(kind, True), COPYING))
      for kind in PASSES),
    Goal("dense, head dim 64, forward, against SDPA with its copies", 1.4,
         faster(attention("forward", False, 64), REPEATING)),
    Goal("dense, forward, against FlexAttention", 1.1,
         faster(attention("forward", False), ("flex",))),
    *(Goal(f"dense, >= 4k, head dim {dim}, {kind}, share of the matrix product", bound,
           share(attention(kind, False, dim, 4096)))
      for dim, bounds in ((64, (0.40, 0.27)), (128, (0.58, 0.38)))
      for kind, bound in zip(PASSES, bounds)),
    Goal("bound by memory, share of the copy", 0.35, copied),
    *(Goal(f"two segments against one, {kind}, {'packed' if packed else 'dense'}", 1.05,
           segments(attention(kind, packed)), at_most=True)
      for packed in (True, False) for kind in PASSES),
    Goal("loss, hidden 960, multiples of the four products", 2.2,
         losses(lambda by: by["ours"]["x floor"], range(960, 961)), at_most=True),
    Goal("loss, hidden >= 2048, multiples of the four products", 1.35,
         losses(lambda by: by["ours"]["x floor"], LARGE), at_most=True),
    Goal("loss, times plain PyTorch's speed", 2.5, losses(against("plain", "ms"))),
    Goal("loss, share of plain PyTorch's memory", 0.1,
         losses(against("plain", "peak MiB", turned=True), targets=8192), at_most=True),
    Goal("loss, hidden >= 2048, times Liger's speed", 1.3, losses(against("liger", "ms"), LARGE)),
    Goal("loss, hidden <= 960, times Liger's speed", 2.5,
         losses(against("liger", "ms"), range(1, 961))),
    Goal("loss, MiB beyond gradients", 512, losses(extra_mib), at_most=True),
]  # fmt: skip


def read(path: str) -> list[Record]:
    """The lines of a CSV, numbers as numbers, empty cells left out."""
    if not Path(path).exists():
        return []
    with Path(path).open(newline="") as lines:
        return [
            {name: _number(text) for name, text in line.items() if text}
            for line in csv.DictReader(lines)
        ]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def judge(records: list[Record]) -> tuple[list[Record], str]:
    """The table of goals, and the line that says which were not reached."""
    lines, missed, unknown = [], [], []
    for goal in GOALS:
        worst = goal.worst(records)
        line = {"goal": goal.name, "bound": goal.text}
        if worst is None:
            unknown.append(goal.name)
            lines.append(line | {"measured": "not measured"})
            continue
        value, where = worst
        reached = goal.reached(value)
        lines.append(line | {"measured": value, "reached": "yes" if reached else "NO", "at": where})
        if not reached:
            missed.append(f"{goal.name} ({value:.3g}, goal {goal.text})")
    reached = len(GOALS) - len(missed) - len(unknown)
    said = f"{reached} of {len(GOALS)} goals reached; not reached: {'; '.join(missed) or 'none'}"
    return lines, f"{said}; not measured: {'; '.join(unknown) or 'none'}"


def main(paths: list[str] | None = None) -> None:
    """Print the table and the line."""
    records = [record for path in paths or sys.argv[1:] for record in read(path)]
    lines, said = judge(records)
    print_table(lines)
    print(said)


if __name__ == "__main__":
    main()
