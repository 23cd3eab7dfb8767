"""Launch settings that were measured to be better than those that the rules give.

Empty, since no GPU has timed the kernels. `benchmarks/tune.py` prints the lines to enter. No
imports of PyTorch or Triton here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .configs import LaunchRow

# Architecture, kernel, and sizes as `sizes_of` words them, to the settings that differ.
TUNED: dict[tuple[str, str, str], Mapping[str, int]] = {}

# Compile-time numbers of each kernel that results do not depend on.
TILES: dict[str, tuple[str, ...]] = {
    "energy:energy_forward": ("BLOCK_P", "SAMPLES"),
    "energy:energy_backward": ("BLOCK_P", "SAMPLES"),
    "energy:weighted_gram": ("BLOCK_P", "SAMPLES"),
    "aggregate:aggregate_forward": ("BLOCK_P",),
    "aggregate:aggregate_backward": ("BLOCK_P",),
    "expand:expand_forward": ("BLOCK_P", "SAMPLES", "BLOCK_C"),
}
_SIZES = {"BRANCHES": "N", "WIDTH": "D", "CHANNELS_OUT": "C", "PIXELS": "P"}


def sizes_of(row: LaunchRow) -> str:
    """What a row is for, in words: its sizes, and what its tensors are, `-` for an absent one."""
    constexprs = dict(row.constexprs)
    sizes = (
        f"{letter}={constexprs[name]}" for name, letter in _SIZES.items() if name in constexprs
    )
    tensors = (str(arg or "-").removeprefix("*") for arg in row.args if isinstance(arg, str | None))
    return f"{' '.join(sizes)} {','.join(tensors)} {constexprs['PRECISION']}"


def settings_of(row: LaunchRow) -> dict[str, int]:
    """The settings of a row that can be changed; empty for a kernel without any."""
    if row.kernel not in TILES:
        return {}
    constexprs = dict(row.constexprs)
    tiles = {name: int(constexprs[name]) for name in TILES[row.kernel]}
    return {**tiles, "num_warps": row.num_warps, "num_stages": row.num_stages}


def changed(row: LaunchRow, settings: Mapping[str, int]) -> LaunchRow:
    """A row with other tiles, warps or stages.

    Raises:
        ValueError: a row has no such setting.
    """
    own = settings_of(row)
    if not settings.keys() <= own.keys():
        raise ValueError(f"settings: expected some of {list(own)}, got {list(settings)}")
    new = {**own, **settings}
    return replace(
        row,
        constexprs=tuple((name, new.get(name, value)) for name, value in row.constexprs),
        num_warps=new["num_warps"],
        num_stages=new["num_stages"],
        trip_bytes=row.trip_bytes * _trip(new) // _trip(own),
    )


def _trip(settings: Mapping[str, int]) -> int:
    """What the bytes of one trip are proportional to."""
    if "BLOCK_C" in settings:
        return settings["SAMPLES"] * settings["BLOCK_P"] + settings["BLOCK_C"]
    return settings["BLOCK_P"]


def tuned(row: LaunchRow, arch: str) -> LaunchRow:
    """The row with what the table has for it."""
    settings = TUNED.get((arch, row.kernel, sizes_of(row)))
    return changed(row, settings) if settings else row
