"""A convolution that is not written, its BatchNorm, and the sum that computes it, against the same
written out, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.helpers import needs_triton, relative_error
from torch import Tensor

from coded_resnext.kernels import layout
from coded_resnext.kernels.batch_norm import launch as batch_norm
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.conv1x1.convolution import pack_signs
from coded_resnext.kernels.recompute import convolution
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import NO_PASSES, Passes

EVERY = Passes(True, True, True, True)


@dataclass(frozen=True)
class Case:
    """`I` channels to `O` on `B` maps of `H x W`."""

    name: str
    I: int = 8  # noqa: E741
    O: int = 16  # noqa: E741
    B: int = 2
    H: int = 3
    W: int = 4
    mapped: bool = False
    """Whether the residual has a map, whose factor its gradient then lacks."""
    frozen: bool = False
    """Whether BatchNorm uses running statistics."""
    mean: float = 0.0
    """Of `x`, whose spread is 1."""

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that have gradients; vectors in the accumulation dtype."""
        generator = torch.Generator().manual_seed(self.I * self.O)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def vector(channels: int, mean: float = 0.0) -> Tensor:
            return (mean + 0.3 * normal(channels)).to(layout.accumulation_dtype(dtype))

        maps = (self.B, self.O, self.H, self.W)
        actual = {
            "x": (self.mean + normal(self.B, self.I, self.H, self.W)).to(dtype),
            "x_scale": vector(self.I, 1.0),
            "x_bias": vector(self.I),
            "weight": (normal(self.O, self.I, 1, 1) / math.sqrt(self.I)).to(dtype),
            "gain": vector(self.O, 1.0),
            "shift": vector(self.O),
            "residual": normal(*maps).to(dtype),
        }
        if self.mapped:
            actual |= {"residual_scale": vector(self.O, 1.0), "residual_bias": vector(self.O)}
        # Away from the kink of the ReLU, on whose other side rounding would put an element.
        before, factor = _before_relu(actual, frozen=self.frozen)
        apart = torch.where(before > 0, 0.1, -0.1) / factor
        actual["residual"] = (actual["residual"].double() + apart).to(dtype)
        return actual

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """That of the sum."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.B, self.O, self.H, self.W, generator=generator).to(dtype)


def _column(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


def _normalised(y: Tensor, gain: Tensor, shift: Tensor, frozen: bool) -> Tensor:
    """BatchNorm by the batch's statistics, or by a mean of 0.1 and a variance of 2."""
    running = torch.tensor([0.1, 2.0]).double().expand(y.shape[1], 2).unbind(1) if frozen else None
    return F.batch_norm(y, *(running or (None, None)), gain, shift, training=not frozen)


def _before_relu(inputs: dict[str, Tensor], *, frozen: bool) -> tuple[Tensor, Tensor]:
    """What the ReLU that ends the block is applied to, and the factor of the residual in it."""
    h = torch.relu(_column(inputs["x_scale"]) * inputs["x"] + _column(inputs["x_bias"]))
    y = F.conv2d(h.to(inputs["x"].dtype).double(), inputs["weight"].double())
    wide = {name: inputs[name].double() for name in ("gain", "shift")}
    normed = _normalised(y, wide["gain"], wide["shift"], frozen)
    factor, residual = torch.ones(()), inputs["residual"].double()
    if "residual_scale" in inputs:
        factor = _column(inputs["residual_scale"])
        residual = factor * residual + _column(inputs["residual_bias"])
    return normed + residual, factor


CASES = [
    Case("odd", I=7, O=9),
    Case("identity"),
    Case("mapped", mapped=True),
    Case("frozen", frozen=True),
    Case("frozen, mapped", frozen=True, mapped=True),
    Case("more outputs than pixels", I=8, O=24, B=1, H=2),
]


def called(case: Case, inputs: dict[str, Tensor], passes: Passes) -> dict[str, Tensor]:
    """The sum, the statistics of the product, and all gradients, by what a block is made of."""
    x, before = inputs["x"], (inputs["x_scale"], inputs["x_bias"])
    weight, gain, shift = (inputs[name] for name in ("weight", "gain", "shift"))
    kernels = passes.pointwise
    results, moments = {}, None
    if case.frozen:
        running = torch.tensor([0.1, 2.0]).to(gain).expand(case.O, 2).unbind(1)
        norm = batch_norm.by_running_statistics(*running, gain, shift, 1e-5)
    else:
        partial, moments = convolution.statistics(x, *before, weight, passes)
        norm = batch_norm.forward(partial, batch_norm.Norm(gain, shift, 1e-5), kernels)
        results["statistics"] = partial[0]
    residual = (inputs["residual"], inputs.get("residual_scale"), inputs.get("residual_bias"))
    keep_signs = case.O % 8 == 0
    joined, signs = convolution.join(
        x, *before, weight, *norm.affine, *residual, keep_signs, passes
    )
    assert (signs is not None) == keep_signs
    assert signs is None or torch.equal(signs, pack_signs(joined))
    mapped = residual[0] if case.mapped else None
    g, sums = residual_launch.backward(case.gradient(x.dtype), joined, None, mapped, kernels)
    of_bias, *of_residual = sums.sum(0)
    of_product = convolution.product_sums(g, x, weight, *before, passes)
    of_map = convolution.map_gradients(of_bias, of_product, weight, passes)
    own = batch_norm.backward(of_map, norm, kernels)
    statistics = (None, None) if case.frozen else (own.curve, own.level)
    gradients = convolution.backward(
        *(g, norm.map[1], *statistics, of_product, moments, x, weight, *before),
        *(True, weight.dtype, passes),
    )
    assert gradients.input is not None
    assert gradients.sums is not None
    assert gradients.weight is not None
    of_x_bias, of_x_scale = gradients.sums.sum(0)
    results |= {"joined": joined, "grad_x": gradients.input, "grad_x_scale": of_x_scale}
    results |= {"grad_x_bias": of_x_bias, "grad_weight": gradients.weight, "grad_residual": g}
    results |= {"grad_gain": own.weight, "grad_shift": own.bias}
    if case.mapped:
        results |= {"grad_residual_scale": of_residual[0], "grad_residual_bias": of_bias}
    return results


