"""What a fused block is made of as nodes of autograd, one by one, for tests of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels.affine import statistics_gradient
from coded_resnext.kernels.batch_norm import launch as batch_norm
from coded_resnext.kernels.conv1x1 import convolution as conv1x1
from coded_resnext.kernels.recompute import convolution as recompute
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import Passes


def _by(scale: Tensor | None, g: Tensor) -> Tensor:
    return g if scale is None else (g.to(scale.dtype) * scale[:, None, None]).to(g.dtype)


class Conv1x1(torch.autograd.Function):
    """`W relu(scale x + bias)` and its statistics `[3, O]`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        passes: Passes,
    ) -> tuple[Tensor, Tensor]:
        y, partial = conv1x1.forward(x, weight, scale, bias, True, passes)
        assert partial is not None
        statistics = batch_norm.merged(partial, passes.forward or passes.pointwise)
        ctx.passes = passes
        ctx.save_for_backward(x, weight, scale, bias, y, statistics)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_statistics: Tensor) -> Any:
        x, weight, scale, bias, y, statistics = ctx.saved_tensors
        of_output = (grad, y, None, *statistics_gradient(grad_statistics, statistics))
        arguments = (x, weight, scale, bias, True, weight.dtype, ctx.passes)
        gradients = conv1x1.backward(*of_output, *arguments)
        sums = (None, None) if gradients.sums is None else gradients.sums.sum(0)
        return gradients.input, gradients.weight, sums[1], sums[0], None


class Join(torch.autograd.Function):
    """`x = relu(scale y + bias + residual)`, `W x` and its statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual: Tensor,
        residual_scale: Tensor | None,
        residual_bias: Tensor | None,
        weight: Tensor,
        passes: Passes,
    ) -> tuple[Tensor, Tensor, Tensor]:
        before = (y, scale, bias, residual, residual_scale, residual_bias)
        signs = passes.keeps_signs(y.shape[1])
        x, z, partial, packed = conv1x1.join(*before, weight, True, signs, passes)
        assert partial is not None
        statistics = batch_norm.merged(partial, passes.forward or passes.pointwise)
        ctx.passes = passes
        ctx.save_for_backward(y, scale, residual, residual_scale, weight, x, z, packed, statistics)
        return x, z, statistics

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor, grad_statistics: Tensor) -> Any:
        y, scale, residual, residual_scale, weight, x, z, packed, statistics = ctx.saved_tensors
        of_output = (grad, z, *statistics_gradient(grad_statistics, statistics))
        mapped = None if residual_scale is None else residual
        arguments = (grad_x, x, packed, y, mapped, weight, weight.dtype, ctx.passes)
        g, sums, dweight = conv1x1.join_backward(*of_output, *arguments)
        assert g is not None
        assert sums is not None
        of_bias, of_scale, *of_residual = sums.sum(0)
        own = (of_residual[0], of_bias) if of_residual else (None, None)
        return _by(scale, g), of_scale, of_bias, _by(residual_scale, g), *own, dweight, None


class ProductJoin(torch.autograd.Function):
    """`relu(out_scale W relu(scale x + bias) + out_bias + residual)`, the product not stored, and
    the statistics of the product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        bias: Tensor,
        weight: Tensor,
        out_scale: Tensor,
        out_bias: Tensor,
        residual: Tensor,
        residual_scale: Tensor | None,
        residual_bias: Tensor | None,
        passes: Passes,
    ) -> tuple[Tensor, Tensor]:
        partial, moments = recompute.statistics(x, scale, bias, weight, passes)
        end = (out_scale, out_bias, residual, residual_scale, residual_bias)
        joined, _ = recompute.join(x, scale, bias, weight, *end, False, passes)
        ctx.passes = passes
        statistics = partial[0]
        own = (x, scale, bias, weight, out_scale, residual, residual_scale)
        ctx.save_for_backward(*own, joined, statistics, *moments)
        return joined, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_statistics: Tensor) -> Any:
        x, scale, bias, weight, out_scale, residual, residual_scale, *made = ctx.saved_tensors
        joined, statistics, *moments = made
        mapped = None if residual_scale is None else residual
        g, sums = residual_launch.backward(grad, joined, None, mapped, ctx.passes.pointwise)
        of_bias, *of_residual = sums.sum(0)
        of_product = recompute.product_sums(g, x, weight, scale, bias, ctx.passes)
        of_output = (g, out_scale, *statistics_gradient(grad_statistics, statistics), of_product)
        arguments = (x, weight, scale, bias, True, weight.dtype, ctx.passes)
        gradients = recompute.backward(*of_output, recompute.Moments(*moments), *arguments)
        assert gradients.sums is not None
        of_before = gradients.sums.sum(0)
        own = (of_residual[0], of_bias) if of_residual else (None, None)
        of_scale = recompute.map_gradients(of_bias, of_product, weight, ctx.passes)[0, 1]
        return (
            *(gradients.input, of_before[1], of_before[0], gradients.weight, of_scale, of_bias),
            *(_by(residual_scale, g), *own, None),
        )


class End(torch.autograd.Function):
    """`relu(scale y + bias + residual)` by the pointwise kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual: Tensor,
        residual_scale: Tensor | None,
        residual_bias: Tensor | None,
    ) -> Tensor:
        own = (residual_scale, residual_bias)
        x = residual_launch.forward(y, scale, bias, residual, *own, kernels=True)
        ctx.save_for_backward(x, y, scale, residual, residual_scale)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, scale, residual, residual_scale = ctx.saved_tensors
        mapped = None if residual_scale is None else residual
        g, sums = residual_launch.backward(grad, x, y, mapped, kernels=True)
        of_bias, of_scale, *of_residual = sums.sum(0)
        own = (of_residual[0], of_bias) if of_residual else (None, None)
        return _by(scale, g), of_scale, of_bias, _by(residual_scale, g), *own
