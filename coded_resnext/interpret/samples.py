"""Single test images on their way through a network: what every block does, says and decides.

Letters: n chosen images, N branches of a block, K classes, L coded blocks.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Preprocessing
from ..early_exit import read_class
from ..exit_calibration import ExitScores, exit_scores
from ..models import CodedResNeXt
from .running import Loader, batches, evaluating, require_coded_blocks

FORMAT_VERSION = 1
SAMPLES_FILE = "samples.json"
# Images of a data set with few classes; one of each class where there are more, up to the most.
CHOSEN, MOST_CHOSEN = 240, 1000
# Of these, the share kept for images that the network or one of its decoders misreads.
MISREAD_SHARE = 4
# Classes that are listed for every block: the nearest codewords.
NEAREST = 3
# Larger images are made smaller, in pixels; up to the other size they are kept without loss.
LARGEST, LOSSLESS = 96, 48


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """One coded block and the chosen images."""

    energies: Tensor
    """`r Ebar`, (4): on the scale of a codeword, with rows that sum to A; `[n, N]`, float32."""
    decoded: Tensor
    """The class whose codeword is nearest, (9); `[n]`."""
    margins: Tensor
    """Of that reading, as early exit measures it; `[n]`, float32."""
    nearest: Tensor
    """The classes of the nearest codewords, nearest first; `[n, 3]`, or K columns if fewer."""
    shares: Tensor
    """Share of the energy in the branches of these classes, 0 to 1; as `nearest`, float32."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "energies": _short(self.energies),
            "decoded": self.decoded.tolist(),
            "margins": _short(self.margins),
            "nearest": self.nearest.tolist(),
            "shares": _short(self.shares),
        }


