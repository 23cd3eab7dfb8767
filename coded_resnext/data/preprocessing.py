"""Images on their way into a network: preprocessing, and the digits that ship with scikit-learn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


# Of a network's input in pixels: no description of unknown origin asks for more memory.
LARGEST_SIZE = 8192
# Of an image's longer side to its shorter one; what lies beyond, the crop never shows.
LONGEST_SIDES = 16
SPLIT_SEED = 0
TEST_SHARE = 0.2


def derive_seed(*parts: int) -> int:
    """Returns one seed from several non-negative numbers, such as (seed, epoch)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input: resizing, crop, channels and normalisation."""

    size: int
    """Height and width of the input in pixels."""
    channels: int
    """1 for grey, 3 for RGB."""
    mean: tuple[float, ...]
    """Mean of every channel of intensities in 0..1, subtracted."""
    std: tuple[float, ...]
    """Standard deviation of every channel, divided by."""
    resize: int | None = None
    """What the shorter side is resized to before the centre is cut out; None means `size`."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected a positive number of pixels, got {self.size}")
        largest = max(self.size, self.resize or 0)
        if largest > LARGEST_SIZE:
            raise ValueError(f"size: expected at most {LARGEST_SIZE} pixels, got {largest}")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(
                f"resize: expected at least the size, {self.size} pixels, got {self.resize}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name}: expected {self.channels} numbers, got {len(values)}")
            if not all(isinstance(value, (int, float)) and isfinite(value) for value in values):
                raise ValueError(f"{name}: expected finite numbers, got {values}")
        # What lies in 0..1 has no other mean, and deviates from it by half at most.
        if not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise ValueError(
                f"mean: expected numbers from 0 to 1, of intensities in 0..1, got {self.mean}"
            )
        if not 0 < min(self.std) <= max(self.std) <= 1:
            raise ValueError(
                f"std: expected numbers above 0 and at most 1, of intensities in 0..1, "
                f"got {self.std}"
            )

    def normalize(self, images: Tensor) -> Tensor:
        """Intensities in 0..1, `[.., C, H, W]`, to the network's input."""
        mean = images.new_tensor(self.mean)[:, None, None]
        std = images.new_tensor(self.std)[:, None, None]
        return (images - mean) / std

    def __call__(self, image: Image) -> Tensor:
        """Maps a PIL image of any mode and size to `[C, size, size]`, float32; bicubic resizing.

        `pixels.to_channels` says what becomes of orientation, bit depth and colour space.
        """
        image = resize_and_cut(to_channels(image, self.channels), self.size, self.resize)
        return self.normalize(intensities(image))

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data, which `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocessing:
        """Reads what `to_dict` wrote."""
        return cls(
            data["size"],
            data["channels"],
            tuple(data["mean"]),
            tuple(data["std"]),
            data.get("resize"),
        )


def resize_and_cut(image: Image, size: int, resize: int | None = None) -> Image:
    """Returns the centre of an image, `size` pixels square, its shorter side first resized
    (bicubic).

    Args:
        image: any size.
        size: height and width of the result.
        resize: what the shorter side is resized to; None means `size`.
    """
    width, height = image.size
    shorter = resize or size
    scale = shorter / min(width, height)
    new_size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    # Of a long strip the centre alone is resized, so that work follows the size asked for.
    longest = LONGEST_SIDES * shorter
    if max(new_size) > longest:
        kept_width, kept_height = (
            min(side, LONGEST_SIDES * min(width, height)) for side in image.size
        )
        left, top = (width - kept_width) // 2, (height - kept_height) // 2
        image = image.crop((left, top, left + kept_width, top + kept_height))
        new_size = (min(new_size[0], longest), min(new_size[1], longest))
    if new_size != image.size:
        image = image.resize(new_size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def intensities(image: Image) -> Tensor:
    """Returns an 8-bit grey or RGB image as `[C, H, W]`, float32 in 0..1."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def to_channels(image: Image, channels: int) -> Image:
    """Returns a PIL image of any mode as 8-bit grey or RGB, upright.

    The orientation that a camera stored (EXIF) is applied. Of 16-bit grey the range 0..65535 is
    scaled to 0..255: Pillow's own conversion clips it at 255, so that almost all of it turns white.
    Grey is repeated for RGB, RGB is weighed for grey (ITU-R 601). CMYK is converted by the
    formula without inks, and other colour profiles are ignored. An alpha channel is dropped: what
    is transparent shows the colour stored there. Of an animated image this is the first frame.

    Args:
        image: what Pillow opened.
        channels: 1 for grey, 3 for RGB.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose range is unknown, or without their alpha
            channel they are all of one colour.
        OSError: the file behind the image is damaged.
    """
    import PIL.Image

    source = image.format
    turn = stored_turn(image)
    if turn is not None:
        image = image.transpose(PIL.Image.Transpose[turn])
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits for a pixel, got 32-bit floating-point numbers")
    # To Pillow 16 bits are I;16, but I in two formats; in all others that is 32 bits.
    if image.mode == "I" and source not in ("PNG", "PPM"):
        raise ValueError("expected 8 or 16 bits for a pixel, got 32-bit integers")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns of another way, once for each image.
        image = image.convert("RGBA")
    opaque = image.convert("L" if channels == 1 else "RGB")
    if "A" in image.getbands():
        low, high = image.getchannel("A").getextrema()
        if low != high and len(opaque.getcolors(1) or ()) == 1:
            raise ValueError(
                "its drawing is in the alpha channel alone, which is dropped; put it on a ground"
            )
    # It is upright now, and must not be turned again.
    opaque.info.clear()
    return opaque


def stored_turn(image: Image) -> str | None:
    """Returns how to turn an image upright, None where it is, or where its EXIF is damaged."""
    try:
        # The tag alone is read: other entries may be anything, and none of them is written anew.
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    # What Pillow raises is no closed list; the pixels may be whole.
    except Exception:
        return None


def _from_16_bits(image: Image) -> Image:
    import PIL.Image

    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError(
            f"expected 8 or 16 bits for a pixel, got numbers {values.min()} to {values.max()}"
        )
    # 65535 = 255 * 257, so that black and white stay what they are.
    return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
