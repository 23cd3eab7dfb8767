"""The fused data flow of a block: BatchNorm, ReLU and addition inside the convolutions around them.

Parameters and results are those of the block as models/block.py writes it. Here is what decides
whether a block takes this data flow and who computes what; the algebra is in data_flow.py, autograd
in step.py, and the whole is told in docs/fused_block.md.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn

from coded_resnext.kernels import Aggregation, Backend, backends
from coded_resnext.kernels.backend import LOGGER, requested_backend, say_once
from coded_resnext.kernels.checks import check_debug, checked_mask
from coded_resnext.kernels.coded.gram import inverse_mean, split_weight
from coded_resnext.kernels.conv1x1 import convolution as conv1x1
from coded_resnext.kernels.conv3x3 import convolution as conv3x3
from coded_resnext.kernels.evaluation import folded_conv1x1, folded_grouped_conv3x3, side_by_side
from coded_resnext.kernels.layout import (
    DTYPES,
    accumulation_dtype,
    architecture,
    interpreted,
    transformed,
    unsupported,
)
from coded_resnext.kernels.rows import Passes
from coded_resnext.models.layers import NORMS

from .data_flow import Conv, Convs, Plan, present
from .norm import BatchNorm, Folded, Layer, fold, shared_by, tracked, update_running, uses_batch
from .step import Deferred, Map, applied, like, ready

# Architectures on which the fused data flow has been measured to train faster than layer by layer.
# Empty: the one GPU that has timed it was faster layer by layer. It runs where it is asked for.
WINS: frozenset[str] = frozenset()
# Input channels up to which a convolution is computed twice rather than written: the scatter of its
# input costs a product of as many channels by as many, which beyond them is no longer free.
RECOMPUTED = 256


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


def layers_of(skip: nn.Module) -> tuple[Any, ...]:
    """Returns the convolution and the BatchNorm of a skip connection; none for the identity."""
    return tuple(skip) if isinstance(skip, nn.Sequential) else ()


def _norms(block: Bottleneck) -> tuple[BatchNorm, ...]:
    return (block.reduce_bn, block.grouped_bn, block.expand_bn, *layers_of(block.skip)[1:])


def fused_block(
    block: Bottleneck, x: Map, *, drop_mask: Tensor | None, keep_mask: Tensor | None
) -> tuple[Map, Tensor | None]:
    """Does what the block's forward pass does, on raw tensors; arguments as for `apply_block`."""
    x = _cast(x)
    if can_infer(block, drop_mask):
        with torch.autocast(like(x).device.type, enabled=False):
            return inferred_block(block, ready(x), keep_mask=keep_mask)
    handle, norms, skip = like(x), _norms(block), layers_of(block.skip)
    _check_counts(block, handle, norms)
    accumulate = accumulation_dtype(handle.dtype)
    masks = (
        checked_mask("drop_mask", drop_mask, handle, block.branches, accumulate),
        checked_mask("keep_mask", keep_mask, handle, block.branches, accumulate),
    )
    plan = planned(block, x)
    layers = (block.reduce, block.grouped, block.expand, *skip[:1])
    pairs = zip(layers, norms, strict=True)
    first, second, third, *rest = (
        Conv(conv.weight, _layer(bn, kernels=bool(plan.pointwise))) for conv, bn in pairs
    )
    convs = Convs(first, second, third, rest[0] if rest else None)
    # The operator of a captured graph writes to none of its arguments.
    by_kernels = plan.pointwise and not torch.compiler.is_compiling()
    running = tracked(norms) if by_kernels else None
    y, result = applied(plan, x, convs, masks, running or ())
    check_debug(h=present(result.grouped.y), weight=block.expand.weight)
    if running is None:
        update_running(norms, [made.moments for made in result.convs])
    return y, result.energies


def _layer(bn: BatchNorm, *, kernels: bool) -> Layer:
    running = None
    if not uses_batch(bn):
        assert bn.running_mean is not None
        assert bn.running_var is not None
        running = (bn.running_mean, bn.running_var)
    return Layer(bn.weight, bn.bias, running, bn.eps, shared_by(bn), kernels)


