"""The training loop: schedule, logs, resuming to the bit, and what stops it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coded_resnext import Codebook, CodedResNeXt, Stage
from coded_resnext.batch import TrainingBatches
from coded_resnext.checkpoint import load_model, load_training_state
from coded_resnext.config import TrainingConfig
from coded_resnext.data import RandomShift, batches
from coded_resnext.engine import fit, measure_accuracy
from coded_resnext.run_folder import RunFolder

BOOK = Codebook.from_words(["1100", "0110", "0011"])
TARGETS = torch.arange(24) % 3
# One bright quarter for each class.
IMAGES = torch.zeros(24, 1, 6, 6)
for _index, _label in enumerate(TARGETS.tolist()):
    IMAGES[_index, 0, 3 * (_label // 2) :, 3 * (_label % 2) :] = 1 + 0.01 * _index


def make_model() -> CodedResNeXt:
    torch.manual_seed(0)
    stages = [Stage(1, 8, 2, 4, 4), Stage(1, 8, 2, 4, 2)]
    return CodedResNeXt(
        stages, 3, codebooks=[BOOK], in_channels=1, stem_channels=8, drop_branches=0.3
    )


def make_config(**changes: Any) -> TrainingConfig:
    arguments: dict[str, Any] = {
        "epochs": 4,
        "batch_size": 8,
        "lr": 0.1,
        "warmup_epochs": 1,
        **changes,
    }
    return TrainingConfig(**arguments)


class Interrupting(TrainingBatches):
    """A loader at which somebody presses Ctrl-C in the middle of an epoch."""

    interrupt_in_epoch = 0

    def __iter__(self) -> Any:
        for index, batch in enumerate(super().__iter__()):
            if self.epoch == self.interrupt_in_epoch and index == 1:
                raise KeyboardInterrupt
            yield batch


def train(
    folder: Path,
    *,
    config: TrainingConfig | None = None,
    resume: bool = False,
    interrupt_in_epoch: int = 0,
) -> tuple[CodedResNeXt, list[dict[str, float]]]:
    config = config or make_config()
    model = make_model()
    loader = Interrupting(
        IMAGES, TARGETS, config.batch_size, seed=config.seed, augment=RandomShift(1)
    )
    loader.interrupt_in_epoch = interrupt_in_epoch
    run = RunFolder(folder, config.to_dict(), resume=resume)
    return model, fit(model, loader, batches(IMAGES, TARGETS), config, run)


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_it_learns_and_leaves_a_complete_folder(tmp_path: Path) -> None:
    config = make_config(epochs=25, warmup_epochs=0)
    model, history = train(tmp_path, config=config)
    assert history[-1]["test_accuracy"] == 1.0
    assert history[-1]["total"] < 0.2 * history[0]["total"]
    columns = ["epoch", "learning_rate", "total", "cross_entropy", "coding_1", "test_accuracy"]
    columns += ["early_decoding_1", "seconds"]
    assert list(history[0]) == columns
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == history
    loaded = load_model(tmp_path)
    assert_same_weights(loaded.model.state_dict(), model.state_dict())
    assert loaded.training["epochs_done"] == 25
    assert measure_accuracy(loaded.model, batches(IMAGES, TARGETS)).final == 1.0
    events = list((tmp_path / "tensorboard").glob("events*"))
    assert events
    assert sum(event.stat().st_size for event in events) > 1000


def test_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    first, history = train(tmp_path / "a")
    second, again = train(tmp_path / "b")
    other, _ = train(tmp_path / "c", config=make_config(seed=1))
    assert_same_weights(first.state_dict(), second.state_dict())
    assert without_seconds(history) == without_seconds(again)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("epoch", [1, 3])
def test_interrupted_run_is_usable_and_resumes_to_the_bit(tmp_path: Path, epoch: int) -> None:
    whole, history = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", interrupt_in_epoch=epoch)
    assert load_model(tmp_path / "cut").training["epochs_done"] == epoch - 1
    resumed, rows = train(tmp_path / "cut", resume=True)
    assert_same_weights(whole.state_dict(), resumed.state_dict())
    assert without_seconds(rows) == without_seconds(history)
    states = [load_training_state(tmp_path / name / "state.pt") for name in ("whole", "cut")]
    momenta = [
        [v["momentum_buffer"] for v in state["optimizer"]["state"].values()] for state in states
    ]
    assert momenta[0]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model, history = train(tmp_path)
    again, rows = train(tmp_path, resume=True)
    assert rows == history
    assert_same_weights(model.state_dict(), again.state_dict())


def test_a_run_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run already; resume it"):
        train(tmp_path)
    with pytest.raises(ValueError, match=r"another kind: epochs was 4, is 5"):
        train(tmp_path, config=make_config(epochs=5), resume=True)


def test_non_finite_loss_stops_and_keeps_the_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="logits: expected finite numbers"):
        train(tmp_path, config=make_config(lr=1e30, warmup_epochs=0))
    assert load_model(tmp_path).training["epochs_done"] == 0
    assert all(v.isfinite().all() for v in load_model(tmp_path).model.state_dict().values())


def test_measuring_leaves_mode_and_statistics_alone() -> None:
    model = make_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    accuracy = measure_accuracy(model, batches(IMAGES, TARGETS))
    assert model.training
    assert_same_weights(before, model.state_dict())
    model.eval()
    logits, energies = model(IMAGES, return_energies=True)
    assert accuracy.final == float((logits.argmax(1) == TARGETS).double().mean())
    decoded = (energies[0] @ BOOK.codewords.float().T).argmax(1)
    assert accuracy.early == (float((decoded == TARGETS).double().mean()),)
    with pytest.raises(ValueError, match="loader: expected at least one sample"):
        measure_accuracy(model, [])


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_are_checked_where_the_data_is_loaded(tmp_path: Path, wrong: int) -> None:
    model, config = make_model(), make_config()
    targets = TARGETS.clone()
    targets[5] = wrong
    message = f"targets: expected classes 0 to 2, got {wrong}"
    with pytest.raises(ValueError, match=message):
        measure_accuracy(model, batches(IMAGES, targets))
    run = RunFolder(tmp_path, config.to_dict())
    loader = TrainingBatches(IMAGES, targets, 8, seed=0)
    with pytest.raises(ValueError, match=message):
        fit(model, loader, batches(IMAGES, TARGETS), config, run)


def test_learning_rate() -> None:
    config = make_config(epochs=10, warmup_epochs=2, min_lr=0.01)
    rates = [config.lr_at(step, 5) for step in range(50)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert rates[9] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    # Half-way down the cosine.
    middle = make_config(epochs=11, warmup_epochs=0).lr_at(5, 1)
    assert middle == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: .* at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a number above 0, got 0.0"),
        ({"momentum": 1.0}, "momentum: expected 0 <= value < 1, got 1.0"),
        ({"warmup_epochs": 4}, "warmup_epochs: expected fewer than 4 epochs, got 4"),
        ({"weight_decay": float("nan")}, "weight_decay: .* got nan"),
        ({"seed": -1}, "seed: .* got -1"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**change)
