"""Pictures: safe decoding, and the tiles the vision encoder sees.

Pixel values are RGB in [0, 1] with no mean or standard deviation, as nanoVLM feeds them. Nothing is
decoded before its header has been checked, so that a decompression bomb costs no memory.

    image = open_image(data); pixels, grid = cut_tiles(image, ImageSettings())
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ldistill.common.samples import BadImage

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 128 * 1024 * 1024
ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
STORED_FORMATS = {"JPEG": "jpg", "PNG": "png"}


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become tiles and tokens. The defaults are nanoVLM's with one tile."""

    tile_size: int = 512
    """Side of a tile in pixels: the input size of the vision encoder."""
    tokens_per_tile: int = 64
    """Image tokens that one tile takes in the sequence."""
    max_side: int = 2048
    """Longest side of a tiled picture in pixels."""
    resize_to_max_side: bool = True
    """With tiling: enlarge every picture to `max_side`; otherwise only to the next whole tile."""
    tiling: bool = False
    """Cut pictures into tiles. False gives one tile per picture, as in the paper."""
    max_images: int = 1
    """Most pictures a sample may have."""

    def __post_init__(self) -> None:
        sizes = (self.tile_size, self.tokens_per_tile, self.max_side, self.max_images)
        if min(sizes) < 1 or self.max_side % self.tile_size:
            raise ValueError(
                f"image settings {self}: sizes must be at least 1, and max_side a multiple of "
                "tile_size"
            )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, cols) of a picture's tiles, whole ones that hold it; (1, 1) without tiling."""
        if not self.tiling:
            return 1, 1
        side, long, short = self.tile_size, max(width, height), min(width, height)
        whole = math.ceil(long / side) * side
        new_long = self.max_side if self.resize_to_max_side else min(self.max_side, whole)
        along, across = new_long // side, max(1, math.ceil(short * (new_long / long) / side))
        return (across, along) if width >= height else (along, across)

    @staticmethod
    def tiles(grid: tuple[int, int]) -> int:
        """Tiles that a grid takes: a single one stands for the whole view as well."""
        rows, cols = grid
        return 1 if rows * cols == 1 else rows * cols + 1


def open_header(data: bytes) -> Image.Image:
    """Open encoded bytes without decoding pixels. Raises BadImage, also above `MAX_PIXELS`."""
    with _undecodable(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage("decompression bomb", f"{width} x {height} pixels, at most {MAX_PIXELS}")
    if not width or not height:
        raise BadImage("undecodable image", f"{width} x {height} pixels")
    return image


@contextmanager
def _undecodable() -> Iterator[None]:
    """What PIL and its plug-ins raise on broken data, whatever it is, as BadImage; what is cut off
    is broken, though a library loaded beside us told PIL to let it pass."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    except Image.DecompressionBombError as error:
        raise BadImage("decompression bomb", str(error)) from error
    except UnidentifiedImageError as error:  # its text has an address, another one in each run
        raise BadImage("undecodable image", "no known format") from error
    except Exception as error:
        raise BadImage("undecodable image", str(error)) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_image(data: bytes) -> Image.Image:
    """Decode to what a viewer shows, in RGB. Raises BadImage.

    Turned as its EXIF orientation says, as `datasets` and so lmms-eval turn it; what is clear is
    laid on white; more than 8 bits are scaled to 8: greys of 16 bits by their range, floats from 0
    to 1 by that, others from the least to the greatest value in the picture.
    """
    image = open_header(data)
    with _undecodable():
        image.load()
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_to_8_bits(np.asarray(image)))
        elif "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:  # most alpha channels say nothing
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy RGB


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    least, most = float(values.min()), float(values.max())
    usual = 1.0 if values.dtype.kind == "f" else 65535.0
    low, high = (0.0, usual) if least >= 0 and most <= usual else (least, most)
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low or 1))).astype(np.uint8)


def check_image(data: bytes) -> tuple[int, int, str]:
    """(width, height, format), as shown, of a picture whose pixels really decode, else BadImage.

    JPEG is decoded at reduced size: every byte is still read, at a fraction of the time.
    """
    image = open_header(data)
    width, height = image.size
    with _undecodable():
        image.draft("RGB", (64, 64))
        image.load()
        if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):  # turned by a quarter
            width, height = height, width
    return width, height, str(image.format)


def storable(data: bytes) -> tuple[bytes, dict[str, int | str]]:
    """The bytes to store and {width, height, format}: JPEG and PNG as they are, the rest as PNG."""
    width, height, kind = check_image(data)
    if kind not in STORED_FORMATS:
        buffer = io.BytesIO()
        open_image(data).save(buffer, "PNG")
        data, kind = buffer.getvalue(), "PNG"
    return data, {"width": width, "height": height, "format": STORED_FORMATS[kind]}


def cut_tiles(image: Image.Image, settings: ImageSettings) -> tuple[torch.Tensor, tuple[int, int]]:
    """Tiles of an RGB picture: (float32 [tiles, 3, S, S] in [0, 1], (rows, cols)).

    Without tiling, and for a picture of one tile, that tile is the whole view. Otherwise tile 0 is
    the whole view and the others follow row by row.
    """
    import torch

    side, (rows, cols) = settings.tile_size, settings.grid(*image.size)
    how = Image.Resampling.BICUBIC if settings.tiling else Image.Resampling.BILINEAR
    resized = image.resize((cols * side, rows * side), how)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(255)
    if rows * cols == 1:
        return pixels[None], (1, 1)
    whole = torch.nn.functional.interpolate(
        pixels[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )
    # [3, rows * S, cols * S] -> [rows, cols, 3, S, S]
    tiles = pixels.reshape(3, rows, side, cols, side).permute(1, 3, 0, 2, 4)
    return torch.cat([whole, tiles.reshape(rows * cols, 3, side, side)]), (rows, cols)
