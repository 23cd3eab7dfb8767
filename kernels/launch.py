"""What every launch of a kernel needs: which tensors the kernels take, layouts, row settings.

No import of Triton before a kernel runs.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import configs, energy_configs, gram

DTYPES: dict[torch.dtype, configs.Dtype] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


# Looked for once: the compiler of torch 2.11 does not follow the search.
HAS_TRITON = find_spec("triton") is not None


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which is decided when they are imported."""
    if not (HAS_TRITON and os.environ.get("TRITON_INTERPRET")):
        return False
    from .tile import INTERPRETED

    # The value: the compiler of torch 2.11 cannot see through a constexpr.
    return bool(INTERPRETED.value)


def unsupported(h: Tensor, width: int) -> str | None:
    """Why the kernels do not take these activations `[B, N*D, H, W]`; None if they do."""
    if h.dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {h.dtype}"
    if width > configs.WIDEST_BRANCH:
        return f"the kernels take branches of up to {configs.WIDEST_BRANCH} channels, not {width}"
    if h.numel() // h.shape[0] >= 2**31 or h.shape[0] * h.shape[1] >= 2**31:
        return "the kernels take samples, and B*N*D, of fewer than 2^31 elements"
    return None


def runs_kernels(h: Tensor, width: int) -> bool:
    """Whether an operator runs its kernels on these activations `[B, N*D, H, W]`."""
    return (h.is_cuda or interpreted()) and unsupported(h, width) is None


def variant_of(
    z: Tensor, scale: Tensor | None, drop_mask: Tensor | None, keep_mask: Tensor | None
) -> configs.Variant:
    """What a compiled kernel depends on beside sizes."""
    dtype = DTYPES[z.dtype]
    return configs.Variant(
        dtype=dtype,
        affine=scale is not None,
        drop=drop_mask is not None,
        keep=keep_mask is not None,
        tf32=dtype == "fp32" and tf32_allowed(),
        arch=architecture(z.device.index) if z.is_cuda else "cpu",
    )


def tf32_allowed() -> bool:
    """Whether PyTorch lets float32 products round their inputs to TF32."""
    # A property of the module, which type checkers do not see.
    default: str = torch.backends.fp32_precision  # type: ignore[attr-defined]
    precision = torch.backends.cuda.matmul.fp32_precision
    return bool((default if precision == "none" else precision) == "tf32")


@cache
def architecture(device: int) -> str:
    """The name of a CUDA device's architecture, as settings and tables have it: `sm90`."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """`[B, N*D, H, W]` as contiguous `[B, H, W, N*D]`, copied unless it is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def channels_last(x: Tensor) -> Tensor:
    """The tensor with the strides that every implementation and fake here gives to its results."""
    return as_rows(x).permute(0, 3, 1, 2)


def empty_rows(like: Tensor, channels: int | None = None) -> Tensor:
    """An uninitialised `[B, H, W, C]` for a `[B, C, H, W]`, with another number of channels."""
    batch, own, height, width = like.shape
    return like.new_empty((batch, height, width, own if channels is None else channels))


def _float32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32).contiguous()


class Launch:
    """What the launches of one operator share: sizes, settings and tensors as the kernels read."""

    def __init__(
        self,
        z: Tensor,
        branch_weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        drop_mask: Tensor | None,
        keep_mask: Tensor | None,
    ) -> None:
        branches, channels, width = branch_weight.shape
        self.batch, self.pixels = z.shape[0], z.shape[2] * z.shape[3]
        self.sizes = configs.BlockSizes(branches, width, channels, self.pixels)
        self.variant = variant_of(z, scale, drop_mask, keep_mask)
        self.inverse_size = 1.0 / (channels * self.pixels)
        self.rows = as_rows(z)
        self.scale, self.bias = _float32(scale), _float32(bias)
        self.drop, self.keep = _float32(drop_mask), _float32(keep_mask)
        self.windows = configs.Windows.of(self.sizes).count
        # Under autocast this product would be rounded to half precision.
        with torch.autocast(z.device.type, enabled=False):
            self.form = gram.branch_forms(branch_weight, torch.float32)

    def over_windows(self, row: configs.LaunchRow) -> tuple[int, int]:
        """The grid of a kernel over samples and windows."""
        settings = dict(row.constexprs)
        samples, windows = int(settings["SAMPLES"]), int(settings["WINDOWS"])
        return -(-self.batch // samples), -(-self.windows // windows)

    def weight_gradient(self, coefficient: Tensor, branch_weight: Tensor) -> Tensor:
        """(17) without the part that the convolution computes."""
        row = energy_configs.weighted_gram(self.sizes, self.variant)
        grid = self.over_windows(row)
        branches, width = self.sizes.branches, self.sizes.width
        parts = self.form.new_empty((grid[0], branches, width, width))
        row.launch(grid, parts, self.rows, self.scale, self.bias, coefficient, self.batch)
        with torch.autocast(parts.device.type, enabled=False):
            return torch.bmm(branch_weight.to(torch.float32), parts.sum(0)).to(branch_weight.dtype)
