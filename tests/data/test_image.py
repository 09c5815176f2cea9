"""One policy for every picture: what a user's files become, and which are refused, and why."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, noise
from PIL import Image, ImageOps

from vitrail.data.image import LIMITS, WIDE_LIMITS, Limits, decode, inspect
from vitrail.errors import ImageError


def pixels(data: object, **options: object) -> np.ndarray:
    return decode(data, **options).permute(1, 2, 0).numpy()


def test_png_and_lossless_webp_come_back_as_they_were() -> None:
    picture = noise(20, 30)
    assert np.array_equal(pixels(encoded(picture)), picture)
    assert np.array_equal(pixels(encoded(picture, "WEBP", lossless=True)), picture)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_jpeg_has_the_pixels_that_pillow_gives(options: dict) -> None:
    for size in ((33, 47), (16, 16), (1, 1), (7, 200)):
        data = encoded(noise(*size), "JPEG", **options)
        assert np.array_equal(pixels(data), np.array(Image.open(io.BytesIO(data))))
    data = encoded(Image.fromarray(noise(33, 47)).convert("L"), "JPEG", **options)
    assert np.array_equal(pixels(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_real_photographs_have_the_pixels_that_pillow_gives(data_dir: Path) -> None:
    with zipfile.ZipFile(data_dir / "photos" / "imagenet-30.zip") as archive:
        for name in archive.namelist():
            data = archive.read(name)
            with Image.open(io.BytesIO(data)) as image:
                assert np.array_equal(pixels(data), np.array(ImageOps.exif_transpose(image).convert("RGB")))


def test_every_way_in_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encoded(noise(20, 30), "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    expected = pixels(data)
    for source in (bytearray(data), memoryview(data), path, str(path), Image.open(io.BytesIO(data))):
        assert np.array_equal(pixels(source), expected)
    assert np.array_equal(pixels(expected), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_picture_stands_as_the_camera_was_held(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}}.get(format, {})
    data = encoded(noise(12, 20), format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(pixels(data), upright)
    header = inspect(data)
    assert (header.height, header.width) == upright.shape[:2]
    assert header.stored == (12, 20)
    with Image.open(io.BytesIO(data)) as image:
        stored = np.array(image.convert("RGB"))
    for y in range(header.height):  # every pixel's middle is found again in the file's own pixels
        for x in range(header.width):
            there, across = header.to_stored(y + 0.5, x + 0.5)
            assert np.array_equal(stored[int(there), int(across)], upright[y, x])


def test_a_wrong_exif_tag_does_not_lose_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode(encoded(noise(4, 6), "PNG", exif=exif)).shape == (3, 4, 6)


def test_transparency_is_laid_over_white() -> None:
    colour = np.zeros((1, 3, 4), dtype=np.uint8)
    colour[0, :, 0] = 200
    colour[0, :, 3] = (0, 128, 255)
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    assert pixels(encoded(colour))[0].tolist() == expected
    assert pixels(encoded(colour, "WEBP", lossless=True, exact=True))[0].tolist() == expected
    assert pixels(colour)[0].tolist() == expected
    grey = np.array([[[40, 0], [40, 255]]], dtype=np.uint8)
    assert pixels(encoded(_grey_alpha(grey)))[0].tolist() == [[255] * 3, [40] * 3]


def _grey_alpha(values: np.ndarray) -> Image.Image:
    return Image.merge("LA", [Image.fromarray(values[..., channel].copy()) for channel in (0, 1)])


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert pixels(encoded(image, transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_grey_one_bit_and_sixteen_bit() -> None:
    assert pixels(encoded(Image.new("L", (1, 1), 77)))[0, 0].tolist() == [77] * 3
    assert pixels(encoded(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255] * 3
    deep = np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)  # the high byte
    assert pixels(encoded(deep))[0, :, 0].tolist() == [0, 0, 1, 156, 255]
    assert pixels(_deep_colour([40_000, 256, 65_535]))[0, 0].tolist() == [156, 1, 255]


def _deep_colour(values: list[int]) -> bytes:
    """A PNG of one pixel with 16 bits a channel, which Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" + struct.pack(">3H", *values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_cmyk_jpeg_shows_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK")
    seen = pixels(encoded(red, "JPEG", quality=95)).reshape(-1, 3).mean(axis=0)
    assert np.abs(seen - (220, 30, 40)).max() < 4


def test_several_frames_mean_the_first() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    webp = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert pixels(webp)[0, 0].tolist() == [255, 0, 0]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(gif, limits=WIDE_LIMITS)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF"])
def test_other_formats_only_where_asked_for(format: str) -> None:
    data = encoded(noise(4, 6), format)
    with pytest.raises(
        ImageError, match=rf"^a\.jpg: {format}, which is not read here; allowed are JPEG, PNG, WEBP"
    ):
        decode(data, "a.jpg")
    assert decode(data, limits=WIDE_LIMITS).shape == (3, 4, 6)


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(noise(4, 6), "PNG"))
    assert decode(path).shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a picture"),
        (b"<!DOCTYPE html><html>", "a web page, which is not read here"),
        (b"\xff\xd8\xff\xe0", "JPEG with a damaged or cut-off header"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "HEIC"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=rf"^dog\.jpg: .*{reason}"):
        decode(data, "dog.jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_cut_off_picture_is_refused(format: str) -> None:
    data = encoded(noise(200, 200), format)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match=r"^dog: .*(damaged|cut off)"):
            decode(data[: int(share * len(data))], "dog")


def test_junk_after_the_picture_is_harmless() -> None:
    data = encoded(noise(20, 30), "JPEG")
    assert torch.equal(decode(data + b"junk"), decode(data))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    bomb = bytearray(encoded(noise(1, 1)))
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(ImageError, match=r"^bomb\.png: .*pixels"):
        decode(bytes(bomb), "bomb.png")
    with pytest.raises(ImageError, match="20000×1 pixels; at most 50 million pixels and 16384 a side"):
        decode(encoded(Image.new("L", (1, 20_000))), "strip")
    with pytest.raises(ImageError, match="8×9 pixels"):
        decode(np.zeros((8, 9, 3), dtype=np.uint8), limits=Limits(pixels=71))
    assert LIMITS.pixels == 50_000_000


def test_a_missing_file_and_a_wrong_kind_say_so(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="cannot be read"):
        decode(tmp_path)
    with pytest.raises(ImageError, match="got float32"):
        decode(np.zeros((4, 4, 3), dtype=np.float32))
    with pytest.raises(ImageError, match=r"\[H, W\]"):
        decode(np.zeros((2, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ImageError, match="got int"):
        decode(7)
    with pytest.raises(ImageError, match="no fixed range"):
        decode(Image.new("F", (2, 2)))


def test_the_result_belongs_to_the_caller() -> None:
    array = noise(4, 6)
    array.flags.writeable = False
    decode(array).zero_()
    assert array.any()
