"""Augmentation of training images: crops, flips, RandAugment and random erasing.

RandAugment and random erasing are timm's, which the published networks were trained with;
torchvision's RandAugment draws from another set of operations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .crops import Decoder, Part, cut, has_simplejpeg
from .image_sets import attempt
from .preprocessing import Preprocessing, resize_and_cut

if TYPE_CHECKING:
    from PIL.Image import Image
    from timm.data.auto_augment import RandAugment

    from .image_sets import ImageSet

AugmentOn = Literal["cpu", "device", "auto"]
Interpolation = Literal["random", "bilinear", "bicubic"]
EraseMode = Literal["const", "rand", "pixel"]


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image; a field with the name of a flag of timm means the same."""

    crop_padding: Annotated[
        int | None,
        "Pad the image by this many black pixels on each side and cut out a random window of its "
        "size. Without it, a part of random size and shape is cut out and resized.",
    ] = None
    scale: Annotated[
        tuple[float, ...],
        "Least and largest area of the part that is cut out, as a share of the image.",
    ] = (0.08, 1.0)
    ratio: Annotated[
        tuple[float, ...], "Least and largest width over height of the part that is cut out."
    ] = (3 / 4, 4 / 3)
    train_interpolation: Annotated[
        Interpolation, "How the part is resized; random draws bilinear or bicubic for each image."
    ] = "random"
    hflip: Annotated[float, "Probability of a flip from left to right."] = 0.5
    vflip: Annotated[float, "Probability of a flip from top to bottom."] = 0.0
    aa: Annotated[
        str | None,
        "timm's RandAugment, such as rand-m7-n2-mstd0.5: magnitude 7, two operations, noise 0.5.",
    ] = None
    aa_first: Annotated[
        bool,
        "Apply RandAugment before the crop and the flips instead of after them, as the published "
        "code does for CIFAR.",
    ] = False
    reprob: Annotated[float, "Probability of random erasing."] = 0.0
    remode: Annotated[
        EraseMode,
        "What fills an erased rectangle: black (const), one random colour (rand), or noise "
        "(pixel).",
    ] = "pixel"
    recount: Annotated[int, "Largest number of rectangles that are erased from one image."] = 1
    augment_on: Annotated[
        AugmentOn,
        "Where images are augmented: device augments whole batches on the network's device, with "
        "the draws that cpu makes, and keeps small decoded sets there; auto does so on a GPU.",
    ] = "cpu"
    decoder: Annotated[
        Decoder,
        "What decodes JPEGs for resized crops with augment_on device: simplejpeg, at the scale "
        "that a crop needs, pillow, or auto for simplejpeg where it is installed.",
    ] = "auto"

    def __post_init__(self) -> None:
        if self.crop_padding is not None and self.crop_padding < 0:
            raise ValueError(f"crop_padding: expected at least 0, got {self.crop_padding}")
        for name, pair, low in (("scale", self.scale, 0.0), ("ratio", self.ratio, 1e-3)):
            if len(pair) != 2 or not low <= pair[0] <= pair[1] or pair[1] <= 0:
                raise ValueError(f"{name}: expected two rising positive numbers, got {pair}")
        for name, probability in (
            ("hflip", self.hflip),
            ("vflip", self.vflip),
            ("reprob", self.reprob),
        ):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name}: expected a probability, got {probability}")
        for name, choice, choices in (
            ("train_interpolation", self.train_interpolation, get_args(Interpolation)),
            ("remode", self.remode, get_args(EraseMode)),
            ("augment_on", self.augment_on, get_args(AugmentOn)),
            ("decoder", self.decoder, get_args(Decoder)),
        ):
            if choice not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {choice!r}")
        if self.recount < 1:
            raise ValueError(f"recount: expected at least 1, got {self.recount}")

    def settled(self, device: torch.device) -> Augmentation:
        """Returns this with every `auto` decided for the network's device.

        Raises:
            ImportError: the decoder is not installed.
        """
        chosen = self.augment_on
        if chosen == "auto":
            chosen = "cpu" if device.type == "cpu" else "device"
        decoder = self.decoder
        if chosen == "cpu" or self.crop_padding is not None:
            decoder = "pillow"
        elif decoder == "auto":
            decoder = "simplejpeg" if has_simplejpeg() else "pillow"
        elif decoder == "simplejpeg" and not has_simplejpeg():
            raise ImportError(
                "decoder: simplejpeg is not installed: pip install 'coded-resnext[fast]'"
            )
        return replace(self, augment_on=chosen, decoder=decoder)


