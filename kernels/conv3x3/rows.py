"""Launch settings of the grouped 3x3 convolution: windows, one row for each specialised kernel, and
the table that says where the kernels are used.

The size of the map and of the batch are run-time numbers: one compiled kernel serves them all. No
imports of PyTorch or Triton here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from coded_resnext.kernels.rows import (
    ALL_PASSES,
    ITEM_BYTES,
    Dtype,
    LaunchRow,
    Passes,
    Plan,
    Variant,
    next_power_of_2,
    triton_release,
)

# The selection table: where the kernels have been measured to win against cuDNN. Architecture,
# width D and stride to the passes that run them. Empty: an H100 timed them before they were made to
# wait less, and then they won in the input gradients with stride 2 alone, which no step has tried.
WINS: dict[tuple[str, int, int], Passes] = {}
# Where PyTorch computes the convolution, groups that are merged into wider ones, and how wide these
# are: architecture, width D and stride to channels. In the three passes on an H100 (bfloat16,
# channels-last, 256 images of 160 pixels) D = 4 took 0.66 ms, merged 0.45, and D = 8 0.30 and 0.25;
# D = 8 with stride 2 took 0.57 and 0.56, and wider groups won nothing.
MERGED: dict[tuple[str, int, int], int] = {("sm90", 4, 1): 32, ("sm90", 8, 1): 16}
# The channels of the smallest product on tensor cores, for sizes that the table does not have.
SMALLEST_PRODUCT = 16
# Groups wider than this need windows of 64 channels, whose kernels spill registers to memory: they
# are for checks, and never in the table.
WIDEST_SHIPPED = 32

# Channels of the widest window; nine matrices of this size fill the registers of four warps.
WIDEST_WINDOW = 64
# Lanes of a program: the rows of the smallest tensor-core product. More would spill.
LANES = 16
# Rows a program walks down at most. Two more are read and thrown away; and a lane of the forward
# kernel sums this many values before they are merged by Chan's formula.
MOST_ROWS = 16
# Elements of the nine matrices that one program of the last stage of the weight gradient adds up.
REDUCED = 256
# Other weights that are rounded where the 3x3 one is packed, and elements of each in a program.
MOST_OTHERS = 3
ROUNDED = 1024
# The map that sizes in bytes are stated for.
EXAMPLE_MAP = 28


@dataclass(frozen=True)
class GroupedSizes:
    """Static sizes of a grouped 3x3 convolution with as many output as input channels."""

    groups: int
    """`N`."""
    width: int
    """`D`, channels of a group."""
    stride: int = 1
    """1 or 2."""


@dataclass(frozen=True)
class GroupedWindows:
    """How the channels are cut into windows of whole groups, whose weights are block-diagonal."""

    group: int
    """Groups of a window."""
    padded: int
    """Channels that a group takes in memory."""
    count: int

    @classmethod
    @cache
    def of(cls, sizes: GroupedSizes) -> GroupedWindows:
        """Returns the smallest windows that start and end at 16 bytes of 16-bit numbers.

        As many whole groups as tile 16 to 32 channels without a gap, or else groups padded to a
        multiple of 4 channels, 8 where one group is a window: D = 11, 22, 44 become 12, 24, 48.
        Where the last window is not full, or a group is padded, the tensors have to be copied.
        """
        for padded in (sizes.width, -(-sizes.width // 4) * 4, -(-sizes.width // 8) * 8):
            fitting = [
                group
                for group in range(1, 32 // min(padded, 32) + 1)
                if group * padded % 8 == 0 and group * padded >= 16
            ]
            if fitting:
                break
        # Without a gap at the end if possible; then the smallest.
        group = min(fitting, key=lambda group: (sizes.groups % group > 0, group))
        return cls(group, padded, -(-sizes.groups // group))

    @property
    def channels(self) -> int:
        """Returns the number of channels of a window."""
        return self.group * self.padded

    @property
    def block_k(self) -> int:
        """Returns the number of channels of a window, filled up to a power of two."""
        return max(16, next_power_of_2(self.channels))

    @property
    def warps(self) -> int:
        """Returns one warp for 16 channels: more registers a thread would spill."""
        return self.block_k // 16

    def fit(self, sizes: GroupedSizes) -> bool:
        """Returns whether the windows tile the channels as they are, so that nothing has to be
        copied."""
        return self.padded == sizes.width and self.count * self.group == sizes.groups


def planned(arch: str, sizes: GroupedSizes) -> Plan:
    """Returns the line of the selection table for an architecture and a convolution."""
    if sizes.width > WIDEST_SHIPPED:
        return Plan(ALL_PASSES, f"groups of more than {WIDEST_SHIPPED} channels spill registers")
    if not GroupedWindows.of(sizes).fit(sizes):
        return Plan(ALL_PASSES, "the channels would have to be copied to pad them")
    passes = WINS.get((arch, sizes.width, sizes.stride))
    if passes is None:
        return Plan(ALL_PASSES, f"not measured on {arch}")
    return Plan(ALL_PASSES, f"measured on {arch}", passes)


def merged_width(sizes: GroupedSizes, arch: str, *, forced: bool) -> int:
    """Returns the channels of the groups that PyTorch is given: `D`, or more if they are merged.

    Args:
        sizes: of the convolution.
        arch: the architecture.
        forced: whether groups are to be merged also where this was not measured to win; then into
            the narrowest that have `SMALLEST_PRODUCT` channels.
    """
    width = MERGED.get((arch, sizes.width, sizes.stride), 0)
    if width and sizes.groups * sizes.width % width == 0:
        return width
    if not forced:
        return sizes.width
    fitting = (n for n in range(1, sizes.groups) if sizes.groups % n == 0)
    widths = (n * sizes.width for n in fitting)
    return next((w for w in widths if w >= SMALLEST_PRODUCT), sizes.groups * sizes.width)


def _row(
    kernel: str,
    sizes: GroupedSizes,
    variant: Variant,
    tensors: tuple[str | None, ...],
    inputs: int,
    outputs: int,
) -> LaunchRow:
    """Returns a row of one of the three kernels.

    Args:
        kernel: `module:function` without the stride.
        sizes, variant: what it is compiled for.
        tensors: the pointers in the order of the signature.
        inputs, outputs: tensors of the batch that it reads or writes at the input's and at the
            output's size.
    """
    windows = GroupedWindows.of(sizes)
    item = ITEM_BYTES[variant.dtype]
    # A lane of the walk: two columns of one row with stride 1, except for the weight gradient, or
    # a 2 x 2 patch of the input over one pixel of the output.
    patch, pixel = (4, 1) if sizes.stride == 2 else (2, 2) if "weight" not in kernel else (1, 1)
    example = EXAMPLE_MAP**2
    moved = inputs * example + outputs * (example // sizes.stride**2)
    return LaunchRow(
        kernel=f"{kernel}_stride{sizes.stride}",
        args=(*tensors, 256, EXAMPLE_MAP, EXAMPLE_MAP, EXAMPLE_MAP // 2),
        constexprs=(
            ("CHANNELS", windows.count * windows.channels),
            ("WINDOW", windows.channels),
            ("BLOCK_K", windows.block_k),
            ("BLOCK_M", LANES),
            ("PRECISION", variant.precision),
        ),
        num_warps=windows.warps,
        trip_bytes=LANES * windows.channels * item * (inputs * patch + outputs * pixel),
        sample_bytes=sizes.groups * sizes.width * item * moved,
    )


# Where a release of Triton keeps registers of a program in memory unless its loads are a trip
# ahead: release, architecture, kernel and width. Others would issue 2 to 7 % more instructions, and
# some would spill by it.
AHEAD = {
    ("3.6", "sm80", "input_gradient_stride2", 12),
    ("3.6", "sm80", "input_gradient_stride2", 24),
    ("3.6", "sm100", "forward_stride1", 6),
    ("3.6", "sm100", "forward_stride1", 24),
    ("3.7", "sm90", "forward_stride1", 16),
    ("3.7", "sm100", "forward_stride1", 16),
}


def _ahead(row: LaunchRow, sizes: GroupedSizes, arch: str) -> LaunchRow:
    """Returns the row with its loads a trip ahead where AHEAD has it."""
    name = row.kernel.partition(":")[2]
    ahead = (triton_release(), arch, name, sizes.width) in AHEAD
    return replace(row, num_stages=2) if ahead else row


def _folded_in_3_8(row: LaunchRow, sizes: GroupedSizes, arch: str) -> LaunchRow:
    """Returns a row of evaluation's energies, 16 channels and stride 1 as Triton 3.8 needs it.

    Its code for sm_90 keeps 6 registers in memory unless its loads are a trip ahead, and that for
    sm_100 keeps 8, or 14 with them, unless two warps share the tile.
    """
    one_warp = GroupedWindows.of(sizes).channels == 16 and sizes.stride == 1
    if triton_release() != "3.8" or not one_warp or arch not in ("sm90", "sm100"):
        return row
    return replace(row, num_stages=2) if arch == "sm90" else replace(row, num_warps=2)


# Where the kernels between BatchNorms ask for a row before they work on the one before. On an H100
# they waited for memory in two thirds of their time. The interpreter checks the results.
_WAITING = ("sm90", "cpu")


def _asks_ahead(sizes: GroupedSizes, variant: Variant, windows: tuple[int, ...]) -> bool:
    """Returns whether a kernel over windows of so many channels asks for rows ahead.

    Never over windows of 24, which compute on 32: they issue as much as a GPU can while their
    bytes come, and asking ahead takes more.
    """
    # In float16 the gradient of the weight would keep registers in memory.
    waits = variant.arch in _WAITING and variant.affine and variant.dtype == "bf16"
    return waits and GroupedWindows.of(sizes).channels in windows


def _weight_asks_ahead(sizes: GroupedSizes, variant: Variant) -> bool:
    """Returns the same for the gradient of the weight; with windows of 32 channels no registers are
    left for another row."""
    return _asks_ahead(sizes, variant, (16,))


@cache
def forward(sizes: GroupedSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `forward.forward_stride1` and `forward_stride2`."""
    vector = "*fp32" if variant.affine else None
    tensors = (
        variant.pointer(),
        "*fp32" if variant.statistics else None,
        "*fp32" if variant.energies else None,
        variant.pointer(),
        vector,
        vector,
        variant.pointer(),
        "*fp32" if variant.folded else None,
        "*fp32" if variant.keep else None,
        variant.pointer(variant.energies),
    )
    row = _row("conv3x3.forward:forward", sizes, variant, tensors, inputs=1, outputs=1)
    channels, *others = row.constexprs
    more = (("PADDED", GroupedWindows.of(sizes).padded), ("FOLDED", variant.folded))
    row = replace(row, constexprs=(channels, *more, *others))
    if variant.energies:
        row = _folded_in_3_8(_ahead(row, sizes, variant.arch), sizes, variant.arch)
    if _asks_ahead(sizes, variant, (16, 32)):
        row = replace(row, num_stages=2)
    # With two warps for 24 channels the compiler for sm100 keeps two registers in memory.
    partly_filled = GroupedWindows.of(sizes).channels == 24
    plain = not (variant.affine or variant.statistics or variant.energies)
    return replace(row, num_warps=1) if sizes.stride == 2 and partly_filled and plain else row


