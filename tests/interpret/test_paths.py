"""Mean energies by class, where they are known and against a loop over the reference."""

from __future__ import annotations

import json

import pytest
import torch
from support.small_networks import NARROW, ToldNetwork, make_network, tell

from coded_resnext.data.batches import batches
from coded_resnext.interpret import Paths, observe
from coded_resnext.interpret.evaluation import to_plain


def test_known_answer_and_a_class_without_images():
    images = torch.stack(
        [
            tell(0, [2.0, 2, 0, 0], [4.0, 0, 0, 0]),
            tell(0, [2.0, 2, 0, 0], [0.0, 2, 2, 0]),
            tell(3, [2.0, 0, 0, 2], [1.0, 1, 1, 1]),
            tell(1, [0.0, 2, 2, 0], [0.0, 2, 2, 0]),
        ]
    )
    found = Paths.of(observe(ToldNetwork(), batches(images, torch.tensor([0, 0, 3, 1]), 3)))
    assert found.samples_per_class == (2, 1, 0, 1)
    present = [0, 1, 3]
    assert torch.equal(found.energies[0][present], NARROW.codewords.double()[present])
    assert found.energies[0][2].isnan().all()
    expected = {
        "samples_per_class": [2, 1, 0, 1],
        "energies": [
            [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], None, [1.0, 0.0, 0.0, 1.0]],
            [[1.0, 0.5, 0.5, 0.0], [0.0, 1.0, 1.0, 0.0], None, [0.5, 0.5, 0.5, 0.5]],
        ],
    }
    described = json.loads(json.dumps(to_plain(found), allow_nan=False))
    assert {key: described[key] for key in expected} == expected
    # Of 4 images one sends half of its energy astray in the second block, one half, one none.
    assert described["outside"] == [0.0, (0 + 0.5 + 0.5 + 0) / 4]
    assert described["disobeying"] == [0, 2]


def test_means_of_the_reference(data):
    model = make_network(backend="reference")
    found = Paths.of(observe(make_network().train(), data))
    with torch.no_grad():
        _, all_energies = model(data.images, return_energies=True)
    for energies, mean, codebook in zip(all_energies, found.energies, model.codebooks, strict=True):
        for index in range(4):
            expected = codebook.ratio * energies[data.targets == index].double().mean(0)
            assert torch.allclose(mean[index], expected, atol=1e-6)
        assert mean.sum(1).tolist() == pytest.approx([codebook.active] * 4, abs=1e-5)


def test_images_that_leave_their_path():
    # Of class 0, in order: obedient, astray in the second block, mislabelled.
    images = torch.stack(
        [
            tell(0, [2.0, 2, 0, 0], [2.0, 2, 0, 0]),
            tell(0, [2.0, 2, 0, 0], [0.0, 2, 2, 0]),
            tell(2, [0.0, 0, 2, 2], [0.0, 0, 2, 2]),
        ]
    )
    found = Paths.of(observe(ToldNetwork(), batches(images, torch.tensor([0, 0, 0]), 2)))
    assert found.disobeying == (1, 2)
    assert found.outside == pytest.approx((1 / 3, 0.5))
    assert [image.position for image in found.disobedient] == [2, 1]
    worst, second = found.disobedient
    assert (worst.target, worst.prediction, worst.decoded) == (0, 2, (2, 2))
    assert worst.outside == (1.0, 1.0)
    assert (second.prediction, second.decoded, second.outside) == (0, (0, 1), (0.0, 0.5))
