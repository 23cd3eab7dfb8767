"""The pointwise kernels at the end of a residual block, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from support.guarded_memory import guarded_memory
from support.helpers import relative_error
from torch import Tensor

from coded_resnext.kernels.affine import add_statistics_gradient
from coded_resnext.kernels.batch_norm import launch as batch_norm_launch
from coded_resnext.kernels.layout import interpreted
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.residual import rows as residual_rows

# One rounding of the results; their sums are those of what was computed before it.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Parts have 256 rows, tiles 16 rows and up to 128 channels.
SHAPES = {
    "one element": (1, 1, 1, 1),
    "one part": (2, 16, 8, 16),
    "a row more": (1, 24, 1, 257),
    "odd": (3, 7, 5, 19),
    "channels end inside a tile": (2, 200, 3, 3),
    "several parts": (3, 40, 14, 15),
}
CASES = {name: (shape, torch.float32) for name, shape in SHAPES.items()}
CASES |= {f"odd {dtype}": (SHAPES["odd"], dtype) for dtype in TOLERANCES}


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, mapped: bool) -> dict[str, Tensor | None]:
    """The arguments of a join; vectors are float32."""
    channels = shape[1]
    actual: dict[str, Tensor | None] = {
        "y": normal(*shape, seed=1).to(dtype).contiguous(memory_format=torch.channels_last),
        "scale": normal(channels, seed=2).float(),
        "bias": normal(channels, seed=3).float(),
        "residual": normal(*shape, seed=4).to(dtype),
    }
    vectors = (normal(channels, seed=seed).float() if mapped else None for seed in (5, 6))
    return actual | dict(zip(("residual_scale", "residual_bias"), vectors, strict=True))


def by_definition(inputs: dict[str, Tensor | None]) -> Tensor:
    wide = [None if value is None else value.double() for value in inputs.values()]
    return residual_launch.reference(*wide)  # type: ignore[arg-type]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = relative_error(actual.double(), expected)
    assert error < tolerance, error


@pytest.mark.parametrize("mapped", [False, True], ids=["identity", "mapped"])
@pytest.mark.parametrize(("shape", "dtype"), CASES.values(), ids=CASES)
def test_forward(shape: tuple[int, ...], mapped: bool, dtype: torch.dtype) -> None:
    inputs = inputs_of(shape, dtype, mapped)
    # Shows a missing store, and one outside.
    with guarded_memory():
        x = residual_launch.forward(*inputs.values(), kernels=True)
        assert torch.equal(x, residual_launch.forward(*inputs.values(), kernels=True))
    assert x.dtype == dtype
    assert_near(x, by_definition(inputs), TOLERANCES[dtype])
    by_pytorch = residual_launch.forward(*inputs.values(), kernels=False)
    assert_near(by_pytorch, by_definition(inputs), TOLERANCES[dtype])
    assert x.stride() == by_pytorch.stride()


@pytest.mark.parametrize("mapped", [False, True], ids=["identity", "mapped"])
@pytest.mark.parametrize(("shape", "dtype"), CASES.values(), ids=CASES)
def test_backward(shape: tuple[int, ...], mapped: bool, dtype: torch.dtype) -> None:
    inputs = inputs_of(shape, dtype, mapped)
    y, residual = inputs["y"], inputs["residual"] if mapped else None
    x, grad = by_definition(inputs).to(dtype), normal(*shape, seed=7).to(dtype)
    assert y is not None
    g = torch.where(x > 0, grad, 0.0).double()
    factors = [torch.ones_like(g), y.double(), *([] if residual is None else [residual.double()])]
    sums = torch.stack([(g * factor).sum((0, 2, 3)) for factor in factors])
    with guarded_memory():
        actual = residual_launch.backward(grad, x, y, residual, kernels=True)
        again = residual_launch.backward(grad, x, y, residual, kernels=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    for by in (actual, residual_launch.backward(grad, x, y, residual, kernels=False)):
        assert by[0].dtype == dtype
        assert by[1].dtype == torch.float32
        # Nothing of a gradient is rounded: it is there or not.
        assert torch.equal(by[0].double(), g)
        assert_near(by[1].sum(0), sums, 1e-6)


def test_a_nan_stays_one() -> None:
    """And only in its pixel; its gradient is 0 as PyTorch's is, since NaN is not above 0."""
    inputs = inputs_of((1, 8, 2, 3), torch.float32, mapped=True)
    for name in ("y", "residual"):
        changed = inputs[name].clone()  # type: ignore[union-attr]
        changed[0, 5, 1, 2] = torch.nan
        x = residual_launch.forward(*(inputs | {name: changed}).values(), kernels=True)
        assert x.isnan().sum() == 1
        assert x[0, 5, 1, 2].isnan()


