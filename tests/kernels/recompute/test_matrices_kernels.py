"""The kernels on the matrices of a convolution that is not stored, against float64.

In Triton's interpreter; weights of 16 bits are numbers of theirs, and all else is float32.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.cases.recompute import BOTH, moments_of
from support.guarded_memory import guarded_memory
from support.helpers import relative_error
from torch import Tensor

from coded_resnext.kernels.batch_norm import launch as batch_norm
from coded_resnext.kernels.layout import interpreted
from coded_resnext.kernels.recompute import launch

# Of products of float32 that are summed in float32, and of what is rounded to float16 at the end.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-4}
SIZES = [(1, 1), (7, 5), (16, 16), (40, 136), (128, 24)]
SIZES += [pytest.param(200, 72, marks=pytest.mark.long)]
PIXELS = 93


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"


def given(inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight, moments of rectified numbers, and vectors."""
    generator = torch.Generator().manual_seed(inputs + 7 * outputs)
    a = torch.randn(PIXELS, inputs, generator=generator).relu()
    grad = torch.randn(PIXELS, outputs, generator=generator)
    mean, scatter = moments_of(a.double().T[None, :, :, None])
    weight = torch.randn(outputs, inputs, 1, 1, generator=generator) / math.sqrt(inputs)
    vectors = torch.randn(4, outputs, generator=generator)
    return {
        "weight": weight.to(dtype),
        "mean": mean.float(),
        "scatter": scatter.float(),
        "of_product": grad.T @ a,
        **dict(zip(("of_bias", "gain", "curve", "level"), vectors, strict=True)),
    }


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_statistics_of_a_product(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    has = given(inputs, outputs, dtype)
    with guarded_memory():
        statistics, spread = launch.product_statistics(
            has["weight"], has["mean"], has["scatter"], PIXELS
        )
    weight, scatter = has["weight"].flatten(1).double(), has["scatter"].double()
    sums = PIXELS * weight @ has["mean"].double()
    m2 = (weight @ scatter * weight).sum(1)
    assert torch.equal(statistics[0, 0], torch.full((outputs,), float(PIXELS)))
    assert relative_error(statistics[0, 1].double(), sums) < 1e-6
    assert relative_error(statistics[0, 2].double(), m2) < 1e-6
    assert relative_error(spread.double(), weight @ scatter) < 1e-6


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_batch_norm_of_a_product(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """In the launch that has its statistics, and in that of the weight's gradient; the running
    statistics with it."""
    has = given(inputs, outputs, dtype)
    names = ("weight", "mean", "scatter")
    statistics, spread = launch.product_statistics(*(has[name] for name in names), PIXELS)
    own, of_bias = (has["gain"], has["level"]), has["of_bias"]
    running = [torch.ones(outputs) for _ in range(2)]
    counter = torch.tensor(7)
    norm = batch_norm.Norm(*own, 1e-3, batch_norm.Running(*running, counter, 0.25))
    with guarded_memory():
        made, again = launch.product_norm(*(has[name] for name in names), norm, PIXELS)
        gradients, matrices = launch.norm_gradients(
            of_bias,
            *(has[name] for name in ("of_product", "weight")),
            spread,
            has["mean"],
            made,
            PIXELS,
            torch.float32,
        )
    assert torch.equal(again, spread)
    wide = batch_norm.Norm(*(each.double() for each in own), 1e-3)
    expected = batch_norm.forward(statistics.double(), wide, False)
    for one, other in zip(made, expected, strict=True):
        assert relative_error(one.double(), other) < 2e-6
    for one, place in zip(running, (0, 2), strict=True):
        assert relative_error(one.double(), 0.75 + 0.25 * expected.moments[place]) < 2e-6
    assert counter == 8
    weight, of_product = has["weight"].flatten(1).double(), has["of_product"].double()
    sums = torch.stack([of_bias.double(), (of_product * weight).sum(1)])[None]
    of_norm = batch_norm.backward(sums, expected, False)
    for one, other in zip(gradients, of_norm, strict=True):
        assert relative_error(one.double(), other) < 4e-6
    of_y = (expected.map[1], of_norm.curve, of_norm.level)
    of_sum = of_norm.level + of_norm.curve * (weight @ has["mean"].double())
    of_weight = of_y[0][:, None] * of_product + of_y[1][:, None] * spread.double()
    of_weight += PIXELS * torch.outer(of_sum, has["mean"].double())
    assert relative_error(matrices[0].flatten(1).double(), of_weight) < 4e-6
    assert relative_error(matrices[1].double(), of_y[0][:, None] * weight) < TOLERANCES[dtype]


def test_a_sum_of_squares_is_not_negative() -> None:
    """Rows of the weight that are orthogonal to all that varies, up to rounding."""
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    scatter = torch.outer(direction, direction)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    weight -= torch.outer(weight @ direction, direction) / direction.dot(direction)
    assert ((weight @ scatter) * weight).sum(1).min() < 0
    statistics, _ = launch.product_statistics(weight[:, :, None, None], direction, scatter, PIXELS)
    assert statistics[0, 2].min() >= 0


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_gradients_of_a_product(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Those of the map behind it, of its weight, and what the gradient of its input takes."""
    has = given(inputs, outputs, dtype)
    wide = {name: value.double() for name, value in has.items()}
    weight, gain, curve = wide["weight"].flatten(1), wide["gain"][:, None], wide["curve"][:, None]
    spread = (weight @ wide["scatter"]).float()
    with guarded_memory():
        of_map = launch.map_gradients(has["of_bias"], has["of_product"], has["weight"])
        dweight, scaled = launch.weight_gradients(
            *(has[name] for name in ("of_product", "weight")),
            spread,
            *(has[name] for name in ("mean", "gain", "curve", "level")),
            PIXELS,
            torch.float32,
        )
        square, shift = launch.moments_gradients(has["weight"], has["curve"], has["level"])
    assert torch.equal(of_map[0, 0], has["of_bias"])
    of_scale = (wide["of_product"] * weight).sum(1)
    assert relative_error(of_map[0, 1].double(), of_scale) < 1e-6
    of_sum = wide["level"] + wide["curve"] * (weight @ wide["mean"])
    expected = gain * wide["of_product"] + curve * spread.double()
    expected += PIXELS * torch.outer(of_sum, wide["mean"])
    assert dweight.shape == has["weight"].shape
    assert relative_error(dweight.flatten(1).double(), expected) < 1e-6
    assert scaled.dtype == dtype
    assert relative_error(scaled.double(), gain * weight) < TOLERANCES[dtype]
    assert square.dtype == torch.float32
    assert relative_error(square.double(), weight.T @ (curve * weight)) < 2e-6
    assert relative_error(shift.double(), wide["level"] @ weight) < 1e-6
