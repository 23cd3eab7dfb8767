"""Operators at sizes, layouts and types that nobody has thought of; `make torture` tries more."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from support.operator_fuzz import check, check_extreme
from support.strategies import DTYPES, EXTREMES, INTERPRETED, ON_CPU, OPERATORS, Call, calls

from coded_resnext.kernels import rows

MOST_PROGRAMS = 64
# The same examples every time, and no search for smaller ones, which takes minutes.
FUZZ = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS)


@pytest.mark.long
@every_operator
def test_the_cpu_path_is_the_definition(operator: str) -> None:
    @settings(max_examples=200, **FUZZ)
    @given(calls(operator, ON_CPU))
    def run(call: Call) -> None:
        check(operator, call, "torch")

    run()


@pytest.mark.long
@every_operator
def test_the_kernels_are_the_definition(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows.LaunchRow.launch
    launched = []

    def few(row: rows.LaunchRow, grid: tuple[int, ...], *arguments: Any) -> None:
        if math.prod(grid) > MOST_PROGRAMS:
            reject()
        launched.append(row.kernel)
        real(row, grid, *arguments)

    monkeypatch.setattr(rows.LaunchRow, "launch", few)

    @settings(max_examples=20, **FUZZ)
    @given(calls(operator, INTERPRETED, DTYPES[1:]))
    def run(call: Call) -> None:
        check(operator, call, "triton")

    run()
    assert launched


@every_operator
@pytest.mark.parametrize("value", EXTREMES)
def test_extreme_magnitudes(operator: str, value: float) -> None:
    @settings(max_examples=20, **FUZZ)
    @given(calls(operator, INTERPRETED, DTYPES[1:]).filter(lambda call: call.B > 0))
    def run(call: Call) -> None:
        check_extreme(operator, call, "torch", value)

    run()


def test_a_fault_of_one_branch_is_found() -> None:
    """The fuzzer itself: a keep mask that is dropped shows within the first examples."""
    from support.operator_fuzz import RUNS

    whole = RUNS["coded_aggregate"]

    def faulty(call: Call, backend: str, inputs: dict[str, torch.Tensor]) -> Any:
        if backend == "torch":
            inputs = {k: v for k, v in inputs.items() if k != "keep_mask"}
        return whole(call, backend, inputs)

    @settings(max_examples=50, **FUZZ)
    @given(calls("coded_aggregate", INTERPRETED))
    def run(call: Call) -> None:
        check("coded_aggregate", call, "torch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNS, "coded_aggregate", faulty)
        with pytest.raises(AssertionError, match="error"):
            run()
