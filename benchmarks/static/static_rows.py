"""The rows of launch settings that static.py compiles: those that ship, and some more.

The stages of ResNeXt-50 that are coded by default have branches of 16 and 32 channels. A codebook
may be asked for in the first two stages too, so the energies' limits hold at their widths, 4 and 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from coded_resnext.kernels.build.build import shipped_rows
from coded_resnext.kernels.coded.rows import energy_backward, energy_forward
from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.rows import CodedSizes, LaunchRow, Variant

UNCODED_STAGES = {
    "32x4d c2 160px": CodedSizes(32, 4, 256, 1600),
    "32x4d c3 160px": CodedSizes(32, 8, 512, 400),
}


# Compile-time sizes of tensors: they end in addresses, masks and numbers of trips. Rows of a kernel
# that differ in nothing else are one piece of code in several sizes.
SIZES = frozenset(
    {
        *("BRANCHES", "BRANCHES_P", "WIDTH", "PIXELS", "CHANNELS", "CLASSES"),
        *("INPUTS", "OUTPUTS"),
        *("GROUPS", "GROUP", "GROUP_P", "PADDED", "STEPS", "WINDOWS"),
    }
)


# Rows are compiled one by one where every piece of code is wanted; elsewhere one for each limit.
THOROUGH = "sm90"


@cache
def one_of_each(arch: str) -> frozenset[str]:
    """Names of rows in the dtype of training: one for each piece of code on sm_90, elsewhere one
    for each line of limits, that which does most on its way.

    Of several sizes the one with the least bytes, to which all that a kernel does once is added.
    """
    chosen: dict[object, tuple[int, int, str]] = {}
    for name, row in rows(arch):
        if name.endswith(("fp16", "fp32")):
            continue
        tiles = tuple(item for item in row.constexprs if item[0] not in SIZES)
        settings = (row.num_warps, row.num_stages, row.registers)
        code: object = (row.kernel, row.args, tiles, *settings)
        absent = 0
        if arch != THOROUGH:
            code = (row.kernel, window_of(row))
            absent = row.args.count(None)
        candidate = (absent, row.sample_bytes, name)
        chosen[code] = min(candidate, chosen.get(code, candidate))
    return frozenset(name for *_, name in chosen.values())


def window_of(row: LaunchRow) -> object:
    """Channels of a window of a row's tiles, and whether it is evaluation's; of the moments all
    channels, which are one block or several: limits differ."""
    sizes = dict(row.constexprs)
    if row.kernel.endswith(":activation_moments"):
        return sizes["CHANNELS"]
    window = sizes.get("WINDOW", sizes.get("BLOCK_K"))
    return f"{window} folded" if sizes.get("FOLDED") else window


def rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Names and rows for an architecture."""
    yield from shipped_rows(arch)
    yield from conv1x1_rows.operator_rows(arch)
    for place, sizes in UNCODED_STAGES.items():
        for make in (energy_forward, energy_backward):
            row = make(sizes, Variant("bf16", arch=arch))
            yield f"{row.kernel.split(':')[1]} {place} bf16", row
