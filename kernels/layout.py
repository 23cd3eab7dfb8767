"""What every launch of a kernel needs: which tensors the kernels take, their layout and dtype.

No import of Triton before a kernel runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import rows

P = ParamSpec("P")
R = TypeVar("R")

DTYPES: dict[torch.dtype, rows.Dtype] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


# The words that rows have for the dtypes of pointers.
POINTERS: dict[str, torch.dtype] = {
    **{word: dtype for dtype, word in DTYPES.items()},
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "i1": torch.bool,
}
# Architectures that PyTorch runs on and Triton does not compile for.
TOO_OLD = ("sm50", "sm52", "sm53", "sm60", "sm61", "sm62")

# Looked for once: the compiler of torch 2.11 does not follow the search.
HAS_TRITON = find_spec("triton") is not None


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which is decided when they are imported."""
    if not (HAS_TRITON and os.environ.get("TRITON_INTERPRET")):
        return False
    from .tile import INTERPRETED

    # The value: the compiler of torch 2.11 cannot see through a constexpr.
    return bool(INTERPRETED.value)


def tf32_allowed(convolution: bool = False) -> bool:
    """Returns whether PyTorch lets float32 products, or convolutions, round their inputs to TF32.

    It has a setting for each, and one for all that counts where theirs says `none`. The older
    `allow_tf32` of cuDNN cannot be read once a program has used the newer settings.
    """
    # A property of the module, which type checkers do not see.
    default: str = torch.backends.fp32_precision  # type: ignore[attr-defined]
    if convolution:
        precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    else:
        precision = torch.backends.cuda.matmul.fp32_precision
    return (default if precision == "none" else precision) == "tf32"


@cache
def architecture(device: int) -> str:
    """Returns the name of a CUDA device's architecture, as settings and tables have it: `sm90`."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def architecture_of(x: Tensor) -> str:
    """Returns the name of the architecture that computes on a tensor; `cpu` without a GPU."""
    return architecture(x.device.index) if x.is_cuda else "cpu"


def without_kernels(device: int) -> str | None:
    """Returns why no kernel runs on a CUDA device; None if kernels do."""
    if not HAS_TRITON:
        return "Triton is not installed"
    arch = architecture(device)
    if arch in TOO_OLD:
        return f"Triton compiles for GPUs from sm70 on, not for {arch}"
    return None


def too_large(row: rows.LaunchRow, device: int) -> str | None:
    """Returns why a kernel does not fit onto the current device; None if it does.

    It is compiled for that, as its launch would do.
    """
    needed, available = shared_memory_of(row), shared_memory(device)
    if needed <= available:
        return None
    name = row.kernel.partition(":")[2]
    return f"{name} needs {needed} bytes of shared memory, and the GPU has {available}"


@cache
def shared_memory_of(row: rows.LaunchRow) -> int:
    """Returns the bytes of shared memory that a kernel takes; none in Triton's interpreter."""
    from .tile import INTERPRETED

    return 0 if INTERPRETED.value else int(compiled(row).metadata.shared)


@cache
def shared_memory(device: int) -> int:
    """Returns the bytes that Triton holds against what a kernel takes; none in the interpreter."""
    from triton.runtime import driver

    from .tile import INTERPRETED

    if INTERPRETED.value:
        return 0
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


def compiled(row: rows.LaunchRow) -> Any:
    """Returns Triton's compiled kernel of a row, made by the JIT as a launch makes it."""
    args = [
        POINTERS[value.removeprefix("*")] if isinstance(value, str) else value for value in row.args
    ]
    return row.function().warmup(*args, grid=(1,), **row.keywords)


def unsupported(x: Tensor, *, width: int = 0, widest: int = 0) -> str | None:
    """Returns why the kernels cannot run on activations `x [B, C, H, W]`; None if they can.

    Args:
        x: the activations.
        width: channels of a branch or group; 0 for an operation without them.
        widest: the most of these that the kernels of the operation take.
    """
    if not (x.is_cuda or interpreted()):
        return f"the kernels run on CUDA tensors, not on {x.device.type}"
    if x.is_cuda and (reason := without_kernels(x.device.index)) is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    if width > widest:
        return f"the kernels take branches and groups of up to {widest} channels, not {width}"
    return None


