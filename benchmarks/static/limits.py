"""The kernels that static.py compiles, and what each may cost.

`rows` yields the rows of launch settings that ship, and some more. The stages of ResNeXt-50 that
are coded by default have branches of 16 and 32 channels. A codebook may be asked for in the first
two stages too, so the energies' limits hold at their widths, 4 and 8.

`LIMITS` has one line for each kernel; a kernel without a line fails. A name may end in the channels
of a window, where tiles come in several sizes, and in `folded` for what evaluation launches. A
limit is the measured figure with little to spare, so that a change which makes a kernel worse is
seen; where a figure misses what was hoped for, the line says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import triton

from coded_resnext.kernels.build.build import shipped_rows
from coded_resnext.kernels.coded.rows import energy_backward, energy_forward
from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.rows import CodedSizes, LaunchRow, Variant


@dataclass(frozen=True)
class Limits:
    """Of one kernel, for activations of two bytes on NVIDIA."""

    registers: int
    """Of a thread."""
    per_byte: float | None = None
    """Warp instructions for each byte that a sample costs in memory traffic; None: not memory
    that bounds it."""
    matrix: bool = True
    """Whether it must multiply on tensor cores."""
    wide_loads: bool = True
    """Whether most of its main loop's loads must be of 128 bits, where rows are aligned to them."""


