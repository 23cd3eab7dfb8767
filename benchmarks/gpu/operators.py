"""The operators that check.py checks and times: one entry of OPERATORS each.

A new kernel joins by an entry: how its inputs are made, the kernel's call, its definition, what it
is timed against, and the bytes that it cannot avoid moving.

An operator is compared with its definition in float64 (`compare`), with itself (`repeats`,
`compiled`) and with what PyTorch asks of one (`registration`). `measure` times it beside its
rivals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timing import Deadline, host_ms, median_ms, peak_mib
from torch import Tensor

from coded_resnext.kernels import branch_energy, coded_aggregate, coding_loss
from coded_resnext.kernels.coded import gram
from coded_resnext.kernels.coded import operator as coded_operator
from coded_resnext.kernels.loss import functional as loss_functional

Tensors = dict[str, Tensor]
# Largest error of the definition in eager PyTorch, in the same dtype, that an error is compared
# with: where eager happens to be exact, a rounding of the result is allowed nevertheless.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WORSE_THAN_EAGER = 2.0


@dataclass(frozen=True)
class CodedStage:
    """A coded stage of a network at an image size; letters as in docs/math.md."""

    name: str
    batch: int
    branches: int
    width: int
    channels: int
    size: int
    """`H = W`, in pixels."""
    classes: int
    active: int

    @property
    def activations(self) -> int:
        """Returns the elements of `h`."""
        return self.batch * self.branches * self.width * self.size**2

    @property
    def outputs(self) -> int:
        """Returns the elements of `y`."""
        return self.batch * self.channels * self.size**2


IMAGENET = (
    CodedStage("32x4d c4 160px", 256, 32, 16, 1024, 10, 1000, 16),
    CodedStage("32x4d c5 160px", 256, 32, 32, 2048, 5, 1000, 8),
    CodedStage("32x4d c4 224px", 256, 32, 16, 1024, 14, 1000, 16),
    CodedStage("32x4d c5 224px", 256, 32, 32, 2048, 7, 1000, 8),
)
CIFAR = (
    CodedStage("10x11d c3", 128, 10, 22, 512, 16, 10, 5),
    CodedStage("10x11d c4", 128, 10, 44, 1024, 8, 10, 3),
    CodedStage("20x6d c3", 128, 20, 12, 512, 16, 100, 8),
    CodedStage("20x6d c4", 128, 20, 24, 1024, 8, 100, 4),
)
STAGES = (*IMAGENET, *CIFAR)
# For a dry run: as small as the interpreter needs it, odd where that costs nothing.
TINY = (CodedStage("tiny", 3, 4, 4, 24, 5, 10, 2), CodedStage("tiny odd", 2, 5, 3, 7, 3, 10, 2))

Form = Callable[[Tensors, CodedStage], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Operator:
    """What is known about an operator outside its kernel."""

    name: str
    make_inputs: Callable[[CodedStage, torch.Generator], Tensors]
    """Inputs in float32 on the generator's device; what is not floating point stays as it is."""
    differentiable: tuple[str, ...]
    """Inputs that get a gradient."""
    kernel: Form
    definition: Form
    """What is right; evaluated in float64, and timed."""
    least_bytes: Callable[[CodedStage, int], tuple[int, int]]
    """For a size of an element: the least traffic of a forward and of a backward pass, each tensor
    moved once."""
    rivals: dict[str, Form] = field(default_factory=dict)
    """Other forms of the same, timed beside the kernel."""
    replaced: Form | None = None
    """What a network without coding would do here instead."""
    split: tuple[str, ...] = ()
    """Inputs with a batch dimension, when outputs have one too: the definition, which may need far
    more memory, is then evaluated for some samples at a time."""
    wide: tuple[str, ...] = ()
    """Inputs that stay float32 whatever the activations are."""
    opchecks: Callable[[Tensors, CodedStage], list[tuple[Any, tuple[Any, ...]]]] | None = None
    """Calls of registered operators for `torch.library.opcheck`."""


