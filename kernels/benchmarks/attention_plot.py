"""The figure of the attention benchmark: time, throughput over length, roofline."""

from __future__ import annotations

import itertools
from typing import Any

from common import Ceilings, colours, pyplot, save

TALLEST = 12  # of the bars; taller ones are cut and carry their number


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
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in palette.values()]
    figure.legend(handles, list(palette), loc="outside upper center", ncols=len(palette))
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
        times = [r["x ours"] for r in mine]
        axis.bar(x, times, width, color=palette[name])
        for at, value, record in zip(x, times, mine):
            text = f"{record['ms']:.3g} ms" if name == "ours" else f"{value:.1f}"
            axis.text(at, min(value, TALLEST) + 0.1, text, fontsize=6, rotation=90, ha="center")
    axis.axhline(1, color="#5a606b", linewidth=0.8)
    axis.set(title="supervised rows, forward", ylabel="time, ours = 1")
    axis.set_ylim(0, min(max((r["x ours"] for r in found), default=1), TALLEST) + 1)
    axis.set_xticks(range(len(shapes)), shapes)
    axis.grid(False, axis="x")


def draw_lengths(
    axis: Any, found: list[dict[str, Any]], palette: dict[str, str], top: Ceilings
) -> None:
    """Lines: throughput over the length of one document, under the matrix product's."""
    lengths = sorted({r["seq"] for r in found})
    usual = min((r["head dim"] for r in found), default=0)
    for name, kind in itertools.product(palette, ("forward", "backward")):
        line = sorted(
            (r["seq"], r["TFLOP/s"])
            for r in found
            if (r["provider"], r["pass"], r["head dim"]) == (name, kind, usual)
        )
        if line:
            style = "-" if kind == "forward" else ":"
            axis.plot(*zip(*line), style, marker="o", markersize=4, color=palette[name])
    axis.axhline(top.tflops, color="black", linestyle="--", linewidth=1)
    axis.annotate("matrix product", (0, top.tflops), (4, 3), fontsize=7,
                  xycoords=axis.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
    axis.set(title=f"every row, head dim {usual} (dotted: backward)", yscale="log",
             xlabel="positions of one document", ylabel="TFLOP/s on visible pairs")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])


def draw_roofline(axis: Any, mine: list[dict[str, Any]], top: Ceilings) -> None:
    """Points of ours under the two measured ceilings."""
    ridge = top.tflops / top.tbytes
    intensities = [ridge / 4, ridge * 4, *(r["flop/byte"] for r in mine)]
    low, high = min(intensities) / 2, max(intensities) * 2
    axis.plot([low, ridge, high], [low * top.tbytes, top.tflops, top.tflops], color="black")
    for kind, marker in (("forward", "o"), ("backward", "s")):
        points = [r for r in mine if r["pass"] == kind]
        x, y = [r["flop/byte"] for r in points], [r["TFLOP/s"] for r in points]
        axis.scatter(x, y, marker=marker, s=24, label=kind, zorder=3, clip_on=False)
        for r in points if kind == "forward" else ():
            place = r["flop/byte"], r["TFLOP/s"]
            axis.annotate(r["shape"], place, (5, -3), textcoords="offset points", fontsize=7)
    axis.set(title="ours under the ceilings of this run", xscale="log", yscale="log",
             xlabel="floating-point operations per byte", ylabel="TFLOP/s")  # fmt: skip
    axis.legend(loc="lower right")