# H200s issue 0.218 warp instructions a byte, B200s 0.146: energies of up to 32 channels are to stay
# at 0.17 on sm_90. Wider branches make windows of 64 channels, which have lines of their own.
LIMITS = {
    "energy_forward": Limits(registers=160, per_byte=0.17),
    "energy_forward 64": Limits(registers=224, per_byte=0.20),
    "energy_backward": Limits(registers=96, per_byte=0.085),
    "energy_backward 64": Limits(registers=112, per_byte=0.09),
    "weighted_gram": Limits(registers=160, per_byte=0.135),
    "weighted_gram 64": Limits(registers=240, per_byte=0.165),
    # Small maps, padded to tiles and gone through twice, cost it more than its bytes.
    "aggregate_forward": Limits(registers=152, per_byte=0.27),
    "aggregate_forward 64": Limits(registers=255, per_byte=0.31),
    "aggregate_backward": Limits(registers=136, per_byte=0.185),
    "aggregate_backward 64": Limits(registers=128, per_byte=0.24),
    "coding_loss": Limits(registers=128, matrix=False, wide_loads=False),
    # The grouped 3x3 convolution between BatchNorms. Windows of 16 channels hold D = 4, 8, 16 and
    # keep the 0.17 that was hoped for; of 32, D = 32, 0.20. Windows of 24 (D = 6, 12, 24) compute
    # on 32 channels and miss it by up to 0.09: a quarter of their work is on zeros.
    "forward_stride1 16": Limits(registers=168, per_byte=0.17),
    "forward_stride1 24": Limits(registers=255, per_byte=0.22),
    "forward_stride1 32": Limits(registers=255, per_byte=0.20),
    "forward_stride2 16": Limits(registers=168, per_byte=0.17),
    "forward_stride2 24": Limits(registers=168, per_byte=0.20),
    "forward_stride2 32": Limits(registers=168, per_byte=0.20),
    # In evaluation, with the energies of a coded block. Windows of 24 hold several branches, and
    # what keeps a NaN in its own costs a tenth: 0.191 and 0.113 on sm80, 0.178 and 0.112 on sm90
    # with Triton 3.8.
    "forward_stride1 16 folded": Limits(registers=168, per_byte=0.10),
    "forward_stride1 24 folded": Limits(registers=232, per_byte=0.195),
    "forward_stride1 32 folded": Limits(registers=216, per_byte=0.13),
    "forward_stride2 16 folded": Limits(registers=104, per_byte=0.065),
    "forward_stride2 24 folded": Limits(registers=144, per_byte=0.115),
    "forward_stride2 32 folded": Limits(registers=144, per_byte=0.085),
    "input_gradient_stride1 16": Limits(registers=192, per_byte=0.17),
    "input_gradient_stride1 24": Limits(registers=255, per_byte=0.19),
    "input_gradient_stride1 32": Limits(registers=255, per_byte=0.20),
    "input_gradient_stride2 16": Limits(registers=192, per_byte=0.17),
    "input_gradient_stride2 24": Limits(registers=192, per_byte=0.17),
    "input_gradient_stride2 32": Limits(registers=192, per_byte=0.20),
    # On sm_90 those with full windows ask for rows ahead (docs/kernels.md: A and C), at 2 to
    # 8 % more instructions: they were measured to wait for memory, at a third of what issues.
    "weight_gradient_stride1 16": Limits(registers=192, per_byte=0.18),
    "weight_gradient_stride1 24": Limits(registers=255, per_byte=0.27),
    "weight_gradient_stride1 32": Limits(registers=255, per_byte=0.20),
    "weight_gradient_stride2 16": Limits(registers=208, per_byte=0.17),
    "weight_gradient_stride2 24": Limits(registers=255, per_byte=0.18),
    "weight_gradient_stride2 32": Limits(registers=255, per_byte=0.20),
    # The 1x1 convolutions between BatchNorms, by the channels of a step: a weight that stays with
    # its program takes one, the wider ones go in steps of 64. From 256 to 512 channels two programs
    # share the input, whose activation each computes: the forward kernel misses the 0.17 by that.
    # Products of sm_80 take more instructions, and all registers.
    "product_forward": Limits(registers=255, per_byte=0.17),
    "product_forward 64": Limits(registers=224, per_byte=0.25),
    "product_join": Limits(registers=255, per_byte=0.13),
    "product_join 64": Limits(registers=232, per_byte=0.165),
    # The moments of 128 channels are one block; of 256 they are three, in which each element is
    # read and activated twice. On sm_90 the one block is at 0.17, on sm_80, whose products take
    # more instructions, at 0.215; the three are at 0.37 and 0.41, which a GPU
    # cannot issue as fast as it could read them.
    "activation_moments": Limits(registers=255, per_byte=0.42),
    "activation_moments 128": Limits(registers=232, per_byte=0.22),
    # On sm_100 tiles of 32 rows cost half as much again as those of 64 on sm_90, which spill there.
    "moments_input_gradient": Limits(registers=252, per_byte=0.165),
    "moments_input_gradient 64": Limits(registers=240, per_byte=0.19),
    "join_forward": Limits(registers=255, per_byte=0.12),
    "join_forward 64": Limits(registers=240, per_byte=0.13),
    "product_input_gradient": Limits(registers=255, per_byte=0.10),
    "product_input_gradient 64": Limits(registers=240, per_byte=0.14),
    # From 512 channels each of two columns of tiles computes the gradient of the output.
    "join_input_gradient": Limits(registers=255, per_byte=0.175),
    "join_input_gradient 64": Limits(registers=240, per_byte=0.16),
    "product_weight_gradient": Limits(registers=255, per_byte=0.17),
    # The matrices of a convolution that is not stored: products in float32, sums in float64.
    "merge_moments": Limits(registers=168, matrix=False),
    "product_statistics": Limits(registers=128, matrix=False),
    "map_gradients": Limits(registers=64, matrix=False),
    "weight_gradients": Limits(registers=80, matrix=False),
    # Half of its loads are of vectors, a number for each row of a tile.
    "moments_gradients": Limits(registers=255, matrix=False, wide_loads=False),
    # The end of a residual block, element by element.
    # A factor for each sample costs a division for each row.
    "pointwise_join": Limits(registers=76, per_byte=0.06, matrix=False),
    "pointwise_join_backward": Limits(registers=104, per_byte=0.048, matrix=False),
    "pointwise_gradient": Limits(registers=64, per_byte=0.045, matrix=False),
    "column_statistics": Limits(registers=68, per_byte=0.113, matrix=False),
    "pack_weights": Limits(registers=128, matrix=False, wide_loads=False),
    "reduce_weight_gradient": Limits(registers=128, matrix=False),
    # BatchNorm's arithmetic on vectors, in float64.
    "merge_statistics": Limits(registers=128, matrix=False),
    "batch_norm": Limits(registers=128, matrix=False),
    "batch_norm_backward": Limits(registers=128, matrix=False),
}

