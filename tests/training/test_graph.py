"""Ways to compute a step, and above all steps that are recorded and replayed.

They give the same weights as Python does, on the memory of the first step.

A stand-in for CUDA graphs records operations on a CPU and makes them again on the same memory. As a
graph, it knows addresses and no Python: what depends on a value, or on an object that a later step
replaces, goes wrong in a replay. What a graph cannot hold raises while it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.tiny_training import IMAGES, TARGETS, assert_same, make_config, make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from coded_resnext.data.batches import Batch
from coded_resnext.kernels.rows import LaunchRow
from coded_resnext.training import graph, ways
from coded_resnext.training.guard import NonFiniteError
from coded_resnext.training.processes import World
from coded_resnext.training.step import TrainStep, compiler_for
from coded_resnext.training.ways import Way, fastest, measure_ways, ways_in_words

aten = torch.ops.aten
# The host waits for the device to know a value, or a size that follows from values.
FORBIDDEN = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


def tensors(values: Any) -> Iterator[Tensor]:
    return (each for each in tree_leaves(values) if isinstance(each, Tensor))


def aliases(values: Any) -> Any:
    """The same memory in the present shapes, which an operation may change in place."""
    return tree_map_only(Tensor, Tensor.detach, values)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """The operations of a function. What they have changed is as before when it is recorded."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}
        launch, generator = LaunchRow.launch, torch.get_rng_state()

        def launched(row: LaunchRow, grid: tuple[int, ...], *args: Any) -> None:
            # Not if this is within an operation, which is recorded as a whole.
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not self:
                return launch(row, grid, *args)
            with _disable_current_modes():
                return self._call(launch, (row, grid, *args), {})

        try:
            with self, patch.object(LaunchRow, "launch", launched):
                work()
        finally:
            torch.set_rng_state(generator)
            for tensor, content in self._before.values():
                tensor.untyped_storage().copy_(content)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        return self._call(function, args, kwargs or {})

    def _call(self, function: Any, args: Any, kwargs: Any) -> Any:
        # Every argument, as schemas do not say all: BatchNorm's has nothing of running statistics.
        for tensor in tensors((args, kwargs)):
            if memory(tensor) not in self._made and memory(tensor) not in self._before:
                self._before[memory(tensor)] = tensor, tensor.untyped_storage().clone()
        call = (function, aliases(args), aliases(kwargs))
        output = function(*args, **kwargs)
        written = {memory(tensor) for tensor in tensors((args, kwargs))}
        self._made.update(memory(t) for t in tensors(output) if memory(t) not in written)
        self.calls.append((*call, aliases(output)))
        return output

    def replay(self) -> None:
        # As the operations were seen: behind autograd.
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, output in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tensors(output), tensors(again), strict=True):
                    # Views and results in place are that memory already.
                    if memory(old) != memory(new):
                        old.copy_(new)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"grad_accum_steps": 2, "clip_grad": 1.0},
    "average": {"model_ema": True, "model_ema_decay": 0.8, "model_ema_warmup": True},
    "float16": {"amp": True, "amp_dtype": "float16"},
    "bfloat16": {"amp": True, "channels_last": True},
    "mixed": {"mixup": 0.2, "smoothing": 0.1},
    "sometimes mixed": {"cutmix": 1.0, "mixup_prob": 0.5},
}
# Two epochs of three steps, of which the last has fewer images.
SIZES = (8, 8, 8, 8, 6, 8, 8, 8, 8, 6)


def rerun(work: Any) -> Any:
    """In the place of a recording: Python again."""
    return SimpleNamespace(replay=work)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(graph, "unrecordable", lambda *_: None)
    monkeypatch.setattr(graph, "record", Recording)
    # Values in the host's memory are checked there; on a GPU's tensors nobody looks.
    monkeypatch.setattr("coded_resnext.kernels.checks._readable", lambda _: False)
    return monkeypatch


def batch_of(index: int, size: int) -> Batch:
    chosen = (torch.arange(size) * 5 + 7 * index) % 24
    return Batch(IMAGES[chosen], TARGETS[chosen], chosen)


def trained(backend: str = "torch", **changes: Any) -> TrainStep:
    step = TrainStep(make_model(backend=backend), make_config(**changes), World(), 5)
    for index, size in enumerate(SIZES):
        step(batch_of(index, size), index)
    step.finish()
    return step