def variant_of(x: Tensor, *, tf32: bool | None = None, **options: bool) -> rows.Variant:
    """Returns what a kernel on activations `x` is compiled for.

    Args:
        x: activations in one of `DTYPES`.
        tf32: whether float32 products may round to TF32; as PyTorch's matrix products do if None.
        options: those of `rows.Variant` that are switched on or off.
    """
    dtype = DTYPES[x.dtype]
    rounds = dtype == "fp32" and (tf32_allowed() if tf32 is None else tf32)
    return rows.Variant(dtype=dtype, tf32=rounds, arch=architecture_of(x), **options)


def transformed(*values: Tensor) -> bool:
    """Returns whether a transform of `torch.func`, or forward mode, differentiates with values."""
    return torch._C._are_functorch_transforms_active() or (
        not torch.compiler.is_compiling()
        and any(
            forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]
            for value in values
        )
    )


def without_autocast(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Returns the function with its products in the dtypes of its arguments, whatever autocast is
    on for the device of the first one.

    Whatever multiplies matrices here has it, so that no result and no gradient is rounded,
    wherever it is computed.
    """

    @wraps(function)
    def in_own_dtypes(first: Tensor, /, *others: P.args, **keywords: P.kwargs) -> R:
        device = first.device.type
        # There is no autocast for `meta`, and asking for it is an error.
        if first.is_meta or not torch.is_autocast_enabled(device):
            return function(first, *others, **keywords)
        with torch.autocast(device, enabled=False):
            return function(first, *others, **keywords)

    return in_own_dtypes


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """`[B, N*D, H, W]` as contiguous `[B, H, W, N*D]`, copied unless it is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def aligned_rows(x: Tensor) -> Tensor:
    """Returns `as_rows` at 16 bytes."""
    return aligned(as_rows(x))


def channels_last(x: Tensor) -> Tensor:
    """The tensor with the strides that every implementation and fake here gives to its results."""
    return as_rows(x).permute(0, 3, 1, 2)


def empty_rows(like: Tensor, channels: int | None = None) -> Tensor:
    """An uninitialised `[B, H, W, C]` for a `[B, C, H, W]`, with another number of channels."""
    batch, own, height, width = like.shape
    return like.new_empty((batch, height, width, own if channels is None else channels))


def empty_float32(like: Tensor, *shape: int) -> Tensor:
    """Returns an uninitialised float32 tensor on the device of another one."""
    return like.new_empty(shape, dtype=torch.float32)


def as_float32(value: Tensor | None) -> Tensor | None:
    """Returns contiguous float32 numbers, as the kernels read vectors and masks; None for None."""
    if value is None or (value.dtype == torch.float32 and value.is_contiguous()):
        return value
    return value.to(torch.float32).contiguous()


def aligned(x: Tensor) -> Tensor:
    """Returns the tensor contiguous and at 16 bytes, as the launch rows promise of pointers."""
    contiguous = x if x.is_contiguous() else x.contiguous()
    if rows.launches_nothing() or contiguous.data_ptr() % 16 == 0:
        return contiguous
    return contiguous.clone()


def pixels_of(rows: Tensor) -> int:
    """Returns the pixels of all samples of a map `[B, H, W, C]`."""
    return rows.numel() // rows.shape[3]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which energies and sums are formed: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as the PyTorch operator `coded_resnext::name`, which writes to no input.

    Its fake is the function itself with no kernel launched: shapes, layouts and dtypes have one
    source.
    """

    def register(function: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(f"coded_resnext::{name}", mutates_args=())(function)

        @registered.register_fake
        def _(*arguments: Any) -> Any:
            with rows.without_launches():
                return function(*arguments)

        return registered

    return register
