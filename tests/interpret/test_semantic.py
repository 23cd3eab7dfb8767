"""Distances of classes against SciPy, and where the answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from support.small_networks import make_network

from coded_resnext import Codebook
from coded_resnext.data.batches import batches
from coded_resnext.interpret import Paths, Semantics, observe
from coded_resnext.interpret.evaluation import to_plain
from coded_resnext.interpret.observe import Observations

RING = [[int((n - k) % 8 < 3) for n in range(8)] for k in range(8)]
BOOK = Codebook(RING)


def observations(energies, probabilities, book=BOOK):
    """One image of every class, with these energies `[K, N]` on the scale of the codewords."""
    classes = book.classes
    targets = torch.arange(classes)
    return Observations(
        class_names=book.class_names,
        codebooks=(book,),
        targets=targets,
        predictions=targets,
        confidences=torch.ones(classes),
        energies=(energies / book.ratio,),
        decoded=(targets,),
        margins=(torch.ones(classes),),
        probabilities=probabilities,
        image_size=(8, 8),
    )


def semantics(observed):
    return Semantics.of(observed, Paths.of(observed))


def compare(energies, probabilities):
    return semantics(observations(energies, probabilities)).blocks[0]


def random_probabilities(seed=0):
    return torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)).double().softmax(1)


def test_perfect_energies_follow_the_code_alone():
    block = compare(BOOK.codewords.double(), random_probabilities())
    assert block.codeword_correlation == pytest.approx(1)
    assert block.confusion_correlation is None
    assert [group.distance for group in block.by_distance] == [2, 4, 6]
    assert [group.pairs for group in block.by_distance] == [8, 8, 12]
    for group in block.by_distance:
        assert group.energy_distance == pytest.approx(group.distance**0.5)
        assert group.energy_deviation == pytest.approx(0, abs=1e-7)


def test_numbers_of_scipy():
    generator = torch.Generator().manual_seed(1)
    energies = BOOK.codewords.double() + 0.3 * torch.rand(8, 8, generator=generator).double()
    chances = random_probabilities()
    block = compare(energies, chances)
    pairs = [(i, j) for i in range(8) for j in range(i + 1, 8)]
    distance = np.array([float(torch.dist(energies[i], energies[j])) for i, j in pairs])
    hamming = np.array(
        [sum(a != b for a, b in zip(RING[i], RING[j], strict=True)) for i, j in pairs]
    )
    confused = np.array([float(chances[i, j] + chances[j, i]) / 2 for i, j in pairs])
    mean = {h: distance[hamming == h].mean() for h in set(hamming)}
    excess = distance - np.array([mean[h] for h in hamming])
    assert block.codeword_correlation == pytest.approx(
        pearsonr(distance, hamming**0.5)[0], abs=1e-6
    )
    assert block.confusion_correlation == pytest.approx(spearmanr(excess, confused)[0], abs=1e-6)
    assert block.codeword_confusion_correlation == pytest.approx(
        spearmanr(hamming, confused)[0], abs=1e-9
    )
    for group in block.by_distance:
        members = hamming == group.distance
        assert group.energy_deviation == pytest.approx(distance[members].std(ddof=1), abs=1e-6)
        assert group.confusion == pytest.approx(confused[members].mean())
    first = block.nearest[0]
    place = int(excess.argmin())
    assert first.classes == pairs[place]
    assert first.energy_distance - first.expected == pytest.approx(excess[place], abs=1e-6)
    assert float(block.energy_distances[0, 3]) == pytest.approx(
        distance[pairs.index((0, 3))], abs=1e-6
    )


def test_planted_likeness_is_found_and_noise_is_not():
    # Classes 0-3 and 4-7 are alike, and the energies of each lean towards the mean of its group.
    words = BOOK.codewords.double()
    group = torch.cat([words[:4].mean(0).expand(4, 8), words[4:].mean(0).expand(4, 8)])
    alike = (torch.arange(8)[:, None] < 4) == (torch.arange(8) < 4)
    chances = torch.where(alike, 0.2, 0.05).double()
    found = compare(0.6 * words + 0.4 * group, chances)
    assert found.confusion_correlation < -0.6
    assert found.confusion_p < 0.1
    noise = compare(
        BOOK.codewords.double()
        + 0.2 * torch.rand(8, 8, generator=torch.Generator().manual_seed(3)),
        random_probabilities(5),
    )
    assert noise.confusion_p > 0.1


def test_a_class_without_images_is_left_out(network, data):
    some = data.targets != 1
    loader = batches(data.images[some], data.targets[some], 16)
    found = semantics(observe(network, loader))
    assert found.classes == 3
    assert all(sum(group.pairs for group in block.by_distance) == 3 for block in found.blocks)
    described = json.loads(json.dumps(to_plain(found), allow_nan=False))
    assert described["blocks"][0]["energy_distances"][1] is None
    two = data.targets < 2
    observed = observe(network, batches(data.images[two], data.targets[two]))
    with pytest.raises(ValueError, match=r"expected images of at least three .* got images of 2"):
        semantics(observed)


def test_energies_are_those_of_the_network(data):
    network = make_network()
    observed = observe(network, data)
    paths = Paths.of(observed)
    found = Semantics.of(observed, paths).blocks[2].energy_distances
    for i in range(4):
        for j in range(4):
            expected = float(torch.dist(paths.energies[2][i], paths.energies[2][j]))
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)
