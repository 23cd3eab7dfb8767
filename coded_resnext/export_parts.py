"""What of a network is exported: its early decoders, its parts between exits, and its signature.

Letters as in docs/math.md: B samples, K classes, L coded blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .data import Preprocessing
from .early_exit import check, read_class
from .extracted import ExtractedClassifier, ExtractedNetwork
from .layers import CodedBottleneck
from .models import CodedResNeXt

FORMAT_VERSION = 1


class Heads(nn.Module):
    """A network with what each of its early decoders says, (9).

    Args:
        model: with at least one coded block.

    Raises:
        ValueError: a plain network.
    """

    def __init__(self, model: CodedResNeXt) -> None:
        super().__init__()
        self.model = model.eval()
        check(model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images to logits `[B, K]`, decoded classes `[B, L]` and their margins `[B, L]`."""
        logits, energies = self.model(images, return_energies=True)
        read = [
            read_class(value, block.codewords)
            for value, block in zip(energies, self.model.coded_blocks, strict=True)
        ]
        classes, margins = zip(*read, strict=True)
        return logits, torch.stack(classes, 1), torch.stack(margins, 1)


class ExitPart(nn.Module):
    """The layers from behind one coded block to the next, or to the logits.

    Args:
        layers: stem and blocks, the coded one last; or the blocks behind the last coded one.
        head: the classifier, of the last part.
        input_shape: of the map that comes in, without the batch.
    """

    def __init__(
        self, layers: Sequence[nn.Module], head: nn.Module | None, input_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.input_shape = input_shape

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """A map to the logits `[B, K]`; or to the next map, a class `[B]` and a margin `[B]`."""
        energies: Tensor | None = None
        for layer in self.layers:
            if isinstance(layer, CodedBottleneck):
                x, energies = layer(x)
            else:
                x = layer(x)
        if self.head is not None:
            logits: Tensor = self.head(x.mean((2, 3)))
            return logits
        assert energies is not None
        last = self.layers[-1]
        assert isinstance(last, CodedBottleneck)
        decoded, margin = read_class(energies, last.codewords)
        return x, decoded, margin


@torch.no_grad()
def exit_parts(model: CodedResNeXt, image_size: int) -> list[ExitPart]:
    """A network cut behind each coded block: L parts that may decide, and one with the classifier.

    Args:
        model: with at least one coded block, in evaluation mode; the parts share its weights.
        image_size: height and width of the images.

    Raises:
        ValueError: a plain network, or one in training mode.
    """
    check(model)
    groups: list[list[nn.Module]] = [[model.stem]]
    for block in model.blocks:
        groups[-1].append(block)
        if block.is_coded:
            groups.append([])
    x = torch.zeros(1, model.in_channels, image_size, image_size).to(model.head.weight)
    parts = []
    for index, layers in enumerate(groups):
        is_last = index == len(groups) - 1
        part = ExitPart(layers, model.head if is_last else None, tuple(x.shape[1:])).eval()
        parts.append(part)
        if not is_last:
            x = part(x)[0]
    return parts


Network = CodedResNeXt | ExtractedNetwork | Heads | ExitPart


@dataclass(frozen=True)
class Signature:
    """What goes into an exported network, what comes out, and what its file says about it."""

    input_name: str
    input_shape: tuple[int, ...]
    """Without the batch."""
    output_names: tuple[str, ...]
    notes: dict[str, Any]
    """JSON-ready: kind, classes, threshold, image size, preprocessing."""

    def example(self, batch: int, like: Tensor) -> Tensor:
        """Noise for so many samples, in the dtype of a tensor and on its device."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, *self.input_shape, generator=generator).to(like)


def signature(
    network: Network, image_size: int | None, preprocessing: Preprocessing | None
) -> Signature:
    """The signature of a network under the rules of `export.to_exported_program`.

    Raises:
        ValueError: the image size is not positive.
    """
    if isinstance(network, ExitPart):
        outputs = ("map", "class", "margin") if network.head is None else ("logits",)
        return Signature("x", network.input_shape, outputs, {"format_version": FORMAT_VERSION})
    inner = network.model if isinstance(network, Heads) else network
    if isinstance(inner, ExtractedNetwork):
        stem, channels = inner.config.stem, inner.config.in_channels
    else:
        stem, channels = inner.config["stem"], inner.in_channels
    if image_size is None and preprocessing is not None:
        image_size = preprocessing.size
    if image_size is None:
        image_size = 32 if stem == "conv3x3" else 224
    if image_size < 1:
        raise ValueError(f"image_size: expected a positive number of pixels, got {image_size}")
    single = isinstance(inner, ExtractedClassifier)
    has_heads = isinstance(network, Heads)
    notes = {
        "format_version": FORMAT_VERSION,
        "kind": "classifier" if single else "heads" if has_heads else "network",
        "class_names": list(inner.class_names),
        "threshold": inner.threshold if isinstance(inner, ExtractedClassifier) else None,
        "image_size": image_size,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
    }
    outputs = ("logits", "classes", "margins") if has_heads else ("logits",)
    return Signature("images", (channels, image_size, image_size), outputs, notes)
