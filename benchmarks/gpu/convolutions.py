"""The convolutions between BatchNorms on the GPU at hand: right, repeatable, how fast.

A part of check.py, for three kinds of layers: the grouped 3x3 convolutions of whole networks, the
1x1 convolutions for which the selection table of `kernels/conv1x1/rows.py` names kernels, and the
last convolutions of plain blocks, which are computed again instead of stored. Each pass of a layer
is checked against float64, repeated for equal bits, and timed: by the kernels, and by PyTorch's
convolutions and products with its elementwise passes around them; grouped convolutions in both
layouts, and with groups merged by zeros. What comes out is to replace the predictions of the
selection tables.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from operators import add_ratios, compared
from timing import median_ms
from torch import Tensor
from torch.utils._pytree import tree_map_only

from coded_resnext.kernels import grouped_conv3x3
from coded_resnext.kernels.batch_norm import launch as batch_norm
from coded_resnext.kernels.conv1x1 import convolution as conv1x1
from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.conv3x3 import convolution as conv3x3
from coded_resnext.kernels.conv3x3.library import merged_weight
from coded_resnext.kernels.recompute.convolution import (
    Moments,
    backward,
    join,
    product_sums,
    statistics,
)
from coded_resnext.kernels.rows import ALL_PASSES, NO_PASSES, Passes

Results = dict[str, Tensor]
# Who computes.
KERNELS, PYTORCH = ALL_PASSES, NO_PASSES


class Case:
    """A layer's tensors in a dtype, and its passes by kernels or by PyTorch."""

    title: ClassVar[str]
    passes: ClassVar[tuple[str, ...]]
    layers: ClassVar[Sequence[Any]]
    """Those of the paper's networks."""
    tiny: ClassVar[Sequence[Any]]
    """For a dry run."""
    x: Tensor

    def __init__(self, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.layer, self.dtype = layer, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device)

    def _image(self, channels: int, size: int) -> Tensor:
        x = self._normal(self.layer.batch, channels, size, size).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def wide(self) -> Case:
        """Returns the same numbers in float64."""
        other = copy.copy(self)
        other.__dict__ = tree_map_only(
            Tensor, lambda value: value.double() if value.is_floating_point() else value, vars(self)
        )
        return other

    def run(self, which: str, passes: Passes) -> Results:
        """One pass: tensors by name."""
        raise NotImplementedError

    def forms(self, which: str) -> Mapping[str, Callable[[], Results]]:
        """Returns everything that is timed for a pass, the kernel first."""
        return {
            name: lambda by=by: self.run(which, by)
            for name, by in (("kernel", KERNELS), ("library", PYTORCH))
        }


