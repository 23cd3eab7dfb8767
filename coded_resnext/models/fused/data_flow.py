"""The algebra of a fused block, forward and backward, on plain tensors: no autograd, no modules.

Every map between two convolutions is kept *raw*, as the convolution wrote it, together with the
map of each channel that BatchNorm makes of its statistics; whatever reads it applies the map.
Gradients of raw maps leave a convolution as `gain grad + curve y + level`: the gain is the scale of
the BatchNorm behind, the others what flows through its statistics. The algebra is told in
docs/fused_block.md; letters as in docs/math.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coded_resnext.kernels.affine import ConvGradients
from coded_resnext.kernels.batch_norm.launch import Normalization
from coded_resnext.kernels.coded import operator as coded
from coded_resnext.kernels.coded.gram import split_weight
from coded_resnext.kernels.conv1x1 import convolution as conv1x1
from coded_resnext.kernels.conv1x1 import library
from coded_resnext.kernels.conv3x3 import convolution as conv3x3
from coded_resnext.kernels.layout import accumulation_dtype, channels_last
from coded_resnext.kernels.recompute import convolution as recompute
from coded_resnext.kernels.recompute.convolution import Moments
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import NO_PASSES, Passes

from .norm import Layer

MaybeAffine = tuple[Tensor | None, Tensor | None]
# Without a map.
NO_MAP: MaybeAffine = (None, None)


def present(value: Tensor | None) -> Tensor:
    """Returns a tensor that is there, which its type does not say."""
    assert value is not None
    return value


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
        scale, bias = map(present, main.affine)
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
                second row of what was not written means nothing: the block that made it takes the
                gradient of its scale from `g`.
        """
        total, row = sums.sum(0), 0
        of_maps = []
        for term in self:
            if not isinstance(term, Term) or term.map is None:
                continue
            row += term.weight is None
            # Of two rows, which are the first and one of the others; all are views of one sum.
            of_maps.append(total[::row][:2] if term.weight is None else total[:1].expand(2, -1))
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
        return Passes.decoded(getattr(self, name) | 8 * self.pointwise)


class Conv(NamedTuple):
    """A convolution of a block, and the BatchNorm behind it."""

    weight: Tensor
    layer: Layer
    cast: Tensor | None = None
    """The weight of a 1x1 convolution in the dtype of the activations, where it is another."""

    @property
    def factor(self) -> Tensor:
        """Returns the weight that is multiplied by."""
        return self.weight if self.cast is None else self.cast


class Convs(NamedTuple):
    """The convolutions of a block."""

    reduce: Conv
    grouped: Conv
    expand: Conv
    skip: Conv | None

    def prepared(self, plan: Plan, dtype: torch.dtype) -> tuple[Convs, Tensor | None]:
        """Returns the convolutions with the 1x1 ones' weights in a dtype, and the 3x3 one's weight
        as its kernels read it; where PyTorch computes it, it casts that weight itself."""
        products = [conv for conv in (self.reduce, self.expand, self.skip) if conv is not None]
        others = [conv.weight for conv in products if conv.weight.dtype != dtype]
        of_grouped = (dtype, plan.stride, plan.passes("grouped"))
        packed, casts = conv3x3.prepared(self.grouped.weight, others, *of_grouped)
        if not casts:
            return self, packed
        pairs = zip(products, casts, strict=True)
        reduce, expand, *skip = (conv._replace(cast=cast) for conv, cast in pairs)
        return Convs(reduce, self.grouped, expand, skip[0] if skip else None), packed


class Made(NamedTuple):
    """What a forward pass makes of a convolution."""

    y: Tensor | None
    """Behind it, raw; None where it is not stored."""
    map: Tensor
    """With `moments` the `Normalization` of its BatchNorm."""
    moments: Tensor
    mean: Tensor | None
    """With `spread` the `Moments` of its input, where it is not stored."""
    spread: Tensor | None
    cast: Tensor | None
    """That of `Conv`."""

    @property
    def normalization(self) -> Normalization:
        """Returns what the BatchNorm made of the statistics."""
        return Normalization(self.map, self.moments)

    def factor_of(self, conv: Conv) -> Tensor:
        """Returns the weight that was multiplied by."""
        return conv._replace(cast=self.cast).factor


