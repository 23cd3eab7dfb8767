"""A block in evaluation, where no gradients are wanted: every map is written once, as it is needed.

BatchNorm is folded into the convolutions. The grouped convolution writes `h` itself and takes the
energies on its way; the last convolution, or the pass behind it, applies `1/sqrt(M)`, adds the
residual and applies the ReLU. A projection is added by the last convolution itself, whose operand
are then `h` and `x` side by side. Letters as in docs/math.md; docs/fused_block.md has the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .fused_folding import fold
from .fused_norm import uses_batch
from .fused_operators import FusedOperators
from .fused_values import layers_of
from .kernels.checks import check_debug, checked_mask
from .kernels.folded_operators import side_by_side
from .kernels.gram import inverse_mean, split_weight
from .kernels.reference import accumulation_dtype

if TYPE_CHECKING:
    from .layers import CodedBottleneck


def can_infer(block: CodedBottleneck, drop_mask: Tensor | None) -> bool:
    """Whether a block can be computed here: in evaluation, all of it, and without gradients."""
    layers = (block.reduce_bn, block.grouped_bn, block.expand_bn, *layers_of(block.skip)[1:])
    frozen = not block.training and not any(uses_batch(bn) for bn in layers)
    return frozen and drop_mask is None and not torch.is_grad_enabled()


def inferred_block(
    block: CodedBottleneck, x: Tensor, run: FusedOperators, *, keep_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`CodedBottleneck.forward` on a map `[B, C_in, H, W]`; results as for the block."""
    x = run.cast(x)
    a = run.folded_conv1x1(x, fold(block.reduce, block.reduce_bn, run.dtype))
    grouped = fold(block.grouped, block.grouped_bn, run.dtype)
    energies = factor = branch_weight = None
    if block.is_coded:
        accumulate = accumulation_dtype(x.dtype)
        keep_mask = checked_mask("keep_mask", keep_mask, x, block.branches, accumulate)
        branch_weight = split_weight(block.expand.weight, block.branches, concatenate=False)
    stride = block.grouped.stride[0]
    h, energy = run.folded_grouped(a, grouped, stride, branch_weight, keep_mask)
    if block.is_coded:
        check_debug(h=h, weight=block.expand.weight)
        inverse = inverse_mean(energy)
        energies, factor = energy * inverse, inverse[:, 0].sqrt()
    expand = fold(block.expand, block.expand_bn, run.dtype)
    if not layers_of(block.skip):
        return run.folded_conv1x1(h, expand, residual=x, factor=factor), energies
    conv, bn = layers_of(block.skip)
    step = conv.stride[0]
    both = side_by_side(h, factor, x[:, :, ::step, ::step])
    return run.folded_conv1x1(both, expand.beside(fold(conv, bn, run.dtype))), energies