# Where another version of Triton needs another limit: (major.minor, line) to what differs.
# Triton 3.6 takes the ReLU of bfloat16 through float32, which costs the grouped convolutions up to
# half as many instructions again, and gives two warps the same product of 64 channels, whose
# registers then do not suffice (branches of 33 to 64 channels). Figures are the worst of sm_80,
# sm_90 and sm_100, with the rows of `--quick`.
BY_VERSION: dict[tuple[str, str], dict[str, Any]] = {
    ("3.6", "energy_forward 64"): {"registers": 255, "per_byte": 0.29},
    ("3.6", "energy_backward 64"): {"registers": 142, "per_byte": 0.127},
    ("3.6", "weighted_gram 64"): {"registers": 255, "per_byte": 0.285},
    ("3.6", "aggregate_forward 64"): {"per_byte": 0.325},
    ("3.6", "aggregate_backward 64"): {"registers": 178, "per_byte": 0.27},
    ("3.6", "forward_stride1 16"): {"per_byte": 0.225},
    ("3.6", "forward_stride1 24"): {"per_byte": 0.325},
    ("3.6", "forward_stride1 32"): {"per_byte": 0.25},
    ("3.6", "forward_stride2 16"): {"per_byte": 0.235},
    ("3.6", "forward_stride2 24"): {"per_byte": 0.325},
    ("3.6", "forward_stride2 32"): {"per_byte": 0.25},
    ("3.6", "forward_stride1 16 folded"): {"per_byte": 0.14},
    ("3.6", "forward_stride1 24 folded"): {"per_byte": 0.235},
    ("3.6", "forward_stride1 32 folded"): {"per_byte": 0.18},
    ("3.6", "forward_stride2 16 folded"): {"per_byte": 0.08},
    ("3.6", "forward_stride2 24 folded"): {"per_byte": 0.13},
    ("3.6", "forward_stride2 32 folded"): {"per_byte": 0.095},
    ("3.6", "input_gradient_stride1 24"): {"per_byte": 0.20},
    ("3.6", "input_gradient_stride2 24"): {"per_byte": 0.195},
    ("3.6", "weight_gradient_stride1 16"): {"per_byte": 0.255},
    ("3.6", "weight_gradient_stride1 24"): {"per_byte": 0.35},
    ("3.6", "weight_gradient_stride1 32"): {"per_byte": 0.25},
    ("3.6", "weight_gradient_stride2 16"): {"per_byte": 0.205},
    ("3.6", "weight_gradient_stride2 24"): {"per_byte": 0.275},
    ("3.6", "weight_gradient_stride2 32"): {"per_byte": 0.205},
    ("3.6", "product_forward"): {"per_byte": 0.20},
    ("3.6", "product_forward 64"): {"registers": 255, "per_byte": 0.33},
    ("3.6", "product_join"): {"per_byte": 0.165},
    ("3.6", "product_join 64"): {"per_byte": 0.225},
    ("3.6", "activation_moments"): {"per_byte": 0.50},
    ("3.6", "activation_moments 128"): {"per_byte": 0.25},
    ("3.6", "moments_input_gradient"): {"per_byte": 0.215},
    ("3.6", "moments_input_gradient 64"): {"registers": 253, "per_byte": 0.225},
    ("3.6", "join_forward 64"): {"per_byte": 0.165},
    ("3.6", "join_input_gradient"): {"per_byte": 0.195},
    ("3.6", "join_input_gradient 64"): {"per_byte": 0.18},
    ("3.6", "product_input_gradient"): {"per_byte": 0.115},
    ("3.6", "product_input_gradient 64"): {"per_byte": 0.155},
    ("3.6", "pointwise_join_backward"): {"registers": 109},
    # The worst of sm_80, sm_90 and sm_100 with Triton 3.7.1, 2026-11-30.
    ("3.7", "energy_forward 64"): {"per_byte": 0.22},
    ("3.7", "energy_backward"): {"registers": 106},
    ("3.7", "energy_backward 64"): {"registers": 130, "per_byte": 0.095},
    ("3.7", "aggregate_backward 64"): {"registers": 138},
    ("3.7", "forward_stride1 16"): {"per_byte": 0.225},
    ("3.7", "forward_stride1 24"): {"per_byte": 0.325},
    ("3.7", "forward_stride1 32"): {"per_byte": 0.25},
    ("3.7", "forward_stride2 16"): {"per_byte": 0.235},
    ("3.7", "forward_stride2 24"): {"per_byte": 0.32},
    ("3.7", "forward_stride2 32"): {"per_byte": 0.25},
    ("3.7", "forward_stride1 16 folded"): {"per_byte": 0.115},
    ("3.7", "forward_stride1 24 folded"): {"per_byte": 0.215},
    ("3.7", "forward_stride1 32 folded"): {"per_byte": 0.15},
    ("3.7", "forward_stride2 24 folded"): {"per_byte": 0.125},
    ("3.7", "weight_gradient_stride1 16"): {"per_byte": 0.25},
    ("3.7", "weight_gradient_stride1 24"): {"per_byte": 0.34},
    ("3.7", "weight_gradient_stride1 32"): {"per_byte": 0.25},
    ("3.7", "weight_gradient_stride2 16"): {"per_byte": 0.205},
    ("3.7", "weight_gradient_stride2 24"): {"per_byte": 0.275},
    ("3.7", "weight_gradient_stride2 32"): {"per_byte": 0.205},
    ("3.7", "product_forward"): {"per_byte": 0.20},
    ("3.7", "product_forward 64"): {"registers": 255, "per_byte": 0.30},
    ("3.7", "product_join"): {"per_byte": 0.16},
    ("3.7", "product_join 64"): {"per_byte": 0.21},
    ("3.7", "activation_moments"): {"per_byte": 0.50},
    ("3.7", "activation_moments 128"): {"per_byte": 0.25},
    ("3.7", "moments_input_gradient"): {"per_byte": 0.185},
    ("3.7", "join_forward 64"): {"per_byte": 0.15},
    ("3.7", "pointwise_join_backward"): {"registers": 109},
    # The worst of sm_80, sm_90 and sm_100 with Triton 3.8.0, 2026-11-29.
    ("3.8", "energy_forward 64"): {"per_byte": 0.21},
    ("3.8", "energy_backward"): {"registers": 106},
    ("3.8", "energy_backward 64"): {"registers": 130, "per_byte": 0.095},
    ("3.8", "aggregate_backward 64"): {"registers": 138},
    ("3.8", "forward_stride1 16"): {"per_byte": 0.19},
    ("3.8", "forward_stride1 24"): {"per_byte": 0.28},
    ("3.8", "forward_stride1 32"): {"per_byte": 0.22},
    # It would spill, so that on sm_90 its loads are a trip ahead, and on sm_100 two warps share it,
    # with loads of 64 bits.
    ("3.8", "forward_stride1 16 folded"): {"per_byte": 0.175, "wide_loads": False},
    ("3.8", "forward_stride1 32 folded"): {"per_byte": 0.135},
    ("3.8", "forward_stride2 16"): {"per_byte": 0.19},
    ("3.8", "forward_stride2 24"): {"per_byte": 0.265},
    ("3.8", "forward_stride2 32"): {"per_byte": 0.205},
    ("3.8", "weight_gradient_stride1 16"): {"per_byte": 0.215},
    ("3.8", "weight_gradient_stride1 24"): {"per_byte": 0.305},
    ("3.8", "weight_gradient_stride1 32"): {"per_byte": 0.22},
    ("3.8", "weight_gradient_stride2 24"): {"per_byte": 0.23},
    ("3.8", "product_forward"): {"per_byte": 0.185},
    # From 512 to 256 channels a program takes as many rows as it has registers for; not with 3.9.
    ("3.8", "product_forward 64"): {"registers": 255, "per_byte": 0.26},
    ("3.8", "product_join"): {"per_byte": 0.135},
    ("3.8", "product_join 64"): {"per_byte": 0.185},
    ("3.8", "moments_input_gradient 64"): {"per_byte": 0.195},
}


