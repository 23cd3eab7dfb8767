"""The account: the paper's fractions, a count by hand, and PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from support.random_networks import IMAGE_SIZES, make_images, make_random
from torch.utils.flop_counter import FlopCounterMode

from coded_resnext import create_model, extract_classifier
from coded_resnext.deploy.cost import BlockSizes, Cost, measure_latency, network_cost

# Network, image size, shares by all tensors and without projections, of MACs, and the rank that
# brings a classifier below 40 %.
PAPER = [
    ("coded_resnext29_10x11d", 32, 0.463, 0.372, 0.62, 0.35),
    ("coded_resnext29_20x6d", 32, 0.374, 0.271, 0.55, 0.35),
    ("coded_resnext50_32x4d", 224, 0.416, 0.343, 0.70, 0.5),
]
LARGE = pytest.param(*PAPER[2], marks=pytest.mark.long)


@pytest.mark.parametrize(("name", "size", "all_", "paper", "macs", "rank"), [*PAPER[:2], LARGE])
def test_shares_of_the_papers_networks(name, size, all_, paper, macs, rank):
    model = create_model(name)
    whole = network_cost(model, size)
    share = network_cost(extract_classifier(model, 1), size).relative_to(whole)
    assert share.parameters == pytest.approx(all_, abs=5e-4)
    assert share.parameters_without_projections == pytest.approx(paper, abs=5e-4)
    assert share.macs == pytest.approx(macs, abs=5e-3)
    assert share.macs_without_projections < share.macs
    # Thinned skips: below 40 % by parameters of both counts, and by bytes.
    thin = network_cost(extract_classifier(model, 1, skip_rank=rank), size).relative_to(whole)
    assert max(thin.parameters, thin.parameters_without_projections, thin.bytes) < 0.4


def test_parameters_by_hand():
    """The classifier of a CIFAR-10 class: 10, 5 and 3 branches, and one row of 1024 weights."""
    stem = 27 * 64 + 2 * 64
    blocks = projections = 0
    channels = 64
    for width, out, kept in ((11, 256, 10), (22, 512, 5), (44, 1024, 3)):
        wide = kept * width
        projections += channels * out + 2 * out
        for inputs in (channels, out, out):
            blocks += wide * (inputs + 9 * width + out) + 2 * (2 * wide + out)
        channels = out
    model = create_model("coded_resnext29_10x11d")
    cost = network_cost(extract_classifier(model, 4), 32)
    assert cost.projection_parameters == projections
    assert cost.parameters == stem + blocks + projections + 1024


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name.endswith("50_32x4d") else ())
        for name in IMAGE_SIZES
    ],
)
@pytest.mark.parametrize("part", ["whole", "classifier", "folded", "thin"])
def test_multiplications_by_pytorchs_counter(name, part):
    network = make_random(name)
    x = make_images(name, samples=3)
    if part != "whole":
        options = {"folded": {"fold_batch_norm": True}, "thin": {"skip_rank": 0.3}}.get(part, {})
        network = extract_classifier(network, 2, **options)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(x)
    cost = network_cost(network, x.shape[2])
    assert counter.get_total_flops() == cost.flops * 3 + 2 * cost.macs_per_pass
    assert (cost.macs_per_pass == 0) == (part == "folded")


def test_bytes_are_those_of_all_tensors():
    model = create_model("coded_resnext_digits")
    tensors = model.state_dict().values()
    expected = sum(len(t.contiguous().view(-1).view(torch.uint8)) for t in tensors if t.ndim)
    # Without dimensions: the batch counters of BatchNorm, 8 bytes each.
    expected += sum(8 for t in tensors if not t.ndim)
    assert network_cost(model, 8).bytes == expected
    assert network_cost(model.double(), 8).bytes > 1.9 * expected


def test_shares_by_hand():
    whole, part = Cost(1000, 200, 4000, 100, 20, 0), Cost(300, 100, 1000, 50, 10, 0)
    assert part.relative_to(whole).to_dict() == {
        "parameters": 0.3,
        "parameters_without_projections": 0.25,
        "bytes": 0.25,
        "macs": 0.5,
        "macs_without_projections": 0.5,
    }
    assert part.to_dict()["flops"] == 100


def test_latency_is_measured_in_evaluation_mode():
    modes = []

    class Slow(torch.nn.Module):
        def forward(self, x):
            modes.append((self.training, torch.is_inference_mode_enabled()))
            return x

    module = Slow().train()
    assert 0 < measure_latency(module, torch.zeros(1), repeats=2) < 1
    assert module.training
    assert set(modes) == {(False, True)}
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        measure_latency(module, torch.zeros(1), repeats=0)


def test_every_part_keeps_its_mode():
    model = create_model("coded_resnext_digits").train()
    model.stem.eval()
    measure_latency(model, torch.zeros(2, 1, 8, 8), repeats=1)
    assert model.training
    assert not any(module.training for module in model.stem.modules())


def test_bad_sizes():
    with pytest.raises(ValueError, match="image_size: expected a positive integer, got 0"):
        network_cost(create_model("coded_resnext_digits"), 0)
    with pytest.raises(ValueError, match=r"BlockSizes\.width: expected a positive integer, got 0"):
        BlockSizes(8, 8, 0, 4)
    with pytest.raises(ValueError, match=r"BlockSizes\.skip_rank: expected a positive integer"):
        BlockSizes(8, 8, 2, 4, skip_rank=0)
