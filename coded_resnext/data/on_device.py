"""Training loaders whose images are augmented on the network's device.

`DeviceTrainImages` keeps a whole set of the network's size in the device's memory.
`StreamedTrainImages` takes folders of any size: the host reads and cuts, the device does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import (
    Augmentation,
    Flips,
    ResizedCrop,
    generators_kept,
    make_crop,
    make_rand_augment,
    posterize_to_black,
    seed_generators,
)
from .batches import Batch, Key, ShuffledSamples
from .crops import LazyImage, Part, cut_parts
from .image_sets import DamagedImages, ImageSet, MemoryImages, attempt
from .loaders import Plan, TrainImages, make_loader, passing, readable
from .preprocessing import Preprocessing, derive_seed, resize_and_cut
from .rand_augment import NUMBERS, OPERATIONS, DeviceErasing, Rectangles, apply_operation

if TYPE_CHECKING:
    from timm.data.auto_augment import RandAugment

    from .crops import Pixels


Augment = Callable[[Tensor, Tensor, Tensor], Tensor]
# Numbers of an image before those of its operations: left, top, mirrored, flipped.
CROP = 4
# Images of which a process holds the encoded bytes at a time.
GROUP = 16


def device_pixels(images: ImageSet, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Returns all images of a set in a device's memory, `[n, 3, size, size]`, uint8.

    Raises:
        ValueError: the images are not decoded in memory, or not of the network's size; resizing is
            left to the CPU.
    """
    size = preprocessing.size
    wanted = f"augment_on: expected decoded images of {size} x {size} pixels for the device"
    if not isinstance(images, MemoryImages):
        raise ValueError(f"{wanted}, got files; decode them with storage memory")
    pixels = images.pixels
    if tuple(pixels.shape[2:]) != (size, size) or preprocessing.resize not in (None, size):
        height, width = pixels.shape[2:]
        raise ValueError(
            f"{wanted}, neither resized nor cut, got {height} x {width} and a resizing to "
            f"{preprocessing.resize or size}; leave it to augment_on cpu"
        )
    return pixels.contiguous().to(device)


def is_resident(images: ImageSet, preprocessing: Preprocessing) -> bool:
    """Returns whether a set can be kept in a device's memory, as `device_pixels` does it."""
    side = preprocessing.size
    return (
        isinstance(images, MemoryImages)
        and isinstance(images.images, np.ndarray)
        and images.images.shape[1:3] == (side, side)
        and preprocessing.resize in (None, side)
    )


class DeviceTrainImages(ShuffledSamples):
    """A training loader as `loaders.TrainImages` with the same order and draws, on the device.

    A step sends the indices of its images and a few numbers for each to the device, and never waits
    for it.

    Args:
        images: the training images, decoded, of the network's size.
        augmentation: what happens to them.
        preprocessing: size and normalisation.
        batch_size: images of an optimizer step, over all ranks.
        device: of the network.
        seed: of order and augmentation.
        rank: this process, counted from 0.
        world_size: how many processes share a batch.
        workers: processes that make the draws for this rank; 0 makes them in this one.
        around: put around what the device does, such as `torch.compile`.
        balanced: as for `ShuffledSamples`.

    Raises:
        ValueError: the device cannot do what is asked for, see `Draws` and `device_pixels`; or as
            `ShuffledSamples`.
        ImportError: timm or Pillow is missing.
    """

    def __init__(
        self,
        images: ImageSet,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        device: torch.device,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        around: Callable[[Augment], Augment] | None = None,
        balanced: bool = False,
    ) -> None:
        shared = {"rank": rank, "world_size": world_size}
        super().__init__(images.targets, batch_size, seed=seed, balanced=balanced, **shared)
        if augmentation.crop_padding is None:
            raise ValueError(
                "crop_padding: expected a number of pixels for images that stay on the device, got "
                "None; StreamedTrainImages has resized crops"
            )
        draws = Draws(augmentation, preprocessing)
        augment: Augment = DeviceAugment(
            preprocessing, draws.fill, device, augmentation.aa_first, draws.erasing(device)
        )
        self._augment = around(augment) if around else augment
        self.images, self._pixels = images, device_pixels(images, preprocessing, device)
        self.damaged = DamagedImages(images, 0)
        """None: decoding has left them out."""
        drawing = _Drawing(draws, images.targets, seed)
        self._loader = make_loader(drawing, Plan(self.keys), workers)

    def __iter__(self) -> Iterator[Batch]:
        device = self._pixels.device
        for drawn in passing(self._loader):
            indices, draws = (
                each.to(device, non_blocking=True) for each in (drawn.indices, drawn.draws)
            )
            pixels = self._augment(self._pixels, indices, draws)
            yield Batch(pixels, drawn.targets, drawn.indices)

    def fingerprint(self) -> dict[str, Any]:
        """Returns that of the images."""
        return self.images.fingerprint()

    def describe(self, indices: Tensor) -> list[str]:
        """Returns the files of samples."""
        return [self.images.name(index) for index in indices.tolist()]


