"""The algebra of a fused block, forward and backward, on plain tensors: no autograd, no modules.

Every map between two convolutions is kept *raw*, as the convolution wrote it, together with the
map of each channel that BatchNorm makes of its statistics; whatever reads it applies the map.
Gradients of raw maps leave a convolution as `gain grad + curve y + level`: the gain is the scale of
the BatchNorm behind, the others what flows through its statistics. The algebra is told in
docs/fused_block.md; letters as in docs/math.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coded_resnext.kernels.affine import ConvGradients
from coded_resnext.kernels.batch_norm.launch import Normalization
from coded_resnext.kernels.coded import operator as coded
from coded_resnext.kernels.coded.gram import split_weight
from coded_resnext.kernels.conv1x1 import convolution as conv1x1
from coded_resnext.kernels.conv1x1 import library
from coded_resnext.kernels.conv3x3 import operator as conv3x3
from coded_resnext.kernels.layout import accumulation_dtype, channels_last
from coded_resnext.kernels.recompute import convolution as recompute
from coded_resnext.kernels.recompute.convolution import Moments
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import NO_PASSES, Passes

from .norm import Layer

MaybeAffine = tuple[Tensor | None, Tensor | None]
# Without a map.
NO_MAP: MaybeAffine = (None, None)


def _affine(map_: Tensor | None) -> MaybeAffine:
    """Returns scale and bias of a map `[2, C]`."""
    return NO_MAP if map_ is None else (map_[1], map_[0])


class Term(NamedTuple):
    """A term of the sum that ends a block: `scale W relu(before x) + bias`, or `scale x + bias`."""

    x: Tensor
    """`[B, I, H, W]`: what the term is made of; without a weight the raw map `[B, C, H, W]`."""
    map: Tensor | None
    """`[2, C]`, bias and scale of the BatchNorm behind; None for `x` itself."""
    before: Tensor | None = None
    """`[2, I]`, bias and scale of the BatchNorm before the product, where there is one."""
    weight: Tensor | None = None
    """`[C, I, 1, 1]` of a convolution that is computed where the term is read; None for a map that
    was written."""
    passes: Passes = NO_PASSES
    """Who computes that convolution."""

    @property
    def affine(self) -> MaybeAffine:
        """Returns scale and bias."""
        return _affine(self.map)

    @property
    def affine_before(self) -> MaybeAffine:
        """Returns scale and bias of the map before the product."""
        return _affine(self.before)

    def written(self) -> Tensor:
        """Returns the raw map of a residual, computed where it was not stored."""
        return self.x if self.weight is None else library.forward(self.x, self.weight)


class Sum(NamedTuple):
    """The output of a block, `x = relu(main + residual)`, not yet computed.

    Whatever reads it applies the maps while loading, and writes `x` once.
    """

    main: Term
    residual: Term
    pointwise: bool
    """Says whether Triton kernels compute what no convolution does on its way."""

    def ready(self) -> Tensor:
        """Computes `x [B, C, H, W]`."""
        residual = (self.residual.written(), *self.residual.affine)
        main = self.main
        scale, bias = main.affine
        assert scale is not None
        assert bias is not None
        if main.weight is None:
            return residual_launch.forward(main.x, scale, bias, *residual, self.pointwise)
        product = (main.x, *main.affine_before, main.weight, scale, bias)
        return recompute.join(*product, *residual, False, main.passes)[0]

    def gradients(self, g: Tensor, sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of the two terms' maps, `[2, C]` each: of bias and scale.

        Args:
            g: the gradient behind the ReLU.
            sums: its sums in parts, `[parts, 1 to 3, C]`: of `g`, of `g` times the main term's raw
                map, of `g` times the residual's, where these were written and are mapped. The
                gradient of the scale of what was not written is left 0 here: the block that made
                it takes it from `g`.
        """
        total = list(sums.sum(0))
        of_bias, rest = total[0], total[1:]
        of_maps = []
        for term in self:
            if not isinstance(term, Term) or term.map is None:
                continue
            of_scale = rest.pop(0) if term.weight is None else torch.zeros_like(of_bias)
            of_maps.append(torch.stack([of_bias, of_scale]))
        return of_maps[0], of_maps[1] if len(of_maps) == 2 else None

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the raw maps whose products with `g` are summed for `gradients`."""
        written = self.main.x if self.main.weight is None else None
        mapped = self.residual.map is not None and self.residual.weight is None
        return written, self.residual.x if mapped else None

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns `g` and the gradients of `gradients`, from that of `x` as `ready` gave it."""
        g, sums = residual_launch.backward(grad, x, *self.factors, self.pointwise)
        return g, *self.gradients(g, sums)


