"""Whether an operator is right: against float64, against itself, and under PyTorch's own checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from operators import Form, Operator, Place, Tensors
from torch import Tensor

# Largest error of the definition in eager PyTorch, in the same dtype, that an error is compared
# with: where eager happens to be exact, a rounding of the result is allowed nevertheless.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WORSE_THAN_EAGER = 2.0


def inputs_of(
    operator: Operator, place: Place, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensors:
    """Inputs in a dtype, those of `differentiable` with `requires_grad`."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs = operator.make_inputs(place, generator)
    for name, value in inputs.items():
        if value.is_floating_point() and name not in operator.wide:
            inputs[name] = value.to(dtype)
    for name in operator.differentiable:
        inputs[name].requires_grad_()
    return inputs


def upstream_of(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """A random gradient for every output."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]


def evaluate(
    operator: Operator, form: Form, place: Place, inputs: Tensors, upstream: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients of a form, by name, for given gradients of the outputs."""
    outputs = form(inputs, place)
    wanted = [inputs[name] for name in operator.differentiable]
    matching = [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, wanted, matching)
    results = {f"output {n}": y.detach() for n, y in enumerate(outputs)}
    results.update(
        {f"gradient of {n}": g for n, g in zip(operator.differentiable, grads, strict=True)}
    )
    return results


def evaluate_in_parts(
    operator: Operator,
    place: Place,
    inputs: Tensors,
    upstream: Sequence[Tensor],
    dtype: torch.dtype,
    samples: int,
) -> dict[str, Tensor]:
    """The definition in another dtype, some samples at a time; float64 gradients are added up."""
    parts: dict[str, list[Tensor]] = {}
    starts = range(0, place.batch, samples) if operator.split else [0]
    for start in starts:
        chosen = slice(start, start + samples) if operator.split else slice(None)
        part = {
            name: value.detach()[chosen] if name in operator.split else value.detach()
            for name, value in inputs.items()
        }
        for name, value in part.items():
            if value.is_floating_point():
                part[name] = value.to(dtype if name not in operator.wide else _wide(dtype))
        for name in operator.differentiable:
            part[name].requires_grad_()
        mine = [g[chosen] if operator.split else g for g in upstream]
        for name, value in evaluate(operator, operator.definition, place, part, mine).items():
            parts.setdefault(name, []).append(value)
    whole = {}
    for name, values in parts.items():
        shared = name.removeprefix("gradient of ") in inputs and not any(
            name == f"gradient of {split}" for split in operator.split
        )
        if len(values) == 1:
            whole[name] = values[0]
        elif shared:
            whole[name] = torch.stack([value.double() for value in values]).sum(0)
        else:
            whole[name] = torch.cat(values)
    return whole


def compare(
    operator: Operator, place: Place, dtype: torch.dtype, device: torch.device, samples: int
) -> dict[str, Any]:
    """Errors of the kernel and of the eager definition against float64, and the verdict.

    An error is the largest difference over the largest magnitude, of each output and gradient.
    """
    inputs = inputs_of(operator, place, dtype, device)
    outputs = operator.kernel(inputs, place)
    upstream = upstream_of(outputs)
    actual = evaluate(operator, operator.kernel, place, inputs, upstream)
    exact = evaluate_in_parts(operator, place, inputs, upstream, torch.float64, samples)
    eager = evaluate_in_parts(operator, place, inputs, upstream, dtype, samples)
    errors, wrong = {}, []
    for name, value in actual.items():
        mine, theirs = relative_error(value, exact[name]), relative_error(eager[name], exact[name])
        limit = WORSE_THAN_EAGER * max(theirs, ROUNDING[dtype])
        errors[name] = {"kernel": mine, "eager": theirs, "limit": limit}
        # Written so that a NaN is wrong.
        if not mine <= limit:
            wrong.append(f"{name}: error {mine:.1e}, at most {limit:.1e}")
    return {**_label(operator, place, dtype), "errors": errors, "wrong": wrong}


def repeats(
    operator: Operator, place: Place, dtype: torch.dtype, device: torch.device, times: int
) -> dict[str, Any]:
    """Whether a kernel gives the same bits every time, outputs and gradients."""
    inputs = inputs_of(operator, place, dtype, device)
    upstream = upstream_of(operator.kernel(inputs, place))
    first = evaluate(operator, operator.kernel, place, inputs, upstream)
    wrong = set()
    for _ in range(times - 1):
        again = evaluate(operator, operator.kernel, place, inputs, upstream)
        wrong |= {name for name, value in first.items() if not torch.equal(value, again[name])}
    faults = [f"{name}: other bits in one of {times} runs" for name in sorted(wrong)]
    return {**_label(operator, place, dtype), "times": times, "wrong": faults}


def registration(
    operator: Operator, place: Place, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    """PyTorch's check of each registered operator: schema, fake, autograd, tracing."""
    if operator.opchecks is None:
        return
    inputs = inputs_of(operator, place, dtype, device)
    for overload, arguments in operator.opchecks(inputs, place):
        results = torch.library.opcheck(overload, arguments, raise_exception=False)
        wrong = [f"{test}: {result}" for test, result in results.items() if result != "SUCCESS"]
        yield {**_label(operator, place, dtype), "operator": str(overload), "wrong": wrong}


def compiled(
    operator: Operator, place: Place, dtype: torch.dtype, device: torch.device, backend: str
) -> dict[str, Any]:
    """Whether `torch.compile(fullgraph=True)` takes the kernel, and gives what it gives."""
    inputs = inputs_of(operator, place, dtype, device)
    upstream = upstream_of(operator.kernel(inputs, place))
    expected = evaluate(operator, operator.kernel, place, inputs, upstream)
    torch.compiler.reset()
    form = torch.compile(operator.kernel, fullgraph=True, dynamic=False, backend=backend)
    actual = evaluate(operator, form, place, inputs, upstream)
    wrong = []
    for name, value in actual.items():
        error = relative_error(value, expected[name].double())
        if not error <= 2 * ROUNDING[dtype]:
            wrong.append(f"{name}: {error:.1e} away from the kernel without compilation")
    return {**_label(operator, place, dtype), "wrong": wrong}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude; NaN where there is one."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    scale = exact.double().abs().max().clamp_min(1e-300)
    return float((actual.double() - exact.double()).abs().max() / scale)


def _label(operator: Operator, place: Place, dtype: torch.dtype) -> dict[str, str]:
    return {
        "operator": operator.name,
        "place": place.name,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
