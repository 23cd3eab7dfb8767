"""Early exit: images whose class a coded block already shows leave the network there.

Early decoding, (9) of docs/math.md, reads a class off the branch energies of each coded block. Here
the pass stops for an image as soon as that reading is sure enough; the others go on in a smaller
batch. The paper decodes early and still computes everything.

Letters: B samples, K classes, N branches, L coded blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic_file import write_atomically
from .cost import stem_macs, stem_size
from .layers import check_images
from .models import CodedResNeXt
from .sizes import BlockSizes, halved
from .text_files import read_json

FORMAT_VERSION = 1
EXIT_FILE = "early_exit.json"


@dataclass(frozen=True)
class EarlyExit:
    """When an image leaves: its margin reaches that of the block; two decoders agree if they must.

    The margin is the share of a sample's energy in the branches of the nearest codeword, less the
    share in those of the second: `(s_1 - s_2) / N` for the scores `s = Ebar codewords^T`; 0 to 1.
    """

    margins: tuple[float | None, ...]
    """For every coded block the margin that suffices; None where no image leaves."""
    agreement: bool = False
    """Whether the decoder of the coded block before must name the same class."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """How the margins were chosen, JSON-ready."""

    def __post_init__(self) -> None:
        for margin in self.margins:
            if margin is not None and not (math.isfinite(margin) and margin >= 0):
                raise ValueError(f"margins: expected numbers of at least 0, or None, got {margin}")

    @classmethod
    def at_margin(cls, model: CodedResNeXt, margin: float, *, agreement: bool = False) -> EarlyExit:
        """One margin for all coded blocks of a network."""
        return cls((margin,) * len(model.coded_blocks), agreement)

    def leaves(
        self, block: int, decoded: Tensor, margin: Tensor, previous: Tensor | None
    ) -> Tensor:
        """Which samples leave behind a coded block, booleans `[B]`.

        Args:
            block: which coded block, counted from 0.
            decoded: classes read off its energies, `[B]`.
            margin: of these readings, `[B]`.
            previous: what the coded block before said, `[B]`; None at the first.
        """
        wanted = self.margins[block]
        if wanted is None or (self.agreement and previous is None):
            return torch.zeros_like(decoded, dtype=torch.bool)
        sure = margin >= wanted
        return sure & (decoded == previous) if self.agreement else sure

    def predict(self, model: CodedResNeXt, x: Tensor) -> EarlyPrediction:
        """As `predict_early`."""
        return predict_early(model, x, self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return {
            "format_version": FORMAT_VERSION,
            "margins": list(self.margins),
            "agreement": self.agreement,
            "calibration": self.calibration,
        }

    @classmethod
    def from_dict(cls, data: Any) -> EarlyExit:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: it describes no criterion, or is of another format version.
        """
        if not isinstance(data, dict) or not isinstance(data.get("margins"), list):
            raise ValueError('early exit: expected an object with a list "margins"')
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format_version: expected {FORMAT_VERSION}, got {data.get('format_version')!r}"
            )
        for margin in data["margins"]:
            if isinstance(margin, bool) or not isinstance(margin, float | int | None):
                raise ValueError(f"margins: expected numbers or null, got {margin!r}")
        return cls(
            tuple(data["margins"]), bool(data.get("agreement")), dict(data.get("calibration") or {})
        )

    def save(self, path: str | Path) -> None:
        """Write the criterion as JSON."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        write_atomically(path, text.encode())

    @classmethod
    def load(cls, path: str | Path) -> EarlyExit:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged, or of another format version.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: not an early-exit file: {error}") from error


@dataclass(frozen=True)
class EarlyPrediction:
    """What `predict_early` returns, on the device of the model."""

    classes: Tensor
    """`[B]`, class indices."""
    exit_blocks: Tensor
    """`[B]`, the coded block that decided, counted from 0; L for the classifier at the end."""
    macs: Tensor
    """`[B]`, multiply-accumulates spent on each sample."""
    energies: tuple[Tensor, ...]
    """For every coded block, `[B, N]`: normalised energies, NaN behind a sample's exit; empty
    unless asked for."""


def read_class(energies: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Early decoding, (9), and its margin.

    Args:
        energies: normalised, `[B, N]`.
        codewords: `[K, N]`.

    Returns:
        Class indices `[B]`, the lowest on ties, and margins `[B]` from 0 to 1 (see `EarlyExit`).
    """
    if torch.is_autocast_enabled(energies.device.type):
        # It would round the energies to half precision and make ties.
        with torch.autocast(energies.device.type, enabled=False):
            return read_class(energies, codewords)
    scores = energies @ codewords.to(energies.dtype).T
    best = scores.topk(2).values
    return scores.argmax(1), (best[:, 0] - best[:, 1]) / energies.shape[1]


