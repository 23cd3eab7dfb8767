"""Partial passes equal whole ones; modes are restored; bad batches are refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.helpers import assert_alike

from coded_resnext.interpret.observe import batches, coded_inputs, evaluating, resume, trunk


def test_resuming_with_masks_is_a_pass_with_keep(network, data):
    images = data.images[:8]
    generator = torch.Generator().manual_seed(0)
    # Never a sample without any branch.
    masks = [torch.rand(8, n, generator=generator) < 0.6 for n in (5, 5, 4)]
    for mask in masks:
        mask[:, 0] = True
    seen = []
    with torch.no_grad():
        logits = network(images)
        inputs = coded_inputs(network, trunk(network, images))
        assert_alike(resume(network, inputs[2], 2, [None]), logits)
        for start in range(3):
            keep = [None] * start + masks[start:]
            expected = network(images, keep=keep)
            assert_alike(resume(network, inputs[start], start, masks[start:]), expected)
            seen.append(expected)
    # Masks change the outcome, or the comparison would say nothing.
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in pairwise([*seen, logits]))


def test_modes_are_as_before_also_after_an_error(network):
    network.train()
    network.stem.eval()
    modes = [module.training for module in network.modules()]
    inside = []

    def fail():
        with evaluating(network):
            inside.append(any(module.training for module in network.modules()))
            inside.append(torch.is_inference_mode_enabled())
            raise RuntimeError("wanted")

    with pytest.raises(RuntimeError, match="wanted"):
        fail()
    assert inside == [False, True]
    assert [module.training for module in network.modules()] == modes


IMAGES = torch.zeros(2, 1, 6, 6)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader: expected at least one batch, got none"),
        ([(IMAGES, torch.tensor([0, 4]))], "expected classes 0 to 3 of the model, got 4"),
        ([(IMAGES, torch.tensor([-1, 0]))], "expected classes 0 to 3 of the model, got -1"),
        ([(IMAGES, torch.tensor([0]))], r"targets: expected 2 integer class indices.*\[1\]"),
        ([(IMAGES, torch.tensor([0.0, 1.0]))], "targets: expected 2 integer.*float32"),
        ([(IMAGES.byte(), torch.tensor([0, 1]))], "images: expected a floating-point.*uint8"),
        ([(IMAGES[0], torch.tensor([0]))], r"images: expected.*\[1, 6, 6\]"),
        ([(IMAGES[:0], torch.tensor([], dtype=torch.int64))], r"B >= 1, got.*\[0, 1, 6, 6\]"),
    ],
)
def test_bad_batches(network, loader, message):
    with pytest.raises(ValueError, match=message):
        list(batches(network, loader, "test"))


def test_batches_take_the_dtype_of_the_model(network):
    [(images, targets)] = batches(network.double(), [(IMAGES, torch.ones(2).byte())], "test")
    assert images.dtype == torch.float64
    assert targets.dtype == torch.int64
