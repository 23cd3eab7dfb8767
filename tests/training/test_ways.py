"""Ways to compute a step: measured side by side, and none that is wrong or fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_training import IMAGES, TARGETS, make_config, make_model

from coded_resnext.data.batches import Batch
from coded_resnext.training import ways
from coded_resnext.training.step import TrainStep
from coded_resnext.training.ways import Way, fastest, measure_ways, ways_in_words

BATCH = Batch(IMAGES[:8], TARGETS[:8], torch.arange(8))
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
    rows = measure_ways(model, BATCH, make_config(), [LAYERS, WRONG, FAILS], steps=2)
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
    rows = measure_ways(make_model(), BATCH, make_config(amp=amp), steps=1)
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
