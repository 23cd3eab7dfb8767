"""What launch settings are made of: one row for each specialisation of a kernel.

The code that launches a kernel, the table of compiled code and the ahead-of-time build read the
same rows. Settings follow from static sizes and the architecture by the rules in the `rows.py` of
each operation's folder; `kernels/build/build.py` lists those that training the paper's networks
needs. Nothing is tuned while a program runs. No imports of PyTorch or Triton in any of these files.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple, Protocol

Dtype = Literal["bf16", "fp16", "fp32"]
ITEM_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}

# The largest branch whose Gram matrix fits into the registers of four warps.
WIDEST_BRANCH = 64


@dataclass(frozen=True)
class CodedSizes:
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
    """What a compiled kernel depends on beside its sizes; an operation reads the options it has."""

    dtype: Dtype = "bf16"
    """The dtype of the activations, and of the weights of a convolution."""
    affine: bool = False
    """Whether the kernel applies `relu(scale x + bias)`, BatchNorm's affine map and the ReLU, while
    it loads its operand; of a join, whether the residual has such a map, without a ReLU."""
    statistics: bool = False
    """Says whether statistics of the output are taken, and their gradient flows back."""
    drop: bool = False
    """Says whether there is a DropSubNNs mask (5)."""
    keep: bool = False
    """Says whether there is a removal mask (10)."""
    energies: bool = False
    """Says whether a folded grouped convolution takes energies."""
    folded: bool = False
    """Says whether a bias and a ReLU are behind a grouped convolution, as in evaluation."""
    gain: bool = False
    """Says whether the gradient of the output comes without its factor for each channel."""
    signs: bool = False
    """Says whether a join writes, and its gradient reads, one bit for the ReLU of each element."""
    output_gradient: bool = False
    """Whether the gradient of the output is written as it enters the product, for the weight's."""
    joined: bool = True
    """Says whether the output of a join has a gradient of its own."""
    residual: bool = False
    """Says whether a residual is added to a product."""
    mapped: bool = False
    """Says whether the residual that is added to a product has an affine map."""
    scaled: bool = False
    """Says whether a product has a scale for each output channel."""
    factor: bool = False
    """Says whether a product has a factor for each sample, in evaluation."""
    raw: bool = True
    """Whether the map to which a join adds the residual is there, so that the gradient of its scale
    is taken; with statistics from moments it is not."""
    tf32: bool = False
    """Says whether float32 products may round their inputs to TF32."""
    arch: str = "sm90"
    """`sm80`, `sm90`, `sm100`, `gfx942` and so on; `cpu` in Triton's interpreter."""

    @property
    def precision(self) -> str:
        """Triton's name of the precision of float32 products."""
        return "tf32" if self.tf32 else "ieee"

    def pointer(self, present: bool = True, dtype: str | None = None) -> str | None:
        """A row's word for a tensor in the dtype of the activations, None for an absent one."""
        return f"*{dtype or self.dtype}" if present else None

    @property
    def affine_map(self) -> tuple[str | None, str | None]:
        """Returns a row's words for the scale and the bias of BatchNorm's affine map."""
        pointer = self.pointer(self.affine, "fp32")
        return pointer, pointer


class Passes(NamedTuple):
    """The passes of a convolution that run Triton kernels; PyTorch computes the others."""

    forward: bool = False
    input: bool = False
    """The gradient of the input."""
    weight: bool = False
    """The gradient of the weight."""
    pointwise: bool = False
    """Where PyTorch has the product: the end of a block, its gradient and the statistics."""

    def encoded(self) -> int:
        """Returns the passes as PyTorch operators take them: a bit for each, the first lowest."""
        return self.forward + 2 * self.input + 4 * self.weight + 8 * self.pointwise

    @classmethod
    def decoded(cls, bits: int) -> Passes:
        """Returns the passes of `encoded`."""
        return _DECODED[bits]

    def within(self, others: Passes) -> Passes:
        """Returns the passes that are in others, too."""
        return Passes(*(own and other for own, other in zip(self, others, strict=True)))

    def keeps_signs(self, channels: int) -> bool:
        """Whether a join of so many channels keeps signs, which kernels alone write and read.

        A byte has the signs of eight channels.
        """
        return self.forward and self.input and channels % 8 == 0

    def words(self) -> str:
        """Returns the passes for a log."""
        return ", ".join(name for name, runs in self._asdict().items() if runs) or "no pass"


