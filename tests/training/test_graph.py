"""Ways to compute a step, and above all steps that are recorded and replayed.

They give the same weights as Python does, on the memory of the first step.

A stand-in for CUDA graphs records operations on a CPU and makes them again on the same memory. As a
graph, it knows addresses and no Python: what depends on a value, or on an object that a later step
replaces, goes wrong in a replay. What a graph cannot hold raises while it is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
from coded_resnext.training import step as training_step
from coded_resnext.training import ways
from coded_resnext.training.guard import NonFiniteError
from coded_resnext.training.processes import World
from coded_resnext.training.step import TrainStep, compiler_for
from coded_resnext.training.ways import (
    BY_LAYERS,
    Choice,
    Way,
    choose_backend,
    choose_way,
    read_choice,
)

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
    monkeypatch.setattr(training_step, "unrecordable", lambda *_: None)
    monkeypatch.setattr(training_step, "record", Recording)
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
    on_cpu.setattr(training_step, "record", rerun)
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
    assert not training_step.is_recorded(make_config(), where, world)
    assert training_step.is_recorded(make_config(), torch.device("cuda"), World())
    with pytest.raises(ValueError, match=f"graph: a step cannot be recorded, .*{message}"):
        training_step.is_recorded(make_config(graph="always"), where, world)
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


SLOW, WRONG, FAILS, LOUD = (Way("torch", name) for name in ("slow", "wrong", "fails", "loud"))


class Planted(TrainStep):
    """A step that goes by layers, but for what is planted in the name of the compiler."""

    made = 0

    def __init__(self, model: Any, config: Any, *rest: Any) -> None:
        Planted.made += 1
        self.planted = config.torchcompile
        plain = make_config(**{**config.to_dict(), "torchcompile": ""})
        super().__init__(model, plain, *rest)

    def __call__(self, batch: Batch, step: int) -> None:
        if self.planted == "fails":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.planted == "wrong":
            batch = batch._replace(targets=(batch.targets + 1) % 3)
        if self.planted == "slow":
            time.sleep(1)
        super().__call__(batch, step)
        if self.planted == "loud":
            # What the step changes is right.
            self.latest = 1.1 * self.latest


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Few steps are taken, and nothing is remembered yet."""
    monkeypatch.setattr(ways, "FIRST", 1)
    monkeypatch.setattr(ways, "TIMED", 1)
    monkeypatch.setattr(ways, "default_folder", lambda: tmp_path)
    return monkeypatch


