"""Single test images: which are chosen, and what is said of them."""

from __future__ import annotations

import json

import pytest
import torch
from support.small_networks import ToldNetwork, tell

from coded_resnext import ExitScores, create_model
from coded_resnext.data.batches import batches
from coded_resnext.interpret import Samples, trace, trace_samples
from coded_resnext.interpret.records import build
from coded_resnext.interpret.samples import choose


def test_every_image_has_the_numbers_of_its_trace(network, data):
    samples = trace_samples(network, data)
    assert len(samples.positions) == 50
    for index, position in enumerate(samples.positions):
        traced = trace(network, data.images[position])
        assert samples.predictions[index] == traced.prediction
        assert samples.targets[index] == data.targets[position]
        likely = torch.tensor(traced.logits).softmax(0).max()
        assert samples.probabilities[index] == pytest.approx(float(likely), abs=1e-6)
        for block, found, book in zip(
            samples.blocks, traced.blocks, network.codebooks, strict=True
        ):
            assert block.energies[index].tolist() == pytest.approx(found.energies, abs=1e-5)
            assert block.decoded[index] == found.prediction
            nearest = sorted(range(4), key=lambda k: (round(found.distances[k], 5), k))[:3]
            assert set(block.nearest[index]) == set(nearest)
            assert block.nearest[index][0] == block.decoded[index]
            energies = torch.tensor(found.energies)
            for place, near in enumerate(block.nearest[index]):
                share = energies[book.codewords[near]].sum() / energies.sum()
                assert float(block.shares[index, place]) == pytest.approx(float(share), abs=1e-5)
            margin = block.shares[index, 0] - block.shares[index, 1]
            assert block.margins[index] == pytest.approx(float(margin), abs=1e-6)


def test_an_image_settles_where_all_later_decoders_agree_with_the_network():
    first, second, other = [2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]
    images = torch.stack(
        [
            tell(0, first, second),
            tell(0, other, second),
            tell(0, first, other),
            tell(2, other, other),
        ]
    )
    samples = trace_samples(ToldNetwork().eval(), batches(images, torch.tensor([0, 0, 0, 2])))
    assert samples.settled == (0, 1, 2, 0)
    assert samples.predictions == (0, 0, 0, 2)


def scores(targets: list[int], final: list[int], decoded: list[int]) -> ExitScores:
    return ExitScores(
        torch.tensor(decoded)[:, None],
        torch.zeros(len(final), 1),
        torch.tensor(final),
        torch.tensor(targets),
    )


def test_misread_images_come_first_and_classes_in_turn():
    targets = [k % 5 for k in range(100)]
    final, decoded = list(targets), list(targets)
    for wrong in (10, 55):
        final[wrong] = (final[wrong] + 1) % 5
    for wavering in (21, 32, 43, 64, 75, 86):
        decoded[wavering] = (decoded[wavering] + 1) % 5
    chosen = choose(scores(targets, final, decoded), 20, seed=3).tolist()
    assert len(chosen) == len(set(chosen)) == 20
    assert chosen == sorted(chosen, key=lambda row: (targets[row], row))
    # Of twenty places five are for the misread: both that the network misreads, and three others.
    assert {10, 55} <= set(chosen)
    assert len({21, 32, 43, 64, 75, 86} & set(chosen)) >= 3
    assert min(sum(targets[row] == k for row in chosen) for k in range(5)) >= 3
    assert chosen != choose(scores(targets, final, decoded), 20, seed=4).tolist()
    assert chosen == choose(scores(targets, final, decoded), 20, seed=3).tolist()


def test_a_limit_of_one_image_a_class_leaves_no_class_out():
    targets = [k % 8 for k in range(80)]
    chosen = choose(scores(targets, targets, targets), 8, seed=0).tolist()
    assert [targets[row] for row in chosen] == list(range(8))


def test_it_is_read_back_from_json(network, data):
    samples = trace_samples(network, data, limit=12)
    described = samples.to_dict()
    again = build(Samples, json.loads(json.dumps(described, allow_nan=False)))
    assert again.to_dict() == described
    assert torch.equal(again.scores.margins, samples.scores.margins)
    assert torch.equal(again.scores.decoded, samples.scores.decoded)


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"seed": -1}])
def test_bad_numbers_are_refused(network, data, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}: expected at least"):
        trace_samples(network, data, **arguments)


def test_a_plain_network_is_refused():
    with pytest.raises(ValueError, match="model: expected at least one coded block"):
        trace_samples(create_model("resnext_digits"), [])
