"""The coded bottleneck: initialisation, strides and skips, DropSubNNs, removal, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.helpers import assert_alike, map_and_energies, relative_error
from torch import nn

from coded_resnext import Codebook, CodedBottleneck, DropSubNNs

BOOK = Codebook.from_words(["1100", "0110", "0011"])


def make_block(**changes: Any) -> CodedBottleneck:
    """A small coded block in float64 whose last BatchNorm lets the branches through."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "in_channels": 6,
        "channels": 8,
        "width": 3,
        "branches": 4,
        "codebook": BOOK,
        **changes,
    }
    block = CodedBottleneck(**arguments).double()
    nn.init.ones_(block.expand_bn.weight)
    return block


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (4, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_fast_block_are_those_of_the_definition(
    stride: int, height: int, width: int, masked: bool
) -> None:
    x = torch.randn(3, 6, height, width, dtype=torch.float64)
    masks = {}
    if masked:
        masks["drop_mask"] = torch.tensor([[0, 2.0, 2, 0]] * 3)
        masks["keep_mask"] = BOOK.codewords
    gradients = {}
    for backend in ("reference", "torch"):
        block = make_block(stride=stride, backend=backend)
        inputs = x.clone().requires_grad_()
        y, energies = map_and_energies(block, inputs, **masks)
        assert y.shape == (3, 8, -(-height // stride), -(-width // stride))
        (y.sin().sum() + energies.pow(3).sum()).backward()
        gradients[backend] = [y, energies, inputs.grad, *(p.grad for p in block.parameters())]
    for found, expected in zip(*gradients.values(), strict=True):
        # A BatchNorm over a single value per channel passes nothing on: both are rounding noise.
        if expected.abs().max() > 1e-9:
            assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_of_a_whole_block(stride: int) -> None:
    block = make_block(stride=stride, width=1, channels=4).eval()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: map_and_energies(block, x), (x,))


def test_initialisation() -> None:
    """Kaiming by PyTorch's fan-out; a coded expand convolution counts N*C outputs; last BN zero."""
    book = Codebook.shipped(10, 10, 5)
    torch.manual_seed(0)
    coded, plain = (CodedBottleneck(256, 512, 22, 10, codebook) for codebook in (book, None))
    expected = {
        "reduce": math.sqrt(2 / 220),
        "grouped": math.sqrt(2 / (9 * 220)),
        "skip.0": math.sqrt(2 / 512),
    }
    for block, expand in ((coded, math.sqrt(2 / (10 * 512))), (plain, math.sqrt(2 / 512))):
        for name, std in {**expected, "expand": expand}.items():
            weight = block.get_parameter(f"{name}.weight")
            # The deviation of the sample deviation is std / sqrt(2 n); six of them.
            assert float(weight.detach().std()) == pytest.approx(
                std, rel=6 / math.sqrt(2 * weight.numel())
            )
        assert (block.expand_bn.weight == 0).all()
        assert (block.grouped_bn.weight == 1).all()


def test_coded_and_plain_blocks_have_the_same_parameters() -> None:
    coded, plain = make_block(), make_block(codebook=None)
    assert {n: p.shape for n, p in coded.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }


def test_plain_block_is_the_resnext_block() -> None:
    block = make_block(codebook=None).eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    y, energies = map_and_energies(block, x)
    assert energies is None
    h = block.reduce_bn(block.reduce(x)).relu()
    h = block.grouped_bn(block.grouped(h)).relu()
    expected = (block.expand_bn(block.expand(h)) + block.skip(x)).relu()
    assert_alike(y, expected)


def test_identity_skip_where_the_shape_stays() -> None:
    assert isinstance(make_block(in_channels=8).skip, nn.Identity)
    assert not isinstance(make_block(in_channels=8, stride=2).skip, nn.Identity)
    assert not isinstance(make_block(in_channels=6).skip, nn.Identity)


def test_drop_mask_has_the_right_values_and_rate() -> None:
    drop = DropSubNNs(0.2).train()
    torch.manual_seed(0)
    mask = drop(4000, 10, torch.zeros(1))
    assert mask is not None
    assert set(mask.unique().tolist()) == {0.0, 1.25}
    # 40,000 draws: the deviation of the share is 0.002.
    assert float((mask == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert drop.eval()(4, 10, torch.zeros(1)) is None
    assert DropSubNNs(0.0).train()(4, 10, torch.zeros(1)) is None


def test_dropping_changes_neither_energies_nor_their_gradient() -> None:
    x = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    block = make_block()
    found = []
    for mask in (torch.ones(3, 4), torch.tensor([[0, 2.0, 2.0, 0]] * 3)):
        _, energies = map_and_energies(block, x, drop_mask=mask)
        (gradient,) = torch.autograd.grad(energies.pow(3).sum(), block.expand.weight)
        found.append((energies, gradient))
    # The mask has no part in what is computed: the same instructions on the same data.
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_block_draws_its_own_mask_in_training_only() -> None:
    x = torch.randn(8, 6, 5, 5, dtype=torch.float64)
    block = make_block(drop_branches=0.5)
    torch.manual_seed(1)
    mask = block.draw_drop_mask(x)
    torch.manual_seed(1)
    drawn = block(x)
    given = block(x, drop_mask=mask)
    # The same mask, and in evaluation none: the same instructions on the same data.
    assert torch.equal(drawn, given)
    block.eval()
    assert torch.equal(block(x), block(x))


def test_removed_branches_do_not_matter() -> None:
    """(10): weights of removed branches have no influence, and the rest is renormalised."""
    block = make_block().eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    keep = torch.tensor([[1, 0, 1, 0]] * 2)
    y, energies = map_and_energies(block, x, keep_mask=keep)
    assert energies[:, [1, 3]].abs().max() == 0
    assert energies.sum(1).tolist() == pytest.approx([4, 4])
    with torch.no_grad():
        block.expand.weight.view(8, 4, 3)[:, [1, 3]] = 7.0
    changed = block(x, keep_mask=keep)
    # What is 0 times another finite number adds exactly nothing, on every processor.
    assert torch.equal(y, changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": 0}, "branches: expected a positive integer, got 0"),
        ({"width": -1}, "width: expected a positive integer, got -1"),
        ({"branches": 5}, "codebook: expected 5 branches as in the block, got 4"),
        ({"drop_branches": 1.0}, "drop_branches: expected a probability 0 <= p < 1, got 1.0"),
        ({"drop_branches": -0.1}, "drop_branches: .* got -0.1"),
        ({"aggregation": "mean"}, "aggregation: expected 'sum' or 'concat', got 'mean'"),
        ({"aggregation": "concat", "channels": 9}, "channels: expected a multiple of 4 branches"),
        (
            {"normalized_by": 6},
            "normalized_by: expected at least 4 branches and no codebook, got 6",
        ),
        ({"backend": "gpu"}, "backend: expected one of"),
    ],
)
def test_constructor_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_block(**changes)


@pytest.mark.parametrize(
    ("x", "masks", "message"),
    [
        (
            torch.zeros(0, 6, 4, 4),
            {},
            r"x: expected \[B, 6, H, W\] with B >= 1, got \[0, 6, 4, 4\]",
        ),
        (torch.zeros(2, 5, 4, 4), {}, r"x: expected \[B, 6, H, W\] .* got \[2, 5, 4, 4\]"),
        (torch.zeros(2, 6, 4), {}, r"x: .* got \[2, 6, 4\]"),
        (torch.zeros(2, 6, 4, 4), {"keep_mask": torch.ones(2, 3)}, r"keep_mask: expected \[2, 4\]"),
    ],
)
def test_forward_refuses(x: torch.Tensor, masks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_block()(x.double(), **masks)


def test_plain_block_refuses_masks() -> None:
    with pytest.raises(ValueError, match="keep_mask: expected None"):
        make_block(codebook=None)(
            torch.zeros(2, 6, 4, 4, dtype=torch.float64), keep_mask=torch.ones(2, 4)
        )


def test_weights_of_other_codewords_are_refused() -> None:
    other = Codebook.from_words(["1001", "0110", "0011"])
    with pytest.raises(ValueError, match="codewords: the weights were trained for other codewords"):
        make_block().load_state_dict(make_block(codebook=other).state_dict())
    make_block().load_state_dict(make_block().state_dict())
