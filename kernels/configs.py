"""Launch settings of the Triton kernels: one row for each specialisation of a kernel.

The code that launches a kernel, the table of compiled code and the ahead-of-time build read the
same rows. Settings follow from static sizes and the architecture by the rules in this file; nothing
is tuned while a program runs. No imports of PyTorch or Triton here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

Dtype = Literal["bf16", "fp16", "fp32"]
ITEM_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}

# Samples that share one load of the branch matrices and of the affine map.
SAMPLES_PER_PROGRAM = 8
# The largest branch whose Gram matrix fits into the registers of four warps.
WIDEST_BRANCH = 64


@dataclass(frozen=True)
class BlockSizes:
    """Static sizes of a coded operation; letters as in docs/math.md."""

    branches: int
    """`N`."""
    width: int
    """`D`, channels of a branch."""
    channels: int
    """`C`, output channels of a branch."""
    pixels: int
    """`P = H*W`."""


@dataclass(frozen=True)
class Variant:
    """What else a compiled kernel depends on."""

    dtype: Dtype = "bf16"
    """Of the activations."""
    affine: bool = False
    """Whether the kernel applies BatchNorm's affine map and the ReLU while it loads."""
    drop: bool = False
    """Whether there is a DropSubNNs mask (5)."""
    keep: bool = False
    """Whether there is a removal mask (10)."""
    tf32: bool = False
    """Whether float32 products may round their inputs to TF32."""
    arch: str = "sm90"
    """`sm80`, `sm90`, `sm100`, `gfx942` and so on; `cpu` in Triton's interpreter."""

    @property
    def precision(self) -> str:
        """Triton's name of the precision of float32 products."""
        return "tf32" if self.tf32 else "ieee"

    def pointer(self, present: bool = True, dtype: str | None = None) -> str | None:
        """A row's word for a tensor in the dtype of the activations, None for an absent one."""
        return f"*{dtype or self.dtype}" if present else None


Argument = str | int | float | None


@dataclass(frozen=True)
class LaunchRow:
    """One specialisation of one kernel, complete: `launch` adds the grid and the tensors only."""

    kernel: str
    """`module:function` inside this package."""
    args: tuple[Argument, ...]
    """Run-time arguments in the order of the signature: `*bf16` for a pointer, aligned to 16
    bytes; None for an absent one; a number stands for itself and is never specialised on."""
    constexprs: tuple[tuple[str, int | float | str], ...]
    num_warps: int
    trip_bytes: int
    """Bytes that a program moves in one trip of its innermost loop over a batch's tensors."""
    sample_bytes: int
    """The least that one sample costs in memory traffic: each tensor moved once."""
    num_stages: int = 1
    enable_fp_fusion: bool = True

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the launch. Their order is part of Triton's key: never sort it."""
        return {
            **dict(self.constexprs),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.enable_fp_fusion,
        }

    def function(self) -> Any:
        """The kernel, a `triton.JITFunction`."""
        return _function(self.kernel)

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        """Run the kernel on tensors in the order of `args`."""
        self.function()[grid](*args, **self.keywords)