@cache
def input_gradient(sizes: GroupedSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `backward.input_gradient_stride1` and `_stride2`."""
    vector = "*fp32" if variant.affine else None
    coefficient = "*fp32" if variant.statistics else None
    tensors = (
        variant.pointer(),
        vector,
        variant.pointer(),
        variant.pointer(variant.statistics),
        coefficient,
        coefficient,
        variant.pointer(variant.affine),
        vector,
        vector,
        variant.pointer(),
    )
    inputs, outputs = 1 + variant.affine, 1 + variant.statistics
    row = _row("conv3x3.backward:input_gradient", sizes, variant, tensors, inputs, outputs)
    if _asks_ahead(sizes, variant, (16, 32)):
        return replace(row, num_stages=2)
    return _ahead(row, sizes, variant.arch) if variant.affine else row


@cache
def weight_gradient(sizes: GroupedSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `weight.weight_gradient_stride1` and `_stride2`."""
    vector = "*fp32" if variant.affine else None
    coefficient = "*fp32" if variant.statistics else None
    tensors = (
        "*fp32",
        variant.pointer(),
        variant.pointer(variant.statistics),
        coefficient,
        coefficient,
        variant.pointer(),
        vector,
        vector,
    )
    outputs = 1 + variant.statistics
    row = _row("conv3x3.weight:weight_gradient", sizes, variant, tensors, 1, outputs)
    ahead = _weight_asks_ahead(sizes, variant)
    if sizes.stride == 2:
        return replace(row, num_stages=2) if ahead else row
    *others, precision = row.constexprs
    row = replace(row, constexprs=(*others, ("AHEAD", ahead), precision))
    # Triton 3.8 keeps some in memory with 176, the others with 168.
    registers = 168 if triton_release() == "3.8" else 176
    return replace(row, registers=registers) if ahead and variant.arch != "cpu" else row


def weight_splits(sizes: GroupedSizes, variant: Variant, parts: int) -> int:
    """Returns the number of programs that share the pixels of one window in the weight gradient.

    As many as an H100 holds where they ask for rows ahead, or else about eight of one warp for each
    processor of a large GPU; every one of them writes nine matrices, so that more would move more
    bytes than the tensors have.
    """
    windows = GroupedWindows.of(sizes)
    held = 132 * (9 if sizes.stride == 2 else 11)
    programs = held if _weight_asks_ahead(sizes, variant) else 1024 // windows.warps
    return max(1, min(parts, programs // windows.count))


def _weights(sizes: GroupedSizes, last: bool) -> tuple[tuple[str, int], ...]:
    windows = GroupedWindows.of(sizes)
    return (
        ("GROUPS", sizes.groups),
        ("WIDTH", sizes.width),
        ("PADDED", windows.padded),
        ("GROUP", windows.group),
        ("BLOCK_K", windows.block_k),
        ("LAST", last),
    )


@cache
def pack_weights(
    sizes: GroupedSizes, dtype: Dtype, own: Dtype, *, last: bool, others: int = 0
) -> LaunchRow:
    """Returns the settings of `weight.pack_weights`: a weight in a dtype of its own, channels-last
    or not, and so many others that are rounded."""
    windows = GroupedWindows.of(sizes)
    return LaunchRow(
        kernel="conv3x3.weight:pack_weights",
        args=(
            f"*{dtype}",
            *(f"*{dtype}" if number < others else None for number in range(MOST_OTHERS)),
            f"*{own}",
            *(f"*{own}" if number < others else None for number in range(MOST_OTHERS)),
            *(1 << 16 for _ in range(MOST_OTHERS)),
        ),
        constexprs=(
            *_weights(sizes, last),
            ("MIRROR", sizes.stride == 1),
            ("BLOCK_E", ROUNDED),
        ),
        num_warps=windows.warps,
        trip_bytes=0,
        sample_bytes=0,
    )


@cache
def reduce_weight_gradient(sizes: GroupedSizes, dtype: Dtype, *, last: bool) -> LaunchRow:
    """Returns the settings of `weight.reduce_weight_gradient`, for a gradient that is channels-last
    or not."""
    return LaunchRow(
        kernel="conv3x3.weight:reduce_weight_gradient",
        args=(f"*{dtype}", "*fp32", 128),
        constexprs=(*_weights(sizes, last), ("BLOCK_E", REDUCED), ("BLOCK_S", 16)),
        num_warps=4,
        trip_bytes=16 * REDUCED * 4,
        sample_bytes=0,
    )


# The 3x3 convolutions of the paper's networks whose channels need no padding: groups and (width,
# stride) by stage. The first block of a stage has the stride, the others have none.
PAPER_CONVOLUTIONS: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "32x4d c2": (32, ((4, 1),)),
    "32x4d c3": (32, ((8, 2), (8, 1))),
    "32x4d c4": (32, ((16, 2), (16, 1))),
    "32x4d c5": (32, ((32, 2), (32, 1))),
    "20x6d c2": (20, ((6, 1),)),
    "20x6d c3": (20, ((12, 2), (12, 1))),
    "20x6d c4": (20, ((24, 2), (24, 1))),
}
CODED = ("32x4d c4", "32x4d c5", "20x6d c3", "20x6d c4")


def shipped_rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Yields every row that a step of training in bfloat16 launches, alone (`plain`) and between
    BatchNorms (`fused`), and evaluation (`folded`). With Triton 3.8 one row depends on the
    architecture."""
    for stage, (groups, layers) in PAPER_CONVOLUTIONS.items():
        for width, stride in layers:
            sizes = GroupedSizes(groups, width, stride)
            for kind in ("plain", "fused"):
                fused = kind == "fused"
                variant = Variant("bf16", affine=fused, statistics=fused, arch=arch)
                for make in (forward, input_gradient, weight_gradient):
                    row = make(sizes, variant)
                    yield f"grouped {row.kernel.split(':')[1]} {stage} {kind}", row
            folded = Variant("bf16", folded=True, energies=stage in CODED, arch=arch)
            row = forward(sizes, folded)
            yield f"grouped {row.kernel.split(':')[1]} {stage} folded", row
            # Weights are float32 in a training in bfloat16, and bfloat16 in evaluation.
            for last in (False, True):
                which = f"stride {stride} {stage}{' channels-last' if last else ''}"
                # Those of the 1x1 convolutions, with a projection where a stage begins.
                for others in (2, 3):
                    row = pack_weights(sizes, "bf16", "fp32", last=last, others=others)
                    yield f"grouped pack_weights {which}, {others} others", row
                row = pack_weights(sizes, "bf16", "bf16", last=last)
                yield f"grouped pack_weights {which} folded", row
                row = reduce_weight_gradient(sizes, "fp32", last=last)
                yield f"grouped reduce_weight_gradient {which}", row