class Result(NamedTuple):
    """What a forward pass makes, of which the backward pass reads the most."""

    x: Tensor | None
    """The block's input where it was a `Sum`."""
    signs: Tensor | None
    scaled: Tensor | None
    """`s h` of a coded block."""
    energies: Tensor | None
    inverse: Tensor | None
    form: Tensor | None
    """The forms of the branches' energies, where kernels take these."""
    packed: Tensor | None
    """The weight of the 3x3 convolution as its kernels read it."""
    picked: Tensor | None
    """The pixels of `x` that a projection with a stride takes."""
    reduce: Made
    grouped: Made
    expand: Made
    skip: Made | None

    @property
    def convs(self) -> list[Made]:
        """Returns what was made of the convolutions that there are."""
        four = (self.reduce, self.grouped, self.expand, self.skip)
        return [each for each in four if each is not None]

    def flat(self) -> list[Tensor | None]:
        """Returns the tensors in a row, always as many."""
        absent = (None,) * len(Made._fields)
        return [*self[:_ALONE], *self.reduce, *self.grouped, *self.expand, *(self.skip or absent)]

    @classmethod
    def of(cls, values: Sequence[Tensor | None]) -> Result:
        """Returns the result whose `flat` this is."""
        size = len(Made._fields)
        parts = (values[start : start + size] for start in range(_ALONE, len(values), size))
        # A map is there wherever there is a convolution.
        made: list[Any] = [None if part[1] is None else Made._make(part) for part in parts]
        return cls._make([*values[:_ALONE], *made])

    @classmethod
    def index_of(cls, conv: str, field: str) -> int:
        """Returns where in `flat` a field of a convolution is."""
        before = cls._fields.index(conv) - _ALONE
        return _ALONE + before * len(Made._fields) + Made._fields.index(field)


# Fields of `Result` that are tensors.
_ALONE = 8


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
    convs: Convs,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
) -> Result:
    """Applies a block up to its last BatchNorm's map.

    Args:
        plan: what the block is, and who computes.
        x: `[B, C_in, H, W]`, or what the block before has left to be computed.
        convs: the convolutions, weights in any dtype; products are in that of `x`.
        drop_mask, keep_mask: `[B, N]` in the accumulation dtype, or None.
    """
    convs, packed = convs.prepared(plan, x.dtype if isinstance(x, Tensor) else x.main.x.dtype)
    joined, signs, first = _first(plan, x, convs.reduce)
    y1, of_grouped = present(first.y), plan.passes("grouped")
    y2, partial = conv3x3.forward(
        y1,
        convs.grouped.weight,
        *first.normalization.affine,
        plan.stride,
        convs.grouped.layer.running is None,
        of_grouped,
        packed,
    )
    second = _made(convs.grouped, y2, partial)
    scaled = energies = inverse = form = picked = skip = None
    operand, before = y2, _affine(second.map)
    if plan.coded:
        per_branch = split_weight(convs.expand.weight, plan.branches, concatenate=False)
        scaled, energies, inverse, form = coded.forward(
            y2, per_branch, *second.normalization.affine, drop_mask, keep_mask
        )
        operand, before = scaled, NO_MAP
    last = _ending(plan, "last", operand, before, convs.expand)
    if convs.skip is not None:
        source = x if isinstance(x, Tensor) else present(joined)
        if plan.stride > 1:
            # It is read several times, of which each would copy what a stride picks.
            source = picked = channels_last(source[:, :, :: plan.stride, :: plan.stride])
        skip = _ending(plan, "skip", source, NO_MAP, convs.skip)
    alone = (joined, signs, scaled, energies, inverse, form, packed, picked)
    return Result(*alone, first, second, last, skip)


