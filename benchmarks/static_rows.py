"""The rows of launch settings that static.py compiles: those that ship, and two sizes more.

The stages of ResNeXt-50 that are coded by default have branches of 16 and 32 channels. A codebook may
be asked for in the first two stages too, so the energies' limits hold at their widths, 4 and 8.
"""

from __future__ import annotations

from collections.abc import Iterator

from coded_resnext.kernels import configs
from coded_resnext.kernels.configs import BlockSizes, LaunchRow, Variant

UNCODED_STAGES = {
    "32x4d c2 160px": BlockSizes(32, 4, 256, 1600),
    "32x4d c3 160px": BlockSizes(32, 8, 512, 400),
}


def rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Names and rows for an architecture."""
    yield from configs.shipped_rows(arch)
    for place, sizes in UNCODED_STAGES.items():
        for make in (configs.energy_forward, configs.energy_backward):
            row = make(sizes, Variant("bf16", arch=arch))
            yield f"{row.kernel.split(':')[1]} {place} bf16", row
