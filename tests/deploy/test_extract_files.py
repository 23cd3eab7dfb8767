"""Classifiers on disk: the same after reading, an index of all, errors that say what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.helpers import assert_same_network, relative_error
from support.small_networks import make_images, make_network

from coded_resnext import ExtractedClassifier, extract_classifier, extract_subset
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.deploy.extract import (
    ExtractedNetwork,
    extract_all,
    file_name,
    load_extracted,
    save_extracted,
)
from coded_resnext.models.checkpoint import load_model, read_tensors, save_model, write_tensors

PREPROCESSING = Preprocessing(6, 1, (0.3,), (0.4,))


@pytest.mark.parametrize(
    "options", [{}, {"fold_batch_norm": True}, {"skip_rank": 0.3}], ids=["plain", "folded", "thin"]
)
def test_the_same_after_reading(tmp_path, options):
    model = make_network().double()
    x = make_images(5, seed=3).double()
    classifier = extract_classifier(model, "bee", threshold=0.25, **options)
    save_extracted(tmp_path / "bee.safetensors", classifier, preprocessing=PREPROCESSING)
    loaded = load_extracted(tmp_path / "bee.safetensors")
    assert isinstance(loaded.network, ExtractedClassifier)
    assert loaded.network.threshold == 0.25
    assert loaded.network.class_name == "bee"
    assert loaded.preprocessing == PREPROCESSING
    assert not loaded.network.training
    assert_same_network(loaded.network, classifier, x)
    assert torch.equal(loaded.network.predict(x), classifier.predict(x))


def test_a_subset_stays_one_even_of_one_class(tmp_path):
    subset = extract_subset(make_network(), ["dog"])
    save_extracted(tmp_path / "dog.safetensors", subset)
    loaded = load_extracted(tmp_path / "dog.safetensors")
    assert type(loaded.network) is ExtractedNetwork
    assert loaded.network(make_images(3, seed=0)).shape == (3, 1)
    assert loaded.preprocessing is None


def test_all_classes_with_an_index(tmp_path):
    model = make_network()
    x = make_images(5, seed=3)
    seen = []
    index = extract_all(
        model,
        tmp_path / "all",
        thresholds={"cat": 1.5, "dog": None},
        preprocessing=PREPROCESSING,
        fold_batch_norm=True,
        report=lambda *progress: seen.append(progress),
    )
    rows = json.loads(index.read_text())["classifiers"]
    assert [row["class_name"] for row in rows] == ["ant", "bee", "cat", "dog"]
    assert [row["threshold"] for row in rows] == [None, None, 1.5, None]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for row in rows:
        path = index.parent / row["file"]
        loaded = load_extracted(path)
        expected = extract_classifier(model, row["index"], fold_batch_norm=True)
        assert_same_network(loaded.network, expected, x)
        assert loaded.network.threshold == row["threshold"]
        assert row["parameters"] == sum(p.numel() for p in loaded.network.parameters())
        assert row["bytes"] == path.stat().st_size
    with pytest.raises(ValueError, match="thresholds: expected classes of the model, got 'fly'"):
        extract_all(model, tmp_path, thresholds={"fly": 1.0})


@pytest.mark.parametrize(
    ("index", "name", "expected"),
    [
        (3, "3", "class-3.safetensors"),
        (281, "tabby, tabby cat", "class-281-tabby-tabby-cat.safetensors"),
        (5, "../etc", "class-5-etc.safetensors"),
        (6, "猫", "class-6.safetensors"),
    ],
)
def test_file_names(index, name, expected):
    assert file_name(index, name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("classifier", [0.20360234182757533, 0.19842186666956846]),
        (
            "subset",
            [
                [0.2649570571510532, 0.21372829514920083],
                [0.26621704209126806, 0.21266434654151609],
            ],
        ),
    ],
)
def test_files_of_version_1(name, expected):
    """Files that the first format's code wrote, with the logits that it gave."""
    path = Path(__file__).with_name("version_1") / f"{name}.safetensors"
    loaded = load_extracted(path)
    images = (torch.arange(72, dtype=torch.float64) % 7 / 7).view(2, 1, 6, 6)
    with torch.inference_mode():
        logits = loaded.network(images)
    assert relative_error(logits, torch.tensor(expected, dtype=torch.float64)) < 1e-12
    # The classifier as it is; the subset with BatchNorm folded in and thinned skips.
    assert loaded.network.config.folded == (name == "subset")
    assert loaded.network.config.blocks[1].skip_rank == (3 if name == "subset" else None)


def test_damaged_and_foreign_files(tmp_path):
    model = make_network()
    path = tmp_path / "part.safetensors"
    save_extracted(path, extract_classifier(model, 0))
    whole = tmp_path / "whole.safetensors"
    save_model(whole, model)
    with pytest.raises(ValueError, match="expected a cut-out classifier, got a whole network"):
        load_extracted(whole)
    with pytest.raises(ValueError, match="expected a whole network, got a part of one"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="expected a model file, found none"):
        load_extracted(tmp_path / "none.safetensors")
    content = path.read_bytes()
    for length in (0, 20, 3000, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors: not a readable model file"):
            load_extracted(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not one of a Coded ResNeXt"):
        load_extracted(tmp_path / "foreign.safetensors")


def test_tensors_that_do_not_fit_the_description(tmp_path):
    """They are refused as they are written and as they are read."""
    network, path = extract_classifier(make_network(), 0), tmp_path / "wrong.safetensors"
    save_extracted(path, network)
    description, state = read_tensors(path)
    description["config"]["blocks"][1]["branches"] = 2
    write_tensors(path, state, description)
    with pytest.raises(ValueError, match="damaged or incomplete classifier file"):
        load_extracted(path)
    blocks = list(network.config.blocks)
    blocks[1] = replace(blocks[1], branches=2)
    network.config = replace(network.config, blocks=tuple(blocks))
    with pytest.raises(ValueError, match=r"tensors: blocks\.1\.reduce\.weight: expected \[4"):
        save_extracted(path, network)
