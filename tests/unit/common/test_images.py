"""Pictures: safe decoding, what is stored, and the tiles the vision encoder gets."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers_data import make_processor, picture
from PIL import Image

from ldistill.common.images import ImageSettings, check_image, cut_tiles, open_image, storable
from ldistill.common.samples import BadImage

TILED = ImageSettings(tile_size=32, tokens_per_tile=4, max_side=128, tiling=True)


def huge_png(width, height):
    """A valid header of a picture too large to decode, with almost no data behind it."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("read", [open_image, check_image, storable])
@pytest.mark.parametrize("side", [12_000, 40_000])
def test_a_decompression_bomb_is_refused_by_its_header(read, side):
    with pytest.raises(BadImage) as caught:
        read(huge_png(side, side))
    assert caught.value.reason == "decompression bomb"


@pytest.mark.parametrize("read", [open_image, check_image, storable])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        picture(400, 300, "JPEG")[:9000],
        picture(400, 300, "PNG")[:9000],
        picture()[:20],
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "cut header"],
)
def test_undecodable_pictures_are_named_so(read, data):
    with pytest.raises(BadImage) as caught:
        read(data)
    assert caught.value.reason == "undecodable image"


@pytest.mark.parametrize(("kind", "format"), [("JPEG", "jpg"), ("PNG", "png")])
def test_jpeg_and_png_are_stored_as_they_came(kind, format):
    data = picture(40, 30, kind)
    assert storable(data) == (data, {"width": 40, "height": 30, "format": format})


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "WEBP"])
def test_other_formats_are_stored_as_png_with_the_same_pixels(kind):
    data = picture(40, 30, kind)
    stored, described = storable(data)
    assert described == {"width": 40, "height": 30, "format": "png"}
    assert Image.open(io.BytesIO(stored)).format == "PNG"
    assert np.array_equal(np.array(open_image(stored)), np.array(open_image(data)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    buffer = io.BytesIO()
    kind = "TIFF" if mode == "CMYK" else "PNG"
    Image.open(io.BytesIO(picture())).convert(mode).save(buffer, kind)
    image = open_image(buffer.getvalue())
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_one_tile_is_the_resized_picture_in_unit_range():
    processor = make_processor()
    image = processor.load_image(picture(100, 60))
    pixels, grid = processor.tiles(image)
    assert (grid, pixels.shape, pixels.dtype) == ((1, 1), (1, 3, 32, 32), torch.float32)
    expected = np.array(image.resize((32, 32), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), expected, atol=1e-6)


def test_white_is_one_and_black_is_zero():
    for colour, value in (("white", 1.0), ("black", 0.0)):
        pixels, _ = cut_tiles(Image.new("RGB", (50, 70), colour), TILED)
        assert torch.allclose(pixels, torch.full_like(pixels, value))


@pytest.mark.parametrize(
    ("size", "enlarged", "kept"),
    [
        # width, height -> rows, cols with the long side at 128; rows, cols below that cap
        ((100, 60), (3, 4), (3, 4)),
        ((40, 30), (3, 4), (2, 2)),
        ((30, 40), (4, 3), (2, 2)),
        ((32, 32), (4, 4), (1, 1)),
        ((10, 5), (2, 4), (1, 1)),
        ((1000, 10), (1, 4), (1, 4)),
        ((500, 500), (4, 4), (4, 4)),
    ],
)
def test_grid_of_tiles(size, enlarged, kept):
    assert TILED.grid(*size) == enlarged
    below = ImageSettings(32, 4, 128, resize_to_max_side=False, tiling=True)
    assert below.grid(*size) == kept
    assert ImageSettings(32, 4, 128).grid(*size) == (1, 1)
    pixels, grid = cut_tiles(Image.new("RGB", size), TILED)
    assert (len(pixels), grid) == (TILED.tiles(enlarged), enlarged)


def test_tiles_are_the_picture_row_by_row_after_the_whole_view():
    image = open_image(picture(90, 60))
    pixels, (rows, cols) = cut_tiles(image, TILED)
    resized = np.array(image.resize((cols * 32, rows * 32), Image.Resampling.BICUBIC)) / 255
    for row in range(rows):
        for col in range(cols):
            part = resized[row * 32 : (row + 1) * 32, col * 32 : (col + 1) * 32]
            tile = pixels[1 + row * cols + col].permute(1, 2, 0)
            np.testing.assert_allclose(tile, part, atol=1e-6)
    whole = Image.fromarray((resized * 255).round().astype(np.uint8))
    expected = np.array(whole.resize((32, 32), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), expected, atol=2 / 255)


@pytest.mark.parametrize("changes", [{"tile_size": 0}, {"max_side": 100}, {"max_images": 0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match="image setting"):
        ImageSettings(**{"tile_size": 32, "max_side": 128, **changes})
