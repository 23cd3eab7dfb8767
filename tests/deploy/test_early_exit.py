"""Early exit against the whole pass, sample by sample; what it computes and what it does not."""

from __future__ import annotations

import json

import pytest
import torch
from support.helpers import relative_error
from support.small_networks import make_images, make_network
from torch.utils.flop_counter import FlopCounterMode

from coded_resnext import EarlyExit, create_model, decode
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import predict_early
from coded_resnext.models.loss import read_class

CRITERIA = [
    EarlyExit((0.3, 0.3, 0.01)),
    EarlyExit((0.3, 0.3, 0.01), agreement=True),
    EarlyExit((None, 0.3, None)),
    EarlyExit((0.0, 0.0, 0.0)),
    EarlyExit((None, None, None)),
]


@pytest.fixture
def network():
    return make_network().double()


@pytest.fixture
def images():
    return make_images(60, seed=7).double()


def by_definition(network, images, criterion):
    """Class and exit of every sample, from a whole pass."""
    with torch.inference_mode():
        logits, energies = network(images, return_energies=True)
    classes, exits = [], []
    for sample in range(len(images)):
        said, left = int(logits[sample].argmax()), len(energies)
        for block in reversed(range(len(energies))):
            wanted = criterion.margins[block]
            if wanted is None:
                continue
            words = network.codebooks[block].codewords.double()
            scores = (words @ energies[block][sample]).sort(descending=True)
            margin = (scores.values[0] - scores.values[1]) / words.shape[1]
            decoded = [
                decode(value[sample : sample + 1], book)
                for value, book in zip(energies, network.codebooks, strict=True)
            ]
            agrees = block > 0 and bool(decoded[block] == decoded[block - 1])
            if margin >= wanted and (agrees or not criterion.agreement):
                said, left = int(decoded[block]), block
        classes.append(said)
        exits.append(left)
    return classes, exits


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_equal_to_the_definition(network, images, criterion):
    found = predict_early(network, images, criterion)
    classes, exits = by_definition(network, images, criterion)
    assert found.classes.tolist() == classes
    assert found.exit_blocks.tolist() == exits
    assert found.energies == ()


def test_the_criteria_tell_samples_apart(network, images):
    """Or the comparison above would say little."""
    counts = predict_early(network, images, CRITERIA[0]).exit_blocks.bincount(minlength=4)
    assert (counts > 0).sum() >= 3, counts
    agreeing = predict_early(network, images, CRITERIA[1]).exit_blocks
    assert 0 < int((agreeing < 3).sum()) < len(images)


def test_what_has_left_is_not_computed(network, images):
    seen = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, x, i=i: seen.__setitem__(i, len(x[0])))
        for i, block in enumerate(network.blocks)
    ]
    exits = predict_early(network, images, CRITERIA[0]).exit_blocks
    # Blocks 1, 2 and 4 are coded; block 3 follows the second of these.
    left = [int((exits >= index).sum()) for index in range(4)]
    assert [seen[i] for i in range(5)] == [60, 60, left[1], left[2], left[2]]
    seen.clear()
    predict_early(network, images, CRITERIA[3])
    assert sorted(seen) == [0, 1]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("criterion", CRITERIA[::2], ids=str)
def test_cost_by_pytorchs_counter(network, images, criterion):
    """One image at a time; each pass also makes the small matrices that any batch shares."""
    for sample in range(0, 60, 7):
        with FlopCounterMode(display=False) as counter:
            found = predict_early(network, images[sample : sample + 1], criterion)
        computed = min(int(found.exit_blocks[0]) + 1, 3)
        shared = sum(
            block.codebook.branches * block.expand.out_channels * block.width**2
            for block in network.coded_blocks[:computed]
        )
        assert counter.get_total_flops() == 2 * (int(found.macs[0]) + shared)


def test_cost_of_never_leaving(network, images):
    found = predict_early(network, images, CRITERIA[4])
    decoding = sum(book.classes * book.branches for book in network.codebooks)
    assert set(found.macs.tolist()) == {network_cost(network, 6).macs + decoding}


def test_energies_end_where_a_sample_leaves(network, images):
    found = predict_early(network, images, CRITERIA[0], return_energies=True)
    with torch.inference_mode():
        _, expected = network(images, return_energies=True)
    for block, (energies, whole) in enumerate(zip(found.energies, expected, strict=True)):
        computed = found.exit_blocks >= block
        assert relative_error(energies[computed], whole[computed]) < 1e-12
        assert energies[~computed].isnan().all()
    none = predict_early(network, images, CRITERIA[3], return_energies=True).energies
    assert [value.isnan().all().item() for value in none] == [False, True, True]


def test_margin_by_hand():
    words = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    energies = torch.tensor([[2.0, 2, 0, 0], [1, 1, 1, 1], [0, 1, 3, 0], [0, 0, 0, 0]])
    classes, margins = read_class(energies, words)
    assert classes.tolist() == [0, 0, 1, 0]
    # Scores 4, 2, 0; 2, 2, 2; 1, 4, 3; 0, 0, 0; over four branches.
    assert margins.tolist() == [0.5, 0.0, 0.25, 0.0]
    with torch.autocast("cpu", torch.bfloat16):
        assert read_class(energies + 1e-3, words)[1].dtype == torch.float32


def test_on_disk(tmp_path):
    criterion = EarlyExit((0.25, None, 0.1), True, {"folds": 5})
    criterion.save(tmp_path / "exit.json")
    assert EarlyExit.load(tmp_path / "exit.json") == criterion


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not an early-exit file"),
        ("[]", 'expected an object with a list "margins"'),
        ('{"margins": [0.1]}', "format_version: expected 1, got None"),
        (
            '{"margins": ["a"], "format_version": 1}',
            "got tuple of str",
        ),
        (
            '{"margins": [true], "format_version": 1}',
            "got tuple of bool",
        ),
        ('{"margins": [-1], "format_version": 1}', "expected a finite number of at least 0"),
        ('{"margins": [NaN], "format_version": 1}', "expected a finite number of at least 0"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    (tmp_path / "exit.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        EarlyExit.load(tmp_path / "exit.json")
    assert "exit.json" in str(error.value)
    assert json.dumps(EarlyExit((0.5, None)).to_dict(), allow_nan=False)


def test_bad_arguments(network, images):
    plain = create_model("resnext_digits").eval()
    with pytest.raises(ValueError, match="got a plain network"):
        predict_early(plain, torch.zeros(1, 1, 8, 8), EarlyExit(()))
    with pytest.raises(ValueError, match="expected normalised energies"):
        predict_early(make_network(normalize=False).double(), images, CRITERIA[0])
    with pytest.raises(ValueError, match="margin for each of 3 coded blocks, got 1"):
        predict_early(network, images, EarlyExit((0.1,)))
    for wrong in (images[:0], images[0], images.expand(60, 3, 6, 6)):
        with pytest.raises(ValueError, match=r"x: expected \[B, 1, H, W\]"):
            predict_early(network, wrong, CRITERIA[0])
    with pytest.raises(ValueError, match="expected evaluation mode"):
        predict_early(network.train(), images, CRITERIA[0])
    assert EarlyExit.at_margin(network, 0.5).margins == (0.5, 0.5, 0.5)