def limits_of(kernel: str, window: object = None) -> Limits | None:
    """Returns the limits of a kernel under the Triton at hand; None where nobody has stated any.

    Args:
        kernel: its function's name.
        window: channels of a window of its tiles; a line that names them goes first.
    """
    line = f"{kernel} {window}" if f"{kernel} {window}" in LIMITS else kernel
    limits = LIMITS.get(line)
    release = ".".join(triton.__version__.split(".")[:2])
    changes = BY_VERSION.get((release, line))
    return replace(limits, **changes) if limits is not None and changes else limits


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
    """Returns the names of rows in the dtype of training: one for each piece of code on sm_90,
    elsewhere one for each line of limits, that which does most on its way.

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
    """Returns the channels of a window of a row's tiles, and whether it is evaluation's; of the
    moments all channels, which are one block or several: limits differ."""
    sizes = dict(row.constexprs)
    if row.kernel.endswith(":activation_moments"):
        return sizes["CHANNELS"]
    window = sizes.get("WINDOW", sizes.get("BLOCK_K"))
    return f"{window} folded" if sizes.get("FOLDED") else window


def rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Yields the names and rows for an architecture."""
    yield from shipped_rows(arch)
    yield from conv1x1_rows.operator_rows(arch)
    for stage, sizes in UNCODED_STAGES.items():
        for make in (energy_forward, energy_backward):
            row = make(sizes, Variant("bf16", arch=arch))
            yield f"{row.kernel.split(':')[1]} {stage} bf16", row
