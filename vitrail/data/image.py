"""From the bytes of a picture to uint8 `[3, H, W]`: one policy for every verb, told in docs/images.md.

The header decides before any pixel is decoded: the format (by content, never by name) and the size. JPEG is
decoded by libjpeg-turbo through simplejpeg; everything else, and every JPEG that simplejpeg objects to, by
Pillow. Both are libjpeg-turbo with the exact inverse transform and smooth upsampling, and give the same
pixels (a test holds them to it); simplejpeg gives them sooner.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

    Array = np.ndarray[Any, np.dtype[Any]]

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is read by default, everywhere."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"})
"""Endings by which pictures are found in folders and archives; the content then decides what they are."""

WIDE_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF")
"""What is read where a caller asks for more, on files of its own; of several frames, the first."""

ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a picture may be, checked in its header before decoding. Defaults fit files from anywhere."""

    pixels: int = 50_000_000
    """Most pixels, height × width; 50 million decode into 150 MB."""

    side: int = 16_384
    """Most pixels along one side."""

    formats: tuple[str, ...] = FORMATS
    """Formats that are read, in Pillow's words."""


LIMITS = Limits()
WIDE_LIMITS = Limits(formats=WIDE_FORMATS)


@dataclass(frozen=True)
class Header:
    """What the header of a picture says. `height` and `width` are those of the upright picture."""

    format: str
    mode: str
    height: int
    width: int
    orientation: int

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width as they lie in the file, before the EXIF rotation."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    def to_stored(self, y: float, x: float) -> tuple[float, float]:
        """The place in the file's own pixels of a place in the upright picture (edges, not centres: 0..H)."""
        height, width = self.height, self.width
        return {
            1: (y, x),
            2: (y, width - x),
            3: (height - y, width - x),
            4: (height - y, x),
            5: (x, y),
            6: (width - x, y),
            7: (width - x, height - y),
            8: (x, height - y),
        }[self.orientation]


def inspect(source: Any, name: str = "", limits: Limits = LIMITS) -> Header:
    """Read and judge the header alone. Raises ImageError as `decode` does, but cannot see damaged pixels."""
    name = name or _name(source)
    image = source if _is_pillow(source) else _open(_bytes(source, name), name, limits)
    return _judge(image, name, limits)


def decode(source: Any, name: str = "", limits: Limits = LIMITS) -> Tensor:
    """Decode one picture: uint8 `[3, H, W]`, RGB, upright.

    `source` is the bytes of a file, a path, a Pillow image, or a uint8 array `[H, W]` or `[H, W, 1|2|3|4]`.
    `name` is what errors call it. Memory lies pixel by pixel (`[H, W, 3]` permuted), as the resizing kernels
    like it, and belongs to the caller.

    Raises ImageError, with the name and the reason, for anything that is no allowed picture: an unknown or
    unwanted format, damaged or cut-off data, more pixels than `limits`, pixels without a fixed range.
    """
    name = name or _name(source)
    if isinstance(source, np.ndarray):
        return _planes(_from_array(source, name, limits))
    data = b""
    if _is_pillow(source):
        image = source
    else:
        data = _bytes(source, name)
        image = _open(data, name, limits)
    header = _judge(image, name, limits)
    pixels = _fast_jpeg(data, header) if data else None
    if pixels is None:
        pixels = _guarded(lambda: _to_rgb(image, name), name)
    return _planes(_upright(pixels, header.orientation))


def _planes(pixels: Array) -> Tensor:
    if not (pixels.flags.writeable and pixels.flags.c_contiguous):
        pixels = np.array(pixels, order="C")
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W]


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "image"


def _is_pillow(source: Any) -> bool:
    from PIL import Image

    return isinstance(source, Image.Image)


def _bytes(source: Any, name: str) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, Path)):
        try:
            return Path(source).read_bytes()
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file.") from None
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error}).") from None
    kind = type(source).__name__
    raise ImageError(f"{name}: a picture is bytes, a path, a Pillow image or a uint8 array, got {kind}.")


def _guarded(read: Callable[[], Any], name: str) -> Any:
    """Decoders raise whatever they like on damaged data; callers see ImageError with the file's name."""
    from PIL import Image

    try:
        return read()
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: more pixels than is safe to decode ({error}).") from None
    except MemoryError:
        raise ImageError(f"{name}: not enough memory to decode it.") from None
    except Exception as error:
        raise ImageError(f"{name}: damaged or cut off ({str(error) or type(error).__name__}).") from error


