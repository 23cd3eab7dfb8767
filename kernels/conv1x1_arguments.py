"""Tensors as the kernels of the 1x1 convolutions take them, and the programs that share them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .conv1x1_configs import ProductVariant, Tile
from .launch import DTYPES, architecture, as_rows, tf32_allowed

# Processors of the machine that the interpreter stands in for: programs have several tiles there.
INTERPRETED_PROCESSORS = 1


def variant_of(x: Tensor, **options: bool) -> ProductVariant:
    """What a kernel on activations `x` depends on, with these options."""
    dtype = DTYPES[x.dtype]
    return ProductVariant(
        dtype=dtype,
        tf32=dtype == "fp32" and tf32_allowed(),
        arch=architecture(x.device.index) if x.is_cuda else "cpu",
        **options,
    )


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def share_of(tiles: int, columns: int, tile: Tile, x: Tensor) -> int:
    """Programs among which the tiles of a column are shared: as many as the GPU holds at a time."""
    processors = _processors(x.device.index) if x.is_cuda else INTERPRETED_PROCESSORS
    return max(1, min(tiles, processors * tile.programs // columns))


def parts_of(rows: Tensor, tile: Tile, channels: int) -> tuple[int, int]:
    """Programs for each column of tiles of the result, and columns."""
    columns = -(-channels // tile.n)
    return share_of(-(-pixels_of(rows) // tile.m), columns, tile, rows), columns


def pixels_of(rows: Tensor) -> int:
    """Of a map `[B, H, W, C]`."""
    return rows.numel() // rows.shape[3]


def floats(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 tensor."""
    return like.new_empty(shape, dtype=torch.float32)


def aligned_rows(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as contiguous rows `[B, H, W, C]` at 16 bytes."""
    rows = as_rows(x)
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def aligned_weight(weight: Tensor) -> Tensor:
    """Contiguous, at 16 bytes."""
    contiguous = weight.contiguous()
    return contiguous if contiguous.data_ptr() % 16 == 0 else contiguous.clone()


def vector_of(vector: Tensor | None) -> Tensor | None:
    """Contiguous float32 numbers."""
    return None if vector is None else vector.float().contiguous()
