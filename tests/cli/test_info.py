"""`coded-resnext info`: the account of a run."""

from __future__ import annotations

import json

import pytest

from coded_resnext import EarlyExit, create_model, extract_classifier
from coded_resnext.cli import main
from coded_resnext.deploy.cost import network_cost
from coded_resnext.models.checkpoint import save_model


def info(*arguments: object) -> int:
    return main.main(["info", *map(str, arguments)])


def test_numbers(run_folder, network, capsys):
    EarlyExit((0.5, None, 0.125)).save(run_folder / "early_exit.json")
    assert info(run_folder, "--json", "--latency", "--image-size", 12) == 0
    content = json.loads(capsys.readouterr().out)
    whole = network_cost(network, 12)
    part = network_cost(extract_classifier(network, 0), 12)
    assert content["image_size"] == 12
    assert content["cost"] == whole.to_dict()
    assert content["classifier"]["cost"] == part.to_dict()
    assert content["classifier"]["share_of_network"] == part.relative_to(whole).to_dict()
    assert content["early_exit"]["margins"] == [0.5, None, 0.125]
    assert content["class_names"] == ["ant", "bee", "cat", "dog"]
    assert [book["active"] for book in content["codebooks"]] == [3, 2]
    assert min(content["latency_ms"].values()) > 0


def test_sentences(run_folder, network, capsys):
    EarlyExit((0.5, None, 0.125)).save(run_folder / "early_exit.json")
    assert info(run_folder / "model.safetensors", "--latency") == 0
    output = capsys.readouterr().out
    assert "4 classes: ant, bee, cat, dog" in output
    stage = "stage 2: 2 blocks, 12 channels, 5 branches of width 2, 3 of 5 branches a class"
    assert f"{stage}, codewords of its own\n" in output
    assert f"{network_cost(network, 6).macs:,}  for one image of 6x6 pixels" in output
    assert "one image, BatchNorm folded: network" in output
    assert "early exit at margins 0.500, none, 0.125" in output


@pytest.mark.parametrize("name", ["resnext_digits", "coded_resnext_digits"])
def test_networks_without_classifiers(tmp_path, capsys, name):
    options = {"aggregation": "concat"} if "coded" in name else {}
    save_model(tmp_path / "model.safetensors", create_model(name, **options))
    assert info(tmp_path) == 0
    assert "no classifiers can be cut out" in capsys.readouterr().out
    assert info(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["classifier"] is None


def test_bad_requests(run_folder, capsys):
    assert info(run_folder, "--image-size", "0") == 2
    assert "image_size: expected a positive integer" in capsys.readouterr().err
    assert info(run_folder / "nowhere") == 2
    assert capsys.readouterr().err.count("\n") == 1
