"""One pass observes; partial passes equal whole ones; draws, modes, and bad batches."""

from __future__ import annotations

import sys
from itertools import pairwise
from threading import Thread

import pytest
import torch
from support.helpers import assert_alike
from support.small_networks import make_network

from coded_resnext.interpret import evaluate, observe
from coded_resnext.interpret.observe import (
    DrawnImages,
    batches,
    coded_walk,
    draw_rows,
    evaluating,
    read_targets,
    resume,
    trunk,
    without_targets,
)
from coded_resnext.interpret.results import text_tables


def test_one_pass_has_what_the_network_says(network, data):
    observed = observe(network, data)
    with torch.no_grad():
        logits, all_energies = network(data.images, return_energies=True)
    assert (observed.samples, observed.image_size) == (50, (6, 6))
    assert torch.equal(observed.targets, data.targets)
    assert torch.equal(observed.predictions, logits.argmax(1))
    assert torch.allclose(observed.confidences, logits.softmax(1).amax(1), atol=1e-6)
    for energies, expected in zip(observed.energies, all_energies, strict=True):
        assert torch.allclose(energies, expected, atol=1e-5)
    for index in range(4):
        mean = logits[data.targets == index].softmax(1).double().mean(0)
        assert torch.allclose(observed.probabilities[index], mean, atol=1e-6)


def test_a_draw_has_the_same_share_of_every_class_and_contains_a_smaller_one():
    targets = torch.arange(300) % 3
    targets[0] = 7
    rows = draw_rows(targets, 60, seed=4)
    assert torch.equal(rows, rows.sort().values)
    assert targets[rows].bincount(minlength=8).tolist() == [20, 20, 20, 0, 0, 0, 0, 1]
    assert set(draw_rows(targets, 12, seed=4).tolist()) < set(rows.tolist())
    assert torch.equal(rows, draw_rows(targets, 60, seed=4))
    assert not torch.equal(rows, draw_rows(targets, 60, seed=5))
    for images in (None, 300, 1000):
        assert torch.equal(draw_rows(targets, images, seed=4), torch.arange(300))


@pytest.mark.parametrize("step", [1, 3, 20, 49])
def test_drawn_images_come_in_order_and_in_batches_as_large(data, step):
    rows = torch.arange(0, 50, step)
    drawn = list(DrawnImages(data, rows))
    assert torch.equal(torch.cat([images for images, _ in drawn]), data.images[rows])
    assert torch.equal(torch.cat([targets for _, targets in drawn]), data.targets[rows])
    sizes = [len(targets) for _, targets in drawn]
    assert sizes == [16] * (len(rows) // 16) + [len(rows) % 16] * (len(rows) % 16 > 0)


def test_targets_outside_the_classes_may_be_ignored(network, data):
    odd = [(images, targets + 100) for images, targets in data]
    with pytest.raises(ValueError, match="expected classes 0 to 3 of the model, got 103"):
        read_targets(network, odd)
    assert read_targets(network, without_targets(odd)).tolist() == [0] * 50
    assert len(without_targets(odd)) == 4
    assert torch.equal(read_targets(network, data), data.targets)


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
        inputs, _, _ = coded_walk(network, trunk(network, images))
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


def test_modes_are_as_before_when_threads_overlap(network):
    """One thread gave back what it had seen, and that was the other one's mode."""
    network.train()
    first, second = evaluating(network), evaluating(network)
    first.__enter__()
    thread = Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert not any(module.training for module in network.modules())
    thread = Thread(target=second.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert all(module.training for module in network.modules())


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
    [(images, targets, _)] = batches(network.double(), [(IMAGES, torch.ones(2).byte())], "test")
    assert images.dtype == torch.float64
    assert targets.dtype == torch.int64


def test_of_many_classes_some_are_compared_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """fast-reid#503: memory by images times classes, or classes times classes, does not end."""
    network = make_network()
    images = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    loader = [(images, torch.arange(24) % network.num_classes)]
    whole = observe(network, loader)
    assert whole.compared is None
    module = sys.modules[read_targets.__module__]
    monkeypatch.setattr(module, "MOST_COMPARED", 3)
    # A row at a time.
    monkeypatch.setattr(module, "MOST_SCORES", 1)
    some = observe(network, loader, seed=1)
    assert some.compared is not None
    assert len(set(some.compared)) == 3
    assert list(some.compared) == sorted(some.compared)
    chosen = list(some.compared)
    torch.testing.assert_close(some.probabilities, whole.probabilities[chosen][:, chosen])
    for one, other in zip(some.decoded, whole.decoded, strict=True):
        assert (one == other).all()
    evaluation = evaluate(network, None, loader, repeats=1)
    assert evaluation.semantics is not None
    assert evaluation.semantics.classes == 3
    assert "3 of" in evaluation.not_computed["semantics"]
    assert "Distances are those of 3 classes." in text_tables(evaluation)
