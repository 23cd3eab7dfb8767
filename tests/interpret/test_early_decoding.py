"""Early decoding against the definition, and where the answer is known."""

from __future__ import annotations

import json

import pytest
import torch
from support.helpers import below, load_golden, relative_error
from support.small_networks import ToldNetwork, make_network, tell

from coded_resnext import create_model
from coded_resnext.data.batches import batches
from coded_resnext.interpret import decode_early, observe
from coded_resnext.models.published import published_model

FIRST, SECOND, LAST = [2.0, 2, 0, 0], [0.0, 2, 2, 0], [2.0, 0, 0, 2]


def test_known_answer():
    # Class 0 twice, classes 1 and 3; the second image is read wrongly by the network.
    images = torch.stack(
        [tell(0, FIRST, FIRST), tell(1, FIRST, SECOND), tell(1, SECOND, FIRST), tell(3, LAST, LAST)]
    )
    targets = torch.tensor([0, 0, 1, 3])
    found = decode_early(ToldNetwork(), batches(images, targets, 3))
    first = {
        "accuracy": 1.0,
        "class_accuracy": [1.0, 1.0, None, 1.0],
        "confusion": [[0, 0, 2], [1, 1, 1], [3, 3, 1]],
        "agreement": 0.75,
        "class_agreement": [0.5, 1.0, None, 1.0],
        "confusion_with_final": [[0, 0, 1], [1, 0, 1], [1, 1, 1], [3, 3, 1]],
    }
    second = {
        "accuracy": 0.5,
        "class_accuracy": [0.5, 0.0, None, 1.0],
        "confusion": [[0, 0, 1], [0, 1, 1], [1, 0, 1], [3, 3, 1]],
        "agreement": 0.75,
        "class_agreement": [1.0, 0.0, None, 1.0],
        "confusion_with_final": [[0, 0, 1], [1, 0, 1], [1, 1, 1], [3, 3, 1]],
    }
    assert found.to_dict() == {"samples": 4, "accuracy": 0.75, "blocks": [first, second]}
    assert (found.block_accuracy, found.block_agreement) == ((1.0, 0.5), (0.75, 0.75))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_nearest_codeword_by_definition(data):
    model = make_network(backend="reference")
    found = decode_early(make_network(), data)
    with torch.no_grad():
        logits, all_energies = model(data.images, return_energies=True)
    prediction = logits.argmax(1)
    assert found.samples == 50
    assert found.accuracy == pytest.approx(float((prediction == data.targets).float().mean()))
    for index, (energies, codebook) in enumerate(zip(all_energies, model.codebooks, strict=True)):
        distance = torch.cdist(codebook.ratio * energies, codebook.codewords.float())
        decoded = distance.argmin(1)
        correct, agreeing = (decoded == data.targets), (decoded == prediction)
        assert found.block_accuracy[index] == pytest.approx(float(correct.float().mean()))
        assert found.block_agreement[index] == pytest.approx(float(agreeing.float().mean()))


def test_plain_network_is_refused():
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="model: expected at least one coded block, got a plain"):
        decode_early(create_model("resnext_digits"), batches(images, torch.tensor([0, 1])))


def test_decoded_classes_of_the_golden_network():
    meta, golden = load_golden("net_cifar10")
    model = published_model(below(golden, "state."), meta["architecture"])
    loader = batches(golden["x"], golden["targets"], 2)
    observed = observe(model, loader)
    assert torch.equal(observed.predictions, golden["eval_logits"].argmax(1))
    found = decode_early(model, loader)
    assert len(observed.decoded) == len(model.coded_blocks) > 1
    for index, decoded in enumerate(observed.decoded):
        assert torch.equal(decoded, golden[f"decoded_class.{index}"])
        assert relative_error(observed.energies[index], golden[f"eval_energies.{index}"]) < 1e-10
        correct = (golden[f"decoded_class.{index}"] == golden["targets"]).double().mean()
        assert found.block_accuracy[index] == pytest.approx(float(correct))
