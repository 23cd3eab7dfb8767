"""Two small kernels with rows of launch settings: what the build tests compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from coded_resnext.kernels.tile import hash_in_order

SLOPE = tl.constexpr(0.5)


@triton.jit
def _activate(x):
    return tl.where(x > 0, x, x * SLOPE)


@triton.jit
def scale_kernel(x_ptr, y_ptr, size, scale, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    tl.store(y_ptr + offsets, _activate(x) * scale, mask=inside)


@triton.jit
def sum_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        total += _activate(tl.load(x_ptr + offsets, mask=offsets < size, other=0.0))
    tl.store(y_ptr, tl.sum(total, 0))


@dataclass(frozen=True)
class Row:
    """What the build asks of a row of launch settings."""

    kernel: str
    args: tuple[str | int | float, ...]
    block: int

    @property
    def keywords(self) -> dict[str, Any]:
        options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        return {"BLOCK": self.block, **options}

    def function(self) -> Any:
        return globals()[self.kernel]

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        self.function()[grid](*args, **self.keywords)


def rows(_arch: str) -> Iterator[tuple[str, Row]]:
    for block in (256, 512):
        yield f"scale {block}", Row("scale_kernel", ("*fp32", "*fp32", 4096, 2.0), block)
    yield "sum", Row("sum_kernel", ("*fp32", "*fp32", 4096), 256)


hash_in_order(globals())
