"""A grouped 3x3 convolution for any network, and a function that puts it into one.

Parameters, state dicts and results are those of `nn.Conv2d`; what differs is who computes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from coded_resnext.kernels import ConvBackend, check_conv_backend, grouped_conv3x3
from coded_resnext.kernels.checks import check_integers, typed


class GroupedConv2d(nn.Conv2d):
    """`nn.Conv2d` for 3x3 kernels with padding 1 and groups, on the kernels of this package.

    On a CPU, and on a GPU on which nothing else has been measured to win, this is `nn.Conv2d` to
    the last bit. On an H100 groups of 4 and of 8 channels are merged into wider ones for cuDNN,
    with activations of 16 bits a number, channels-last. The kernels want channels-last activations
    and give channels-last results; anything else is copied first.

    Args:
        in_channels: `N*D`.
        out_channels: as many.
        kernel_size: 3.
        stride: 1 or 2.
        padding: 1.
        dilation: 1.
        groups: `N`.
        bias: whether there is one; it is added behind the kernels.
        padding_mode: `"zeros"`.
        device: of the parameters.
        dtype: of the parameters.
        backend: `"auto"`, `"torch"`, `"merged"` or `"triton"`, see
            `coded_resnext.kernels.grouped_conv3x3`.

    Raises:
        ValueError: an argument has another value than these.
    """

    @typed
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: ConvBackend = "auto",
    ) -> None:
        check_integers(in_channels=in_channels, out_channels=out_channels, groups=groups)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        check_conv_backend(backend)
        fault = mismatch(self)
        if fault is not None:
            raise ValueError(fault)
        self.backend: ConvBackend = backend

    def forward(self, input: Tensor) -> Tensor:
        """Convolves `[B, N*D, H, W]`, or `[N*D, H, W]` without a batch.

        Settings that were changed since, such as a dilation, are left to `nn.Conv2d`, and symbolic
        traces are.

        Raises:
            RuntimeError: the kernels were asked for by name and cannot run; or as `nn.Conv2d`.
        """
        symbolic = isinstance(input, fx.Proxy)
        if self.backend == "torch" or symbolic or not _is_batch(input):
            return super().forward(input)
        if (self.backend == "auto" and not input.is_cuda) or mismatch(self) is not None:
            return super().forward(input)
        y, _ = grouped_conv3x3(
            input, self.weight, self.groups, stride=self.stride[0], backend=self.backend
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def extra_repr(self) -> str:
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, backend={self.backend}"


def _is_batch(x: Tensor) -> bool:
    """Returns whether there is a batch, with something in it; the rest is left to PyTorch."""
    return x.ndim == 4 and x.numel() > 0


def mismatch(conv: nn.Conv2d) -> str | None:
    """Returns which setting keeps a convolution from being a `GroupedConv2d`; None if none does."""
    settings: dict[str, tuple[Any, Any]] = {
        "kernel_size": (conv.kernel_size, (3, 3)),
        "padding": (1 if conv.padding in ((1, 1), "same") else conv.padding, 1),
        "dilation": (conv.dilation, (1, 1)),
        "padding_mode": (conv.padding_mode, "zeros"),
        "out_channels": (conv.out_channels, conv.in_channels),
    }
    for name, (value, expected) in settings.items():
        if value != expected:
            return f"{name}: expected {expected}, got {value}"
    if conv.stride not in ((1, 1), (2, 2)):
        return f"stride: expected 1 or 2, got {conv.stride}"
    return None


@typed
def use_grouped_kernels(model: nn.Module, backend: ConvBackend = "auto") -> int:
    """Makes every grouped 3x3 convolution of a network a `GroupedConv2d`, in place.

    Any ResNeXt or RegNet of torchvision or timm will do. Parameters, their names, hooks and the
    training mode stay as they are. Convolutions of one group, depthwise ones (groups of one
    channel) and those whose settings differ are left alone, as are subclasses of `nn.Conv2d`.

    Args:
        model: the network.
        backend: as for `GroupedConv2d`.

    Returns:
        How many convolutions there are now that follow `backend`.

    Raises:
        ValueError: there is no such backend.
    """
    check_conv_backend(backend)
    count = 0
    for module in model.modules():
        if type(module) is nn.Conv2d:
            grouped = 1 < module.groups < module.in_channels
            if not grouped or mismatch(module) is not None:
                continue
            # The object stays, so that whatever refers to it or hooks into it still does.
            module.__class__ = GroupedConv2d
        if type(module) is GroupedConv2d and mismatch(module) is None:
            module.backend = backend
            count += 1
    return count
