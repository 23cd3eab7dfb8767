"""Eleven kinds of bad image in training, evaluation and `predict`: one behaviour, documented."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.bad_images import BAD_IMAGES, FAILING, GREY, BadImage
from support.small_networks import make_network

from coded_resnext.cli import main
from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.datasets import find_image_folder, load_dataset
from coded_resnext.data.image_sets import DamagedImages
from coded_resnext.data.loaders import EvalImages, TrainImages
from coded_resnext.data.on_device import StreamedTrainImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.models.checkpoint import save_model

PREPROCESSING = Preprocessing(16, 1, (0.0,), (1.0,))
COLOUR = Preprocessing(16, 3, (0.0,) * 3, (1.0,) * 3)
GOOD = 9
here = [
    pytest.param(
        bad,
        id=bad.name,
        marks=pytest.mark.skipif(
            bad.name == "unreadable.png" and not FAILING.exists(), reason="no such device"
        ),
    )
    for bad in BAD_IMAGES
]
every_kind = pytest.mark.parametrize("bad", here)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`train` and `test` with ten images in each of two classes, one of which may go bad."""
    for split in ("train", "test"):
        for label in ("ant", "bee"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for index in range(GOOD):
                Image.fromarray(GREY).save(folder / f"z{index}.png")
    return tmp_path / "data"


def close(pixels: torch.Tensor, bad: BadImage) -> bool:
    """The pixels that the file is to show, but for JPEG's losses."""
    assert bad.intensity is not None
    expected = torch.from_numpy(bad.intensity()) / 255
    return bool((pixels - expected).abs().max() < 0.06)


@every_kind
@pytest.mark.parametrize("storage", ["files", "memory"])
@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_in_training(
    bad: BadImage, storage: str, augment_on: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found at the start, it is refused there; met, it is left out, counted and named."""

    def make_loader(max_damaged: float) -> TrainImages:
        options: dict[str, Any] = {"seed": 0, "max_damaged": max_damaged}
        if augment_on == "device":
            options["device"] = torch.device("cpu")
            return StreamedTrainImages(splits.train, Augmentation(), COLOUR, 4, **options)
        transform = TrainTransform(Augmentation(), COLOUR)
        return TrainImages(splits.train, transform, 4, **options)

    path = data / "train" / "ant" / bad.name
    bad.make(path)
    if bad.noticed == "start":
        with pytest.raises(ValueError, match=bad.name):
            load_dataset("folder", data, storage=storage, max_damaged=0.2)
        return
    splits = load_dataset("folder", data, storage=storage, max_damaged=0.2)
    # The first of the class by name, but in memory where it was left out.
    present = [i for i in range(len(splits.train)) if splits.train.name(i) == str(path)]
    if bad.noticed == "read":
        pixels = torch.from_numpy(np.asarray(splits.train.image(present[0]), np.float32)) / 255
        assert all(close(pixels[..., channel], bad) for channel in range(3))
    loader = make_loader(0.2)
    seen = torch.cat([batch.images for batch in loader])
    assert seen.isfinite().all()
    noted = bad.name in capsys.readouterr().err
    assert noted == (bad.noticed == "met")
    assert bool(loader.damaged.reasons) == (bad.noticed == "met" and storage == "files")
    # No allowance: too many damaged images end the run, with their names.
    if bad.noticed == "met" and storage == "files":
        with pytest.raises(ValueError, match=rf"max_damaged.*{bad.name}"):
            list(make_loader(0))


@every_kind
def test_in_evaluation(bad: BadImage, data: Path) -> None:
    """As in training; without an allowance, what cannot be read is an error that names it."""
    bad.make(data / "test" / "ant" / bad.name)
    if bad.noticed == "start":
        with pytest.raises(ValueError, match=bad.name):
            find_image_folder(data / "test", ["ant", "bee"])
        return
    of_network = find_image_folder(data / "test", ["ant", "bee"]).test
    in_files = load_dataset("folder", data, storage="files").test
    in_memory = load_dataset("folder", data, storage="memory").test
    for images, preprocessing in (
        (of_network, PREPROCESSING),
        (in_files, COLOUR),
        (in_memory, COLOUR),
    ):
        evaluated = torch.cat([x for x, _ in EvalImages(images, preprocessing, 4)])
        assert len(evaluated) == 2 * GOOD + (bad.noticed == "read")
        assert bad.noticed == "met" or close(evaluated[0, -1], bad)
    if bad.noticed == "met":
        with pytest.raises(ValueError, match=bad.name):
            list(EvalImages(in_files, COLOUR, 4, damaged=DamagedImages(in_files, 0)))
        with pytest.raises(ValueError, match=bad.name):
            load_dataset("folder", data, storage="memory", max_damaged=0)


@every_kind
def test_in_predict(bad: BadImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / bad.name
    bad.make(path)
    model = make_network()
    save_model(tmp_path / "m.safetensors", model, preprocessing=PREPROCESSING)
    status = main.main(["predict", str(tmp_path / "m.safetensors"), str(path), "--json"])
    said = capsys.readouterr()
    assert (status == 0) == (bad.noticed == "read")
    if bad.noticed == "read":
        Image.fromarray(GREY).save(tmp_path / "plain.png")
        main.main(
            ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "plain.png"), "--json"]
        )
        plain = capsys.readouterr().out
        assert plain.replace("plain.png", bad.name) == said.out
    else:
        assert bad.name in said.err


def test_a_pipe_is_not_waited_for(data: Path) -> None:
    os.mkfifo(data / "train" / "ant" / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: expected an image, got something else"):
        load_dataset("folder", data)


def test_a_file_that_may_not_be_read_is_found_at_the_start(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user who is not the administrator. What all may read is not asked about."""
    next(data.rglob("z3.png")).chmod(0o600)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "z3.png")
    with pytest.raises(ValueError, match=r"z3\.png: .* may be read"):
        load_dataset("folder", data)


def test_every_kind_is_documented() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for bad in BAD_IMAGES:
        assert f"`{bad.name}`" in text
