"""Situations of public bug reports of other projects: what a run must not do silently."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_data import write_images
from support.tiny_training import IMAGES, TARGETS, make_config, make_loader, make_model, train
from torch import nn

import coded_resnext.training.engine as engine
from coded_resnext import Codebook, create_model, extract_classifier
from coded_resnext.cli.train import Command, run_recipe, start_from
from coded_resnext.cli.train import make_model as network_of
from coded_resnext.data.batches import TrainingBatches, batches
from coded_resnext.data.datasets import load_dataset
from coded_resnext.deploy.early_exit import EarlyExit, exit_scores, predict_early
from coded_resnext.interpret import trace
from coded_resnext.models.checkpoint import load_model, save_model
from coded_resnext.training.config import TrainingConfig
from coded_resnext.training.engine import fit, measure_accuracy
from coded_resnext.training.processes import TrainingStopped
from coded_resnext.training.recipe import make_recipe
from coded_resnext.training.run_folder import RunFolder, load_state


def test_nan_is_no_accuracy() -> None:
    """keras#1925, spoter#15: argmax of NaN is a class, and may be the right one."""
    model = make_model()
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"logits; head\.weight of the network is not"):
        measure_accuracy(model, batches(IMAGES, TARGETS))


@pytest.mark.parametrize(
    "decide",
    [
        lambda model, x: predict_early(model, x, EarlyExit.at_margin(model, 1.0)),
        lambda model, x: exit_scores(model, [(x, TARGETS[: len(x)])]),
        lambda model, x: trace(model, x[1]),
        lambda model, x: extract_classifier(model, 1, threshold=0.0).predict(x),
    ],
    ids=["early exit", "margins", "trace", "one class"],
)
def test_nan_decides_nothing(decide: Callable[..., object]) -> None:
    """keras#1925's kind: a class, an exit, a margin or a no of what is not finite."""
    model, x = make_model().eval(), IMAGES[:3].clone()
    decide(model, x)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="model: expected finite results, got NaN or infinity"):
        decide(model, x)
    broken = "expand_bn.running_var of the network is not"
    model.coded_blocks[-1].expand_bn.running_var.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"{broken}|{broken.split('.')[0]}"):
        decide(model, IMAGES[:3])


def test_running_statistics_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    """keras#1925: training never looks at them, and evaluation is void."""
    model = make_model()
    model.blocks[-1].expand_bn.running_var.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="running statistics"):
        train(tmp_path, make_config(), model=model)
    assert not (tmp_path / "best.safetensors").exists()


def test_a_run_goes_on_with_the_images_that_it_began_with(tmp_path: Path) -> None:
    """litData#436, tensorflow#41571: fewer images, and epochs without a step."""
    config = make_config(epochs=2)

    def go(images: int, *, resume: bool) -> None:
        loader = TrainingBatches(IMAGES[:images], TARGETS[:images], config.batch_size, seed=0)
        run = RunFolder(tmp_path, {}, resume=resume)
        fit(make_model(), loader, batches(IMAGES, TARGETS), config, run)

    go(24, resume=False)
    with pytest.raises(ValueError, match="images was 24, is 16"):
        go(16, resume=True)


def test_a_start_that_failed_is_no_run(tmp_path: Path) -> None:
    """mindshub#791, instructlab#1416, photon-ml#207: without a checkpoint it can be begun again."""
    RunFolder(tmp_path, {"batch_size": 64})
    RunFolder(tmp_path, {"batch_size": 16})
    train(tmp_path / "run", make_config(epochs=1, warmup_epochs=0))
    with pytest.raises(ValueError, match="holds a run already"):
        RunFolder(tmp_path / "run", {})


