"""`coded-resnext calibrate`: early exit for any run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.small_networks import make_network

from coded_resnext import EarlyExit
from coded_resnext.cli.main import main
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.models.checkpoint import save_model, weights_sha256


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run, and beside it a folder of images with parts `train` and `test`."""
    network = make_network()
    (tmp_path / "run").mkdir()
    save_model(
        tmp_path / "run" / "model.safetensors",
        network,
        preprocessing=Preprocessing(6, 1, (0.5,), (0.2,)),
    )
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name in network.class_names:
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(256, (6, 6), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return tmp_path


def calibrate(run: Path, data: str, *options: str) -> int:
    return main(["calibrate", str(run / "run"), str(run / data), *options])


def test_margins_for_a_run_on_a_folder_of_images(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every message sent all runs to a script for digits, which trained them on digits."""
    assert main(["predict", str(run / "run"), str(run / "data" / "test"), "--early"]) == 2
    assert "`coded-resnext calibrate RUN DATA` makes it" in capsys.readouterr().err
    assert calibrate(run, "data", "--max-accuracy-loss", "0.1") == 0
    assert "margins chosen on data test" in capsys.readouterr().out
    criterion = EarlyExit.load(run / "run" / "early_exit.json")
    assert criterion.weights_sha256 == weights_sha256(make_network())
    assert criterion.calibration["images"]["samples"] == 4 * len(make_network().class_names)
    assert main(["predict", str(run / "run"), str(run / "data" / "test"), "--early"]) == 0


@pytest.mark.long
def test_training_images_choose_no_margins(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(run / "run")
    assert main(["eval", folder, str(run / "data"), "--repeats", "1", "--out", folder]) == 0
    assert calibrate(run, "data/train") == 2
    assert "expected images that the network was not trained on" in capsys.readouterr().err
    assert not (run / "run" / "early_exit.json").exists()
    assert calibrate(run, "data") == 0
    assert "these are the test images of the run" in capsys.readouterr().out


def test_what_cannot_be_calibrated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(run, "data", "--max-accuracy-loss", "1") == 2
    assert "--max-accuracy-loss: expected a share" in capsys.readouterr().err
    assert calibrate(run, "nowhere") == 2
    assert json.dumps("expected a folder of images")[1:-1] in capsys.readouterr().err
