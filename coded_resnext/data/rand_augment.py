"""timm's RandAugment and random erasing on batches on a device, every image by its own draws.

The operations of RandAugment give what Pillow gives, bit for bit on a CPU: the same formulas in the
same precision, rounded at the same steps. All operations are computed for all images and one of
them is chosen, so that no shape and no step of the host depends on the draws. B images of H x W
pixels, uint8.

What is erased are the rectangles that timm draws on the host.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

# What an image undergoes, as a number in its row of draws. "none" leaves it as it is.
OPERATIONS = (
    "none",
    "affine",
    "autocontrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "solarize_add",
    "brightness",
    "contrast",
    "color",
    "sharpness",
)
# Numbers of an operation: which one, whether cubic, and six coefficients or one amount.
NUMBERS = 8
# ITU-R 601 in sixteen bits, and half of the last bit.
GREY, HALF = (19595, 38470, 7471), 0x8000
SOLARIZE_ADD_BELOW = 128
# Numbers of a rectangle: top, left, bottom, right, and its colour.
RECTANGLE = 7
# Noise is cut out of a fixed field of this many pixels squared, at a position drawn for each image.
NOISE_SIDE = 1024


def is_operation(rows: Tensor, name: str) -> Tensor:
    """Says which rows `[B, NUMBERS]` ask for an operation, `[B, 1, 1, 1]`."""
    return (rows[:, 0] == OPERATIONS.index(name))[:, None, None, None]


def apply_operation(images: Tensor, rows: Tensor, fill: Tensor) -> Tensor:
    """Applies one operation to every image.

    Args:
        images: `[B, 3, H, W]`, uint8.
        rows: `[B, NUMBERS]`, float64: the operation, whether `affine` is bicubic (bilinear
            otherwise), then its coefficients as Pillow takes them; of the others the amount.
        fill: `[3]`, uint8, what `affine` brings in from outside.

    Returns:
        `[B, 3, H, W]`, uint8.
    """
    amounts = rows[:, 2]
    grey = to_grey(images)
    result = look_up(images, tables(images, grey, rows))
    for name, degenerate in (
        ("color", grey.expand_as(images)),
        ("sharpness", smooth(images)),
    ):
        blended = blend(degenerate, images.int(), amounts[:, None, None, None])
        result = torch.where(is_operation(rows, name), blended, result)
    moved = affine(images, rows[:, 2:8], rows[:, 1], fill)
    return torch.where(is_operation(rows, "affine"), moved, result)


def to_grey(images: Tensor) -> Tensor:
    """Returns the luminance `[B, 1, H, W]`, int32, as Pillow rounds it."""
    red, green, blue = images.int().unbind(1)
    weighed = GREY[0] * red + GREY[1] * green + GREY[2] * blue
    return ((weighed + HALF) >> 16)[:, None]


def smooth(images: Tensor) -> Tensor:
    """Returns the mean of 3 x 3 pixels, the middle one five times, inside the border. int32."""
    values = images.int()
    height, width = values.shape[2:]
    if min(height, width) < 3:
        return values
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[:, :, 1:-1, 1:-1]
    inner = torch.nn.functional.pad((2 * total + 13) // 26, (1, 1, 1, 1))
    return torch.where(_border(height, width, images.device), values, inner)


def blend(degenerate: Tensor, values: Tensor, amounts: Tensor) -> Tensor:
    """Goes from one image (amount 0) to another (1), or beyond; integers in, uint8 out."""
    difference = (values - degenerate).float()
    mixed = degenerate.float() + amounts.float() * difference
    return mixed.clamp(0, 255).to(torch.uint8)


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Replaces every intensity by the table `[B, 3, 256]` of its image and channel."""
    replaced = torch.gather(table, 2, images.flatten(2).long())
    return replaced.view_as(images)


