"""Pictures: safe decoding, what is stored, and the tiles the vision encoder gets."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers_data import make_processor, picture
from PIL import Image, ImageOps

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
    pixels = processor.pictures([image])["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((1, 3, 32, 32), torch.float32)
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
    with pytest.raises(ValueError, match="and max_side a multiple of tile_size"):
        ImageSettings(**{"tile_size": 32, "max_side": 128, **changes})


# pictures as a viewer shows them -----------------------------------------------------------------


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greys_are_scaled_to_eight(kind):
    """Each value is within half a step of its share of the range; a viewer's picture, not 255s."""
    values = np.linspace(0, 65535, 1000).astype(np.uint16).reshape(20, 50)
    found = np.array(open_image(encoded(Image.fromarray(values), kind)))
    assert np.array_equal(found, np.rint(values / 257)[..., None].repeat(3, 2))
    dark = np.array(open_image(encoded(Image.fromarray(values // 256), kind)))
    assert dark.max() == 1  # the darkest greys stay dark


def test_floats_and_long_integers_are_scaled():
    unit = np.array([[0.0, 0.25, 0.5]], dtype=np.float32)
    assert np.array(open_image(encoded(Image.fromarray(unit), "TIFF")))[0, :, 0].tolist() == [
        0,
        64,
        128,
    ]
    metres = np.array([[-1, 0, 3]], dtype=np.float32)
    assert np.array(open_image(encoded(Image.fromarray(metres), "TIFF")))[0, :, 0].tolist() == [
        0,
        64,
        255,
    ]
    long = np.array([[0, 50_000, 100_000]], dtype=np.int32)
    assert np.array(open_image(encoded(Image.fromarray(long), "TIFF")))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    flat = np.full((2, 2), 7, dtype=np.float32)
    assert np.array(open_image(encoded(Image.fromarray(flat), "TIFF"))).max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_the_camera_was_held(kind, orientation):
    image = Image.open(io.BytesIO(picture(40, 30)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.array(open_image(data)), np.array(expected))
    size = (30, 40) if orientation > 4 else (40, 30)
    assert check_image(data)[:2] == open_image(data).size == size
    stored, described = storable(data)
    assert stored == data
    assert (described["width"], described["height"]) == size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_clear_is_laid_on_white(mode):
    """Black strokes on nothing: alpha, a palette's transparency, one colour said to be clear."""
    drawing = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    if mode in ("RGB", "L"):
        drawing = Image.new(mode, (8, 4), 9 if mode == "L" else (9, 9, 9))
        drawing.paste(0, (2, 1, 4, 3))
        data = encoded(drawing, transparency=9 if mode == "L" else (9, 9, 9))
    else:
        drawing.paste((0, 0, 0, 255), (2, 1, 4, 3))
        data = encoded(drawing.convert(mode) if mode != "P" else drawing.quantize(4))
    expected = np.full((4, 8, 3), 255)
    expected[1:3, 2:4] = 0
    assert np.array_equal(np.array(open_image(data)), expected)


def test_half_clear_is_half_white():
    data = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))
    assert np.array(open_image(data))[0, 0].tolist() == [255, 127, 127]
