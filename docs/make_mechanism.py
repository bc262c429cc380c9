"""Draws docs/mechanism.svg, the README's figure.

python docs/make_mechanism.py [--png FILE]

Text becomes paths and the background is white, so it looks the same everywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT, LINE = "#1f2937", "#5b6675", "#cbd2db"
IMAGE, PROMPT, ANSWER = "#bfe0d4", "#dbe4f3", "#7fa8e0"
STUDENT, TEACHER, LOSS = "#2f6bc0", "#b4641a", "#ffffff"
QUERY, PANEL_S, PANEL_T = "#f3b76b", "#f5f8fd", "#fdf7ee"

# Kind, text, supervised (the next token carries a label); first document distils, second does not.
VQA = [
    *[("image", "", False)] * 4,
    ("prompt", "what", False),
    ("prompt", "animal", False),
    ("prompt", "?", True),
    ("answer", "a", True),
    ("answer", "red", True),
    ("answer", "panda", False),
]
DOC = [
    *[("image", "", False)] * 3,
    ("prompt", "total", False),
    ("prompt", "?", True),
    ("answer", "12", True),
    ("answer", ".80", False),
]
FILL = {"image": IMAGE, "prompt": PROMPT, "answer": ANSWER}
CELL, GAP, LEFT = 40, 4, 66
TOKENS_Y, LAYERS_Y, STEP = 146, (228, 304, 398), 40
BOTTOM, TOP, HEADS = 62, 478, 508
NAMES = ("layer 1", "layer 2", "layer L")


def column(index: int) -> float:
    """Left edge of a position's cell; the second document stands a little apart."""
    return LEFT + index * (CELL + GAP) + (14 if index >= len(VQA) else 0)


TEACHER_ROWS = [i for i, token in enumerate(VQA) if token[2]]
SUPERVISED = [i for i, token in enumerate(VQA + DOC) if token[2]]
STUDENT_RIGHT = column(len(VQA + DOC) - 1) + CELL
TEACHER_LEFT = STUDENT_RIGHT + 150
TEACHER_STEP = 70


def box(ax: Axes, x: float, y: float, w: float, h: float, fill: str, **style) -> None:
    edge, width = style.pop("edge", "none"), style.pop("width", 1.0)
    shape = f"round,pad=0,rounding_size={style.pop('radius', 5)}"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, fc=fill, ec=edge, lw=width, **style))


def text(ax: Axes, x: float, y: float, words: str, size: float = 11, **style) -> None:
    style = {"ha": "center", "va": "center", "color": INK} | style
    ax.text(x, y, words, fontsize=size, **style)


def arrow(ax: Axes, start: tuple, end: tuple, colour: str, **style) -> None:
    style = {"lw": 1.6, "arrowstyle": "-|>", "mutation_scale": 11} | style
    ax.add_patch(FancyArrowPatch(start, end, color=colour, shrinkA=0, shrinkB=0, **style))


def panels(ax: Axes) -> None:
    """The two models' backgrounds and titles."""
    height = TOP - BOTTOM
    box(ax, LEFT - 48, BOTTOM, STUDENT_RIGHT - LEFT + 66, height, PANEL_S, edge=LINE, radius=12)
    box(ax, TEACHER_LEFT - 20, BOTTOM, 234, height, PANEL_T, edge=LINE, radius=12)
    titles = (
        (LEFT - 28, "Student", STUDENT, 92, "the VLM's decoder, trained"),
        (TEACHER_LEFT - 4, "Teacher", TEACHER, 92, "its LM, frozen"),
    )
    for x, name, colour, shift, words in titles:
        text(ax, x, BOTTOM + 22, name, 14, ha="left", color=colour, weight="bold")
        text(ax, x + shift, BOTTOM + 21.5, words, 11, ha="left", color=SOFT)