def check_case(case: Case, repeats: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the errors of the passes beside those of PyTorch, and whether bits repeat.

    Args:
        case: a layer in a dtype.
        repeats: how often each pass is run by the kernels.
        only: the passes; all of them if empty.
    """
    name = case.layer.name
    row: dict[str, Any] = {"layer": name, "dtype": str(case.dtype), "errors": {}, "wrong": []}
    for which in only or case.passes:
        exact, eager = case.wide().run(which, PYTORCH), case.run(which, PYTORCH)
        actual = case.run(which, KERNELS)
        errors, wrong = compared(actual, eager, exact, case.dtype)
        row["errors"] |= {f"{which} {result}": error for result, error in errors.items()}
        row["wrong"] += [f"{name} {which} {fault}" for fault in wrong]
        for _ in range(repeats - 1):
            again = case.run(which, KERNELS)
            if not all(torch.equal(value, again[result]) for result, value in actual.items()):
                row["wrong"].append(f"{name} {which}: other bits in one of {repeats} runs")
                break
    return row


def time_case(case: Case, bandwidth: float | None) -> list[dict[str, Any]]:
    """Returns the milliseconds by each means, a row for each pass."""
    rows = []
    for which in case.passes:
        row = {
            "layer": case.layer.name,
            "pass": which,
            "least_bytes": case.layer.least_bytes(which, case.dtype.itemsize),
            "ms": {
                name: median_ms(form, case.x.device) for name, form in case.forms(which).items()
            },
        }
        add_ratios(row, bandwidth)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class GroupedLayer:
    """A grouped 3x3 convolution of a network, and how often the network has it."""

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

    @property
    def out_size(self) -> int:
        """Returns `H = W` of the output, in pixels."""
        return -(-self.size // self.stride)

    def least_bytes(self, _which: str, item: int) -> float:
        """Returns what a pass has to move: the map on each side of the convolution once."""
        pixels = self.batch * (self.size**2 + self.out_size**2)
        return item * pixels * self.groups * self.width


def stages(
    network: str, batch: int, groups: int, *rows: tuple[int, int, int]
) -> list[GroupedLayer]:
    """Returns the stages of a network, each `(D, size of its maps, blocks)`; all but the first
    begin with a block of stride 2."""
    layers = []
    for index, (width, size, blocks) in enumerate(rows):
        if index > 0:
            layers.append(GroupedLayer(network, batch, groups, width, rows[index - 1][1], 2, 1))
        layers.append(GroupedLayer(network, batch, groups, width, size, 1, blocks - (index > 0)))
    return layers


class GroupedCase(Case):
    """A grouped 3x3 convolution."""

    title = "grouped convolution"
    passes = ("forward", "input", "weight")
    layers = (
        *stages("ResNeXt-50 160px", 256, 32, (4, 40, 3), (8, 20, 4), (16, 10, 6), (32, 5, 3)),
        *stages("ResNeXt-50 224px", 256, 32, (4, 56, 3), (8, 28, 4), (16, 14, 6), (32, 7, 3)),
        *stages("CIFAR 20x6d", 512, 20, (6, 32, 3), (12, 16, 3), (24, 8, 3)),
        *stages("CIFAR 10x11d", 512, 10, (11, 32, 3), (22, 16, 3), (44, 8, 3)),
    )
    tiny = (GroupedLayer("tiny", 1, 4, 4, 2, 1, 2), GroupedLayer("tiny", 1, 2, 3, 2, 2, 1))

    def __init__(self, layer: GroupedLayer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layer, dtype, device)
        channels = layer.groups * layer.width
        weight = self._normal(channels, layer.width, 3, 3) / (9 * layer.width) ** 0.5
        self.x, self.weight = self._image(channels, layer.size), weight.to(dtype)
        self.grad = self._image(channels, layer.out_size)
        self.scale, self.bias = self._normal(channels), self._normal(channels)

    def run(self, which: str, passes: Passes) -> Results:
        """One pass by the kernels, or by PyTorch in the layout of the tensors."""
        kernels, stride, groups = passes.encoded(), self.layer.stride, self.layer.groups
        x, weight, grad = self.x, self.weight, self.grad
        if which == "forward":
            if passes == PYTORCH:
                return {"y": F.conv2d(x, weight, None, stride, 1, 1, groups)}
            plain = (None, None, stride, False, kernels)
            return {"y": conv3x3.grouped_conv3x3_operator(x, weight, *plain)[0]}
        needs = (which == "input", which == "weight")
        if passes == PYTORCH:
            sizes = (None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups)
            gradients = torch.ops.aten.convolution_backward(
                grad, x, weight, *sizes, [*needs, False]
            )
            return {which: gradients[0 if which == "input" else 1]}
        gradients = conv3x3.grouped_conv3x3_backward(
            grad, x, weight, *[None] * 5, stride, *needs, kernels
        )
        return {which: gradients[0 if which == "input" else 2]}

    def forms(self, which: str) -> Mapping[str, Callable[[], Results]]:
        """Beside the kernel PyTorch in both layouts, and with groups merged by zeros."""
        others: dict[str, GroupedCase] = {"NHWC": self, "NCHW": self.in_rows()}
        for width in (16, 32, 64):
            merged = self.merged(width)
            if merged is not None:
                others[f"merged to {width}"] = merged
        return {
            "kernel": lambda: self.run(which, KERNELS),
            **{
                name: lambda other=other: other.run(which, PYTORCH)
                for name, other in others.items()
            },
        }

    def in_rows(self) -> GroupedCase:
        """Returns the same in PyTorch's other layout, NCHW."""
        other = copy.copy(self)
        other.x, other.grad = self.x.contiguous(), self.grad.contiguous()
        return other

    def merged(self, width: int) -> GroupedCase | None:
        """Returns the same with groups merged into groups of `width` channels, the weight filled up
        with zeros; None where that does not go."""
        together = width // self.layer.width
        if together < 2 or width % self.layer.width or self.layer.groups % together:
            return None
        other = copy.copy(self)
        groups = self.layer.groups // together
        other.layer = GroupedLayer(**{**vars(self.layer), "groups": groups, "width": width})
        other.weight = merged_weight(self.weight, together, self.weight.dtype)
        return other

    def between_norms(self, backend: str) -> Callable[..., tuple[Tensor, ...]]:
        """Returns a pass between BatchNorms: the affine map and ReLU before, the statistics
        after."""

        def run(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            if backend == "triton":
                y, sums = grouped_conv3x3(
                    x,
                    weight,
                    self.layer.groups,
                    stride=self.layer.stride,
                    scale=self.scale,
                    bias=self.bias,
                    statistics=True,
                    backend="triton",
                )
                assert sums is not None
                return y, sums
            wide = x * self.scale[:, None, None] + self.bias[:, None, None]
            h = wide.relu().to(x.dtype)
            y = F.conv2d(h, weight, None, self.layer.stride, 1, 1, self.layer.groups)
            return y, *torch.var_mean(y.float(), (0, 2, 3), correction=0)

        return run


@dataclass(frozen=True)
class ProductLayer:
    """A 1x1 convolution of a network."""

    stage: str
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
        return f"{self.stage}: {kind} {self.inputs} to {self.outputs}, {self.size}px"

    def least_bytes(self, which: str, item: int) -> float:
        """Returns what a pass has to move: each map once, signs an eighth of a byte."""
        wide, narrow = {
            "forward": (3 + 1 / (8 * item) if self.join else 1, 1),
            "input": (3 + self.mapped + 1 / (8 * item) if self.join else 2, 2),
            "weight": (1, 2),
        }[which]
        return item * self.batch * self.size**2 * (wide * self.inputs + narrow * self.outputs)


def products(pixels: int, batch: int) -> list[ProductLayer]:
    """Returns the layers of ResNeXt-50 that the selection table names, on images of `pixels`."""
    sizes = {"32x4d c2": pixels // 4, "32x4d c3": pixels // 8}
    layers = [
        ProductLayer(stage, batch, *channels, sizes[stage], join=False)
        for stage, channels in conv1x1_rows.PAPER_CONVOLUTIONS.items()
    ]
    for stage, channels in conv1x1_rows.PAPER_JOINS.items():
        mapped = stage.endswith("mapped")
        layers.append(ProductLayer(stage, batch, *channels, sizes[stage[:8]], True, mapped))
    return layers


class ProductCase(Case):
    """A 1x1 convolution between BatchNorms, or behind the sum that ends a block."""

    title = "1x1 convolution"
    passes = ("forward", "input", "weight")
    layers = (*products(160, 256), *products(224, 256))
    tiny = (
        ProductLayer("tiny", 1, 16, 24, 3, False),
        ProductLayer("tiny", 1, 16, 8, 3, True, mapped=True),
    )

    def __init__(self, layer: ProductLayer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layer, dtype, device)
        weight = self._normal(layer.outputs, layer.inputs, 1, 1) / layer.inputs**0.5
        self.x, self.residual, self.grad_x = (
            self._image(layer.inputs, layer.size) for _ in range(3)
        )
        self.weight, self.grad = weight.to(dtype), self._image(layer.outputs, layer.size)
        self.vectors = [self._normal(layer.inputs) for _ in range(4 if layer.mapped else 2)]
        self.gain, self.curve, self.level = (self._normal(layer.outputs) for _ in range(3))
        # Half of a step's work is backward, from what forward left.
        self.out, self.y, self.signs = self.x, self.grad, None
        outputs = self._forward(PYTORCH)
        self.y, self.out = outputs["y"].to(dtype), outputs.get("x", self.x).to(dtype)
        if layer.join:
            self.signs = conv1x1.pack_signs(self.out)

    def run(self, which: str, passes: Passes) -> Results:
        if which == "forward":
            return self._forward(passes)
        return self._backward(passes, need_input=which == "input")

    def _forward(self, passes: Passes) -> Results:
        """Returns output, statistics, and of a join the block's output."""
        results: Results = {}
        if self.layer.join:
            maps = self.vectors[2:] if self.layer.mapped else [None, None]
            before = (self.x, *self.vectors[:2], self.residual, *maps)
            results["x"], y, partial, _ = conv1x1.join(
                *before, self.weight, True, passes.forward, passes
            )
        else:
            y, partial = conv1x1.forward(self.x, self.weight, *self.vectors, True, passes)
        assert partial is not None
        return results | {"y": y, "statistics": batch_norm.merged(partial, passes.forward)}

    def _backward(self, passes: Passes, *, need_input: bool) -> Results:
        """Returns the gradients of the input, with its sums, or that of the weight."""
        of_output = (self.grad, self.y)
        of_statistics = (self.curve, self.level)
        dtype = None if need_input else self.weight.dtype
        if self.layer.join:
            signs = self.signs if passes.input else None
            mapped = self.residual if self.layer.mapped else None
            saved = (self.grad_x, self.out, signs, self.x, mapped, self.weight, dtype, passes)
            gradients = conv1x1.join_backward(*of_output, *of_statistics, *saved)
        else:
            saved = (self.x, self.weight, *self.vectors, need_input, dtype, passes)
            gradients = conv1x1.backward(*of_output, self.gain, *of_statistics, *saved)
        if not need_input:
            assert gradients.weight is not None
            return {"weight": gradients.weight}
        assert gradients.input is not None
        assert gradients.sums is not None
        return {"input": gradients.input, "sums": gradients.sums.sum(0)}

    def plain(self, which: str) -> Callable[[], tuple[Tensor, ...]]:
        """Returns a pass as a compiler would be given it: products and elementwise operations."""

        def column(vector: Tensor) -> Tensor:
            return vector[:, None, None]

        def activated() -> Tensor:
            if self.layer.join and which != "forward":
                return self.out
            wide = self.x * column(self.vectors[0]) + column(self.vectors[1])
            if self.layer.mapped:
                wide = wide + (self.residual * column(self.vectors[2]) + column(self.vectors[3]))
            elif self.layer.join:
                wide = wide + self.residual
            return wide.relu().to(self.x.dtype)

        def run() -> tuple[Tensor, ...]:
            if which == "forward":
                x = activated()
                y = F.conv2d(x, self.weight)
                kept = (x,) if self.layer.join else ()
                return (*kept, y, *torch.var_mean(y.float(), (0, 2, 3), correction=0))
            wide = self.grad * column(self.gain) + self.y * column(self.curve) + column(self.level)
            grad = wide.to(self.grad.dtype)
            needs = [which == "input", which == "weight", False]
            sizes = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
            gradients = torch.ops.aten.convolution_backward(
                grad, activated(), self.weight, *sizes, needs
            )
            if which == "weight":
                return (gradients[1],)
            of_x = gradients[0].float()
            if self.layer.join:
                of_x = torch.where(self.out > 0, of_x + self.grad_x, 0.0)
            else:
                scale, bias = (column(vector) for vector in self.vectors)
                of_x = torch.where(self.x * scale + bias > 0, of_x, 0.0)
            sums = [of_x.sum((0, 2, 3)), (of_x * self.x).sum((0, 2, 3))]
            sums += [(of_x * self.residual).sum((0, 2, 3))] if self.layer.mapped else []
            if not self.layer.join:
                of_x = of_x * column(self.vectors[0])
            return (of_x.to(self.x.dtype), *sums)

        return run


@dataclass(frozen=True)
class RecomputedLayer:
    """The last convolution of a plain block, which is not stored, and the sum behind it."""

    stage: str
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
        return f"{self.stage}: {self.inputs} to {self.outputs}, {kind}, {self.size}px"

    def least_bytes(self, which: str, item: int) -> float:
        """Returns what a pass has to move: each map once, signs an eighth of a byte."""
        narrow, wide = {
            "statistics": (1, 0),
            "join": (1, 2 + 1 / (8 * item)),
            "sums": (1, 1),
            "gradient": (2, 1),
        }[which]
        return item * self.batch * self.size**2 * (narrow * self.inputs + wide * self.outputs)


def recomputed(pixels: int, batch: int) -> list[RecomputedLayer]:
    """Returns the layers of the plain stages of ResNeXt-50, on images of `pixels`."""
    sizes = {"32x4d c2": pixels // 4, "32x4d c3": pixels // 8}
    return [
        RecomputedLayer(stage, batch, *channels, sizes[stage], mapped)
        for stage, channels in conv1x1_rows.PAPER_CONVOLUTIONS.items()
        for mapped in (False, True)
    ]


class RecomputedCase(Case):
    """The end of a plain block: the moments of what is multiplied, the sum that ends the block, the
    sums of gradient and input over the pixels, and the gradient of the input."""

    title = "end of a block"
    passes = ("statistics", "join", "sums", "gradient")
    layers = (*recomputed(160, 256), *recomputed(224, 256))
    tiny = (RecomputedLayer("tiny", 1, 16, 24, 3, mapped=True),)

    def __init__(self, layer: RecomputedLayer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layer, dtype, device)
        self.x, self.residual, self.grad = (
            self._image(channels, layer.size)
            for channels in (layer.inputs, layer.outputs, layer.outputs)
        )
        weight = self._normal(layer.outputs, layer.inputs, 1, 1) / layer.inputs**0.5
        self.weight = weight.to(dtype)
        self.scale, self.bias = self._normal(layer.inputs), self._normal(layer.inputs)
        self.out_vectors = [self._normal(layer.outputs) for _ in range(4 if layer.mapped else 2)]
        self.of_output = [self._normal(layer.outputs) for _ in range(3)]
        self.grad_sums = self._normal(layer.outputs, layer.inputs)
        self.moments = self._statistics(PYTORCH)[1]

    def _statistics(self, passes: Passes) -> tuple[Tensor, Moments]:
        return statistics(self.x, self.scale, self.bias, self.weight, passes)

    def run(self, which: str, passes: Passes) -> Results:
        operands = (self.x, self.weight, self.scale, self.bias)
        if which == "statistics":
            (total,), moments = self._statistics(passes)
            return {"sum": total[1], "m2": total[2], **moments._asdict()}
        if which == "sums":
            return {"sums": product_sums(self.grad, *operands, passes)}
        if which == "gradient":
            gradients = backward(
                *(self.grad, *self.of_output, self.grad_sums, self.moments, *operands),
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
        assert signs is None or torch.equal(signs, conv1x1.pack_signs(joined))
        return {"joined": joined}


CASES: tuple[type[Case], ...] = (GroupedCase, ProductCase, RecomputedCase)
