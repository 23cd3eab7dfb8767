"""The training loop: what it leaves, that it repeats and resumes to the bit, and what stops it."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_training import (
    BOOK,
    IMAGES,
    TARGETS,
    assert_same,
    make_config,
    make_loader,
    make_model,
    train,
    without_cost,
)

from coded_resnext import create_model
from coded_resnext.data.batches import Batch, TrainingBatches, batches
from coded_resnext.models.checkpoint import load_model
from coded_resnext.training import engine
from coded_resnext.training.engine import fit, measure_accuracy
from coded_resnext.training.processes import TrainingStopped
from coded_resnext.training.run_folder import RunFolder, load_state


class Disturbed(TrainingBatches):
    """A loader at which something happens before a step of the run."""

    def __init__(self, config: Any, at: int, event: Any) -> None:
        loader = make_loader(config)
        super().__init__(
            IMAGES, TARGETS, config.batch_size, seed=config.seed, augment=loader.augment
        )
        self.at, self.event = at, event

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(super().__iter__(), self.start_step):
            if (self.epoch - 1) * len(self) + index == self.at:
                replaced = self.event(batch)
                batch = batch if replaced is None else replaced
            yield batch


def interrupt(_: Batch) -> None:
    raise KeyboardInterrupt


def terminate(_: Batch) -> None:
    signal.raise_signal(signal.SIGTERM)


def spoil(batch: Batch) -> Batch:
    return batch._replace(images=batch.images * torch.inf)


def test_it_learns_and_leaves_a_complete_folder(tmp_path: Path) -> None:
    config = make_config(epochs=25, warmup_epochs=0)
    model, history = train(tmp_path, config)
    # Over eight seeds of weights and order: 1.0; 0.01 to 0.18; 0.62 to 1.0, where a class by chance
    # is a third. Five of them under the oldest instructions of tests/portability.py: the same to
    # three digits. AMD EPYC, torch 2.14.1, 2026-11-29.
    assert history[-1]["test_accuracy"] > 0.9
    assert history[-1]["total"] < 0.4 * history[0]["total"]
    assert history[-1]["train_early_decoding_1"] > 0.5
    columns = ["epoch", "lr", "total", "cross_entropy", "coding_1", "train_accuracy"]
    columns += ["train_early_decoding_1", "test_accuracy", "test_balanced_accuracy"]
    columns += ["early_decoding_1"]
    columns += ["images_per_second", "peak_memory_mib", "seconds"]
    assert list(history[0]) == columns
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == history
    loaded = load_model(tmp_path)
    assert_same(dict(loaded.model.state_dict()), dict(model.state_dict()))
    assert loaded.training["epochs_done"] == 25
    accuracy = measure_accuracy(loaded.model, batches(IMAGES, TARGETS))
    assert accuracy.final == history[-1]["test_accuracy"]
    events = list((tmp_path / "tensorboard").glob("events*"))
    assert events
    assert sum(event.stat().st_size for event in events) > 1000


def test_the_best_epoch_is_kept_beside_the_last(tmp_path: Path) -> None:
    _, history = train(tmp_path, make_config(epochs=8, warmup_epochs=0, lr=0.2))
    accuracies = [row["test_accuracy"] for row in history]
    best = accuracies.index(max(accuracies)) + 1
    stored = load_model(tmp_path / "best.safetensors")
    assert stored.training["epochs_done"] == best
    assert measure_accuracy(stored.model, batches(IMAGES, TARGETS)).final == max(accuracies)
    assert load_model(tmp_path).training["epochs_done"] == 8


def test_cool_down_follows_the_epochs(tmp_path: Path) -> None:
    _, history = train(tmp_path, make_config(epochs=2, cooldown_epochs=2, min_lr=0.01))
    assert [row["lr"] for row in history[1:]] == pytest.approx([0.01] * 3)
    assert len(history) == 4


def test_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    first, history = train(tmp_path / "a", make_config())
    second, again = train(tmp_path / "b", make_config())
    other, _ = train(tmp_path / "c", make_config(seed=1))
    assert_same(dict(first.state_dict()), dict(second.state_dict()))
    assert without_cost(history) == without_cost(again)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("step", [1, 7])
def test_a_run_that_broke_off_is_usable_and_resumes_to_the_bit(tmp_path: Path, step: int) -> None:
    whole, history = train(tmp_path / "whole", make_config())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", make_config(), loader=Disturbed(make_config(), step, interrupt))
    assert load_model(tmp_path / "cut").training["epochs_done"] == step // 3
    resumed, rows = train(tmp_path / "cut", make_config(), resume=True)
    assert_same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert without_cost(rows) == without_cost(history)


def test_checkpoints_within_an_epoch(tmp_path: Path) -> None:
    config = make_config(recovery_interval=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, config, loader=Disturbed(config, 5, interrupt))
    assert (load_state(tmp_path) or {})["step"] == 4
    # How often it is saved does not change what comes out.
    resumed, _ = train(tmp_path, make_config(), resume=True)
    whole, _ = train(tmp_path / "whole", make_config())
    assert_same(dict(whole.state_dict()), dict(resumed.state_dict()))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model, history = train(tmp_path, make_config())
    again, rows = train(tmp_path, make_config(), resume=True)
    assert rows == history
    assert_same(dict(model.state_dict()), dict(again.state_dict()))


def test_a_run_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    train(tmp_path, make_config())
    with pytest.raises(ValueError, match=r"holds a run already; resume it"):
        train(tmp_path, make_config())
    with pytest.raises(ValueError, match=r"another kind: epochs was 4, is 5"):
        train(tmp_path, make_config(epochs=5), resume=True)


def test_a_checkpoint_of_another_network_is_refused_with_what_differs(tmp_path: Path) -> None:
    train(tmp_path, make_config())
    message = r"of another network: config.stages.1.active was 2, is 3; config.head_bias was False"
    stages = [dict(stage) for stage in make_model().config["stages"]]
    stages[1]["active"] = 3
    changed = type(make_model()).from_config(
        {**make_model().config, "stages": stages, "head_bias": True},
        [BOOK.from_words(["1110", "0111", "1011"])],
    )
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path, make_config(), resume=True, model=changed)
    assert "codebooks.0" in str(caught.value)


def test_a_signal_saves_after_the_step_and_resumes_to_the_bit(tmp_path: Path) -> None:
    config = make_config()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match="holds the state after step 6; the same") as caught:
        train(tmp_path / "cut", config, loader=Disturbed(config, 4, terminate))
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert (load_state(tmp_path / "cut") or {})["step"] == 6
    resumed, rows = train(tmp_path / "cut", config, resume=True)
    whole, history = train(tmp_path / "whole", config)
    assert_same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert without_cost(rows) == without_cost(history)


def test_a_signal_in_the_evaluation_repeats_it_and_nothing_else(tmp_path: Path) -> None:
    config, seen = make_config(epochs=2), []

    class Evaluated:
        def __iter__(self) -> Iterator[Any]:
            for batch in batches(IMAGES, TARGETS, 8):
                seen.append(len(batch[1]))
                if len(seen) == 2:
                    signal.raise_signal(signal.SIGINT)
                yield batch

    model = make_model()
    run = RunFolder(tmp_path, config.to_dict())
    with pytest.raises(TrainingStopped, match="after step 3") as caught:
        fit(model, make_loader(config), Evaluated(), config, run)
    assert caught.value.exit_code == 130
    # The second batch was the last that it looked at.
    assert seen == [8, 8]
    resumed, rows = train(tmp_path, config, resume=True)
    whole, history = train(tmp_path / "whole", config)
    assert_same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert without_cost(rows) == without_cost(history)


@pytest.mark.parametrize("step", [0, 4, 11])
def test_a_step_that_is_not_finite_leaves_the_weights_before_it(tmp_path: Path, step: int) -> None:
    config = make_config(model_ema=True)
    loader, model = Disturbed(config, step, spoil), make_model()
    message = (
        rf"step {step} \(epoch {step // 3 + 1}\) is not finite: first the coding loss of coded "
        rf"block 1; .* its images: sample \d+, .*non_finite.json lists all"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path / "spoiled", config, loader=loader, model=model)
    report = json.loads((tmp_path / "spoiled" / "non_finite.json").read_text())
    clean = make_loader(config)
    clean.set_epoch(step // 3 + 1, step % 3)
    assert report["images"] == clean.describe(next(iter(clean)).indices)

    # The state is that of a run which ended before this step.
    config_cut = replace(config, recovery_interval=1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", config_cut, loader=Disturbed(config, step, interrupt))
    state, expected = (load_state(tmp_path / name) or {} for name in ("spoiled", "cut"))
    assert state["step"] == expected["step"] == step
    assert without_cost(state["history"]) == without_cost(expected["history"])
    assert_same(state["model"], expected["model"])
    assert_same(state["average"], expected["average"])
    assert_same(state["optimizer"]["state"], expected["optimizer"]["state"])
    assert_same(dict(model.state_dict()), state["model"])
    assert_same(state["processes"][0]["statistics"], expected["processes"][0]["statistics"])
    assert_same(state["processes"][0]["sums"], expected["processes"][0]["sums"])


def test_a_loader_that_breaks_its_promise(tmp_path: Path) -> None:
    class Short(TrainingBatches):
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[Batch]:
            return iter(list(make_loader(make_config())))

    loader = Short(IMAGES, TARGETS, 8, seed=0)
    with pytest.raises(ValueError, match=r"train_loader: expected batches up to step 4, .* got 3"):
        train(tmp_path, make_config(), loader=loader)


def test_measuring_leaves_mode_and_statistics_alone() -> None:
    model = make_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    accuracy = measure_accuracy(model, batches(IMAGES, TARGETS))
    assert model.training
    assert_same(before, dict(model.state_dict()))
    model.eval()
    logits, energies = model(IMAGES, return_energies=True)
    assert accuracy.samples == 24
    assert accuracy.final == float((logits.argmax(1) == TARGETS).double().mean())
    decoded = (energies[0] @ BOOK.codewords.float().T).argmax(1)
    assert accuracy.early == (float((decoded == TARGETS).double().mean()),)
    with pytest.raises(ValueError, match="loader: expected at least one sample"):
        measure_accuracy(model, [])


def test_uneven_classes_have_a_balanced_accuracy_and_balanced_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm#1004, keras#5866: both as scikit-learn defines them."""
    metrics = pytest.importorskip("sklearn.metrics")
    utils = pytest.importorskip("sklearn.utils.class_weight")
    targets = torch.tensor([0] * 15 + [1] * 7 + [2] * 2)
    model = make_model()
    accuracy = measure_accuracy(model, batches(IMAGES, targets))
    expected = metrics.balanced_accuracy_score(targets, model.eval()(IMAGES).argmax(1))
    assert accuracy.balanced == pytest.approx(expected)
    steps = []

    class Seen(engine.TrainStep):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            steps.append(self)

    monkeypatch.setattr(engine, "TrainStep", Seen)
    config = make_config(class_weight="balanced")
    _, history = train(tmp_path, config, loader=TrainingBatches(IMAGES, targets, 8, seed=0))
    weights = utils.compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
    assert steps[0].loss.class_weight.tolist() == pytest.approx(weights.tolist())
    assert 0 <= history[-1]["test_balanced_accuracy"] <= 1
    with pytest.raises(ValueError, match="class_weight: expected none or balanced, got 'even'"):
        make_config(class_weight="even")


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_are_checked_where_the_data_is_loaded(tmp_path: Path, wrong: int) -> None:
    model, config = make_model(), make_config()
    targets = TARGETS.clone()
    targets[5] = wrong
    message = f"targets: expected classes 0 to 2, got {wrong}"
    with pytest.raises(ValueError, match=message):
        measure_accuracy(model, batches(IMAGES, targets))
    loader = TrainingBatches(IMAGES, targets, 8, seed=0)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, config, loader=loader)


