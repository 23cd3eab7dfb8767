"""Triton: what BatchNorm is between two convolutions, arithmetic on a few numbers for each channel.

The kernels around it leave partial sums, one set for each of their programs. These kernels add them
up and do all that follows from them, in one launch. Sums are float64: counts and sums of a large
batch are beyond the 24 bits of float32. The order of the additions depends on the number of parts
alone. All tensors are float32; grid: ceil(C / BLOCK_C).
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import hash_in_order


@triton.jit
def add_parts(at, parts, stride, inside, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum `[1, BLOCK_C]` of the numbers at `at [1, BLOCK_C]` and every `stride` behind it."""
    part = tl.arange(0, BLOCK_T)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_T):
        row = (start + part).to(tl.int64)
        value = tl.load(at + row * stride, mask=(row < parts) & inside, other=0.0)
        total += value.to(tl.float64)
    return tl.sum(total, 0)[None, :]


@triton.jit
def merge_parts(
    partial_ptr,
    parts,
    channel,
    inside,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Count, sum and M2 `[1, BLOCK_C]` of all parts, `partial [parts, 3, C]`, by Chan's formula.

    M2 is the sum of squared deviations from the mean. The mean of all is known before the parts'
    M2 are added, each with `count (its mean - the mean)^2`; no large numbers are subtracted.
    """
    STRIDE: tl.constexpr = 3 * CHANNELS
    at = partial_ptr + channel
    count = add_parts(at, parts, STRIDE, inside, BLOCK_T, BLOCK_C)
    total = add_parts(at + CHANNELS, parts, STRIDE, inside, BLOCK_T, BLOCK_C)
    mean = total / tl.where(count > 0, count, 1.0)
    part = tl.arange(0, BLOCK_T)[:, None]
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_T):
        row = (start + part).to(tl.int64)
        valid = (row < parts) & inside
        n = tl.load(at + row * STRIDE, mask=valid, other=0.0).to(tl.float64)
        own = tl.load(at + row * STRIDE + CHANNELS, mask=valid, other=0.0).to(tl.float64)
        m2 = tl.load(at + row * STRIDE + 2 * CHANNELS, mask=valid, other=0.0).to(tl.float64)
        off = own / tl.where(n > 0, n, 1.0) - mean
        squares += m2 + n * off * off
    return count, total, tl.sum(squares, 0)[None, :]


@triton.jit(do_not_specialize=["parts"])
def merge_statistics(
    total_ptr,
    partial_ptr,
    parts,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`partial [parts, 3, C]` to the (count, sum, M2) of all, `total [3, C]`."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < CHANNELS
    count, total, m2 = merge_parts(partial_ptr, parts, channel, inside, CHANNELS, BLOCK_C, BLOCK_T)
    tl.store(total_ptr + channel, count.to(tl.float32), mask=inside)
    tl.store(total_ptr + CHANNELS + channel, total.to(tl.float32), mask=inside)
    tl.store(total_ptr + 2 * CHANNELS + channel, m2.to(tl.float32), mask=inside)


@triton.jit
def take_up(before, value, share):
    """Running statistics, moved by a share of the way to those of a batch."""
    return before + share * (value - before)


@triton.jit
def store_map(
    map_ptr,
    moments_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    epsilon,
    share,
    count,
    mean,
    m2,
    channel,
    inside,
    CHANNELS: tl.constexpr,
):
    """BatchNorm's `bias` and `scale`, and the mean, inverse deviation, variance and count.

    The variance is the unbiased one. Running statistics, where there are any, take it and the mean
    up by `share`, and the counter of batches counts this one.
    """
    variance = m2 / tl.where(count > 0, count, 1.0)
    inverse = 1.0 / tl.sqrt((variance + epsilon).to(tl.float32))
    scale = inverse
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = -mean * scale.to(tl.float64)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    tl.store(map_ptr + channel, bias.to(tl.float32), mask=inside)
    tl.store(map_ptr + CHANNELS + channel, scale, mask=inside)
    mean = mean.to(tl.float32)
    unbiased = (m2 / tl.where(count > 1, count - 1, 1.0)).to(tl.float32)
    tl.store(moments_ptr + channel, mean, mask=inside)
    tl.store(moments_ptr + CHANNELS + channel, inverse, mask=inside)
    tl.store(moments_ptr + 2 * CHANNELS + channel, unbiased, mask=inside)
    tl.store(moments_ptr + 3 * CHANNELS + channel, count.to(tl.float32), mask=inside)
    if running_mean_ptr is not None:
        old_mean = tl.load(running_mean_ptr + channel, mask=inside, other=0.0)
        old_var = tl.load(running_var_ptr + channel, mask=inside, other=0.0)
        # Threads that hold the same channel have all read it before one of them writes.
        tl.debug_barrier()
        tl.store(running_mean_ptr + channel, take_up(old_mean, mean, share), mask=inside)
        tl.store(running_var_ptr + channel, take_up(old_var, unbiased, share), mask=inside)
        if tl.program_id(0) == 0:
            batches = tl.load(counter_ptr)
            tl.debug_barrier()
            tl.store(counter_ptr, batches + 1)


@triton.jit(do_not_specialize=["epsilon", "share", "parts"])
def batch_norm(
    map_ptr,
    moments_ptr,
    partial_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    epsilon,
    share,
    parts,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The map `scale y + bias` that BatchNorm makes of `partial [parts, 3, C]`.

    `map [2, C]` is bias and scale; `moments [4, C]` mean, inverse deviation, unbiased variance and
    count. `weight` and `bias [C]` may be None, and so may, together, `running_mean` and
    `running_var [C]`, which are brought up to date, and `counter [1]` int64.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < CHANNELS
    count, total, m2 = merge_parts(partial_ptr, parts, channel, inside, CHANNELS, BLOCK_C, BLOCK_T)
    mean = total / tl.where(count > 0, count, 1.0)
    store_map(
        map_ptr,
        moments_ptr,
        weight_ptr,
        bias_ptr,
        running_mean_ptr,
        running_var_ptr,
        counter_ptr,
        epsilon,
        share,
        count,
        mean,
        m2,
        channel,
        inside,
        CHANNELS,
    )


@triton.jit
def store_gradients(
    out_ptr,
    of_bias,
    of_scale,
    map_ptr,
    moments_ptr,
    channel,
    inside,
    CHANNELS: tl.constexpr,
):
    """The gradients of BatchNorm from those of its map: `out [4, C]`; returns its last two rows.

    Those of its weight and of its bias, then `curve` and `level`: through the mean and the variance
    the map `y` itself gets `curve y + level`. Sums are float64.
    """
    scale = tl.load(map_ptr + CHANNELS + channel, mask=inside, other=0.0).to(tl.float64)
    mean = tl.load(moments_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    inverse = tl.load(moments_ptr + CHANNELS + channel, mask=inside, other=0.0).to(tl.float64)
    count = tl.load(moments_ptr + 3 * CHANNELS + channel, mask=inside, other=1.0).to(tl.float64)
    of_weight = (of_scale - mean * of_bias) * inverse
    curve = -scale * inverse * of_weight / count
    level = -scale * of_bias / count - curve * mean
    tl.store(out_ptr + channel, of_weight.to(tl.float32), mask=inside)
    tl.store(out_ptr + CHANNELS + channel, of_bias.to(tl.float32), mask=inside)
    tl.store(out_ptr + 2 * CHANNELS + channel, curve.to(tl.float32), mask=inside)
    tl.store(out_ptr + 3 * CHANNELS + channel, level.to(tl.float32), mask=inside)
    return curve, level


@triton.jit(do_not_specialize=["parts"])
def batch_norm_backward(
    out_ptr,
    partial_ptr,
    map_ptr,
    moments_ptr,
    parts,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`out [4, C]` of `store_gradients` from `partial [parts, ROWS, C]`.

    Of its rows the first is the gradient of the map's bias, and that at SCALE of its scale.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < CHANNELS
    STRIDE: tl.constexpr = ROWS * CHANNELS
    at = partial_ptr + channel
    of_bias = add_parts(at, parts, STRIDE, inside, BLOCK_T, BLOCK_C)
    of_scale = add_parts(at + SCALE * CHANNELS, parts, STRIDE, inside, BLOCK_T, BLOCK_C)
    store_gradients(out_ptr, of_bias, of_scale, map_ptr, moments_ptr, channel, inside, CHANNELS)


hash_in_order(globals())
