"""The memory traffic of a network's blocks: what the kernels of the fused data flow move.

Every tensor of the size of a map is counted once for each kernel that reads or writes it; vectors,
weights, partial sums and the bits of signs are not. The table is that of docs/fused_block.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from coded_resnext import CodedBottleneck, CodedResNeXt
from coded_resnext.models.fused.block import RECOMPUTED


@dataclass(frozen=True)
class BlockMaps:
    """Elements of the tensors of one block."""

    x: int
    """`[B, C_in, H, W]`, its input."""
    y1: int
    """`[B, N*D, H, W]`."""
    y2: int
    """`[B, N*D, OH, OW]`, and so is `h'` of a coded block."""
    y3: int
    """`[B, C, OH, OW]`, its output."""
    stride: int
    coded: bool
    projection: bool
    before: BlockMaps | None
    """The block whose output is still to be computed; None for a first block."""
    recomputed: bool
    """Whether its last convolution is computed where it is read."""
    skip_recomputed: bool
    """Whether that of its skip connection is, by PyTorch."""

    def evaluation(self) -> dict[str, int]:
        """Elements that each operator moves where no gradients are wanted."""
        elements = {
            "folded_conv1x1": self.x + self.y1,
            "folded_grouped_conv3x3": self.y1 + self.y2,
            "expand folded_conv1x1": self.y2 + 2 * self.y3,
        }
        if self.projection:
            both = self.y2 + self.x // self.stride**2
            elements |= {"side_by_side": 2 * both, "expand folded_conv1x1": both + self.y3}
        return elements

    def forward(self) -> dict[str, int]:
        """Elements that each operator's kernels move on the way to a backward pass."""
        elements = {"reduce": self.x + self.y1, "grouped": self.y1 + self.y2}
        if self.before is not None:
            elements |= {"join": self.before.joining()}
            # Where the sum is not a kernel of its own, it is the prologue of the convolution.
            elements["reduce"] -= 0 if self.before.recomputed else self.x
        if self.coded:
            elements["normalize"] = 2 * self.y2
        elements["expand"] = self.y2 if self.recomputed else self.y2 + self.y3
        if self.projection:
            elements["skip"] = self._picked if self.skip_recomputed else self._picked + self.y3
        return elements

    @property
    def _picked(self) -> int:
        """Elements of the pixels that the skip connection's convolution takes."""
        return self.x // self.stride**2

    def joining(self) -> int:
        """Elements that the sum at the block's end takes and gives."""
        own = (self.y2 if self.recomputed else self.y3) + 2 * self.y3
        return own + (self._picked + self.y3 if self.skip_recomputed else 0)

    def backward(self) -> dict[str, int]:
        """Elements that each operator's kernels move.

        The gradient of a convolution's output is written once as BatchNorm behind it makes it, for
        the gradient of the weight.
        """
        of_input = self.y2 if self.coded else 2 * self.y2
        elements = {
            "expand input": 3 * self.y3 + of_input,
            "expand weight": self.y3 + self.y2,
            "grouped": 4 * self.y2 + 3 * self.y1,
            "reduce input": 3 * self.y1 + self.x,
            "reduce weight": self.y1 + self.x,
        }
        if self.recomputed:
            elements["expand input"] = self.y3 + 2 * self.y2
        if self.before is not None:
            elements["reduce input"] += self.before.parting() - self.x
        if self.coded:
            elements["normalize"] = 4 * self.y2
        if self.projection:
            of_skip = 2 * self._picked if self.skip_recomputed else 2 * self.y3 + self._picked
            elements |= {"skip input": of_skip + self.y3, "skip weight": self.y3 + self._picked}
        return elements

    def parting(self) -> int:
        """Elements at the sum's gradient, which the next block's first convolution adds to another
        one: that one, the result, and what the sums for the BatchNorms before it need."""
        mapped = self.projection and not self.skip_recomputed
        return (2 + (not self.recomputed) + mapped) * self.y3


def maps_of(model: CodedResNeXt, batch: int, size: int) -> list[BlockMaps]:
    """The blocks of a network for a batch of square images."""
    if model.config["stem"] != "conv3x3":
        size = (size + 3) // 4
    blocks: list[BlockMaps] = []
    for block in model.blocks:
        out = -(-size // block.stride)
        wide = block.reduce.out_channels
        recomputed = not block.is_coded and wide <= RECOMPUTED
        blocks.append(
            BlockMaps(
                batch * block.in_channels * size**2,
                batch * wide * size**2,
                batch * wide * out**2,
                batch * block.expand.out_channels * out**2,
                block.stride,
                block.is_coded,
                _projects(block),
                blocks[-1] if blocks else None,
                recomputed,
                recomputed and _projects(block) and block.in_channels <= RECOMPUTED,
            )
        )
        size = out
    return blocks


def _projects(block: CodedBottleneck) -> bool:
    return len(list(block.skip.parameters())) > 0


def least_bytes(model: CodedResNeXt, batch: int, size: int, item: int, *, training: bool) -> int:
    """Bytes that evaluation, or a training step, moves through the blocks, not stem and head.

    Args:
        model: the network.
        batch, size: of the images.
        item: bytes of an element.
        training: whether it is a training step; evaluation without gradients otherwise.
    """
    blocks = maps_of(model, batch, size)
    if not training:
        return item * sum(sum(maps.evaluation().values()) for maps in blocks)
    elements = sum(
        sum(each.values()) for maps in blocks for each in (maps.forward(), maps.backward())
    )
    # The map behind the last block is written by itself; its gradient's ReLU reads it.
    last = blocks[-1]
    return item * (elements + last.joining() + last.parting() + last.y3)