def aggregate_inputs(stage: CodedStage, generator: torch.Generator) -> Tensors:
    """Returns rectified activations, an expand weight of unit gain, and a DropSubNNs mask."""
    device, wide = generator.device, stage.branches * stage.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    h = normal(stage.batch, wide, stage.size, stage.size).relu()
    keep = torch.full((stage.batch, stage.branches), 0.9, device=device)
    return {
        "h": h.contiguous(memory_format=torch.channels_last),
        "weight": normal(stage.channels, wide, 1, 1) / wide**0.5,
        "drop_mask": torch.bernoulli(keep, generator=generator) / 0.9,
    }


def aggregate_by(backend: str) -> Form:
    """Returns the aggregate by a backend."""

    def run(inputs: Tensors, stage: CodedStage) -> tuple[Tensor, ...]:
        return coded_aggregate(
            inputs["h"],
            inputs["weight"],
            stage.branches,
            drop_mask=inputs["drop_mask"],
            backend=backend,  # type: ignore[arg-type]
        )

    return run


def aggregate_bytes(stage: CodedStage, item: int) -> tuple[int, int]:
    """Counts what forward reads, `h`, and writes, `y`; backward reads both and `g_y`'s size again,
    and writes `dh`."""
    weight = stage.channels * stage.branches * stage.width
    forward = stage.activations + stage.outputs + weight
    return forward * item, (2 * stage.activations + stage.outputs + 2 * weight) * item


def aggregate_opchecks(inputs: Tensors, stage: CodedStage) -> list[tuple[Any, tuple[Any, ...]]]:
    """Returns calls with both masks, and with the affine map in front and no mask."""
    per_branch = per_branch_weight(inputs, stage).detach().clone().requires_grad_()
    h, drop = inputs["h"], inputs["drop_mask"]
    affine = [torch.rand(h.shape[1], device=h.device, requires_grad=True) for _ in range(2)]
    return [
        (
            coded_operator.normalize_branches,
            (h, per_branch, None, None, drop, torch.ones_like(drop)),
        ),
        (coded_operator.normalize_branches, (h, per_branch, *affine, None, None)),
    ]


def per_branch_weight(inputs: Tensors, stage: CodedStage) -> Tensor:
    """Returns the expand weight, one matrix for each branch."""
    return gram.split_weight(inputs["weight"], stage.branches, concatenate=False)


def energy_inputs(stage: CodedStage, generator: torch.Generator) -> Tensors:
    """Returns the inputs of the aggregate that energies depend on."""
    inputs = aggregate_inputs(stage, generator)
    return {name: inputs[name] for name in ("h", "weight")}


def energy_by(backend: str) -> Form:
    """Returns the energies by a backend."""

    def run(inputs: Tensors, stage: CodedStage) -> tuple[Tensor, ...]:
        h, weight = inputs["h"], inputs["weight"]
        return (branch_energy(h, weight, stage.branches, backend=backend),)  # type: ignore[arg-type]

    return run


def energy_opchecks(inputs: Tensors, stage: CodedStage) -> list[tuple[Any, tuple[Any, ...]]]:
    """Returns calls with a removal mask, and with the affine map in front."""
    per_branch = per_branch_weight(inputs, stage).detach().clone().requires_grad_()
    h = inputs["h"]
    keep = torch.ones(stage.batch, stage.branches, device=h.device)
    affine = [torch.rand(h.shape[1], device=h.device, requires_grad=True) for _ in range(2)]
    return [
        (coded_operator.branch_energy, (h, per_branch, None, None, keep)),
        (coded_operator.branch_energy, (h, per_branch, *affine, None)),
    ]


def energy_bytes(stage: CodedStage, item: int) -> tuple[int, int]:
    """Counts what forward reads, `h`; backward reads it again and writes its gradient."""
    weight = stage.channels * stage.branches * stage.width
    sums = 4 * stage.batch * stage.branches
    forward = (stage.activations + weight) * item + sums
    return forward, 2 * (stage.activations + weight) * item + sums


