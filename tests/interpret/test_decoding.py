"""Early decoding against the definition, and what leaving early at each margin really does."""

from __future__ import annotations

import json

import pytest
import torch
from support.helpers import below, load_golden, relative_error
from support.small_networks import ToldNetwork, make_data, make_network, tell

from coded_resnext import EarlyExit
from coded_resnext.data.batches import batches
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import exit_macs, predict_early
from coded_resnext.interpret import EarlyDecoding, ExitCurve, observe
from coded_resnext.interpret.evaluation import to_plain
from coded_resnext.models.published import published_model

FIRST, SECOND, LAST = [2.0, 2, 0, 0], [0.0, 2, 2, 0], [2.0, 0, 0, 2]


def test_known_answer():
    # Class 0 twice, classes 1 and 3; the second image is read wrongly by the network.
    images = torch.stack(
        [tell(0, FIRST, FIRST), tell(1, FIRST, SECOND), tell(1, SECOND, FIRST), tell(3, LAST, LAST)]
    )
    targets = torch.tensor([0, 0, 1, 3])
    found = EarlyDecoding.of(observe(ToldNetwork(), batches(images, targets, 3)))
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
    assert to_plain(found) == {"samples": 4, "accuracy": 0.75, "blocks": [first, second]}
    assert (found.block_accuracy, found.block_agreement) == ((1.0, 0.5), (0.75, 0.75))
    assert json.loads(json.dumps(to_plain(found))) == to_plain(found)


def test_nearest_codeword_by_definition(data):
    model = make_network(backend="reference")
    found = EarlyDecoding.of(observe(make_network(), data))
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


def test_decoded_classes_of_the_golden_network():
    meta, golden = load_golden("net_cifar10")
    model = published_model(below(golden, "state."), meta["architecture"])
    loader = batches(golden["x"], golden["targets"], 2)
    observed = observe(model, loader)
    assert torch.equal(observed.predictions, golden["eval_logits"].argmax(1))
    found = EarlyDecoding.of(observed)
    assert len(observed.decoded) == len(model.coded_blocks) > 1
    for index, decoded in enumerate(observed.decoded):
        assert torch.equal(decoded, golden[f"decoded_class.{index}"])
        assert relative_error(observed.energies[index], golden[f"eval_energies.{index}"]) < 1e-10
        correct = (golden[f"decoded_class.{index}"] == golden["targets"]).double().mean()
        assert found.block_accuracy[index] == pytest.approx(float(correct))


def exit_curve(model, loader):
    return ExitCurve.of(observe(model, loader), model)


def test_every_point_is_what_predict_early_does(network, data):
    # Margins of two images differ by 1e-7 here and there, which float32 does not hold apart.
    network = network.double()
    curve = exit_curve(network, data)
    margins = [point.margin for point in curve.points]
    assert margins[0] == 0
    assert margins[-1] is None
    assert margins[:-1] == sorted(set(margins[:-1]))
    assert len(margins) > 20
    for point in curve.points:
        found = predict_early(network, data.images.double(), EarlyExit((point.margin,) * 3))
        # Means of integers, which are exact.
        assert point.accuracy == float((found.classes == data.targets).double().mean())
        assert point.macs == float(found.macs.double().mean())
        assert point.exits == tuple(found.exit_blocks.bincount(minlength=4).tolist())
    assert curve.samples == 50
    assert curve.network_macs == network_cost(network, 6).macs
    # At least one point on the way is neither end.
    assert len({point.macs for point in curve.points}) > 10


def test_macs_of_an_exit_grow_with_depth_and_end_at_the_network_and_its_decoders(network):
    macs = exit_macs(network, 6, 6)
    assert macs == sorted(macs)
    decoders = sum(book.codewords.numel() for book in network.codebooks)
    assert macs[-1] == network_cost(network, 6).macs + decoders
    whole = predict_early(network, torch.randn(1, 1, 6, 9), EarlyExit((None,) * 3))
    assert exit_macs(network, 6, 9)[-1] == int(whole.macs)


def test_the_mode_of_the_network_is_left_as_found(network, data):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    exit_curve(network, data)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_batches_do_not_matter(network, data):
    other = make_data(network, 50, seed=1)
    other.batch_size = 50
    network = network.double()
    found, expected = exit_curve(network, other), exit_curve(network, data)
    assert [point.exits for point in found.points] == [point.exits for point in expected.points]


def test_one_image_is_enough(network, data):
    one = batches(data.images[:1], data.targets[:1])
    curve = exit_curve(network, one)
    assert {point.exits for point in curve.points} >= {(1, 0, 0, 0), (0, 0, 0, 1)}
