"""The 1x1 convolution in PyTorch: its definition, and its products, which are cuBLAS's on a GPU.

`x [B, I, H, W]`, `weight [O, I, 1, 1]`, `y [B, O, H, W]`. A channels-last map is a matrix with a
row for each pixel, so that each pass is one product; other layouts are copied. Results of the size
of a map are channels-last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.kernels.layout import accumulation_dtype, as_rows, without_autocast


def reference(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Returns the 1x1 convolution of `relu(scale x + bias)`, `[B, O, H, W]`.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I, 1, 1]`.
        scale, bias: `[I]`; without them `x` itself is convolved.
    """
    if scale is not None and bias is not None:
        x = torch.relu(scale[:, None, None] * x + bias[:, None, None])
    return torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x)


def _matrix(x: Tensor) -> Tensor:
    """Returns `[B, C, H, W]` as `[B*H*W, C]`."""
    return as_rows(x).flatten(0, 2)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """Returns `[B*H*W, C]` as `[B, C, H, W]`, with the map of another tensor."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


@without_autocast
def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Returns `y = W x` at every pixel."""
    return _images(_matrix(x) @ weight.flatten(1).t(), x)


@without_autocast
def activated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns `relu(W x + bias)` at every pixel; `bias [O]` in the dtype of `x`."""
    # cuBLAS adds the bias and applies the ReLU to what it has in registers.
    return _images(torch._addmm_activation(bias, _matrix(x), weight.flatten(1).t()), x)


@without_autocast
def input_gradient(grad: Tensor, weight: Tensor, more: Tensor | None = None) -> Tensor:
    """Returns `W^T grad` at every pixel, with another gradient `[B, I, H, W]` added by the
    product."""
    if more is None:
        return _images(_matrix(grad) @ weight.flatten(1), grad)
    return _images(torch.addmm(_matrix(more), _matrix(grad), weight.flatten(1)), grad)


@without_autocast
def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `grad x^T`, summed over the pixels, in the shape of the weight and in another
    dtype."""
    if dtype == accumulation_dtype(grad.dtype) and _sums_wide(grad):
        return wide_sums(grad, x).view_as(weight)
    return (_matrix(grad).t() @ _matrix(x)).view_as(weight).to(dtype)


def wide_sums(grad: Tensor, x: Tensor) -> Tensor:
    """Returns `grad x^T`, summed over the pixels, `[O, I]` in the accumulation dtype."""
    return _wide_product(_matrix(grad), _matrix(x))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for `[B, I, H, W]`, over all pixels, the mean `[I]`, and the sums of the products of
    the deviations from it, `[I, I]`, both in the accumulation dtype."""
    rows = _matrix(x)
    wide = rows.to(accumulation_dtype(x.dtype))
    mean = wide.mean(0)
    deviations = (wide - mean).to(x.dtype)
    return mean, _wide_product(deviations, deviations)


@without_autocast
def moments_gradient(
    grad: Tensor, weight: Tensor, square: Tensor, shift: Tensor, x: Tensor
) -> Tensor:
    """Returns `W^T grad + Q x + t` at every pixel, `[B, I, H, W]`.

    `grad [B, O, H, W]`; in the accumulation dtype `weight [O, I]`, symmetric `square [I, I]`,
    `shift [I]`.
    """
    rows = _matrix(x)
    if x.dtype == torch.float16:
        # A matrix of tiny numbers would be one of zeros; it is divided by its largest.
        largest = square.abs().amax().clamp_min(torch.finfo(square.dtype).tiny)
        more = (rows @ (square / largest).to(x.dtype)).to(shift.dtype)
        more = (more * largest + shift).to(x.dtype)
    else:
        more = torch.addmm(shift.to(x.dtype), rows, square.to(x.dtype))
    return _images(torch.addmm(more, _matrix(grad), weight.to(x.dtype)), grad)


def _sums_wide(x: Tensor) -> bool:
    """Returns whether a product may have a wider dtype than its factors, as cuBLAS's may."""
    return x.is_cuda and torch.version.hip is None


@without_autocast
def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns `left^T right` of matrices with a row for each pixel, in the accumulation dtype."""
    wide = accumulation_dtype(left.dtype)
    if wide != left.dtype and _sums_wide(left):
        return torch.mm(left.t(), right, out_dtype=wide)
    return left.t().to(wide) @ right.to(wide)
