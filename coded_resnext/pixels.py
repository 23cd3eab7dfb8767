"""Pictures of every kind as 8-bit RGB or grey: orientation, bit depth, colour space, one frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def to_channels(image: Image, channels: int) -> Image:
    """A PIL image of any mode as 8-bit grey or RGB, upright.

    The orientation that a camera stored (EXIF) is applied. Of 16-bit grey the range 0..65535 is
    scaled to 0..255: Pillow's own conversion clips it at 255, so that almost all of it turns white.
    Grey is repeated for RGB, RGB is weighed for grey (ITU-R 601). CMYK is converted by the
    formula without inks, and other colour profiles are ignored. An alpha channel is dropped: what
    is transparent shows the colour stored there. Of an animated image this is the first frame.

    Args:
        image: what Pillow opened.
        channels: 1 for grey, 3 for RGB.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose range is unknown.
        OSError: the file behind the image is damaged.
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits for a pixel, got 32-bit floating-point numbers")
    # Pillow reads 16-bit grey as I;16 from most formats, and as I from the others.
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    return image.convert("L" if channels == 1 else "RGB")


def _from_16_bits(image: Image) -> Image:
    import PIL.Image

    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError(
            f"expected 8 or 16 bits for a pixel, got numbers {values.min()} to {values.max()}"
        )
    # 65535 = 255 * 257, so that black and white stay what they are.
    return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
