"""The ablation without energy normalisation against the definition, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import assert_same_network, relative_error
from torch import nn

from coded_resnext import Codebook, CodedResNeXt, Stage, extract_classifier
from coded_resnext.interpret import observe
from coded_resnext.kernels.coded.functional import normalized_branches
from coded_resnext.kernels.coded.gram import split_weight
from coded_resnext.kernels.coded.reference import branch_outputs
from coded_resnext.models.checkpoint import load_model, save_model
from coded_resnext.models.published import published_block_state


def coded_aggregate(
    h: torch.Tensor,
    weight: torch.Tensor,
    branches: int,
    drop_mask: torch.Tensor,
    keep_mask: torch.Tensor,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation with its convolution, as a block has it."""
    scaled, energies = normalized_branches(
        h, weight, branches, drop_mask=drop_mask, keep_mask=keep_mask, **settings
    )
    groups = branches if settings.get("aggregation") == "concat" else 1
    return torch.nn.functional.conv2d(scaled, weight, groups=groups), energies


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_branches_are_summed_as_they_are(
    concatenate: bool, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    h = torch.randn(3, 4 * 2, 5, 3, dtype=torch.float64).to(memory_format=memory_format)
    weight = torch.randn(12, 2 if concatenate else 8, 1, 1, dtype=torch.float64)
    drop = torch.tensor([[2.0, 0, 2, 2]] * 3).double()
    keep = torch.tensor([[1.0, 1, 1, 0]] * 3).double()
    branches = branch_outputs(h, split_weight(weight, 4, concatenate=concatenate))
    masked = branches * (drop * keep)[:, :, None, None, None]
    expected = masked.flatten(1, 2) if concatenate else masked.sum(1)
    aggregation = "concat" if concatenate else "sum"
    y, energies = coded_aggregate(
        h, weight, 4, drop, keep, aggregation=aggregation, normalize=False
    )
    assert relative_error(y, expected) < 1e-12
    # Removal comes before the energies, DropSubNNs after them.
    assert relative_error(energies, branches.square().mean((2, 3, 4)) * keep) < 1e-12


@pytest.mark.parametrize("normalize", [True, False], ids=["cut out", "unnormalised"])
@pytest.mark.parametrize("stored", [False, True], ids=["weights", "stored form"])
def test_gradients(normalize: bool, stored: bool) -> None:
    """Gradients of three of five branches, and without normalisation, by finite differences.

    Nothing flows through a dead sample.
    """
    torch.manual_seed(0)
    h = torch.rand(3, 3 * 2, 4, 3, dtype=torch.float64)
    h[1] = 0
    weight = torch.randn(6, 6, 1, 1, dtype=torch.float64)
    form = torch.eye(2, dtype=torch.float64).expand(3, 2, 2) if stored else None

    def aggregate(h: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        settings = {"branches_of_whole": 5, "normalize": normalize, "form": form}
        keep = torch.tensor([[1.0, 1, 0]] * len(h)).double()
        return coded_aggregate(h, weight, 3, keep, keep, **settings)

    alive = h[::2].clone().requires_grad_()
    assert torch.autograd.gradcheck(aggregate, (alive, weight.requires_grad_()))
    y, energies = aggregate(h.requires_grad_(), weight)
    (y.square().sum() + energies.pow(3).sum()).backward()
    assert torch.equal(h.grad[1], torch.zeros_like(h[1]))
    assert h.grad.isfinite().all()


def make_network(normalize: bool) -> CodedResNeXt:
    torch.manual_seed(0)
    book = Codebook.from_words(["1100", "0110", "0011"])
    model = CodedResNeXt(
        [Stage(2, 8, 2, 4, 2)], 3, codebooks=[book], stem_channels=4, normalize=normalize
    )
    for block in model.blocks:
        nn.init.ones_(block.expand_bn.weight)
    return model.eval()


def test_networks_differ_are_saved_and_can_be_observed(tmp_path) -> None:
    model, x = make_network(False), torch.randn(6, 3, 5, 5)
    with torch.no_grad():
        logits, energies = model(x, return_energies=True)
        assert not torch.allclose(logits, make_network(True)(x), atol=1e-3)
    assert not torch.allclose(energies[0].sum(1), torch.full((6,), 4.0), atol=0.1)
    save_model(tmp_path / "model.safetensors", model)
    with torch.no_grad():
        assert_same_network(load_model(tmp_path).model, model, x)
    # The experiments compare energies with codewords, on whose scale these are brought.
    observed = observe(model, [(x, torch.arange(6) % 3)])
    for actual, raw in zip(observed.energies, energies, strict=True):
        assert torch.allclose(actual, 4 * raw / raw.sum(1, keepdim=True), atol=1e-5)


def test_refused_where_a_mean_energy_is_assumed() -> None:
    model = make_network(False)
    with pytest.raises(ValueError, match="expected one with energy normalisation"):
        extract_classifier(model, 0)
    with pytest.raises(ValueError, match="expected one with energy normalisation"):
        published_block_state(model.blocks[0])