def tables(images: Tensor, grey: Tensor, rows: Tensor) -> Tensor:
    """Returns what becomes of every intensity, `[B, 3, 256]`, uint8; itself for other operations.

    Args:
        images: `[B, 3, H, W]`.
        grey: `to_grey` of them.
        rows: `[B, NUMBERS]`.
    """
    batch, channels = images.shape[:2]
    levels = torch.arange(256, device=images.device, dtype=torch.int32)
    whole = rows[:, 2].int()[:, None]
    mean = _mean_grey(grey)
    # Of posterize: how many intensities become one.
    steps = 1 << (8 - whole.clamp(0, 8))
    added = (levels + whole).clamp(max=255)
    counts = histograms(images)
    replacing = {
        "invert": (255 - levels)[None],
        "posterize": levels // steps * steps,
        "solarize": torch.where(levels < whole, levels, 255 - levels),
        "solarize_add": torch.where(levels < SOLARIZE_ADD_BELOW, added, levels),
        "brightness": blend(torch.zeros_like(levels), levels, rows[:, 2:3]).int(),
        "contrast": blend(mean[:, None], levels, rows[:, 2:3]).int(),
    }
    replacing = {name: table[:, None] for name, table in replacing.items()}
    replacing["autocontrast"], replacing["equalize"] = stretched(counts), equalized(counts)
    result = levels.expand(batch, channels, 256)
    for name, table in replacing.items():
        result = torch.where(is_operation(rows, name)[..., 0], table, result)
    return result.to(torch.uint8)


def histograms(images: Tensor) -> Tensor:
    """Counts how often each intensity occurs, `[B, 3, 256]`, int64."""
    pixels = images.flatten(2).long()
    counts = pixels.new_zeros(*pixels.shape[:2], 256)
    return counts.scatter_add(2, pixels, torch.ones_like(pixels))


def stretched(counts: Tensor) -> Tensor:
    """Does autocontrast: the darkest intensity becomes 0 and the brightest 255. int32."""
    levels = torch.arange(256, device=counts.device)
    present = counts > 0
    low = torch.where(present, levels, 255).amin(-1, keepdim=True)
    high = torch.where(present, levels, 0).amax(-1, keepdim=True)
    span = (high - low).clamp(min=1).double()
    # A number over a tensor would be the tensor's reciprocal times the number: another rounding.
    scale = torch.full_like(span, 255) / span
    values = (levels.double() * scale + -low.double() * scale).trunc().clamp(0, 255)
    return torch.where(high <= low, levels, values.int()).int()


