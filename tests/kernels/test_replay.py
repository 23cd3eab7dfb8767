"""Recordings of functions: a replay does what the function does, and what cannot be is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.small_networks import make_images, make_network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from coded_resnext import CodedLoss
from coded_resnext.kernels import replay, rows
from coded_resnext.kernels.batch_norm import rows as batch_norm_rows
from coded_resnext.kernels.replay import Replayed

TABLE = torch.arange(4.0)


@torch.library.custom_op("coded_resnext_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Called:
    """A function of tensors that is replayed, and how often it ran itself."""

    def __init__(self, function: Any) -> None:
        self.runs, self.function = 0, function
        self.replayed = Replayed(self._run)

    def _run(self, tensors: Sequence[Any], settings: Any) -> list[Tensor | None]:
        self.runs += 1
        result: list[Tensor | None] = self.function(tensors, settings)
        return result

    def check(self, *tensors: Tensor | None, settings: Any = 2, runs: int) -> None:
        """Calls it, expects what the function gives, and that it ran so often by then."""
        copies = [None if each is None else each.clone() for each in tensors]
        expected = self.function(copies, settings)
        actual = self.replayed(tensors, settings)
        for one, other in zip(actual, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.stride() == other.stride()
                torch.testing.assert_close(one, other, rtol=0, atol=0)
        # What it writes to is written to.
        for one, other in zip(tensors, copies, strict=True):
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert self.runs == runs


def mixed(tensors: Sequence[Any], settings: int) -> list[Tensor | None]:
    """Views of inputs and of results, several results, allocations, writing, an absent one."""
    x, y = tensors[:2]
    halves = torch.cat([x, y], 1).split(settings, 1)
    total = x.new_empty(x.shape).permute(1, 0)
    total.copy_((x * 0.5 + y[0]).t())
    largest, where = total.max(0)
    y[1:].add_(1)
    flat = y.new_empty(y.shape)
    flat.view(-1).copy_(y.reshape(-1))
    four = x.new_empty(4)
    overlapping = four.as_strided((2, 2), (1, 1))
    four.view(2, 2).copy_(x[:2, :2])
    return [halves[1].contiguous(), None, total[1:], largest + where, x, flat, overlapping + 1]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_third_call_is_replayed() -> None:
    called = Called(mixed)
    for seed in range(5):
        called.check(numbers(3, 4, seed=seed), numbers(3, 4, seed=9 + seed), runs=min(seed + 1, 2))


@pytest.mark.parametrize("off", [0, 5])
def test_an_input_may_begin_anywhere(off: int) -> None:
    """At a multiple of 16 bytes and behind it, which are two recordings, with the same views."""
    called = Called(mixed)
    for seed in range(3):
        memory = numbers(64, seed=seed)
        x, y = (memory[begin + 8 * seed :][:12].view(3, 4) for begin in (off, off + 16))
        called.check(x, y, runs=min(seed + 1, 2))


def test_whatever_a_function_may_depend_on_has_a_recording_of_its_own() -> None:
    x, y = numbers(3, 4), numbers(3, 4, seed=1)
    variants = [
        (x, y, 2),
        (x, y, 3),
        (x[:2], y[:2], 2),
        (numbers(4, 3).t(), y, 2),
        (x.double(), y.double(), 2),
        (x.half(), y.half(), 2),
        (numbers(13)[1:].view(3, 4), y, 2),
        (x, numbers(4, 3).t(), 2),
    ]
    called, count = Called(mixed), len(variants)
    for runs in range(3 * count):
        one, other, settings = variants[runs % count]
        called.check(one, other, settings=settings, runs=min(runs + 1, 2 * count))


def test_one_tensor_for_two_is_another_call_than_two() -> None:
    called = Called(lambda tensors, _: [tensors[0] * tensors[1]])
    x = numbers(3)
    for runs in (1, 2, 2):
        called.check(x, x, runs=runs)
    for runs in (3, 4, 4):
        called.check(x, numbers(3, seed=runs), runs=runs)


@pytest.mark.parametrize(
    "function",
    [
        lambda tensors, _: [tensors[0] * float(tensors[0].sum())],
        lambda tensors, _: [tensors[0] + TABLE],
        lambda tensors, _: [tensors[0], TABLE],
        lambda tensors, _: [doubled(tensors[0])],
    ],
    ids=[
        "a value is read",
        "a tensor that was not given",
        "one is returned",
        "an operator that is not ATen's",
    ],
)
def test_what_cannot_be_replayed_is_called_every_time(function: Any) -> None:
    called = Called(function)
    for seed in range(4):
        called.check(numbers(4, seed=seed), runs=seed + 1)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[-1] += 1
        return func(*args, **(kwargs or {}))


def test_who_looks_sees_every_operator() -> None:
    called = Called(mixed)
    for runs in (1, 2, 2):
        called.check(numbers(3, 4), numbers(3, 4), runs=runs)
    with Counting() as counting:
        for _ in range(3):
            counting.counts.append(0)
            called.replayed([numbers(3, 4), numbers(3, 4)], 2)
    assert called.runs == 5
    assert len({*counting.counts}) == 1 < counting.counts[0]


def test_fake_tensors_and_watched_launches_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(mixed)
    with FakeTensorMode():
        fakes = [torch.empty(3, 4), torch.empty(3, 4)]
    for _ in range(3):
        called.replayed(fakes, 2)
    assert (called.runs, called.replayed.recordings) == (3, {})
    monkeypatch.setattr(rows.LaunchRow, "launch", lambda *_: None)
    for runs in (4, 5, 6):
        called.check(numbers(3, 4), numbers(3, 4), runs=runs)


def test_products_are_in_their_own_dtypes() -> None:
    """A recording is made without autocast, and replayed without it."""

    def product(tensors: Sequence[Any], _: Any) -> list[Tensor | None]:
        with torch.autocast("cpu", enabled=False):
            return [tensors[0] @ tensors[1]]

    called = Called(product)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for runs in (1, 2, 2):
            called.check(numbers(5, 7), numbers(7, 3), runs=runs)


def test_kernels_are_launched_on_what_they_are_given() -> None:
    """Behind the beginning of a tensor, and into one that is allocated as its view."""

    def merged(tensors: Sequence[Any], _: Any) -> list[Tensor | None]:
        partial = tensors[0][1:]
        parts, _, channels = partial.shape
        total = partial.new_empty((channels * 3,)).view(3, channels)
        row = batch_norm_rows.merge_statistics(channels)
        row.launch(batch_norm_rows.grid_of(channels), total, partial.view(parts * 3, -1), parts)
        return [total, total[1]]

    called = Called(merged)
    for seed in range(4):
        called.check(numbers(3, 3, 8, seed=seed).abs() + 1, runs=min(seed + 1, 2))


def test_a_tensor_is_dropped_behind_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        alive.append(sum(each() is not None for each in made))
        made.append(weakref.ref(result := x * y))
        return result

    def power(tensors: Sequence[Any], _: Any) -> list[Tensor | None]:
        x = tensors[0]
        return [x * x * x * x * x]

    x = numbers(3)
    recorder = replay._Recorder([x])
    with recorder:
        square = weakref.ref(x * x)
        # Nor does recording take more memory.
        assert square() is None
        outputs = power([x], None)
    for node in recorder.graph.nodes:
        if node.target is torch.ops.aten.mul.Tensor:
            node.target = product
    recording = recorder.compiled(outputs)
    assert recording is not None
    torch.testing.assert_close(recording(x), outputs, rtol=0, atol=0)
    assert alive == [0, 1, 1, 1]
    # Nor does it keep its graph, most of what it would take.
    graph = weakref.ref(recorder.graph)
    del recorder, node
    gc.collect()
    assert graph() is None


def test_recordings_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 3)
    called = Called(mixed)
    for size in range(4, 12):
        called.replayed([numbers(3, size), numbers(3, size)], 2)
        assert len(called.replayed.recordings) <= 3


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("fused", torch.float64), pytest.param("triton", torch.float32, marks=pytest.mark.long)],
)
def test_a_training_is_the_same_to_the_bit(
    backend: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and running statistics behind steps on two sizes of batches, the last two of them
    with another momentum."""

    def train() -> dict[str, Tensor]:
        model = make_network(backend=backend).train().to(dtype)
        loss = CodedLoss(model.codebooks, weight=1.0, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(7)
        for index in range(8):
            if index == 6:
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.momentum = 0.3
            samples = 3 - index % 2
            images = make_images(samples, seed=index).to(dtype)
            logits, energies = model(images, return_energies=True)
            optimizer.zero_grad()
            loss(logits, energies, torch.arange(samples)).total.backward()
            optimizer.step()
        return model.state_dict()

    replays: list[object] = []
    compiled = replay._Recorder.compiled

    def noted(*arguments: Any) -> Any:
        made = compiled(*arguments)
        return lambda *tensors: replays.append(made) or made(*tensors)

    monkeypatch.setattr(replay._Recorder, "compiled", noted)
    replay.forget()
    replayed = train()
    replay.forget()
    # Of seven nodes and their gradients, the steps 4 and 5, and of the gradients 6 and 7 as well.
    assert len(replays) >= 7 * 2 * 2
    monkeypatch.setattr(
        Replayed, "__call__", lambda self, tensors, settings: self.function(tensors, settings)
    )
    for name, value in train().items():
        torch.testing.assert_close(replayed[name], value, rtol=0, atol=0, msg=name)