def loss_inputs(stage: CodedStage, generator: torch.Generator) -> Tensors:
    """Returns energies as a half-trained network has them, and class indices."""
    device = generator.device
    energies = torch.rand(stage.batch, stage.branches, generator=generator, device=device)
    # Any rows of equal weight will do: a run of branches, one further for every class.
    first = torch.arange(stage.classes, device=device)[:, None]
    branch = torch.arange(stage.branches, device=device)
    return {
        "energies": 2 * energies,
        "codewords": (branch - first) % stage.branches < stage.active,
        "targets": torch.randint(stage.classes, (stage.batch,), generator=generator, device=device),
    }


def loss_by(backend: str) -> Form:
    """Returns the coding loss by a backend."""

    def run(inputs: Tensors, _stage: CodedStage) -> tuple[Tensor, ...]:
        values = (inputs["energies"], inputs["codewords"], inputs["targets"])
        return (coding_loss(*values, backend=backend),)  # type: ignore[arg-type]

    return run


def loss_opchecks(inputs: Tensors, _stage: CodedStage) -> list[tuple[Any, tuple[Any, ...]]]:
    """Returns calls: two blocks in one launch, with decoding, and soft targets."""
    energies = inputs["energies"].detach().expand(2, -1, -1).clone().requires_grad_()
    codewords = inputs["codewords"].expand(2, -1, -1).clone()
    soft = F.one_hot(inputs["targets"], codewords.shape[1]).float()
    shares = soft.mean(1)
    return [
        (
            loss_functional.coding_loss_operator,
            (energies, codewords, inputs["targets"], shares, 4.0, 0.0, True),
        ),
        (
            loss_functional.coding_loss_operator,
            (energies, codewords, soft, shares, 2.0, 0.1, False),
        ),
    ]


def loss_bytes(stage: CodedStage, _item: int) -> tuple[int, int]:
    """Counts energies and the codewords of the targets, each once; the gradient of the energies."""
    size = stage.batch * stage.branches
    return 5 * size + 12 * stage.batch, 9 * size + 12 * stage.batch


OPERATORS = (
    Operator(
        name="branch_energy",
        make_inputs=energy_inputs,
        differentiable=("h", "weight"),
        kernel=energy_by("triton"),
        definition=energy_by("reference"),
        least_bytes=energy_bytes,
        rivals={"gram": energy_by("torch")},
        split=("h",),
        opchecks=energy_opchecks,
    ),
    Operator(
        name="coded_aggregate",
        make_inputs=aggregate_inputs,
        differentiable=("h", "weight"),
        kernel=aggregate_by("triton"),
        definition=aggregate_by("reference"),
        least_bytes=aggregate_bytes,
        rivals={"gram": aggregate_by("torch")},
        replaced=lambda inputs, _stage: (F.conv2d(inputs["h"], inputs["weight"]),),
        split=("h", "drop_mask"),
        wide=("drop_mask",),
        opchecks=aggregate_opchecks,
    ),
    Operator(
        name="coding_loss",
        make_inputs=loss_inputs,
        differentiable=("energies",),
        kernel=loss_by("triton"),
        definition=loss_by("reference"),
        least_bytes=loss_bytes,
        wide=("energies",),
        opchecks=loss_opchecks,
    ),
)


