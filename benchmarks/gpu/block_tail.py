"""The last convolution of plain blocks, which is not written, on the GPU at hand: is it right, does
it repeat, how fast is it.

A part of check.py. The moments of what is multiplied, the sum that ends the block, the sums
of gradient and input over the pixels, and the gradient of the input are checked and timed by the
kernels and by PyTorch's products with elementwise passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pass_check import KERNELS, PYTORCH
from timing import median_ms
from torch import Tensor

from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.conv1x1.convolution import pack_signs
from coded_resnext.kernels.recompute.convolution import (
    Moments,
    backward,
    join,
    product_sums,
    statistics,
)
from coded_resnext.kernels.rows import Passes

Results = dict[str, Tensor]
PASSES = ("statistics", "join", "sums", "gradient")


@dataclass(frozen=True)
class Tail:
    """The last convolution of a block, and the sum behind it."""

    place: str
    batch: int
    inputs: int
    outputs: int
    size: int
    """`H = W`, in pixels."""
    mapped: bool
    """Whether the residual has a map of its own."""

    @property
    def name(self) -> str:
        kind = "mapped" if self.mapped else "identity"
        return f"{self.place}: tail {self.inputs} to {self.outputs}, {kind}, {self.size}px"

    def least_bytes(self, which: str, item: int) -> float:
        """What a pass has to move: each map once, signs an eighth of a byte."""
        narrow, wide = {
            "statistics": (1, 0),
            "join": (1, 2 + 1 / (8 * item)),
            "sums": (1, 1),
            "gradient": (2, 1),
        }[which]
        return item * self.batch * self.size**2 * (narrow * self.inputs + wide * self.outputs)


def tails(pixels: int, batch: int) -> list[Tail]:
    """Those of the plain stages of ResNeXt-50 on images of `pixels`."""
    sizes = {"32x4d c2": pixels // 4, "32x4d c3": pixels // 8}
    return [
        Tail(place, batch, inputs, outputs, sizes[place], mapped)
        for place, (inputs, outputs) in conv1x1_rows.PAPER_CONVOLUTIONS.items()
        for mapped in (False, True)
    ]


TAILS = [*tails(160, 256), *tails(224, 256)]
TINY = [Tail("tiny", 1, 16, 24, 3, mapped=True)]


class Call:
    """A layer's tensors in a dtype, and its passes by kernels or by PyTorch."""

    def __init__(self, layer: Tail, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def image(channels: int) -> Tensor:
            x = normal(layer.batch, channels, layer.size, layer.size).to(dtype)
            return x.contiguous(memory_format=torch.channels_last)

        self.layer = layer
        self.x, self.residual, self.grad = (
            image(channels) for channels in (layer.inputs, layer.outputs, layer.outputs)
        )
        self.weight = (normal(layer.outputs, layer.inputs, 1, 1) / layer.inputs**0.5).to(dtype)
        self.scale, self.bias = normal(layer.inputs), normal(layer.inputs)
        self.out_vectors = [normal(layer.outputs) for _ in range(4 if layer.mapped else 2)]
        self.of_output = [normal(layer.outputs) for _ in range(3)]
        self.grad_sums = normal(layer.outputs, layer.inputs)
        self.mean, self.spread = self._moments(PYTORCH)[1]

    def wide(self) -> Call:
        """The same numbers in float64."""
        other = object.__new__(Call)
        other.__dict__ = {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        other.out_vectors = [vector.double() for vector in self.out_vectors]
        other.of_output = [vector.double() for vector in self.of_output]
        return other

    def _moments(self, passes: Passes) -> tuple[Tensor, Moments]:
        return statistics(self.x, self.scale, self.bias, self.weight, passes)

    def run(self, which: str, passes: Passes) -> Results:
        """One pass."""
        operands = (self.x, self.weight, self.scale, self.bias)
        if which == "statistics":
            (total,), moments = self._moments(passes)
            return {"sum": total[1], "m2": total[2], **moments._asdict()}
        if which == "sums":
            return {"sums": product_sums(self.grad, *operands, passes)}
        if which == "gradient":
            moments = Moments(self.mean, self.spread)
            gradients = backward(
                *(self.grad, *self.of_output, self.grad_sums, moments, *operands),
                *(True, self.weight.dtype, passes),
            )
            assert gradients.input is not None
            assert gradients.sums is not None
            assert gradients.weight is not None
            sums = gradients.sums.sum(0)
            return {"input": gradients.input, "sums": sums, "weight": gradients.weight}
        maps = self.out_vectors[2:] if self.layer.mapped else [None, None]
        # Signs where kernels write them.
        end = (*self.out_vectors[:2], self.residual, *maps, passes.forward, passes)
        joined, signs = join(self.x, self.scale, self.bias, self.weight, *end)
        assert signs is None or torch.equal(signs, pack_signs(joined))
        return {"joined": joined}


def time_tail(call: Call, bandwidth: float | None) -> dict[str, Any]:
    """Milliseconds of each pass by each means."""
    row: dict[str, Any] = {"layer": call.layer.name, "ms": {}, "over_floor": {}}
    for which in PASSES:
        row["ms"][which] = {
            name: median_ms(lambda which=which, by=by: call.run(which, by), call.x.device)
            for name, by in (("kernel", KERNELS), ("library", PYTORCH))
        }
        if bandwidth is not None:
            floor = 1000 * call.layer.least_bytes(which, call.x.itemsize) / bandwidth
            row["over_floor"][which] = row["ms"][which]["kernel"] / floor
    return row
