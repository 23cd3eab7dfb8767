"""The cost of a network: parameters, bytes, multiply-accumulates and time, counted two ways.

Projection skips are counted apart, since the paper's sizes of one-class classifiers leave them out:
with them a classifier is a larger part of its network than without.

Letters as in docs/math.md: N branches of width D, C output channels, P output pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from coded_resnext.kernels.checks import check_integers, typed
from coded_resnext.models.block import CodedBottleneck
from coded_resnext.models.layers import check_layers
from coded_resnext.models.resnext import CodedResNeXt, own_network

_OPTIONAL = ("normalized_by", "skip_rank")
WARM_UP = 3


def halved(pixels: int, stride: int) -> int:
    """Returns height or width behind a convolution of this stride whose padding keeps the size."""
    return -(-pixels // stride)


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of a bottleneck block, whole or cut out."""

    in_channels: int
    """Input channels."""
    channels: int
    """Output channels `C`."""
    width: int
    """Channels `D` of one branch."""
    branches: int
    """Branches that are there: `N`, or fewer in a block that was cut out."""
    stride: int = 1
    """Stride of the 3x3 convolution and of the skip connection."""
    normalized_by: int | None = None
    """`N` of (3), the branches of the whole coded block; None for a plain block."""
    skip_rank: int | None = None
    """Rank of a factorised projection skip; None for a whole one."""
    concatenated: bool = False
    """Says whether branches write channels of their own, the ablation."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "concatenated" or (value is None and name in _OPTIONAL):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"BlockSizes.{name}: expected a positive integer, got {value!r}")

    @classmethod
    def of(cls, block: CodedBottleneck) -> BlockSizes:
        """Returns the sizes of a block of a network, whole or cut out."""
        skip: tuple[Any, ...] = tuple(block.skip) if isinstance(block.skip, nn.Sequential) else ()
        is_thin = len(skip) == 2 and isinstance(skip[1], nn.Conv2d)
        return cls(
            in_channels=block.in_channels,
            channels=block.channels,
            width=block.width,
            branches=block.branches,
            stride=block.stride,
            normalized_by=block.normalized_by,
            skip_rank=skip[0].out_channels if is_thin else None,
            concatenated=block.is_coded and block.aggregation == "concat",
        )

    @property
    def wide(self) -> int:
        """Returns the number of channels between the three convolutions, `N D`."""
        return self.branches * self.width

    @property
    def is_coded(self) -> bool:
        """Returns whether branch energies are normalised."""
        return self.normalized_by is not None

    @property
    def has_projection(self) -> bool:
        """Returns whether the skip connection is a convolution."""
        return self.stride != 1 or self.in_channels != self.channels

    @property
    def _expand_weights(self) -> int:
        return self.wide * self.channels // (self.branches if self.concatenated else 1)

    @property
    def _projection_weights(self) -> int:
        if not self.has_projection:
            return 0
        if self.skip_rank is not None:
            return self.skip_rank * (self.in_channels + self.channels)
        return self.in_channels * self.channels

    def macs(self, height: int, width: int) -> int:
        """Counts the multiply-accumulates for one image, without those of a projection skip.

        They are those of the convolutions and, in a coded block, of the Gram matrices and energies
        of (11).

        Args:
            height, width: of the block's input, in pixels.
        """
        pixels = self._output_pixels(height, width)
        count = self.in_channels * self.wide * height * width
        count += (9 * self.wide * self.width + self._expand_weights) * pixels
        if self.is_coded:
            count += self.wide * self.width * (pixels + 1)
        return count

    def projection_macs(self, height: int, width: int) -> int:
        """Counts the multiply-accumulates of the projection skip for one image."""
        return self._projection_weights * self._output_pixels(height, width)

    def macs_per_pass(self) -> int:
        """Counts those of `Q_n = W_n^T W_n`, (11), once for each pass, however many images."""
        return self._expand_weights * self.width if self.is_coded else 0

    def _output_pixels(self, height: int, width: int) -> int:
        return halved(height, self.stride) * halved(width, self.stride)

    def to_dict(self) -> dict[str, Any]:
        """Returns the sizes as JSON-ready data."""
        return asdict(self)


class Counted(Protocol):
    """A network, whole or cut out, with what multiply-accumulates are counted of."""

    @property
    def stem(self) -> nn.Sequential: ...

    @property
    def blocks(self) -> Any: ...

    @property
    def head(self) -> nn.Module: ...


@dataclass(frozen=True)
class Cost:
    """The cost of a network; multiply-accumulates are for one image."""

    parameters: int
    """Parameters of all tensors that are trained."""
    projection_parameters: int
    """Parameters of projection skips and their BatchNorm among these."""
    bytes: int
    """Bytes of all tensors, running statistics and codewords included."""
    macs: int
    """Multiply-accumulates of convolutions, classifier, and the energies of coded blocks."""
    projection_macs: int
    """Multiply-accumulates of projection skips among these."""
    macs_per_pass: int
    """Further ones once for a batch of any size: `Q_n` of (11), unless it is stored."""

    @property
    def flops(self) -> int:
        """Returns the floating-point operations for one image: two for each multiply-accumulate."""
        return 2 * self.macs

    def relative_to(self, whole: Cost) -> Share:
        """Returns this cost as shares of another network's."""
        return Share(
            parameters=self.parameters / whole.parameters,
            parameters_without_projections=(self.parameters - self.projection_parameters)
            / (whole.parameters - whole.projection_parameters),
            bytes=self.bytes / whole.bytes,
            macs=self.macs / whole.macs,
            macs_without_projections=(self.macs - self.projection_macs)
            / (whole.macs - whole.projection_macs),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns this as JSON-ready data."""
        return {**vars(self), "flops": self.flops}


@dataclass(frozen=True)
class Share:
    """A cost as shares of a larger one, 0 to 1."""

    parameters: float
    """Share of all parameters."""
    parameters_without_projections: float
    """Share of the parameters without projection skips, as the paper counts."""
    bytes: float
    """Share of the bytes."""
    macs: float
    """Share of all multiply-accumulates."""
    macs_without_projections: float
    """Share of those without projection skips."""

    def to_dict(self) -> dict[str, Any]:
        """Returns this as JSON-ready data."""
        return dict(vars(self))


@typed
def network_cost(network: nn.Module, image_size: int | tuple[int, int]) -> Cost:
    """Counts the cost of a network, multiplications from its sizes and the rest from its tensors.

    Args:
        network: whole or cut out.
        image_size: height and width of the images in pixels, at least 1; one number for both.

    Raises:
        ValueError: the image size is not positive, or layers were changed or replaced since the
            network was made, so that it has other sizes than it tells.
    """
    whole: Any = _without_wrappers(network)
    check_layers(whole, "counting goes by the sizes of its own layers", sizes_only=True)
    if not isinstance(whole.head, nn.Linear | nn.Identity):
        raise ValueError(f"head: expected Linear, or Identity, got {type(whole.head).__name__}")
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    for size in (height, width):
        check_integers(image_size=size)
    macs = stem_macs(whole, height, width)
    projection_parameters = projection_macs = per_pass = 0
    for block, sizes, of_block, of_projection in counted_blocks(whole, height, width):
        macs += of_block
        projection_macs += of_projection
        per_pass += sizes.macs_per_pass() if block.form is None else 0
        projection_parameters += sum(p.numel() for p in block.skip.parameters())
    return Cost(
        parameters=sum(p.numel() for p in whole.parameters()),
        projection_parameters=projection_parameters,
        bytes=sum(t.numel() * t.element_size() for t in whole.state_dict().values()),
        macs=macs + head_macs(whole),
        projection_macs=projection_macs,
        macs_per_pass=per_pass,
    )


def _without_wrappers(network: nn.Module) -> Any:
    """Returns a cut-out network as it is, and of any other the `CodedResNeXt` inside."""
    blocks = getattr(network, "blocks", None)
    if isinstance(blocks, nn.ModuleList) and any(isinstance(b, CodedBottleneck) for b in blocks):
        return network
    return own_network(network)


def counted_blocks(
    network: Counted, height: int, width: int
) -> Iterator[tuple[CodedBottleneck, BlockSizes, int, int]]:
    """Yields every block with its sizes, its multiply-accumulates and those of its projection.

    Args:
        network: whole or cut out.
        height, width: of the image in pixels.
    """
    height, width = stem_size(network, height), stem_size(network, width)
    for block in network.blocks:
        sizes = BlockSizes.of(block)
        projection = sizes.projection_macs(height, width)
        yield block, sizes, sizes.macs(height, width) + projection, projection
        height, width = halved(height, sizes.stride), halved(width, sizes.stride)


def macs_from_coded(network: CodedResNeXt, height: int, width: int) -> list[int]:
    """Counts, for one image, the multiply-accumulates from each coded block to the classifier.

    Raises:
        ValueError: layers were changed or replaced since the network was made.
    """
    spent, before = 0, []
    for block, _, of_block, _ in counted_blocks(network, height, width):
        if block.is_coded:
            before.append(spent)
        spent += of_block
    return [spent - of_block + head_macs(network) for of_block in before]


def head_macs(network: Counted) -> int:
    """Counts the multiply-accumulates of the classifier for one image; 0 where there is none.

    Raises:
        ValueError: it is not one linear layer.
    """
    head: Any = network.head
    if isinstance(head, nn.Identity):
        return 0
    if not hasattr(head, "in_features"):
        raise ValueError(f"head: expected a linear layer, got {type(head).__name__}")
    return int(head.in_features * head.out_features)


def stem_size(network: Counted, size: int) -> int:
    """Returns height or width behind the stem for images of this height or width."""
    stem = network.stem[0]
    assert isinstance(stem, nn.Conv2d)
    size = halved(size, stem.stride[0])
    pooled = any(isinstance(layer, nn.MaxPool2d) for layer in network.stem)
    return halved(size, 2) if pooled else size


def stem_macs(network: Counted, height: int, width: int) -> int:
    """Counts the multiply-accumulates of the stem for one image of this height and width."""
    stem = network.stem[0]
    assert isinstance(stem, nn.Conv2d)
    return stem.weight.numel() * halved(height, stem.stride[0]) * halved(width, stem.stride[1])


def measure_latency(
    network: nn.Module, images: torch.Tensor, *, repeats: int = 30, synchronize: bool = True
) -> float:
    """Measures the median time of a pass in evaluation mode, in seconds.

    Args:
        network: any module; it and its parts are left in their modes.
        images: what it is given.
        repeats: timed passes, at least 1.
        synchronize: wait for an accelerator before the clock is read.

    Raises:
        ValueError: there is nothing to repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    wait = synchronize and images.is_cuda
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    seconds = []
    try:
        with torch.inference_mode():
            for index in range(WARM_UP + repeats):
                start = time.perf_counter()
                network(images)
                if wait:
                    torch.cuda.synchronize()
                if index >= WARM_UP:
                    seconds.append(time.perf_counter() - start)
    finally:
        for module, training in modes:
            module.training = training
    return statistics.median(seconds)
