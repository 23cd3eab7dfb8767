"""The sizes of a bottleneck block, and the multiplications that follow from them.

Letters as in docs/math.md: N branches of width D, C output channels, P output pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .block import CodedBottleneck


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


_OPTIONAL = ("normalized_by", "skip_rank")
