"""BatchNorm between fused operators: from the statistics of a raw tensor to a map of each channel.

The operators take statistics while they write a tensor, and apply maps while they read one, so that
all that is left of BatchNorm is arithmetic on vectors `[C]`, differentiated by autograd as any
other. Running statistics, momentum, frozen layers and SyncBatchNorm behave as PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .values import Affine


def uses_batch(bn: nn.modules.batchnorm._BatchNorm) -> bool:
    """Returns whether a layer normalises by the batch's own statistics; running ones otherwise."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def affine_of(
    bn: nn.modules.batchnorm._BatchNorm, statistics: Tensor, count: int, *, deferred: bool = False
) -> Affine:
    """The map `scale y + bias` that a BatchNorm is, its running statistics brought up to date.

    Args:
        bn: `nn.BatchNorm2d` or `nn.SyncBatchNorm`.
        statistics: (count, sum, M2) of the raw tensor `[3, C]`, M2 being the sum of squared
            deviations from the mean; not read where running statistics are used.
        count: the values of a channel in the raw tensor.
        deferred: whether the gradient of the raw tensor comes without this layer's scale. The
            scale then goes to the operator that made the raw tensor as the gradient of the count,
            which has no use for one of its own. Only with the batch's statistics.

    Raises:
        ValueError: training with a single value for each channel, as in PyTorch.
    """
    if not uses_batch(bn):
        return running_affine(bn)
    group = _shared_by(bn)
    if count == 1 and group is None:
        raise ValueError(
            "x: expected more than 1 value per channel when training, got 1 "
            f"for each of {statistics.shape[1]} channels"
        )
    total = statistics if group is None else _Shared.apply(statistics, group)
    values, sums, m2 = total.unbind()
    values = values.detach()
    mean, variance = sums / values, m2 / values
    if bn.training and bn.track_running_stats:
        with torch.no_grad():
            _follow(bn, mean, m2 / (values - 1))
    scale, bias = _affine(bn, mean, variance)
    if deferred:
        scale, bias = _CarryScale.apply(statistics, scale, bias)
    return Affine(scale, bias)


def running_affine(
    bn: nn.modules.batchnorm._BatchNorm, dtype: torch.dtype = torch.float32
) -> Affine:
    """Returns the map `scale y + bias` that a BatchNorm is by its running statistics.

    Its arithmetic is in `dtype`, or in float64 for such a layer.
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    dtype = torch.promote_types(bn.running_mean.dtype, dtype)
    return _affine(bn, bn.running_mean.to(dtype), bn.running_var.to(dtype))


def _affine(bn: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor) -> Affine:
    scale = torch.rsqrt(variance + bn.eps)
    if bn.weight is not None:
        scale = bn.weight.to(scale.dtype) * scale
    bias = -mean * scale
    if bn.bias is not None:
        bias = bn.bias.to(bias.dtype) + bias
    return Affine(scale, bias)


def _follow(bn: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Take a batch's mean and unbiased variance into the running ones, as PyTorch does."""
    share: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            share = 1.0 / bn.num_batches_tracked.to(mean.dtype)
    for running, value in ((bn.running_mean, mean), (bn.running_var, variance)):
        if running is not None:
            running.add_(share * (value - running))


def _shared_by(bn: nn.modules.batchnorm._BatchNorm) -> Any:
    """Returns the processes that share a layer's statistics, or None."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _Shared(torch.autograd.Function):
    """Statistics `[3, C]` of all processes of a group together, by Chan's formula.

    Every process's loss depends on every process's values, so that the gradients are summed over
    the processes before each goes on with its own.
    """

    @staticmethod
    def forward(ctx: Any, statistics: Tensor, group: Any) -> Tensor:
        parts = [torch.empty_like(statistics) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, statistics.contiguous(), group=group)
        counts, sums, m2 = torch.stack(parts).unbind(1)
        count, total = counts.sum(0), sums.sum(0)
        mean = total / count
        # A process without samples has no mean.
        apart = sums / counts.clamp_min(1) - mean
        ctx.group = group
        ctx.save_for_backward(statistics[1] / statistics[0].clamp_min(1) - mean)
        return torch.stack([count, total, (m2 + counts * apart.square()).sum(0)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (apart,) = ctx.saved_tensors
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        # M2 = sum of M2_r + sum_r^2 / count_r over the processes, less sum^2 / count.
        return torch.stack([torch.zeros_like(apart), grad[1] + 2 * apart * grad[2], grad[2]]), None


class _CarryScale(torch.autograd.Function):
    """The identity on `scale` and `bias`; the gradient of the count becomes the scale."""

    @staticmethod
    def forward(ctx: Any, statistics: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale)
        return scale.clone(), bias.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scale: Tensor, grad_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (scale,) = ctx.saved_tensors
        nothing = torch.zeros_like(scale)
        return torch.stack([scale, nothing, nothing]), grad_scale, grad_bias


class Folded(NamedTuple):
    """A convolution and the BatchNorm behind it as one convolution, `W x + bias`."""

    weight: Tensor
    """In the shape of the convolution's, in the dtype of the activations."""
    bias: Tensor
    """`[C]` in float32 or float64."""

    def beside(self, other: Folded) -> Folded:
        """This convolution and another one, added: one convolution of both inputs side by side."""
        return Folded(torch.cat([self.weight, other.weight], 1), self.bias + other.bias)


def fold(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm, dtype: torch.dtype | None) -> Folded:
    """Folds a BatchNorm into the convolution before it: `bn(conv(x))` as one convolution.

    The arithmetic is float32, or float64 where that is the dtype of a layer or of the result.

    Args:
        conv: without a bias.
        bn: with running statistics.
        dtype: of the weight that is returned, rounded once; None for the convolution's own.
    """
    own = conv.weight.dtype
    wide = torch.promote_types(torch.promote_types(own, dtype or own), torch.float32)
    scale, bias = running_affine(bn, wide)
    weight = conv.weight.to(scale.dtype) * scale[:, None, None, None]
    return Folded(weight.to(dtype or own), bias)
