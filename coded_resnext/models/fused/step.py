"""A fused block as one node of autograd, and its output as another one.

Called as it is, a node is an `autograd.Function`; within a graph that `torch.compile` captures it
is a registered operator. Both run models/fused/data_flow.py, and so do the operators' fakes, in
which no kernel is launched.

A block hands over a sum that the next one computes (`data_flow.Sum`). Autograd sees of it a
*handle* without memory, which stands for the sum before its ReLU, and the maps of its terms: the
gradient of the handle is that behind the ReLU, those of the maps are sums that come with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coded_resnext.kernels.batch_norm.launch import Running
from coded_resnext.kernels.checks import refuse_derivative
from coded_resnext.kernels.replay import Replayed
from coded_resnext.kernels.rows import Passes, without_launches

from . import data_flow
from .data_flow import Conv, Convs, Plan, Result, Sum, Term
from .norm import Layer

Tensors = list[Tensor]
Masks = tuple[Tensor | None, Tensor | None]


class Call(NamedTuple):
    """The arguments of a node, as an operator of PyTorch takes them."""

    inputs: Tensors
    """With gradients."""
    constants: Tensors
    settings: Sequence[int]
    numbers: Sequence[float]
    group: str
    """Name of a group of processes, or nothing."""

    @property
    def tensors(self) -> Tensors:
        """Returns the tensors in a row."""
        return [*self.inputs, *self.constants]

    @property
    def form(self) -> tuple[Any, ...]:
        """Returns what is no tensor: how many there are of each kind, and the settings."""
        counts = (len(self.inputs), len(self.constants))
        return (*counts, tuple(self.settings), tuple(self.numbers), self.group)

    @classmethod
    def of(cls, tensors: Sequence[Any], form: tuple[Any, ...]) -> tuple[Call, list[Any]]:
        """Returns the call of a form whose tensors come first, and the tensors behind them."""
        inputs, constants, *rest = form
        end = inputs + constants
        return cls(list(tensors[:inputs]), list(tensors[inputs:end]), *rest), list(tensors[end:])


class Underivable(torch.autograd.Function):
    """Hands gradients on, whose own derivatives are refused when somebody asks for them."""

    @staticmethod
    def forward(ctx: Any, asked: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        refuse_derivative()


MaybeTensors = list[Tensor | None]
Forward = Callable[..., MaybeTensors]
Backward = Callable[[MaybeTensors, MaybeTensors, Sequence[bool], Call], MaybeTensors]


def _filled(values: MaybeTensors, like: Tensor) -> Tensors:
    """Returns a list with tensors without elements instead of None, as operators want it."""
    return [like.new_empty(0) if each is None else each for each in values]


def _emptied(values: Sequence[Tensor | None]) -> MaybeTensors:
    return [None if each is None or each.numel() == 0 else each for each in values]


def _or_zeros(grad: Tensor | None, output: Tensor | None) -> Tensor | None:
    """Returns the gradient of an output, zeros where nobody has used it."""
    return output.new_zeros(output.shape) if grad is None and output is not None else grad


def node(
    name: str, forward: Forward, backward: Backward, differentiable: Sequence[int]
) -> Callable[..., MaybeTensors]:
    """Makes a node of autograd.

    Args:
        name: of the operator in `coded_resnext::`; that of its gradients ends in `_backward`.
        forward: returns the outputs of a call. Beside it, where no graph is captured, it is given
            the running statistics that it brings up to date.
        backward: returns the gradients of all inputs, given those of the differentiable outputs,
            all outputs, and which gradients are wanted.
        differentiable: indices of the outputs with gradients.
    """

    @Replayed
    def outputs_of(tensors: Sequence[Any], settings: Any) -> MaybeTensors:
        form, shares = settings
        call, running = Call.of(tensors, form)
        own = iter(running)
        tracked = [share and Running(next(own), next(own), next(own), *share) for share in shares]
        return forward(call, tracked)

    @Replayed
    def gradients_of(tensors: Sequence[Any], settings: Any) -> MaybeTensors:
        form, wanted = settings
        call, others = Call.of(tensors, form)
        count = len(differentiable)
        return backward(others[:count], others[count:], wanted, call)

    @torch.library.custom_op(f"coded_resnext::{name}", mutates_args=())
    def operator(
        inputs: list[Tensor],
        constants: list[Tensor],
        settings: list[int],
        numbers: list[float],
        group: str,
    ) -> list[Tensor]:
        call = Call(inputs, constants, settings, numbers, group)
        return _filled(outputs_of(call.tensors, (call.form, ())), inputs[0])

    @torch.library.custom_op(f"coded_resnext::{name}_backward", mutates_args=())
    def operator_backward(
        grads: list[Tensor],
        outputs: list[Tensor],
        wanted: list[bool],
        inputs: list[Tensor],
        constants: list[Tensor],
        settings: list[int],
        numbers: list[float],
        group: str,
    ) -> list[Tensor]:
        call = Call(inputs, constants, settings, numbers, group)
        given = (*call.tensors, *_emptied(grads), *_emptied(outputs))
        gradients = gradients_of(given, (call.form, tuple(wanted)))
        # Vectors and maps are rows of one tensor, and results of an operator share none.
        filled = _filled(gradients, grads[0])
        return [each.clone() if each.ndim <= 2 else each for each in filled]

    def fake(*arguments: Any) -> Tensors:
        call = Call(*arguments)
        with without_launches():
            return _filled(forward(call), call.inputs[0])

    def fake_backward(grads: Tensors, outputs: Tensors, wanted: list[bool], *rest: Any) -> Tensors:
        with without_launches():
            gradients = backward(_emptied(grads), _emptied(outputs), wanted, Call(*rest))
            return [each.clone() for each in _filled(gradients, grads[0])]

    def save(ctx: Any, call: Call, outputs: Sequence[Tensor | None]) -> None:
        ctx.form = call.form
        ctx.save_for_backward(*call.tensors, *outputs)
        ctx.mark_non_differentiable(
            *(
                each
                for index, each in enumerate(outputs)
                if each is not None and (index not in differentiable or each.numel() == 0)
            )
        )

    def gradients(
        ctx: Any, grads: Sequence[Tensor | None], wanted: Sequence[bool], run: Backward
    ) -> MaybeTensors:
        # Checkpointing without reentrance gives every saved tensor once.
        call, outputs = Call.of(ctx.saved_tensors, ctx.form)
        of_outputs = [_or_zeros(grads[index], outputs[index]) for index in differentiable]
        of_inputs = run(of_outputs, outputs, wanted, call)
        return [each if want else None for each, want in zip(of_inputs, wanted, strict=True)]

    def of_operator(ctx: Any, grads: Tensors) -> Any:
        def run(
            grads: MaybeTensors, outputs: MaybeTensors, wanted: Sequence[bool], call: Call
        ) -> MaybeTensors:
            return _emptied(operator_backward(grads, outputs, list(wanted), *call))

        of_inputs = gradients(ctx, grads, ctx.needs_input_grad[0], run)
        _, constants, _, numbers, _ = ctx.form
        # PyTorch takes an empty list for one of tensors.
        nothing: list[None] | None = None if numbers else []
        return of_inputs, [None] * constants, None, nothing, None

    def save_operator(ctx: Any, inputs: Any, output: Tensors) -> None:
        save(ctx, Call(*inputs), output)

    operator.register_fake(fake)
    operator_backward.register_fake(fake_backward)
    operator_backward.register_autograd(refuse_derivative)
    operator.register_autograd(of_operator, setup_context=save_operator)

    class Eager(torch.autograd.Function):
        """The node without the cost of a registered operator."""

        @staticmethod
        def forward(ctx: Any, settings: Any, *tensors: Tensor) -> tuple[Tensor | None, ...]:
            outputs = outputs_of(tensors, settings)
            save(ctx, Call.of(tensors, settings[0])[0], outputs)
            ctx.count = len(tensors)
            ctx.set_materialize_grads(False)
            return tuple(outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            def run(
                grads: MaybeTensors, outputs: MaybeTensors, wanted: Sequence[bool], call: Call
            ) -> MaybeTensors:
                return gradients_of((*call.tensors, *grads, *outputs), (ctx.form, wanted))

            inputs = ctx.form[0]
            with torch.no_grad():
                of_inputs = gradients(ctx, grads, ctx.needs_input_grad[1 : 1 + inputs], run)
            if torch.is_grad_enabled():
                of_inputs = Underivable.apply(torch.ones((), requires_grad=True), *of_inputs)
            return None, *of_inputs, *([None] * (ctx.count - inputs))

    def apply(call: Call, tracked: Sequence[Running | None] = ()) -> MaybeTensors:
        if torch.compiler.is_compiling():
            return _emptied(operator(*call))
        running = [each for own in tracked if own is not None for each in own[:3]]
        settings = (call.form, tuple(own and own[3:] for own in tracked))
        return list(Eager.apply(settings, *call.tensors, *running))

    return apply


class Deferred(NamedTuple):
    """The output of a block that the next one computes on its way."""

    handle: Tensor
    """`[B, C, H, W]` without memory, for autograd."""
    sum: Sum
    """What it is the sum of."""


Map = Tensor | Deferred
# Numbers in the form of a block's input.
_FORM = 7


def _taken_apart(x: Map) -> tuple[Tensors, Tensors, list[int]]:
    """Returns the tensors of a block's input, with gradients and without, and its form."""
    if isinstance(x, Tensor):
        return [x], [], [0] * _FORM
    main, residual = x.sum.main, x.sum.residual
    assert main.map is not None
    inputs = [x.handle, main.map, *([] if residual.map is None else [residual.map])]
    tensors = (main.x, main.before, main.weight, residual.x, residual.weight)
    form = [
        1,
        main.before is not None,
        main.weight is not None,
        residual.map is not None,
        residual.weight is not None,
        x.sum.pointwise,
        main.passes.encoded(),
    ]
    constants = [each.detach() for each in tensors if each is not None]
    return inputs, constants, [int(each) for each in form]


