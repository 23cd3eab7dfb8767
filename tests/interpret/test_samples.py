"""Single test images: which are chosen, and what is said of them."""

from __future__ import annotations

import json

import pytest
import torch
from support.small_networks import NAMES, ToldNetwork, make_images, make_network, tell

from coded_resnext import ExitScores, create_model, decode
from coded_resnext.data.batches import batches
from coded_resnext.interpret import Samples, observe, trace
from coded_resnext.interpret.decoding import choose, strongest
from coded_resnext.interpret.evaluation import from_plain, to_plain


def test_every_image_has_the_numbers_of_its_trace(network, data):
    samples = Samples.of(observe(network, data))
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
    loader = batches(images, torch.tensor([0, 0, 0, 2]))
    samples = Samples.of(observe(ToldNetwork().eval(), loader))
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
    samples = Samples.of(observe(network, data), limit=12)
    described = to_plain(samples)
    again = from_plain(Samples, json.loads(json.dumps(described, allow_nan=False)))
    assert to_plain(again) == described
    assert torch.equal(again.scores.margins, samples.scores.margins)
    assert torch.equal(again.scores.decoded, samples.scores.decoded)


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"seed": -1}])
def test_bad_numbers_are_refused(network, data, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}: expected at least"):
        Samples.of(observe(network, data), **arguments)


def test_a_trace_has_the_numbers_of_the_network(network, data):
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


def test_description_and_table_of_a_trace(network, data):
    found = trace(network, data.images[:1])
    assert json.loads(json.dumps(to_plain(found), allow_nan=False)) == to_plain(found)
    text = str(found)
    assert text.count("energies") == 3
    first = found.blocks[0]
    assert f"nearest {NAMES[first.prediction]} {min(first.distances):.2f}" in text
    assert text.endswith(f"classifier: {NAMES[found.prediction]}")


def test_the_mode_is_as_before_a_trace(network, data):
    network.train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    trace(network, data.images[0])
    assert network.training
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_strongest_branches_by_hand():
    assert strongest(torch.tensor([0.1, 3.0, 0.0, 2.0]), 2) == (1, 3)
    assert strongest(torch.tensor([1.0, 1.0, 1.0]), 2) == (0, 1)


def test_a_trace_is_of_one_image(network, data):
    for wrong in (data.images[:2], data.images[0, 0]):
        with pytest.raises(ValueError, match="x: expected one image"):
            trace(network, wrong)
    with pytest.raises(ValueError, match="got a plain network"):
        trace(create_model("resnext_digits"), torch.zeros(1, 8, 8))


def test_a_trace_of_energies_that_are_not_normalised_is_on_the_same_scale():
    """Distances were those of a dead sample, and the class was not the nearest of its own."""
    model = make_network(normalize=False)
    for image in make_images(8, seed=5):
        for block, book in zip(trace(model, image).blocks, model.codebooks, strict=True):
            assert sum(block.energies) == pytest.approx(book.active, abs=1e-4)
            assert block.distances[block.prediction] == pytest.approx(min(block.distances))
