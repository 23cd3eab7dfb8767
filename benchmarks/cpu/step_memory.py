"""Print the memory that one training step of a block adds to the process at its peak, in MiB.

`python benchmarks/cpu/step_memory.py "32x4d c4 stride 1" coded` runs in a process of its own, so
that nothing else has used memory before. Linux only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from shapes import block_shapes


def resident_mib(field: str) -> float:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its highest since the reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


def main() -> None:
    name, variant = sys.argv[1:]
    shape = next(shape for shape in block_shapes() if shape.name == name)
    # A small step first: it loads the libraries that the first convolution loads.
    small = type(shape)(**{**vars(shape), "batch": 1})
    small.make_step(variant, torch.contiguous_format)()
    step = shape.make_step(variant, torch.contiguous_format)
    # Resets the highest value to the present one.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_mib("VmRSS")
    step()
    print(f"{resident_mib('VmHWM') - before:.0f}")


if __name__ == "__main__":
    main()
