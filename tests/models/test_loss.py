"""The training loss: its terms, and errors that name the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from coded_resnext import Codebook, CodedLoss
from coded_resnext.kernels import coding_loss

BOOKS = [
    Codebook.from_words(["1100", "0110", "0011"]),
    Codebook.from_words(["1000", "0100", "0010"]),
]
LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 1.0]])
ENERGIES = [torch.tensor([[2.0, 1.5, 0.5, 0.0]] * 2), torch.tensor([[1.0, 3.0, 0.0, 0.0]] * 2)]
TARGETS = torch.tensor([0, 2])


def test_total_is_cross_entropy_plus_weighted_coding_losses() -> None:
    terms = CodedLoss(BOOKS, weight=3.0, exponent=2.0, threshold=0.1)(LOGITS, ENERGIES, TARGETS)
    coding = [
        coding_loss(e, book.codewords, TARGETS, exponent=2, threshold=0.1)
        for e, book in zip(ENERGIES, BOOKS, strict=True)
    ]
    expected = {
        "total": F.cross_entropy(LOGITS, TARGETS) + 3 * sum(coding),
        "cross_entropy": F.cross_entropy(LOGITS, TARGETS),
        "coding_1": coding[0],
        "coding_2": coding[1],
    }
    assert list(terms.named()) == list(expected)
    for name, value in terms.named().items():
        assert value.item() == pytest.approx(expected[name].item()), name
    assert terms.named()["total"] is terms.total
    assert [value.item() for value in terms.coding] == pytest.approx([c.item() for c in coding])


def test_label_smoothing_touches_the_cross_entropy_only() -> None:
    sharp = CodedLoss(BOOKS)(LOGITS, ENERGIES, TARGETS)
    smooth = CodedLoss(BOOKS, label_smoothing=0.1)(LOGITS, ENERGIES, TARGETS)
    # The same instructions on the same data.
    assert smooth.coding == sharp.coding
    smoothed = F.cross_entropy(LOGITS, TARGETS, label_smoothing=0.1)
    assert smooth.cross_entropy.item() == pytest.approx(smoothed.item())
    assert smooth.cross_entropy.item() != pytest.approx(sharp.cross_entropy.item())


def test_soft_targets_that_are_certain_equal_hard_ones() -> None:
    hard = CodedLoss(BOOKS)(LOGITS, ENERGIES, TARGETS)
    soft = CodedLoss(BOOKS)(LOGITS, ENERGIES, F.one_hot(TARGETS, 3).float())
    assert soft.total.item() == pytest.approx(hard.total.item())


def test_plain_network_has_the_cross_entropy_alone() -> None:
    terms = CodedLoss([])(LOGITS, [], TARGETS)
    assert terms.coding == ()
    assert terms.total == terms.cross_entropy


def test_terms_are_float32_for_half_precision_logits() -> None:
    terms = CodedLoss(BOOKS)(LOGITS.bfloat16(), ENERGIES, TARGETS)
    assert terms.total.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight: .* at least 0.0, got -1.0"),
        ({"weight": float("inf")}, "weight: .* got inf"),
        ({"exponent": 0.5}, "exponent: .* at least 1.0, got 0.5"),
        ({"threshold": -0.1}, "threshold: .* got -0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 <= s < 1, got 1.0"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodedLoss(BOOKS, **arguments)


def test_codebooks_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="codebooks: block 1 and block 0 differ"):
        CodedLoss([BOOKS[0], BOOKS[1].with_class_names(list("abc"))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, -1])}, "targets: expected classes 0 to 2, got -1"),
        ({"targets": torch.tensor([0, 3])}, "targets: expected classes 0 to 2, got 3"),
        ({"targets": torch.tensor([0, 1, 2])}, r"targets: expected shape \[2\] or \[2, 3\]"),
        ({"logits": torch.full((2, 3), torch.nan)}, "logits: expected finite numbers"),
        ({"logits": torch.zeros(0, 3)}, r"logits: expected \[B, K\] with B >= 1, got \[0, 3\]"),
        ({"energies": ENERGIES[:1]}, "energies: expected one tensor for each of 2 .* got 1"),
        ({"energies": [ENERGIES[0], ENERGIES[1] * torch.nan]}, "energies: expected finite"),
    ],
)
def test_forward_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": LOGITS, "energies": ENERGIES, "targets": TARGETS}
    with pytest.raises(ValueError, match=message):
        CodedLoss(BOOKS)(**{**arguments, **change})


def test_values_that_are_not_checked_go_into_the_loss() -> None:
    loss = CodedLoss(BOOKS, check_values=False)
    terms = loss(LOGITS * torch.inf, [ENERGIES[0], ENERGIES[1] * torch.nan], TARGETS)
    assert [bool(term.isfinite()) for term in terms.coding] == [True, False]
    assert not terms.cross_entropy.isfinite()
    with pytest.raises(ValueError, match="targets: expected classes 0 to 2, got 3"):
        loss(LOGITS, ENERGIES, torch.tensor([0, 3]))
