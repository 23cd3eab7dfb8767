"""The 1x1 convolution between two BatchNorms, and with the sum that ends a block before it.

`Passes` says who computes: those passes run the Triton kernels, on CUDA tensors and in Triton's
interpreter; the others PyTorch's products. Around these, `pointwise` lets kernels compute the end
of a block, its gradient and the statistics, where PyTorch goes through the map several times. No
autograd here. Results of the size of the activations are channels-last; sums and statistics come in
parts. B samples, I channels in, O channels out.

*Signs* are one bit for each element of the sum that ends a block, set where it is above 0:
`[B, H, W, I / 8]` bytes, the lowest bit first. With them the gradient of the sum reads one bit
where it would read the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.kernels import affine
from coded_resnext.kernels.affine import ConvGradients, behind_activation
from coded_resnext.kernels.backend import ConvBackend, architecture_of_kernels, choose_passes
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import accumulation_dtype, as_rows, on_device, unsupported
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import NO_PASSES, Passes

from . import launch as conv1x1_launch
from . import library as conv1x1_library
from .rows import ProductSizes, planned


# The compiler takes the result as it is: it follows no logger, and that of torch 2.11 with Python
# 3.12 no frozen dataclass into its text. The sizes of the weight must be constants of the graph,
# which those of parameters are.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(arch: str, inputs: int, outputs: int, join: bool, forced: bool) -> int:
    """Returns the encoded passes of a weight `[O, I]` that run kernels; `forced` by name."""
    sizes = ProductSizes(inputs, outputs, join)
    return choose_passes("1x1 convolution", sizes, arch, forced, planned).encoded()


def select_products(
    x: Tensor, weight: Tensor, backend: ConvBackend, *, join: bool = False
) -> Passes:
    """Returns the passes that run kernels, by the rule of `choose_passes`.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I, 1, 1]`.
        backend: who is to compute.
        join: whether the sum that ends a block is before the convolution.

    Raises:
        ValueError, RuntimeError: as `architecture_of_kernels`.
    """
    arch = architecture_of_kernels(x, backend, unsupported(x))
    if arch is None:
        return NO_PASSES
    outputs, inputs = weight.shape[:2]
    return Passes.decoded(_choose(arch, inputs, outputs, join, backend == "triton"))


def forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    statistics: bool,
    passes: Passes,
) -> tuple[Tensor, Tensor | None]:
    """Computes `y = W relu(scale x + bias)` at every pixel; without `scale` and `bias`, `y = W x`.

    `x [B, I, H, W]`, `weight [O, I, 1, 1]`, `scale` and `bias [I]`.

    Returns:
        `y [B, O, H, W]`, and its (count, sum, M2) `[parts, 3, O]` in the accumulation dtype, which
        a kernel takes before `y` is rounded; None without `statistics`.
    """
    check_filled("x", x)
    if passes.forward:
        with on_device(x):
            return conv1x1_launch.forward(x, weight, scale, bias, statistics)
    y = conv1x1_library.forward(affine.activate(x, scale, bias), weight)
    return y, residual_launch.statistics(y, passes.pointwise) if statistics else None


def backward(
    grad: Tensor,
    y: Tensor | None,
    gain: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    need_input: bool,
    weight_dtype: torch.dtype | None,
    passes: Passes,
    more: Tensor | None = None,
) -> ConvGradients:
    """Returns the gradients for that of the output, `gain grad + curve y + level`.

    Args:
        grad, y: `[B, O, H, W]`; `y`, `curve` and `level` go together.
        gain, curve, level: `[O]`.
        x, weight, scale, bias: as for `forward`.
        need_input: whether the gradient of `x`, and of the map before it, is wanted.
        weight_dtype: of the gradient of the weight, or None where it is not wanted.
        passes: who computes.
        more: another gradient of `x`, to be added where no map is before the convolution.
    """
    check_filled("x", x)
    dx = sums = dweight = None
    with on_device(x):
        if need_input and passes.input:
            dx, sums, grad = conv1x1_launch.input_gradient(
                grad, weight, x, scale, bias, y, gain, curve, level, weight_dtype is not None
            )
            dx = dx if more is None else dx.add_(more)
        else:
            grad = residual_launch.output_gradient(grad, y, gain, curve, level, passes.pointwise)
        if weight_dtype is not None and passes.weight:
            dweight = conv1x1_launch.weight_gradient(grad, x, weight, scale, bias, weight_dtype)
    if need_input and not passes.input:
        of_activated = conv1x1_library.input_gradient(grad, weight, more)
        if scale is None:
            dx = of_activated
        else:
            wide = of_activated.to(accumulation_dtype(x.dtype))
            dx, sums = behind_activation(wide, x, scale, bias)
    if weight_dtype is not None and not passes.weight:
        activated = affine.activate(x, scale, bias)
        dweight = conv1x1_library.weight_gradient(grad, activated, weight, weight_dtype)
    return ConvGradients(dx, sums, dweight)


def pack_signs(x: Tensor) -> Tensor:
    """Returns the signs `[B, H, W, I / 8]` of `[B, I, H, W]`."""
    weights = 2 ** torch.arange(8, device=x.device)
    rows = as_rows(x)
    bits = (rows > 0).view(*rows.shape[:3], x.shape[1] // 8, 8)
    return (bits * weights).sum(-1).to(torch.uint8)


def join(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    statistics: bool,
    keep_signs: bool,
    passes: Passes,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Computes `x = relu(scale y + bias + residual)`, `z = W x`.

    `y`, `residual [B, I, H, W]`, `weight [O, I, 1, 1]`; the others `[I]`. With `residual_scale` and
    `residual_bias` it is `residual_scale residual + residual_bias` that is added.

    Returns:
        `x [B, I, H, W]`, `z [B, O, H, W]`, its (count, sum, M2) `[parts, 3, O]` and the signs of
        `x`; None for what is not wanted.
    """
    check_filled("y", y)
    if passes.forward:
        with on_device(y):
            return conv1x1_launch.join_forward(
                y,
                scale,
                bias,
                residual,
                residual_scale,
                residual_bias,
                weight,
                statistics,
                keep_signs,
            )
    x = residual_launch.forward(
        y, scale, bias, residual, residual_scale, residual_bias, passes.pointwise
    )
    z, partial = forward(x, weight, None, None, statistics, passes)
    return x, z, partial, pack_signs(x) if keep_signs else None


def join_backward(
    grad: Tensor,
    z: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    grad_x: Tensor | None,
    x: Tensor,
    signs: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    weight_dtype: torch.dtype | None,
    passes: Passes,
) -> ConvGradients:
    """Returns the gradients for `grad + curve z + level`, that of `z`, and `grad_x`, that of `x`.

    Args:
        grad, z: `[B, O, H, W]`; `z`, `curve` and `level` go together.
        curve, level: `[O]`.
        grad_x: `[B, I, H, W]`, or None.
        x, signs: what `join` gave; where there are signs the kernel reads them instead of `x`.
        y: what was mapped, or None where the sum of its product with `g` is not wanted.
        residual: where it has a map, of which that sum is wanted too.
        weight: as for `join`.
        weight_dtype, passes: as for `backward`.

    Returns:
        Instead of the input's gradient `g [B, I, H, W]`, that behind the ReLU. It is the
        gradient of `scale y` and of the residual, mapped where it has a map.
    """
    check_filled("x", x)
    with on_device(x):
        if passes.input:
            g, sums, grad = conv1x1_launch.join_input_gradient(
                grad,
                grad_x,
                x,
                signs,
                y,
                residual,
                weight,
                z,
                None,
                curve,
                level,
                weight_dtype is not None,
            )
        else:
            grad = residual_launch.output_gradient(grad, z, None, curve, level, passes.pointwise)
            of_x = conv1x1_library.input_gradient(grad, weight, grad_x)
            g, sums = residual_launch.backward(of_x, x, y, residual, passes.pointwise)
        dweight = None
        if weight_dtype is not None and passes.weight:
            dweight = conv1x1_launch.weight_gradient(grad, x, weight, None, None, weight_dtype)
        elif weight_dtype is not None:
            dweight = conv1x1_library.weight_gradient(grad, x, weight, weight_dtype)
    return ConvGradients(g, sums, dweight)
