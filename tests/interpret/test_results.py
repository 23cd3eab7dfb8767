"""An evaluation in a folder: JSON that is read back, CSV that says the same."""

from __future__ import annotations

import csv
import io
import json

import pytest
from support.small_networks import NAMES, make_data, make_network

from coded_resnext.interpret import Evaluation, evaluate, load_evaluation, save_evaluation
from coded_resnext.interpret.tables import csv_tables


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
        assert str(read) == str(found)
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
        (lambda content: content.update(format_version=1), "format_version: expected 2, got 1"),
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
    assert list(tables) == ["classes.csv", "blocks.csv", "removal.csv", "disobedient.csv"]
    for index, row in enumerate(tables["classes.csv"]):
        one = found.one_class.classifiers[index]
        assert row["class_name"] == NAMES[index]
        assert float(row["accuracy"]) == found.classification.class_accuracy[index]
        assert float(row["average_precision"]) == one.average_precision
        assert float(row["threshold"]) == one.threshold
        assert float(row["outside_accepted"]) == one.outside.accepted
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
