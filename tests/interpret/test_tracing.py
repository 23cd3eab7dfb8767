"""A trace against the network's own energies, and a table that says so."""

from __future__ import annotations

import json

import pytest
import torch
from support.small_networks import NAMES

from coded_resnext import create_model, decode
from coded_resnext.interpret import trace
from coded_resnext.interpret.samples import strongest


def test_numbers_of_the_network(network, data):
    network = network.double()
    images = data.images[:6].double()
    with torch.inference_mode():
        logits, all_energies = network(images, return_energies=True)
    for sample in range(6):
        found = trace(network, images[sample])
        assert found.logits == pytest.approx(logits[sample].tolist(), rel=1e-9)
        assert found.prediction == int(logits[sample].argmax())
        assert len(found.blocks) == 3
        for block, energies, book in zip(
            found.blocks, all_energies, network.codebooks, strict=True
        ):
            scaled = book.active / book.branches * energies[sample]
            assert block.energies == pytest.approx(scaled.tolist(), rel=1e-9)
            assert sum(block.energies) == pytest.approx(book.active)
            for distance, word in zip(block.distances, book.words, strict=True):
                wanted = torch.tensor([float(digit) for digit in word], dtype=torch.float64)
                assert distance == pytest.approx(float(torch.dist(scaled, wanted)), rel=1e-9)
            assert block.prediction == int(decode(energies[sample : sample + 1], book))
            assert block.distances[block.prediction] == min(block.distances)
            assert len(block.path) == book.active
            inside = min(block.energies[branch] for branch in block.path)
            outside = set(range(book.branches)) - set(block.path)
            assert inside >= max(block.energies[branch] for branch in outside)


def test_description_and_table(network, data):
    found = trace(network, data.images[:1])
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    text = str(found)
    assert text.count("energies") == 3
    first = found.blocks[0]
    assert f"nearest {NAMES[first.prediction]} {min(first.distances):.2f}" in text
    assert text.endswith(f"classifier: {NAMES[found.prediction]}")


def test_mode_is_as_before(network, data):
    network.train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    trace(network, data.images[0])
    assert network.training
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_strongest_branches_by_hand():
    assert strongest(torch.tensor([0.1, 3.0, 0.0, 2.0]), 2) == (1, 3)
    assert strongest(torch.tensor([1.0, 1.0, 1.0]), 2) == (0, 1)


def test_bad_arguments(network, data):
    for wrong in (data.images[:2], data.images[0, 0]):
        with pytest.raises(ValueError, match="x: expected one image"):
            trace(network, wrong)
    with pytest.raises(ValueError, match="got a plain network"):
        trace(create_model("resnext_digits"), torch.zeros(1, 8, 8))