def defined(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `called` is to give. What a product takes is rounded, which has no gradient."""
    dtype = inputs["x"].dtype
    wide = {name: value.double().requires_grad_() for name, value in inputs.items()}

    def rounded(h: Tensor) -> Tensor:
        return h + (h.detach().to(dtype).double() - h.detach())

    def column(name: str) -> Tensor:
        return wide[name][:, None, None]

    h = rounded(torch.relu(column("x_scale") * wide["x"] + column("x_bias")))
    y = F.conv2d(h, wide["weight"])
    residual = wide["residual"]
    if case.mapped:
        residual = column("residual_scale") * residual + column("residual_bias")
    normed = _normalised(y, wide["gain"], wide["shift"], case.frozen)
    joined = rounded(torch.relu(normed + residual))
    grads = torch.autograd.grad(joined, list(wide.values()), case.gradient(dtype).double())
    results = {"joined": joined}
    if not case.frozen:
        results["statistics"] = residual_launch.reference_statistics(y)
    results |= {f"grad_{name}": g for name, g in zip(wide, grads, strict=True)}
    if case.mapped:
        # The gradient of the residual as it is mapped.
        results["grad_residual"] = results["grad_residual"] / column("residual_scale")
    return {name: value.detach() for name, value in results.items()}


def compare(case: Case, dtype: torch.dtype, passes: Passes, tolerance: float) -> None:
    inputs = case.inputs(dtype)
    actual, expected = called(case, inputs, passes), defined(case, inputs)
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name].double(), expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_what_is_written_out(case: Case, dtype: torch.dtype) -> None:
    # bfloat16 rounds the gradients that enter a product, of which differences remain.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    compare(case, dtype, NO_PASSES, tolerance)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_what_is_written_out(case: Case) -> None:
    compare(case, torch.float32, EVERY, 1e-5)


def test_statistics_of_a_large_mean() -> None:
    """A mean of 1000 spreads: of sums of squares, in float32, nothing would remain."""
    case = Case("far", I=16, O=8, B=4, H=9, W=9, mean=1000.0)
    inputs = case.inputs(torch.float32)
    x = [inputs[name] for name in ("x", "x_scale", "x_bias")]
    (actual,), _ = convolution.statistics(*x, inputs["weight"], NO_PASSES)
    expected = defined(case, inputs)["statistics"]
    assert relative_error(actual[2].double(), expected[2]) < 1e-4
    h = torch.relu(x[1][:, None, None] * x[0] + x[2][:, None, None])
    y = F.conv2d(h, inputs["weight"])
    naive = y.square().sum((0, 2, 3)) - y.sum((0, 2, 3)).square() / actual[0]
    assert relative_error(naive.double(), expected[2]) > 1e-2


def test_autocast_does_not_round_sums() -> None:
    """Where a backward pass runs inside it."""
    x = torch.rand(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    plain = [conv1x1_library.wide_sums(x, x), *conv1x1_library.moments(x)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = [conv1x1_library.wide_sums(x, x), *conv1x1_library.moments(x)]
    for a, b in zip(actual, plain, strict=True):
        assert a.dtype == torch.float32
        # Autocast is off inside: the same instructions on the same data.
        assert torch.equal(a, b)


def test_tiny_gradients_in_float16() -> None:
    """The matrix of the curves has numbers that float16 does not hold; what it adds remains."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(8, 8, generator=generator) * 1e-9
    square = square + square.t()
    x = torch.rand(2, 8, 3, 3, generator=generator).half()
    nothing = torch.zeros(2, 4, 3, 3).half()
    actual = conv1x1_library.moments_gradient(
        nothing, torch.zeros(4, 8), square * 1e4, torch.zeros(8), x
    )
    expected = torch.einsum("ij,bjhw->bihw", square.double() * 1e4, x.double())
    assert relative_error(actual.double(), expected) < 1e-2
