"""The whole evaluation: what it collects, and what is left of it for a plain network."""

from __future__ import annotations

import json

import pytest
import torch
from support.small_networks import make_data

from coded_resnext import Codebook, CodedResNeXt, Stage, create_model
from coded_resnext.data.batches import batches
from coded_resnext.interpret import (
    decode_early,
    evaluate,
    measure_paths,
    one_class,
    remove_branches,
)


def test_collects_every_experiment(network, data):
    train = make_data(network, 70, seed=2)
    network.train()
    found = evaluate(network, train, data, seed=5, repeats=2)
    assert all(module.training for module in network.modules())
    assert found.is_coded
    assert found.early_decoding == decode_early(network, data)
    assert found.removal == remove_branches(network, data, seed=5, repeats=2)
    assert found.one_class == one_class(network, train, data, seed=5)
    assert found.paths.to_dict() == measure_paths(network, data).to_dict()
    assert found.test_accuracy == found.early_decoding.accuracy == 0.8

    summary = found.summary()
    blocks = found.removal.blocks
    assert summary == {
        "test_accuracy": 0.8,
        "early_decoding": list(found.early_decoding.block_accuracy),
        "single_class_average_precision": [
            one.average_precision for one in found.one_class.classifiers
        ],
        "remove_active_accuracy": [block.active.accuracy[-1] for block in blocks],
        "remove_inactive_accuracy": [block.inactive.accuracy[-1] for block in blocks],
    }
    assert len(summary["early_decoding"]) == len(summary["remove_active_accuracy"]) == 3
    assert len(summary["single_class_average_precision"]) == 4
    description = found.to_dict()
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert description["thresholds_from"] == "training data"
    assert description["removal"]["seed"] == 5


def test_thresholds_on_the_test_data_are_said(network, data):
    found = evaluate(network, None, data, repeats=1)
    assert found.one_class == one_class(network, data, data)
    assert found.to_dict()["thresholds_from"] == "test data"
    assert "on the test data itself" in str(found)
    assert "optimistic" in str(found)


def test_table_says_the_numbers(network, data):
    some = data.targets != 1
    lines = str(
        evaluate(network, data, batches(data.images[some], data.targets[some]), repeats=1)
    ).splitlines()
    [row] = [line.split() for line in lines if line.strip().startswith("bee")]
    assert row == ["bee", "0", "n/a", "n/a", "n/a", "n/a"]
    assert any("3 of 4 classes" in line for line in lines)
    [inactive] = [line for line in lines if line.startswith("All inactive")]
    assert all(number[0] in "+-" for number in inactive.split()[-3:])


def test_plain_network_has_an_accuracy():
    torch.manual_seed(0)
    model = create_model("resnext_digits")
    images = torch.randn(9, 1, 8, 8)
    targets = model.eval()(images).argmax(1)
    targets[:3] = (targets[:3] + 1) % 10
    found = evaluate(model, None, batches(images, targets, 4))
    assert not found.is_coded
    assert found.summary() == {
        "test_accuracy": pytest.approx(2 / 3),
        "early_decoding": [],
        "single_class_average_precision": [],
        "remove_active_accuracy": [],
        "remove_inactive_accuracy": [],
    }
    assert "plain network" in str(found)
    assert found.to_dict()["removal"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_of_many_classes_the_weakest_are_shown():
    torch.manual_seed(0)
    pairs = [(a, b) for a in range(7) for b in range(a)]
    book = Codebook([[int(n in pair) for n in range(7)] for pair in pairs])
    model = CodedResNeXt([Stage(1, 8, 1, 7, 2)], 21, codebooks=[book], stem_channels=4)
    images, targets = torch.randn(63, 3, 4, 4), torch.arange(63) % 21
    found = evaluate(model, None, batches(images, targets), repeats=1)
    lines = str(found).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("The 20 weakest"))
    shown = [line.split()[0] for line in lines[start + 1 : start + 21]]
    values = found.one_class.average_precisions
    best = max(range(21), key=lambda index: values[index])
    assert sorted(map(int, shown)) == sorted(set(range(21)) - {best})
    assert int(shown[0]) == min(range(21), key=lambda index: values[index])


def test_a_loader_that_ends_is_refused(network, data):
    with pytest.raises(ValueError, match="test_loader: expected batches that can be iterated"):
        evaluate(network, None, iter(list(data)))
    with pytest.raises(ValueError, match="train_loader: expected batches that can be iterated"):
        evaluate(network, iter(list(data)), data)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        evaluate(network, data, [])
