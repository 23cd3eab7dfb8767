"""Packed numbers: what comes back, what stays readable, what is rounded."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_resnext.interpret.report.page import pack

DTYPES = {"u8": "<u1", "u16": "<u2", "i32": "<i4", "f32": "<f4", "f64": "<f8"}


def unpack(value: Any) -> Any:
    """The reading end, as `base.js` has it, with None for NaN."""
    if isinstance(value, dict) and "packed" in value:
        array = np.frombuffer(base64.b64decode(value["packed"]), DTYPES[value["type"]])
        numbers = [None if number != number else number for number in array.tolist()]
        width = value.get("width")
        if width is None:
            return numbers
        return [numbers[start : start + width] for start in range(0, len(numbers), width)]
    if isinstance(value, dict):
        return {key: unpack(part) for key, part in value.items()}
    return [unpack(part) for part in value] if isinstance(value, list) else value


NUMBERS = st.lists(
    st.none() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False),
    max_size=40,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), NUMBERS | st.lists(NUMBERS, max_size=5) | st.text()))
def test_what_was_packed_comes_back(content: dict[str, Any]) -> None:
    text = json.dumps(pack(content), allow_nan=False)
    assert unpack(json.loads(text)) == content


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([0, 255] * 8, "u8"),
        ([0, 256] * 8, "u16"),
        ([-1, 70_000] * 8, "i32"),
        ([0.5, 2.25] * 8, "f32"),
        ([0.5, None] * 8, "f32"),
        ([0.1, 0.5] * 8, "f64"),
        ([2**40, 0] * 8, "f32"),
        ([2**40 + 1, 0] * 8, "f64"),
    ],
)
def test_numbers_take_no_more_room_than_they_need(numbers: list[Any], kind: str) -> None:
    packed = pack(numbers)
    assert packed["type"] == kind
    assert unpack(packed) == numbers


def test_short_lists_flags_and_texts_stay_as_they_are() -> None:
    content = {"short": [0.1] * 15, "flags": [True] * 20, "texts": ["1"] * 20, "ragged": [[1], []]}
    assert pack(content) == content


def test_long_lists_of_floats_are_rounded_to_single_precision() -> None:
    numbers = [0.1] * 5000
    assert pack(numbers)["type"] == "f32"
    assert unpack(pack(numbers)) == pytest.approx(numbers, rel=1e-7)
    assert pack(numbers[:100])["type"] == "f64"
    assert pack(numbers[:100], most_doubles=99)["type"] == "f32"


def test_rows_of_one_length_are_packed_together() -> None:
    rows = [[float(row), row + 0.5, -1.0] for row in range(10)]
    packed = pack(rows)
    assert (packed["width"], packed["type"]) == (3, "f32")
    assert unpack(packed) == rows
