"""What a result was measured on: which images, with which settings, by what.

Two results are of the same images when the digests of these are the same, whatever the folders are
called.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from coded_resnext.training.run_folder import versions

from .observe import Loader, numbered

# Of every image, spread over all rows and channels: as fast as a GPU that evaluates.
MOST_VALUES = 4096
_SHOWN = 12


@dataclass(frozen=True)
class Images:
    """Images on which something was measured, all as the network got them."""

    samples: int
    """How many there are."""
    sha256: str
    """Digest of their classes, and of up to 4,096 values of each, in order."""
    name: str | None = None
    """Name of the data set, or of the folder; None where nobody said it."""
    split: str | None = None
    """Which part of it, such as test."""

    def __str__(self) -> str:
        where = (
            " ".join(part for part in (self.name, self.split) if part) or "images without a name"
        )
        return f"{where}: {self.samples:,} images, {self.sha256[:_SHOWN]}"


class DigestedLoader:
    """A loader of the same batches, which takes their digest in its first whole pass.

    Args:
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.images: Images | None = None
        """The images; None before the first whole pass."""

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    @property
    def targets(self) -> Tensor | None:
        """Returns the classes of all images, where the loader tells them."""
        return getattr(self.loader, "targets", None)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images, targets) for images, targets, _ in self.batches())

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields the batches with the positions of their images."""
        if self.images is not None:
            yield from numbered(self.loader)
            return
        # Of their own, so that the size of the batches does not matter.
        values, classes, samples = hashlib.sha256(), hashlib.sha256(), 0
        shape = None
        for images, targets, positions in numbered(self.loader):
            if shape != (shape := (images.dtype, images.shape[1:])):
                values.update(repr(shape).encode())
            values.update(_bytes(_spread(images)))
            classes.update(_bytes(targets.long()))
            samples += len(images)
            yield images, targets, positions
        whole = hashlib.sha256(values.digest() + classes.digest()).hexdigest()
        self.images = Images(samples, whole)


def _spread(images: Tensor) -> Tensor:
    """Returns some values of every image, `[B, M]`; all where there are few."""
    flat = images.reshape(len(images), -1)
    step = -(-flat.shape[1] // MOST_VALUES)
    # An odd step meets other columns in every row.
    return flat[:, :: step | 1] if step > 1 else flat


def _bytes(values: Tensor) -> Any:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


@dataclass(frozen=True)
class Provenance:
    """What an evaluation was measured on."""

    test: Images
    """The images on which everything is measured but the thresholds."""
    thresholds: Images | None
    """The images on which the thresholds were chosen; None for the test images."""
    outside: Images | None
    """The images of none of the classes; None where there were none."""
    settings: dict[str, Any]
    """The arguments of `evaluate`, by name: seed, repeats, sizes of the draws."""
    versions: dict[str, str]
    """Of this package, Python, PyTorch and NumPy."""
    date: str
    """The day, in UTC."""
    training: dict[str, Any] = field(default_factory=dict)
    """How the network was trained, as its model file says: data, recipe, seed."""

    @classmethod
    def of(cls, loaders: Mapping[str, DigestedLoader], settings: dict[str, Any]) -> Provenance:
        """Describes what was measured just now.

        Args:
            loaders: by their roles, `test`, `train` and `outside`, after their passes.
            settings: arguments by name, JSON-ready.
        """
        images = {role: loader.images for role, loader in loaders.items()}
        test = images["test"]
        assert test is not None
        return cls(
            test,
            images.get("train"),
            images.get("outside"),
            settings,
            versions(),
            datetime.datetime.now(datetime.UTC).date().isoformat(),
        )

    def named(
        self,
        data: str,
        *,
        test: str = "test",
        thresholds: str = "train",
        outside: str | None = None,
        training: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Provenance:
        """Returns the same with names, which a loader does not tell.

        Args:
            data: name of the data set or its folder.
            test: the part of it that was tested on.
            thresholds: the part of it that thresholds are from.
            outside: name of the images of none of the classes.
            training: how the network was trained, JSON-ready.
            settings: further ones, such as how the thresholds' images were chosen before.
        """
        return replace(
            self,
            test=replace(self.test, name=data, split=test),
            thresholds=self.thresholds and replace(self.thresholds, name=data, split=thresholds),
            outside=self.outside and replace(self.outside, name=outside),
            training=dict(training or self.training),
            settings={**self.settings, **(settings or {})},
        )

    def __str__(self) -> str:
        parts = [str(self.test)]
        if self.thresholds is not None:
            parts.append(f"thresholds on {self.thresholds}")
        if self.outside is not None:
            parts.append(f"outside {self.outside}")
        return "; ".join(parts)