def _put_together(
    inputs: Iterator[Tensor], constants: Iterator[Tensor], form: Sequence[int]
) -> Tensor | Sum:
    """Returns a block's input, a sum without its handle."""
    first = next(inputs)
    is_sum, before, product, mapped, residual_product, pointwise, passes = form
    if not is_sum:
        return first

    def constant(there: int) -> Tensor | None:
        return next(constants) if there else None

    main = Term(
        next(constants), next(inputs), constant(before), constant(product), Passes.decoded(passes)
    )
    residual = Term(next(constants), next(inputs) if mapped else None)
    residual = residual._replace(weight=constant(residual_product))
    return Sum(main, residual, bool(pointwise))


def block_call(plan: Plan, x: Map, convs: Convs, masks: Masks) -> Call:
    """Returns the arguments of a block's node; those of `data_flow.forward`."""
    inputs, constants, form = _taken_apart(x)
    settings = [*map(int, plan), *form]
    present = [conv for conv in convs if conv is not None]
    for conv in present:
        layer = conv.layer
        inputs += [conv.weight, *(each for each in (layer.weight, layer.bias) if each is not None)]
        constants += layer.running or ()
        there = (layer.weight, layer.bias, layer.running)
        settings += [int(each is not None) for each in there]
    constants += [mask for mask in masks if mask is not None]
    settings += [int(mask is not None) for mask in masks]
    return Call(
        inputs,
        constants,
        tuple(settings),
        tuple(conv.layer.epsilon for conv in present),
        max(conv.layer.group for conv in present),
    )