class Plan(NamedTuple):
    """What a block's algebra depends on beside tensors; integers, as PyTorch's operators take."""

    branches: int
    """Groups of the 3x3 convolution."""
    stride: int
    """Of the 3x3 convolution and of the projection."""
    coded: int
    """Whether branches are normalised by their energies."""
    recomputed: int
    """Whether the last convolution, and that of the projection, are not stored."""
    signs: int
    """Whether signs of the input's sum are kept."""
    first: int
    """Encoded `Passes` of the first 1x1 convolution, and so on."""
    grouped: int
    last: int
    skip: int
    pointwise: int

    def passes(self, name: str) -> Passes:
        """Returns the passes of a convolution by the name of its field."""
        return Passes.decoded(getattr(self, name))._replace(pointwise=bool(self.pointwise))


class Weights(NamedTuple):
    """The weights of a block's convolutions."""

    reduce: Tensor
    grouped: Tensor
    expand: Tensor
    skip: Tensor | None

    def to(self, dtype: torch.dtype) -> Weights:
        """Returns them in another dtype, contiguous."""
        reduce, grouped, expand, skip = (
            None if each is None else each.to(dtype, memory_format=torch.contiguous_format)
            for each in self
        )
        assert reduce is not None
        assert grouped is not None
        assert expand is not None
        return Weights(reduce, grouped, expand, skip)


class Layers(NamedTuple):
    """The BatchNorms of a block."""

    reduce: Layer
    grouped: Layer
    expand: Layer
    skip: Layer | None


class Result(NamedTuple):
    """What a forward pass makes, of which the backward pass reads the most."""

    x: Tensor | None
    """The block's input where it was a `Sum`."""
    signs: Tensor | None
    y1: Tensor
    map1: Tensor
    moments1: Tensor
    y2: Tensor
    map2: Tensor
    moments2: Tensor
    scaled: Tensor | None
    """`s h` of a coded block."""
    energies: Tensor | None
    inverse: Tensor | None
    y3: Tensor | None
    """Behind the last convolution, where it is written."""
    map3: Tensor
    moments3: Tensor
    mean: Tensor | None
    """`Moments` of `h` where it is not."""
    spread: Tensor | None
    reduce: Tensor | None
    """The weight in the dtype of the activations, where it is another; so are the other three."""
    grouped: Tensor | None
    expand: Tensor | None
    picked: Tensor | None
    """The pixels of `x` that a projection with a stride takes."""
    skip_y: Tensor | None
    skip_map: Tensor | None
    skip_moments: Tensor | None
    skip_mean: Tensor | None
    skip_spread: Tensor | None
    skip: Tensor | None

    def weights(self, own: Weights) -> Weights:
        """Returns the weights in the dtype of the activations, given the block's own."""
        return Weights(
            own.reduce if self.reduce is None else self.reduce,
            own.grouped if self.grouped is None else self.grouped,
            own.expand if self.expand is None else self.expand,
            own.skip if self.skip is None else self.skip,
        )

    @property
    def norms(self) -> tuple[Normalization, Normalization, Normalization]:
        """Returns what the three BatchNorms made of their statistics."""
        return (
            Normalization(self.map1, self.moments1),
            Normalization(self.map2, self.moments2),
            Normalization(self.map3, self.moments3),
        )


