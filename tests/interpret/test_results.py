"""An evaluation in a folder: JSON that is read back, CSV that says the same, and pictures."""

from __future__ import annotations

import base64
import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_networks import NAMES, make_data, make_network

from coded_resnext.data.batches import batches
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.interpret import (
    Evaluation,
    evaluate,
    load_evaluation,
    load_pictures,
    save_evaluation,
    save_pictures,
)
from coded_resnext.interpret.results import csv_tables, pictures_of, text_tables


@pytest.fixture(scope="module")
def found() -> Evaluation:
    """Of the small network, with images outside its classes."""
    network = make_network()
    data, outside = make_data(network, 50, seed=1), make_data(network, 20, seed=4)
    return evaluate(
        network, make_data(network, 70, seed=2), data, outside_loader=outside, repeats=2
    )


def test_saved_results_are_read_back(found, tmp_path):
    [path] = save_evaluation(found, tmp_path / "run")
    assert path.name == "evaluation.json"
    for place in (path, tmp_path / "run"):
        read = load_evaluation(place)
        assert read.to_dict() == found.to_dict()
        assert read.one_class == found.one_class
        assert read.removal == found.removal
        assert read.early_decoding == found.early_decoding
        assert text_tables(read) == text_tables(found)
    content = json.loads(path.read_text())
    # What a reader needs without the network.
    assert content["class_names"] == NAMES
    assert [content["codebooks"][b["codebook"]]["active"] for b in content["blocks"]] == [3, 3, 2]
    assert [block["block"] for block in content["blocks"]] == [1, 2, 4]
    assert content["cost"]["macs"] > 0
    assert sum(content["samples_per_class"]) == content["test_samples"] == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format_version=1), "format_version: expected 3, got 1"),
        (lambda content: content.pop("format_version"), "expected an object with a format_version"),
        (lambda content: content.pop("class_names"), r"evaluation\.class_names: expected a value"),
        (
            lambda content: content["removal"]["blocks"][0]["active"].update(accuracy=["x"]),
            r"evaluation\.removal\.blocks\[0\]\.active\.accuracy\[0\]: expected a number",
        ),
    ],
)
def test_damage_is_named(found, tmp_path, change, message):
    [path] = save_evaluation(found, tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        load_evaluation(tmp_path)
    assert str(path) in str(raised.value)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="not an evaluation"):
        load_evaluation(tmp_path)


def test_tables_say_the_numbers(found, tmp_path):
    saved = save_evaluation(found, tmp_path, csv=True)
    assert [path.name for path in saved] == ["evaluation.json", *csv_tables(found)]
    tables = {
        name: list(csv.DictReader(io.StringIO(text))) for name, text in csv_tables(found).items()
    }
    assert list(tables) == [
        f"{name}.csv" for name in ("classes", "blocks", "removal", "disobedient", "measured_on")
    ]
    for index, row in enumerate(tables["classes.csv"]):
        one = found.one_class.classifiers[index]
        assert row["class_name"] == NAMES[index]
        assert float(row["accuracy"]) == found.classification.class_accuracy[index]
        assert float(row["average_precision"]) == one.average_precision
        assert float(row["threshold"]) == one.threshold
        assert float(row["outside_accepted"]) == one.outside.accepted
        assert float(row["balanced_accuracy"]) == one.balanced_accuracy
        for name in ("precision", "recall", "f1", "balanced_accuracy"):
            assert float(row[f"outside_{name}"]) == getattr(one.outside, name)
        block = found.early_decoding.blocks[1]
        assert float(row["early_decoding_2"]) == block.class_accuracy[index]
    for index, row in enumerate(tables["blocks.csv"]):
        assert float(row["early_decoding"]) == found.early_decoding.block_accuracy[index]
        assert float(row["energy_outside_path"]) == found.paths.outside[index]
        found_correlation = found.semantics.blocks[index].codeword_correlation
        assert float(row["codeword_correlation"]) == found_correlation
    rows = [row for row in tables["removal.csv"] if row["coded_block"] == "3"]
    curve = found.removal.blocks[2].inactive
    assert [float(row["energy"]) for row in rows if row["kind"] == "inactive"] == list(curve.energy)
    assert len(tables["removal.csv"]) == 5 + 5 + 4
    assert int(tables["disobedient.csv"][0]["position"]) == found.paths.disobedient[0].position


