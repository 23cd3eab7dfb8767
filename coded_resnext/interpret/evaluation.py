"""The results of `evaluate`, what they were measured on, and their description in JSON.

Two results are of the same images when the digests of these are the same, whatever the folders are
called.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sized
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

from coded_resnext.files import brief
from coded_resnext.training.run_folder import versions

from .decoding import Classification, EarlyDecoding, ExitCurve, Samples
from .observe import Loader, numbered
from .one_class import OneClass
from .paths import Paths, Semantics
from .removal import Removal

FORMAT_VERSION = 3
# Fields of version 2 that said how much a limit of time had left out.
_FORMER_FIELDS = ("available_samples", "budget_seconds")
Record = TypeVar("Record")
# Energies are means of float32 numbers, and a file for 1,000 classes holds 300,000 of them.
DECIMALS = 5
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


@dataclass(frozen=True)
class BlockDescription:
    """A coded block, so that a reader of the results needs no network."""

    codebook: int
    """Index of its codebook among those of the evaluation, from 0."""
    block: int
    """Index of the block among all blocks, from 0."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of `evaluate`; a plain network has its classification alone, None for the rest.

    Wherever something is None that would apply, `not_computed` has the reason.
    """

    class_names: tuple[str, ...]
    test_samples: int
    """Images that were classified: all test images."""
    samples_per_class: tuple[int, ...]
    """The number of test images of every class."""
    classification: Classification
    """How the whole network classifies them."""
    codebooks: tuple[dict[str, Any], ...]
    """The different codebooks, as `Codebook.to_dict` describes them."""
    blocks: tuple[BlockDescription, ...]
    """The coded blocks, in order."""
    cost: dict[str, int]
    """Cost of the network for one image, as `coded_resnext.deploy.cost.Cost` describes it."""
    early_decoding: EarlyDecoding | None = None
    paths: Paths | None = None
    semantics: Semantics | None = None
    early_exit: ExitCurve | None = None
    samples: Samples | None = None
    removal: Removal | None = None
    one_class: OneClass | None = None
    thresholds_from: Literal["training data", "test data"] = "training data"
    """The data on which the thresholds of the one-class classifiers were chosen."""
    one_class_samples: int = 0
    """The number of test images on which the one-class classifiers were tested."""
    threshold_samples: int = 0
    """The number of images on which they were chosen."""
    outside_samples: int = 0
    """The number of images of none of the classes."""
    not_computed: dict[str, str] = field(default_factory=dict)
    """The reason, by experiment, why it or a part of it is missing."""
    weights_sha256: str | None = None
    """SHA-256 of the weights that were measured, see `checkpoint.weights_sha256`."""
    provenance: Provenance | None = None
    """What was measured on, with which settings; None in files of earlier versions."""

    @property
    def test_accuracy(self) -> float:
        """Returns the share of the test images that are classified correctly, 0 to 1."""
        return self.classification.accuracy

    @property
    def images(self) -> Images | None:
        """Returns the test images; None in files that do not know them."""
        return self.provenance.test if self.provenance is not None else None

    @property
    def is_coded(self) -> bool:
        """Returns whether the network has coded blocks, and so more than a classification."""
        return bool(self.blocks)

    def summary(self) -> dict[str, Any]:
        """Returns the headline numbers; the lists of a plain network are empty.

        `test_accuracy`, and `test_balanced_accuracy`, the mean over the classes; by coded block
        `early_decoding` (accuracy), `remove_active_accuracy` and `remove_inactive_accuracy` (all
        branches of the kind removed); by class `single_class_average_precision`;
        `removal_accuracy`, that of the same images with nothing removed, from which the removals
        are to be subtracted. Shares, 0 to 1; None where one is not available. And `weights_sha256`
        of the weights that were measured, `measured_on` the images.
        """
        blocks = self.removal.blocks if self.removal else ()
        return {
            "test_accuracy": self.test_accuracy,
            "test_balanced_accuracy": self.classification.balanced_accuracy,
            "early_decoding": list(
                self.early_decoding.block_accuracy if self.early_decoding else ()
            ),
            "single_class_average_precision": list(
                self.one_class.average_precisions if self.one_class else ()
            ),
            "removal_accuracy": self.removal.accuracy if self.removal else None,
            "remove_active_accuracy": [block.active.accuracy[-1] for block in blocks],
            "remove_inactive_accuracy": [block.inactive.accuracy[-1] for block in blocks],
            "weights_sha256": self.weights_sha256,
            "measured_on": to_plain(self.images),
        }

    def named(self, data: str, **names: Any) -> Evaluation:
        """Returns the same results with names of what they were measured on, as `Provenance`'s."""
        if self.provenance is None:
            return self
        return replace(self, provenance=self.provenance.named(data, **names))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready description of everything; `from_dict` reads it back."""
        return {"format_version": FORMAT_VERSION, **to_plain(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Evaluation:
        """Reads what `to_dict` wrote, now or in version 2.

        Raises:
            ValueError: it is damaged, its parts do not fit each other, it is of another format
                version, or of version 2 and a limit of time kept it from being complete.
        """
        if not isinstance(data, dict) or "format_version" not in data:
            raise ValueError("evaluation: expected an object with a format_version")
        content = dict(data)
        version = content.pop("format_version")
        if version == 2:
            content = {k: v for k, v in content.items() if k not in _FORMER_FIELDS}
        elif version != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}, got {version!r}")
        evaluation = from_plain(cls, content, "evaluation")
        for name, expected, values in evaluation._lengths():
            if len(values) != expected:
                raise ValueError(f"{name}: expected {expected} entries, got {len(values)}")
        return evaluation

    def _lengths(self) -> Iterator[tuple[str, int, Sized]]:
        """Yields what has an entry for each class, block or image: name, number, entries."""
        classes, blocks = len(self.class_names), len(self.blocks)
        yield "samples_per_class", classes, self.samples_per_class
        yield "classification.class_accuracy", classes, self.classification.class_accuracy
        for name in ("early_decoding", "semantics", "removal", "samples"):
            if (part := getattr(self, name)) is not None:
                yield f"{name}.blocks", blocks, part.blocks
        for block in self.early_decoding.blocks if self.early_decoding else ():
            yield "early_decoding.blocks.class_accuracy", classes, block.class_accuracy
            yield "early_decoding.blocks.class_agreement", classes, block.class_agreement
        if self.paths is not None:
            yield "paths.samples_per_class", classes, self.paths.samples_per_class
            for name in ("energies", "outside", "disobeying"):
                yield f"paths.{name}", blocks, getattr(self.paths, name)
            for energies in self.paths.energies:
                yield "paths.energies", classes, energies
            for image in self.paths.disobedient:
                yield "paths.disobedient.decoded", blocks, image.decoded
                yield "paths.disobedient.outside", blocks, image.outside
        for removed in self.removal.blocks if self.removal else ():
            for curve in (removed.active, removed.inactive):
                for name, values in vars(curve).items():
                    yield f"removal.blocks.{name}", max(len(curve.removed), 1), values
        if self.one_class is not None:
            yield "one_class.classifiers", classes, self.one_class.classifiers
        if self.samples is not None:
            images = len(self.samples.positions)
            for name in ("targets", "predictions", "probabilities", "settled"):
                yield f"samples.{name}", images, getattr(self.samples, name)
            for sample in self.samples.blocks:
                for name, values in vars(sample).items():
                    yield f"samples.blocks.{name}", images, values

    def __str__(self) -> str:
        balanced = f"{100 * self.classification.balanced_accuracy:.2f} %"
        return (
            f"Test accuracy {100 * self.test_accuracy:.2f} % on {self.test_samples} images; mean "
            f"over the classes {balanced}."
        )


def to_plain(value: Any) -> Any:
    """Returns a JSON-ready description of a result; `from_plain` reads it back.

    A matrix `[rows, columns]` becomes a list of rows, rounded to five decimals; a row of NaN,
    "there is none", becomes None.
    """
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Tensor):
        return [
            None if math.isnan(row[0]) else [round(number, DECIMALS) for number in row]
            for row in value.tolist()
        ]
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(kind: type[Record], data: Any, name: str = "result") -> Record:
    """Returns the dataclass that `to_plain` described.

    Args:
        kind: the type of the dataclass.
        data: what was read from JSON.
        name: the name of the value in an error.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message names it.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{name}: expected an object, got {brief(data)}")
    hints = typing.get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(data.keys() - known.keys())
    if unknown:
        raise ValueError(f"{name}: expected no field {unknown[0]!r}")
    arguments = {}
    for key, described in known.items():
        if key in data:
            arguments[key] = _read(hints[key], data[key], f"{name}.{key}")
        elif described.default is MISSING:
            raise ValueError(f"{name}.{key}: expected a value, got none")
    return kind(**arguments)