class BlockGradients(NamedTuple):
    """The gradients of a block."""

    x: Tensor | None
    """Of its input; where that was a `Sum`, the gradient behind its ReLU."""
    maps: tuple[Tensor | None, Tensor | None]
    """Of the maps of the input's two terms, where it was a `Sum`."""
    reduce: tuple[Tensor | None, Tensor, Tensor]
    """Of the weights of the first convolution and of its BatchNorm, and of the BatchNorm's bias."""
    grouped: tuple[Tensor | None, Tensor, Tensor]
    expand: tuple[Tensor, Tensor, Tensor]
    skip: tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(
    plan: Plan,
    x: Tensor | Sum,
    weights: Weights,
    layers: Layers,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
) -> Result:
    """Applies a block up to its last BatchNorm's map.

    Args:
        plan: what the block is, and who computes.
        x: `[B, C_in, H, W]`, or what the block before has left to be computed.
        weights: in any dtype; products are in that of `x`.
        layers: the BatchNorms.
        drop_mask, keep_mask: `[B, N]` in the accumulation dtype, or None.
    """
    like = x if isinstance(x, Tensor) else x.main.x
    wide = accumulation_dtype(like.dtype)
    cast = weights.to(like.dtype)
    joined, signs, y1, partial = _first(plan, x, cast.reduce, layers.reduce)
    norm1 = layers.reduce.normalization(partial, wide)
    y2, partial = conv3x3.forward(
        y1,
        cast.grouped,
        *norm1.affine,
        plan.stride,
        layers.grouped.running is None,
        plan.passes("grouped"),
    )
    norm2 = layers.grouped.normalization(partial, wide)
    scaled = energies = inverse = None
    operand, before = y2, _affine(norm2.map)
    if plan.coded:
        per_branch = split_weight(weights.expand, plan.branches, concatenate=False)
        scaled, energies, inverse = coded.forward(
            y2, per_branch, *norm2.affine, drop_mask, keep_mask
        )
        operand, before = scaled, NO_MAP
    last = _ending(plan, "last", operand, before, cast.expand, layers.expand)
    picked, skip = None, _Ending(None, None, None, None, None)
    if cast.skip is not None and layers.skip is not None:
        source = x if isinstance(x, Tensor) else joined
        assert source is not None
        if plan.stride > 1:
            # It is read several times, of which each would copy what a stride picks.
            source = picked = channels_last(source[:, :, :: plan.stride, :: plan.stride])
        skip = _ending(plan, "skip", source, NO_MAP, cast.skip, layers.skip)
    assert last.map is not None
    assert last.moments is not None
    return Result(
        x=joined,
        signs=signs,
        y1=y1,
        map1=norm1.map,
        moments1=norm1.moments,
        y2=y2,
        map2=norm2.map,
        moments2=norm2.moments,
        scaled=scaled,
        energies=energies,
        inverse=inverse,
        y3=last.y,
        map3=last.map,
        moments3=last.moments,
        mean=last.mean,
        spread=last.spread,
        reduce=None if cast.reduce is weights.reduce else cast.reduce,
        grouped=None if cast.grouped is weights.grouped else cast.grouped,
        expand=None if cast.expand is weights.expand else cast.expand,
        picked=picked,
        skip_y=skip.y,
        skip_map=skip.map,
        skip_moments=skip.moments,
        skip_mean=skip.mean,
        skip_spread=skip.spread,
        skip=None if cast.skip is weights.skip else cast.skip,
    )