class DeviceEvalImages:
    """An evaluation loader as `loaders.EvalImages`, of images in the device's memory.

    Args:
        images: decoded, of the network's size.
        preprocessing: size and normalisation.
        batch_size: images in a batch of this rank; the last may be smaller.
        device: of the network.
        rank: this process, counted from 0.
        world_size: how many processes share the images.

    Raises:
        ValueError: see `device_pixels`.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images = images
        self._pixels = device_pixels(images, preprocessing, device)[rank::world_size]
        self._targets = images.targets[rank::world_size]
        self._normalize = Normalize(preprocessing, device)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._pixels) // self.batch_size)

    def fingerprint(self) -> dict[str, Any]:
        """Returns that of the set, on every rank."""
        return self.images.fingerprint()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self._pixels), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            yield self._normalize(self._pixels[chosen]), self._targets[chosen]


class _Drawn(NamedTuple):
    """What the host decides about a batch; of a named tuple PyTorch pins the tensors."""

    draws: Tensor
    targets: Tensor
    indices: Tensor


class _Drawing(Dataset[_Drawn]):
    """Makes the draws of whole batches."""

    def __init__(self, draws: Draws, targets: Tensor, seed: int) -> None:
        self.draws, self.targets, self.seed = draws, targets, seed

    def __getitem__(self, key: Key) -> _Drawn:
        epoch, positions = key
        seeds = [derive_seed(self.seed, epoch, position) for position in positions]
        chosen = torch.tensor(positions) % len(self.targets)
        return _Drawn(self.draws(seeds), self.targets[chosen], chosen)


class Draws:
    """What becomes of images, as numbers; what a seed gives is what `TrainTransform` does with it.

    Args:
        augmentation: what happens.
        preprocessing: size and colours.

    Raises:
        ValueError: a setting that the device does not know.
        ImportError: timm or Pillow is missing.

    Attributes:
        layers: RandAugment's operations for an image.
        fill: colour that its shifts and turns bring in.
    """

    def __init__(self, augmentation: Augmentation, preprocessing: Preprocessing) -> None:
        self._crop = make_crop(augmentation, preprocessing.size)
        self._erased = Rectangles(augmentation)
        self._augmentation = augmentation
        self._flips = Flips(augmentation.hflip, augmentation.vflip)
        self.layers, self.fill = 0, (0, 0, 0)
        self._augment: RandAugment | None = None
        if augmentation.aa:
            rand_augment = make_rand_augment(augmentation.aa, preprocessing)
            for operation in rand_augment.ops:
                operation.aug_fn = _noted(operation.name, operation.aug_fn)
                self.fill = operation.kwargs["fillcolor"]
            self.layers, self._augment = rand_augment.num_layers, rand_augment
        self._size, self._aa_first = preprocessing.size, augmentation.aa_first

    def __call__(self, seeds: Sequence[int]) -> Tensor:
        """Draws for images of the network's size `[B, CROP + layers * NUMBERS + ..]`, float64."""
        with generators_kept():
            rows = [self.of_image(seed, (self._size, self._size))[1] for seed in seeds]
        return torch.tensor(rows, dtype=torch.float64)

    def of_image(self, seed: int, size: tuple[int, int]) -> tuple[Part | None, list[float]]:
        """Returns the part that a resized crop shows, and the numbers; seeds the generators.

        Args:
            seed: of the image.
            size: its width and height.
        """
        seed_generators(seed)
        first = self._operations() if self._aa_first else []
        part, corner = None, (0, 0)
        if isinstance(self._crop, ResizedCrop):
            part = self._crop.draw(size)
        else:
            corner = self._crop.draw()
        row = [float(number) for number in (*corner, *self._flips.draw())]
        row += first if self._aa_first else self._operations()
        row += [0.0] * (CROP + self.layers * NUMBERS - len(row))
        if self._erased.columns:
            row += self._erased.draw(self._size, seed + 1)
        return part, row

    def erasing(self, device: torch.device) -> DeviceErasing:
        """Returns what erases by these numbers on a device."""
        return DeviceErasing(self._augmentation, self._erased.columns, device)

    def _operations(self) -> list[float]:
        """Returns the numbers of RandAugment's operations on the next image."""
        if self._augment is None:
            return []
        notes = _make_notes(self._size)
        notes.rows = []
        self._augment(notes)
        return [number for operation in notes.rows for number in operation]