@cache
def _function(kernel: str) -> Any:
    from .prebuilt_cache import install

    install()
    module, name = kernel.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Windows:
    """How the channels of a block are cut into windows that hold whole branches."""

    group: int
    """Branches of a window; several where one would not fill the 16 rows of a product."""
    block_k: int
    """Channels of a window, padded to a power of two."""
    count: int

    @classmethod
    def of(cls, sizes: BlockSizes) -> Windows:
        """The windows of a block."""
        group = max(1, 16 // sizes.width)
        block_k = max(16, next_power_of_2(group * sizes.width))
        return cls(group, block_k, -(-sizes.branches // group))

    def constexprs(
        self, sizes: BlockSizes, *, windows: int, block_p: int
    ) -> tuple[tuple[str, int], ...]:
        """Compile-time sizes that all kernels over windows share."""
        return (
            ("BRANCHES", sizes.branches),
            ("WIDTH", sizes.width),
            ("PIXELS", sizes.pixels),
            ("GROUP", self.group),
            ("GROUP_P", next_power_of_2(self.group)),
            ("WINDOWS", windows),
            ("BLOCK_K", self.block_k),
            ("BLOCK_P", block_p),
        )


def block_pixels(sizes: BlockSizes, most: int) -> int:
    """Pixels of a tile: the map where it is small, at least the 16 rows of a product."""
    return min(most, max(16, next_power_of_2(sizes.pixels)))


def _affine(variant: Variant) -> tuple[Argument, Argument]:
    pointer = variant.pointer(variant.affine, "fp32")
    return pointer, pointer


def _energy_row(
    kernel: str,
    args: tuple[Argument, ...],
    sizes: BlockSizes,
    variant: Variant,
    pixels: dict[int, int],
    passes: int,
) -> LaunchRow:
    """A kernel over (samples, windows): one warp a window, since more would repeat its product.

    Windows of 64 channels take two warps for their registers. `pixels` are the most pixels of a
    tile by the channels of a window, `passes` the tensors of the activations' size that are moved.
    """
    windows = Windows.of(sizes)
    block_p = block_pixels(sizes, pixels.get(windows.block_k, 16))
    item = ITEM_BYTES[variant.dtype]
    return LaunchRow(
        kernel=kernel,
        args=args,
        constexprs=(
            *windows.constexprs(sizes, windows=1, block_p=block_p),
            ("SAMPLES", SAMPLES_PER_PROGRAM),
            ("PRECISION", variant.precision),
        ),
        num_warps=2 if windows.block_k > 32 else 1,
        trip_bytes=passes * block_p * windows.group * sizes.width * item,
        sample_bytes=sizes.branches * (passes * sizes.width * sizes.pixels * item + 4),
    )


@cache
def energy_forward(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `energy.energy_forward`: 64 pixels keep several wide loads in flight."""
    return _energy_row(
        "energy:energy_forward",
        (
            "*fp32",
            variant.pointer(),
            *_affine(variant),
            "*fp32",
            variant.pointer(variant.keep, "fp32"),
            0.5,
            256,
        ),
        sizes,
        variant,
        {16: 64, 32: 64},
        passes=1,
    )


@cache
def energy_backward(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `energy.energy_backward`: smaller tiles, for the registers of its sums."""
    return _energy_row(
        "energy:energy_backward",
        (
            variant.pointer(),
            variant.pointer(variant.affine, "fp32"),
            variant.pointer(),
            *_affine(variant),
            "*fp32",
            "*fp32",
            256,
        ),
        sizes,
        variant,
        {16: 32},
        passes=2,
    )


@cache
def weighted_gram(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `energy.weighted_gram`: the forward pass with a second matrix to keep.

    For sm100 the compiler spills tiles of 32 by 32.
    """
    return _energy_row(
        "energy:weighted_gram",
        ("*fp32", variant.pointer(), *_affine(variant), "*fp32", 256),
        sizes,
        variant,
        {16: 64, 32: 16 if variant.arch == "sm100" else 32},
        passes=1,
    )


def _aggregate_constexprs(
    sizes: BlockSizes, variant: Variant, windows: int, block_p: int
) -> tuple[tuple[str, int | str], ...]:
    cut = Windows.of(sizes)
    return (
        *cut.constexprs(sizes, windows=windows, block_p=block_p),
        ("STEPS", -(-cut.count // windows)),
        ("BRANCHES_P", next_power_of_2(sizes.branches)),
        ("PRECISION", variant.precision),
    )


def _windows_per_program(sizes: BlockSizes) -> int:
    """Windows that a program of `aggregate` holds at once: eight, or four where fewer idle."""
    count = Windows.of(sizes).count
    if count <= 4:
        return next_power_of_2(count)
    return min((8, 4), key=lambda windows: -(-count // windows) * windows)


@cache
def aggregate_forward(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `aggregate.aggregate_forward`: a program a sample, a warp a window.

    Windows of 64 channels take two warps each, for their registers.
    """
    cut = Windows.of(sizes)
    windows = _windows_per_program(sizes)
    item = ITEM_BYTES[variant.dtype]
    return LaunchRow(
        kernel="aggregate:aggregate_forward",
        args=(
            variant.pointer(),
            "*fp32",
            "*fp32",
            "*fp32",
            variant.pointer(),
            *_affine(variant),
            "*fp32",
            variant.pointer(variant.drop, "fp32"),
            variant.pointer(variant.keep, "fp32"),
            0.5,
        ),
        constexprs=_aggregate_constexprs(sizes, variant, windows, 16),
        num_warps=windows * (2 if cut.block_k > 32 else 1),
        trip_bytes=windows * 16 * cut.group * sizes.width * item,
        sample_bytes=sizes.branches * (2 * sizes.width * sizes.pixels * item + 8),
    )


@cache
def aggregate_backward(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `aggregate.aggregate_backward`: as forward."""
    forward = aggregate_forward(sizes, variant)
    return replace(
        forward,
        kernel="aggregate:aggregate_backward",
        args=(
            variant.pointer(),
            variant.pointer(variant.affine, "fp32"),
            "*fp32",
            variant.pointer(),
            variant.pointer(),
            *_affine(variant),
            "*fp32",
            variant.pointer(variant.drop, "fp32"),
            variant.pointer(variant.keep, "fp32"),
            "*fp32",
            "*fp32",
            "*fp32",
            0.5,
        ),
        trip_bytes=3 * forward.trip_bytes,
        sample_bytes=sizes.branches
        * (3 * sizes.width * sizes.pixels * ITEM_BYTES[variant.dtype] + 12),
    )


def _expand_block_k(variant: Variant) -> int:
    return 32 if variant.dtype == "fp32" else 64


def takes_energy(sizes: BlockSizes, variant: Variant) -> bool:
    """Whether `expand_forward` can take energies: branches must tile its blocks of channels."""
    return _expand_block_k(variant) % sizes.width == 0


@cache
def expand_forward(
    sizes: BlockSizes,
    variant: Variant,
    *,
    sums: bool = False,
    energy: bool = False,
    factor: bool = False,
) -> LaunchRow:
    """Settings of `expand.expand_forward`.

    Args:
        sums: whether sums of `y` and `y^2` are asked for.
        energy: whether energies are taken from the tiles; needs `takes_energy`.
        factor: whether samples are scaled.

    A tile has 128 rows of 64 channels. Where there is a prologue, 256 output channels share its
    work; compiled code for other architectures than sm90 has the registers for 128.
    """
    single = variant.dtype == "fp32"
    rows = 64 if single else 128
    block_p = block_pixels(sizes, rows)
    samples = rows // block_p
    block_k = _expand_block_k(variant)
    prologue = variant.affine or variant.drop or variant.keep
    wide = not single and prologue and variant.arch == "sm90"
    block_c = min(256 if wide else 64 if single else 128, next_power_of_2(max(16, sizes.channels)))
    item = ITEM_BYTES[variant.dtype]
    channels = sizes.branches * sizes.width
    return LaunchRow(
        kernel="expand:expand_forward",
        args=(
            variant.pointer(),
            variant.pointer(sums, "fp32"),
            variant.pointer(energy, "fp32"),
            variant.pointer(),
            *_affine(variant),
            variant.pointer(),
            variant.pointer(energy, "fp32"),
            variant.pointer(variant.drop, "fp32"),
            variant.pointer(variant.keep, "fp32"),
            variant.pointer(factor, "fp32"),
            256,
        ),
        constexprs=(
            ("BRANCHES", sizes.branches),
            ("WIDTH", sizes.width),
            ("PIXELS", sizes.pixels),
            ("CHANNELS_OUT", sizes.channels),
            ("SAMPLES", samples),
            ("BLOCK_P", block_p),
            ("BLOCK_C", block_c),
            ("BLOCK_K", block_k),
            ("PRECISION", variant.precision),
        ),
        num_warps=4 if single else 8,
        num_stages=2,
        trip_bytes=(rows + block_c) * block_k * item,
        sample_bytes=(channels + sizes.channels) * sizes.pixels * item,
    )


@dataclass(frozen=True)
class LossSizes:
    """Static sizes of a coding loss."""

    branches: int
    classes: int
    soft: bool = False
    """Whether targets are probabilities."""
    exponent: float = 4.0
    decode: bool = False
    """Whether classes are read off the energies too."""


@cache
def coding_loss(sizes: LossSizes) -> LaunchRow:
    """Settings of `loss.coding_loss`: small tiles, since a batch has few samples."""
    branches = max(16, next_power_of_2(sizes.branches))
    return LaunchRow(
        kernel="loss:coding_loss",
        args=(
            "*fp32",
            "*fp32",
            "*i64" if sizes.decode else None,
            "*fp32",
            "*u8",
            "*fp32" if sizes.soft else "*i64",
            0.5,
            256,
        ),
        constexprs=(
            ("BRANCHES", sizes.branches),
            ("BRANCHES_P", branches),
            ("CLASSES", sizes.classes),
            ("SOFT", sizes.soft),
            ("EXPONENT", float(sizes.exponent)),
            ("BLOCK_B", 16),
            ("BLOCK_K", 64),
        ),
        num_warps=4,
        trip_bytes=0,
        sample_bytes=sizes.branches * 9 + 8,
    )


# Outputs of the expand convolution's input in the paper's networks, coded stages only: the map
# sizes are those of 32-pixel CIFAR images and of ImageNet at 160 and 224 pixels.
PAPER_SIZES = {
    "20x6d c3": BlockSizes(20, 12, 512, 256),
    "20x6d c4": BlockSizes(20, 24, 1024, 64),
    "10x11d c3": BlockSizes(10, 22, 512, 256),
    "10x11d c4": BlockSizes(10, 44, 1024, 64),
    "32x4d c4 160px": BlockSizes(32, 16, 1024, 100),
    "32x4d c5 160px": BlockSizes(32, 32, 2048, 25),
    "32x4d c4 224px": BlockSizes(32, 16, 1024, 196),
    "32x4d c5 224px": BlockSizes(32, 32, 2048, 49),
}

RowMaker = Callable[[BlockSizes, Variant], LaunchRow]
ROW_MAKERS: tuple[RowMaker, ...] = (
    energy_forward,
    energy_backward,
    weighted_gram,
    aggregate_forward,
    aggregate_backward,
)


def shipped_rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Every row that training the paper's networks launches, each with a name of its own.

    Training draws a DropSubNNs mask and removes no branches; the affine map of BatchNorm is applied
    by PyTorch.
    """
    dtypes: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
    for place, sizes in PAPER_SIZES.items():
        for dtype in dtypes:
            for make in ROW_MAKERS:
                row = make(sizes, Variant(dtype, drop=True, arch=arch))
                yield f"{row.kernel.split(':')[1]} {place} {dtype}", row
    for branches, classes in ((10, 10), (20, 100), (32, 1000)):
        for soft in (False, True):
            sizes_of_loss = LossSizes(branches, classes, soft)
            yield f"coding_loss {branches} of {classes} soft={soft}", coding_loss(sizes_of_loss)
    # Imported here: those settings are built from the classes above.
    from . import grouped_configs

    yield from grouped_configs.shipped_rows(arch)