def _first(
    plan: Plan, x: Tensor | Sum, weight: Tensor, layer: Layer
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Returns the input where it was a sum, its signs, the first convolution and its statistics."""
    passes, statistics = plan.passes("first"), layer.running is None
    if isinstance(x, Tensor):
        return None, None, *conv1x1.forward(x, weight, *NO_MAP, statistics, passes)
    main, residual = x.main, (x.residual.written(), *x.residual.affine)
    scale, bias = main.affine
    assert scale is not None
    assert bias is not None
    if main.weight is None:
        joined, y1, partial, signs = conv1x1.join(
            main.x, scale, bias, *residual, weight, statistics, bool(plan.signs), passes
        )
        return joined, signs, y1, partial
    product = (main.x, *main.affine_before, main.weight, scale, bias)
    joined, signs = recompute.join(*product, *residual, bool(plan.signs), main.passes)
    return joined, signs, *conv1x1.forward(joined, weight, *NO_MAP, statistics, passes)


class _Ending(NamedTuple):
    """A convolution at the end of a block, if there is one, and the BatchNorm behind it."""

    y: Tensor | None
    """None where it is not stored."""
    map: Tensor | None
    moments: Tensor | None
    mean: Tensor | None
    """With `spread` its `Moments`, None where it is stored."""
    spread: Tensor | None


def _ending(
    plan: Plan, name: str, x: Tensor, before: MaybeAffine, weight: Tensor, layer: Layer
) -> _Ending:
    """Returns a convolution at the end of a block, with the map `before` it."""
    passes, statistics = plan.passes(name), layer.running is None
    y = partial = None
    moments: tuple[Tensor | None, Tensor | None] = (None, None)
    if not plan.recomputed:
        y, partial = conv1x1.forward(x, weight, *before, statistics, passes)
    elif statistics:
        partial, moments = recompute.statistics(x, *before, weight, passes)
    made = layer.normalization(partial, accumulation_dtype(x.dtype))
    return _Ending(y, made.map, made.moments, *moments)


def output_of(plan: Plan, x: Tensor | Sum, weights: Weights, result: Result) -> Sum:
    """Returns a block's output, which is left to be computed."""
    cast = result.weights(weights)
    operand = result.scaled if plan.coded else result.y2
    if result.y3 is not None:
        main = Term(result.y3, result.map3)
    else:
        assert operand is not None
        main = Term(operand, result.map3, result.map2, cast.expand, plan.passes("last"))
    source = x if isinstance(x, Tensor) else result.x
    assert source is not None
    if weights.skip is None:
        return Sum(main, Term(source, None), bool(plan.pointwise))
    if result.skip_y is not None:
        residual = Term(result.skip_y, result.skip_map)
    else:
        operand = source if result.picked is None else result.picked
        residual = Term(operand, result.skip_map, None, cast.skip, plan.passes("skip"))
    return Sum(main, residual, bool(plan.pointwise))


def backward(
    plan: Plan,
    g: Tensor,
    of_maps: tuple[Tensor, Tensor | None],
    of_energies: Tensor | None,
    x: Tensor | Sum,
    weights: Weights,
    layers: Layers,
    masks: tuple[Tensor | None, Tensor | None],
    result: Result,
    needs: Sequence[bool],
) -> BlockGradients:
    """Returns the gradients of a block.

    Args:
        plan, x, weights, layers, masks, result: of the forward pass.
        g: the gradient of the block's output behind its ReLU.
        of_maps: those of the maps of the output's two terms, as `Sum.gradients` gives them.
        of_energies: those of the energies of a coded block.
        needs: whether the gradients of the input, of the first and of the 3x3 weight are wanted.
    """
    need_input, need_reduce, need_grouped = needs
    cast = result.weights(weights)
    norm1, norm2, norm3 = result.norms
    expand = weights.expand
    if plan.coded:
        assert result.scaled is not None
        assert result.energies is not None
        assert result.inverse is not None
        (of_scaled, _, dexpand), dexpand_bn = _last_backward(
            plan,
            "last",
            g,
            of_maps[0],
            result.scaled,
            NO_MAP,
            cast.expand,
            expand.dtype,
            layers.expand,
            result.y3,
            norm3,
            result.mean,
            result.spread,
            need_input=True,
        )
        assert of_scaled is not None
        assert dexpand is not None
        per_branch = split_weight(expand, plan.branches, concatenate=False)
        if of_energies is None:
            of_energies = torch.zeros_like(result.energies)
        saved = (result.y2, per_branch, *norm2.affine, *masks, result.energies, result.inverse)
        dy2, dbranches, sums2 = coded.backward(of_scaled, of_energies, *saved)
        dexpand = dexpand + dbranches.transpose(0, 1).reshape(expand.shape)
    else:
        (dy2_, sums2, dexpand), dexpand_bn = _last_backward(
            plan,
            "last",
            g,
            of_maps[0],
            result.y2,
            _affine(result.map2),
            cast.expand,
            expand.dtype,
            layers.expand,
            result.y3,
            norm3,
            result.mean,
            result.spread,
            need_input=True,
        )
        assert dy2_ is not None
        dy2 = dy2_
    assert dexpand is not None
    assert sums2 is not None
    dgrouped_bn, curve, level = layers.grouped.backward(sums2, norm2)
    dy1, sums1, dgrouped = conv3x3.backward(
        dy2,
        None if curve is None else result.y2,
        curve,
        level,
        result.y1,
        cast.grouped,
        *norm1.affine,
        plan.stride,
        True,
        weights.grouped.dtype if need_grouped else None,
        plan.passes("grouped"),
    )
    assert dy1 is not None
    assert sums1 is not None
    dreduce_bn, curve, level = layers.reduce.backward(sums1, norm1)
    of_y1 = (dy1, None if curve is None else result.y1, curve, level)
    source = x if isinstance(x, Tensor) else result.x
    assert source is not None
    through_skip, dskip = _skip_backward(
        plan, g, of_maps[1], source, cast.skip, weights, layers, result, need_input
    )
    reduce_dtype = weights.reduce.dtype if need_reduce else None
    of_input: tuple[Tensor | None, tuple[Tensor | None, Tensor | None]] = (None, (None, None))
    if isinstance(x, Tensor):
        dx, _, dreduce = conv1x1.backward(
            *of_y1[:2],
            None,
            *of_y1[2:],
            x,
            cast.reduce,
            *NO_MAP,
            need_input,
            reduce_dtype,
            plan.passes("first"),
            through_skip,
        )
        of_input = (dx, (None, None))
    else:
        before, sums, dreduce = conv1x1.join_backward(
            *of_y1,
            through_skip,
            source,
            result.signs,
            *x.factors,
            cast.reduce,
            reduce_dtype,
            plan.passes("first"),
        )
        assert before is not None
        assert sums is not None
        of_input = (before, x.gradients(before, sums))
    return BlockGradients(
        of_input[0],
        of_input[1],
        (dreduce, dreduce_bn.weight, dreduce_bn.bias),
        (dgrouped, dgrouped_bn.weight, dgrouped_bn.bias),
        (dexpand, *dexpand_bn),
        dskip,
    )


def _skip_backward(
    plan: Plan,
    g: Tensor,
    of_map: Tensor | None,
    x: Tensor,
    cast: Tensor | None,
    weights: Weights,
    layers: Layers,
    result: Result,
    need_input: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Returns the gradient of the input through the skip connection, and those of its layers."""
    if weights.skip is None or layers.skip is None or cast is None or of_map is None:
        return g, (None, None, None)
    assert result.skip_map is not None
    assert result.skip_moments is not None
    operand = x if result.picked is None else result.picked
    normalization = Normalization(result.skip_map, result.skip_moments)
    (dx, _, dweight), dlayer = _last_backward(
        plan,
        "skip",
        g,
        of_map,
        operand,
        NO_MAP,
        cast,
        weights.skip.dtype,
        layers.skip,
        result.skip_y,
        normalization,
        result.skip_mean,
        result.skip_spread,
        need_input=need_input,
    )
    assert dweight is not None
    if dx is not None and plan.stride > 1:
        whole = torch.zeros_like(x, memory_format=torch.channels_last)
        whole[:, :, :: plan.stride, :: plan.stride] = dx
        dx = whole
    return dx, (dweight, *dlayer)


def _last_backward(
    plan: Plan,
    name: str,
    g: Tensor,
    of_map: Tensor,
    x: Tensor,
    before: MaybeAffine,
    weight: Tensor,
    weight_dtype: torch.dtype,
    layer: Layer,
    y: Tensor | None,
    normalization: Normalization,
    mean: Tensor | None,
    spread: Tensor | None,
    *,
    need_input: bool,
) -> tuple[ConvGradients, tuple[Tensor, Tensor]]:
    """Returns the gradients of a convolution at the end of a block, and of its BatchNorm."""
    passes = plan.passes(name)
    gain = normalization.map[1]
    if y is not None:
        dlayer, curve, level = layer.backward(of_map[None], normalization)
        of_conv = conv1x1.backward(
            g,
            None if curve is None else y,
            gain,
            curve,
            level,
            x,
            weight,
            *before,
            need_input,
            weight_dtype,
            passes,
        )
        return of_conv, (dlayer.weight, dlayer.bias)
    # Sums of maps as they are, of which a projection's are, are cuBLAS's.
    who = passes if name == "last" else NO_PASSES
    of_product = recompute.product_sums(g, x, weight, *before, who)
    of_scale = recompute.scale_gradient(of_product, weight)
    sums = torch.stack([of_map[0], of_scale.to(of_map.dtype)])[None]
    dlayer, curve, level = layer.backward(sums, normalization)
    moments = None if mean is None or spread is None else Moments(mean, spread)
    of_conv = recompute.backward(
        g,
        gain,
        curve,
        level,
        of_product,
        moments,
        x,
        weight,
        *before,
        need_input,
        weight_dtype,
        passes,
    )
    return of_conv, (dlayer.weight, dlayer.bias)
