"""The products of a 1x1 convolution by PyTorch: cuBLAS on a GPU.

`x [B, I, H, W]`, `weight [O, I, 1, 1]`, `y [B, O, H, W]`. A channels-last map is a matrix with a
row for each pixel, so that each pass is one product; other layouts are copied. Results of the size
of a map are channels-last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import as_rows


def _matrix(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as `[B*H*W, C]`."""
    return as_rows(x).flatten(0, 2)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """`[B*H*W, C]` as `[B, C, H, W]`, with the map of another tensor."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """`y = W x` at every pixel."""
    return _images(_matrix(x) @ weight.flatten(1).t(), x)


def activated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`relu(W x + bias)` at every pixel; `bias [O]` in the dtype of `x`."""
    # cuBLAS adds the bias and applies the ReLU to what it has in registers.
    return _images(torch._addmm_activation(bias, _matrix(x), weight.flatten(1).t()), x)


def input_gradient(grad: Tensor, weight: Tensor, more: Tensor | None = None) -> Tensor:
    """`W^T grad` at every pixel, with another gradient `[B, I, H, W]` added by the product."""
    if more is None:
        return _images(_matrix(grad) @ weight.flatten(1), grad)
    return _images(torch.addmm(_matrix(more), _matrix(grad), weight.flatten(1)), grad)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`grad x^T`, summed over the pixels, in the shape of the weight."""
    return (_matrix(grad).t() @ _matrix(x)).view_as(weight)