@given(
    warmup=st.floats(0, 3.9),
    steps=st.integers(1, 40),
    low=st.floats(0, 1),
    first=st.floats(0.001, 1),
    prefix=st.booleans(),
    by_steps=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_no_learning_rate_is_above_lr(
    warmup: float, steps: int, low: float, first: float, prefix: bool, by_steps: bool
) -> None:
    """DeepSpec#32, MIL_BASELINE#47: a warm-up that is no whole number of steps overshoots."""
    config = TrainingConfig(
        4,
        8,
        lr=0.1,
        min_lr=0.1 * low,
        warmup_epochs=warmup,
        warmup_lr=0.0 if by_steps and prefix else 0.1 * first,
        warmup_prefix=prefix,
        sched_on_updates=by_steps,
        cooldown_epochs=1,
    )
    rates = [config.lr_at(step, steps) for step in range(5 * steps)]
    lowest = min(config.min_lr, config.warmup_lr or config.min_lr, rates[0])
    assert lowest * (1 - 1e-12) <= min(rates) <= max(rates) <= 0.1 * (1 + 1e-12)
    # Epoch by epoch, an epoch that began before the end of the warm-up belongs to it.
    risen = int(warmup * steps) if by_steps else math.ceil(warmup) * steps
    falling = math.ceil(warmup * steps) if by_steps else risen
    assert all(before <= after for before, after in pairwise(rates[:risen]))
    # To a rounding of the cosine.
    assert all(before >= after - 1e-12 for before, after in pairwise(rates[falling:]))
    last = 4 * steps - (by_steps and 4 * steps - 1 > warmup * steps)
    assert rates[last:] == pytest.approx([0.1 * low] * (5 * steps - last))
    if prefix and by_steps:
        # Continuous: no step is steeper than the warm-up or the middle of the cosine.
        cosine = max(4 * steps - 1 - warmup * steps, 1)
        steepest = 0.1 * max(1 / max(warmup * steps, 1), math.pi / 2 / cosine)
        assert all(abs(b - a) <= steepest * (1 + 1e-9) for a, b in pairwise(rates))
    elif not by_steps:
        assert all(len(set(rates[i : i + steps])) == 1 for i in range(0, 5 * steps, steps))


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"min_lr": 1.0}, "min_lr"), ({"epochs": 1.5}, "epochs")],
)
def test_settings_are_checked_where_they_come_in(changes: dict[str, Any], name: str) -> None:
    """fairseq#2916, gpt-neox#1008: a smallest rate above the largest makes the rate rise."""
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make_config(**{"warmup_epochs": 0, **changes})


def test_each_module_keeps_its_mode() -> None:
    """lightning#18930, #2551, #18951, avalanche#772: what was frozen stays, after an error too."""
    model = make_model().train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    measure_accuracy(model, batches(IMAGES, TARGETS))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="targets"):
        measure_accuracy(model, [(IMAGES[:1], torch.tensor([10]))])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("where", ["training", "test"])
