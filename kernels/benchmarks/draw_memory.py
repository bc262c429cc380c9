"""Draw the picture in kernels/README.md: the memory, its documents, the rows and what they see.

python kernels/benchmarks/draw_memory.py kernels/memory.svg
"""

import sys

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

# (start, length, image positions, supervised rows at the end) of one batch row; the last is padding
DOCUMENTS = [(0, 13, 5, 3), (13, 9, 0, 0), (22, 12, 5, 5), (34, 8, 0, 2)]
SEQ, GROUP, TILE = 46, 3, 12
COLOURS = ["#4878a8", "#8a8f98", "#c46a3f", "#4f8a5b"]


def draw(path: str) -> None:
    """Memory on top, one line per supervised row below, tiles of packed rows at the side."""
    figure, axis = plt.subplots(figsize=(10, 4.4))
    row = 0
    for (start, length, images, rows), colour in zip(DOCUMENTS, COLOURS):
        for position in range(start, start + length):
            shade = 0.45 if position < start + images else 0.9
            axis.add_patch(Rectangle((position, -1.6), 1, 1, color=colour, alpha=shade, lw=0.5))
        for position in range(start + length - rows, start + length):
            axis.add_patch(Rectangle((start, row), position - start + 1, 0.85, color=colour))
            axis.text(-0.6, row + 0.45, f"row {row}", ha="right", va="center", fontsize=8)
            row += 1
    axis.add_patch(Rectangle((42, -1.6), 4, 1, fill=False, ec="#8a8f98", hatch="///", lw=0.5))
    for tile in range(0, row * GROUP, TILE):
        last = min(tile + TILE, row * GROUP)
        top, height = tile / GROUP, (last - tile) / GROUP
        axis.add_patch(Rectangle((SEQ + 1, top + 0.05), 8, height - 0.25, fill=False, ec="black"))
        axis.text(SEQ + 5, top + height / 2, f"program\n{last - tile} rows x heads", ha="center",
                  va="center", fontsize=8)  # fmt: skip
    axis.text(-0.6, -1.1, "memory", ha="right", va="center", fontsize=8)
    axis.text(13, -1.9, "this document distils nothing: never read", fontsize=8)
    axis.text(0, -1.9, "image (light), text", fontsize=8)
    axis.text(42, -1.9, "padding", fontsize=8)
    axis.set(xlim=(-4, SEQ + 10), ylim=(row + 0.2, -2.6))
    axis.axis("off")
    mpl.rcParams["svg.hashsalt"] = "memory"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(sys.argv[1])
