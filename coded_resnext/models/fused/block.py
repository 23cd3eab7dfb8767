"""The fused data flow of a block: BatchNorm, ReLU and addition inside the convolutions around them.

Every tensor between two convolutions is kept *raw*, as the convolution wrote it, together with the
map of each channel that BatchNorm makes of its statistics; the consumer applies the map. Gradients
are autograd's, operator by operator. Parameters and results are those of the block as
models/block.py writes it. Letters as in docs/math.md; the data flow is told in docs/fused_block.md.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, fx, nn

from coded_resnext.kernels import Aggregation, Backend
from coded_resnext.kernels.backend import LOGGER, requested_backend, say_once
from coded_resnext.kernels.checks import check_debug, checked_mask
from coded_resnext.kernels.coded.gram import inverse_mean, split_weight
from coded_resnext.kernels.coded.operator import normalize_branches
from coded_resnext.kernels.evaluation import side_by_side
from coded_resnext.kernels.layout import accumulation_dtype, architecture, interpreted
from coded_resnext.models.layers import NORMS

from .norm import affine_of, fold, uses_batch
from .operators import FusedOperators
from .values import Affine, Deferred, Map, Product, layers_of, like, ready

# Architectures on which the fused data flow has been measured to train faster than layer by layer.
# Empty, since no GPU has timed it: it runs where it is asked for by name.
WINS: frozenset[str] = frozenset()


class Bottleneck(Protocol):
    """What the fused data flow reads of a block: seven layers, and how branches are combined."""

    reduce: nn.Conv2d
    reduce_bn: nn.BatchNorm2d
    grouped: nn.Conv2d
    grouped_bn: nn.BatchNorm2d
    expand: nn.Conv2d
    expand_bn: nn.BatchNorm2d
    skip: nn.Module
    """The identity, or a convolution with its BatchNorm."""
    branches: int
    normalized_by: int | None
    aggregation: Aggregation
    normalize: bool
    backend: Backend
    training: bool

    @property
    def is_coded(self) -> bool: ...

    def unusual_layer(self) -> str | None: ...


def fused_block(
    block: Bottleneck, x: Map, *, drop_mask: Tensor | None, keep_mask: Tensor | None
) -> tuple[Map, Tensor | None]:
    """Does what the block's forward pass does, on raw tensors; arguments as for `apply_block`."""
    ops = FusedOperators.of(_chosen(block, like(x)), like(x))
    bn1, bn2, bn3 = block.reduce_bn, block.grouped_bn, block.expand_bn
    deferred = _is_deferred(block)
    # What the operators are given has its dtype; autocast would round what they keep in float32.
    with torch.autocast(like(x).device.type, enabled=False):
        if can_infer(block, drop_mask):
            return inferred_block(block, ready(x), ops, keep_mask=keep_mask)
        x, y1, sums1 = ops.join_conv1x1(x, block.reduce, statistics=uses_batch(bn1))
        map1 = affine_of(bn1, sums1, _values(y1))
        y2, sums2 = ops.grouped(y1, block.grouped, map1, statistics=uses_batch(bn2))
        map2 = affine_of(bn2, sums2, _values(y2))
        energies: Tensor | None = None
        map_before: Affine | None
        y3: Tensor | Product
        recomputed = not block.is_coded and deferred and ops.recomputes(y2, block.expand)
        if recomputed:
            y3, sums3 = ops.recomputed(y2, block.expand, map2)
        else:
            if block.is_coded:
                operand, energies = _normalized(block, y2, map2, drop_mask, keep_mask)
                map_before = None
            else:
                operand, map_before = y2, map2
            y3, sums3 = ops.conv1x1(
                operand, block.expand, map_before, statistics=uses_batch(bn3), deferred=deferred
            )
        map3 = affine_of(bn3, sums3, _values(y2), deferred=deferred)
        residual, residual_map = _skip(block, ops, x, deferred=deferred, recomputed=recomputed)
    return Deferred(y3, map3, residual, residual_map, deferred, ops.joins(y2)), energies