def _open(data: bytes, name: str, limits: Limits) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError(f"{name}: the file is empty.")

    def read() -> Image.Image:
        try:
            return Image.open(io.BytesIO(data), formats=limits.formats)
        except UnidentifiedImageError:
            found = _sniff(data)
            allowed = ", ".join(limits.formats)
            if found in limits.formats:
                raise ImageError(f"{name}: {found} with a damaged or cut-off header.") from None
            kind = f"{found}, which is not read here" if found else "not a picture"
            raise ImageError(f"{name}: {kind}; allowed are {allowed}. Convert it, or leave it out.") from None

    image: Image.Image = _guarded(read, name)
    return image


def _sniff(data: bytes) -> str:
    """The likely format of data that is not read, for the message alone."""
    for magic, found in (
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG", "PNG"),
        (b"GIF8", "GIF"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"8BPS", "PSD"),
        (b"%PDF", "PDF"),
        (b"%!PS", "PostScript"),
        (b"\0\0\0\x0cjP  ", "JPEG 2000"),
        (b"\xff\x0a", "JPEG XL"),
        (b"<svg", "SVG"),
    ):
        if data.startswith(magic):
            return found
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC or video"
    return "a web page" if data[:64].lstrip().lower().startswith((b"<!doctype", b"<html")) else ""


def _judge(image: Image.Image, name: str, limits: Limits) -> Header:
    width, height = image.size
    _within(height, width, name, limits)
    orientation = _orientation(image)
    if orientation >= 5:
        height, width = width, height
    return Header(image.format or "", image.mode, height, width, orientation)


def _within(height: int, width: int, name: str, limits: Limits) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: has no pixels ({height}×{width}).")
    if max(height, width) > limits.side or height * width > limits.pixels:
        most = f"at most {limits.pixels / 1e6:g} million pixels and {limits.side} a side"
        raise ImageError(f"{name}: {height}×{width} pixels; {most} are decoded. Scale it down first.")


def _orientation(image: Image.Image) -> int:
    """1..8 by EXIF; 1 where there is none, or where it cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # metadata is no reason to lose the picture, and Pillow raises many kinds here
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _fast_jpeg(data: bytes, header: Header) -> Array | None:
    """RGB pixels of a plain JPEG, or None where Pillow must judge (other formats, CMYK, any irregularity)."""
    if header.format not in ("JPEG", "MPO") or header.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    try:
        pixels: Array = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == header.stored else None


def _to_rgb(image: Image.Image, name: str) -> Array:
    """Any Pillow mode to RGB `[H, W, 3]`, without the EXIF rotation."""
    mode = image.mode
    image.load()
    if mode == "F":
        raise ImageError(f"{name}: 32-bit float pixels have no fixed range; save it with 8 or 16 bits.")
    if mode.startswith("I"):  # 16 bits (32 in memory for some formats): the high byte, as in 16-bit colour
        wide = np.asarray(image).astype(np.int64)
        return _grey(np.clip(wide >> 8, 0, 255).astype(np.uint8))
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image if mode == "RGB" else image.convert("RGB"))


def _grey(values: Array) -> Array:
    return np.repeat(values[:, :, None], 3, axis=2)


def _over_white(rgba: Array) -> Array:
    alpha = rgba[..., 3:].astype(np.uint16)
    mixed = rgba[..., :3] * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _upright(pixels: Array, orientation: int) -> Array:
    turned: dict[int, Callable[[Array], Array]] = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    return pixels if orientation == 1 else turned[orientation](pixels)


def _from_array(array: Array, name: str, limits: Limits) -> Array:
    if array.dtype != np.uint8:
        raise ImageError(f"{name}: an array of pixels must be uint8 (0..255), got {array.dtype}.")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or 0 in array.shape:
        raise ImageError(f"{name}: an array of pixels must be [H, W] or [H, W, 1|2|3|4], got {array.shape}.")
    height, width, channels = array.shape
    _within(height, width, name, limits)
    if channels <= 2:
        array = np.concatenate([np.repeat(array[..., :1], 3, axis=2), array[..., 1:]], axis=2)
    return _over_white(array) if channels in (2, 4) else array
