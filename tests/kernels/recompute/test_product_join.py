"""A convolution that is not written, its BatchNorm, and the join that computes it: the operators
against the same written out, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.helpers import needs_triton, relative_error
from torch import Tensor, nn

from coded_resnext.kernels import layout
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.conv1x1.join_operator import pack_signs
from coded_resnext.kernels.recompute.moments_operator import (
    recomputed_conv1x1,
    recomputed_conv1x1_backward,
)
from coded_resnext.kernels.recompute.operator import product_join, product_sums
from coded_resnext.kernels.residual import reference as residual_reference
from coded_resnext.kernels.rows import NO_PASSES, Passes
from coded_resnext.models.fused.norm import affine_of

EVERY = Passes(True, True, True, True).encoded()
PYTORCH = NO_PASSES.encoded()


@dataclass(frozen=True)
class Case:
    """`I` channels to `O`, and of the next convolution to `P`, on `B` maps of `H x W`."""

    name: str
    I: int = 8  # noqa: E741
    O: int = 16  # noqa: E741
    P: int | None = 8
    B: int = 2
    H: int = 3
    W: int = 4
    mapped: bool = False
    """Whether the residual has a map, whose factor its gradient then lacks."""
    projected: bool = False
    """Whether the residual is a convolution of 5 channels with a BatchNorm, not written either."""
    statistics: bool = True
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
        if self.projected:
            actual["residual"] = normal(self.B, 5, self.H, self.W).to(dtype)
            actual["residual_weight"] = normal(self.O, 5, 1, 1).to(dtype)
            actual |= {"residual_gain": vector(self.O, 1.0), "residual_shift": vector(self.O)}
        if self.P is not None:
            actual["next_weight"] = (normal(self.P, self.O, 1, 1) / math.sqrt(self.O)).to(dtype)
        # Away from the kink of the ReLU, on whose other side rounding would put an element.
        if not self.projected:
            before, factor = _before_relu(actual)
            apart = torch.where(before > 0, 0.1, -0.1) / factor
            actual["residual"] = (actual["residual"].double() + apart).to(dtype)
        return actual

    def gradients(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those of the outputs: the joined map, the next convolution, its statistics."""
        generator = torch.Generator().manual_seed(1)
        joined = torch.randn(self.B, self.O, self.H, self.W, generator=generator)
        if self.P is None:
            return {"joined": joined.to(dtype)}
        z = torch.randn(self.B, self.P, self.H, self.W, generator=generator)
        # Means of gradients are small. The count has none.
        of_statistics = 0.2 * torch.randn(3, self.P, generator=generator)
        of_statistics[0] = 0
        actual = {"joined": joined.to(dtype), "z": z.to(dtype)}
        wide = layout.accumulation_dtype(dtype)
        return actual | ({"statistics": of_statistics.to(wide)} if self.statistics else {})