def _made(
    conv: Conv,
    y: Tensor | None,
    partial: Tensor | None,
    moments: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Made:
    """Returns what was made of a convolution, with its BatchNorm's map."""
    made = conv.factor if y is None else y
    norm = conv.layer.normalization(partial, accumulation_dtype(made.dtype))
    return Made(y, *norm, *moments, conv.cast)


def _first(plan: Plan, x: Tensor | Sum, conv: Conv) -> tuple[Tensor | None, Tensor | None, Made]:
    """Returns the input where it was a sum, its signs, and the first convolution."""
    passes, statistics = plan.passes("first"), conv.layer.running is None
    weight = conv.factor
    joined = signs = None
    if isinstance(x, Tensor):
        y, partial = conv1x1.forward(x, weight, *NO_MAP, statistics, passes)
    else:
        main, residual = x.main, (x.residual.written(), *x.residual.affine)
        scale, bias = map(present, main.affine)
        if main.weight is None:
            joined, y, partial, signs = conv1x1.join(
                main.x, scale, bias, *residual, weight, statistics, bool(plan.signs), passes
            )
        else:
            product = (main.x, *main.affine_before, main.weight, scale, bias)
            joined, signs = recompute.join(*product, *residual, bool(plan.signs), main.passes)
            y, partial = conv1x1.forward(joined, weight, *NO_MAP, statistics, passes)
    return joined, signs, _made(conv, y, partial)


def _ending(plan: Plan, name: str, x: Tensor, before: MaybeAffine, conv: Conv) -> Made:
    """Returns a convolution at the end of a block, with the map `before` it."""
    passes, statistics = plan.passes(name), conv.layer.running is None
    weight = conv.factor
    if not plan.recomputed:
        return _made(conv, *conv1x1.forward(x, weight, *before, statistics, passes))
    if not statistics:
        return _made(conv, None, None)
    if conv.layer.group:
        partial, moments = recompute.statistics(x, *before, weight, passes)
        return _made(conv, None, partial, moments)
    norm, moments = recompute.normalized(x, *before, weight, conv.layer.norm, passes)
    return Made(None, *norm, *moments, conv.cast)


def output_of(plan: Plan, x: Tensor | Sum, convs: Convs, result: Result) -> Sum:
    """Returns a block's output, which is left to be computed."""
    last, skip = result.expand, result.skip
    if last.y is not None:
        main = Term(last.y, last.map)
    else:
        operand = present(result.scaled if plan.coded else result.grouped.y)
        weight = last.factor_of(convs.expand)
        main = Term(operand, last.map, result.grouped.map, weight, plan.passes("last"))
    source = x if isinstance(x, Tensor) else present(result.x)
    if convs.skip is None or skip is None:
        residual = Term(source, None)
    elif skip.y is not None:
        residual = Term(skip.y, skip.map)
    else:
        operand = source if result.picked is None else result.picked
        weight = skip.factor_of(convs.skip)
        residual = Term(operand, skip.map, None, weight, plan.passes("skip"))
    return Sum(main, residual, bool(plan.pointwise))


def backward(
    plan: Plan,
    g: Tensor,
    of_maps: tuple[Tensor, Tensor | None],
    of_energies: Tensor | None,
    x: Tensor | Sum,
    convs: Convs,
    masks: tuple[Tensor | None, Tensor | None],
    result: Result,
    needs: Sequence[bool],
) -> BlockGradients:
    """Returns the gradients of a block.

    Args:
        plan, x, convs, masks, result: of the forward pass.
        g: the gradient of the block's output behind its ReLU.
        of_maps: those of the maps of the output's two terms, as `Sum.gradients` gives them.
        of_energies: those of the energies of a coded block.
        needs: whether the gradients of the input, of the first and of the 3x3 weight are wanted.
    """
    need_input, need_reduce, need_grouped = needs
    reduce, grouped, expand, _ = convs
    first, second = result.reduce, result.grouped
    y2, affine2 = present(second.y), second.normalization.affine
    operand, before = (present(result.scaled), NO_MAP) if plan.coded else (y2, affine2)
    of_last, of_expand_bn = _ending_backward(
        plan, "last", g, of_maps[0], operand, before, expand, result.expand, need_input=True
    )
    dy2, dexpand, sums2 = present(of_last.input), present(of_last.weight), of_last.sums
    if plan.coded:
        energies = present(result.energies)
        per_branch = split_weight(expand.weight, plan.branches, concatenate=False)
        # It is this block's own, and takes up what the energies add to it.
        of_branches = dexpand.view(dexpand.shape[0], plan.branches, -1).transpose(0, 1)
        dy2, sums2 = coded.backward(
            dy2,
            torch.zeros_like(energies) if of_energies is None else of_energies,
            y2,
            per_branch,
            *affine2,
            *masks,
            energies,
            present(result.inverse),
            of_branches,
            result.form,
        )
    of_grouped_bn, curve, level = grouped.layer.backward(present(sums2), second.normalization)
    dy1, sums1, dgrouped = conv3x3.backward(
        dy2,
        None if curve is None else y2,
        curve,
        level,
        present(first.y),
        grouped.weight,
        *first.normalization.affine,
        plan.stride,
        True,
        need_grouped,
        plan.passes("grouped"),
        result.packed,
    )
    of_reduce_bn, curve, level = reduce.layer.backward(present(sums1), first.normalization)
    of_y1 = (present(dy1), None if curve is None else first.y)
    source = x if isinstance(x, Tensor) else present(result.x)
    through_skip, of_skip = _skip_backward(plan, g, of_maps[1], source, convs, result, need_input)
    weight = first.factor_of(reduce)
    dtype, passes = reduce.weight.dtype if need_reduce else None, plan.passes("first")
    maps: tuple[Tensor | None, Tensor | None] = (None, None)
    if isinstance(x, Tensor):
        of_y1_and_means = (*of_y1, None, curve, level)
        of_input, _, dreduce = conv1x1.backward(
            *of_y1_and_means, x, weight, *NO_MAP, need_input, dtype, passes, through_skip
        )
    else:
        of_input, sums, dreduce = conv1x1.join_backward(
            *of_y1,
            curve,
            level,
            through_skip,
            source,
            result.signs,
            *x.factors,
            weight,
            dtype,
            passes,
        )
        maps = x.gradients(present(of_input), present(sums))
    return BlockGradients(
        of_input,
        maps,
        (dreduce, of_reduce_bn.weight, of_reduce_bn.bias),
        (dgrouped, of_grouped_bn.weight, of_grouped_bn.bias),
        (dexpand, *of_expand_bn),
        of_skip,
    )


def _skip_backward(
    plan: Plan,
    g: Tensor,
    of_map: Tensor | None,
    x: Tensor,
    convs: Convs,
    result: Result,
    need_input: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Returns the gradient of the input through the skip connection, and those of its layers."""
    if convs.skip is None or result.skip is None:
        return g, (None, None, None)
    operand = x if result.picked is None else result.picked
    (dx, _, dweight), of_bn = _ending_backward(
        plan,
        "skip",
        g,
        present(of_map),
        operand,
        NO_MAP,
        convs.skip,
        result.skip,
        need_input=need_input,
    )
    if dx is not None and plan.stride > 1:
        whole = torch.zeros_like(x, memory_format=torch.channels_last)
        whole[:, :, :: plan.stride, :: plan.stride] = dx
        dx = whole
    return dx, (dweight, *of_bn)


def _ending_backward(
    plan: Plan,
    name: str,
    g: Tensor,
    of_map: Tensor,
    x: Tensor,
    before: MaybeAffine,
    conv: Conv,
    made: Made,
    *,
    need_input: bool,
) -> tuple[ConvGradients, tuple[Tensor, Tensor]]:
    """Returns the gradients of a convolution at the end of a block, and of its BatchNorm."""
    passes, norm, weight = plan.passes(name), made.normalization, made.factor_of(conv)
    gain, dtype = norm.map[1], conv.weight.dtype
    if made.y is not None:
        of_bn, curve, level = conv.layer.backward(of_map[None], norm)
        y = None if curve is None else made.y
        gradients = conv1x1.backward(
            g, y, gain, curve, level, x, weight, *before, need_input, dtype, passes
        )
        return gradients, (of_bn.weight, of_bn.bias)
    # Sums of maps as they are, of which a projection's are, are cuBLAS's.
    who = passes if name == "last" else NO_PASSES
    of_product = recompute.product_sums(g, x, weight, *before, who)
    both = made.mean is not None and made.spread is not None
    moments = Moments(present(made.mean), present(made.spread)) if both else None
    of_weight = None
    if moments is None or conv.layer.group:
        sums = recompute.map_gradients(of_map[0], of_product, weight, passes)
        of_bn, curve, level = conv.layer.backward(sums, norm)
    else:
        of_bn, of_weight = recompute.norm_gradients(
            of_map[0], of_product, x, weight, moments, norm, dtype, passes
        )
        curve, level = of_bn.curve, of_bn.level
    of_y = (g, gain, curve, level, of_product, moments)
    gradients = recompute.backward(*of_y, x, weight, *before, need_input, dtype, passes, of_weight)
    return gradients, (of_bn.weight, of_bn.bias)