def _check_counts(block: Bottleneck, x: Tensor, norms: tuple[BatchNorm, ...]) -> None:
    """Refuse a single value for each channel where the batch's statistics are taken, as PyTorch."""
    batch, _, height, width = x.shape
    stride = block.grouped.stride[0]
    pixels = -(-height // stride) * -(-width // stride)
    if batch * pixels > 1:
        return
    for bn in norms:
        count = batch * (height * width if bn is block.reduce_bn else pixels)
        if count == 1 and uses_batch(bn) and not shared_by(bn):
            raise ValueError(
                "x: expected more than 1 value per channel when training, got 1 "
                f"for each of {bn.num_features} channels"
            )


def _cast(x: Map) -> Map:
    """Returns a map in the dtype of autocast; what a block has left has it already."""
    if isinstance(x, Deferred) or not _autocasts(x):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _autocasts(x: Tensor) -> bool:
    """Returns whether autocast is on for a tensor; there is none for `meta`."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def planned(block: Bottleneck, x: Map) -> Plan:
    """Returns what a block's algebra depends on beside tensors, and who computes it."""
    handle, skip = like(x), layers_of(block.skip)
    chosen = _chosen(block, handle)
    backend: Literal["auto", "triton"] = "triton" if chosen == "triton" else "auto"
    first = _products(handle, block.reduce, backend, join=isinstance(x, Deferred))
    signs = False
    if isinstance(x, Deferred) and torch.is_grad_enabled():
        # Signs are written by a kernel of one convolution, and read by one of the other.
        product = x.sum.main.passes.forward if x.sum.main.weight is not None else first.forward
        both = Passes(forward=product, input=first.input)
        signs = both.keeps_signs(block.reduce.in_channels)
    return Plan(
        block.branches,
        block.grouped.stride[0],
        block.is_coded,
        recomputes(block, handle.device.type),
        signs,
        first.encoded(),
        _grouped_passes(handle, block.grouped.weight, block.grouped.stride[0], backend).encoded(),
        _products(handle, block.expand, backend).encoded(),
        _products(handle, skip[0], backend).encoded() if skip else 0,
        _pointwise(handle, backend),
    )


def recomputes(block: Bottleneck, device: str) -> bool:
    """Returns whether the last convolution of a block, and its projection, are not stored."""
    convolutions = (block.expand, *layers_of(block.skip)[:1])
    narrow = all(conv.in_channels <= RECOMPUTED for conv in convolutions)
    # Statistics of what is not stored are worked out in float64, which Apple's GPUs have not.
    return not block.is_coded and narrow and device != "mps"


def _pointwise(x: Tensor, backend: str) -> bool:
    """Returns whether Triton kernels compute what is not a product."""
    if x.dtype not in DTYPES:
        return False
    return backend == "triton" or (x.is_cuda and backends()["triton"] is None)


def _products(
    x: Tensor, conv: nn.Conv2d, backend: Literal["auto", "triton"], *, join: bool = False
) -> Passes:
    """Returns the passes of a 1x1 convolution that run kernels, and whether what is around does."""
    asked = _able(backend, unsupported(x))
    passes = conv1x1.select_products(x, conv.weight, asked, join=join)
    return passes._replace(pointwise=_pointwise(x, backend))


def _grouped_passes(
    x: Tensor, weight: Tensor, stride: int, backend: Literal["auto", "triton"]
) -> Passes:
    asked = _able(backend, conv3x3.unsupported(x, weight, stride))
    return conv3x3.select_passes(x, weight, stride, asked)


def _able(
    backend: Literal["auto", "triton"], reason: str | None
) -> Literal["auto", "torch", "triton"]:
    """Returns `torch` instead of `triton` where the kernels cannot run, which is said once."""
    if backend == "triton" and reason is not None:
        text = f"a fused operator runs on PyTorch instead of 'triton': {reason}"
        say_once(LOGGER, text, logging.WARNING)
        return "torch"
    return backend


def is_fused(block: Bottleneck, x: Tensor) -> bool:
    """Returns whether the block takes the fused data flow for activations like `x`.

    A symbolic trace of `torch.fx` is made of layers, and so is what transforms of `torch.func` and
    forward mode differentiate.
    """
    if isinstance(x, fx.Proxy) or transformed(x):
        return False
    chosen = _chosen(block, x)
    if chosen not in ("fused", "triton"):
        return False
    reason = unfused_reason(block)
    if reason is None and x.dtype != block.reduce.weight.dtype and not _autocasts(x):
        reason = f"its weights are {block.reduce.weight.dtype}, not {x.dtype}"
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
    layers = (block.reduce, block.grouped, block.expand, *layers_of(block.skip)[:1])
    norms = _norms(block)
    if any(type(norm) not in NORMS for norm in norms) or any(c.bias is not None for c in layers):
        return "a BatchNorm is not there, or a convolution has a bias"
    if len({shared_by(norm) for norm in norms if uses_batch(norm)}) > 1:
        return "its BatchNorms share statistics with different processes"
    return None


def can_infer(block: Bottleneck, drop_mask: Tensor | None) -> bool:
    """Returns whether `inferred_block` applies: all in evaluation, and without gradients."""
    frozen = not block.training and not any(uses_batch(bn) for bn in _norms(block))
    return frozen and drop_mask is None and not torch.is_grad_enabled()


def inferred_block(
    block: Bottleneck, x: Tensor, *, keep_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Evaluates a block with BatchNorm folded, on a map `[B, C_in, H, W]`; results as its own."""
    backend: Literal["auto", "triton"] = "triton" if _chosen(block, x) == "triton" else "auto"

    def folded(
        x: Tensor, conv: Folded, residual: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        """Returns `relu(factor W x + bias + residual)`."""
        passes = conv1x1.select_products(x, conv.weight, _able(backend, unsupported(x)))
        passes = passes._replace(pointwise=_pointwise(x, backend))
        y: Tensor = folded_conv1x1(x, *conv, residual, factor, passes.encoded())
        return y

    a = folded(x, fold(block.reduce, block.reduce_bn, x.dtype))
    grouped = fold(block.grouped, block.grouped_bn, x.dtype)
    energies = factor = branch_weight = None
    if block.is_coded:
        accumulate = accumulation_dtype(x.dtype)
        keep_mask = checked_mask("keep_mask", keep_mask, x, block.branches, accumulate)
        branch_weight = split_weight(block.expand.weight, block.branches, concatenate=False)
    stride = block.grouped.stride[0]
    passes = _grouped_passes(a, grouped.weight, stride, backend).encoded()
    h, energy = folded_grouped_conv3x3(a, *grouped, branch_weight, keep_mask, stride, passes)
    if block.is_coded:
        check_debug(h=h, weight=block.expand.weight)
        inverse = inverse_mean(energy)
        energies, factor = energy * inverse, inverse[:, 0].sqrt()
    expand = fold(block.expand, block.expand_bn, x.dtype)
    if not layers_of(block.skip):
        return folded(h, expand, residual=x, factor=factor), energies
    conv, bn = layers_of(block.skip)
    step = conv.stride[0]
    both = side_by_side(h, factor, x[:, :, ::step, ::step])
    return folded(both, expand.beside(fold(conv, bn, x.dtype))), energies