def equalized(counts: Tensor) -> Tensor:
    """Equalises a histogram with Pillow's whole-numbered steps. int32."""
    levels = torch.arange(256, device=counts.device)
    last = torch.where(counts > 0, levels, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    before = counts.cumsum(-1) - counts
    values = (step // 2 + before) // step.clamp(min=1)
    return torch.where(step == 0, levels, values.clamp(max=255)).int()


def affine(images: Tensor, coefficients: Tensor, cubic: Tensor, fill: Tensor) -> Tensor:
    """Takes every pixel from where an affine map puts it in the input, interpolated.

    Args:
        images: `[B, 3, H, W]`, uint8.
        coefficients: `[B, 6]`, float64: of the point (x, y) that belongs to the centre of a pixel
            of the result, `a x + b y + c` and `d x + e y + f`.
        cubic: `[B]`, 1 for bicubic interpolation over 4 x 4 pixels, 0 for bilinear over 2 x 2.
        fill: `[3]`, uint8, where the point lies outside the image.

    Returns:
        `[B, 3, H, W]`, uint8.
    """
    channels, height, width = images.shape[1:]
    a, b, c, d, e, f = (part[:, None, None] for part in coefficients.unbind(1))
    columns = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    rows = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    across, down = (x - left)[:, None], (y - top)[:, None]
    # Pixels beyond the border are those of the border.
    columns_of = [(left.long() + step).clamp(0, width - 1) for step in (-1, 0, 1, 2)]
    rows_of = [(top.long() + step).clamp(0, height - 1) for step in (-1, 0, 1, 2)]
    pixels = images.flatten(2)

    def at(row: Tensor, column: Tensor) -> Tensor:
        indices = (row * width + column).flatten(1)[:, None].expand(-1, channels, -1)
        return torch.gather(pixels, 2, indices).view_as(images).double()

    cubic_lines, linear_lines = [], []
    for number, row in enumerate(rows_of):
        values = [at(row, column) for column in columns_of]
        cubic_lines.append(_cubic(values, across))
        if number in (1, 2):
            linear_lines.append(_linear(values[1:3], across))
    resampled = torch.where(
        cubic[:, None, None, None] > 0, _cubic(cubic_lines, down), _linear(linear_lines, down)
    )
    moved = resampled.clamp(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], moved, fill[:, None, None])


def _linear(values: list[Tensor], share: Tensor) -> Tensor:
    first, second = values
    return first + (second - first) * share


def _cubic(values: list[Tensor], share: Tensor) -> Tensor:
    """Interpolates as Pillow's cubic between the inner values, by their neighbours (a = -1)."""
    first, second, third, fourth = values
    linear = third - first
    square = 2 * (first - second) + third - fourth
    cube = second - first - third + fourth
    return second + share * (linear + share * (square + share * cube))


def _mean_grey(grey: Tensor) -> Tensor:
    """Returns the mean luminance `[B]`, rounded to a whole number, int32."""
    values = grey.flatten(1).long()
    count = values.shape[1]
    return ((2 * values.sum(1) + count) // (2 * count)).int()


def _border(height: int, width: int, device: torch.device) -> Tensor:
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    outer = (rows == 0) | (rows == height - 1)
    return outer[:, None] | ((columns == 0) | (columns == width - 1))


if TYPE_CHECKING:
    from .augment import Augmentation


class Rectangles:
    """Draws what is erased from an image: as numbers what timm's `RandomErasing` does to it.

    Args:
        augmentation: with `reprob`, `remode` and `recount`.

    Attributes:
        columns: numbers of an image.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self.columns = augmentation.recount * RECTANGLE + 2 if augmentation.reprob else 0
        self._is_coloured = augmentation.remode == "rand"
        if self.columns:
            from timm.data.random_erasing import RandomErasing

            make: Any = RandomErasing
            # Noise is not drawn here: it would be as much as the images.
            mode = "rand" if self._is_coloured else "const"
            self._timm = make(
                augmentation.reprob, mode=mode, max_count=augmentation.recount, device="cpu"
            )

    def draw(self, side: int, seed: int) -> list[float]:
        """Returns the numbers `[columns]` of an image `side` pixels square, from its seed."""
        random.seed(seed)
        if self._is_coloured:
            torch.default_generator.manual_seed(seed)
        notes = _Notes(side)
        self._timm(notes)
        numbers = notes.numbers + [0.0] * (self.columns - 2 - len(notes.numbers))
        return numbers + [float(random.randrange(NOISE_SIDE)) for _ in range(2)]  # noqa: S311


class _Notes:
    """Stands for an image; writes down what is put into it."""

    dtype = torch.float32

    def __init__(self, side: int) -> None:
        self.numbers: list[float] = []
        self._shape = (3, side, side)

    def size(self) -> tuple[int, int, int]:
        return self._shape

    def __setitem__(self, index: tuple[slice, slice, slice], colour: Tensor) -> None:
        _, rows, columns = index
        edges = (rows.start, columns.start, rows.stop, columns.stop)
        self.numbers += [*map(float, edges), *colour.flatten().tolist()]


class DeviceErasing:
    """Erases rectangles from a batch; the host does not wait.

    Noise is standard normal as timm's, but other numbers: a window of a fixed field of three
    million, the same on all devices.

    Args:
        augmentation: with `remode`.
        columns: of `Rectangles`.
        device: where the images are.
    """

    def __init__(self, augmentation: Augmentation, columns: int, device: torch.device) -> None:
        self.columns = columns
        self._noise: Tensor | None = None
        if columns and augmentation.remode == "pixel":
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(3, NOISE_SIDE, NOISE_SIDE, generator=generator)
            self._noise = noise.to(device)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Returns `[B, 3, H, W]`, normalised, erased by the numbers `[B, columns]`, float64."""
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device)[:, None]
        columns = torch.arange(width, device=images.device)
        noise = None
        if self._noise is not None:
            down, across = numbers[:, -2:].long()[:, :, None, None].unbind(1)
            window = self._noise[:, (down + rows) % NOISE_SIDE, (across + columns) % NOISE_SIDE]
            noise = window.transpose(0, 1)
        for start in range(0, self.columns - 2, RECTANGLE):
            edges = numbers[:, start : start + 4, None, None]
            top, left, bottom, right = edges.unbind(1)
            inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
            colour = numbers[:, start + 4 : start + RECTANGLE, None, None].to(images.dtype)
            images = torch.where(inside[:, None], colour if noise is None else noise, images)
        return images