def tokens(ax: Axes) -> None:
    """The packed row at the bottom and whose documents it holds."""
    for i, (kind, word, _) in enumerate(VQA + DOC):
        if kind != "image":
            box(ax, column(i), TOKENS_Y, CELL, 30, FILL[kind], radius=4)
            text(ax, column(i) + CELL / 2, TOKENS_Y + 15, word, 8)
    for first, last in ((0, 3), (10, 12)):
        x, end = column(first), column(last) + CELL
        box(ax, x, TOKENS_Y, end - x, 30, IMAGE, radius=4)
        text(ax, (x + end) / 2, TOKENS_Y + 15, "picture", 9.5)
    ends = (
        (0, len(VQA) - 1, "language source (α > 0)"),
        (len(VQA), len(VQA + DOC) - 1, "document source (α = 0)"),
    )
    for first, last, words in ends:
        middle = (column(first) + column(last) + CELL) / 2
        text(ax, middle, TOKENS_Y - 16, words, 10, color=SOFT)
    for first, last in ((6, 8), (14, 15)):
        middle = (column(first) + column(last) + CELL) / 2
        text(ax, middle, TOKENS_Y + 46, "targets", 9.5, color=STUDENT)
    for i, index in enumerate(TEACHER_ROWS):
        x = TEACHER_LEFT + i * TEACHER_STEP
        box(ax, x, TOKENS_Y, 54, 30, FILL[VQA[index][0]], radius=4)
        text(ax, x + 27, TOKENS_Y + 15, VQA[index][1], 9.5)
    middle = TEACHER_LEFT + TEACHER_STEP + 27
    text(ax, middle, TOKENS_Y - 16, "only these queries are computed", 10, color=SOFT)


def layers(ax: Axes) -> None:
    """Keys and values of every position and layer; the teacher's queries; who reads what."""
    for name, y in zip(NAMES, LAYERS_Y, strict=True):
        text(ax, LEFT - 12, y + STEP / 2, name, 9.5, rotation=90, color=SOFT)
        for i, (kind, _, _) in enumerate(VQA + DOC):
            box(ax, column(i), y + 22, CELL, 18, FILL[kind], radius=3)
            box(ax, column(i), y, CELL, 18, FILL[kind], radius=3)
            text(ax, column(i) + CELL / 2, y + 31, "K", 8, color="#33475f")
            text(ax, column(i) + CELL / 2, y + 9, "V", 8, color="#33475f")
        memory = column(len(VQA) - 2) + CELL - column(0) + 6
        box(ax, column(0) - 3, y - 4, memory, STEP + 8, "none", edge=TEACHER, width=1.6, radius=6)
        for i in range(len(TEACHER_ROWS)):
            box(ax, TEACHER_LEFT + i * TEACHER_STEP, y + 4, 54, 32, QUERY, radius=5)
            text(ax, TEACHER_LEFT + i * TEACHER_STEP + 27, y + 20, "Q", 11, weight="bold")
    for x in (column(4) - GAP / 2, column(13) - GAP / 2, TEACHER_LEFT + TEACHER_STEP + 27):
        text(ax, x, (LAYERS_Y[1] + LAYERS_Y[2] + STEP) / 2, "· · ·", 15, color=SOFT)


def reading(ax: Axes) -> None:
    """From the keys and values of each layer to the teacher's layer beside it."""
    start = column(len(VQA) - 2) + CELL + 3
    for y in LAYERS_Y:
        lane = y - 13
        bend = [(start - 14, y - 4), (start - 14, lane), (TEACHER_LEFT - 34, lane)]
        xs, ys = zip(*bend, strict=True)
        ax.plot(xs, ys, color=TEACHER, lw=1.6, solid_joinstyle="round")
        ax.plot([TEACHER_LEFT - 34] * 2, [lane, y + 20], color=TEACHER, lw=1.6)
        arrow(ax, (TEACHER_LEFT - 34, y + 20), (TEACHER_LEFT - 3, y + 20), TEACHER)
    words = "each query reads\nthe student's\nK and V in place,\nup to its own\nposition"
    text(ax, STUDENT_RIGHT + 66, LAYERS_Y[1] + 39, words, 8.4, color=TEACHER, linespacing=1.35)