def inputs_of(
    operator: Operator, stage: CodedStage, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensors:
    """Returns inputs in a dtype, those of `differentiable` with `requires_grad`."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs = operator.make_inputs(stage, generator)
    for name, value in inputs.items():
        if value.is_floating_point() and name not in operator.wide:
            inputs[name] = value.to(dtype)
    for name in operator.differentiable:
        inputs[name].requires_grad_()
    return inputs


def upstream_of(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Returns a random gradient for every output."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]


def evaluate(
    operator: Operator, form: Form, stage: CodedStage, inputs: Tensors, upstream: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Returns the outputs and gradients of a form, by name, for given gradients of the outputs."""
    outputs = form(inputs, stage)
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
    stage: CodedStage,
    inputs: Tensors,
    upstream: Sequence[Tensor],
    dtype: torch.dtype,
    samples: int,
) -> dict[str, Tensor]:
    """Returns the definition in another dtype, some samples at a time; float64 gradients are added
    up."""
    parts: dict[str, list[Tensor]] = {}
    starts = range(0, stage.batch, samples) if operator.split else [0]
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
        for name, value in evaluate(operator, operator.definition, stage, part, mine).items():
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
    operator: Operator, stage: CodedStage, dtype: torch.dtype, device: torch.device, samples: int
) -> dict[str, Any]:
    """Returns the errors of the kernel and of the eager definition against float64, and the
    verdict.

    An error is the largest difference over the largest magnitude, of each output and gradient.
    """
    inputs = inputs_of(operator, stage, dtype, device)
    outputs = operator.kernel(inputs, stage)
    upstream = upstream_of(outputs)
    actual = evaluate(operator, operator.kernel, stage, inputs, upstream)
    exact = evaluate_in_parts(operator, stage, inputs, upstream, torch.float64, samples)
    eager = evaluate_in_parts(operator, stage, inputs, upstream, dtype, samples)
    errors, wrong = compared(actual, eager, exact, dtype)
    return {**_label(operator, stage, dtype), "errors": errors, "wrong": wrong}


