"""Results to JSON and back, and what damaged ones say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from coded_resnext.interpret.evaluation import from_plain, to_plain


@dataclass(frozen=True)
class Inner:
    count: int
    share: float | None


@dataclass(frozen=True, eq=False)
class Outer:
    name: str
    kind: Literal["a", "b"]
    flag: bool
    pair: tuple[int, float]
    inner: tuple[Inner, ...]
    matrix: Tensor
    notes: dict[str, str]
    last: Inner | None = None


def make() -> Outer:
    matrix = torch.tensor([[0.123456789, 2.0], [math.nan, math.nan]], dtype=torch.float64)
    inner = (Inner(1, 0.1), Inner(2, None))
    return Outer("x", "b", True, (3, 0.5), inner, matrix, {"k": "v"})


def test_there_and_back() -> None:
    described = to_plain(make())
    assert described == {
        "name": "x",
        "kind": "b",
        "flag": True,
        "pair": [3, 0.5],
        "inner": [{"count": 1, "share": 0.1}, {"count": 2, "share": None}],
        "matrix": [[0.12346, 2.0], None],
        "notes": {"k": "v"},
        "last": None,
    }
    read = from_plain(Outer, json.loads(json.dumps(described, allow_nan=False)))
    assert to_plain(read) == described
    assert read.inner == make().inner
    assert read.pair == (3, 0.5)
    assert read.matrix[1].isnan().all()
    del described["last"]
    assert from_plain(Outer, described).last is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, r"result\.name: expected str, got 3"),
        ({"kind": "c"}, r"result\.kind: expected one of 'a', 'b', got 'c'"),
        ({"flag": 1}, r"result\.flag: expected bool, got 1"),
        ({"pair": [1]}, r"result\.pair: expected 2 values"),
        ({"pair": [True, 1.0]}, r"result\.pair\[0\]: expected int, got True"),
        ({"inner": [{"count": 1}]}, r"result\.inner\[0\]\.share: expected a value, got none"),
        ({"inner": [{"count": 1, "share": "x"}]}, r"inner\[0\]\.share: expected a number"),
        ({"inner": {}}, r"result\.inner: expected a list"),
        ({"matrix": [[1.0], [1.0, 2.0]]}, r"result\.matrix: expected rows of equally many"),
        ({"matrix": [None]}, r"result\.matrix: expected rows"),
        ({"notes": {"k": 1}}, r"result\.notes\.k: expected str, got 1"),
        ({"last": 5}, r"result\.last: expected an object, got 5"),
        ({"new": 1}, r"result: expected no field 'new'"),
    ],
)
def test_damage_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_plain(Outer, {**to_plain(make()), **change})


def test_something_else() -> None:
    with pytest.raises(ValueError, match="result: expected an object, got"):
        from_plain(Outer, [1])
