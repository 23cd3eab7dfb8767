"""Early decoding."""

from __future__ import annotations

import pytest
import torch
from support.helpers import class_margins

from coded_resnext import Codebook, decode


def test_equals_the_nearest_codeword() -> None:
    """(9) as it is written: the nearest codeword to the energies scaled to sum A."""
    book = Codebook.shipped(100, 20, 8)
    energies = torch.rand(500, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = book.active * energies / energies.sum(1, keepdim=True)
    # Differences, since squares by a product lose half of the digits.
    by_difference = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(scaled, book.codewords.double(), compute_mode=by_difference)
    # No sample lies so near the middle of two codewords that rounding would decide.
    assert float(class_margins(-distances).min()) > 1e-9
    nearest = distances.argmin(1)
    assert torch.equal(decode(energies, book), nearest)


def test_codewords_decode_to_their_classes() -> None:
    for active in (3, 5):
        book = Codebook.shipped(10, 10, active)
        assert decode(book.codewords.float(), book).tolist() == list(range(10))
        assert decode(book.codewords.float(), book.codewords).tolist() == list(range(10))


def test_a_sample_without_energy_ties_and_takes_the_lowest_class() -> None:
    assert decode(torch.zeros(1, 10), Codebook.shipped(10, 10, 3)).item() == 0


def test_autocast_does_not_round_the_energies() -> None:
    book = Codebook.from_words(["10", "01"])
    # In bfloat16 both are 1 and tie.
    energies = torch.tensor([[1.0, 1.0001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert decode(energies, book).item() == 1


def test_wrong_number_of_branches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"energies: expected \[B, 10\], got \[2, 9\]"):
        decode(torch.zeros(2, 9), Codebook.shipped(10, 10, 3))


def test_energies_that_are_not_finite_name_no_class() -> None:
    """A NaN would decode to the lowest class."""
    with pytest.raises(ValueError, match="energies: expected finite numbers"):
        decode(torch.full((1, 10), torch.nan), Codebook.shipped(10, 10, 3))