def compared(
    actual: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[dict[str, Any], list[str]]:
    """Returns the errors of results by name beside those of eager PyTorch, and which are too
    large."""
    errors, wrong = {}, []
    for name, value in actual.items():
        mine, theirs = relative_error(value, exact[name]), relative_error(eager[name], exact[name])
        limit = WORSE_THAN_EAGER * max(theirs, ROUNDING[dtype])
        errors[name] = {"kernel": mine, "eager": theirs, "limit": limit}
        # Written so that a NaN is wrong.
        if not mine <= limit:
            wrong.append(f"{name}: error {mine:.1e}, at most {limit:.1e}")
    return errors, wrong


def repeats(
    operator: Operator, stage: CodedStage, dtype: torch.dtype, device: torch.device, times: int
) -> dict[str, Any]:
    """Returns whether a kernel gives the same bits every time, outputs and gradients."""
    inputs = inputs_of(operator, stage, dtype, device)
    upstream = upstream_of(operator.kernel(inputs, stage))
    first = evaluate(operator, operator.kernel, stage, inputs, upstream)
    wrong = set()
    for _ in range(times - 1):
        again = evaluate(operator, operator.kernel, stage, inputs, upstream)
        wrong |= {name for name, value in first.items() if not torch.equal(value, again[name])}
    faults = [f"{name}: other bits in one of {times} runs" for name in sorted(wrong)]
    return {**_label(operator, stage, dtype), "times": times, "wrong": faults}


def registration(
    operator: Operator, stage: CodedStage, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yields PyTorch's check of each registered operator: schema, fake, autograd, tracing."""
    if operator.opchecks is None:
        return
    inputs = inputs_of(operator, stage, dtype, device)
    for overload, arguments in operator.opchecks(inputs, stage):
        results = torch.library.opcheck(overload, arguments, raise_exception=False)
        wrong = [f"{test}: {result}" for test, result in results.items() if result != "SUCCESS"]
        yield {**_label(operator, stage, dtype), "operator": str(overload), "wrong": wrong}


def compiled(
    operator: Operator, stage: CodedStage, dtype: torch.dtype, device: torch.device, backend: str
) -> dict[str, Any]:
    """Returns whether `torch.compile(fullgraph=True)` takes the kernel, and gives what it gives."""
    inputs = inputs_of(operator, stage, dtype, device)
    upstream = upstream_of(operator.kernel(inputs, stage))
    expected = evaluate(operator, operator.kernel, stage, inputs, upstream)
    torch.compiler.reset()
    form = torch.compile(operator.kernel, fullgraph=True, dynamic=False, backend=backend)
    actual = evaluate(operator, form, stage, inputs, upstream)
    wrong = []
    for name, value in actual.items():
        error = relative_error(value, expected[name].double())
        if not error <= 2 * ROUNDING[dtype]:
            wrong.append(f"{name}: {error:.1e} away from the kernel without compilation")
    return {**_label(operator, stage, dtype), "wrong": wrong}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Returns the largest difference over the largest magnitude; NaN where there is one."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    scale = exact.double().abs().max().clamp_min(1e-300)
    return float((actual.double() - exact.double()).abs().max() / scale)


def _label(operator: Operator, stage: CodedStage, dtype: torch.dtype) -> dict[str, str]:
    return {
        "operator": operator.name,
        "stage": stage.name,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forms_of(operator: Operator, *, compile_with: str | None) -> Iterator[tuple[str, Form]]:
    """Yields everything that is timed, the kernel first; compiled forms where there is a
    compiler."""
    yield "kernel", operator.kernel
    if operator.replaced is not None:
        yield "replaced", operator.replaced
    others = {**operator.rivals, "definition": operator.definition}
    yield from others.items()
    if compile_with is not None:
        for name, form in others.items():
            torch.compiler.reset()
            yield f"compiled {name}", torch.compile(form, dynamic=False, backend=compile_with)


def measure(
    operator: Operator,
    stage: CodedStage,
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float | None,
    deadline: Deadline,
) -> list[dict[str, Any]]:
    """Returns two rows of the table, for the forward and the backward pass.

    A form that the time or the memory does not suffice for is named under `left_out`.
    """
    inputs = inputs_of(operator, stage, dtype, device)
    label = _label(operator, stage, dtype)
    rows: list[dict[str, Any]] = [
        {
            **label,
            "pass": name,
            "least_bytes": size,
            **{figure: {} for figure in ("ms", "host_ms", "peak_mib", "left_out")},
        }
        for name, size in zip(
            ("forward", "backward"), operator.least_bytes(stage, dtype.itemsize), strict=True
        )
    ]
    leaves = [inputs[name] for name in operator.differentiable]
    for name, form in forms_of(operator, compile_with=None):
        if deadline.passed:
            for row in rows:
                row["left_out"][name] = "time was up"
            continue
        try:
            # A form that does not read an input, as a replaced one may not, has no gradient for it.
            outputs = form(inputs, stage)
            differentiable = [y for y in outputs if y.requires_grad]
            upstream = upstream_of(differentiable)
            runs = (
                lambda form=form: form(inputs, stage),
                lambda y=differentiable, g=upstream: torch.autograd.grad(
                    y, leaves, g, retain_graph=True, allow_unused=True
                ),
            )
            for row, run in zip(rows, runs, strict=True):
                row["ms"][name] = median_ms(run, device)
                row["host_ms"][name] = host_ms(run)
                row["peak_mib"][name] = peak_mib(run, device)
        except torch.OutOfMemoryError:
            for row in rows:
                row["left_out"][name] = "out of memory"
    for row in rows:
        add_ratios(row, bandwidth)
    return rows


def add_ratios(row: dict[str, Any], bandwidth: float | None) -> None:
    """Times over the kernel's, and the kernel's over the least time for its bytes."""
    kernel = row["ms"].get("kernel")
    if kernel is None:
        return
    row["over_kernel"] = {
        name: value / kernel for name, value in row["ms"].items() if name != "kernel"
    }
    if bandwidth is not None:
        floor = 1000 * row["least_bytes"] / bandwidth
        row["floor_ms"] = floor
        row["over_floor"] = kernel / floor
        row["share_of_peak"] = floor / kernel
