"""The grouped 3x3 convolutions of whole networks on the GPU at hand: right, repeatable, how fast.

A part of check.py. Every layer is checked in its three passes against float64, repeated for
equal bits, and timed against cuDNN: in both layouts, and with groups merged by zeros. The selection
table of `kernels/conv3x3/rows.py` is to say what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import median_ms
from torch import Tensor

from coded_resnext.kernels import grouped_conv3x3
from coded_resnext.kernels.conv3x3 import operator as conv3x3_operator
from coded_resnext.kernels.conv3x3.library import merged_weight
from coded_resnext.kernels.conv3x3.rows import GroupedSizes, GroupedWindows
from coded_resnext.kernels.rows import ALL_PASSES

PASSES = ("forward", "input", "weight")
# Errors against float64, over the largest magnitude: eager's own times two, or one rounding.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Layer:
    """A grouped convolution of a network, and how often the network has it."""

    network: str
    batch: int
    groups: int
    width: int
    size: int
    """`H = W` of the input, in pixels."""
    stride: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.network}: {self.groups}x{self.width}d {self.size}px stride {self.stride}"


def stages(network: str, batch: int, groups: int, *rows: tuple[int, int, int]) -> list[Layer]:
    """Stages of a network, each `(D, size of its maps, blocks)`; all but the first begin with a
    block of stride 2."""
    layers = []
    for index, (width, size, blocks) in enumerate(rows):
        if index > 0:
            layers.append(Layer(network, batch, groups, width, rows[index - 1][1], 2, 1))
        layers.append(Layer(network, batch, groups, width, size, 1, blocks - (index > 0)))
    return layers


LAYERS = [
    *stages("ResNeXt-50 160px", 256, 32, (4, 40, 3), (8, 20, 4), (16, 10, 6), (32, 5, 3)),
    *stages("ResNeXt-50 224px", 256, 32, (4, 56, 3), (8, 28, 4), (16, 14, 6), (32, 7, 3)),
    *stages("CIFAR 20x6d", 512, 20, (6, 32, 3), (12, 16, 3), (24, 8, 3)),
    *stages("CIFAR 10x11d", 512, 10, (11, 32, 3), (22, 16, 3), (44, 8, 3)),
]
TINY = [Layer("tiny", 1, 4, 4, 2, 1, 2), Layer("tiny", 1, 2, 3, 2, 2, 1)]


class Call:
    """A layer's tensors in a dtype, and its passes by different means."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        channels = layer.groups * layer.width

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        x = normal(layer.batch, channels, layer.size, layer.size).to(dtype)
        size = -(-layer.size // layer.stride)
        self.layer = layer
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.weight = (normal(channels, layer.width, 3, 3) / (9 * layer.width) ** 0.5).to(dtype)
        grad = normal(layer.batch, channels, size, size).to(dtype)
        self.grad = grad.contiguous(memory_format=torch.channels_last)
        self.scale, self.bias = normal(channels), normal(channels)

    def kernel(self, which: str) -> Tensor:
        """One pass by the kernels."""
        stride, kernels = self.layer.stride, ALL_PASSES.encoded()
        if which == "forward":
            return conv3x3_operator.grouped_conv3x3(
                self.x, self.weight, None, None, stride, False, kernels
            )[0]
        needs = (which == "input", which == "weight")
        gradients = conv3x3_operator.grouped_conv3x3_backward(
            self.grad, self.x, self.weight, *[None] * 5, stride, *needs, kernels
        )
        return gradients[0] if which == "input" else gradients[2]

    def library(self, which: str, dtype: torch.dtype | None = None) -> Tensor:
        """One pass by PyTorch, in the layout of the tensors."""
        x, weight, grad = (
            v if dtype is None else v.to(dtype) for v in (self.x, self.weight, self.grad)
        )
        stride, groups = self.layer.stride, self.layer.groups
        if which == "forward":
            return F.conv2d(x, weight, None, stride, 1, 1, groups)
        plain = (None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups)
        mask = [which == "input", which == "weight", False]
        gradients = torch.ops.aten.convolution_backward(grad, x, weight, *plain, mask)
        return gradients[0] if which == "input" else gradients[1]

    def in_rows(self) -> Call:
        """The same in PyTorch's other layout, NCHW."""
        other = object.__new__(Call)
        other.__dict__ = {**self.__dict__, "x": self.x.contiguous(), "grad": self.grad.contiguous()}
        return other

    def merged(self, width: int) -> Call | None:
        """The same with groups merged into groups of `width` channels, the weight filled up with
        zeros; None where that does not go."""
        together = width // self.layer.width
        if together < 2 or width % self.layer.width or self.layer.groups % together:
            return None
        other = object.__new__(Call)
        groups = self.layer.groups // together
        layer = Layer(**{**self.layer.__dict__, "groups": groups, "width": width})
        weight = merged_weight(self.weight, together, self.weight.dtype)
        other.__dict__ = {**self.__dict__, "layer": layer, "weight": weight}
        return other

    def fused(self, backend: str) -> Callable[..., tuple[Tensor, ...]]:
        """Between BatchNorms: the affine map and ReLU before, the statistics after."""

        def run(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            if backend == "triton":
                y, statistics = grouped_conv3x3(
                    x,
                    weight,
                    self.layer.groups,
                    stride=self.layer.stride,
                    scale=self.scale,
                    bias=self.bias,
                    statistics=True,
                    backend="triton",
                )
                assert statistics is not None
                return y, statistics
            wide = x * self.scale[:, None, None] + self.bias[:, None, None]
            h = wide.relu().to(x.dtype)
            y = F.conv2d(h, weight, None, self.layer.stride, 1, 1, self.layer.groups)
            return y, *torch.var_mean(y.float(), (0, 2, 3), correction=0)

        return run


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    assert actual.shape == exact.shape
    return float((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def check_layer(
    layer: Layer, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Errors of the three passes beside eager PyTorch's, and whether bits repeat."""
    call = Call(layer, dtype, device)
    row: dict[str, Any] = {"layer": layer.name, "dtype": str(dtype), "errors": {}, "wrong": []}
    for which in PASSES:
        exact, actual = call.library(which, torch.float64), call.kernel(which)
        mine, theirs = error(actual, exact), error(call.library(which), exact)
        limit = 2 * max(theirs, ROUNDING[dtype])
        row["errors"][which] = {"kernel": mine, "eager": theirs, "limit": limit}
        # Written so that a NaN is wrong.
        if not mine <= limit:
            row["wrong"].append(f"{layer.name} {which}: error {mine:.1e}, at most {limit:.1e}")
        if not all(torch.equal(actual, call.kernel(which)) for _ in range(repeats - 1)):
            row["wrong"].append(f"{layer.name} {which}: other bits in one of {repeats} runs")
    return row


def time_layer(layer: Layer, device: torch.device, bandwidth: float | None) -> dict[str, Any]:
    """Milliseconds of each pass by each means, in bfloat16."""
    call = Call(layer, torch.bfloat16, device)
    windows = GroupedWindows.of(GroupedSizes(layer.groups, layer.width, layer.stride))
    row: dict[str, Any] = {
        "layer": layer.name,
        "network": layer.network,
        "count": layer.count,
        "window": windows.channels,
        "ms": {},
    }
    libraries = {"NHWC": call, "NCHW": call.in_rows()}
    libraries |= {
        f"merged to {width}": merged
        for width in (16, 32, 64)
        if (merged := call.merged(width)) is not None
    }
    for which in PASSES:
        times = {"kernel": median_ms(lambda which=which: call.kernel(which), device)}
        for name, other in libraries.items():
            times[name] = median_ms(lambda o=other, which=which: o.library(which), device)
        row["ms"][which] = times
    if bandwidth is not None:
        moved = 2 * (call.x.numel() + call.grad.numel())
        row["forward_over_floor"] = row["ms"]["forward"]["kernel"] / (1000 * moved / bandwidth)
    return row
