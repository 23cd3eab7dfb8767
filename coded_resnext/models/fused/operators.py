"""The convolutions of a fused block: who computes them, in which dtype, with what in front."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from coded_resnext.kernels import backends
from coded_resnext.kernels.backend import LOGGER, say_once
from coded_resnext.kernels.conv1x1 import operator as conv1x1_operator
from coded_resnext.kernels.conv1x1.join_operator import join_conv1x1
from coded_resnext.kernels.conv1x1.operator import conv1x1
from coded_resnext.kernels.conv3x3 import functional as conv3x3_functional
from coded_resnext.kernels.conv3x3.operator import grouped_conv3x3
from coded_resnext.kernels.conv3x3.operator import unsupported as grouped_unsupported
from coded_resnext.kernels.evaluation import folded_conv1x1, folded_grouped_conv3x3
from coded_resnext.kernels.layout import DTYPES, channels_last, unsupported
from coded_resnext.kernels.recompute.moments_operator import recomputed_conv1x1
from coded_resnext.kernels.rows import Passes

from .norm import Folded
from .values import Affine, Map, Product, joined_product, like

NO_MAP = (None, None)
# Input channels up to which a convolution is computed twice rather than written: the scatter of its
# input costs a product of as many channels by as many, which beyond them is no longer free.
RECOMPUTED = 256


@dataclass(frozen=True)
class FusedOperators:
    """The operators between the BatchNorms of a block, on raw tensors and the maps behind them."""

    backend: Literal["auto", "triton"]
    """Kernels where they have been measured to win, or wherever they can run."""
    dtype: torch.dtype | None
    """Dtype to which autocast casts activations and weights; None without autocast."""

    @classmethod
    def of(cls, chosen: str, x: Tensor) -> FusedOperators:
        """For a backend, `fused` or `triton`, and the present autocast on the device of `x`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls("triton" if chosen == "triton" else "auto", dtype)

    def cast(self, x: Tensor) -> Tensor:
        """Returns the tensor in the dtype of autocast."""
        return x if self.dtype is None else x.to(self.dtype)

    def joins(self, x: Tensor) -> bool:
        """Whether Triton kernels compute the sum that ends a block, and what else is pointwise."""
        if x.dtype not in DTYPES:
            return False
        return self.backend == "triton" or (x.is_cuda and backends()["triton"] is None)

    def conv1x1(
        self,
        x: Tensor,
        conv: nn.Conv2d,
        affine: Affine | None = None,
        *,
        statistics: bool,
        deferred: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`y = W relu(scale x + bias)`, raw, and its statistics `[3, O]` or `[0]`.

        Args:
            x: `[B, I, H, W]`, raw where there is a map, else the operand itself.
            conv: a 1x1 convolution, whose stride picks pixels of `x`.
            affine: the map; None leaves `x` as it is, without a ReLU.
            statistics: whether to take them.
            deferred: see `fused_norm.affine_of`.
        """
        weight = self.cast(conv.weight)
        x = _picked(x, conv)
        passes = self._products(x, weight)
        y, sums = conv1x1(x, weight, *(affine or NO_MAP), statistics, deferred, passes.encoded())
        return y, sums

    def recomputes(self, x: Tensor, conv: nn.Conv2d) -> bool:
        """Returns whether a 1x1 convolution of `x [B, I, H, W]` is computed where it is read."""
        # Its statistics are worked out in float64.
        return conv.in_channels <= RECOMPUTED and x.device.type != "mps"

    def recomputed(
        self, x: Tensor, conv: nn.Conv2d, affine: Affine | None = None
    ) -> tuple[Product, Tensor]:
        """Returns a 1x1 convolution that its consumer computes, and its statistics `[3, O]`.

        Arguments as for `conv1x1`.
        """
        weight = self.cast(conv.weight)
        # It is read four times, of which each would copy what a stride picks.
        x = channels_last(_picked(x, conv))
        passes = self._products(x, weight)
        arguments = (x, weight, *(affine or NO_MAP), passes.encoded())
        handle, sums_handle, statistics, _, _ = recomputed_conv1x1(*arguments)
        return Product(handle, sums_handle, x, affine, weight, passes), statistics

    def join_conv1x1(
        self, x: Map, conv: nn.Conv2d, *, statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the map `x` itself, `y = W x`, raw, and its statistics."""
        if isinstance(x, Tensor):
            x = self.cast(x)
            return x, *self.conv1x1(x, conv, statistics=statistics)
        weight = self.cast(conv.weight)
        passes = self._products(like(x), weight, join=True)
        if isinstance(x.raw, Product):
            # Signs are written by a kernel of one convolution, and read by one of the other.
            both = Passes(forward=x.raw.passes.forward, input=passes.input)
            signs = both.keeps_signs(conv.in_channels) and torch.is_grad_enabled()
            return joined_product(
                x, x.raw, weight, statistics=statistics, signs=signs, passes=passes
            )
        assert isinstance(x.residual, Tensor)
        signs = passes.keeps_signs(conv.in_channels) and torch.is_grad_enabled()
        joined, y, sums, _ = join_conv1x1(
            x.raw,
            *x.affine,
            x.residual,
            *(x.residual_affine or NO_MAP),
            weight,
            statistics,
            signs,
            x.deferred,
            passes.encoded(),
        )
        return joined, y, sums

    def grouped(
        self, x: Tensor, conv: nn.Conv2d, affine: Affine, *, statistics: bool
    ) -> tuple[Tensor, Tensor]:
        """The grouped 3x3 convolution of `relu(scale x + bias)`, raw, and its statistics."""
        weight, stride = self.cast(conv.weight), conv.stride[0]
        passes = self._grouped_passes(x, weight, stride)
        y, sums = grouped_conv3x3(x, weight, *affine, stride, statistics, passes.encoded())
        return y, sums

    def folded_conv1x1(
        self,
        x: Tensor,
        conv: Folded,
        *,
        residual: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """`relu(factor W x + bias + residual)`; `factor [B]`, with a residual alone."""
        passes = self._products(x, conv.weight)
        y: Tensor = folded_conv1x1(x, *conv, residual, factor, passes.encoded())
        return y

    def folded_grouped(
        self,
        x: Tensor,
        conv: Folded,
        stride: int,
        branch_weight: Tensor | None,
        keep_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`keep relu(W x + bias)` of the grouped 3x3 convolution, and its energies `[B, N]`."""
        passes = self._grouped_passes(x, conv.weight, stride)
        h, energy = folded_grouped_conv3x3(
            x, *conv, branch_weight, keep_mask, stride, passes.encoded()
        )
        return h, energy

    def _grouped_passes(self, x: Tensor, weight: Tensor, stride: int) -> Passes:
        backend = self._backend(grouped_unsupported(x, weight, stride))
        return conv3x3_functional.select_passes(x, weight, stride, backend)

    def _products(self, x: Tensor, weight: Tensor, *, join: bool = False) -> Passes:
        """The passes of a 1x1 convolution that run kernels, and whether what is around it does."""
        backend = self._backend(unsupported(x))
        passes = conv1x1_operator.select_products(x, weight, backend, join=join)
        return Passes(passes.forward, passes.input, passes.weight, pointwise=self.joins(x))

    def _backend(self, reason: str | None) -> Literal["auto", "torch", "triton"]:
        """`torch` in place of `triton` where the kernels cannot run, which is said once."""
        if self.backend == "triton" and reason is not None:
            text = f"a fused operator runs on PyTorch in place of 'triton': {reason}"
            say_once(LOGGER, text, logging.WARNING)
            return "torch"
        return self.backend


def _picked(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Returns the pixels that a 1x1 convolution takes."""
    step = conv.stride[0]
    return x if step == 1 else x[:, :, ::step, ::step]