@pytest.mark.parametrize("mean", [0.0, 3000.0])
@pytest.mark.parametrize(("shape", "dtype"), CASES.values(), ids=CASES)
def test_statistics(shape: tuple[int, ...], mean: float, dtype: torch.dtype) -> None:
    """The spread remains where the mean is 3000 times as large; of squares it would be nothing.

    A part's sum is rounded to float32, and with it its mean, here by 2e-4 of the spread; means of
    parts lie some 6 % of the spread apart.
    """
    y = (mean + normal(*shape, seed=8)).to(dtype)
    with guarded_memory():
        actual = batch_norm_launch.merged(residual_launch.statistics(y, kernels=True), True)
        again = batch_norm_launch.merged(residual_launch.statistics(y, kernels=True), True)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, again)
    expected = residual_launch.reference_statistics(y.double())
    count, total, m2 = expected
    assert torch.equal(actual[0], count.float())
    assert_near(actual[2], m2, 2e-5 if mean else 1e-6)
    # A mean near 0 is known as well as the values that it is the mean of.
    size = (y.double().square().sum((0, 2, 3)) / count).sqrt()
    assert ((actual[1] - total).abs() < 1e-6 * count * size).all()


def test_statistics_of_constants_and_of_nan() -> None:
    y = torch.full((2, 3, 9, 9), 1 / 3)
    y[:, 1] = 0.0
    y[1, 2, 8, 8] = torch.nan
    count, total, m2 = batch_norm_launch.merged(residual_launch.statistics(y, kernels=True), True)
    assert torch.equal(count, torch.full((3,), 162.0))
    assert_near(total[:2], torch.tensor([54.0, 0.0]).double(), 1e-6)
    assert torch.equal(m2[:2], torch.zeros(2))
    assert total[2].isnan()
    assert m2[2].isnan()


def test_parts_cover_the_rows() -> None:
    """Also of maps that no test can hold: as many parts as are needed, and no more."""
    size = residual_rows.ROWS * residual_rows.TRIPS
    for rows in (1, size - 1, size, size + 1, 10**7, 2**31 - 1):
        parts = residual_rows.parts_of(rows)
        assert (parts - 1) * size < rows <= parts * size


@pytest.mark.parametrize("terms", ["gain", "statistics", "both"])
@pytest.mark.parametrize(("shape", "dtype"), CASES.values(), ids=CASES)
def test_output_gradient(shape: tuple[int, ...], dtype: torch.dtype, terms: str) -> None:
    grad, y = (normal(*shape, seed=seed).to(dtype) for seed in (1, 2))
    gain, curve, level = (normal(shape[1], seed=seed).float() for seed in (3, 4, 5))
    given = (
        None if terms == "gain" else y,
        None if terms == "statistics" else gain,
        *((None, None) if terms == "gain" else (curve, level)),
    )
    expected = add_statistics_gradient(
        grad.double(), *(None if value is None else value.double() for value in given)
    )
    with guarded_memory():
        actual = residual_launch.output_gradient(grad, *given, kernels=True)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_near(actual, expected, TOLERANCES[dtype])
