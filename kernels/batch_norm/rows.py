"""Launch settings of BatchNorm's kernels. No imports of PyTorch or Triton here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from coded_resnext.kernels.rows import Argument, LaunchRow

# Channels of a program, and parts that it adds at a time.
CHANNELS = 8
PARTS = 256


def grid_of(channels: int) -> tuple[int]:
    """Returns the grid of a kernel for so many channels."""
    return (-(-channels // CHANNELS),)


def _row(kernel: str, channels: int, args: tuple[Argument, ...], **constexprs: int) -> LaunchRow:
    return LaunchRow(
        kernel=f"batch_norm.kernel:{kernel}",
        args=args,
        constexprs=(
            ("CHANNELS", channels),
            *constexprs.items(),
            ("BLOCK_C", CHANNELS),
            ("BLOCK_T", PARTS),
        ),
        num_warps=4,
        trip_bytes=PARTS * CHANNELS * 2 * 4,
        sample_bytes=0,
    )


@cache
def merge_statistics(channels: int) -> LaunchRow:
    """Returns the settings of `kernel.merge_statistics`."""
    return _row("merge_statistics", channels, ("*fp32", "*fp32", 960))


@cache
def batch_norm(
    channels: int, weight: bool = True, bias: bool = True, running: bool = True
) -> LaunchRow:
    """Returns the settings of `kernel.batch_norm`, for a layer with or without a weight, a bias,
    and running statistics to be brought up to date."""
    args = ("*fp32", "*fp32", "*fp32", *layer_arguments(weight, bias, running), 960)
    return _row("batch_norm", channels, args)


def layer_arguments(weight: bool, bias: bool, running: bool) -> tuple[Argument, ...]:
    """Returns a row's words for what a kernel takes of a layer, see `launch.Norm`."""
    own = ("*fp32" if weight else None, "*fp32" if bias else None)
    tracked = ("*fp32", "*fp32", "*i64") if running else (None, None, None)
    return (*own, *tracked, 1e-5, 0.1)


@cache
def batch_norm_backward(channels: int, rows: int = 2, scale: int = 1) -> LaunchRow:
    """Returns the settings of `kernel.batch_norm_backward`: rows of the sums, and which is of the
    scale."""
    args = ("*fp32", "*fp32", "*fp32", "*fp32", 960)
    return _row("batch_norm_backward", channels, args, ROWS=rows, SCALE=scale)


# Channels of every BatchNorm in the blocks of the paper's networks.
PAPER_CHANNELS = (64, 110, 120, 128, 220, 240, 256, 440, 480, 512, 1024, 2048)


def shipped_rows() -> Iterator[tuple[str, LaunchRow]]:
    """Yields every row that a step of training launches."""
    for channels in PAPER_CHANNELS:
        # The first is what processes exchange that share statistics.
        for make in (merge_statistics, batch_norm, batch_norm_backward):
            row = make(channels)
            yield f"{row.kernel.split(':')[1]} {channels}", row
        # Of sums of which those of another map are between the two.
        yield f"batch_norm_backward {channels} apart", batch_norm_backward(channels, scale=2)
        # Within a captured graph PyTorch brings running statistics up to date.
        yield f"batch_norm {channels} compiled", batch_norm(channels, running=False)