class TrainTransform:
    """From RGB images to a network's augmented input; an image and a seed always give the same.

    Args:
        augmentation: what happens.
        preprocessing: size and normalisation.

    Raises:
        ValueError: `aa` is not a RandAugment of timm.
        ImportError: timm or torchvision is missing.
    """

    def __init__(self, augmentation: Augmentation, preprocessing: Preprocessing) -> None:
        try:
            from timm.data.random_erasing import RandomErasing
        except ImportError as error:
            raise ImportError(
                "augmentation needs timm and torchvision: pip install 'coded-resnext[train]'"
            ) from error
        self.preprocessing = preprocessing
        self._steps: list[Callable[[Image], Image]] = []
        self._steps.append(make_crop(augmentation, preprocessing.size))
        self._steps.append(Flips(augmentation.hflip, augmentation.vflip))
        if augmentation.aa:
            index = 0 if augmentation.aa_first else len(self._steps)
            self._steps.insert(index, make_rand_augment(augmentation.aa, preprocessing))
        self._erase: Callable[[Tensor], Tensor] | None = None
        if augmentation.reprob:
            make_erasing: Callable[..., Callable[[Tensor], Tensor]] = RandomErasing
            self._erase = make_erasing(
                augmentation.reprob,
                mode=augmentation.remode,
                max_count=augmentation.recount,
                device="cpu",
            )

    def open(self, images: ImageSet, indices: Sequence[int], _: Sequence[int]) -> list[Any]:
        """Returns images of a set as RGB; a ValueError stands for one that cannot be read."""
        return [attempt(images.image, index) for index in indices]

    def __call__(self, images: Sequence[Image], seeds: Sequence[int]) -> Tensor:
        """Returns RGB images of any size as `[B, 3, size, size]`, normalised, by their seeds."""
        with generators_kept():
            augmented = []
            for image, seed in zip(images, seeds, strict=True):
                seed_generators(seed)
                for step in self._steps:
                    image = step(image)
                augmented.append(np.asarray(image))
            pixels = torch.from_numpy(np.stack(augmented)).permute(0, 3, 1, 2).contiguous()
            pixels = self.preprocessing.normalize(pixels.float() / 255)
            if self._erase is not None:
                for row, seed in zip(pixels, seeds, strict=True):
                    seed_generators(seed + 1)
                    self._erase(row)
        return pixels


class ResizedCrop:
    """Cuts out a part of random size and shape, drawn by timm, and resizes it to a square.

    Raises:
        ImportError: timm or torchvision is missing.
    """

    def __init__(self, size: int, augmentation: Augmentation) -> None:
        from timm.data.transforms import RandomResizedCropAndInterpolation

        self.size = size
        make: Any = RandomResizedCropAndInterpolation
        self._timm = make(
            size,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            interpolation=augmentation.train_interpolation,
        )
        modes = self._timm.interpolation
        modes = modes if isinstance(modes, tuple) else (modes,)
        self._bicubic = [mode.value == "bicubic" for mode in modes]

    def __call__(self, image: Image) -> Image:
        import PIL.Image

        return PIL.Image.fromarray(cut(image, self.draw(image.size), self.size))

    def draw(self, size: tuple[int, int]) -> Part:
        """Returns the part of an image of this width and height."""
        image = _without_pixels()
        image._size = size
        top, left, height, width = self._timm.get_params(image, self._timm.scale, self._timm.ratio)
        # Of a tiny image timm may draw none.
        height, width = max(height, 1), max(width, 1)
        is_bicubic = self._bicubic[0]
        if len(self._bicubic) > 1:
            is_bicubic = random.choice(self._bicubic)  # noqa: S311
        left, top = min(left, size[0] - width), min(top, size[1] - height)
        return Part(left, top, width, height, is_bicubic)


@cache
def _without_pixels() -> Image:
    """Returns what stands for an image of which the size alone is asked for."""
    import PIL.Image

    return PIL.Image.Image()


class PaddedCrop:
    """Cuts a square out of the image, padded with black on all sides, at a random position."""

    def __init__(self, size: int, padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, image: Image) -> Image:
        image = resize_and_cut(image, self.size)
        left, top = self.draw()
        # Pixels outside an image are black to PIL's crop.
        return image.crop((left, top, left + self.size, top + self.size))

    def draw(self) -> tuple[int, int]:
        """Returns where the square begins, from the left and from the top; below 0 in the
        padding."""
        left = random.randint(-self.padding, self.padding)  # noqa: S311
        top = random.randint(-self.padding, self.padding)  # noqa: S311
        return left, top


def make_crop(augmentation: Augmentation, size: int) -> ResizedCrop | PaddedCrop:
    """Returns what cuts a square of `size` pixels out of an image."""
    if augmentation.crop_padding is None:
        return ResizedCrop(size, augmentation)
    return PaddedCrop(size, augmentation.crop_padding)


class Flips:
    """Flips from left to right and from top to bottom with given probabilities."""

    def __init__(self, horizontal: float, vertical: float) -> None:
        self.horizontal, self.vertical = horizontal, vertical

    def __call__(self, image: Image) -> Image:
        from PIL import ImageOps

        mirrored, flipped = self.draw()
        if mirrored:
            image = ImageOps.mirror(image)
        return ImageOps.flip(image) if flipped else image

    def draw(self) -> tuple[bool, bool]:
        """Returns whether to flip from left to right, and from top to bottom."""
        horizontal = random.random() < self.horizontal  # noqa: S311
        return horizontal, random.random() < self.vertical  # noqa: S311


def make_rand_augment(config: str, preprocessing: Preprocessing) -> RandAugment:
    """Returns RandAugment with the settings of timm's training: fill colour, largest shift.

    Raises:
        ValueError: timm knows no such RandAugment.
        ImportError: timm is missing.
    """
    from timm.data.auto_augment import posterize, rand_augment_transform

    settings = {
        "translate_const": int(preprocessing.size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in preprocessing.mean),
    }
    try:
        augment: RandAugment = rand_augment_transform(config, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"aa: expected a RandAugment of timm such as rand-m9-n2-mstd0.5, got {config!r}"
        ) from error
    for operation in augment.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = posterize_to_black
    return augment


def posterize_to_black(image: Image, bits_to_keep: int, **settings: Any) -> Image:
    """Posterizes as timm; of no bits at all it makes a black image.

    Magnitudes below 2.5 ask for none. Pillow gave black when the published networks were trained,
    and raises an error since.
    """
    from timm.data.auto_augment import posterize

    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    untyped: Callable[..., Image] = posterize
    return untyped(image, bits_to_keep, **settings)


def seed_generators(seed: int) -> None:
    """Seeds what augmentation draws from: the global generators, since timm knows no others."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Afterwards the global generators of Python, NumPy and PyTorch's CPU are as they were."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_state)
