"""`coded-resnext predict`: files and folders, exits, paths, and what is no image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from coded_resnext import EarlyExit, create_model
from coded_resnext.cli import main
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.deploy.early_exit import predict_early
from coded_resnext.interpret import trace
from coded_resnext.models.checkpoint import save_model
from coded_resnext.models.loss import read_class

PREPROCESSING = Preprocessing(6, 1, (0.3,), (0.4,))


def predict(*arguments: object) -> int:
    return main.main(["predict", *map(str, arguments)])


@pytest.fixture
def images(tmp_path):
    """Seven PNG files in a folder and one below it, beside a text file and a hidden one."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(7):
        pixels = random.integers(0, 256, (9, 7), dtype=np.uint8) // (1 + number % 3)
        parent = folder / "more" if number > 4 else folder
        Image.fromarray(pixels).save(parent / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


def read(folder):
    """Names and network input of the images, in the order of the command."""
    paths = sorted(path for path in folder.rglob("*.png") if not path.name.startswith("."))
    tensors = []
    for path in paths:
        with Image.open(path) as image:
            tensors.append(PREPROCESSING(image))
    return [str(path) for path in paths], torch.stack(tensors)


def test_a_folder(run_folder, network, images, capsys):
    assert predict(run_folder, images, "--json", "--batch-size", 3) == 0
    rows = json.loads(capsys.readouterr().out)
    names, x = read(images)
    assert len(names) == 7
    assert [row["file"] for row in rows] == names
    for row, image in zip(rows, x, strict=True):
        expected = trace(network, image)
        assert row["class"] == expected.prediction
        assert row["class_name"] == network.class_names[expected.prediction]
        assert row["exit_block"] is None
        assert row["path"] == [list(block.path) for block in expected.blocks]


@pytest.mark.parametrize("calibrated", [False, True])
def test_early(run_folder, network, images, capsys, calibrated):
    names, x = read(images)
    with torch.inference_mode():
        _, energies = network(x, return_energies=True)
    _, margins = read_class(energies[0], network.coded_blocks[0].codewords)
    # Between two images, so that some leave at the first block and some do not.
    margin = float(margins.sort().values[3:5].mean())
    criterion = EarlyExit.at_margin(network, margin)
    if calibrated:
        criterion.save(run_folder / "early_exit.json")
    early = ["--early"] if calibrated else ["--margin", margin]
    expected = predict_early(network, x, criterion)
    assert predict(run_folder, images, *early, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["class"] for row in rows] == expected.classes.tolist()
    assert [row["macs"] for row in rows] == expected.macs.tolist()
    exits = [3 if row["exit_block"] is None else row["exit_block"] - 1 for row in rows]
    assert exits == expected.exit_blocks.tolist()
    assert len(set(exits)) > 1
    for row, left in zip(rows, exits, strict=True):
        assert len(row["path"]) == min(left + 1, 3)
    assert predict(run_folder, names[0], *early) == 0
    output = capsys.readouterr().out
    assert "1 images at" in output
    assert "of the whole network's MACs" in output


def test_the_table(run_folder, network, images, capsys):
    names, _ = read(images)
    assert predict(run_folder, names[1], names[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [names[1], names[0]]
    assert all("classifier" in line and line.count("|") == 2 for line in lines)


def test_a_large_photograph(run_folder, network, tmp_path, capsys):
    """A JPEG of 24 megapixels in colour, for a network of 6x6 grey pixels."""
    gradient = np.linspace(0, 255, 6000, dtype=np.uint8)
    pixels = np.broadcast_to(gradient[None, :, None], (4000, 6000, 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "photo.JPG")
    assert predict(run_folder, tmp_path / "photo.JPG", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)
    with Image.open(tmp_path / "photo.JPG") as image:
        assert row["class"] == trace(network, PREPROCESSING(image)).prediction


def test_a_plain_network(tmp_path, images, capsys):
    model = create_model("resnext_digits")
    save_model(tmp_path / "model.safetensors", model, preprocessing=Preprocessing(8, 1, (0,), (1,)))
    assert predict(tmp_path, images, "--json") == 0
    assert all(row["path"] == [] for row in json.loads(capsys.readouterr().out))


def test_bad_requests(run_folder, network, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_text("no image")
    bare = tmp_path / "bare.safetensors"
    save_model(bare, network)
    image = next(images.glob("*.png"))
    for arguments, message in [
        ((run_folder, tmp_path / "none.png"), "expected an image or a folder, found none"),
        ((run_folder, tmp_path / "empty"), "expected a folder with images, found none in it"),
        ((run_folder, tmp_path / "bad.png"), "bad.png: not a readable image"),
        ((run_folder, images / "notes.txt"), "notes.txt: not a readable image"),
        ((bare, image), "RUN: expected a model with a preprocessing"),
        ((run_folder, image, "--early"), "--early: expected"),
        ((run_folder, image, "--margin", "-1"), "--margin: expected a number from 0 to 1"),
        ((run_folder, image, "--margin", "nan"), "--margin: expected a number from 0 to 1"),
        ((run_folder, image, "--batch-size", "0"), "--batch-size: expected at least 1, got 0"),
    ]:
        assert predict(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        # An unreadable image is named before.
        assert error.count("\n") == 1 + ("not a readable image" in message)
