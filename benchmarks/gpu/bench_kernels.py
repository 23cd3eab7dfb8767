"""Every Triton operator, whole blocks and whole networks on a GPU, beside what they replace.

Each call is held against its unfused definition first, and then timed as a CUDA graph, so that the
host is not. bfloat16, at the sizes of the paper's networks.

    python -m pytest benchmarks/gpu/bench_kernels.py --benchmark-only --results gpu.json
    python -m pytest benchmarks/gpu/bench_kernels.py --dry      # tiny sizes in Triton's interpreter

Without a GPU they are skipped. check.py measures what matters most of this in eight minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from bench_model import Contender
from convolutions import CASES, KERNELS, PYTORCH, GroupedCase, ProductCase
from model_check import BLOCKS, TINY_BLOCKS, EvaluatedBlock
from operators import (
    OPERATORS,
    STAGES,
    TINY,
    CodedStage,
    Form,
    Operator,
    forms_of,
    inputs_of,
    upstream_of,
)
from stages import NETWORK, SMALL_NETWORK, Task, _captured, runner_of
from timing import Deadline, median_ms
from torch import Tensor
from torch.utils._pytree import tree_leaves

from coded_resnext.kernels.batch_norm import launch as batch_norm
from coded_resnext.kernels.residual import launch as residual
from coded_resnext.kernels.residual.rows import parts_of

BFLOAT16 = torch.bfloat16
# Distance from the definition, relative to its norm: some roundings of bfloat16.
APART = 0.05
# Batch, channels and pixels of an edge of what ends the blocks of ResNeXt-50's stages, 160 pixels.
MAPS = ((256, 256, 40), (256, 512, 20), (256, 1024, 10), (256, 2048, 5))
Call = Callable[[], Any]


class Setting(NamedTuple):
    """Where and how a benchmark runs."""

    dry: bool
    device: torch.device
    compiler: str

    def compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a call that is compiled, whatever was compiled before it."""
        torch.compiler.reset()
        return torch.compile(call, backend=self.compiler, dynamic=False)


