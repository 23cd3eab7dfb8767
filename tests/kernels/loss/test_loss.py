"""The coding losses of all blocks in one launch, and early decoding, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import relative_error
from torch import Tensor

from coded_resnext.kernels import coding_losses, rows

pytestmark = pytest.mark.usefixtures("memory")


def books(blocks: int, classes: int, branches: int) -> list[Tensor]:
    """Random codewords, half of the branches active."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(blocks, classes, branches, generator=generator).argsort(2)
    return list((order < branches // 2).unbind())


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize(
    ("exponent", "threshold"), [(4.0, 0.0), (2.0, 0.1), (1.0, 0.0), (2.5, 0.05), (3.0, 0.0)]
)
@pytest.mark.parametrize(
    ("blocks", "batch", "branches", "classes"),
    [(2, 5, 10, 10), (3, 17, 20, 100), (1, 33, 32, 65), (2, 1, 4, 3)],
    ids=["cifar10", "cifar100", "two_tiles", "one_sample"],
)
def test_losses_gradients_and_classes(
    blocks: int,
    batch: int,
    branches: int,
    classes: int,
    exponent: float,
    threshold: float,
    soft: bool,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(1)
    energies = torch.rand(blocks, batch, branches, generator=generator) * 2
    # A dead sample: no energy at all, and a tie between all classes.
    energies[0, 0] = 0
    codewords = books(blocks, classes, branches)
    targets = torch.randint(classes, (batch,), generator=generator)
    if soft:
        targets = torch.randn(batch, classes, generator=generator).softmax(1)
    weights = torch.randn(blocks, generator=generator)

    def run(backend: str, dtype: torch.dtype, where: Any) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [value.to(where, dtype).requires_grad_() for value in energies]
        actual = coding_losses(
            leaves,
            [book.to(where) for book in codewords],
            targets.to(where, dtype) if soft else targets.to(where),
            exponent=exponent,
            threshold=threshold,
            decode=True,
            backend=backend,
        )
        losses = torch.stack(actual.losses)
        grads = torch.autograd.grad((losses * weights.to(losses)).sum(), leaves)
        return losses.detach(), torch.stack(grads), torch.stack(actual.decoded)

    losses, grads, decoded = run("triton", torch.float32, device)
    expected, expected_grads, expected_classes = run("torch", torch.float64, "cpu")
    # float32 sums of a few hundred terms; powers by exp2 and log2 where q is not whole.
    assert relative_error(losses.cpu().double(), expected) < 1e-6
    assert relative_error(grads.cpu().double(), expected_grads) < 2e-6
    assert torch.equal(decoded.cpu(), expected_classes)


def test_blocks_of_different_sizes_share_launches_by_size(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    launched = []
    real = rows.LaunchRow.launch
    monkeypatch.setattr(
        rows.LaunchRow,
        "launch",
        lambda row, grid, *args: (launched.append(grid), real(row, grid, *args)),
    )
    generator = torch.Generator().manual_seed(1)
    codewords = [*books(1, 7, 10), *books(1, 7, 4), *books(1, 7, 10)]
    energies = [torch.rand(3, book.shape[1], generator=generator) for book in codewords]
    targets = torch.tensor([0, 6, 3])
    actual = coding_losses(
        [value.to(device) for value in energies],
        [book.to(device) for book in codewords],
        targets.to(device),
        backend="triton",
    )
    expected = coding_losses(energies, codewords, targets, backend="torch")
    for a, b in zip(actual.losses, expected.losses, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
    # One launch for the two blocks of ten branches, one for the block of four.
    assert sorted(launched) == [(1, 1), (1, 2)]
    assert actual.decoded is None


def test_a_nan_reaches_the_loss(device: torch.device) -> None:
    energies = torch.ones(2, 4)
    energies[1, 2] = float("nan")
    (loss,) = coding_losses(
        [energies.to(device)],
        [book.to(device) for book in books(1, 3, 4)],
        torch.tensor([0, 1], device=device),
        check_values=False,
        backend="triton",
    ).losses
    assert loss.isnan()
