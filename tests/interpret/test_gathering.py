"""Features are computed once, in segments if need be, and of a seeded subset in short time."""

from __future__ import annotations

import pytest
import torch
from support.small_networks import CountingClock

from coded_resnext.interpret import Budget, observe
from coded_resnext.interpret.observe import gather_features, segments, trunk
from coded_resnext.interpret.one_class import without_targets


def test_features_are_those_of_the_network_and_computed_once(network, data):
    clock = CountingClock([network.stem[0]])
    observed = observe(network, data)
    [segment] = segments(network, data, observed.gathered)
    assert clock.images == 50
    assert segment.rows.tolist() == list(range(50))
    with torch.no_grad():
        assert torch.allclose(segment.features, trunk(network, data.images), atol=1e-6)
        logits, energies = network(data.images, return_energies=True)
    assert torch.equal(observed.targets, data.targets)
    assert torch.equal(observed.predictions, logits.argmax(1))
    assert torch.allclose(observed.confidences, logits.softmax(1).amax(1), atol=1e-6)
    for found, expected in zip(observed.energies, energies, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    for index in range(4):
        mean = logits[data.targets == index].softmax(1).double().mean(0)
        assert torch.allclose(observed.probabilities[index], mean, atol=1e-6)


def test_segments_when_memory_is_short(network, data):
    whole = gather_features(network, data, "test").kept
    each = whole.features[0].nbytes
    # Two batches of 16 fit, twice over for a moment.
    observed = observe(network, data)
    short = type(observed.gathered)(**{**vars(observed.gathered), "kept": None})
    parts = list(segments(network, data, short, feature_bytes=2 * 32 * each))
    assert [len(part.rows) for part in parts] == [32, 18]
    assert torch.cat([part.rows for part in parts]).tolist() == list(range(50))
    joined = torch.cat([part.features for part in parts])
    assert torch.equal(joined, whole.features)


def test_a_short_time_gives_a_seeded_subset(network, data):
    def look(seconds, seed):
        clock = CountingClock([network.stem[0]])
        return observe(network, data, budget=Budget(seconds, clock), seed=seed)

    assert look(1000, 0).samples == 50
    some = look(60, 0)
    assert 5 < some.samples < 45
    positions = some.gathered.positions
    assert torch.equal(positions, look(60, 0).gathered.positions)
    assert not torch.equal(positions, look(60, 1).gathered.positions)
    assert torch.equal(some.targets, data.targets[positions])
    assert some.gathered.available == 50
    with torch.no_grad():
        assert torch.equal(some.predictions, network(data.images[positions]).argmax(1))
    [segment] = segments(network, data, some.gathered)
    assert torch.equal(segment.rows, torch.arange(some.samples))
    with torch.no_grad():
        features = trunk(network, data.images[positions])
    assert torch.allclose(segment.features, features, atol=1e-6)
    # The same share again, whatever the time.
    again = observe(network, data, looked_at=some.gathered.looked_at)
    assert torch.equal(again.gathered.positions, positions)


def test_targets_outside_the_classes_may_be_ignored(network, data):
    odd = [(images, targets + 100) for images, targets in data]
    with pytest.raises(ValueError, match="expected classes 0 to 3 of the model, got 103"):
        gather_features(network, odd, "test")
    gathered = gather_features(network, without_targets(odd), "test")
    assert len(gathered.targets) == 50
