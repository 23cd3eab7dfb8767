"""Prepares tensors and launch rows for the kernels of energies and branch sums."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from coded_resnext.kernels import layout
from coded_resnext.kernels.backend import LOGGER, say_once
from coded_resnext.kernels.layout import as_float32, as_rows, variant_of, without_autocast
from coded_resnext.kernels.rows import WIDEST_BRANCH, CodedSizes, LaunchRow, Variant, Windows

from . import gram
from . import rows as coded_rows


def unsupported(h: Tensor, width: int) -> str | None:
    """Returns why the kernels do not take these activations `[B, N*D, H, W]`; None if they do."""
    reason = layout.unsupported(h, width=width, widest=WIDEST_BRANCH)
    if reason is None and max(h.numel() // h.shape[0], h.shape[0] * h.shape[1]) >= 2**31:
        return "the kernels take samples, and B*N*D, of fewer than 2^31 elements"
    return reason


class Launch:
    """What the launches of one operator share: sizes, settings and tensors as the kernels read."""

    def __init__(
        self,
        z: Tensor,
        branch_weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        drop_mask: Tensor | None,
        keep_mask: Tensor | None,
        *,
        form: Tensor | None = None,
    ) -> None:
        # Kernels are compiled for these, which are constants where a graph leaves sizes open.
        branches, channels, width = (int(size) for size in branch_weight.shape)
        self.batch, self.pixels = z.shape[0], int(z.shape[2]) * int(z.shape[3])
        self.sizes = CodedSizes(branches, width, channels, self.pixels)
        self.variant = variant_of(
            z, affine=scale is not None, drop=drop_mask is not None, keep=keep_mask is not None
        )
        self.inverse_size = 1.0 / (channels * self.pixels)
        self.rows = as_rows(z)
        self.scale, self.bias = as_float32(scale), as_float32(bias)
        self.drop, self.keep = as_float32(drop_mask), as_float32(keep_mask)
        self.windows = Windows.of(self.sizes).count
        self.form = gram.branch_forms(branch_weight, torch.float32) if form is None else form

    @classmethod
    def of(
        cls,
        z: Tensor,
        branch_weight: Tensor,
        *others: Tensor | None,
        rows: tuple[Callable[[CodedSizes, Variant], LaunchRow], ...],
        form: Tensor | None = None,
    ) -> Launch | None:
        """Returns what the kernels of these rows read, or None where PyTorch takes their place.

        That is so where `unsupported` gives a reason, and, said once in the log, where a kernel
        does not fit onto the GPU.
        """
        if unsupported(z, branch_weight.shape[2]) is not None:
            return None
        launch = cls(z, branch_weight, *others, form=form)
        with layout.on_device(z):
            for row in rows:
                reason = layout.too_large(row(launch.sizes, launch.variant), z.device.index or 0)
                if reason is not None:
                    say_once(
                        LOGGER, f"PyTorch runs in place of a kernel: {reason}", logging.WARNING
                    )
                    return None
        return launch

    def over_windows(self, row: LaunchRow) -> tuple[int, int]:
        """Returns the grid of a kernel over samples and windows."""
        settings = dict(row.constexprs)
        samples, windows = int(settings["SAMPLES"]), int(settings["WINDOWS"])
        return -(-self.batch // samples), -(-self.windows // windows)

    def add_weight_gradient(
        self, coefficient: Tensor, branch_weight: Tensor, gradient: Tensor
    ) -> None:
        """Adds (17) without the part that the convolution computes, to a gradient `[N, C, D]`."""
        row = coded_rows.weighted_gram(self.sizes, self.variant)
        grid = self.over_windows(row)
        branches, width = self.sizes.branches, self.sizes.width
        parts = self.form.new_empty((grid[0], branches, width, width))
        row.launch(grid, parts, self.rows, self.scale, self.bias, coefficient, self.batch)
        _add_product(gradient, branch_weight.to(torch.float32), parts.sum(0))


@without_autocast
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds the products of float32 matrices to `total`, rounded to its dtype."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)