def _parsed(
    call: Call, tracked: Sequence[Running | None] = ()
) -> tuple[Plan, Tensor | Sum, Convs, Masks]:
    """Returns what `block_call` was given, the input without its handle.

    The layers are those of running statistics that kernels bring up to date.
    """
    settings, inputs, constants = iter(call.settings), iter(call.inputs), iter(call.constants)
    plan = Plan(*(next(settings) for _ in Plan._fields))
    x = _put_together(inputs, constants, [next(settings) for _ in range(_FORM)])
    convs: list[Conv] = []
    for epsilon, own in zip(call.numbers, tracked or repeat(None), strict=False):
        of_conv = next(inputs)
        weight, bias = (next(inputs) if next(settings) else None for _ in range(2))
        running = (next(constants), next(constants)) if next(settings) else None
        group = "" if running else call.group
        layer = Layer(weight, bias, running, epsilon, group, bool(plan.pointwise), own)
        convs.append(Conv(of_conv, layer))
    masks = tuple(next(constants) if next(settings) else None for _ in range(2))
    skip = convs[3] if len(convs) == 4 else None
    return plan, x, Convs(convs[0], convs[1], convs[2], skip), (masks[0], masks[1])


# Of a block's outputs the handle, and behind it those of `Result` that have gradients.
_DIFFERENTIABLE = [0, 1 + Result.index_of("expand", "map"), 1 + Result.index_of("skip", "map")]
_DIFFERENTIABLE += [1 + Result._fields.index("energies")]


