"""Cut-out classifiers: equal to the masked network, with its branches and no others."""

from __future__ import annotations

import pytest
import torch
from support.helpers import ANOTHER_ORDER, assert_alike, below, load_golden, relative_error
from support.random_networks import IMAGE_SIZES, make_images, make_random
from support.small_networks import make_images as small_images
from support.small_networks import make_network

from coded_resnext import create_model, extract_classifier, extract_subset
from coded_resnext.deploy.cost import BlockSizes
from coded_resnext.deploy.extract import class_index, kept_branches
from coded_resnext.models.published import published_model

PAPER = [name for name in IMAGE_SIZES if "digits" not in name]


def masked_logits(model, x, classes):
    """Column j: the logit of class j of the network without the branches of other classes."""
    samples = len(x)
    repeated = x.repeat(len(classes), 1, 1, 1)
    keep = torch.tensor(classes).repeat_interleave(samples)
    with torch.inference_mode():
        logits = model(repeated, keep=keep)
    return logits.gather(1, keep[:, None]).view(len(classes), samples).T


@pytest.mark.parametrize("dtype", ANOTHER_ORDER)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name.endswith(("20x6d", "50_32x4d")) else ())
        for name in IMAGE_SIZES
    ],
)
def test_equal_to_the_masked_network(name, dtype):
    model = make_random(name).to(dtype)
    x = make_images(name).to(dtype)
    step = max(1, model.num_classes // 20)
    classes = list(range(0, model.num_classes, step))[:20]
    expected = masked_logits(model, x, classes)
    with torch.inference_mode():
        found = torch.stack([extract_classifier(model, index)(x) for index in classes], 1)
        folded = torch.stack(
            [extract_classifier(model, index, fold_batch_norm=True)(x) for index in classes[:3]], 1
        )
    # Sums are over fewer branches.
    assert_alike(found, expected)
    assert_alike(folded, expected[:, :3])


def test_golden_single_class_logits():
    meta, golden = load_golden("net_cifar10")
    model = published_model(below(golden, "state."), meta["architecture"])
    index = int(golden["single_class"])
    for folded in (False, True):
        classifier = extract_classifier(model, index, fold_batch_norm=folded)
        with torch.inference_mode():
            found = classifier(golden["x"])
        assert relative_error(found, golden["single_class_logits"][:, index]) < 1e-12


def test_subset_has_the_union_of_the_branches():
    model = make_network().double()
    x = small_images(5, seed=3).double()
    classes = [1, 0]
    masks = [block.codewords[classes].any(0).expand(5, -1) for block in model.coded_blocks]
    expected = model(x, keep=masks)[:, classes]
    subset = extract_subset(model, ["bee", 0])
    assert subset.class_names == ("bee", "ant")
    assert relative_error(subset(x), expected) < 1e-12
    # 11100 and 01110, 1100 and 0110; plain blocks stay whole.
    kept = [5, 4, 4, 4, 3]
    assert [block.branches for block in subset.blocks] == kept
    assert [BlockSizes.of(block) for block in subset.blocks] == list(subset.config.blocks)
    assert [len(kept_branches(block, [0, 1])) for block in model.blocks] == kept


def test_all_classes_are_the_whole_network():
    model = make_network().double()
    x = small_images(5, seed=3).double()
    for folded in (False, True):
        whole = extract_subset(model, model.class_names, fold_batch_norm=folded)
        assert relative_error(whole(x), model(x)) < 1e-12


def test_weights_are_slices_and_copies():
    model = make_network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classifier = extract_classifier(model, "cat")
    block, part = model.coded_blocks[0], classifier.blocks[1]
    # The codeword of cat is 00111, and a branch is two channels wide.
    channels = torch.tensor([4, 5, 6, 7, 8, 9])
    assert torch.equal(part.reduce.weight, block.reduce.weight[channels])
    assert torch.equal(part.grouped.weight, block.grouped.weight[channels])
    assert torch.equal(part.expand.weight, block.expand.weight[:, channels])
    assert torch.equal(part.grouped_bn.running_var, block.grouped_bn.running_var[channels])
    assert torch.equal(classifier.head.weight, model.head.weight[2:3])
    assert part.grouped.groups == 3
    for parameter in classifier.parameters():
        torch.nn.init.ones_(parameter)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_mode_and_dtype():
    model = make_network().double().train()
    x = small_images(5, seed=3).double()
    classifier = extract_classifier(model, 0)
    assert model.training
    assert not any(module.training for module in classifier.modules())
    assert classifier(x).dtype == torch.float64
    assert relative_error(classifier(x), model.eval()(x, keep=0)[:, 0]) < 1e-12


@pytest.mark.parametrize("folded", [False, True])
def test_samples_without_energy(folded):
    """Around the mean energy of 1e-24, where the definition replaces the inverse by zero."""
    model = make_network().double()
    block = model.coded_blocks[1]
    weight = block.expand.weight.detach().clone()
    x = small_images(4, seed=3).double()
    outcomes = set()
    for exponent in [*range(-13, -9), *torch.linspace(-12.6, -11.4, 13).tolist()]:
        with torch.no_grad():
            block.expand.weight.copy_(weight * 10**exponent)
            _, energies = model(x, return_energies=True, keep=2)
            expected = model(x, keep=2)[:, 2]
            found = extract_classifier(model, 2, fold_batch_norm=folded)(x)
        outcomes |= set((energies[1].sum(1) > 0).tolist())
        assert relative_error(found, expected) < 1e-9, exponent
    assert outcomes == {False, True}
    with torch.no_grad():
        block.expand.weight.zero_()
        found = extract_classifier(model, 2, fold_batch_norm=folded)(x)
        assert relative_error(found, model(x, keep=2)[:, 2]) < 1e-12


def test_energies_stay_in_float32_under_autocast():
    model = make_network()
    x = small_images(8, seed=3)
    classifier = extract_classifier(model, 1)
    with torch.inference_mode():
        expected = classifier(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = classifier(x).float()
    # bfloat16 has 8 bits. 0.004, and 0.004 to 0.073 over eight seeds of weights; five of them under
    # the oldest instructions of tests/portability.py give the same: AMD EPYC, torch 2.14.1,
    # 2026-11-29.
    assert 0 < relative_error(found, expected) < 0.1


def test_thresholds():
    model = make_network()
    x = small_images(40, seed=4)
    with torch.inference_mode():
        logits = extract_classifier(model, "ant")(x)
    threshold = float(logits.sort().values[30])
    classifier = extract_classifier(model, "ant", threshold=threshold)
    assert torch.equal(classifier.predict(x), logits >= threshold)
    assert int(classifier.predict(x).sum()) == 10
    with pytest.raises(ValueError, match="threshold: expected a number, got None"):
        extract_classifier(model, "ant").predict(x)


def test_a_skip_of_low_rank_is_thinned_without_loss():
    model = make_random("coded_resnext_digits").double()
    x = make_images("coded_resnext_digits").double()
    generator = torch.Generator().manual_seed(5)
    for block in model.blocks:
        if isinstance(block.skip, torch.nn.Sequential):
            conv = block.skip[0]
            left = torch.randn(conv.out_channels, 5, generator=generator, dtype=torch.float64)
            right = torch.randn(5, conv.in_channels, generator=generator, dtype=torch.float64)
            conv.weight.data = (left @ right)[:, :, None, None] / 10
    expected = masked_logits(model, x, [7])[:, 0]
    for folded in (False, True):
        # A quarter of 32 channels is the lowest rank, 8.
        thin = extract_classifier(model, 7, skip_rank=0.25, fold_batch_norm=folded)
        assert [sizes.skip_rank for sizes in thin.config.blocks] == [8, 15, None, 30, None]
        assert relative_error(thin(x), expected) < 1e-11
        # Rank 3 is not enough, and half of the rank is not smaller than the whole.
        assert relative_error(extract_classifier(model, 7, skip_rank=0.1)(x), expected) > 1e-6
    half = extract_classifier(model, 7, skip_rank=1.0)
    assert all(sizes.skip_rank is None for sizes in half.config.blocks)


def test_thinned_skips_are_the_best_of_their_rank():
    model = make_random("coded_resnext_digits").double()
    thin = extract_classifier(model, 0, skip_rank=0.3)
    skip, block = thin.blocks[3].skip, model.blocks[3]
    gain = block.skip[1].weight / (block.skip[1].running_var + block.skip[1].eps).sqrt()
    whole = block.skip[0].weight.flatten(1) * gain[:, None]
    product = skip[1].weight.flatten(1) @ skip[0].weight.flatten(1)
    left_out = torch.linalg.svdvals(whole.detach())[skip[0].out_channels :]
    error = (whole - product).detach().square().sum()
    assert float(error) == pytest.approx(float(left_out.square().sum()), rel=1e-9)


NAMES = ["tabby cat", "tiger cat", "golden retriever", "Red Fox"]


def test_a_class_that_does_not_exist():
    assert class_index(NAMES, "tiger cat") == 1
    assert class_index(NAMES, 3) == 3
    with pytest.raises(ValueError, match="got 'tigercat'; the nearest: tiger cat"):
        class_index(NAMES, "tigercat")
    with pytest.raises(ValueError, match="the nearest: Red Fox"):
        class_index(NAMES, "red fox")
    with pytest.raises(ValueError, match="got 'zzz'; none comes near"):
        class_index(NAMES, "zzz")
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"class: expected 0 to 3, got {wrong}"):
            class_index(NAMES, wrong)


def test_what_cannot_be_cut_out():
    plain = create_model("resnext_digits")
    with pytest.raises(ValueError, match="got a plain network"):
        extract_classifier(plain, 0)
    concatenating = create_model("coded_resnext_digits", aggregation="concat")
    with pytest.raises(ValueError, match="got one that concatenates"):
        extract_classifier(concatenating, 0)
    model = make_network()
    for rank in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match="skip_rank: expected a share"):
            extract_classifier(model, 0, skip_rank=rank)
    for classes in ([], [1, "bee"]):
        with pytest.raises(ValueError, match="classes: expected one or more, each once"):
            extract_subset(model, classes)
    with pytest.raises(ValueError, match=r"classes: expected Sequence.*, got str"):
        extract_subset(model, "bee")
    classifier = extract_classifier(model, 0)
    for shape in ((1, 3, 6, 6), (1, 6, 6), (0, 1, 6, 6)):
        with pytest.raises(ValueError, match=r"x: expected \[B, 1, H, W\]"):
            classifier(torch.zeros(shape))