def test_a_sample_without_a_label_is_refused_in_a_run(tmp_path: Path, where: str) -> None:
    """pytorch#135546's kind: -100 passed the check, and ended in an index out of range."""
    config = make_config(epochs=1, warmup_epochs=0)
    targets = {"training": TARGETS.clone(), "test": TARGETS.clone()}
    targets[where][-1] = -100
    loader = TrainingBatches(IMAGES, targets["training"], config.batch_size, seed=0)
    tested = batches(IMAGES, targets["test"])
    with pytest.raises(ValueError, match="targets: expected classes 0 to 2, got -100"):
        fit(make_model(), loader, tested, config, RunFolder(tmp_path, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: nn.DataParallel(model), "expected a CodedResNeXt, .* got DataParallel"),
        (lambda model: torch.compile(model, backend="eager"), "got OptimizedModule"),
        (lambda model: model.requires_grad_(False), "expected a parameter to train"),
    ],
)
def test_what_cannot_be_trained_is_said_at_once(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    """timm#1454's kind: AttributeError, TypeError and RuntimeError from somewhere within."""
    config, tested = make_config(), batches(IMAGES, TARGETS)
    with pytest.raises(ValueError, match=f"model: .*{message}"):
        fit(change(make_model()), make_loader(config), tested, config, RunFolder(tmp_path, {}))


def test_a_frozen_batch_norm_is_not_trained(tmp_path: Path) -> None:
    """mmaction2#1781: its statistics are those that it had."""
    model = make_model().train()
    model.stem.eval()
    before = {k: v.clone() for k, v in model.stem.named_buffers()}
    train(tmp_path, make_config(epochs=1, warmup_epochs=0), model=model)
    for name, buffer in model.stem.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_a_signal_in_the_last_save_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """spd#677, #741: a request that was noted is obeyed."""
    save = engine._Training._save

    def last(self: engine._Training, *, models: bool = False) -> None:
        save(self, models=models)
        if self.history:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(engine._Training, "_save", last)
    with pytest.raises(TrainingStopped):
        train(tmp_path, make_config(epochs=1, warmup_epochs=0))


def test_an_evaluation_that_fails_does_not_cost_the_epoch(tmp_path: Path) -> None:
    """fairseq#2140: the state is saved before."""
    config = make_config(epochs=1, warmup_epochs=0)
    loader = make_loader(config)
    with pytest.raises(ValueError, match="targets"):
        fit(
            make_model(), loader, [(IMAGES[:1], torch.tensor([9]))], config, RunFolder(tmp_path, {})
        )
    state = load_state(tmp_path)
    assert state is not None
    assert state["step"] == len(loader)


@pytest.mark.parametrize("outside", ["nowhere", "empty", "cifar10"])
def test_outside_images_that_are_not_there_are_said_before_the_training(
    tmp_path: Path, outside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairseq#2140's kind: what only the evaluation needs failed when all epochs were done."""
    for split in ("train", "test"):
        write_images(tmp_path / split, {"a": 4, "b": 4})
    (tmp_path / "empty").mkdir()
    recipe = make_recipe(
        {"data_dir": str(tmp_path), "img_size": 8, "workers": 0},
        {"model": "coded_resnext17_10x4d", "epochs": 1, "batch_size": 4, "lr": 0.1},
    )
    monkeypatch.setattr("coded_resnext.cli.train.fit", lambda *_, **__: pytest.fail("trained"))
    name = outside if outside == "cifar10" else str(tmp_path / outside)
    command = Command(recipe, tmp_path / "run", False, True, "cpu", outside=name)
    with pytest.raises((FileNotFoundError, ValueError), match=outside):
        run_recipe(command)


def test_a_calibration_sees_every_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmdetection#259, SinglePathOneShot#4: the head of a sorted set is one class."""
    for split in ("train", "test"):
        write_images(tmp_path / split, {"a": 20, "b": 20, "c": 20})
    plain = create_model("resnext17_10x4d", num_classes=3)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    recipe = make_recipe(
        {"data_dir": str(tmp_path), "img_size": 8, "workers": 0, "validation_batch_size": 4},
        {"model": "coded_resnext17_10x4d", "initial_checkpoint": str(tmp_path / "plain.pth")},
        {"epochs": 1, "batch_size": 4, "lr": 0.1},
    )
    classes: list[int] = []

    class LookedAtError(Exception):
        pass

    def look(_: object, loader: Any) -> int:
        classes.extend(target for _, targets in loader for target in targets.tolist())
        raise LookedAtError

    monkeypatch.setattr("coded_resnext.cli.train.CALIBRATION_IMAGES", 12)
    monkeypatch.setattr("coded_resnext.cli.train.recalibrate_batch_norm", look)
    command = Command(recipe, tmp_path / "run", resume=False, evaluation=False, device="cpu")
    with pytest.raises(LookedAtError):
        run_recipe(command)
    assert [classes.count(index) for index in range(3)] == [4, 4, 4]


def test_labels_of_an_archive_may_be_a_column(tmp_path: Path) -> None:
    """keras#12669, sdc-issue-reports#399: Keras writes [n, 1]; what is no class is refused."""
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    labels = np.array([0, 1, 0, 1])
    arrays = {
        "x_train": pixels,
        "x_test": pixels,
        "y_test": labels,
        "classes": np.array(["a", "b"]),
    }
    path = tmp_path / "cifar10.npz"
    np.savez(path, **arrays, y_train=labels[:, None])
    assert load_dataset("cifar10", tmp_path).train.targets.tolist() == [0, 1, 0, 1]
    np.savez(path, **arrays, y_train=np.eye(4))
    with pytest.raises(ValueError, match=r"cifar10\.npz.*class numbers"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("linked", ["checkpoints", ".lock"])
def test_a_link_in_a_runs_folder_is_refused(tmp_path: Path, linked: str) -> None:
    """queens#277, SDL#11887: a handed-over run neither deletes nor writes outside its folder."""
    outside = tmp_path / "outside"
    if linked == "checkpoints":
        outside.mkdir()
        (outside / "thesis.tex").write_text("precious")
    else:
        outside.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / linked).symlink_to(outside)
    with pytest.raises(ValueError, match=r"got links?: |got a link"):
        train(run, make_config(epochs=1, warmup_epochs=0))
    kept = outside / "thesis.tex" if outside.is_dir() else outside
    assert kept.read_text() == "precious"


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    """SDL#11887: what a user keeps beside them stays."""
    (tmp_path / "checkpoints").mkdir()
    note = tmp_path / "checkpoints" / "notes.txt"
    note.write_text("mine")
    RunFolder(tmp_path, {}).save_state("step-000000001", {"step": 1})
    assert note.read_text() == "mine"


@pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors", "epoch 7.pth"])
def test_a_model_file_is_known_by_what_it_says(name: str, tmp_path: Path) -> None:
    """lightly-train#985, #982, timm#1817, mattergen#57: the old classifier stood for new classes,
    and the codebook was lost, where the file had another name.
    """
    recipe = make_recipe(
        {"data_dir": str(tmp_path), "img_size": 8},
        {"model": "coded_resnext17_10x4d", "initial_checkpoint": str(tmp_path / name)},
        {"epochs": 1, "batch_size": 4, "lr": 0.1},
    )
    own = create_model("coded_resnext17_10x4d", num_classes=3, class_names=list("abc"))
    books = [Codebook(book.codewords.flip(1), book.class_names) for book in own.stage_codebooks]
    source = create_model(
        "coded_resnext17_10x4d", num_classes=3, class_names=list("abc"), codebooks=books
    )
    save_model(tmp_path / name, source)
    calibration: Any = []
    for names in ("abc", "cba"):
        model = network_of(recipe, list(names))
        fresh = model.head.weight.detach().clone()
        said = start_from(model, recipe.model, calibration)
        assert "measured" not in said
        same = names == "abc"
        assert torch.equal(model.head.weight, source.head.weight if same else fresh)
        assert ([b.words for b in model.stage_codebooks] == [b.words for b in books]) == same
        assert torch.equal(model.stem[0].weight, source.stem[0].weight)


def test_test_batches_must_last_for_all_epochs(tmp_path: Path) -> None:
    """A generator is empty after the first epoch: the second one was trained and then lost."""
    config = make_config(epochs=1, warmup_epochs=0)
    run = RunFolder(tmp_path, {})
    with pytest.raises(ValueError, match="test_loader: expected batches that can be iterated"):
        fit(make_model(), make_loader(config), iter(batches(IMAGES, TARGETS)), config, run)


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_labels_may_be_of_any_integer_type(tmp_path: Path, mixup: float) -> None:
    """torchvision makes probabilities of int64 labels alone."""
    config = make_config(epochs=1, warmup_epochs=0, mixup=mixup)
    loader = TrainingBatches(IMAGES, TARGETS.int(), config.batch_size, seed=0)
    train(tmp_path, config, loader=loader)


@pytest.mark.parametrize("warmup", [False, True])
def test_an_average_that_cannot_follow_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], warmup: bool
) -> None:
    """A decay of 0.9998 needs thousands of steps: the average of a short run stays at chance."""
    config = make_config(epochs=1, warmup_epochs=0, model_ema=True, model_ema_warmup=warmup)
    train(tmp_path, config)
    said = capsys.readouterr().err
    assert ("model_ema_decay: after the 3 steps" in said) != warmup


def test_the_average_counts_the_batches_that_it_has_seen(tmp_path: Path) -> None:
    """`num_batches_tracked` stayed 0: what is not averaged is copied."""
    config = make_config(epochs=1, warmup_epochs=0, model_ema=True)
    train(tmp_path, config)
    counts = [
        int(block.num_batches_tracked)
        for name in ("model", "model_ema")
        for block in load_model(tmp_path / f"{name}.safetensors").model.modules()
        if isinstance(block, torch.nn.BatchNorm2d)
    ]
    assert set(counts) == {3}


def test_a_run_folder_that_cannot_be_written_whole_is_refused(tmp_path: Path) -> None:
    """pyload#4523: TensorBoard failed on its name, and no file was named."""
    with pytest.raises(ValueError, match=r"out: expected UTF-8.*run.udcff"):
        RunFolder(tmp_path / os.fsdecode(b"run\xff"), {})