@pytest.fixture
def planted(few: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The ways that a run leaves open are planted ones."""
    few.setattr(ways, "TrainStep", Planted)
    few.setattr(ways, "open_ways", lambda *_: [BY_LAYERS, WRONG, FAILS])
    few.setattr(Planted, "made", 0)
    return few


def choose(**options: Any) -> Choice:
    choice = choose_way(make_model(), 6, make_config(), **options)
    assert choice is not None
    return choice


def test_the_fastest_right_way_is_taken(
    planted: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted.setattr(ways, "open_ways", lambda *_: [SLOW, BY_LAYERS, WRONG, FAILS])
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    choice = choose_way(model, 6, make_config())
    after = torch.rand(2)
    torch.manual_seed(3)
    assert_same(torch.rand(2), after)
    assert choice is not None
    assert choice.way == BY_LAYERS
    slow, layers, wrong, fails = choice.rows
    assert layers.apart is not None
    assert layers.apart < 1e-4
    assert (slow.milliseconds or 0) > 1000 > (layers.milliseconds or 0)
    assert wrong.milliseconds is None
    assert (wrong.apart or 0) > 0.1
    assert "refused: " in (wrong.fault or "")
    assert fails.fault == "left out: OutOfMemoryError('CUDA out of memory')"
    warning = "warning: --backend torch --torchcompile wrong --graph never is refused: "
    assert warning in capsys.readouterr().err
    table = str(choice)
    assert "--backend torch --torchcompile fails --graph never" in table
    assert table.endswith("taken: --backend torch --torchcompile '' --graph never")
    assert choice.gain.endswith("1.00 times as fast as layer by layer")
    assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_way_of_other_losses_is_refused(
    precision: str, planted: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it changes the weights as it should."""
    planted.setattr(ways, "open_ways", lambda *_: [BY_LAYERS, SLOW, LOUD])
    half = {"amp": True, "amp_dtype": "bfloat16"} if precision == "bfloat16" else {}
    choice = choose_way(make_model(), 6, make_config(**half))
    assert choice is not None
    layers, slow, loud = choice.rows
    assert (loud.apart, slow.apart) == (layers.apart, layers.apart)
    assert layers.losses_apart == slow.losses_apart
    assert loud.losses_apart == pytest.approx(0.1, abs=0.02)
    assert (layers.fault, slow.fault) == (None, None)
    assert (loud.fault or "").startswith("refused: its losses are ")
    assert "warning: --backend torch --torchcompile loud" in capsys.readouterr().err
    assert choice.way == BY_LAYERS


def test_a_way_that_takes_the_gpu_away_ends_the_run(planted: pytest.MonkeyPatch) -> None:
    """After an illegal address nothing can be computed in the process; the sentence names it."""

    def synchronize(_device: object = None) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    planted.setattr(torch.cuda, "is_initialized", lambda: True)
    planted.setattr(torch.cuda, "synchronize", synchronize)
    expected = "--torchcompile fails --graph never: the GPU computes nothing more in this process"
    planted.setattr(ways, "open_ways", lambda *_: [BY_LAYERS, FAILS])
    with pytest.raises(ValueError, match=expected) as raised:
        choose()
    assert "an illegal memory access" in str(raised.value)


def test_float16_is_compared_by_a_step_that_counts(planted: pytest.MonkeyPatch) -> None:
    """Its first ones only find the scale of the loss."""
    model, config = (
        make_model(),
        make_config(amp=True, amp_dtype="float16", coding_weight=1e4, lr=1e-4),
    )
    step = ways._Step(model, BY_LAYERS, config, batch_of(0, 8))
    scale = step.step.scaler.get_scale()
    change = step.first().change
    assert step.step.scaler.get_scale() < scale
    assert any(bool(each.any()) for each in change)
    choice = choose_way(model, 6, config)
    assert choice is not None
    _, wrong, _ = choice.rows
    assert "refused" in (wrong.fault or ""), choice


def test_timed_steps_go_nowhere(few: pytest.MonkeyPatch) -> None:
    """Without its warm-up, a run's learning rate might end in numbers that are not finite."""
    step = ways._Step(make_model(), BY_LAYERS, make_config(), batch_of(0, 8))
    assert any(bool(each.abs().max() > 1e-3) for each in step.first().change)
    before = [each.detach().clone() for each in step.step.parameters]
    step.milliseconds()
    for value, earlier in zip(step.step.parameters, before, strict=True):
        assert torch.allclose(value, earlier, rtol=1e-6, atol=1e-9)


@pytest.mark.long
def test_what_was_measured_is_remembered(planted: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planted.setattr(ways, "open_ways", lambda *_: [BY_LAYERS, FAILS])
    first = choose()
    assert first.subject["images"] == [8, 1, 6, 6]
    # Of several processes, one measures its share of the batch.
    assert choose(world=World(size=2)).subject["images"] == [4, 1, 6, 6]
    made = Planted.made
    assert choose() == first
    assert Planted.made == made
    # Of other versions, another machine, another shape or other settings nothing is known.
    machine = ways.describe_machine()
    for changes in (
        {"versions": {**machine["versions"], "triton": "0.0"}},
        {"gpu": "NVIDIA B200"},
    ):
        planted.setattr(ways, "describe_machine", lambda c=changes: {**machine, **c})
        choose()
        made, before = Planted.made, made
        assert made > before, changes
    planted.setattr(ways, "describe_machine", lambda: dict(machine))
    for model, size, config in (
        (make_model(stem_channels=16), 6, make_config()),
        (make_model(), 8, make_config()),
        (make_model(), 6, make_config(batch_size=6)),
        (make_model(), 6, make_config(grad_accum_steps=2)),
    ):
        choose_way(model, size, config)
        made, before = Planted.made, made
        assert made > before
    assert choose() == first
    assert Planted.made == made
    # Nor of a file that is damaged.
    [path] = [path for path in (tmp_path / "ways").iterdir() if read_choice(path) == first]
    for content in ('{"rows": []}', path.read_text().replace('"torch"', '"cuda"')):
        path.write_text(content)
        with pytest.raises(ValueError, match="no measured ways to compute a step"):
            read_choice(path)
        choose()
        made, before = Planted.made, made
        assert made > before
    choose(anew=True)
    assert Planted.made > made


def test_measuring_takes_no_longer_than_it_may(planted: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, config = make_model(), make_config()
    assert choose_way(model, 6, config, seconds=0) is None
    assert choose_way(model, 6, config, run_steps=70) is None
    assert Planted.made == 0

    def tick() -> None:
        clock = iter(range(10**6))
        planted.setattr(ways.time, "monotonic", lambda: next(clock))

    # In a run of few short steps there is time for what the others are held against, and for no
    # more, which a second is.
    tick()
    assert choose_way(model, 6, config, run_steps=80) is None
    assert Planted.made == 2

    tick()
    layers, wrong, fails = choose(seconds=2).rows
    assert layers.fault is None
    assert "refused" in (wrong.fault or "")
    assert fails.fault == ways.TIME_WAS_UP
    # What is taken without measuring is the first way; without its time no other one is better.
    planted.setattr(ways, "open_ways", lambda *_: [WRONG, BY_LAYERS])
    tick()
    assert choose_way(model, 6, config, seconds=1) is None
    # The next run may have the time.
    assert not (tmp_path / "ways").exists()


def test_building_kernels_is_not_measuring(planted: pytest.MonkeyPatch) -> None:
    """They are of use for later runs, and leave this one the time to try what needs them."""
    planted.setattr(ways, "open_ways", lambda *_: [BY_LAYERS, Way("fused")])
    seconds, built = iter(range(10**6)), []
    planted.setattr(ways.time, "monotonic", lambda: next(seconds) + 3600 * len(built))
    planted.setattr(ways, "build_kernels", built.append)
    assert choose(seconds=9).rows[1].fault is None
    assert built == [torch.device("cpu")]


def test_a_step_that_is_not_finite_measures_nothing(
    planted: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    model.head.weight.data.fill_(torch.nan)
    assert choose_way(model, 6, make_config()) is None
    assert "no way is measured, since layer by layer: step 0: " in capsys.readouterr().err


@pytest.mark.long
def test_ways_of_the_interpreter_compute_the_same(few: pytest.MonkeyPatch) -> None:
    """All of it, with Triton's interpreter in the place of a GPU."""
    choice = choose_way(make_model(), 6, make_config())
    assert choice is not None
    assert choice.rows[0].way.backend == "torch"
    assert {row.way.backend for row in choice.rows} >= {"torch", "fused"}
    assert all(row.fault is None for row in choice.rows), choice


def test_what_a_run_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = World(device=torch.device("cuda"))
    monkeypatch.setattr(ways, "backends", lambda: {"triton": None})
    monkeypatch.setattr(ways, "HAS_TRITON", True)
    monkeypatch.setattr("coded_resnext.training.step.HAS_TRITON", True)
    monkeypatch.setattr("coded_resnext.training.step.architecture", lambda _: "sm90")
    config = make_config(torchcompile="auto")
    ways_of_gpu = ways.open_ways(config, "auto", gpu)
    # What was measured to be the fastest, which is also taken without measuring.
    assert ways_of_gpu[0] == Way("torch", "inductor", "always")
    assert len(set(ways_of_gpu)) == len(ways_of_gpu) == 12
    # Compiling takes long.
    assert [bool(way.torchcompile) for way in ways_of_gpu[1:]] == [False] * 6 + [True] * 5
    assert {way.backend for way in ways_of_gpu} == {"torch", "triton", "fused"}
    assert ways.open_ways(make_config(graph="never"), "triton", gpu) == [Way("triton")]
    two = World(size=2, device=torch.device("cuda"))
    assert {way.graph for way in ways.open_ways(config, "auto", two)} == {"never"}
    monkeypatch.setattr(ways, "backends", lambda: {"triton": "Triton is not installed"})
    assert "triton" not in {way.backend for way in ways.open_ways(config, "auto", gpu)}
    assert ways.open_ways(config, "auto", World()) == [Way("torch"), Way("fused")]


@pytest.mark.parametrize("training", [True, False])
def test_blocks_get_the_fastest_backend(training: bool, few: pytest.MonkeyPatch) -> None:
    few.setattr(ways, "open_ways", lambda *_: [Way("torch"), Way("reference")])
    model = make_model().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(4, 1, 6, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=not training):
        choice = choose_backend(model, images)
    assert choice is not None
    assert [row.way.backend for row in choice.rows] == ["torch", "reference"]
    assert all(row.fault is None for row in choice.rows), choice
    assert {block.backend for block in model.blocks} == {choice.way.backend}
    assert_same(dict(model.state_dict()), before)
    assert all(p.grad is None for p in model.parameters())

    # One whose loss is another is refused, though its gradients are right.
    def other(twin: Any, batch: Tensor) -> Tensor:
        return twin(batch).square().mean() + (twin.blocks[0].backend == "reference")

    refused = choose_backend(model, images, other)
    assert refused is not None
    assert ("its losses" in (refused.rows[1].fault or "")) == training
    # A loss of one's own sees a copy of the network and all images.
    seen: list[Any] = []

    def loss(twin: nn.Module, batch: Tensor) -> Tensor:
        assert twin is not model
        seen.append(batch.shape)
        return twin(batch).square().mean()

    assert choose_backend(model, images, loss) is not None
    assert set(seen) == ({images.shape} if training else set())
    # Remembered: nothing is called.
    seen.clear()
    choose_backend(model, images, loss)
    assert seen == []


def test_a_backend_that_computes_something_else_is_refused(
    few: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few.setattr(ways, "open_ways", lambda *_: [Way("torch"), Way("reference")])
    with_backend = ways._with_backend

    def faulty(model: Any, way: Way) -> Any:
        twin = with_backend(model, way)
        twin.head.weight.data.mul_(1.1 if way.backend == "reference" else 1)
        return twin

    few.setattr(ways, "_with_backend", faulty)
    model = make_model().eval()
    choice = choose_backend(model, torch.rand(4, 1, 6, 6))
    assert choice is not None
    assert "refused: " in (choice.rows[1].fault or ""), choice
    assert {block.backend for block in model.blocks} == {"torch"}
    assert "warning: --backend reference" in capsys.readouterr().err