_DECODED = tuple(Passes(*(bool(bits >> bit & 1) for bit in range(4))) for bits in range(16))
NO_PASSES = Passes()
ALL_PASSES = Passes(forward=True, input=True, weight=True)


@dataclass(frozen=True)
class Plan:
    """A line of a selection table: who computes which pass of a convolution."""

    passes: Passes
    """Those that run kernels where these are asked for."""
    reason: str
    measured: Passes = NO_PASSES
    """Those in which kernels have been timed to win; the others are predicted or unknown."""


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
    """Bytes that a program keeps in one trip of its innermost loop over a batch's tensors."""
    sample_bytes: int
    """The least that one sample costs in memory traffic: each tensor moved once."""
    num_stages: int = 1
    enable_fp_fusion: bool = True
    """Says whether a product may be added without being rounded before."""
    steps: int = 1
    """Trips of the innermost loop for one of the loop around it, of which `trip_bytes` then are."""
    registers: int = 0
    """The most registers that the compiler may give a thread, so that a processor holds more
    programs; 0: as many as it takes. For NVIDIA's GPUs alone."""

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the launch. Their order is part of Triton's key: never sort it."""
        return {
            **dict(self.constexprs),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.enable_fp_fusion,
            **({"maxnreg": self.registers} if self.registers else {}),
        }

    def function(self) -> Any:
        """Returns the kernel, a `triton.JITFunction`."""
        return _function(self.kernel)

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        """Run the kernel on tensors in the order of `args`.

        Triton's own way from arguments to compiled code takes several times as long as the launch,
        so it is gone once for each kind of arguments. Its settings are those of the first launch.
        """
        if getattr(_STATE, "is_fake", False):
            return
        kind = (id(self), args[0].device, *map(_kind, args))
        known = COMPILED.get(kind)
        launch = getattr(_STATE, "launch", _launch)
        if known is not None:
            kernel = known.kernel[(*grid, 1, 1)[:3]]
            launch(kernel, (*args, *known.constexprs), is_compiled=True)
            return
        function = self.function()
        kernel = launch(partial(function[grid], **self.keywords), args, is_compiled=False)
        # The interpreter compiles nothing.
        if kernel is not None:
            values = dict(self.constexprs)
            behind = tuple(values[name] for name in function.arg_names[len(args) :])
            COMPILED[kind] = _Compiled(self, kernel, behind)


class _Compiled(NamedTuple):
    """A compiled kernel, with the row that it is of."""

    row: LaunchRow
    """Kept, since the key has its address, which another row might be given."""
    kernel: Any
    """A `triton.compiler.CompiledKernel`."""
    constexprs: tuple[int | float | str, ...]
    """What it is called with behind the arguments."""


COMPILED: dict[tuple[Any, ...], _Compiled] = {}
"""By row, device, and what Triton looks at in the arguments. What changes a kernel empties it."""


def _kind(argument: Any) -> Any:
    """What Triton compiles a kernel for, of one that is specialised on no number."""
    if argument is None or isinstance(argument, float):
        return argument is None
    if isinstance(argument, int):
        return argument.bit_length() < 32
    return argument.dtype, argument.data_ptr() % 16 == 0


_STATE = threading.local()


@contextmanager
def _with_state(name: str, value: object) -> Iterator[None]:
    before = dict(vars(_STATE))
    setattr(_STATE, name, value)
    try:
        yield
    finally:
        vars(_STATE).clear()
        vars(_STATE).update(before)


def without_launches() -> AbstractContextManager[None]:
    """Lets this thread launch nothing, for results of which shape and layout alone are wanted."""
    return _with_state("is_fake", True)


def launches_nothing() -> bool:
    """Returns whether this thread is within `without_launches`."""
    return bool(getattr(_STATE, "is_fake", False))


