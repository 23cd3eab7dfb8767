"""Results as JSON and back: frozen dataclasses of numbers, texts, tuples and matrices."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

from coded_resnext.files import brief

Record = TypeVar("Record")
# Energies are means of float32 numbers, and a file for 1,000 classes holds 300,000 of them.
DECIMALS = 5


def to_plain(value: Any) -> Any:
    """Returns a JSON-ready description of a result; `from_plain` reads it back.

    A matrix `[rows, columns]` becomes a list of rows, rounded to five decimals; a row of NaN,
    "there is none", becomes None.
    """
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Tensor):
        return [
            None if math.isnan(row[0]) else [round(number, DECIMALS) for number in row]
            for row in value.tolist()
        ]
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(kind: type[Record], data: Any, name: str = "result") -> Record:
    """Returns the dataclass that `to_plain` described.

    Args:
        kind: the type of the dataclass.
        data: what was read from JSON.
        name: the name of the value in an error.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message names it.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{name}: expected an object, got {brief(data)}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(data.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{name}: expected no field {unknown[0]!r}")
    arguments = {}
    for key, field in fields.items():
        if key in data:
            arguments[key] = _read(hints[key], data[key], f"{name}.{key}")
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{name}.{key}: expected a value, got none")
    return kind(**arguments)


def _read(kind: Any, data: Any, name: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in parts:
            return None
        [kind] = [part for part in parts if part is not type(None)]
        return _read(kind, data, name)
    if origin is Literal:
        return _checked(data in parts, data, name, f"one of {', '.join(map(repr, parts))}")
    if dataclasses.is_dataclass(kind):
        return from_plain(kind, data, name)  # type: ignore[arg-type]
    if origin is tuple:
        _checked(isinstance(data, list), data, name, "a list")
        if parts[-1] is not Ellipsis:
            _checked(len(data) == len(parts), data, name, f"{len(parts)} values")
            return tuple(
                _read(part, item, f"{name}[{i}]")
                for i, (part, item) in enumerate(zip(parts, data, strict=True))
            )
        return tuple(_read(parts[0], item, f"{name}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _checked(isinstance(data, dict), data, name, "an object")
        return {key: _read(parts[1], item, f"{name}.{key}") for key, item in data.items()}
    if kind is Tensor:
        return _matrix(data, name)
    if kind is Any:
        return data
    if kind is float:
        good = isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data)
        return float(_checked(good, data, name, "a number"))
    good = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    return _checked(good, data, name, kind.__name__)


def _matrix(data: Any, name: str) -> Tensor:
    rows = [row for row in data if row is not None] if isinstance(data, list) else []
    width = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    good = all(
        isinstance(row, list) and len(row) == width and all(isinstance(n, int | float) for n in row)
        for row in rows
    )
    _checked(good and width > 0, data, name, "rows of equally many numbers")
    missing = [math.nan] * width
    return torch.tensor([missing if row is None else row for row in data], dtype=torch.float64)


def _checked(good: bool, data: Any, name: str, expected: str) -> Any:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {brief(data)}")
    return data
