"""Arithmetic of PTX that NumPy lacks: narrow floats, integer instructions, tensor core fragments.

Narrow floats are computed in float64 and rounded once. Shifts and bit fields take any count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i4, i8 = np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

# A type of PTX to its width in bytes; predicates are booleans of no width.
WIDTHS = {"pred": 0, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "tf32": 4, "f32": 4, "f64": 8}
WIDTHS |= {f"{kind}{8 * size}": size for kind in "bus" for size in (1, 2, 4, 8)}
NARROW = ("f16", "bf16", "f16x2", "bf16x2")


def storage(width: int) -> Any:
    """Returns the NumPy type in which registers of so many bytes are kept."""
    return np.dtype(f"u{width}").type if width else np.bool_


def native(kind: str) -> Any:
    """Returns the NumPy type of a PTX type that has one."""
    letter = {"s": "i", "f": "f"}.get(kind[0], "u")
    return np.dtype(f"{letter}{WIDTHS[kind]}").type if kind != "pred" else np.bool_


# ---- narrow floats


def widen_bf16(bits: Array) -> Array:
    """float32 of the bits of bfloat16."""
    return (bits.astype(u4) << u4(16)).view(f4)


def round_to_odd(x: Array) -> Array:
    """float32 of float64, such that another rounding, to fewer bits, is that of `x` itself."""
    near = x.astype(f4)
    back = near.astype(f8)
    inexact = (back != x) & np.isfinite(x) & np.isfinite(back)
    bits = near.view(u4) - (inexact & (np.abs(back) > np.abs(x))).astype(u4)
    return (bits | inexact.astype(u4)).view(f4)


def bits_of_bf16(x: Array, rounding: str | None = "rn") -> Array:
    """bfloat16 of float32 or float64, to nearest even or towards zero."""
    x = np.ascontiguousarray(x)
    bits = (round_to_odd(x) if x.dtype == f8 else x).view(u4)
    if rounding != "rz":
        bits = bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))
    return np.where(np.isnan(x), u4(0x7FFF), bits >> u4(16)).astype(u2)


def from_bits(bits: Array, kind: str) -> Array:
    """The values of a register; those of a narrow type in float64, pairs in a last dimension."""
    if kind.endswith("x2"):
        bits = np.ascontiguousarray(bits).view(u2).reshape(*bits.shape, 2)
    if kind.startswith("bf16"):
        return widen_bf16(bits).astype(f8)
    if kind.startswith("f16"):
        return bits.view(f2).astype(f8)
    return bits if kind == "pred" else bits.view(native(kind))


def to_bits(values: Array, kind: str, rounding: str | None = "rn") -> Array:
    """The bits of values, the reverse of `from_bits`, of values of any float type."""
    if kind.startswith("bf16"):
        bits = bits_of_bf16(values, rounding)
    elif kind == "pred":
        return values
    elif kind.startswith("f16"):
        bits = values.astype(f2).view(u2)
    else:
        dtype = native(kind)
        values = values if values.dtype == dtype else values.astype(dtype)
        return values.view(storage(WIDTHS[kind]))
    return np.ascontiguousarray(bits).view(u4)[..., 0] if kind.endswith("x2") else bits


# ---- integers


def divide(a: Array, b: Array) -> Array:
    """Towards zero; by 0, which is undefined, as by 1."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    """Of `divide`, with the sign of `a`."""
    return a - divide(a, b) * b


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{bits // 4}").type
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    if a.dtype.kind == "i":
        raise NotImplementedError("mul.hi.s64")
    low, half = u8(0xFFFFFFFF), u8(32)
    al, ah, bl, bh = a & low, a >> half, b & low, b >> half
    middle = ah * bl + (al * bl >> half)
    return ah * bh + (middle >> half) + ((al * bh + (middle & low)) >> half)


def multiply_wide(a: Array, b: Array) -> Array:
    """The whole product, of twice the width."""
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}").type
    return a.astype(wide) * b.astype(wide)


def shift_left(x: Array, count: Array) -> Array:
    """0 from a count of the width on."""
    bits = 8 * x.dtype.itemsize
    shifted = x << np.minimum(count, bits - 1).astype(x.dtype)
    return np.where(count < bits, shifted, x.dtype.type(0))


def shift_right(x: Array, count: Array) -> Array:
    """From a count of the width on nothing but the sign, or 0, is left."""
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(count, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(count < bits, shifted, x.dtype.type(0))


def funnel(low: Array, high: Array, count: Array, *, left: bool, wrap: bool) -> Array:
    """`shf`: 32 bits out of 64."""
    both = low.astype(u8) | (high.astype(u8) << u8(32))
    count = (count & u4(31) if wrap else np.minimum(count, u4(32))).astype(u8)
    return (((both << count) >> u8(32)) if left else both >> count).astype(u4)


def extract_bits(x: Array, position: Array, length: Array) -> Array:
    """`bfe`: a field, its sign extended where `x` is signed."""
    bits, signed = 8 * x.dtype.itemsize, x.dtype.kind == "i"
    position, length = (v.astype(i8) & 255 for v in (position, length))
    end = np.minimum(position + length, bits)
    up = 64 - end
    wide = x.astype(i8 if signed else u8)
    wide = shift_right(shift_left(wide, up), up + np.minimum(position, end))
    return np.where(length == 0, 0, wide).astype(x.dtype)


def insert_bits(a: Array, b: Array, position: Array, length: Array) -> Array:
    """`bfi`: `b` with a field of `a`."""
    position, length = (v.astype(u8) & u8(255) for v in (position, length))
    mask = shift_left(shift_left(np.ones(1, u8), length) - u8(1), position)
    return ((b & ~mask) | (shift_left(a.astype(u8), position) & mask)).astype(b.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """`prmt`: any four of eight bytes, or their signs."""
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    out = np.zeros(np.broadcast(a, selector).shape, u4)
    for place in range(4):
        choice = (selector >> u4(4 * place)) & u4(15)
        byte = ((both >> (choice & u4(7)).astype(u8) * u8(8)) & u8(255)).astype(u4)
        sign = np.where(byte & u4(128), u4(255), u4(0))
        out |= np.where(choice & u4(8), sign, byte) << u4(8 * place)
    return out


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """`lop3`: any function of three bits."""
    out = np.zeros(np.broadcast(a, b, c).shape, u4)
    for row in range(8):
        if table >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


WHOLE: dict[str, Callable[..., Array]] = {
    "rzi": np.trunc,
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def to_integer(x: Array, dtype: Any, rounding: str) -> Array:
    """Saturates; NaN is 0."""
    x = WHOLE[rounding](x.astype(f8))
    limits = np.iinfo(dtype)
    low, high = x <= limits.min, x >= limits.max
    inside = np.where(low | high | np.isnan(x), 0, x).astype(dtype)
    return np.where(low, dtype(limits.min), np.where(high, dtype(limits.max), inside))


def compare(a: Array, b: Array, relation: str) -> Array:
    """`setp` of numbers: with `u` behind a relation NaN fulfils it."""
    if relation in ("nan", "num"):
        unordered = (a != a) | (b != b)
        return unordered if relation == "nan" else ~unordered
    ordered = relation if relation in _RELATIONS else relation[:2]
    result = _RELATIONS[ordered](a, b)
    if ordered != relation:
        return result | (a != a) | (b != b)
    if ordered == "ne" and a.dtype.kind == "f":
        return result & (a == a) & (b == b)
    return result


_RELATIONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}


# ---- tensor cores. A warp's fragments: the eighth of a lane says a row, its rest a column.

_LANE = np.arange(32)
_EIGHTH, _REST = _LANE >> 2, _LANE & 3
RESULT_ROWS = np.stack([_EIGHTH, _EIGHTH, _EIGHTH + 8, _EIGHTH + 8], 1)
RESULT_COLUMNS = np.stack([2 * _REST, 2 * _REST + 1, 2 * _REST, 2 * _REST + 1], 1)


@cache
def fragment(count: int, pairs: bool, second: bool) -> tuple[Array, Array]:
    """Where the elements of an operand stand: its row (of `b` its column) and its place in `k`.

    Args:
        count: registers of a lane.
        pairs: whether a register has two elements.
        second: whether it is `b`, whose registers go on in `k` alone.
    """
    register = np.arange(count)[None, :, None]
    half = np.arange(2 if pairs else 1)[None, None, :]
    step = register if second else register >> 1
    outer = _EIGHTH[:, None, None] + 8 * (0 if second else register & 1) + 0 * half
    inner = _REST[:, None, None] * half.size + half + 4 * half.size * step
    return np.broadcast_arrays(outer, inner)


def elements(bits: Array, kind: str) -> Array:
    """What tensor cores multiply, in float64; of TF32 they ignore the lowest bits."""
    if kind == "tf32":
        return (bits.view(u4) & u4(0xFFFFE000)).view(f4).astype(f8)
    return from_bits(bits.view(u2), kind)


def operand(registers: list[Array], kind: str, second: bool, k: int) -> Array:
    """An operand of each warp in float64: `[warps, rows, k]`, of `b` `[warps, columns, k]`."""
    values = elements(np.stack(registers, 1), kind)
    pairs = kind != "tf32"
    matrix = np.zeros((len(values) // 32, 8 if second else 16, k), f8)
    matrix[(slice(None), *fragment(len(registers), pairs, second))] = values.reshape(
        len(matrix), 32, len(registers), -1
    )
    return matrix


def accumulate(product: Array, registers: list[Array], used: Array | bool) -> list[Array]:
    """Adds products `[warps, 16, columns]` to what a warp's lanes hold, as registers again."""
    warps, _, columns = product.shape
    block = np.arange(columns // 8)[:, None]
    rows = np.broadcast_to(RESULT_ROWS[:, None], (32, len(block), 4)).reshape(32, -1)
    places = (8 * block + RESULT_COLUMNS[:, None]).reshape(32, -1)
    before = np.stack(registers, 1).view(f4).reshape(warps, 32, -1)
    total = product[:, rows, places] + np.where(used, before, f4(0))
    bits = total.astype(f4).view(u4).reshape(warps * 32, -1)
    return [np.ascontiguousarray(bits[:, index]) for index in range(len(registers))]


def mma(k: int, kind: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """`mma.m16n8k*` of each warp, accumulated in float32."""
    product = operand(a, kind, False, k) @ operand(b, kind, True, k).transpose(0, 2, 1)
    return accumulate(product, c, True)