def _block_forward(call: Call, tracked: Sequence[Running | None] = ()) -> MaybeTensors:
    """Returns the handle of a block's output, and its `Result`."""
    plan, x, convs, masks = _parsed(call, tracked)
    like = x if isinstance(x, Tensor) else x.main.x
    with torch.autocast(like.device.type, enabled=False):
        result = data_flow.forward(plan, x, convs, *masks)
    batch, _, height, width = data_flow.present(result.grouped.y).shape
    # Nobody reads it: it stands for what has not been computed.
    handle = like.new_empty(()).expand(batch, convs.expand.weight.shape[0], height, width)
    return [handle, *result.flat()]


def _block_backward(
    grads: MaybeTensors, outputs: MaybeTensors, wanted: Sequence[bool], call: Call
) -> MaybeTensors:
    """Returns the gradients of a block's inputs."""
    plan, x, convs, masks = _parsed(call)
    g, of_main, of_skip, of_energies = grads
    assert g is not None
    assert of_main is not None
    own = 1 if isinstance(x, Tensor) else 2 + (x.residual.map is not None)
    layer = convs.reduce.layer
    of_grouped = own + 1 + sum(each is not None for each in (layer.weight, layer.bias))
    needs = (any(wanted[:own]), wanted[own], wanted[of_grouped])
    result = Result.of(outputs[1:])
    with torch.autocast(g.device.type, enabled=False):
        gradients = data_flow.backward(
            plan, g, (of_main, of_skip), of_energies, x, convs, masks, result, needs
        )
    of_inputs = [gradients.x, *gradients.maps][:own]
    of_convs = (gradients.reduce, gradients.grouped, gradients.expand, gradients.skip)
    for conv, (of_weight, *of_layer) in zip(convs, of_convs, strict=True):
        if conv is not None:
            of_inputs.append(of_weight)
            for each, value in zip((conv.layer.weight, conv.layer.bias), of_layer, strict=True):
                if each is not None:
                    of_inputs.append(None if value is None else value.to(each.dtype))
    return of_inputs


def _sum_of(call: Call) -> Sum:
    value = _put_together(iter(call.inputs), iter(call.constants), call.settings)
    assert isinstance(value, Sum)
    return value


def _sum_forward(call: Call, _: Sequence[Running | None] = ()) -> MaybeTensors:
    return [_sum_of(call).ready()]


def _sum_backward(
    grads: MaybeTensors, outputs: MaybeTensors, wanted: Sequence[bool], call: Call
) -> MaybeTensors:
    grad, x = map(data_flow.present, (grads[0], outputs[0]))
    with torch.autocast(grad.device.type, enabled=False):
        gradients = _sum_of(call).backward(grad, x)
    return [each for each in gradients if each is not None]


fused_block = node("fused_block", _block_forward, _block_backward, _DIFFERENTIABLE)
fused_sum = node("fused_sum", _sum_forward, _sum_backward, [0])


def applied(
    plan: Plan, x: Map, convs: Convs, masks: Masks, tracked: Sequence[Running | None] = ()
) -> tuple[Deferred, Result]:
    """Applies a block; returns its output and what the algebra has made.

    Kernels bring the running statistics `tracked` of the convolutions' layers up to date.
    """
    call = block_call(plan, x, convs, masks)
    handle, *values = fused_block(call, tracked)
    result = Result.of(values)
    of_x = x if isinstance(x, Tensor) else x.sum
    return Deferred(
        data_flow.present(handle), data_flow.output_of(plan, of_x, convs, result)
    ), result


def ready(x: Map) -> Tensor:
    """Returns the map itself, `[B, C, H, W]`."""
    if not isinstance(x, Deferred):
        return x
    inputs, constants, form = _taken_apart(x)
    with torch.autocast(x.handle.device.type, enabled=False):
        return data_flow.present(fused_sum(Call(inputs, constants, tuple(form), (), ""))[0])


def like(x: Map) -> Tensor:
    """Returns a tensor with the map's shape, dtype and device."""
    return x.handle if isinstance(x, Deferred) else x