def test_an_unwritable_folder_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    config = make_config()
    run = RunFolder(tmp_path / "run", config.to_dict())
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    loader = Disturbed(config, 0, interrupt)
    with pytest.raises(OSError, match="checkpoints"):
        fit(make_model(), loader, batches(IMAGES, TARGETS), config, run)


def test_a_plain_network_has_no_coding_columns(tmp_path: Path) -> None:
    config = make_config(epochs=1, warmup_epochs=0, model_ema=True)
    model = create_model("resnext_digits", num_classes=3)
    _, history = train(tmp_path, config, model=model)
    assert {"ema_test_accuracy", "train_accuracy"} < history[0].keys()
    assert not [name for name in history[0] if "coding" in name]


def test_dead_branches_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A branch whose weights are zero stays so: for all classes, in all epochs, by its number."""
    model = make_model(drop_branches=0.0)
    block = model.coded_blocks[0]
    with torch.no_grad():
        # Branch 2 of width 2; without decay and gradient it stays at zero.
        block.expand.weight[:, 4:6] = 0
    config = make_config(epochs=2, detect_dead_branches=True, weight_decay=0.0)
    block.expand.weight.register_hook(
        lambda g: g * (torch.arange(8) // 2 != 2)[:, None, None].float()
    )
    _, history = train(tmp_path, config, model=model)
    model.eval()
    _, (energies,) = model(IMAGES, return_energies=True)
    dead = (energies.amax(0) <= 1e-12).nonzero().flatten().tolist()
    assert 2 in dead
    assert len(dead) < 4
    assert history[-1]["dead_branches"] == len(dead)
    said = capsys.readouterr().err
    names = ", ".join(map(str, dead))
    assert f"dead branches of coded block 1, without energy for all classes: {names}\n" in said
    found = json.loads((tmp_path / "dead_branches.json").read_text())
    assert found == {"epoch": 2, "blocks": {"1": dead}}
    # It may be switched off when the run is resumed.
    train(tmp_path, replace(config, detect_dead_branches=False), model=model, resume=True)
    assert "dead branches" not in capsys.readouterr().err


def test_branches_that_live_for_one_class_are_not_dead() -> None:
    """A share of the energy that is small, and one sample of many, count."""
    model = make_model().eval()
    found = measure_accuracy(model, batches(IMAGES, TARGETS))
    _, (energies,) = model(IMAGES, return_energies=True)
    assert float(energies.amax(0).min()) > 1e-12
    assert found.dead_branches == ((),)
