"""The 1x1 convolutions between BatchNorms on the GPU at hand: right, repeatable, how fast.

A part of check.py. Every layer for which the selection table of `kernels/conv1x1/rows.py`
names kernels is checked in its three passes against float64, repeated for equal bits, and timed:
by the kernels, and by cuBLAS with PyTorch's elementwise passes around it. What comes out is to
replace the predictions of that table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pass_check import KERNELS, PYTORCH
from timing import median_ms
from torch import Tensor

from coded_resnext.kernels.batch_norm import launch as batch_norm
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.rows import Passes

Results = dict[str, Tensor]
PASSES = ("forward", "input", "weight")


@dataclass(frozen=True)
class Layer:
    """A 1x1 convolution of a network."""

    place: str
    batch: int
    inputs: int
    outputs: int
    size: int
    """`H = W`, in pixels."""
    join: bool
    mapped: bool = False
    """Whether the residual of a join has a map of its own."""

    @property
    def name(self) -> str:
        kind = "join" if self.join else "conv"
        return f"{self.place}: {kind} {self.inputs} to {self.outputs}, {self.size}px"


def layers(pixels: int, batch: int) -> list[Layer]:
    """Those of ResNeXt-50 that the selection table names, on images of `pixels`."""
    sizes = {"32x4d c2": pixels // 4, "32x4d c3": pixels // 8}
    layers = []
    for place, (inputs, outputs) in conv1x1_rows.PAPER_CONVOLUTIONS.items():
        layers.append(Layer(place, batch, inputs, outputs, sizes[place], join=False))
    for place, (inputs, outputs) in conv1x1_rows.PAPER_JOINS.items():
        mapped = place.endswith("mapped")
        layers.append(Layer(place, batch, inputs, outputs, sizes[place[:8]], True, mapped))
    return layers


LAYERS = [*layers(160, 256), *layers(224, 256)]
TINY = [Layer("tiny", 1, 16, 24, 3, False), Layer("tiny", 1, 16, 8, 3, True, mapped=True)]


class Call:
    """A layer's tensors in a dtype, and its passes by kernels or by PyTorch."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def image(channels: int) -> Tensor:
            x = normal(layer.batch, channels, layer.size, layer.size).to(dtype)
            return x.contiguous(memory_format=torch.channels_last)

        weight = normal(layer.outputs, layer.inputs, 1, 1) / layer.inputs**0.5
        self.layer = layer
        self.x, self.residual, self.grad_x = (image(layer.inputs) for _ in range(3))
        self.weight, self.grad = weight.to(dtype), image(layer.outputs)
        self.vectors = [normal(layer.inputs) for _ in range(4 if layer.mapped else 2)]
        self.gain, self.curve, self.level = (normal(layer.outputs) for _ in range(3))
        # Half of a step's work is backward, from what forward left.
        self.out, self.y, self.signs = self.x, self.grad, None
        outputs = self.forward(PYTORCH)
        self.y, self.out = outputs["y"].to(dtype), outputs.get("x", self.x).to(dtype)
        if layer.join:
            self.signs = convolution.pack_signs(self.out)

    def to(self, dtype: torch.dtype) -> Call:
        """The same in another dtype, with the same numbers."""
        other = object.__new__(Call)
        other.__dict__ = {
            name: value.to(dtype) if isinstance(value, Tensor) and name != "signs" else value
            for name, value in self.__dict__.items()
        }
        other.vectors = [vector.to(dtype) for vector in self.vectors]
        return other

    def wide(self) -> Call:
        """In float64."""
        return self.to(torch.float64)

    def forward(self, passes: Passes) -> Results:
        """Output, statistics, and of a join the block's output."""
        results: Results = {}
        if self.layer.join:
            maps = self.vectors[2:] if self.layer.mapped else [None, None]
            before = (self.x, *self.vectors[:2], self.residual, *maps)
            results["x"], y, partial, _ = convolution.join(
                *before, self.weight, True, passes.forward, passes
            )
        else:
            y, partial = convolution.forward(self.x, self.weight, *self.vectors, True, passes)
        assert partial is not None
        return results | {"y": y, "statistics": batch_norm.merged(partial, passes.forward)}

    def backward(self, passes: Passes, *, need_input: bool) -> Results:
        """The gradients of the input, with its sums, or that of the weight."""
        of_output = (self.grad, self.y)
        statistics = (self.curve, self.level)
        dtype = None if need_input else self.weight.dtype
        if self.layer.join:
            signs = self.signs if passes.input else None
            mapped = self.residual if self.layer.mapped else None
            saved = (self.grad_x, self.out, signs, self.x, mapped, self.weight, dtype, passes)
            gradients = convolution.join_backward(*of_output, *statistics, *saved)
        else:
            saved = (self.x, self.weight, *self.vectors, need_input, dtype, passes)
            gradients = convolution.backward(*of_output, self.gain, *statistics, *saved)
        if not need_input:
            assert gradients.weight is not None
            return {"weight": gradients.weight}
        assert gradients.input is not None
        assert gradients.sums is not None
        return {"input": gradients.input, "sums": gradients.sums.sum(0)}

    def run(self, which: str, passes: Passes) -> Results:
        """One pass."""
        if which == "forward":
            return self.forward(passes)
        return self.backward(passes, need_input=which == "input")


