"""Blocks in the fused data flow against the block as it is written, in float64."""

from __future__ import annotations

import pytest
import torch
from support.cases.fused import CASES, BlockCase, step_of
from support.helpers import needs_triton, relative_error

# What issue-sized promises need: float32 against float64 after three convolutions and BatchNorms.
SINGLE = 1e-5
NAMES = [case.name for case in CASES]
LONG = {case.name for case in CASES} - {"coded", "plain, projection", "plain, evaluation"}


def compare(case: BlockCase, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    block = case.make()
    expected = step_of(case, block, "reference", torch.float64)
    actual = step_of(case, block, backend, dtype)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        error = relative_error(actual[name].to(value.dtype), value)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_in_float64_it_is_the_block_to_rounding(case: BlockCase) -> None:
    compare(case, "fused", torch.float64, 1e-12)


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.long if case.name in LONG else ())
        for case in CASES
    ],
)
def test_kernels_in_float32(case: BlockCase) -> None:
    compare(case, "triton", torch.float32, SINGLE)
