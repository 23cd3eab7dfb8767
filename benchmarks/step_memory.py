"""Print the memory that one training step of a block adds to the process, in MiB.

`python benchmarks/step_memory.py "32x4d c4 stride 1" coded` runs in a process of its own, since a
process only knows the highest memory that it ever had. POSIX only.
"""

from __future__ import annotations

import resource
import sys

import torch
from shapes import block_shapes


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    scale = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale / 1024


def main() -> None:
    name, variant = sys.argv[1:]
    shape = next(shape for shape in block_shapes() if shape.name == name)
    # A small step first: it loads the libraries that the first convolution loads.
    small = type(shape)(**{**vars(shape), "batch": 1})
    small.make_step(variant, torch.contiguous_format)()
    step = shape.make_step(variant, torch.contiguous_format)
    before = peak_mib()
    step()
    print(f"{peak_mib() - before:.0f}")


if __name__ == "__main__":
    main()