def state_of(step: TrainStep) -> list[torch.Tensor]:
    networks = [step.model, *([step.average.model] if step.average else [])]
    momenta = [values["momentum_buffer"] for values in step.optimizer.state.values()]
    return [*(t for m in networks for t in m.state_dict().values()), *momenta, step.sums]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "torch") for name in SETTINGS),
        *(pytest.param(name, "fused", marks=pytest.mark.long) for name in ("parts", "bfloat16")),
    ],
)
def test_replayed_steps_are_those_of_python(
    on_cpu: pytest.MonkeyPatch, name: str, backend: str
) -> None:
    """To the bit: the same operations on the same numbers, in the same memory."""
    if "mixed" in name:
        pytest.importorskip("torchvision")
    replayed = trained(backend, **SETTINGS[name])
    assert replayed._recorded is not None
    on_cpu.setattr(graph, "record", rerun)
    assert_same(state_of(replayed), state_of(trained(backend, **SETTINGS[name])))


def test_a_recorded_step_is_a_step(on_cpu: pytest.MonkeyPatch) -> None:
    """A learning rate on the device is float32, so that bits are those of no other way."""
    replayed = trained()
    by_python = trained(graph="never")
    for ours, theirs in zip(state_of(replayed), state_of(by_python), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_memory_of_the_network_stays(on_cpu: pytest.MonkeyPatch) -> None:
    step = TrainStep(make_model(), make_config(model_ema=True), World(), 5)
    places = [tensor.data_ptr() for tensor in state_of(step)]
    for index, size in enumerate(SIZES):
        step(batch_of(index, size), index)
    assert [tensor.data_ptr() for tensor in state_of(step)] == places


def test_a_step_that_is_not_finite_is_found_in_a_replay(on_cpu: pytest.MonkeyPatch) -> None:
    step = TrainStep(make_model(), make_config(), World(), 5)
    for index in range(5):
        step(batch_of(index, 8), index)
    step.finish()
    before = [tensor.clone() for tensor in state_of(step)]
    bad = batch_of(5, 8)
    step(bad._replace(images=bad.images * torch.nan), 5)
    with pytest.raises(NonFiniteError, match="step 5: coding loss"):
        step(batch_of(6, 8), 6)
    assert_same(state_of(step), before)


def test_a_replay_keeps_the_weights_where_the_gradient_is_not_at_fault(
    on_cpu: pytest.MonkeyPatch,
) -> None:
    """The gradient has a flag of its own; what else is wrong reaches a replay by its gate."""
    step = TrainStep(make_model(), make_config(), World(), 5)
    for index in range(5):
        step(batch_of(index, 8), index)
    step.finish()
    before = [parameter.detach().clone() for parameter in step.parameters]
    next(iter(step.optimizer.state.values()))["momentum_buffer"].fill_(torch.inf)
    step(batch_of(5, 8), 5)
    with pytest.raises(NonFiniteError, match="step 5: optimizer state not finite"):
        step.finish()
    assert_same([parameter.detach() for parameter in step.parameters], before)


def test_a_layer_that_is_changed_later_counts(on_cpu: pytest.MonkeyPatch) -> None:
    """A recording knows nothing of a BatchNorm in evaluation, nor of weights that are frozen."""

    def changed() -> TrainStep:
        step = TrainStep(make_model(), make_config(), World(), 5)
        for index in range(8):
            if index == 5:
                step.model.blocks[0].grouped_bn.eval()
                step.model.blocks[1].expand.requires_grad_(requires_grad=False)
            step(batch_of(index, 8), index)
        step.finish()
        return step

    replayed = changed()
    assert replayed._recorded is not None
    on_cpu.setattr("coded_resnext.training.step.recorded", lambda part, *_: part)
    assert_same(state_of(replayed), state_of(changed()))


def test_a_state_that_is_loaded_is_recorded_anew(on_cpu: pytest.MonkeyPatch) -> None:
    step, other = (TrainStep(make_model(), make_config(), World(), 5) for _ in range(2))
    for index in range(4):
        step(batch_of(index, 8), index)
    step.finish()
    state = step.state()
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [step.lr]
    for index in range(4):
        other(batch_of(index + 9, 8), index)
    other.finish()
    other.load(state, step.local_state())
    assert other._recorded is None
    for index in range(4, 9):
        for each in (step, other):
            each(batch_of(index, 8), index)
    step.finish()
    other.finish()
    assert_same(state_of(other), state_of(step))


class Reading(nn.Module):
    """A layer for whose value the host waits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if bool(x.detach().sum() < 1e9) else -x


def test_a_network_that_cannot_be_recorded(
    on_cpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reading(**changes: Any) -> TrainStep:
        model = make_model()
        model.stem.append(Reading())
        step = TrainStep(model, make_config(amp=True, amp_dtype="float16", **changes), World(), 5)
        for index in range(5):
            step(batch_of(index, 8), index)
        step.finish()
        return step

    by_python = reading(graph="never")
    fallen_back = reading()
    said = capsys.readouterr().err
    assert said.count("steps are not recorded as CUDA graphs: ") == 1
    for ours, theirs in zip(state_of(fallen_back), state_of(by_python), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        reading(graph="always")


@pytest.mark.parametrize(
    ("device", "world", "message"),
    [
        ("cpu", World(), "on cpu, not on a GPU"),
        ("cuda", World(size=2), "added up over 2 processes"),
    ],
)
def test_what_is_not_recorded(device: str, world: World, message: str) -> None:
    where = torch.device(device)
    assert not graph.is_recorded(make_config(), where, world)
    assert graph.is_recorded(make_config(), torch.device("cuda"), World())
    with pytest.raises(ValueError, match=f"graph: a step cannot be recorded, .*{message}"):
        graph.is_recorded(make_config(graph="always"), where, world)
    with pytest.raises(ValueError, match="graph: expected auto or always or never, got 'yes'"):
        make_config(graph="yes")


def test_auto_compiles_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("coded_resnext.training.step.HAS_TRITON", True)
    for arch, expected in (("sm90", "inductor"), ("sm75", "")):
        monkeypatch.setattr("coded_resnext.training.step.architecture", lambda _, a=arch: a)
        assert compiler_for("auto", gpu, "auto") == expected
        assert compiler_for("auto", gpu, "triton") == ""
        assert compiler_for("auto", cpu, "auto") == ""
        assert compiler_for("eager", gpu, "auto") == "eager"


LAYERS, WRONG, FAILS = (Way("torch", name) for name in ("", "wrong", "fails"))


class Planted(TrainStep):
    """A step that goes by layers, but for what is planted in the name of the compiler."""

    def __init__(self, model: Any, config: Any, *rest: Any) -> None:
        self.planted = config.torchcompile
        plain = make_config(**{**config.to_dict(), "torchcompile": ""})
        super().__init__(model, plain, *rest)

    def __call__(self, batch: Batch, step: int) -> None:
        if self.planted == "fails":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.planted == "wrong":
            batch = batch._replace(targets=(batch.targets + 1) % 3)
        super().__call__(batch, step)


def test_a_way_that_is_wrong_or_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "TrainStep", Planted)
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = measure_ways(model, batch_of(0, 8), make_config(), [LAYERS, WRONG, FAILS], steps=2)
    layers, wrong, fails = rows
    assert layers.apart == 0
    assert layers.milliseconds is not None
    assert wrong.milliseconds is None
    assert wrong.apart is not None
    assert wrong.apart > 0.1
    assert "apart from a step in float32, more than" in (wrong.fault or "")
    assert "CUDA out of memory" in (fails.fault or "")
    text = ways_in_words(rows, 8)
    assert "--backend torch --torchcompile fails --graph never" in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ways_of_a_step_that_is_not_finite_are_not_compared() -> None:
    batch = batch_of(0, 8)
    bad = batch._replace(images=batch.images * torch.nan)
    with pytest.raises(FloatingPointError, match="layer by layer, step 0: coding loss"):
        measure_ways(make_model(), bad, make_config())


def test_the_shortest_step_wins() -> None:
    rows = [
        ways.Measured(Way("torch"), 9.0, 0.0, None),
        ways.Measured(Way("triton", "", "always"), 4.0, 0.0, None),
        ways.Measured(Way("fused"), None, 0.5, "its step is apart"),
    ]
    assert fastest(rows) == rows[1]
    text = ways_in_words(rows, 256)
    assert text.endswith("fastest: --backend triton --torchcompile '' --graph always")
    assert "64000" in text
    assert fastest(rows[2:]) is None
    assert ways_in_words(rows[2:], 8).endswith("no way is right")


@pytest.mark.long
@pytest.mark.parametrize("amp", [False, True])
def test_ways_of_the_processor_compute_the_same(amp: bool) -> None:
    rows = measure_ways(make_model(), batch_of(0, 8), make_config(amp=amp), steps=1)
    assert [row.way.backend for row in rows] == ["torch", "fused"]
    assert all(row.fault is None for row in rows), rows


def test_what_a_gpu_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "backends", lambda: {"triton": None})
    of_gpu = ways.ways_on(torch.device("cuda"))
    assert of_gpu[0] == Way("torch")
    assert Way("torch", "inductor", "always") in of_gpu
    assert Way("triton", "", "always") in of_gpu
    monkeypatch.setattr(ways, "backends", lambda: {"triton": "Triton is not installed"})
    assert {way.backend for way in ways.ways_on(torch.device("cuda"))} == {"torch"}
