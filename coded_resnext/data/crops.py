"""Parts of image files, resized to a square: no more of a JPEG is computed than the part needs.

With the library simplejpeg a JPEG is decoded at the scale 1/1, 1/2, 1/4 or 1/8 that still has all
pixels of the result, and PyTorch resizes the part as Pillow does. At the scale 1/1 the library
nvimgcodec, where it is installed, decodes the part alone, to the same pixels. Every other image,
and a JPEG that is turned by EXIF, has inks, or is damaged in any way, goes through Pillow as
everywhere else.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from .image_folder import is_upright
from .image_sets import attempt

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
# A marker of a JPEG that is neither a zero in the data nor a restart.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
END = b"\xff\xd9"
# In nvimgcodec's words.
CPU_ALONE = -99999


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


def has_nvimgcodec() -> bool:
    """Returns whether nvimgcodec is installed and can be loaded."""
    return _nvimgcodec() is not None


class LazyImage:
    """An image of a set, of which the header alone is read until its pixels are asked for.

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
        self.jpeg = b""
        """What is in its file where simplejpeg decodes it; otherwise nothing."""
        size = None
        if decoder == "simplejpeg":
            self.jpeg = _jpeg_bytes(images.encoded(index))
            size = _plain_size(self.jpeg) if self.jpeg else None
        if size is None:
            self.jpeg = b""
        self.size = size or self.whole().size
        """Width and height, upright."""

    def whole(self) -> Image:
        """Returns all of it as 8-bit RGB, decoded by Pillow; raises as the constructor."""
        if self._image is None:
            self._image = self._images.image(self._index)
        return self._image


def cut_parts(
    images: Sequence[LazyImage], parts: Sequence[Part], side: int
) -> list[Pixels | ValueError]:
    """Returns a part of each image, resized to `[side, side, 3]`, uint8, or why it is unreadable.

    All are decoded before all are resized, which finds the code of both in the processor's caches.
    """
    scales = [
        next(n for n in (8, 4, 2, 1) if n == 1 or min(part.width, part.height) >= n * side)
        for part in parts
    ]
    whole = [image.jpeg if n == 1 else b"" for image, n in zip(images, scales, strict=True)]
    regions = _regions(whole, parts)
    for index, image in enumerate(images):
        if regions[index] is None and image.jpeg:
            regions[index] = _scaled(image, parts[index], scales[index])
    return [
        attempt(_cut_whole, image, part, side)
        if region is None
        else _resized(region, part.is_bicubic, side)
        for image, part, region in zip(images, parts, regions, strict=True)
    ]


def _regions(contents: Sequence[bytes], parts: Sequence[Part]) -> list[Pixels | None]:
    """Returns parts of JPEGs, decoded alone; None where nvimgcodec is missing or refuses.

    They are valid until the next call, which decodes into the same memory. What lies below a part
    is not seen. A JPEG is therefore left to others unless it is one scan to its very end, of which
    Pillow, too, would refuse nothing.
    """
    regions: list[Pixels | None] = [None] * len(contents)
    codec = _nvimgcodec()
    if codec is None:
        return regions
    streams = {}
    for index, (content, part) in enumerate(zip(contents, parts, strict=True)):
        scan = MARKER.search(content, _header_length(content) + 2) if content else None
        if scan is None or scan.group() != END or scan.end() != len(content):
            continue
        right, bottom = part.left + part.width, part.top + part.height
        region = codec.Region(part.top, part.left, bottom, right)
        with suppress(RuntimeError):
            streams[index] = codec.CodeStream(content).get_sub_code_stream(region=region)
    if not streams:
        return regions
    if not hasattr(_memory, "decoder"):
        options = {"device_id": CPU_ALONE, "max_num_cpu_threads": 1}
        _memory.decoder = codec.Decoder(backends=[codec.Backend(codec.CPU_ONLY)], **options)
        _memory.regions = []
    kept = _memory.regions[: len(streams)]
    settings: dict[str, Any] = {"images": kept} if len(kept) == len(streams) else {}
    settings["params"] = codec.DecodeParams(apply_exif_orientation=False)
    decoded = _memory.decoder.decode(list(streams.values()), **settings)
    if None in decoded:
        _memory.regions = []
    elif len(decoded) > len(_memory.regions):
        _memory.regions = decoded
    for index, image in zip(streams, decoded, strict=True):
        regions[index] = None if image is None else np.asarray(image)
    return regions


def _scaled(image: LazyImage, part: Part, scale: int) -> Pixels | None:
    """Returns a part at 1/scale, its borders rounded to pixels of that scale; None where the JPEG
    is damaged, which is left to Pillow's judgement."""
    import simplejpeg

    width, height = image.size
    least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
    buffer = _buffer(3 * width * height)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            image.jpeg, "RGB", strict=True, buffer=buffer, **least
        )
    except ValueError:
        return None
    left, top, right, bottom = (
        round(edge / scale)
        for edge in (part.left, part.top, part.left + part.width, part.top + part.height)
    )
    # The next image is decoded into the same memory; and PyTorch has a path of its own for what
    # lies in memory in this order.
    return pixels[top:bottom, left:right].copy()


def _buffer(size: int) -> Pixels | None:
    """Returns memory that this thread decodes into again and again, None where it is too much.

    Fresh memory would cost a third of the decoding, since the system clears it first.
    """
    if size > LARGEST_BUFFER:
        return None
    if getattr(_memory, "pixels", np.empty(0)).nbytes < size:
        _memory.pixels = np.empty(size, np.uint8)
    return _memory.pixels  # type: ignore[no-any-return]


def _cut_whole(image: LazyImage, part: Part, side: int) -> Pixels:
    return cut(image.whole(), part, side)


def cut(image: Image, part: Part, side: int) -> Pixels:
    """Returns a part of an image, resized by Pillow to `[side, side, 3]`, uint8."""
    from PIL.Image import Resampling

    left, top, width, height, is_bicubic = part
    resample = Resampling.BICUBIC if is_bicubic else Resampling.BILINEAR
    region = image.crop((left, top, left + width, top + height))
    return np.asarray(region.resize((side, side), resample))


def _resized(region: Pixels, is_bicubic: bool, side: int) -> Pixels:
    """Returns `[H, W, 3]` as `[side, side, 3]`."""
    resized = interpolate(
        torch.from_numpy(region).permute(2, 0, 1)[None],
        (side, side),
        mode="bicubic" if is_bicubic else "bilinear",
        antialias=True,
    )
    return resized[0].permute(1, 2, 0).numpy()


@cache
def _nvimgcodec() -> Any:
    """Returns NVIDIA's library of that name, which needs no GPU here; None where it is missing."""
    # Otherwise it prints what it dislikes about damaged images, and, as it is imported, which
    # libraries it lacks on a GPU.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    standard_error, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        from nvidia import nvimgcodec
    except (ImportError, OSError):
        return None
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        os.close(nowhere)
    return nvimgcodec


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
    offset = 2
    while content[offset : offset + 1] == b"\xff":
        if content[offset + 1 : offset + 2] == b"\xda":
            return offset
        offset += 2 + int.from_bytes(content[offset + 2 : offset + 4])
    return len(content)