@dataclass(frozen=True, eq=False)
class Samples:
    """Chosen test images, ordered by true class and position."""

    test_samples: int
    """Images that there were to choose from."""
    seed: int
    positions: Tensor
    """Place of every chosen image in the loader, counted from 0; `[n]`."""
    targets: Tensor
    """True classes; `[n]`."""
    predictions: Tensor
    """Classes of the classifier; `[n]`."""
    probabilities: Tensor
    """Softmax of the predicted class; `[n]`, float32."""
    settled: Tensor
    """The coded block, counted from 0, from which on every decoder says what the classifier says;
    L where the last decoder says something else. `[n]`."""
    blocks: tuple[SampleBlock, ...]
    """The coded blocks, in order."""
    images: tuple[str, ...] | None
    """Every image as a `data:` address, PNG or JPEG; None without a preprocessing to undo."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "format_version": FORMAT_VERSION,
            "test_samples": self.test_samples,
            "seed": self.seed,
            "positions": self.positions.tolist(),
            "targets": self.targets.tolist(),
            "predictions": self.predictions.tolist(),
            "probabilities": _short(self.probabilities),
            "settled": self.settled.tolist(),
            "blocks": [block.to_dict() for block in self.blocks],
            "images": None if self.images is None else list(self.images),
        }


def trace_samples(
    model: CodedResNeXt,
    loader: Loader,
    preprocessing: Preprocessing | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> Samples:
    """Follow some of the test images: the misread ones first, then as many of every class.

    A quarter of the places is for images that the classifier misreads and, after them, those that
    an early decoder reads otherwise than the classifier. What is left goes around the classes.

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`, in the same order always.
        preprocessing: what made the images; undone, so that they can be looked at.
        limit: images to choose at most, at least 1; by default 240, or one of every class where
            there are more, up to 1000.
        seed: of the choice, at least 0.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, targets are not class
            indices of the model, or a number is outside its range.
        ImportError: Pillow is not installed, which writes the images.
    """
    require_coded_blocks(model)
    if limit is None:
        limit = min(max(CHOSEN, model.num_classes), MOST_CHOSEN)
    for name, value, low in (("limit", limit, 1), ("seed", seed, 0)):
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")
    with evaluating(model):
        scores = exit_scores(model, batches(model, loader, "choosing images"))
        chosen = choose(scores, limit, seed)
        parts = [
            _trace(model, images, preprocessing)
            for images in _chosen_images(model, loader, chosen)
        ]
    settled = _settled(scores.decoded[chosen], scores.final[chosen])
    joined = [
        [torch.cat(values) for values in zip(*block, strict=True)]
        for block in zip(*(blocks for blocks, _, _ in parts), strict=True)
    ]
    return Samples(
        test_samples=len(scores.targets),
        seed=seed,
        positions=chosen,
        targets=scores.targets[chosen],
        predictions=scores.final[chosen],
        probabilities=torch.cat([probabilities for _, probabilities, _ in parts]),
        settled=settled,
        blocks=tuple(
            SampleBlock(
                energies, scores.decoded[chosen, index], scores.margins[chosen, index], near, shares
            )
            for index, (energies, near, shares) in enumerate(joined)
        ),
        images=None
        if preprocessing is None
        else tuple(image for _, _, images in parts for image in images),
    )


def choose(scores: ExitScores, limit: int, seed: int) -> Tensor:
    """Positions of the images to show, by true class and position; `[n]` with `n <= limit`."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(scores.targets)))
    wrong = scores.final != scores.targets
    wavering = (scores.decoded != scores.final[:, None]).any(1)
    misread = [*order[wrong[order]].tolist(), *order[(wavering & ~wrong)[order]].tolist()]
    picked = dict.fromkeys(misread[: max(limit // MISREAD_SHARE, 1)])
    waiting: dict[int, list[int]] = {}
    for position in order.tolist():
        if position not in picked:
            waiting.setdefault(int(scores.targets[position]), []).append(position)
    # One of every class in turn; round r has the r-th of each.
    rounds = sorted(
        (turn, target, position)
        for target, positions in waiting.items()
        for turn, position in enumerate(positions)
    )
    picked |= dict.fromkeys(position for _, _, position in rounds[: limit - len(picked)])
    by_class = sorted(picked, key=lambda position: (int(scores.targets[position]), position))
    return torch.tensor(by_class)


def _settled(decoded: Tensor, final: Tensor) -> Tensor:
    """The block from which on all of `[n, L]` agree with `[n]`."""
    agree = (decoded == final[:, None]).flip(1).long()
    return decoded.shape[1] - agree.cumprod(1).sum(1)


def _chosen_images(model: CodedResNeXt, loader: Loader, chosen: Tensor) -> Iterator[Tensor]:
    """The images at some positions of a loader, in the order of `chosen`, a few at a time."""
    found: dict[int, Tensor] = {}
    wanted = set(chosen.tolist())
    start = 0
    for images, _ in batches(model, loader, "tracing images"):
        for position in wanted.intersection(range(start, start + len(images))):
            found[position] = images[position - start].clone()
        start += len(images)
    for group in chosen.split(32):
        yield torch.stack([found[position] for position in group.tolist()])


def _trace(
    model: CodedResNeXt, images: Tensor, preprocessing: Preprocessing | None
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor, list[str]]:
    """For every block energies, nearest classes and shares; probabilities; pictures."""
    logits, all_energies = model(images, return_energies=True)
    blocks = []
    for block, energies in zip(model.coded_blocks, all_energies, strict=True):
        assert block.codebook is not None
        scores = energies @ block.codewords.to(energies.dtype).T
        # As in decoding: of equal scores the lowest class.
        order = torch.sort(scores, dim=1, descending=True, stable=True)
        near = order.indices[:, :NEAREST]
        shares = order.values[:, :NEAREST] / block.branches
        scaled = block.codebook.ratio * energies
        blocks.append((scaled.float().cpu(), near.cpu(), shares.float().cpu()))
    probabilities = logits.softmax(1).amax(1).float().cpu()
    pictures = [] if preprocessing is None else pictures_of(images, preprocessing)
    return blocks, probabilities, pictures


def pictures_of(images: Tensor, preprocessing: Preprocessing) -> list[str]:
    """Network inputs `[B, C, H, W]` as `data:` addresses of pictures, the preprocessing undone.

    Raises:
        ValueError: the channels are not those of the preprocessing.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow; install coded-resnext[report]") from error
    if images.shape[1] != preprocessing.channels:
        raise ValueError(
            f"images: expected {preprocessing.channels} channels as the preprocessing has, "
            f"got {images.shape[1]}"
        )
    images = images.float().cpu()
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    addresses = []
    for picture in pixels.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
        image.thumbnail((LARGEST, LARGEST))
        kind, options = ("png", {"optimize": True})
        if max(image.size) > LOSSLESS:
            kind, options = "jpeg", {"quality": 80, "optimize": True}
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        text = base64.b64encode(buffer.getvalue()).decode("ascii")
        addresses.append(f"data:image/{kind};base64,{text}")
    return addresses


def _short(values: Tensor) -> Any:
    """Nested lists of the decimal numbers with fewest digits that are these float32 numbers."""
    array = values.float().numpy()
    flat: Sequence[float] = [float(str(value)) for value in array.ravel()]
    if array.ndim == 1:
        return list(flat)
    width = array.shape[1]
    return [list(flat[start : start + width]) for start in range(0, array.size, width)]