def _normalized(
    block: Bottleneck,
    y2: Tensor,
    affine: Affine,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns `s h` and `Ebar`, (2)-(5) and (10)-(12), of `h = relu(scale y2 + bias)`."""
    accumulate = accumulation_dtype(y2.dtype)
    drop_mask = checked_mask("drop_mask", drop_mask, y2, block.branches, accumulate)
    keep_mask = checked_mask("keep_mask", keep_mask, y2, block.branches, accumulate)
    check_debug(h=y2, weight=block.expand.weight)
    per_branch = split_weight(block.expand.weight, block.branches, concatenate=False)
    scaled, energies, _ = normalize_branches(y2, per_branch, *affine, drop_mask, keep_mask)
    return scaled, energies


def _skip(
    block: Bottleneck, ops: FusedOperators, x: Tensor, *, deferred: bool, recomputed: bool
) -> tuple[Tensor | Product, Affine | None]:
    """Returns the residual: `x` itself, or its convolution's raw output and the map behind.

    Where the block's last convolution is recomputed, that of the skip connection may be too.
    """
    layers = layers_of(block.skip)
    if not layers:
        return x, None
    conv, bn = layers
    y: Tensor | Product
    if recomputed and ops.recomputes(x, conv):
        y, sums = ops.recomputed(x, conv)
        return y, affine_of(bn, sums, _values(y.handle), deferred=True)
    y, sums = ops.conv1x1(x, conv, statistics=uses_batch(bn), deferred=deferred)
    return y, affine_of(bn, sums, _values(y), deferred=deferred)


def _values(y: Tensor) -> int:
    """Returns the number of values of a channel of `[B, C, H, W]`."""
    return y.shape[0] * y.shape[2] * y.shape[3]


def _is_deferred(block: Bottleneck) -> bool:
    """Returns whether the gradients of the summands leave the sum without their scales.

    The scales travel with the gradients of the statistics, so that there must be some.
    """
    return all(uses_batch(bn) for bn in (block.expand_bn, *layers_of(block.skip)[1:]))


def is_fused(block: Bottleneck, x: Tensor) -> bool:
    """Returns whether the block takes the fused data flow for activations like `x`.

    A symbolic trace of `torch.fx` is made of layers.
    """
    if isinstance(x, fx.Proxy):
        return False
    chosen = _chosen(block, x)
    if chosen not in ("fused", "triton"):
        return False
    reason = unfused_reason(block)
    if reason is not None:
        say_once(LOGGER, f"a block runs layer by layer: {reason}")
    return reason is None


def _chosen(block: Bottleneck, x: Tensor) -> str:
    """Returns the backend of the block for these activations."""
    chosen = requested_backend(block.backend)
    if chosen == "auto":
        arch = architecture(x.device.index) if x.is_cuda else "cpu"
        if arch in WINS:
            return "fused"
        if x.is_cuda:
            text = f"blocks run layer by layer: the fused data flow was not timed on {arch}"
            say_once(LOGGER, text)
        return "torch"
    if chosen == "triton" and not (x.is_cuda or interpreted()):
        raise RuntimeError(f"backend: 'triton' was asked for but x is on {x.device}")
    return chosen


def unfused_reason(block: Bottleneck) -> str | None:
    """Returns what about a block keeps it from being fused; None if nothing does."""
    if block.is_coded and block.aggregation == "concat":
        return "its branches are concatenated"
    if block.is_coded and not block.normalize:
        return "its energies are not normalised"
    if block.is_coded and block.normalized_by != block.branches:
        return "its mean energy is over more branches than it has"
    reason = block.unusual_layer()
    if reason is not None:
        return reason
    skip = layers_of(block.skip)
    layers = (block.reduce, block.grouped, block.expand, *skip[:1])
    norms = (block.reduce_bn, block.grouped_bn, block.expand_bn, *skip[1:])
    if any(type(norm) not in NORMS for norm in norms) or any(c.bias is not None for c in layers):
        return "a BatchNorm is not there, or a convolution has a bias"
    return None


def can_infer(block: Bottleneck, drop_mask: Tensor | None) -> bool:
    """Returns whether `inferred_block` applies: all in evaluation, and without gradients."""
    layers = (block.reduce_bn, block.grouped_bn, block.expand_bn, *layers_of(block.skip)[1:])
    frozen = not block.training and not any(uses_batch(bn) for bn in layers)
    return frozen and drop_mask is None and not torch.is_grad_enabled()


def inferred_block(
    block: Bottleneck, x: Tensor, ops: FusedOperators, *, keep_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Evaluates a block with BatchNorm folded, on a map `[B, C_in, H, W]`; results as its own."""
    x = ops.cast(x)
    a = ops.folded_conv1x1(x, fold(block.reduce, block.reduce_bn, ops.dtype))
    grouped = fold(block.grouped, block.grouped_bn, ops.dtype)
    energies = factor = branch_weight = None
    if block.is_coded:
        accumulate = accumulation_dtype(x.dtype)
        keep_mask = checked_mask("keep_mask", keep_mask, x, block.branches, accumulate)
        branch_weight = split_weight(block.expand.weight, block.branches, concatenate=False)
    stride = block.grouped.stride[0]
    h, energy = ops.folded_grouped(a, grouped, stride, branch_weight, keep_mask)
    if block.is_coded:
        check_debug(h=h, weight=block.expand.weight)
        inverse = inverse_mean(energy)
        energies, factor = energy * inverse, inverse[:, 0].sqrt()
    expand = fold(block.expand, block.expand_bn, ops.dtype)
    if not layers_of(block.skip):
        return ops.folded_conv1x1(h, expand, residual=x, factor=factor), energies
    conv, bn = layers_of(block.skip)
    step = conv.stride[0]
    both = side_by_side(h, factor, x[:, :, ::step, ::step])
    return ops.folded_conv1x1(both, expand.beside(fold(conv, bn, ops.dtype))), energies
