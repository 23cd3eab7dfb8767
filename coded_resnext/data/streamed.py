"""A loader for folders of any size: the host reads and cuts, the device does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .augment import Augmentation
from .batches import Batch
from .crops import LazyImage, cut_parts
from .image_sets import ImageSet, attempt
from .loaders import TrainImages, readable
from .on_device import Augment, DeviceAugment, Draws
from .preprocessing import Preprocessing, resize_and_cut

if TYPE_CHECKING:
    from .crops import Pixels

# Images of which a process holds the encoded bytes at a time.
GROUP = 16


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
        places = [n for n, image in enumerate(opened) if isinstance(image, LazyImage)]
        sound = [opened[place] for place in places]
        drawn = [
            self.draws.of_image(seeds[place], image.size)
            for place, image in zip(places, sound, strict=True)
        ]
        parts = [part for part, _ in drawn if part is not None]
        pixels = (
            cut_parts(sound, parts, self.side)
            if len(parts) == len(drawn)
            else [attempt(self._padded, image) for image in sound]
        )
        for place, cut, (_, numbers) in zip(places, pixels, drawn, strict=True):
            opened[place] = cut if isinstance(cut, ValueError) else (cut, numbers)
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
            places = torch.arange(len(pixels), device=self._device)
            yield batch._replace(images=self._augment(pixels, places, draws))
