"""The early-exit curve: every point is what leaving early at that margin really does."""

from __future__ import annotations

import pytest
import torch
from support.small_networks import make_data

from coded_resnext import EarlyExit, create_model
from coded_resnext.data.batches import batches
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import exit_macs, predict_early
from coded_resnext.interpret import exit_curve


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


def test_a_plain_network_is_refused():
    with pytest.raises(ValueError, match="model: expected at least one coded block"):
        exit_curve(create_model("resnext_digits"), [])


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
