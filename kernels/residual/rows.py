"""Launch settings of the pointwise kernels at the end of a residual block.

The number of rows is a run-time number. No imports of PyTorch or Triton here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from coded_resnext.kernels.rows import ITEM_BYTES, Dtype, LaunchRow, next_power_of_2

# A tile of 16 x 128 numbers is 16 for each thread of four warps: two wide loads of a tensor.
ROWS = 16
COLUMNS = 128
# Rows of a part: what a lane sums in float32 before sums are merged.
TRIPS = 16
# Of a sample of the example.
EXAMPLE_PIXELS = 100


def parts_of(rows: int) -> int:
    """Returns the number of parts of a map of so many rows."""
    return -(-rows // (ROWS * TRIPS))


def grid_of(rows: int, channels: int) -> tuple[int]:
    """Returns a grid with one program for each part and block of channels."""
    return (parts_of(rows) * -(-channels // _columns(channels)),)


def _columns(channels: int) -> int:
    return min(COLUMNS, max(16, next_power_of_2(channels)))


def _row(
    kernel: str, channels: int, dtype: Dtype, args: tuple[str | None, ...], moved: int
) -> LaunchRow:
    columns, item = _columns(channels), ITEM_BYTES[dtype]
    return LaunchRow(
        kernel=f"residual.kernel:{kernel}",
        args=(*args, 4096),
        constexprs=(
            ("CHANNELS", channels),
            ("TRIPS", TRIPS),
            ("BLOCK_P", ROWS),
            ("BLOCK_C", columns),
        ),
        num_warps=4,
        trip_bytes=moved * ROWS * columns * item,
        sample_bytes=moved * channels * item,
    )


@cache
def pointwise_join(
    channels: int, dtype: Dtype, *, mapped: bool, folded: bool = False, factor: bool = False
) -> LaunchRow:
    """Returns the settings of `kernel.pointwise_join`.

    Args:
        channels, dtype: of the map.
        mapped: whether the residual has a map of its own.
        folded: whether the scale is in the weights of what made the map.
        factor: whether there is a factor for each sample.
    """
    wide, vector = f"*{dtype}", "*fp32"
    own = vector if mapped else None
    args = (wide, wide, None if folded else vector, vector, wide, own, own)
    row = _row("pointwise_join", channels, dtype, (*args, vector if factor else None), 3)
    return replace(row, args=(*row.args, EXAMPLE_PIXELS))


@cache
def pointwise_join_backward(
    channels: int, dtype: Dtype, *, mapped: bool, raw: bool = True
) -> LaunchRow:
    """Returns the settings of `kernel.pointwise_join_backward`.

    Args:
        channels, dtype: of the map.
        mapped: whether the residual has a map of its own.
        raw: whether what was mapped and added to it is there.
    """
    wide = f"*{dtype}"
    args = (wide, "*fp32", wide, wide, wide if raw else None, wide if mapped else None)
    return _row("pointwise_join_backward", channels, dtype, args, 3 + raw + mapped)


@cache
def pointwise_gradient(
    channels: int, dtype: Dtype, *, gain: bool, statistics: bool = True
) -> LaunchRow:
    """Returns the settings of `kernel.pointwise_gradient`.

    Args:
        channels, dtype: of the map.
        gain: whether the gradient comes without its factor.
        statistics: whether there is a gradient through them.
    """
    wide, vector = f"*{dtype}", "*fp32"
    own = (vector, vector) if statistics else (None, None)
    args = (wide, wide, wide if statistics else None, vector if gain else None, *own)
    return _row("pointwise_gradient", channels, dtype, args, 2 + statistics)


@cache
def column_statistics(channels: int, dtype: Dtype) -> LaunchRow:
    """Returns the settings of `kernel.column_statistics`."""
    return _row("column_statistics", channels, dtype, ("*fp32", f"*{dtype}"), 1)


# Channels of the blocks of the paper's networks, and of what is inside them.
PAPER_CHANNELS = (256, 512, 1024, 2048)


def shipped_rows() -> Iterator[tuple[str, LaunchRow]]:
    """Yields every row that a step of training, or evaluation, in bfloat16 launches."""
    for channels in PAPER_CHANNELS:
        for factor in (False, True):
            row = pointwise_join(channels, "bf16", mapped=False, folded=True, factor=factor)
            kind = "folded, factor" if factor else "folded"
            yield f"pointwise_join {channels} {kind}", row
        for mapped in (False, True):
            kind = "mapped" if mapped else "identity"
            for make in (pointwise_join, pointwise_join_backward):
                row = make(channels, "bf16", mapped=mapped)
                yield f"{row.kernel.split(':')[1]} {channels} {kind}", row
        for gain in (False, True):
            row = pointwise_gradient(channels, "bf16", gain=gain)
            yield f"pointwise_gradient {channels}{', gain' * gain}", row
        yield f"column_statistics {channels}", column_statistics(channels, "bf16")
    # Inside the first stage; and the end of a block of plain stages, whose products are not there.
    yield "column_statistics 128", column_statistics(128, "bf16")
    yield "pointwise_gradient 128", pointwise_gradient(128, "bf16", gain=False)
    for channels in PAPER_CHANNELS[:2]:
        row = pointwise_join_backward(channels, "bf16", mapped=False, raw=False)
        yield f"pointwise_join_backward {channels} of a product", row
