"""Parts of image files, resized to a square: no more of a JPEG is computed than the part needs.

With the library simplejpeg a JPEG is decoded at the scale 1/1, 1/2, 1/4 or 1/8 that still has all
pixels of the result, and PyTorch resizes the part as Pillow does. Every other image, and a JPEG
that is turned by EXIF, has inks, or is damaged in any way, goes through Pillow as everywhere else.
"""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from .image_folder import is_upright

if TYPE_CHECKING:
    from PIL.Image import Image

    from .image_sets import ImageSet

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

Decoder = Literal["auto", "pillow", "simplejpeg"]
# A larger file is left to Pillow, which does not read it at once.
LARGEST_JPEG = 64 << 20
LARGEST_BUFFER = 16 << 20
_memory = threading.local()
# How an orientation may stand in a file: in EXIF, or in XMP as text.
ORIENTED = (b"Exif\0", b"tiff:Orientation")


class Part(NamedTuple):
    """A rectangle of an image in pixels, and how it is resized."""

    left: int
    top: int
    width: int
    height: int
    is_bicubic: bool
    """Bicubic, otherwise bilinear."""


def has_simplejpeg() -> bool:
    """Returns whether simplejpeg is installed."""
    return find_spec("simplejpeg") is not None


class LazyImage:
    """An image of a set, of which the header alone is read until a part of it is asked for.

    Args:
        images: the set.
        index: of the image.
        decoder: `"simplejpeg"` for JPEGs, `"pillow"` for all.

    Raises:
        ValueError: it is not a readable image; the message names it.
    """

    def __init__(self, images: ImageSet, index: int, decoder: Decoder = "simplejpeg") -> None:
        self._images, self._index = images, index
        self._image: Image | None = None
        self._jpeg = b""
        size = None
        if decoder == "simplejpeg":
            self._jpeg = _jpeg_bytes(images.encoded(index))
            size = _plain_size(self._jpeg) if self._jpeg else None
        if size is None:
            self._jpeg = b""
        self.size = size or self.whole().size
        """Width and height, upright."""

    def whole(self) -> Image:
        """Returns all of it as 8-bit RGB, decoded by Pillow; raises as the constructor."""
        if self._image is None:
            self._image = self._images.image(self._index)
        return self._image

    def part(self, part: Part, side: int) -> Pixels:
        """Returns a part, resized to `[side, side, 3]`, uint8; raises as the constructor."""
        if self._jpeg:
            import simplejpeg

            width, height = self.size
            scale = next(n for n in (8, 4, 2, 1) if n == 1 or min(part[2:4]) >= n * side)
            least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
            try:
                # Strict: what is damaged is left to Pillow's judgement.
                pixels: Pixels = simplejpeg.decode_jpeg(
                    self._jpeg, "RGB", strict=True, buffer=_buffer(3 * width * height), **least
                )
            except ValueError:
                self._jpeg = b""
            else:
                return _resized(pixels, part, scale, side)
        return cut(self.whole(), part, side)


def _buffer(size: int) -> Pixels | None:
    """Returns memory that this thread decodes into again and again, None where it is too much.

    Fresh memory would cost a third of the decoding, since the system clears it first.
    """
    if size > LARGEST_BUFFER:
        return None
    if getattr(_memory, "pixels", np.empty(0)).nbytes < size:
        _memory.pixels = np.empty(size, np.uint8)
    return _memory.pixels  # type: ignore[no-any-return]


def cut(image: Image, part: Part, side: int) -> Pixels:
    """Returns a part of an image, resized by Pillow to `[side, side, 3]`, uint8."""
    from PIL.Image import Resampling

    left, top, width, height, is_bicubic = part
    resample = Resampling.BICUBIC if is_bicubic else Resampling.BILINEAR
    region = image.crop((left, top, left + width, top + height))
    return np.asarray(region.resize((side, side), resample))


def _resized(pixels: Pixels, part: Part, scale: int, side: int) -> Pixels:
    """The part of an image that was decoded at 1/scale; its borders are rounded to its pixels."""
    left, top, right, bottom = (
        round(edge / scale)
        for edge in (part.left, part.top, part.left + part.width, part.top + part.height)
    )
    # NumPy copies by rows. PyTorch has a path of its own for what lies in memory in this order.
    region = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right]))
    resized = interpolate(
        region.permute(2, 0, 1)[None],
        (side, side),
        mode="bicubic" if part.is_bicubic else "bilinear",
        antialias=True,
    )
    return resized[0].permute(1, 2, 0).numpy()


def _jpeg_bytes(source: Path | bytes | Image) -> bytes:
    """Returns what is in a JPEG; nothing for other images, and for those that cannot be read."""
    if isinstance(source, Path):
        try:
            with source.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                source = file.read() if size <= LARGEST_JPEG else b""
        except OSError:
            return b""
    if isinstance(source, bytes) and source.startswith(b"\xff\xd8\xff"):
        return source
    return b""


def _plain_size(content: bytes) -> tuple[int, int] | None:
    """Returns width and height of a JPEG in colours or grey that is not turned; None for others."""
    import PIL.Image
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    most = PIL.Image.MAX_IMAGE_PIXELS
    if colours not in ("YCbCr", "Gray") or (most is not None and width * height > most):
        return None
    header = content[: _header_length(content)]
    if any(mark in header for mark in ORIENTED) and not is_upright(content):
        return None
    return width, height


def _header_length(content: bytes) -> int:
    """Returns where the first scan of a JPEG begins; the whole length where that is not clear."""
    place = 2
    while content[place : place + 1] == b"\xff":
        if content[place + 1 : place + 2] == b"\xda":
            return place
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return len(content)
