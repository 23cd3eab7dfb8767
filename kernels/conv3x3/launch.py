"""The grouped 3x3 convolution and its gradients by the Triton kernels: tensors in, tensors out.

Nothing is checked here but that maps are not empty. B samples, N groups of width D, H x W maps in,
OH x OW maps out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import (
    DTYPES,
    aligned,
    aligned_rows,
    as_float32,
    as_rows,
    empty_float32,
    tf32_allowed,
    variant_of,
)
from coded_resnext.kernels.rows import Variant

from . import rows as conv3x3_rows
from .rows import (
    LANES,
    MOST_OTHERS,
    MOST_ROWS,
    REDUCED,
    ROUNDED,
    GroupedSizes,
    GroupedWindows,
)


def forward(
    x: Tensor,
    weight: Tensor,
    sizes: GroupedSizes,
    scale: Tensor | None,
    bias: Tensor | None,
    statistics: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns `y [B, N*D, OH, OW]`, channels-last, and its (count, sum, M2) in parts, `[parts, 3,
    N*D]`.

    Args:
        x: `[B, N*D, H, W]`; copied unless channels-last and of a width that needs no padding.
        weight: `[N*D, D, 3, 3]` in any dtype of the kernels; it is rounded to that of `x`.
        sizes: `N`, `D` and the stride.
        scale, bias: `[N*D]` float32 or None; `relu(scale x + bias)` is convolved instead of `x`.
        statistics: whether they are wanted.
        packed: the weight of `pack`; it is packed here if None.
    """
    rows, (scale, bias) = _rows(x, sizes), _vectors(sizes, scale, bias)
    batch, height, width, channels = rows.shape
    y = rows.new_empty(batch, -(-height // sizes.stride), -(-width // sizes.stride), channels)
    parts, part_rows = _parts(y, pairs=sizes.stride == 1)
    partial = empty_float32(x, parts, 3, channels) if statistics else None
    variant = _variant(x, affine=scale is not None, statistics=statistics)
    conv3x3_rows.forward(sizes, variant).launch(
        (GroupedWindows.of(sizes).count * parts,),
        y,
        partial,
        None,
        rows,
        scale,
        bias,
        (pack(weight, sizes, x.dtype)[0] if packed is None else packed)[0],
        *(None, None, None),
        batch,
        height,
        width,
        part_rows,
    )
    return _images(y, sizes), None if partial is None else _channels(partial, sizes)


def folded_forward(
    x: Tensor,
    weight: Tensor,
    sizes: GroupedSizes,
    after: Tensor,
    keep: Tensor | None,
    form: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `h = keep relu(conv(x) + after)`, channels-last, and the sums over pixels of `h^T
    Q_n h`.

    Args:
        x, weight, sizes: as for `forward`.
        after: `[N*D]`.
        keep: `[B, N]` or None.
        form: `Q [N, D, D]` float32, or None.

    Returns:
        `h [B, N*D, OH, OW]`, and `[B, N]` float32, or `[0]` without a form.
    """
    rows, (after_rows,) = _rows(x, sizes), _vectors(sizes, after)
    batch, height, width, channels = rows.shape
    h = rows.new_empty(batch, -(-height // sizes.stride), -(-width // sizes.stride), channels)
    parts, part_rows = _parts(h, pairs=sizes.stride == 1)
    kept = None
    if keep is not None:
        (kept,) = _vectors(sizes, keep.repeat_interleave(sizes.width, 1))
    energy = None if form is None else empty_float32(x, *_energy_shape(h, sizes, part_rows))
    scaled, peak = (None, None) if form is None else _pack_form(form, sizes, x.dtype)
    variant = _variant(x, folded=True, keep=keep is not None, energies=form is not None)
    conv3x3_rows.forward(sizes, variant).launch(
        (GroupedWindows.of(sizes).count * parts,),
        h,
        None,
        energy,
        rows,
        None,
        None,
        pack(weight, sizes, x.dtype)[0][0],
        after_rows,
        kept,
        scaled,
        batch,
        height,
        width,
        part_rows,
    )
    if energy is None or peak is None:
        return _images(h, sizes), empty_float32(x, 0)
    return _images(h, sizes), energy.sum((0, 2))[:, : sizes.groups] * peak


def _energy_shape(h: Tensor, sizes: GroupedSizes, part_rows: int) -> tuple[int, ...]:
    """Segments of rows, samples, lanes of a row and branches, those that fill up windows too."""
    windows = GroupedWindows.of(sizes)
    batch, height, width, _ = h.shape
    columns = -(-width // 2) if sizes.stride == 1 else width
    return -(-height // part_rows), batch, columns, windows.count * windows.group


def _pack_form(form: Tensor, sizes: GroupedSizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the forms as the kernel reads them, `[windows, 1 or 2, BLOCK_K, BLOCK_K]`, and `[N]`,
    the largest element of each, by which they are divided.

    A second term has what 16 bits leave of the first, so that the sum has twice their precision.
    """
    windows = GroupedWindows.of(sizes)
    peak = form.abs().amax((1, 2))
    unit = form / torch.where(peak > 0, peak, 1.0)[:, None, None]
    wide = unit.new_zeros(windows.count * windows.group, windows.padded, windows.padded)
    wide[: sizes.groups, : sizes.width, : sizes.width] = unit
    blocks = unit.new_zeros(windows.count, windows.block_k, windows.block_k)
    for slot, one in enumerate(wide.view(windows.count, windows.group, *wide.shape[1:]).unbind(1)):
        channels = slice(slot * windows.padded, (slot + 1) * windows.padded)
        blocks[:, channels, channels] = one
    terms = [blocks.to(dtype)]
    if dtype != torch.float32:
        terms.append((blocks - terms[0].float()).to(dtype))
    return torch.stack(terms, 1).contiguous(), peak


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    sizes: GroupedSizes,
    map_size: tuple[int, int],
    y: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of `x [B, N*D, H, W]`, and those of `bias` and `scale`, `[parts, 2,
    N*D]`.

    Args:
        grad: of the output, `[B, N*D, OH, OW]`.
        weight, sizes, scale, bias, packed: as for `forward`.
        map_size: `(H, W)`.
        y, curve, level: with them the gradient is `grad + curve y + level` per channel.
        x: the input, needed with `scale` and `bias`.
    """
    rows = _rows(grad, sizes, "grad")
    scale, bias, curve, level = _vectors(sizes, scale, bias, curve, level)
    channels = rows.shape[3]
    dx = rows.new_empty(rows.shape[0], *map_size, channels)
    parts, part_rows = _parts(rows, pairs=sizes.stride == 1)
    partial = None if scale is None else empty_float32(grad, parts, 2, channels)
    variant = _variant(grad, affine=scale is not None, statistics=y is not None)
    conv3x3_rows.input_gradient(sizes, variant).launch(
        (GroupedWindows.of(sizes).count * parts,),
        dx,
        partial,
        rows,
        None if y is None else _rows(y, sizes, "y"),
        curve,
        level,
        None if scale is None or x is None else _rows(x, sizes),
        scale,
        bias,
        (pack(weight, sizes, grad.dtype)[0] if packed is None else packed)[1],
        rows.shape[0],
        *map_size,
        part_rows,
    )
    return _images(dx, sizes), None if partial is None else _channels(partial, sizes)


def weight_gradient(
    grad: Tensor,
    sizes: GroupedSizes,
    y: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    last: bool = False,
) -> Tensor:
    """Returns the gradient of the weight, `[N*D, D, 3, 3]`, in a dtype, channels-last if `last`.

    Other arguments as for `input_gradient`.
    """
    rows, inputs = _rows(grad, sizes, "grad"), _rows(x, sizes)
    scale, bias, curve, level = _vectors(sizes, scale, bias, curve, level)
    windows = GroupedWindows.of(sizes)
    parts, part_rows = _parts(rows, pairs=False)
    variant = _variant(grad, affine=scale is not None, statistics=y is not None)
    splits = conv3x3_rows.weight_splits(sizes, variant, parts)
    block = windows.block_k
    partial = empty_float32(grad, splits, windows.count, 9, block, block)
    conv3x3_rows.weight_gradient(sizes, variant).launch(
        (windows.count * splits,),
        partial,
        rows,
        None if y is None else _rows(y, sizes, "y"),
        curve,
        level,
        inputs,
        scale,
        bias,
        *inputs.shape[:3],
        part_rows,
    )
    shape = (sizes.groups * sizes.width, sizes.width, 3, 3)
    layout = torch.channels_last if last else torch.contiguous_format
    gradient = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=layout)
    row = conv3x3_rows.reduce_weight_gradient(sizes, DTYPES[dtype], last=last)
    row.launch((windows.count * 9 * (block * block // REDUCED),), gradient, partial, splits)
    return gradient


def _variant(x: Tensor, **options: bool) -> Variant:
    """Returns what a kernel on activations `x` is compiled for; TF32 is allowed as in PyTorch's
    convolutions."""
    tf32 = x.dtype == torch.float32 and tf32_allowed(convolution=True)
    return variant_of(x, tf32=tf32, **options)


def _parts(rows: Tensor, *, pairs: bool) -> tuple[int, int]:
    """Returns the parts of the work on a map `[B, H, W, C]`, and the rows of each."""
    batch, height, width, _ = rows.shape
    segments = -(-height // MOST_ROWS)
    part_rows = -(-height // segments)
    lanes = batch * (-(-width // 2) if pairs else width)
    return -(-lanes // LANES) * -(-height // part_rows), part_rows


def is_last(weight: Tensor) -> bool:
    """Returns whether a weight `[N*D, D, 3, 3]` is channels-last, and no contiguous one besides."""
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return last and not weight.is_contiguous()


def pack(
    weight: Tensor, sizes: GroupedSizes, dtype: torch.dtype, others: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Returns the weight as the kernels read it, `[2, windows, 9, BLOCK_K, BLOCK_K]` in a dtype: of
    the forward pass, and of the gradient of the input; and up to three others in that dtype."""
    windows, last = GroupedWindows.of(sizes), is_last(weight)
    packed = weight.new_empty(2, windows.count, 9, windows.block_k, windows.block_k, dtype=dtype)
    casts = [torch.empty(other.shape, dtype=dtype, device=other.device) for other in others]
    absent = [None] * (MOST_OTHERS - len(casts))
    counts = [cast.numel() for cast in casts]
    row = conv3x3_rows.pack_weights(
        sizes, DTYPES[dtype], DTYPES[weight.dtype], last=last, others=len(casts)
    )
    flat = weight.permute(0, 2, 3, 1) if last else weight
    row.launch(
        (windows.count * 9 + sum(-(-count // ROUNDED) for count in counts),),
        packed,
        *casts,
        *absent,
        aligned(flat),
        *map(aligned, others),
        *absent,
        *counts,
        *(0 for _ in absent),
    )
    return packed, casts


def _rows(x: Tensor, sizes: GroupedSizes, name: str = "x") -> Tensor:
    """Returns `[B, N*D, H, W]` as rows of padded channels, `[B, H, W, windows * channels]`, at 16
    bytes."""
    check_filled(name, x)
    if not GroupedWindows.of(sizes).fit(sizes):
        return _padded(as_rows(x), sizes)
    return aligned_rows(x)


def _vectors(sizes: GroupedSizes, *vectors: Tensor | None) -> list[Tensor | None]:
    """Returns numbers per channel in float32, padded with zeros as the channels are."""
    fit = GroupedWindows.of(sizes).fit(sizes)
    wide = [as_float32(vector) for vector in vectors]
    return [v if v is None or fit else _padded(v, sizes) for v in wide]


def _padded(values: Tensor, sizes: GroupedSizes) -> Tensor:
    windows = GroupedWindows.of(sizes)
    shape = values.shape[:-1]
    padded = values.new_zeros(*shape, windows.count * windows.group, windows.padded)
    padded[..., : sizes.groups, : sizes.width] = values.view(*shape, sizes.groups, sizes.width)
    return padded.flatten(-2)


def _channels(values: Tensor, sizes: GroupedSizes) -> Tensor:
    """Returns the real channels of the last dimension, without the padding."""
    windows = GroupedWindows.of(sizes)
    if windows.fit(sizes):
        return values
    split = values.reshape(*values.shape[:-1], windows.count * windows.group, windows.padded)
    return split[..., : sizes.groups, : sizes.width].flatten(-2).contiguous()


def _images(rows: Tensor, sizes: GroupedSizes) -> Tensor:
    """Returns the rows of padded channels as `[B, N*D, H, W]`, channels-last."""
    return _channels(rows, sizes).permute(0, 3, 1, 2)
