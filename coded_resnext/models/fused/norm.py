"""The BatchNorm layers of a fused block: from the statistics of a raw map to a map of each channel.

The convolutions take statistics while they write a map, and apply `scale y + bias` while they read
one, so that all that is left of BatchNorm is arithmetic on vectors `[C]`
(kernels/batch_norm/). Running statistics, momentum, frozen layers and SyncBatchNorm behave as
PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from coded_resnext.kernels.batch_norm import launch as batch_norm
from coded_resnext.kernels.batch_norm.launch import (
    Norm,
    Normalization,
    NormGradients,
    Running,
)

BatchNorm = nn.modules.batchnorm._BatchNorm


def uses_batch(bn: BatchNorm) -> bool:
    """Returns whether a layer normalises by the batch's own statistics; running ones otherwise."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def shared_by(bn: BatchNorm) -> str:
    """Returns the name of the group of processes that share a layer's statistics; empty if none."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group: Any = bn.process_group or dist.group.WORLD
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""


class Layer(NamedTuple):
    """A BatchNorm layer as the algebra of a block reads it."""

    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor, Tensor] | None
    """Mean and variance where these are used instead of the batch's."""
    epsilon: float
    group: str
    """Of processes that share the statistics, by name; empty for this process alone."""
    kernels: bool
    """Says whether the Triton kernels run."""
    tracked: Running | None = None
    """Running statistics that the kernel which normalises brings up to date."""

    @property
    def norm(self) -> Norm:
        """Returns the layer as the kernels take it."""
        return Norm(self.weight, self.bias, self.epsilon, self.tracked)

    def normalization(self, partial: Tensor | None, wide: torch.dtype) -> Normalization:
        """Returns the layer's map for the statistics `[parts, 3, C]` of what it maps.

        They are None where running statistics are used, whose arithmetic is in a dtype of at least
        `wide`.
        """
        if self.running is not None:
            wide = torch.promote_types(self.running[0].dtype, wide)
            mean, variance = (each.to(wide) for each in self.running)
            return batch_norm.by_running_statistics(
                mean, variance, self.weight, self.bias, self.epsilon
            )
        assert partial is not None
        if self.group:
            partial = _gathered(batch_norm.merged(partial, self.kernels), self.group)
        return batch_norm.forward(partial, self.norm, self.kernels)

    def backward(
        self, partial: Tensor, normalization: Normalization
    ) -> tuple[NormGradients, Tensor | None, Tensor | None]:
        """Returns the layer's gradients from those of its map, `[parts, 2, C]`: of bias and scale.

        Then `curve` and `level` of `NormGradients`, None where running statistics are used.
        """
        own = batch_norm.backward(partial, normalization, self.kernels)
        if self.running is not None:
            return own, None, None
        if not self.group:
            return own, own.curve, own.level
        # Every process's loss depends on every process's values.
        total = partial.sum(0)
        dist.all_reduce(total, group=_group(self.group))
        shared = batch_norm.backward(total[None], normalization, self.kernels)
        return own, shared.curve, shared.level


def _group(name: str) -> Any:
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


def _gathered(statistics: Tensor, name: str) -> Tensor:
    """Returns the statistics `[3, C]` of every process, `[processes, 3, C]`."""
    group = _group(name)
    parts = [torch.empty_like(statistics) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, statistics.contiguous(), group=group)
    return torch.stack(parts)


def tracked(layers: Sequence[BatchNorm]) -> list[Running | None] | None:
    """Returns the running statistics that kernels bring up to date, those of layers in training.

    None where there are layers that only `update_running` knows: of cumulative averages, whose
    share depends on a counter, and of other dtypes than float32.
    """
    running: list[Running | None] = []
    for bn in layers:
        if not (bn.training and bn.track_running_stats):
            running.append(None)
            continue
        mean, variance, counter = bn.running_mean, bn.running_var, bn.num_batches_tracked
        if mean is None or variance is None or counter is None or bn.momentum is None:
            return None
        if not mean.dtype == variance.dtype == torch.float32:
            return None
        running.append(Running(mean, variance, counter, float(bn.momentum)))
    return running


@torch.no_grad()
def update_running(layers: Sequence[BatchNorm], moments: Sequence[Tensor]) -> None:
    """Take the mean and the unbiased variance of batches into running ones, as PyTorch does.

    Args:
        layers: BatchNorm layers.
        moments: of each, as `Normalization` has them.
    """
    running: list[Tensor] = []
    values: list[Tensor] = []
    shares: list[float | Tensor] = []
    counters: list[Tensor] = []
    for bn, moment in zip(layers, moments, strict=True):
        if not (bn.training and bn.track_running_stats):
            continue
        share: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
        if bn.num_batches_tracked is not None:
            counters.append(bn.num_batches_tracked)
            if bn.momentum is None:
                share = 1.0 / (bn.num_batches_tracked + 1).to(moment.dtype)
        for average, value in ((bn.running_mean, moment[0]), (bn.running_var, moment[2])):
            if average is not None:
                running.append(average)
                values.append(value.to(average.dtype))
                shares.append(share)
    if counters:
        torch._foreach_add_(counters, 1)
    if running and isinstance(shares[0], float) and all(share == shares[0] for share in shares):
        # All in one launch.
        torch._foreach_lerp_(running, values, shares[0])
        return
    for average, value, share in zip(running, values, shares, strict=True):
        average.add_(share * (value - average))


def running_affine(bn: BatchNorm, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns scale and bias, `[C]`, of the map that a BatchNorm is by its running statistics.

    Their arithmetic is in `dtype`, or in float64 for such a layer.
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    running = (bn.running_mean, bn.running_var)
    layer = Layer(bn.weight, bn.bias, running, bn.eps, "", kernels=False)
    bias, scale = layer.normalization(None, dtype).map
    return scale, bias


class Folded(NamedTuple):
    """A convolution and the BatchNorm behind it as one convolution, `W x + bias`."""

    weight: Tensor
    """In the shape of the convolution's, in the dtype of the activations."""
    bias: Tensor
    """`[C]` in float32 or float64."""

    def beside(self, other: Folded) -> Folded:
        """This convolution and another one, added: one convolution of both inputs side by side."""
        return Folded(torch.cat([self.weight, other.weight], 1), self.bias + other.bias)


def fold(conv: nn.Conv2d, bn: BatchNorm, dtype: torch.dtype | None) -> Folded:
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