class Normalize:
    """From intensities to a network's input, as `Preprocessing.normalize`; the host does not wait.

    Args:
        preprocessing: mean and deviation.
        device: where the images are.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (preprocessing.mean, preprocessing.std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Returns `[B, 3, H, W]`, uint8, as float32."""
        return (images.float() / 255 - self._mean) / self._std


class DeviceAugment:
    """Makes a network's input of images that are in the device's memory; the host does not wait.

    Args:
        preprocessing: size and normalisation.
        fill: of `Draws`.
        device: where the images are.
        aa_first: whether RandAugment comes before the crop and the flips.
        erasing: of `Draws`.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        fill: Sequence[int],
        device: torch.device,
        aa_first: bool = False,
        erasing: DeviceErasing | None = None,
    ) -> None:
        self._aa_first = aa_first
        self._erasing = erasing if erasing is not None and erasing.columns else None
        self._fill = torch.tensor(fill, dtype=torch.uint8, device=device)
        self._normalize = Normalize(preprocessing, device)

    def __call__(self, pixels: Tensor, indices: Tensor, draws: Tensor) -> Tensor:
        """Returns the chosen images, augmented and normalised.

        Args:
            pixels: all images `[n, 3, H, W]`, uint8.
            indices: which, `[B]`.
            draws: of these, see `Draws`.

        Returns:
            `[B, 3, H, W]`, float32.
        """
        if self._erasing is not None:
            count = draws.shape[1] - self._erasing.columns
            draws, erased = draws[:, :count], draws[:, count:]
        crops = draws[:, :CROP]
        if self._aa_first:
            images = self._operate(pixels[indices], draws)
            images = crop_and_flip(images, torch.arange(len(images), device=images.device), crops)
        else:
            images = self._operate(crop_and_flip(pixels, indices, crops), draws)
        images = self._normalize(images)
        return images if self._erasing is None else self._erasing(images, erased)

    def _operate(self, images: Tensor, draws: Tensor) -> Tensor:
        for start in range(CROP, draws.shape[1], NUMBERS):
            images = apply_operation(images, draws[:, start : start + NUMBERS], self._fill)
        return images


def crop_and_flip(pixels: Tensor, indices: Tensor, crops: Tensor) -> Tensor:
    """Shifts images, which are black where they end, and flips them.

    Args:
        pixels: `[n, 3, H, W]`, uint8.
        indices: which of them, `[B]`.
        crops: `[B, CROP]`: first column and row of the part that is cut out, below 0 outside the
            image, and whether to flip from left to right and from top to bottom.
    """
    height, width = pixels.shape[2:]
    left, top, mirrored, flipped = crops.long().unbind(1)
    rows, inside_rows = _line(height, top, flipped)
    columns, inside_columns = _line(width, left, mirrored)
    images = pixels[indices[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    return torch.where(inside[..., None], images, 0).permute(0, 3, 1, 2)


def _line(length: int, start: Tensor, is_reversed: Tensor) -> tuple[Tensor, Tensor]:
    """Places `[B, length]` along one axis, held inside the image, and whether they were in it."""
    steps = torch.arange(length, device=start.device)
    steps = torch.where(is_reversed[:, None] > 0, length - 1 - steps, steps)
    indices = start[:, None] + steps
    return indices.clamp(0, length - 1), (indices >= 0) & (indices < length)


def _noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Notes what one of timm's operations is asked for, instead of doing it."""
    from timm.data import auto_augment

    # Shifts and turns stay: they hand their coefficients to the image that they change.
    moving = (
        auto_augment.shear_x,
        auto_augment.shear_y,
        auto_augment.translate_x_abs,
        auto_augment.translate_y_abs,
        auto_augment.translate_x_rel,
        auto_augment.translate_y_rel,
        auto_augment.rotate,
    )
    if function in moving:
        return function
    known = {
        auto_augment.auto_contrast: "autocontrast",
        auto_augment.equalize: "equalize",
        auto_augment.invert: "invert",
        posterize_to_black: "posterize",
        auto_augment.solarize: "solarize",
        auto_augment.solarize_add: "solarize_add",
        auto_augment.brightness: "brightness",
        auto_augment.contrast: "contrast",
        auto_augment.color: "color",
        auto_augment.sharpness: "sharpness",
    }
    if function not in known:
        raise ValueError(
            f"aa: expected operations that augment_on device knows, got {name}; leave it to "
            "augment_on cpu"
        )
    return partial(_note, OPERATIONS.index(known[function]))


def _note(operation: int, notes: Any, amount: float = 0.0, **_: Any) -> Any:
    notes.rows.append([float(operation), 0.0, float(amount), *[0.0] * (NUMBERS - 3)])
    return notes