def rise(ax: Axes) -> None:
    """Targets carry on to the heads."""
    for i in SUPERVISED:
        x = column(i) + CELL / 2
        box(ax, column(i) - 2, TOKENS_Y - 2, CELL + 4, 34, "none", edge=STUDENT, width=1.8)
        arrow(ax, (x, LAYERS_Y[2] + STEP + 3), (x, HEADS - 2), STUDENT, lw=1.3, mutation_scale=9)
    for i in range(len(TEACHER_ROWS)):
        x = TEACHER_LEFT + i * TEACHER_STEP + 27
        box(ax, x - 29, TOKENS_Y - 2, 58, 34, "none", edge=TEACHER, width=1.8)
        for low, high in ((TOKENS_Y + 34, LAYERS_Y[0] + 2), (LAYERS_Y[0] + 38, LAYERS_Y[1] + 2)):
            arrow(ax, (x, low), (x, high), TEACHER, lw=1.2, mutation_scale=8)
        arrow(ax, (x, LAYERS_Y[2] + 38), (x, HEADS - 2), TEACHER, lw=1.3, mutation_scale=9)


def losses(ax: Axes) -> None:
    """Cross-entropy over every target, KL where the source distils."""
    first, last = column(SUPERVISED[0]) - 30, column(SUPERVISED[-1]) + CELL + 30
    box(ax, first, HEADS, last - first, 38, "#e3edfb", edge=STUDENT, width=1.4, radius=9)
    words = "student's logits:  CE with the labels, every source"
    text(ax, (first + last) / 2, HEADS + 18, words, 11.5, color=STUDENT, weight="bold")
    left, right = TEACHER_LEFT - 6, TEACHER_LEFT + 2 * TEACHER_STEP + 60
    box(ax, left, HEADS, right - left, 38, "#fbeedd", edge=TEACHER, width=1.4, radius=9)
    text(ax, (left + right) / 2, HEADS + 18, "teacher's logits", 11.5, color=TEACHER, weight="bold")
    student, teacher = column(7) + CELL / 2, (left + right) / 2
    ends = [student, student, teacher, teacher]
    ax.plot(ends, [HEADS + 39, 586, 586, HEADS + 39], color=TEACHER, lw=1.6, zorder=1)
    middle = (student + teacher) / 2
    box(ax, middle - 215, 568, 430, 36, "#fbeedd", edge=TEACHER, width=1.4, radius=9, zorder=2)
    words = "KL to the teacher, language sources only"
    text(ax, middle, 586, words, 11.5, color=TEACHER, weight="bold", zorder=3)


def footer(ax: Axes) -> None:
    """What it costs and what remains."""
    words = (
        "The teacher makes no K or V of its own and computes nothing without a label: a few "
        "percent of a step. After training it is dropped."
    )
    text(ax, 600, 34, words, 11, color=INK)


def draw() -> plt.Figure:
    """The whole figure, 1200 × 620."""
    figure = plt.figure(figsize=(12, 6.2), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 1200), ylim=(0, 620))
    ax.axis("off")
    for part in (panels, tokens, layers, reading, rise, losses, footer):
        part(ax)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Write the SVG beside this file, and a PNG where asked."""
    parser = argparse.ArgumentParser(description="Draw the figure of the mechanism.")
    parser.add_argument("--png", type=Path, help="also write a PNG here")
    arguments = parser.parse_args(argv)
    mpl.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "ldistill", "font.size": 11}
    figure = draw()
    target = Path(__file__).with_name("mechanism.svg")
    figure.savefig(target, facecolor="white", metadata={"Date": None})
    if arguments.png:
        figure.savefig(arguments.png, facecolor="white", dpi=110)


if __name__ == "__main__":
    main()
