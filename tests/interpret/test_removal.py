"""Removal of branches against masks written by hand, one sample at a time."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.helpers import class_margins, relative_error
from support.small_networks import make_network

from coded_resnext.data.batches import batches
from coded_resnext.interpret import remove_branches
from coded_resnext.interpret.evaluation import to_plain
from coded_resnext.interpret.removal import KINDS, removal_mask


def accuracy(model, data, keep):
    """Of decisions of which none hangs on rounding: some 1e-7 of the logits."""
    with torch.no_grad():
        logits = model(data.images, keep=keep)
    assert float(class_margins(logits).min()) > 1e-5
    return float((logits.argmax(1) == data.targets).double().mean())


def test_masks_take_branches_of_the_kind_in_order():
    active = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
    priorities = np.array([[0.9, 0.1, 0.2, 0.3, 0.5], [0.4, 0.3, 0.2, 0.1, 0.0]])
    found = [
        (kind, removed, ["".join("01"[bit] for bit in row) for row in keep.int().tolist()])
        for kind, candidates in zip(KINDS, (active, ~active), strict=True)
        for removed in range(1, int(candidates[0].sum()) + 1)
        for keep in [removal_mask(candidates, priorities, removed)]
    ]
    assert found == [
        ("active", 1, ["10111", "11101"]),
        ("active", 2, ["10110", "11001"]),
        ("active", 3, ["00110", "10001"]),
        ("inactive", 1, ["11011", "11110"]),
        ("inactive", 2, ["11001", "01110"]),
    ]


def test_all_removed_is_keeping_by_hand(network, data):
    found = remove_branches(network, data, repeats=2)
    # The reference agrees that the masks do what they say.
    reference = make_network(backend="reference")
    different = 0
    for index, codebook in enumerate(network.codebooks):
        own = codebook.codewords[data.targets]
        for curve, mask in (
            (found.blocks[index].inactive, own),
            (found.blocks[index].active, ~own),
        ):
            keep = [mask if block == index else None for block in range(3)]
            assert curve.accuracy[-1] == accuracy(network, data, keep)
            assert curve.accuracy[-1] == accuracy(reference, data, keep)
            assert curve.deviation[-1] == 0
            different += curve.accuracy[-1] != found.accuracy
    assert different >= 4
    assert found.accuracy == accuracy(network, data, None) == 0.8
    assert found.samples == 50


def test_every_number_of_removed_branches_is_that_of_the_definition(data):
    """Random masks in all blocks, by (10): logits, energies, and the curves made of them."""
    network, reference = (
        make_network(backend=backend).double().eval() for backend in ("torch", "reference")
    )
    reference.load_state_dict(network.state_dict())
    generator = torch.Generator().manual_seed(0)
    images = data.images.double()
    for _ in range(5):
        keep = [
            torch.randint(2, (50, block.branches), generator=generator).double()
            for block in network.coded_blocks
        ]
        with torch.no_grad():
            logits, energies = network(images, keep=keep, return_energies=True)
            expected, defined = reference(images, keep=keep, return_energies=True)
        assert relative_error(logits, expected) < 1e-10
        for found, wanted, mask in zip(energies, defined, keep, strict=True):
            assert relative_error(found, wanted) < 1e-10
            assert not found[mask == 0].any()
    loader = batches(images, data.targets)
    found, wanted = (remove_branches(one, loader, repeats=2) for one in (network, reference))
    for block, twin in zip(found.blocks, wanted.blocks, strict=True):
        for curve, other in ((block.active, twin.active), (block.inactive, twin.inactive)):
            assert curve.accuracy == other.accuracy
            assert curve.energy == pytest.approx(other.energy, rel=1e-9)


def test_some_removed_is_the_mean_over_random_orders(network, data):
    repeats, seed, index = 3, 7, 2
    found = remove_branches(network, data, seed=seed, repeats=repeats).blocks[index]
    codewords = network.codebooks[index].codewords
    assert found.active.removed == found.inactive.removed == (1, 2)
    for kind, curve in (("active", found.active), ("inactive", found.inactive)):
        values = []
        for repeat in range(repeats):
            priorities = np.random.default_rng((seed, index, repeat)).random((50, 4))
            keep = torch.ones(50, 4)
            for sample, target in enumerate(data.targets.tolist()):
                wanted = kind == "active"
                candidates = [n for n in range(4) if bool(codewords[target, n]) == wanted]
                keep[sample, min(candidates, key=lambda n, s=sample: priorities[s, n])] = 0
            values.append(accuracy(network, data, [None, None, keep]))
        assert curve.accuracy[0] == pytest.approx(statistics.mean(values), abs=1e-12)
        assert curve.deviation[0] == pytest.approx(statistics.stdev(values), abs=1e-12)


def test_seeds_reproduce_whatever_the_batch_size(network, data):
    found = remove_branches(network, data, seed=3, repeats=3)
    again = remove_branches(network, batches(data.images, data.targets, 7), seed=3, repeats=3)
    for block, twin in zip(found.blocks, again.blocks, strict=True):
        for curve, other_curve in ((block.active, twin.active), (block.inactive, twin.inactive)):
            assert curve.accuracy == other_curve.accuracy
            # The energies are rounded otherwise in other batches.
            assert curve.energy == pytest.approx(other_curve.energy, rel=1e-6)
    other = remove_branches(network, data, seed=4, repeats=3)
    assert other.blocks != found.blocks
    assert json.loads(json.dumps(to_plain(found))) == to_plain(found)


def test_a_draw_of_images_loses_what_they_lose_among_all(network, data):
    rows = torch.tensor([2, 3, 17, 18, 19, 30, 44])
    drawn = remove_branches(network, data, rows=rows, seed=3, repeats=2)
    assert drawn.samples == 7
    # The same images, each with the priorities of its place, one batch of them alone.
    images, targets = data.images[rows], data.targets[rows]
    with torch.no_grad():
        said = network(images).argmax(1)
    assert drawn.accuracy == pytest.approx(float((said == targets).double().mean()))
    for index, block in enumerate(drawn.blocks):
        works = network.codebooks[index].codewords[targets]
        branches = works.shape[1]
        hits = []
        for repeat in range(2):
            priorities = np.random.default_rng((3, index, repeat)).random((50, branches))
            keep = removal_mask(works, priorities[rows.numpy()], 1)
            masks = [keep if place == index else None for place in range(3)]
            hits.append(accuracy(network, batches(images, targets), masks))
        assert block.active.accuracy[0] == pytest.approx(statistics.mean(hits), abs=1e-12)


def test_one_repeat_has_no_deviation(network, data):
    found = remove_branches(network, data, repeats=1)
    assert found.blocks[0].active.removed == (1, 2, 3)
    assert found.blocks[0].inactive.removed == (1, 2)
    assert all(set(block.active.deviation) == {0.0} for block in found.blocks)


@pytest.mark.parametrize("argument", [{"seed": -1}, {"repeats": 0}])
def test_numbers_out_of_range(network, data, argument):
    with pytest.raises(ValueError, match=f"{next(iter(argument))}: expected at least"):
        remove_branches(network, data, **argument)


def test_energies_that_are_left(network, data):
    repeats, seed = 3, 7
    found = remove_branches(network, data, seed=seed, repeats=repeats)
    with torch.no_grad():
        _, all_energies = network(data.images, return_energies=True)
    for index, (block, energies) in enumerate(zip(found.blocks, all_energies, strict=True)):
        own = network.codebooks[index].codewords[data.targets]
        branches = own.shape[1]
        for curve, kind in ((block.active, own), (block.inactive, ~own)):
            left = (energies * ~kind).sum(1) / branches
            assert curve.energy[-1] == pytest.approx(float(left.mean()), abs=1e-5)
            assert curve.energy_deviation[-1] == 0
            # Every further branch takes energy away.
            assert all(a > b for a, b in pairwise([1.0, *curve.energy]))
            values = []
            for repeat in range(repeats):
                priorities = np.random.default_rng((seed, index, repeat)).random((50, branches))
                first = np.where(kind.numpy(), priorities, np.inf).argmin(1)
                gone = energies[torch.arange(50), torch.from_numpy(first)]
                values.append(1 - float(gone.mean()) / branches)
            assert curve.energy[0] == pytest.approx(statistics.mean(values), abs=1e-5)
            assert curve.energy_deviation[0] == pytest.approx(statistics.stdev(values), abs=1e-5)
