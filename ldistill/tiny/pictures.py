"""Small pictures of the tiny world: marks, writing, bars, all drawn with PIL at 64 x 64.

Writing uses Pillow's built-in bitmap font, two characters in a cell of 16 x 16 pixels, the size
of an image token: four lines of eight characters. Place, size, paper and ink vary between pictures.
"""

from __future__ import annotations

import io
import math
import re
from functools import cache
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ldistill.tiny.world import COLOURS

SIZE = 64
CELL = 16  # width and height of a piece of writing
FOOT = 62  # of the bars
LINES = COLUMNS = SIZE // CELL
_POLYGONS = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
              (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "star": [(math.sin(i * math.pi / 5) * (1, 0.42)[i % 2],
              -math.cos(i * math.pi / 5) * (1, 0.42)[i % 2]) for i in range(10)],
}  # fmt: skip


@cache
def _glyphs(piece: str) -> Image.Image:
    """One or two characters as an 8-bit mask the size of a cell."""
    small = Image.new("L", (6 * len(piece), 11), 0)
    font = ImageFont.load_default_imagefont()
    ImageDraw.Draw(small).text((0, 0), piece, fill=255, font=font)
    mask = Image.new("L", (CELL, CELL), 0)
    mask.paste(small.resize((8 * len(piece), 14)), (8 - 4 * len(piece), 1))
    return mask


class Placed(NamedTuple):
    """Something drawn around (x, y): a piece of writing, or a mark or bar in a colour."""

    x: float
    y: float
    piece: str | None = None
    mark: str | None = None
    colour: str | None = None

    @property
    def cell(self) -> int:
        """Where its middle lies, counted line by line."""
        column, line = (min(max(int(v // CELL), 0), COLUMNS - 1) for v in (self.x, self.y))
        return line * COLUMNS + column


class Canvas:
    """A picture in the making; `placed` records what was drawn where.

    `rng` chooses paper and ink; the caller's other choices come from it too.
    """

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.paper = tuple(rng.randint(225, 255) for _ in range(3))
        self.ink = tuple(rng.randint(0, 70) for _ in range(3))
        self.image = Image.new("RGB", (SIZE, SIZE), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.placed: list[Placed] = []

    def mark(self, mark: str, colour: str, x: float, y: float, radius: float) -> None:
        self.placed.append(Placed(x, y, mark=mark, colour=colour))
        fill = tuple(max(0, min(255, c + self.rng.randint(-8, 8))) for c in COLOURS[colour])
        if mark in _POLYGONS:
            points = [(x + px * radius, y + py * radius) for px, py in _POLYGONS[mark]]
            self.draw.polygon(points, fill=fill)
            return
        left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
        self.draw.ellipse([left, top, right, bottom], fill=fill)
        if mark == "moon":
            shift = 0.55 * radius
            self.draw.ellipse([left + shift, top, right + shift, bottom], fill=self.paper)

    def write(self, text: str, column: float = 0, line: float = 0, jitter: int = 1) -> None:
        """Lines of writing from a cell on, each moved by up to `jitter` pixels."""
        for number, row in enumerate(text.splitlines()):
            dx, dy = (self.rng.randint(-jitter, jitter) for _ in range(2))
            x, y = round(column * CELL) + dx, round((line + number) * CELL) + dy
            # In pieces of two capitals or one other character.
            for piece in re.findall("[A-Z]{2}|.", row):
                self.image.paste(self.ink, (x, y), _glyphs(piece))
                self.placed.append(Placed(x + CELL / 2, y + CELL / 2, piece=piece))
                x += CELL

    def bar(self, colour: str, left: float, height: float) -> None:
        """A bar of a chart, ten pixels wide, standing near the lower edge."""
        self.placed.append(Placed(left + 5, FOOT - 4, colour=colour))
        self.draw.rectangle([left, FOOT - height, left + 10, FOOT], fill=COLOURS[colour])

    def layout(self) -> str:
        """The picture in words, a word for every cell; a line break where there is nothing.

        A coloured mark takes the cell after its own as well, if that is free.
        """
        cells = [""] * (LINES * COLUMNS)
        for thing in self.placed:
            cells[thing.cell] += thing.colour or thing.piece or ""
        for thing in self.placed:
            if thing.mark:
                beside = thing.cell + 1 if not cells[(thing.cell + 1) % len(cells)] else thing.cell
                cells[beside % len(cells)] += f" {thing.mark}"
        return "".join(cell or "\n" for cell in cells)

    def png(self) -> bytes:
        out = io.BytesIO()
        self.image.save(out, "PNG", compress_level=6)
        return out.getvalue()