class Timed(NamedTuple):
    """What is timed."""

    name: str
    make: Callable[[Setting], tuple[Call, Call | None]]
    """Returns the call, and one that gives what is right."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = list(all_cases(dry=metafunc.config.getoption("--dry")))
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="module")
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    dry = request.config.getoption("--dry")
    if dry:
        yield Setting(True, torch.device("cpu"), "aot_eager")
        return
    if not torch.cuda.is_available():
        pytest.skip("no GPU was available; --dry takes the paths in the interpreter")
    # A graph is captured on the stream that its forward pass ran on, never the default one.
    with torch.cuda.stream(torch.cuda.Stream()):
        yield Setting(False, torch.device("cuda"), "inductor")


def test_on_gpu(
    case: Timed, setting: Setting, benchmark: Any, record: Callable[[dict[str, Any]], None]
) -> None:
    call, right = case.make(setting)
    if right is not None:
        check(call(), right())
    ms = None if setting.dry else median_ms(call, setting.device)
    replay = call if setting.dry else _captured(call)

    def once() -> None:
        replay()
        if not setting.dry:
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=1 if setting.dry else 20)
    row = {"what": case.name, "ms": ms, "dry": setting.dry}
    benchmark.extra_info.update(row)
    record(row)


def check(actual: Any, expected: Any) -> None:
    """The same but for rounding, of which some gradients have nothing else: all count together."""
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    wide = [(a.double(), e.double()) for a, e in pairs if a is not None and e is not None]
    difference = torch.stack([(a - e).norm() for a, e in wide]).norm()
    # Written so that a NaN is wrong.
    assert difference <= APART * torch.stack([e.norm() for _, e in wide]).norm()


def all_cases(*, dry: bool) -> Iterator[Timed]:
    """Yields operators, convolutions, what is between them, blocks, networks."""
    yield from _operators(TINY[:1] if dry else STAGES)
    yield from _convolutions(dry=dry)
    yield from _between_convolutions(((2, 8, 3),) if dry else MAPS)
    yield from _blocks(TINY_BLOCKS if dry else BLOCKS)
    yield from _networks((NETWORK,) if dry else (NETWORK, SMALL_NETWORK))


def _operators(stages: tuple[CodedStage, ...]) -> Iterator[Timed]:
    for operator in OPERATORS:
        forms = ["kernel", *operator.rivals, "definition"]
        forms += [f"compiled {form}" for form in forms[1:]]
        if operator.replaced is not None:
            forms.append("replaced")
        for stage in stages:
            for form in forms:
                for which in ("forward", "backward"):

                    def make(
                        setting: Setting,
                        operator: Operator = operator,
                        stage: CodedStage = stage,
                        form: str = form,
                        which: str = which,
                    ) -> tuple[Call, Call | None]:
                        forms = dict(forms_of(operator, compile_with=setting.compiler))
                        call = _pass(operator, stage, forms[form], which, setting)
                        if form in ("replaced", "definition"):
                            return call, None
                        return call, _pass(operator, stage, operator.definition, which, setting)

                    yield Timed(f"{operator.name}, {stage.name}, {which}: {form}", make)


def _pass(operator: Operator, stage: CodedStage, form: Form, which: str, setting: Setting) -> Call:
    inputs = inputs_of(operator, stage, BFLOAT16, setting.device)
    if which == "forward":
        return lambda: form(inputs, stage)
    leaves = [inputs[name] for name in operator.differentiable]
    outputs = [y for y in form(inputs, stage) if y.requires_grad]
    upstream = upstream_of(outputs)
    return lambda: torch.autograd.grad(
        outputs, leaves, upstream, retain_graph=True, allow_unused=True
    )


def _convolutions(*, dry: bool) -> Iterator[Timed]:
    for kind in CASES:
        for layer in kind.tiny if dry else kind.layers:
            for which in kind.passes:

                def make(
                    setting: Setting,
                    form: str,
                    kind: Any = kind,
                    layer: Any = layer,
                    which: str = which,
                ) -> tuple[Call, Call | None]:
                    case = kind(layer, BFLOAT16, setting.device)
                    library = partial(case.run, which, PYTORCH)
                    if form == "kernel":
                        return partial(case.run, which, KERNELS), library
                    if form == "NCHW":
                        return partial(case.in_rows().run, which, PYTORCH), None
                    if form == "compiled":
                        plain = kind is ProductCase
                        rival = case.plain(which) if plain else library
                        return setting.compiled(rival), None if plain else library
                    return library, None

                forms = ["kernel", "library", "compiled"]
                if kind is GroupedCase:
                    # Alone, a compiled convolution is cuDNN's.
                    forms = ["kernel", "NHWC", "NCHW"]
                for form in forms:
                    name = f"{kind.title}, {layer.name}, {which}: {form}"
                    yield Timed(name, lambda setting, f=form, m=make: m(setting, f))
    # Between BatchNorms the compiler has its say.
    for layer in GroupedCase.tiny if dry else GroupedCase.layers:
        for which in ("forward", "backward"):
            for form in ("kernel", "definition", "compiled"):

                def make_fused(
                    setting: Setting, layer: Any = layer, which: str = which, form: str = form
                ) -> tuple[Call, Call | None]:
                    case = GroupedCase(layer, BFLOAT16, setting.device)
                    plain = case.between_norms("torch")
                    run = case.between_norms("triton") if form == "kernel" else plain
                    if form == "compiled":
                        run = setting.compiled(run)
                    right = None if form == "definition" else _fused(case, plain, which)
                    return _fused(case, run, which), right

                name = f"grouped convolution, {layer.name}, between BatchNorms, {which}: {form}"
                yield Timed(name, make_fused)


def _fused(case: GroupedCase, run: Callable[..., tuple[Tensor, ...]], which: str) -> Call:
    """Returns a pass of a grouped convolution between BatchNorms."""
    if which == "forward":
        return lambda: run(case.x, case.weight)[0]
    leaves = [value.detach().requires_grad_() for value in (case.x, case.weight)]
    y = run(*leaves)[0]
    return lambda: torch.autograd.grad(y, leaves, case.grad, retain_graph=True)


def _between_convolutions(maps: tuple[tuple[int, int, int], ...]) -> Iterator[Timed]:
    """Yields the kernels of `kernels/batch_norm/` and `kernels/residual/`."""
    for batch, channels, size in maps:
        for name in _elementwise(1, 1, 1, torch.device("cpu")):
            for form in ("kernel", "reference", "compiled"):

                def make(
                    setting: Setting,
                    sizes: tuple[int, int, int] = (batch, channels, size),
                    name: str = name,
                    form: str = form,
                ) -> tuple[Call, Call | None]:
                    run = _elementwise(*sizes, setting.device)[name]
                    reference = partial(run, False)
                    if form == "kernel":
                        return partial(run, True), reference
                    if form == "compiled":
                        return setting.compiled(reference), reference
                    return reference, None

                yield Timed(f"{name}, {channels} channels, {size}px: {form}", make)


def _elementwise(
    batch: int, channels: int, size: int, device: torch.device
) -> dict[str, Callable[[bool], Any]]:
    """Returns what is computed between convolutions, by kernels or by PyTorch, on random maps."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    y, x, shortcut, grad = (
        normal(batch, channels, size, size)
        .to(BFLOAT16)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(4)
    )
    scale, bias, of_shortcut, shift, gain = (normal(channels) for _ in range(5))
    parts = y.chunk(parts_of(batch * size**2))
    partial_sums = torch.cat([residual.statistics(part, False) for part in parts])
    norm = batch_norm.Norm(scale, bias, 1e-5)
    normalization = batch_norm.forward(partial_sums, norm, False)
    gradients = normal(len(parts), 2, channels)

    def normalized(kernels: bool) -> Any:
        result = batch_norm.forward(partial_sums, norm, kernels)
        # Beside the count, nothing else would count.
        return result.map, result.moments[:3]

    def gradient_of_join(kernels: bool) -> Any:
        g, sums = residual.backward(grad, x, y, shortcut, kernels)
        return g, sums.sum(0)

    return {
        "batch_norm, merge": lambda kernels: batch_norm.merged(partial_sums, kernels)[1:],
        "batch_norm, forward": normalized,
        "batch_norm, backward": lambda kernels: batch_norm.backward(
            gradients, normalization, kernels
        ),
        "residual, statistics": lambda kernels: batch_norm.merged(
            residual.statistics(y, kernels), kernels
        )[1:],
        "residual, forward": lambda kernels: residual.forward(
            y, scale, bias, shortcut, of_shortcut, shift, kernels
        ),
        "residual, backward": gradient_of_join,
        "residual, gradient of the output": lambda kernels: residual.output_gradient(
            grad, y, gain, scale, bias, kernels
        ),
    }


