"""Permutation groups and their orbits."""

import numpy as np
import pytest

from coded_resnext.codebooks.constructions import singer_group
from coded_resnext.codebooks.orbits import abelian, images, metacyclic, regular_groups, subgroup
from coded_resnext.codebooks.words import from_sets


def assert_group(group):
    """Closed, with the identity first, each element once."""
    elements = {tuple(row) for row in group.tolist()}
    assert len(elements) == len(group)
    assert group[0].tolist() == list(range(group.shape[1]))
    products = group[:, group].reshape(-1, group.shape[1])
    assert {tuple(row) for row in products.tolist()} == elements


@pytest.mark.parametrize("order", [1, 2, 6, 8, 12, 20])
def test_regular_groups(order):
    for group in regular_groups(order):
        assert group.shape == (order, order)
        assert_group(group)
        # Regular: exactly one element sends a column to another one.
        assert (np.sort(group, axis=0) == np.arange(order)[:, None]).all()


def test_numbers_of_groups():
    assert sum(1 for group in regular_groups(32) if (group[:, group[:, 0]] >= 0).all()) >= 7
    assert len(list(regular_groups(20))) == 5
    abelian_groups = [
        group
        for group in regular_groups(16)
        if all((a[b] == b[a]).all() for a in group for b in group)
    ]
    assert len(abelian_groups) == 5


def test_singer_group():
    group = singer_group()
    assert group.shape == (480, 32)
    assert_group(group)


def test_metacyclic_refuses_other_powers():
    with pytest.raises(ValueError, match="power: expected power\\^4 = 1 mod 5, got power 0"):
        metacyclic(5, 4, 0)


def test_orbits_load_all_columns_equally():
    word = from_sets([[0, 1, 5, 7, 11]], 20)[0]
    for group in regular_groups(20):
        loads = images(word, group).sum(axis=0)
        assert (loads == loads[0]).all()


def test_subgroup():
    group = abelian([4, 5])
    for generator in range(1, 20):
        members = subgroup(group, [generator])
        assert 20 % len(members) == 0
        assert_group(group[members])
