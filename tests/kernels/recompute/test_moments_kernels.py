"""The kernel for the moments of activations, in Triton's interpreter, against float64."""

from __future__ import annotations

import os

import pytest
import torch
from support.cases.recompute import BOTH, CASES, Case, check_moments, moments_of
from support.helpers import relative_error
from support.holes import Holes
from triton.runtime import interpreter

from coded_resnext.kernels.layout import interpreted
from coded_resnext.kernels.recompute import rows as recompute_rows
from coded_resnext.kernels.recompute.launch import moments
from coded_resnext.kernels.rows import Variant


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.long if case.I >= 200 else ())
        for case in CASES
    ],
)
def test_moments(case: Case, dtype: torch.dtype) -> None:
    given = case.inputs(dtype)
    check_moments(given)
    if case.I == 24:
        check_moments({"x": given["x"]})


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_moments_of_activations_far_from_zero(dtype: torch.dtype) -> None:
    """A mean of 1000 standard deviations, where `E[a a^T] - m m^T` has nothing left."""
    generator = torch.Generator().manual_seed(0)
    # In float16 there are three numbers in a standard deviation.
    x = (1000 + torch.randn(2, 24, 19, 12, generator=generator)).to(dtype)
    check_moments({"x": x})
    a = x.float().transpose(0, 1).flatten(1)
    naive = a @ a.T - a.shape[1] * a.mean(1)[:, None] * a.mean(1)
    assert relative_error(naive.double(), moments_of(x.double())[1]) > 1e-2


def test_moments_where_the_centre_is_far_from_the_mean() -> None:
    """The rows that it is the mean of are unlike all others."""
    x = torch.randn(1, 16, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    assert recompute_rows.moments_tile(16, Variant("fp16", arch="cpu")).k == 64
    x.view(1, 16, 64, 64)[:, :, :, 0] += 3
    check_moments({"x": x})


def test_moments_of_channels_without_any() -> None:
    given = Case("dead", I=24).inputs(torch.float16)
    given["scale"][3], given["bias"][3] = 0.0, -1.0
    given["scale"][5], given["bias"][5] = 0.0, 0.3
    mean, scatter = check_moments(given)
    assert mean[3] == 0
    assert scatter[3].count_nonzero() == scatter[5].count_nonzero() == 0
    given["x"][1, 7, 2, 2] = torch.nan
    mean, scatter = moments(given["x"], given["scale"], given["bias"])
    touched = torch.zeros(24, dtype=torch.bool)
    touched[7] = True
    assert torch.equal(mean.isnan(), touched)
    assert torch.equal(scatter.isnan(), touched | touched[:, None])


def test_moments_past_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tiles, whole and in part, of a map in memory full of holes, which are zeros."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("compiled code has no place to start at; tests/ptx/compiled_faults.py has one")
    channels, variant = 1024, Variant("fp16", arch="cpu")
    tile = recompute_rows.moments_tile(channels, variant)
    blocks = recompute_rows.moments_blocks(channels, tile)
    whole = 2**31 // (tile.k * channels) + 1
    pixels = whole * tile.k + 5
    x = Holes(pixels * channels, torch.float16)
    # As many shares as tiles.
    partial = Holes((whole + 1) * channels**2, torch.float32)
    sums = Holes((whole + 1) * 2 * channels, torch.float32)
    values = torch.rand(tile.k + 5, channels, generator=torch.Generator().manual_seed(0)).half()
    x.at((pixels - len(values)) * channels, values.numel())[:] = values.flatten()
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(
        builder,
        "set_grid_dim",
        lambda *_: setattr(builder, "grid_dim", ((whole + 1) * blocks, 1, 1)),
    )
    for share, rows in ((whole - 1, values[: tile.k]), (whole, values[tile.k :])):
        place = (share * blocks, 0, 0)
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda *_, place=place: setattr(builder, "grid_idx", place)
        )
        recompute_rows.moments(channels, variant).launch(
            (1,), partial.at(0), sums.at(0), x.at(0), None, None, pixels
        )
        a = rows[:, : tile.n].double()
        for n in range(2):
            actual = sums.at((2 * share + n) * channels, tile.n)
            assert relative_error(actual.double(), a.sum(0)) < 1e-6
        actual = partial.at(share * channels**2, channels * tile.n).view(tile.n, channels)
        assert relative_error(actual[:, : tile.n].double(), a.T @ a) < 1e-6
