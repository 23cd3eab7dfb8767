"""Early exit: images whose class a coded block already shows leave the network there.

Early decoding, (9) of docs/math.md, reads a class off the branch energies of each coded block. Here
the pass stops for an image as soon as that reading is sure enough; the others go on in a smaller
batch. The paper decodes early and still computes everything.

Letters: B samples, K classes, N branches, L coded blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coded_resnext.files import UNFIT, read_json, write_atomically
from coded_resnext.kernels.checks import check_annotated, checked_number, typed
from coded_resnext.models.block import Step, check_images
from coded_resnext.models.layers import check_layers
from coded_resnext.models.loss import check_results, not_finite, read_class
from coded_resnext.models.resnext import CodedResNeXt, own_network

from .cost import counted_blocks, head_macs, stem_macs

FORMAT_VERSION = 1
EXIT_FILE = "early_exit.json"


@dataclass(frozen=True)
class EarlyExit:
    """Says when an image leaves: at a block whose margin it reaches, if its decoders agree.

    The margin is the share of a sample's energy in the branches of the nearest codeword, less the
    share in those of the second: `(s_1 - s_2) / N` for the scores `s = Ebar codewords^T`; 0 to 1.
    """

    margins: tuple[float | None, ...]
    """The margin that suffices, for every coded block; None where no image leaves."""
    agreement: bool = False
    """Says whether the decoder of the coded block before must name the same class."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """How the margins were chosen, JSON-ready."""
    weights_sha256: str | None = field(default=None, compare=False)
    """SHA-256 of the weights that they are for, see `checkpoint.weights_sha256`."""

    def __post_init__(self) -> None:
        check_annotated(type(self), vars(self))
        margins = [None if m is None else checked_number("margins", m, 0) for m in self.margins]
        object.__setattr__(self, "margins", tuple(margins))

    @classmethod
    @typed
    def at_margin(cls, model: nn.Module, margin: float, *, agreement: bool = False) -> EarlyExit:
        """Makes a criterion with one margin for all coded blocks of a network."""
        return cls((margin,) * len(own_network(model).coded_blocks), agreement)

    def leaves(
        self, block: int, decoded: Tensor, margin: Tensor, previous: Tensor | None
    ) -> Tensor:
        """Returns which samples leave behind a coded block, booleans `[B]`.

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

    def to_dict(self) -> dict[str, Any]:
        """Returns the criterion as JSON-ready data, which `from_dict` reads back."""
        return {
            "format_version": FORMAT_VERSION,
            "margins": list(self.margins),
            "agreement": self.agreement,
            "calibration": self.calibration,
            "weights_sha256": self.weights_sha256,
        }

    @classmethod
    def from_dict(cls, data: Any) -> EarlyExit:
        """Reads what `to_dict` returned.

        Raises:
            ValueError: it describes no criterion, or is of another format version.
        """
        if not isinstance(data, dict) or not isinstance(data.get("margins"), list):
            raise ValueError('early exit: expected an object with a list "margins"')
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format_version: expected {FORMAT_VERSION}, got {data.get('format_version')!r}"
            )
        calibration = data.get("calibration") or {}
        if not isinstance(calibration, dict):
            raise ValueError(f"calibration: expected an object, got {calibration!r:.80}")
        weights = data.get("weights_sha256")
        if not isinstance(weights, str | None):
            raise ValueError(f"weights_sha256: expected text, got {weights!r:.80}")
        return cls(tuple(data["margins"]), bool(data.get("agreement")), calibration, weights)

    @typed
    def save(self, path: str | Path) -> None:
        """Writes the criterion as JSON."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        write_atomically(path, text.encode())

    @classmethod
    @typed
    def load(cls, path: str | Path) -> EarlyExit:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is damaged, or of another format version.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_dict(read_json(path))
        except UNFIT as error:
            raise ValueError(f"{path}: not an early-exit file: {error}") from error


@dataclass(frozen=True)
class EarlyPrediction:
    """The outcome of `predict_early`, on the device of the model."""

    classes: Tensor
    """The class indices `[B]`."""
    exit_blocks: Tensor
    """The coded block that decided, `[B]`, from 0; L stands for the classifier at the end."""
    macs: Tensor
    """The multiply-accumulates spent on each sample, `[B]`."""
    energies: tuple[Tensor, ...]
    """Normalised energies `[B, N]` of every coded block, NaN behind a sample's exit; empty unless
    they were asked for."""


@typed
@torch.no_grad()
def predict_early(
    model: nn.Module, x: Tensor, criterion: EarlyExit, *, return_energies: bool = False
) -> EarlyPrediction:
    """Classifies images, each no further than needed.

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
            the criterion is for another number of coded blocks, `x` has the wrong shape, or what
            was computed is not finite.
    """
    model = own_network(model)
    check_early_exit(model, criterion, x)
    bad = torch.zeros(len(model.coded_blocks) + 1, dtype=torch.bool, device=x.device)
    batch = len(x)
    classes = torch.empty(batch, dtype=torch.int64, device=x.device)
    exits = torch.full_like(classes, len(model.coded_blocks))
    macs = torch.empty_like(classes)
    kept_energies: list[Tensor] = []
    remaining = torch.arange(batch, device=x.device)
    previous: Tensor | None = None
    spent = exit_macs(model, x.shape[2], x.shape[3])
    index = 0
    step: Step | None = None
    for step in model.walk(x):
        energies = step.energies
        if energies is None:
            continue
        if return_energies:
            kept = energies.new_full((batch, energies.shape[1]), math.nan)
            kept[remaining] = energies
            kept_energies.append(kept)
        bad[index] = ~energies.isfinite().all()
        decoded, margin = read_class(energies, step.block.codewords)
        leaving = criterion.leaves(index, decoded, margin, previous)
        if bool(leaving.any()):
            gone = remaining[leaving]
            classes[gone], exits[gone], macs[gone] = decoded[leaving], index, spent[index]
            staying = ~leaving
            remaining = remaining[staying]
            if not len(remaining):
                break
            step.map, decoded = step.map[staying], decoded[staying]
        previous = decoded
        index += 1
    else:
        assert step is not None
        logits = model.forward_head(step.map)
        bad[-1] = ~logits.isfinite().all()
        classes[remaining] = logits.argmax(1)
        macs[remaining] = spent[-1]
    check_results(model, bad)
    if return_energies:
        for rest in model.coded_blocks[len(kept_energies) :]:
            kept_energies.append(kept_energies[0].new_full((batch, rest.branches), math.nan))
    return EarlyPrediction(classes, exits, macs, tuple(kept_energies))


def exit_macs(model: CodedResNeXt, height: int, width: int) -> list[int]:
    """Counts the multiply-accumulates spent on an image that leaves behind each coded block.

    Decoding is included. The last of the L + 1 numbers is for an image that never leaves.

    Args:
        model: with or without coded blocks.
        height, width: of the image in pixels.

    Raises:
        ValueError: layers were changed or replaced since the network was made.
    """
    check_layers(model, "counting goes by the sizes of its own layers", sizes_only=True)
    spent = stem_macs(model, height, width)
    counts = []
    for block, _, of_block, _ in counted_blocks(model, height, width):
        spent += of_block
        if block.is_coded:
            spent += block.codewords.numel()
            counts.append(spent)
    return [*counts, spent + head_macs(model)]


def check_early_exit(
    model: CodedResNeXt, criterion: EarlyExit | None = None, x: Tensor | None = None
) -> None:
    """Refuses what early exit is not defined for, as `predict_early` says."""
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
    if isinstance(model.head, nn.Identity):
        raise ValueError("head: expected the classifier, for images that never leave; got none")
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval()")
    if criterion is not None and len(criterion.margins) != blocks:
        raise ValueError(
            f"criterion: expected a margin for each of {blocks} coded blocks, "
            f"got {len(criterion.margins)}"
        )
    if x is not None:
        check_images(x, model.in_channels)


@dataclass(frozen=True)
class ExitScores:
    """The readings of every decoder for labelled samples: all that a calibration needs."""

    decoded: Tensor
    """The class that each coded block shows, `[n, L]`."""
    margins: Tensor
    """The margins of these readings, `[n, L]`."""
    final: Tensor
    """The class of the classifier, `[n]`."""
    targets: Tensor
    """The true class, `[n]`."""

    @classmethod
    @typed
    def joined(cls, parts: Sequence[ExitScores]) -> ExitScores:
        """Joins the samples of several, such as the held-out parts of a cross-validation."""
        return cls(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("decoded", "margins", "final", "targets")
            )
        )

    @typed
    def exits(self, criterion: EarlyExit) -> Tensor:
        """Returns where every sample leaves, `[n]`: a coded block counted from 0, or L."""
        blocks = self.decoded.shape[1]
        exits = torch.full_like(self.final, blocks)
        for block in reversed(range(blocks)):
            previous = self.decoded[:, block - 1] if block else None
            leaving = criterion.leaves(
                block, self.decoded[:, block], self.margins[:, block], previous
            )
            exits[leaving] = block
        return exits

    @typed
    def accuracy(self, criterion: EarlyExit | None = None) -> float:
        """Returns the share of correct predictions, with early exit or of the classifier alone."""
        said = self.final
        if criterion is not None:
            every = torch.cat([self.decoded, self.final[:, None]], 1)
            said = every.gather(1, self.exits(criterion)[:, None])[:, 0]
        return float((said == self.targets).double().mean())


@typed
@torch.no_grad()
def exit_scores(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> ExitScores:
    """Decodes labelled images behind every coded block.

    Args:
        model: with at least one coded block, in evaluation mode.
        loader: batches of images `[B, C, H, W]` and class indices `[B]` that the network was not
            trained on: on its training images every margin looks better than it is.

    Raises:
        ValueError: the network is plain or in training mode, the loader has no batch, or results
            are not finite.
    """
    model = own_network(model)
    check_early_exit(model)
    parameter = next(model.parameters())
    parts = []
    for images, targets in loader:
        logits, energies = model(images.to(parameter), return_energies=True)
        check_results(model, not_finite(logits, energies))
        read = [
            read_class(value, block.codewords)
            for value, block in zip(energies, model.coded_blocks, strict=True)
        ]
        decoded = torch.stack([classes for classes, _ in read], 1).cpu()
        margins = torch.stack([margin for _, margin in read], 1).cpu()
        parts.append(ExitScores(decoded, margins, logits.argmax(1).cpu(), targets.cpu().long()))
    if not parts:
        raise ValueError("loader: expected at least one batch, got none")
    return ExitScores.joined(parts)


@typed
def calibrate(
    scores: ExitScores, max_accuracy_loss: float = 0.001, *, agreement: bool = False
) -> EarlyExit:
    """Chooses margins so that early exit costs at most so much accuracy on held-out samples.

    A sample is lost when the classifier is right about it and the decoder with which it leaves is
    not; samples that early exit gains do not make up for lost ones. From the first coded block on,
    each gets the lowest margin with which the losses so far stay within the limit. At the last
    coded block no sample leaves: only the classifier is behind it.

    Args:
        scores: of samples that the network was not trained on.
        max_accuracy_loss: largest share of the samples that may be lost, `0 <= loss < 1`.
        agreement: whether two consecutive decoders must agree.

    Raises:
        ValueError: the loss is outside its range.
    """
    if not 0 <= max_accuracy_loss < 1:
        raise ValueError(
            f"max_accuracy_loss: expected a share 0 <= loss < 1, got {max_accuracy_loss}"
        )
    samples, blocks = scores.decoded.shape
    # The product of a share and a number may fall just short of the whole number that is meant.
    allowed = math.floor(max_accuracy_loss * samples + 1e-9)
    staying = torch.ones(samples, dtype=torch.bool)
    margins: list[float | None] = []
    for block in range(blocks):
        if block == blocks - 1 or (agreement and block == 0):
            margins.append(None)
            continue
        eligible = staying.clone()
        if agreement:
            eligible &= scores.decoded[:, block] == scores.decoded[:, block - 1]
        right = scores.decoded[:, block] == scores.targets
        lost = eligible & ~right & (scores.final == scores.targets)
        margin = _lowest_margin(scores.margins[:, block], eligible, lost, allowed)
        margins.append(margin)
        if margin is not None:
            leaving = eligible & (scores.margins[:, block] >= margin)
            allowed -= int((leaving & lost).sum())
            staying &= ~leaving
    return EarlyExit(tuple(margins), agreement)


def _lowest_margin(margins: Tensor, eligible: Tensor, lost: Tensor, allowed: int) -> float | None:
    """Returns the lowest margin of an eligible sample with few enough lost ones from it on."""
    worst = margins[lost].sort(descending=True).values
    usable = margins[eligible]
    if len(worst) > allowed:
        usable = usable[usable > worst[allowed]]
    return float(usable.min()) if len(usable) else None
