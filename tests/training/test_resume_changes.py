"""What a run may be resumed with: one outcome for each change, with and without other images."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from support.image_data import write_images
from support.tiny_training import IMAGES, TARGETS, assert_same, make_config, make_model, train

from coded_resnext import Codebook, CodedResNeXt, create_model
from coded_resnext.cli.train import Command, run_recipe
from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.batches import Batch, TrainingBatches, batches
from coded_resnext.data.datasets import Storage, load_dataset
from coded_resnext.data.loaders import EvalImages, TrainImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.models.checkpoint import load_model, save_model
from coded_resnext.training.config import TrainingConfig
from coded_resnext.training.engine import fit
from coded_resnext.training.processes import TrainingStopped
from coded_resnext.training.recipe import make_recipe
from coded_resnext.training.run_folder import RunFolder, load_state, save_state

ROOT = Path(__file__).parents[2]
# Two epochs of three steps. A signal comes before the fourth, and the next step hears of it.
CONFIG = make_config(epochs=2, warmup_epochs=0, batch_size=12)
STEPS, STOPPED_AFTER = 3, 5
PREPROCESSING = Preprocessing(6, 3, (0.5,) * 3, (0.25,) * 3)


@dataclass(frozen=True)
class Situation:
    """What a run is started or resumed with."""

    data: Path
    storage: Storage = "files"
    workers: int = 0
    config: TrainingConfig = CONFIG
    stem_channels: int = 8

    @property
    def ants(self) -> Path:
        return self.data / "train" / "ant"

    def go(self, run: Path, *, stop: bool = False, **options: Any) -> CodedResNeXt:
        """Trains to the end, or to the signal; the network."""
        splits = load_dataset("folder", self.data, storage=self.storage)
        loader = (Stopping if stop else TrainImages)(
            splits.train,
            TrainTransform(Augmentation(crop_padding=1), PREPROCESSING),
            CONFIG.batch_size,
            seed=0,
            workers=self.workers,
        )
        model = make_model(in_channels=3, stem_channels=self.stem_channels)
        folder = RunFolder(run, self.config.to_dict(), resume=True)
        fit(model, loader, EvalImages(splits.test, PREPROCESSING), self.config, folder, **options)
        return model


class Stopping(TrainImages):
    """Sends a signal before the fourth step of a run."""

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(super().__iter__(), (self.epoch - 1) * STEPS):
            if number == STOPPED_AFTER - 2:
                signal.raise_signal(signal.SIGTERM)
            yield batch


def move(before: Situation) -> Situation:
    data = before.data.with_name("moved")
    before.data.rename(data)
    return replace(before, data=data)


def add(before: Situation) -> None:
    for index in range(12):
        shutil.copy(before.ants / "00000.bmp", before.ants / f"1{index:04d}.bmp")


def remove(before: Situation) -> None:
    for path in (before.data / "train").glob("*/0000[0-3].bmp"):
        path.unlink()


def rename(before: Situation) -> None:
    (before.ants / "00000.bmp").rename(before.ants / "x.bmp")


def relabel(before: Situation) -> None:
    (before.ants / "00000.bmp").rename(before.data / "train" / "bee" / "x.bmp")


def exchange(before: Situation) -> None:
    Image.new("RGB", (7, 7)).save(before.ants / "00000.bmp")


def invert(before: Situation) -> None:
    """The files keep their names and, as they are not compressed, their sizes."""
    for path in before.ants.glob("*.bmp"):
        ImageOps.invert(Image.open(path)).save(path)


def remove_test_image(before: Situation) -> None:
    (before.data / "test" / "ant" / "00000.bmp").unlink()


def exchange_test_image(before: Situation) -> None:
    Image.new("RGB", (7, 7)).save(before.data / "test" / "ant" / "00000.bmp")


CHANGES: dict[str, Callable[[Situation], Situation | None]] = {
    "nothing": lambda before: before,
    "the images lie in another folder": move,
    "`storage`": lambda before: replace(before, storage="memory"),
    "`workers`": lambda before: replace(before, workers=1),
    "`log_interval`": lambda before: replace(before, config=replace(CONFIG, log_interval=1)),
    "a test image is removed": remove_test_image,
    "a test image is another one": exchange_test_image,
    "a training image has another name": rename,
    "a training image has another class": relabel,
    "a training image is another one": exchange,
    "other images under the same names": invert,
    "training images are added": add,
    "training images are removed": remove,
    "`lr`": lambda before: replace(before, config=replace(CONFIG, lr=0.01)),
    "the network": lambda before: replace(before, stem_channels=16),
}


def outcome(situation: Situation, run: Path, whole: CodedResNeXt, **options: Any) -> str:
    try:
        model = situation.go(run, **options)
    except ValueError:
        return "refused"
    state = load_state(run)
    assert state is not None
    assert len(state["history"]) == CONFIG.epochs
    if state["restarted"]:
        steps_per_epoch = state["data"]["steps_per_epoch"]
        assert state["restarted"] == STOPPED_AFTER - steps_per_epoch
        # The newest state is the last one by its name.
        assert state["step"] == CONFIG.epochs * steps_per_epoch
        return "the epoch anew"
    assert_same(model.state_dict(), whole.state_dict())
    return "goes on"


@pytest.mark.long
def test_what_a_run_may_be_resumed_with(tmp_path: Path) -> None:
    """litData#436, tensorflow#41571: other images were taken without a word, in another place.

    docs/reliability.md has the table as it comes out here; "goes on" is to the bit.
    """
    for split, count in (("train", 12), ("test", 2)):
        write_images(tmp_path / "data" / split, {"ant": count, "bee": count, "cat": count}, size=6)
    for path in tmp_path.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    start = Situation(tmp_path / "data")
    whole = start.go(tmp_path / "whole")
    with pytest.raises(TrainingStopped):
        start.go(tmp_path / "stopped", stop=True)
    lines = ["| changed | `--resume` | with `--other-images` |", "|---|---|---|"]
    for number, (change, apply) in enumerate(CHANGES.items()):
        cells = []
        for other in (False, True):
            here = tmp_path / f"{number}-{other}"
            shutil.copytree(tmp_path / "data", here / "data")
            shutil.copytree(tmp_path / "stopped", here / "run")
            before = replace(start, data=here / "data")
            situation = apply(before) or before
            cells.append(outcome(situation, here / "run", whole, other_images=other))
        lines.append(f"| {change} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    assert table in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_tensors_in_memory_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    """litData#436: as many images and the same names are not the same images."""
    config = make_config(epochs=1, warmup_epochs=0)

    def go(images: torch.Tensor, *, resume: bool) -> None:
        loader = TrainingBatches(images, TARGETS, config.batch_size, seed=0)
        run = RunFolder(tmp_path, {}, resume=resume)
        fit(make_model(), loader, batches(IMAGES, TARGETS), config, run)

    go(IMAGES, resume=False)
    go(IMAGES, resume=True)
    with pytest.raises(ValueError, match=r"trained on other images: content was .*--other-images"):
        go(IMAGES.flip(0), resume=True)