class Launch(Protocol):
    """Launches a kernel and returns what that returns."""

    def __call__(
        self, kernel: Callable[..., Any], arguments: tuple[Any, ...], *, is_compiled: bool
    ) -> Any:
        """Launch; `is_compiled` says whether it is compiled code, which takes a `stream`."""


def launches_by(launch: Launch) -> AbstractContextManager[None]:
    """Lets a function launch the kernels of this thread."""
    return _with_state("launch", launch)


def _launch(kernel: Callable[..., Any], arguments: tuple[Any, ...], *, is_compiled: bool) -> Any:
    return kernel(*arguments)


@cache
def _function(kernel: str) -> Any:
    from coded_resnext.kernels.prebuilt import install

    install()
    module, name = kernel.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


@cache
def triton_release() -> str:
    """Major and minor number of the installed Triton, such as `3.9`; empty without one.

    For the few rows that one version needs to be its own.
    """
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return ""


def next_power_of_2(number: int) -> int:
    """Returns the least power of two that is not below a positive number."""
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
    def of(cls, sizes: CodedSizes) -> Windows:
        """Returns the windows of a block."""
        group = max(1, 16 // sizes.width)
        block_k = max(16, next_power_of_2(group * sizes.width))
        return cls(group, block_k, -(-sizes.branches // group))

    def constexprs(
        self, sizes: CodedSizes, *, windows: int, block_p: int
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


def with_registers(row: LaunchRow, sizes: CodedSizes, variant: Variant) -> LaunchRow:
    """Returns a gradient's row with twice the warps where its own would spill.

    In float32 the compiler for sm_80 leaves 32 registers to a thread that works on 64 channels.
    """
    wide = Windows.of(sizes).block_k > 32
    starved = wide and variant.dtype == "fp32" and variant.arch == "sm80"
    return replace(row, num_warps=2 * row.num_warps) if starved else row


def block_pixels(sizes: CodedSizes, most: int) -> int:
    """Pixels of a tile: the map where it is small, at least the 16 rows of a product."""
    return min(most, max(16, next_power_of_2(sizes.pixels)))


# Architecture, kernel, and sizes as `sizes_of` words them, to the settings that differ.
TUNED: dict[tuple[str, str, str], Mapping[str, int]] = {}


# Compile-time numbers of each kernel that results do not depend on.
TILES: dict[str, tuple[str, ...]] = {
    "coded.energy:energy_forward": ("BLOCK_P", "SAMPLES"),
    "coded.energy:energy_backward": ("BLOCK_P", "SAMPLES"),
    "coded.energy:weighted_gram": ("BLOCK_P", "SAMPLES"),
    "coded.aggregate:aggregate_forward": ("BLOCK_P",),
    "coded.aggregate:aggregate_backward": ("BLOCK_P",),
}


_SIZES = {"BRANCHES": "N", "WIDTH": "D", "PIXELS": "P"}


def sizes_of(row: LaunchRow) -> str:
    """What a row is for, in words: its sizes, and what its tensors are, `-` for an absent one."""
    constexprs = dict(row.constexprs)
    sizes = (
        f"{letter}={constexprs[name]}" for name, letter in _SIZES.items() if name in constexprs
    )
    tensors = (str(arg or "-").removeprefix("*") for arg in row.args if isinstance(arg, str | None))
    return f"{' '.join(sizes)} {','.join(tensors)} {constexprs['PRECISION']}"


def settings_of(row: LaunchRow) -> dict[str, int]:
    """Returns the settings of a row that can be changed; empty for a kernel without any."""
    if row.kernel not in TILES:
        return {}
    constexprs = dict(row.constexprs)
    tiles = {name: int(constexprs[name]) for name in TILES[row.kernel]}
    return {**tiles, "num_warps": row.num_warps, "num_stages": row.num_stages}


def changed(row: LaunchRow, settings: Mapping[str, int]) -> LaunchRow:
    """Returns a row with other tiles, warps or stages.

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
        trip_bytes=row.trip_bytes * new["BLOCK_P"] // own["BLOCK_P"],
    )


def tuned(row: LaunchRow, arch: str) -> LaunchRow:
    """Returns the row with what the table has for it."""
    settings = TUNED.get((arch, row.kernel, sizes_of(row)))
    return changed(row, settings) if settings else row