def _blocks(blocks: list[EvaluatedBlock]) -> Iterator[Timed]:
    for block in blocks:
        for training in (True, False):
            for form in ("torch", "compiled", "reference", "fused", "triton"):

                def make(
                    setting: Setting,
                    block: EvaluatedBlock = block,
                    training: bool = training,
                    form: str = form,
                ) -> tuple[Call, Call | None]:
                    right = None if form == "torch" else _block(block, training, "torch", setting)
                    return _block(block, training, form, setting), right

                name = f"block {block.name}, {'training' if training else 'evaluation'}: {form}"
                yield Timed(name, make)


def _block(block: EvaluatedBlock, training: bool, form: str, setting: Setting) -> Call:
    torch.manual_seed(0)
    module, inputs = block.make(setting.device).train(training), block.inputs(setting.device)
    module.backend = "torch" if form == "compiled" else form  # type: ignore[assignment]
    call: Any = module
    if form == "compiled":
        call = setting.compiled(module)
    parameters = list(module.parameters())

    def run() -> Any:
        with (
            torch.autocast(setting.device.type, BFLOAT16),
            nullcontext() if training else torch.no_grad(),
        ):
            y = call(**inputs)
        if not training:
            return y
        return y.detach(), *torch.autograd.grad(y.float().square().mean(), parameters)

    return run


def _networks(names: tuple[str, ...]) -> Iterator[Timed]:
    contenders = [
        Contender("coded", "torch"),
        Contender("coded", "torch", "default"),
        Contender("coded", "fused"),
        Contender("coded", "triton"),
        Contender("plain", "torch"),
        Contender("plain", "torch", "default"),
        Contender("timm", "torch"),
        Contender("timm", "torch", "default"),
    ]
    for network in names:
        for contender in contenders:
            for which in ("train", "infer"):
                if contender.kind == "timm" and network != NETWORK:
                    continue

                def make(
                    setting: Setting,
                    contender: Contender = contender,
                    network: str = network,
                    which: str = which,
                ) -> tuple[Call, Call | None]:
                    if contender.kind == "timm":
                        pytest.importorskip("timm")
                    if setting.dry and contender.compile is not None:
                        pytest.skip("compiling takes minutes on a CPU")
                    task = Task(setting.dry, Deadline(1e6))
                    return getattr(runner_of(task, contender, network), which), None

                yield Timed(f"{network}, {which}: {contender.name}", make)