def test_the_best_model_is_chosen_by_the_test_images_of_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """keras#12669's kind: an accuracy on other images was never reached again, nor compared."""
    config = make_config(epochs=2, warmup_epochs=0)

    class Signalling(TrainingBatches):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                if self.epoch == 2 and stopping:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

    def go(images: torch.Tensor, **options: Any) -> None:
        loader = Signalling(IMAGES, TARGETS, config.batch_size, seed=0)
        run = RunFolder(tmp_path, {}, resume=True)
        fit(make_model(), loader, batches(images, TARGETS[: len(images)]), config, run, **options)

    stopping = True
    with pytest.raises(TrainingStopped):
        go(IMAGES)
    stopping = False
    state = load_state(tmp_path)
    assert state is not None
    state["history"][0]["test_accuracy"] = 1.0
    save_state(tmp_path, f"step-{state['step'] + 1:09d}-epochs-00001", state)
    with pytest.raises(ValueError, match=r"tested on other images: images was 24, is 21"):
        go(IMAGES[:21])
    go(IMAGES[:21], other_images=True)
    assert "accuracies up to epoch 1 are of those" in capsys.readouterr().err
    best = load_model(tmp_path / "best.safetensors").training
    assert best["epochs_done"] == 2


def test_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    """mmaction2#1781: the resumed run trained the stem without a word."""
    model = make_model().train()
    model.stem.requires_grad_(False)
    model.stem.eval()
    train(tmp_path, make_config(epochs=1, warmup_epochs=0, cooldown_epochs=1), model=model)
    states = sorted((tmp_path / "checkpoints").glob("step-*"))
    for path in states:
        if "epochs-00002" in path.name:
            path.unlink()
    resumed, _ = train(
        tmp_path, make_config(epochs=1, warmup_epochs=0, cooldown_epochs=1), resume=True
    )
    assert not any(p.requires_grad for p in resumed.stem.parameters())
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("source", ["initial_checkpoint", "codebooks"])
def test_a_checkpoint_needs_no_other_file(tmp_path: Path, source: str) -> None:
    """PyTorch_YOLOv4#378, nncf#2047, ultralytics#25812: not the one that the run started from."""
    names = ["ant", "bee", "cat"]
    for split in ("train", "test"):
        write_images(tmp_path / "data" / split, dict.fromkeys(names, 4), size=8)
    usual = create_model("coded_resnext17_10x4d", num_classes=3, class_names=names)
    books = [Codebook.from_words(book.words[::-1], names) for book in usual.stage_codebooks]
    files = [tmp_path / f"{index}.json" for index in range(len(books))]
    if source == "codebooks":
        for book, path in zip(books, files, strict=True):
            book.save(path)
    else:
        files = [tmp_path / "model.safetensors"]
        model = create_model("coded_resnext17_10x4d", num_classes=3, codebooks=books)
        save_model(files[0], model)
    recipe = make_recipe(
        {"data_dir": str(tmp_path / "data"), "img_size": 8, "workers": 0, "batch_size": 4},
        {"model": "coded_resnext17_10x4d", "epochs": 1, "lr": 0.01},
        {source: str(files[0]) if source == "initial_checkpoint" else list(map(str, files))},
    )

    def go(*, resume: bool) -> None:
        run_recipe(Command(recipe, tmp_path / "run", resume=resume, evaluation=False, device="cpu"))

    go(resume=False)
    for path in files:
        path.unlink()
    go(resume=True)
    assert load_model(tmp_path / "run").model.stage_codebooks == tuple(books)