def _column(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


def _before_relu(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the ReLU that ends the block is applied to, and the factor of the residual in it."""
    h = torch.relu(_column(inputs["x_scale"]) * inputs["x"] + _column(inputs["x_bias"]))
    y = F.conv2d(h.to(inputs["x"].dtype).double(), inputs["weight"].double())
    wide = {name: inputs[name].double() for name in ("gain", "shift")}
    normed = F.batch_norm(y, None, None, wide["gain"], wide["shift"], training=True)
    factor, residual = torch.ones(()), inputs["residual"].double()
    if "residual_scale" in inputs:
        factor = _column(inputs["residual_scale"])
        residual = factor * residual + _column(inputs["residual_bias"])
    return normed + residual, factor


CASES = [
    Case("odd", I=7, O=9, P=5),
    Case("identity"),
    Case("mapped", mapped=True),
    Case("last", P=None),
    Case("last, mapped", P=None, mapped=True),
    Case("frozen behind", statistics=False),
    Case("projected", projected=True),
    Case("last, projected", P=None, projected=True),
    Case("more outputs than pixels", I=8, O=24, B=1, H=2),
]


def called(case: Case, inputs: dict[str, Tensor], kernels: int) -> dict[str, Tensor]:
    """Outputs, running statistics and all gradients by the operators."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    given = case.gradients(inputs["x"].dtype)
    x = [leaves[name] for name in ("x", "x_scale", "x_bias")]
    handle, sums_handle, statistics, _, _ = recomputed_conv1x1(
        x[0], leaves["weight"], *x[1:], kernels
    )
    bn = nn.BatchNorm2d(case.O, dtype=statistics.dtype)
    bn.weight, bn.bias = nn.Parameter(leaves["gain"]), nn.Parameter(leaves["shift"])
    count = case.B * case.H * case.W
    affine = affine_of(bn, statistics, count, deferred=True)
    residual_map = (leaves.get("residual_scale"), leaves.get("residual_bias"))
    # BatchNorms make leaves of their own.
    norms = {"gain": bn.weight, "shift": bn.bias}
    convolution = (None, None, None)
    if case.projected:
        weight = leaves["residual_weight"]
        actual = recomputed_conv1x1(leaves["residual"], weight, None, None, kernels)
        other = nn.BatchNorm2d(case.O, dtype=statistics.dtype)
        other.weight = nn.Parameter(leaves["residual_gain"])
        other.bias = nn.Parameter(leaves["residual_shift"])
        norms |= {"residual_gain": other.weight, "residual_shift": other.bias}
        residual_map = affine_of(other, actual[2], count, deferred=True)
        convolution = (*actual[:2], weight)
    keep_signs = case.P is not None and case.O % 8 == 0
    joined, z, of_z, signs = product_join(
        handle,
        sums_handle,
        *x,
        leaves["weight"],
        *affine,
        leaves["residual"],
        *residual_map,
        *convolution,
        leaves.get("next_weight"),
        case.statistics,
        keep_signs,
        kernels,
        kernels,
    )
    assert torch.equal(signs, pack_signs(joined) if keep_signs else signs[:0])
    outputs = {name: {"joined": joined, "z": z, "statistics": of_z}[name] for name in given}
    targets = leaves | norms
    actual = torch.autograd.grad(
        list(outputs.values()), list(targets.values()), list(given.values())
    )
    results = {name: value.detach() for name, value in outputs.items()}
    results |= {"recomputed statistics": statistics.detach()}
    results |= {"running mean": bn.running_mean, "running variance": bn.running_var}
    return results | {f"grad_{name}": g for name, g in zip(targets, actual, strict=True)}


def defined(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `called` is to give. What a product takes is rounded, which has no gradient."""
    dtype = inputs["x"].dtype
    wide = {name: value.double().requires_grad_() for name, value in inputs.items()}
    given = {name: value.double() for name, value in case.gradients(dtype).items()}

    def rounded(h: Tensor) -> Tensor:
        return h + (h.detach().to(dtype).double() - h.detach())

    def column(name: str) -> Tensor:
        return wide[name][:, None, None]

    h = rounded(torch.relu(column("x_scale") * wide["x"] + column("x_bias")))
    y = F.conv2d(h, wide["weight"])
    mean, variance = torch.zeros(case.O).double(), torch.ones(case.O).double()
    normed = F.batch_norm(y, mean, variance, wide["gain"], wide["shift"], training=True)
    residual = wide["residual"]
    if case.mapped:
        residual = column("residual_scale") * residual + column("residual_bias")
    if case.projected:
        residual = F.conv2d(residual, wide["residual_weight"])
        vectors = (wide["residual_gain"], wide["residual_shift"])
        residual = F.batch_norm(residual, None, None, *vectors, training=True)
    joined = rounded(torch.relu(normed + residual))
    results = {"joined": joined}
    if case.P is not None:
        results["z"] = F.conv2d(joined, wide["next_weight"])
        results["statistics"] = residual_reference.channel_statistics(results["z"])
    results = {name: results[name] for name in given}
    targets = list(wide.values())
    actual = torch.autograd.grad(list(results.values()), targets, list(given.values()))
    results |= {"recomputed statistics": residual_reference.channel_statistics(y)}
    results |= {"running mean": mean, "running variance": variance}
    results |= {f"grad_{name}": g for name, g in zip(wide, actual, strict=True)}
    if case.mapped:
        results["grad_residual"] = results["grad_residual"] / column("residual_scale")
    return {name: value.detach() for name, value in results.items()}


def compare(case: Case, dtype: torch.dtype, kernels: int, tolerance: float) -> None:
    inputs = case.inputs(dtype)
    actual, expected = called(case, inputs, kernels), defined(case, inputs)
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name].double(), expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


# The sum of a projected case cannot be kept away from the kink, on which rounding then decides.
ROUNDED = [case for case in CASES if not case.projected]
BY_DTYPE = {torch.float64: CASES, torch.float32: CASES, torch.bfloat16: ROUNDED}


@pytest.mark.parametrize(
    ("dtype", "case"),
    [(dtype, case) for dtype, cases in BY_DTYPE.items() for case in cases],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_equals_what_is_written_out(dtype: torch.dtype, case: Case) -> None:
    # bfloat16 rounds the gradients that enter a product, of which differences remain.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    compare(case, dtype, PYTORCH, tolerance)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_what_is_written_out(case: Case) -> None:
    compare(case, torch.float32, EVERY, 1e-5)


def test_statistics_of_a_large_mean() -> None:
    """A mean of 1000 spreads: of sums of squares, in float32, nothing would remain."""
    case = Case("far", I=16, O=8, B=4, H=9, W=9, mean=1000.0)
    inputs = case.inputs(torch.float32)
    x = [inputs[name] for name in ("x", "x_scale", "x_bias")]
    actual = recomputed_conv1x1(x[0], inputs["weight"], *x[1:], PYTORCH)[2]
    expected = defined(case, inputs)["recomputed statistics"]
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


def test_what_is_not_written_has_no_memory() -> None:
    inputs = Case("place").inputs(torch.float32)
    handle, sums_handle, _, _, _ = recomputed_conv1x1(
        inputs["x"], inputs["weight"], inputs["x_scale"], inputs["x_bias"], PYTORCH
    )
    assert handle.shape == inputs["residual"].shape
    assert sums_handle.shape == inputs["weight"].shape[:2]
    assert handle.untyped_storage().nbytes() == sums_handle.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("kind", ["identity", "mapped", "projected"])
def test_registered_as_pytorch_wants_it(kind: str) -> None:
    case = Case("registered", mapped=kind == "mapped", P=None if kind == "identity" else 8)
    inputs = {name: v.requires_grad_() for name, v in case.inputs(torch.float32).items()}
    x, weight, scale, bias = (inputs[name] for name in ("x", "weight", "x_scale", "x_bias"))
    if kind == "projected":
        scale, bias = None, None
    torch.library.opcheck(recomputed_conv1x1, (x, weight, scale, bias, PYTORCH))
    places = [value.detach() for value in recomputed_conv1x1(x, weight, scale, bias, PYTORCH)]
    grad, x, weight = (v.detach() for v in (inputs["residual"], x, weight))
    maps = [None if v is None else v.detach() for v in (scale, bias)]
    saved, wanted = (x, weight, *maps, *places[3:]), kind != "mapped"
    gradients = (grad, weight.flatten(1), places[2])
    torch.library.opcheck(recomputed_conv1x1_backward, (*gradients, *saved, wanted, PYTORCH))
    torch.library.opcheck(product_sums, (grad, x, weight, *maps, PYTORCH))
    names = ("x", "x_scale", "x_bias", "weight", "gain", "shift")
    own = (*(value.requires_grad_() for value in places[:2]), *(inputs[name] for name in names))
    residual = [inputs.get(n) for n in ("residual", "residual_scale", "residual_bias")]
    convolution: list[Tensor | None] = [None, None, None]
    if kind == "projected":
        residual = [x, inputs["gain"], inputs["shift"]]
        convolution = [*own[:2], inputs["weight"]]
    options = (inputs.get("next_weight"), True, kind == "mapped", PYTORCH, PYTORCH)
    torch.library.opcheck(product_join, (*own, *residual, *convolution, *options))