def test_results_of_version_2_are_read(found, tmp_path):
    [path] = save_evaluation(found, tmp_path)
    content = json.loads(path.read_text())
    content |= {"format_version": 2, "available_samples": 50, "budget_seconds": None}
    path.write_text(json.dumps(content))
    assert load_evaluation(path).to_dict() == found.to_dict()
    # A limit of time left holes in it.
    content["removal"]["blocks"][0]["active"]["accuracy"][0] = None
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"accuracy\[0\]: expected a number, got None"):
        load_evaluation(path)


GREY = Preprocessing(6, 1, (0.3,), (0.4,))
COLOUR = Preprocessing(6, 3, (0.3, 0.4, 0.5), (0.2, 0.3, 0.4))


def decode(address: str) -> tuple[str, Image.Image]:
    """The kind and the picture."""
    head, encoded = address.split(",")
    assert head.startswith("data:image/")
    assert head.endswith(";base64")
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    image.load()
    return str(image.format), image


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR])
def test_small_pictures_have_the_very_pixels(preprocessing: Preprocessing) -> None:
    pixels = torch.randint(0, 256, (3, preprocessing.channels, 6, 6), dtype=torch.uint8)
    inputs = preprocessing.normalize(pixels.float() / 255)
    for address, expected in zip(pictures_of(inputs, preprocessing), pixels, strict=True):
        kind, image = decode(address)
        assert kind == "PNG"
        array = np.array(image)
        found = torch.from_numpy(array if array.ndim == 3 else array[:, :, None])
        assert torch.equal(found.permute(2, 0, 1), expected)


def test_large_pictures_are_made_small() -> None:
    inputs = COLOUR.normalize(torch.rand(1, 3, 200, 150))
    [address] = pictures_of(inputs, COLOUR)
    kind, image = decode(address)
    assert (kind, image.size) == ("JPEG", (72, 96))
    assert len(address) < 12_000


def test_intensities_outside_the_range_are_cut_off() -> None:
    [address] = pictures_of(torch.tensor([[[[-9.0, 9.0]]]]), GREY)
    assert np.array(decode(address)[1]).tolist() == [[0, 255]]


def test_chosen_places_are_written_and_read(tmp_path) -> None:
    images = GREY.normalize(torch.rand(30, 1, 6, 6))
    loader = batches(images, torch.zeros(30, dtype=torch.int64), 7)
    path = save_pictures([22, 3, 20], loader, GREY, tmp_path)
    pictures = load_pictures(path)
    assert list(pictures) == [3, 20, 22]
    for place, address in pictures.items():
        assert address == pictures_of(images[place : place + 1], GREY)[0]


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    loader = batches(torch.zeros(5, 1, 6, 6), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="positions: expected numbers below 5, got 7"):
        save_pictures([1, 7], loader, GREY, tmp_path)
    with pytest.raises(ValueError, match="images: expected 3 channels"):
        save_pictures([1], loader, COLOUR, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format_version": 2, "pictures": {}}',
        '{"format_version": 1, "pictures": {"x": "data:image/png;base64,"}}',
        '{"format_version": 1, "pictures": {"1": "https://example.org/a.png"}}',
        '{"format_version": 1, "pictures": {"1": 5}}',
    ],
)
def test_damaged_files_are_refused(tmp_path, content: str) -> None:
    path = tmp_path / "pictures.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"pictures.json: not a file of pictures"):
        load_pictures(path)