def least_bytes(layer: Layer, which: str, item: int) -> float:
    """What a pass has to move: each map once, signs an eighth of a byte."""
    pixels = layer.batch * layer.size**2
    wide, narrow = {
        "forward": (3 + 1 / (8 * item) if layer.join else 1, 1),
        "input": (3 + layer.mapped + 1 / (8 * item) if layer.join else 2, 2),
        "weight": (1, 2),
    }[which]
    return item * pixels * (wide * layer.inputs + narrow * layer.outputs)


def time_layer(layer: Layer, device: torch.device, bandwidth: float | None) -> dict[str, Any]:
    """Milliseconds of each pass by each means, in bfloat16."""
    call = Call(layer, torch.bfloat16, device)
    row: dict[str, Any] = {"layer": layer.name, "ms": {}, "over_floor": {}}

    def library(which: str) -> Callable[[], Results]:
        return lambda: call.run(which, PYTORCH)

    for which in PASSES:
        times = {
            "kernel": median_ms(lambda which=which: call.run(which, KERNELS), device),
            "library": median_ms(library(which), device),
        }
        row["ms"][which] = times
        if bandwidth is not None:
            floor = 1000 * least_bytes(layer, which, 2) / bandwidth
            row["over_floor"][which] = times["kernel"] / floor
    return row


def plain_form(call: Call, which: str) -> Callable[[], tuple[Tensor, ...]]:
    """A pass as a compiler would be given it: products and elementwise operations of PyTorch."""

    def column(vector: Tensor) -> Tensor:
        return vector[:, None, None]

    def activated() -> Tensor:
        if call.layer.join and which != "forward":
            return call.out
        wide = call.x * column(call.vectors[0]) + column(call.vectors[1])
        if call.layer.mapped:
            wide = wide + (call.residual * column(call.vectors[2]) + column(call.vectors[3]))
        elif call.layer.join:
            wide = wide + call.residual
        return wide.relu().to(call.x.dtype)

    def run() -> tuple[Tensor, ...]:
        if which == "forward":
            x = activated()
            y = torch.nn.functional.conv2d(x, call.weight)
            kept = (x,) if call.layer.join else ()
            return (*kept, y, *torch.var_mean(y.float(), (0, 2, 3), correction=0))
        wide = call.grad * column(call.gain) + call.y * column(call.curve) + column(call.level)
        grad = wide.to(call.grad.dtype)
        needs = [which == "input", which == "weight", False]
        plain = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        gradients = torch.ops.aten.convolution_backward(
            grad, activated(), call.weight, *plain, needs
        )
        if which == "weight":
            return (gradients[1],)
        of_x = gradients[0].float()
        if call.layer.join:
            of_x = torch.where(call.out > 0, of_x + call.grad_x, 0.0)
        else:
            scale, bias = (column(vector) for vector in call.vectors)
            of_x = torch.where(call.x * scale + bias > 0, of_x, 0.0)
        sums = [of_x.sum((0, 2, 3)), (of_x * call.x).sum((0, 2, 3))]
        sums += [(of_x * call.residual).sum((0, 2, 3))] if call.layer.mapped else []
        if not call.layer.join:
            of_x = of_x * column(call.vectors[0])
        return (of_x.to(call.x.dtype), *sums)

    return run