def _read(kind: Any, data: Any, name: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in parts:
            return None
        [kind] = [part for part in parts if part is not type(None)]
        return _read(kind, data, name)
    if origin is Literal:
        return _checked(data in parts, data, name, f"one of {', '.join(map(repr, parts))}")
    if is_dataclass(kind):
        return from_plain(kind, data, name)  # type: ignore[arg-type]
    if origin is tuple:
        _checked(isinstance(data, list), data, name, "a list")
        if parts[-1] is not Ellipsis:
            _checked(len(data) == len(parts), data, name, f"{len(parts)} values")
            return tuple(
                _read(part, item, f"{name}[{i}]")
                for i, (part, item) in enumerate(zip(parts, data, strict=True))
            )
        return tuple(_read(parts[0], item, f"{name}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _checked(isinstance(data, dict), data, name, "an object")
        return {key: _read(parts[1], item, f"{name}.{key}") for key, item in data.items()}
    if kind is Tensor:
        return _matrix(data, name)
    if kind is Any:
        return data
    if kind is float:
        good = isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data)
        return float(_checked(good, data, name, "a number"))
    good = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    return _checked(good, data, name, kind.__name__)


def _matrix(data: Any, name: str) -> Tensor:
    rows = [row for row in data if row is not None] if isinstance(data, list) else []
    width = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    good = all(
        isinstance(row, list) and len(row) == width and all(isinstance(n, int | float) for n in row)
        for row in rows
    )
    _checked(good and width > 0, data, name, "rows of equally many numbers")
    missing = [math.nan] * width
    return torch.tensor([missing if row is None else row for row in data], dtype=torch.float64)


def _checked(good: bool, data: Any, name: str, expected: str) -> Any:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {brief(data)}")
    return data
