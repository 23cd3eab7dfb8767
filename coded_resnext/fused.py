"""The fused data flow of a block: BatchNorm, ReLU and addition inside the convolutions around them.

Every tensor between two convolutions is kept *raw*, as the convolution wrote it, together with the
map of each channel that BatchNorm makes of its statistics; who reads it applies the map. Gradients
are autograd's, operator by operator. Parameters and results are those of the block as layers.py
writes it. Letters as in docs/math.md; the data flow is that of docs/fused_block.md.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .fused_norm import affine_of, uses_batch
from .fused_operators import FusedOperators
from .fused_values import Affine, Deferred, Map, like, ready
from .kernels import select_backend
from .kernels.checks import check_debug, checked_mask
from .kernels.launch import _architecture
from .kernels.reference import accumulation_dtype

if TYPE_CHECKING:
    from .layers import CodedBottleneck

logger = logging.getLogger("coded_resnext")

# Architectures on which the fused data flow has been measured to train faster than layer by layer.
# Empty, since no GPU has timed it: it runs where it is asked for by name.
WINS: frozenset[str] = frozenset()


def apply_block(
    block: CodedBottleneck, x: Map, *, drop_mask: Tensor | None, keep_mask: Tensor | None
) -> tuple[Map, Tensor | None]:
    """The block in the data flow that its backend asks for; arguments and energies are the block's.

    The output of a fused block is still to be computed, by `ready` or by the next block.
    """
    if is_fused(block, like(x)):
        return fused_block(block, x, drop_mask=drop_mask, keep_mask=keep_mask)
    y, energies = block(ready(x), drop_mask=drop_mask, keep_mask=keep_mask)
    return y, energies


def is_fused(block: CodedBottleneck, x: Tensor) -> bool:
    """Whether the block takes the fused data flow for these activations."""
    chosen = select_backend(block.backend)
    if block.backend == "auto" and chosen == "torch" and x.is_cuda:
        arch = _architecture(x.device.index)
        if arch not in WINS:
            _report(f"blocks run layer by layer: the fused data flow is not measured on {arch}")
            return False
        chosen = "fused"
    if chosen not in ("fused", "triton"):
        return False
    reason = unfused_reason(block)
    if reason is not None:
        _report(f"a block runs layer by layer: {reason}")
    return reason is None


def unfused_reason(block: CodedBottleneck) -> str | None:
    """What about a block keeps it from being fused; None if nothing does."""
    if block.is_coded and block.aggregation == "concat":
        return "its branches are concatenated"
    if block.is_coded and not block.normalize:
        return "its energies are not normalised"
    for name, module in block.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"there is a forward hook on {name or 'the block'}"
        if module._backward_hooks or module._backward_pre_hooks:
            return f"there is a backward hook on {name or 'the block'}"
    for name in ("reduce", "grouped", "expand", "skip.0"):
        conv = dict(block.named_modules()).get(name)
        if conv is not None and not _is_plain(conv):
            return f"{name} is not a convolution as the block makes it"
    for name in ("reduce_bn", "grouped_bn", "expand_bn", "skip.1"):
        bn = dict(block.named_modules()).get(name)
        if bn is not None and type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return f"{name} is {type(bn).__name__}, not BatchNorm"
    return None
