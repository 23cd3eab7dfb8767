"""BatchNorm between two convolutions, by the Triton kernels or by PyTorch: tensors in, tensors out.

Statistics are (count, sum, M2) of each channel, M2 the sum of squared deviations from the mean; in
*parts*, `[parts, 3, C]`, one for each program that took them. Vectors `[C]` are in the
accumulation dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coded_resnext.kernels.affine import Affine
from coded_resnext.kernels.layout import as_float32, on_device

from . import rows as batch_norm_rows


class Normalization(NamedTuple):
    """What a BatchNorm layer has made of a map's statistics."""

    map: Tensor
    """`[2, C]`: bias and scale of `scale y + bias`."""
    moments: Tensor
    """`[4, C]`: mean, inverse of the deviation, unbiased variance, count; by running statistics the
    latter two mean nothing."""

    @property
    def affine(self) -> Affine:
        """Returns the map as the convolution behind takes it."""
        return Affine(self.map[1], self.map[0])


class Running(NamedTuple):
    """Running statistics that a kernel brings up to date with those of a batch."""

    mean: Tensor
    variance: Tensor
    counter: Tensor
    """Of batches, int64."""
    share: float
    """That a batch has in them: the momentum."""


class Norm(NamedTuple):
    """A BatchNorm layer that normalises by the statistics of its batch."""

    weight: Tensor | None
    """`[C]`, as `bias`."""
    bias: Tensor | None
    epsilon: float
    running: Running | None = None
    """None where no kernel brings them up to date."""

    def arguments(self) -> tuple[Tensor | float | None, ...]:
        """Returns what a kernel takes, in the order of `rows.layer_arguments`."""
        *running, share = self.running or (None, None, None, 0.0)
        own = (as_float32(self.weight), as_float32(self.bias))
        return (*own, *running, self.epsilon, share)

    def present(self) -> tuple[bool, bool, bool]:
        """Returns what of a layer there is, as `rows.layer_arguments` asks for it."""
        return self.weight is not None, self.bias is not None, self.running is not None


class NormGradients(NamedTuple):
    """The gradients of a BatchNorm layer, `[C]` each."""

    weight: Tensor
    bias: Tensor
    curve: Tensor
    """With `level`: through its mean and variance the map `y` gets the gradient
    `curve y + level`."""
    level: Tensor


def merged(partial: Tensor, kernels: bool) -> Tensor:
    """Returns the statistics `[3, C]` of all parts."""
    parts, _, channels = partial.shape
    if not kernels:
        return partial[0] if parts == 1 else _merged(partial)
    total = partial.new_empty((3, channels))
    with on_device(partial):
        row = batch_norm_rows.merge_statistics(channels)
        row.launch(batch_norm_rows.grid_of(channels), total, partial, parts)
    return total


def _merged(partial: Tensor) -> Tensor:
    """Merges all parts by Chan's formula; a part without values has no mean."""
    counts, sums, m2 = partial.unbind(1)
    count, total = counts.sum(0), sums.sum(0)
    apart = sums / counts.clamp_min(1) - total / count
    return torch.stack([count, total, (m2 + counts * apart.square()).sum(0)])


def forward(partial: Tensor, norm: Norm, kernels: bool) -> Normalization:
    """Returns the map that BatchNorm makes of the statistics, `[parts, 3, C]`, of what it maps.

    Args:
        partial: the statistics in parts.
        norm: the layer, of which the kernels alone bring running statistics up to date.
        kernels: whether they run.
    """
    parts, _, channels = partial.shape
    if not kernels:
        count, total, m2 = merged(partial, False)
        mean = total / count
        moments = (
            mean,
            torch.rsqrt(m2 / count + norm.epsilon),
            m2 / (count - 1).clamp_min(1),
            count,
        )
        return Normalization(_map(mean, moments[1], norm.weight, norm.bias), torch.stack(moments))
    made = (partial.new_empty((2, channels)), partial.new_empty((4, channels)))
    row = batch_norm_rows.batch_norm(channels, *norm.present())
    with on_device(partial):
        row.launch(batch_norm_rows.grid_of(channels), *made, partial, *norm.arguments(), parts)
    return Normalization(*made)


def by_running_statistics(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> Normalization:
    """Returns the map that BatchNorm is by running statistics `[C]`."""
    inverse = torch.rsqrt(variance + epsilon)
    moments = torch.stack([mean, inverse, variance, torch.ones_like(mean)])
    return Normalization(_map(mean, inverse, weight, bias), moments)


def _map(mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = inverse if weight is None else weight.to(inverse.dtype) * inverse
    shift = -mean * scale
    return torch.stack([shift if bias is None else bias.to(shift.dtype) + shift, scale])


def backward(
    partial: Tensor, normalization: Normalization, kernels: bool, scale: int = 1
) -> NormGradients:
    """Returns the gradients of a layer that used the statistics of its batch.

    Args:
        partial: gradients of its map in parts, `[parts, 2 or 3, C]`, the first row that of the
            bias; of one part the rows may be apart.
        normalization: what `forward` gave.
        kernels: whether the Triton kernels run.
        scale: the row of the gradient of the scale.
    """
    parts, rows, channels = partial.shape
    if not kernels:
        sums = partial[0] if parts == 1 else partial.sum(0)
        of_bias, of_scale = sums[0], sums[scale]
        mean, inverse, _, count = normalization.moments
        of_weight = (of_scale - mean * of_bias) * inverse
        curve = -normalization.map[1] * inverse * of_weight / count
        return NormGradients(
            of_weight, of_bias, curve, -normalization.map[1] * of_bias / count - curve * mean
        )
    if parts == 1 and partial.stride(2) == 1:
        scale *= partial.stride(1) // channels
    else:
        partial = partial.contiguous()
    gradients = partial.new_empty((4, channels))
    with on_device(partial):
        batch_norm_rows.batch_norm_backward(channels, rows, scale).launch(
            batch_norm_rows.grid_of(channels),
            gradients,
            partial,
            *normalization,
            parts,
        )
    return NormGradients(*gradients)