@torch.inference_mode()
def predict_early(
    model: CodedResNeXt, x: Tensor, criterion: EarlyExit, *, return_energies: bool = False
) -> EarlyPrediction:
    """Classify images, each no further than needed.

    Behind each coded block the samples that pass the criterion take the class of its early decoder
    and leave; the batch shrinks to the others. When none is left the pass ends. Samples that never
    pass get the class of the classifier.

    Args:
        model: with at least one coded block, in evaluation mode.
        x: `[B, in_channels, H, W]`, `B >= 1`.
        criterion: when a sample leaves.
        return_energies: also return the energies of the blocks that were computed.

    Raises:
        ValueError: the network is plain, does not normalise its energies or is in training mode,
            the criterion is for another number of coded blocks, or `x` has the wrong shape.
    """
    check(model, criterion, x)
    batch = len(x)
    classes = torch.empty(batch, dtype=torch.int64, device=x.device)
    exits = torch.full_like(classes, len(model.coded_blocks))
    macs = torch.empty_like(classes)
    kept_energies: list[Tensor] = []
    remaining = torch.arange(batch, device=x.device)
    previous: Tensor | None = None
    spent = exit_macs(model, x.shape[2], x.shape[3])
    index = 0
    x = model.stem(x)
    for block in model.blocks:
        x, energies = block(x)
        if energies is None:
            continue
        if return_energies:
            kept = energies.new_full((batch, energies.shape[1]), math.nan)
            kept[remaining] = energies
            kept_energies.append(kept)
        decoded, margin = read_class(energies, block.codewords)
        leaving = criterion.leaves(index, decoded, margin, previous)
        if bool(leaving.any()):
            gone = remaining[leaving]
            classes[gone], exits[gone], macs[gone] = decoded[leaving], index, spent[index]
            staying = ~leaving
            remaining = remaining[staying]
            if not len(remaining):
                break
            x, decoded = x[staying], decoded[staying]
        previous = decoded
        index += 1
    else:
        classes[remaining] = model.head(x.mean((2, 3))).argmax(1)
        macs[remaining] = spent[-1]
    if return_energies:
        for rest in model.coded_blocks[len(kept_energies) :]:
            kept_energies.append(kept_energies[0].new_full((batch, rest.branches), math.nan))
    return EarlyPrediction(classes, exits, macs, tuple(kept_energies))


def exit_macs(model: CodedResNeXt, height: int, width: int) -> list[int]:
    """Multiply-accumulates spent on an image that leaves behind each coded block.

    Decoding is included. The last of the L + 1 numbers is for an image that never leaves.

    Args:
        model: with or without coded blocks.
        height, width: of the image in pixels.
    """
    spent = stem_macs(model, height, width)
    height, width = stem_size(model, height), stem_size(model, width)
    counts = []
    for block in model.blocks:
        sizes = BlockSizes.of(block)
        spent += sizes.macs(height, width) + sizes.projection_macs(height, width)
        height, width = halved(height, sizes.stride), halved(width, sizes.stride)
        if block.is_coded:
            spent += block.codewords.numel()
            counts.append(spent)
    return [*counts, spent + model.head.weight.numel()]


def check(model: CodedResNeXt, criterion: EarlyExit | None = None, x: Tensor | None = None) -> None:
    """Refuse what early exit is not defined for, as `predict_early` says."""
    blocks = len(model.coded_blocks)
    if not blocks:
        raise ValueError(
            "model: expected at least one coded block, got a plain network, which has no codebook"
        )
    if not all(block.normalize for block in model.coded_blocks):
        raise ValueError(
            "model: expected normalised energies, which margins are measured in, got a network "
            "made with normalize=False"
        )
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval()")
    if criterion is not None and len(criterion.margins) != blocks:
        raise ValueError(
            f"criterion: expected a margin for each of {blocks} coded blocks, "
            f"got {len(criterion.margins)}"
        )
    if x is not None:
        check_images(x, model.in_channels)
