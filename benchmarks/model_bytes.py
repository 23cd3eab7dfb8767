"""The least memory traffic of a network's blocks: what the operators of the fused data flow move.

Every tensor of the size of a map is counted once for each operator that reads or writes it; vectors
and weights are not. The table is that of docs/fused_block.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from coded_resnext import CodedBottleneck, CodedResNeXt


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
    joined: bool
    """Whether its input is what another block has left to be computed."""
    mapped: bool
    """Whether the residual of that block has a BatchNorm of its own."""

    def evaluation(self) -> dict[str, int]:
        """Elements that each operator moves where no gradients are wanted."""
        found = {
            "folded_conv1x1": self.x + self.y1,
            "folded_grouped_conv3x3": self.y1 + self.y2,
            "expand folded_conv1x1": self.y2 + 2 * self.y3,
        }
        if self.projection:
            both = self.y2 + self.x // self.stride**2
            found |= {"side_by_side": 2 * both, "expand folded_conv1x1": both + self.y3}
        return found

    def forward(self) -> dict[str, int]:
        """Elements that each operator moves on the way to a backward pass."""
        found = {
            "join_conv1x1": 3 * self.x + self.y1 if self.joined else self.x + self.y1,
            "grouped_conv3x3": self.y1 + self.y2,
            "conv1x1": self.y2 + self.y3,
        }
        if self.coded:
            found["normalize_branches"] = 2 * self.y2
        if self.projection:
            found["skip conv1x1"] = self.x // self.stride**2 + self.y3
        return found

    def backward(self) -> dict[str, int]:
        """Elements that each operator moves."""
        # The gradient of x from where else it goes, x itself, the raw tensor before it, and g.
        of_x = 4 * self.x + (self.x if self.mapped else 0) if self.joined else 2 * self.x
        found = {
            "conv1x1_backward": 2 * self.y3 + 2 * self.y2,
            "grouped_conv3x3_backward": 2 * self.y2 + 2 * self.y1,
            "join_conv1x1_backward": 2 * self.y1 + of_x,
        }
        if self.coded:
            found["normalize_branches_backward"] = 3 * self.y2
        if self.projection:
            found["skip conv1x1_backward"] = 2 * self.y3 + 2 * (self.x // self.stride**2)
        return found


def maps_of(model: CodedResNeXt, batch: int, size: int) -> list[BlockMaps]:
    """The blocks of a network for a batch of square images."""
    if model.config["stem"] != "conv3x3":
        size = (size + 3) // 4
    found: list[BlockMaps] = []
    before: CodedBottleneck | None = None
    for block in model.blocks:
        out = -(-size // block.stride)
        wide = block.reduce.out_channels
        found.append(
            BlockMaps(
                batch * block.in_channels * size**2,
                batch * wide * size**2,
                batch * wide * out**2,
                batch * block.expand.out_channels * out**2,
                block.stride,
                block.is_coded,
                _projects(block),
                before is not None,
                before is not None and _projects(before),
            )
        )
        before, size = block, out
    return found


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
    elements = sum(sum((maps.forward() | maps.backward()).values()) for maps in blocks)
    # The map behind the last block, and its gradient.
    return item * (elements + 7 * blocks[-1].y3)
