"""Long lists of numbers as base64, so that a page with a thousand classes stays small."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Shorter lists stay readable; longer lists of floats are rounded to single precision.
SHORTEST, MOST_DOUBLES = 16, 4096
_INTEGERS = (("u8", "<u1"), ("u16", "<u2"), ("i32", "<i4"))


def pack(value: Any, most_doubles: int = MOST_DOUBLES) -> Any:
    """A JSON-ready value whose long lists, and lists of equally long ones, of numbers are packed.

    Such a list becomes `{"packed": base64, "type": "u8", "u16", "i32", "f32" or "f64"}`, little-
    endian, a list of lists with their length as `"width"`. None among numbers becomes NaN. Whole
    numbers stay exact.

    Args:
        value: of dictionaries, lists, numbers, texts and None.
        most_doubles: longest list of floats that stays exact in any case; those of longer ones are
            rounded to single precision.
    """
    if isinstance(value, dict):
        return {key: pack(part, most_doubles) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    width = None
    numbers = value
    if value and all(isinstance(row, list) and len(row) == len(value[0]) for row in value):
        width = len(value[0])
        numbers = [entry for row in value for entry in row]
    if width == 0 or len(numbers) < SHORTEST or not all(map(_is_number, numbers)):
        return [pack(part, most_doubles) for part in value]
    kind, array = _array(numbers, most_doubles)
    packed = {"packed": base64.b64encode(array.tobytes()).decode("ascii"), "type": kind}
    return packed if width is None else {**packed, "width": width}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _array(numbers: list[Any], most_doubles: int) -> tuple[str, NDArray[Any]]:
    if all(isinstance(number, int) for number in numbers):
        low, high = min(numbers), max(numbers)
        for kind, dtype in _INTEGERS:
            limits = np.iinfo(dtype)
            if limits.min <= low and high <= limits.max:
                return kind, np.array(numbers, dtype)
    exact = np.array([np.nan if number is None else number for number in numbers], "<f8")
    with np.errstate(over="ignore"):
        single = exact.astype("<f4")
    if len(exact) > most_doubles or np.array_equal(single.astype("<f8"), exact, equal_nan=True):
        return "f32", single
    return "f64", exact
