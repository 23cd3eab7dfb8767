"""A launch goes Triton's own way once for each kind of arguments, and straight to its code then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from coded_resnext.kernels import rows
from coded_resnext.kernels.rows import LaunchRow

ROW = LaunchRow(
    "toy:toy",
    args=("*fp32", None, 3),
    constexprs=(("BLOCK", 16), ("PRECISION", "ieee")),
    num_warps=4,
    trip_bytes=0,
    sample_bytes=0,
)


class Toy:
    """Stands for a `JITFunction`, which returns what it has compiled, and for that."""

    arg_names = ("x", "mask", "count", "PRECISION", "BLOCK")

    def __init__(self) -> None:
        self.compiled, self.launched = 0, list[tuple[Any, ...]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile_and_launch(*args: Any, **keywords: Any) -> Any:
            self.compiled += 1
            name, launched = f"code {self.compiled}", self.launched

            class Code:
                def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                    return lambda *args: launched.append((name, grid, *args))

            return Code()

        return compile_and_launch


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy()
    monkeypatch.setattr(rows, "_function", lambda _: made)
    monkeypatch.setattr(rows, "COMPILED", {})
    return made


def vector(dtype: torch.dtype = torch.float32, off: int = 0) -> Tensor:
    """Numbers at an address that is a multiple of 16 bytes, or some elements behind it."""
    return torch.zeros(64, dtype=dtype)[off:]


def test_the_second_launch_is_of_compiled_code(toy: Toy) -> None:
    first, second = vector(), vector(off=4)
    ROW.launch((5,), first, None, 3)
    assert toy.launched == []
    ROW.launch((7, 2), second, None, 4)
    assert toy.compiled == 1
    [(name, grid, *given)] = toy.launched
    assert (name, grid) == ("code 1", (7, 2, 1))
    assert given[0] is second
    # Constants stand where the signature has them.
    assert given[1:] == [None, 4, "ieee", 16]


@pytest.mark.parametrize(
    "arguments",
    [
        (vector(off=1), None, 3),
        (vector(torch.float16), None, 3),
        (vector(), vector(), 3),
        (vector(), None, 2**31),
        (vector().to("meta"), None, 3),
    ],
    ids=["unaligned", "another dtype", "a mask", "more than 32 bits", "another device"],
)
def test_other_arguments_are_compiled_for(toy: Toy, arguments: tuple[Any, ...]) -> None:
    """They would run code that Triton has made of aligned tensors, or of other types."""
    for _ in range(2):
        ROW.launch((1,), vector(), None, 3)
    ROW.launch((1,), *arguments)
    assert toy.compiled == 2
    ROW.launch((1,), *arguments)
    assert [name for name, *_ in toy.launched] == ["code 1", "code 2"]


def test_the_interpreter_compiles_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[tuple[Any, ...]]()
    interpreted = {(1,): lambda *args, **_: calls.append(args)}
    monkeypatch.setattr(rows, "_function", lambda _: interpreted)
    for _ in range(2):
        ROW.launch((1,), vector(), None, 3)
    assert len(calls) == 2
    assert rows.COMPILED == {}
