"""Early decoding: how well every coded block alone already knows the class, (9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..decode import decode
from ..models import CodedResNeXt
from .running import Loader, batches, evaluating, require_coded_blocks


@dataclass(frozen=True)
class EarlyDecoding:
    """Decoding every coded block of a network; all numbers but `samples` are shares, 0 to 1."""

    samples: int
    """Images that were decoded."""
    accuracy: float
    """Share of the images that the whole network classifies correctly."""
    block_accuracy: tuple[float, ...]
    """For every coded block, the share whose decoded class is the true one."""
    block_agreement: tuple[float, ...]
    """For every coded block, the share whose decoded class is the network's final prediction."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "samples": self.samples,
            "accuracy": self.accuracy,
            "block_accuracy": list(self.block_accuracy),
            "block_agreement": list(self.block_agreement),
        }


def decode_early(model: CodedResNeXt, loader: Loader) -> EarlyDecoding:
    """Decode the class from the branch energies of every coded block, (9).

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, or targets are not
            class indices of the model.
    """
    require_coded_blocks(model)
    samples = final = 0
    correct = [0] * len(model.coded_blocks)
    agreeing = [0] * len(model.coded_blocks)
    with evaluating(model):
        for images, targets in batches(model, loader, "early decoding"):
            logits, all_energies = model(images, return_energies=True)
            prediction = logits.argmax(1)
            samples += len(targets)
            final += int((prediction == targets).sum())
            for index, (block, energies) in enumerate(
                zip(model.coded_blocks, all_energies, strict=True)
            ):
                decoded = decode(energies, block.codewords)
                correct[index] += int((decoded == targets).sum())
                agreeing[index] += int((decoded == prediction).sum())
    return EarlyDecoding(
        samples=samples,
        accuracy=final / samples,
        block_accuracy=tuple(count / samples for count in correct),
        block_agreement=tuple(count / samples for count in agreeing),
    )
