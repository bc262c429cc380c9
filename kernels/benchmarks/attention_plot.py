"""The figure of the attention benchmark: time, throughput over length, roofline."""

from __future__ import annotations

import itertools
from typing import Any

from common import Ceilings, colours, pyplot, save


def plot(found: list[dict[str, Any]], top: Ceilings, path: str) -> None:
    """Time of the packed shapes, throughput over length of the dense ones, roofline of ours."""
    measured = [record for record in found if "ms" in record]
    plt = pyplot()
    if plt is None or not measured:
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    palette = colours(measured)
    draw_times(left, [r for r in measured if r["shape"].startswith("packed")], palette)
    draw_lengths(middle, [r for r in measured if r["shape"].startswith("dense")], palette, top)
    draw_roofline(right, [r for r in measured if r["provider"] == "ours"], top)
    save(figure, path, found)
    plt.close(figure)


def draw_times(axis: Any, found: list[dict[str, Any]], palette: dict[str, str]) -> None:
    """Bars: the forward on packed supervised rows, as multiples of ours."""
    found = [r for r in found if r["pass"] == "forward" and "x ours" in r]
    shapes = list(dict.fromkeys(r["shape"] for r in found))
    names = [name for name in palette if any(r["provider"] == name for r in found)]
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        mine = [r for r in found if r["provider"] == name]
        x = [shapes.index(r["shape"]) + (i - (len(names) - 1) / 2) * width for r in mine]
        bars = axis.bar(x, [r["x ours"] for r in mine], width, color=palette[name], label=name)
        labels = [f"{r['ms']:.3g} ms" if name == "ours" else f"{r['x ours']:.1f}" for r in mine]
        axis.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
    axis.axhline(1, color="#5a606b", linewidth=0.8)
    axis.set(title="supervised rows, forward", ylabel="time, ours = 1", yscale="log")
    axis.set_xticks(range(len(shapes)), shapes)
    axis.grid(False, axis="x")
    axis.margins(y=0.2)
    if found:
        axis.legend(ncols=2)


def draw_lengths(
    axis: Any, found: list[dict[str, Any]], palette: dict[str, str], top: Ceilings
) -> None:
    """Lines: throughput over the length of one document, under the matrix product's."""
    usual = min((r["head dim"] for r in found), default=0)
    for name, kind in itertools.product(palette, ("forward", "backward")):
        line = sorted(
            (r["seq"], r["TFLOP/s"])
            for r in found
            if (r["provider"], r["pass"], r["head dim"]) == (name, kind, usual)
        )
        if line:
            style = {"linestyle": "-", "label": name} if kind == "forward" else {"linestyle": ":"}
            axis.plot(*zip(*line), marker="o", markersize=4, color=palette[name], **style)
    axis.axhline(top.tflops, color="black", linestyle="--", linewidth=1, label="matrix product")
    axis.set(title=f"every row, head dim {usual} (dotted: backward)", yscale="log",
             xlabel="positions of one document", ylabel="TFLOP/s on visible pairs")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.legend(ncols=2)


def draw_roofline(axis: Any, mine: list[dict[str, Any]], top: Ceilings) -> None:
    """Points of ours under the two measured ceilings."""
    ridge = top.tflops / top.tbytes
    low, high = min(ridge / 8, *(r["flop/byte"] / 2 for r in mine), ridge), ridge * 32
    axis.plot([low, ridge, high], [low * top.tbytes, top.tflops, top.tflops], color="black")
    for kind, marker in (("forward", "o"), ("backward", "s")):
        points = [r for r in mine if r["pass"] == kind]
        x, y = [r["flop/byte"] for r in points], [r["TFLOP/s"] for r in points]
        axis.scatter(x, y, marker=marker, s=24, label=kind, zorder=3)
        for r in points if kind == "forward" else ():
            place = r["flop/byte"], r["TFLOP/s"]
            axis.annotate(r["shape"], place, (5, -3), textcoords="offset points", fontsize=7)
    axis.set(title="ours under the ceilings of this run", xscale="log", yscale="log",
             xlabel="floating-point operations per byte", ylabel="TFLOP/s")  # fmt: skip
    axis.legend(loc="lower right")