@cache
def _make_notes(size: int) -> Any:
    """Stands for an image of a size; its list `rows` gets what an operation would do to it."""
    from PIL import Image

    class Notes(Image.Image):
        """Takes the coefficients that Pillow's own code works out for turns and shifts."""

        rows: list[list[float]]

        @property
        def size(self) -> tuple[int, int]:
            return size, size

        def copy(self) -> Notes:
            return self

        def transform(  # type: ignore[override]
            self, size: Any, method: Any, data: Sequence[float], resample: int, **_: Any
        ) -> Notes:
            cubic = float(resample == Image.Resampling.BICUBIC)
            self.rows.append([float(OPERATIONS.index("affine")), cubic, *map(float, data)])
            return self

    return Notes()


class HostCrops:
    """What worker processes do: they draw, decode what the crop needs, and resize it to bytes.

    Args:
        augmentation: what happens, with its decoder.
        preprocessing: size and colours.

    Raises:
        ValueError: the device does not know a setting, see `Draws`, or RandAugment comes first.
        ImportError: timm, Pillow or the decoder is missing.
    """

    def __init__(self, augmentation: Augmentation, preprocessing: Preprocessing) -> None:
        if augmentation.aa and augmentation.aa_first:
            raise ValueError(
                "aa_first: expected RandAugment after the crop with augment_on device, unless the "
                "images are decoded and of the network's size; leave it to augment_on cpu"
            )
        self.draws = Draws(augmentation, preprocessing)
        device = torch.device("cpu")
        self.decoder = replace(augmentation, augment_on="device").settled(device).decoder
        self.side = preprocessing.size

    def open(self, images: ImageSet, indices: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        """Returns pairs of an image `[side, side, 3]` and its draws, or a ValueError that names a
        damaged image."""
        opened = []
        for start in range(0, len(indices), GROUP):
            group = slice(start, start + GROUP)
            opened += self._open(images, indices[group], seeds[group])
        return opened

    def _open(self, images: ImageSet, indices: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        """Does one thing after the other for all of them, which the processor does faster."""
        opened = [attempt(LazyImage, images, index, self.decoder) for index in indices]
        positions = [n for n, image in enumerate(opened) if isinstance(image, LazyImage)]
        sound = [opened[position] for position in positions]
        drawn = [
            self.draws.of_image(seeds[position], image.size)
            for position, image in zip(positions, sound, strict=True)
        ]
        parts = [part for part, _ in drawn if part is not None]
        pixels = (
            cut_parts(sound, parts, self.side)
            if len(parts) == len(drawn)
            else [attempt(self._padded, image) for image in sound]
        )
        for position, cut, (_, numbers) in zip(positions, pixels, drawn, strict=True):
            opened[position] = cut if isinstance(cut, ValueError) else (cut, numbers)
        return opened

    def _padded(self, image: LazyImage) -> Pixels:
        return np.asarray(resize_and_cut(image.whole(), self.side))

    def __call__(
        self, opened: Sequence[tuple[Pixels, list[float]]], _: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns the images `[B, 3, side, side]`, uint8, and their draws, see `Draws`."""
        pixels, numbers = zip(*opened, strict=True)
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return batch, torch.tensor(numbers, dtype=torch.float64)


class StreamedTrainImages(TrainImages):
    """A training loader as `TrainImages`, whose batches are flipped, augmented and normalised on
    the device.

    Args:
        images: the training images, of any size, in files or in memory.
        augmentation: what happens to them.
        preprocessing: size and normalisation.
        batch_size: images of an optimizer step, over all ranks.
        device: of the network.
        around: put around what the device does, such as `torch.compile`.
        options: as for `TrainImages`.

    Raises:
        ValueError, ImportError: as `HostCrops` and `TrainImages`.
    """

    def __init__(
        self,
        images: ImageSet,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        device: torch.device,
        around: Callable[[Augment], Augment] | None = None,
        **options: Any,
    ) -> None:
        crops = HostCrops(augmentation, preprocessing)
        super().__init__(images, crops, batch_size, **options)
        augment: Augment = DeviceAugment(
            preprocessing, crops.draws.fill, device, erasing=crops.draws.erasing(device)
        )
        self._augment, self._device = around(augment) if around else augment, device

    def __iter__(self) -> Iterator[Batch]:
        for batch, numbers in readable(self._loader, self.damaged):
            assert numbers is not None
            pixels, draws = (
                each.to(self._device, non_blocking=True) for each in (batch.images, numbers)
            )
            indices = torch.arange(len(pixels), device=self._device)
            yield batch._replace(images=self._augment(pixels, indices, draws))
