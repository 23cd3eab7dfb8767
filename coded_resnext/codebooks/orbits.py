"""Orbits to build codebooks from: sampling representatives whose orbits keep their distance.

Shapes: N branches, A active; n candidates, each the representative of an orbit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import comb, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .words import Ints, Words, all_words

# All words are tried when there are no more than this, else a sample in blocks of so many digits.
ENUMERATED = 200_000
BLOCK_DIGITS = 1 << 20


class Candidates(NamedTuple):
    """Representatives of orbits whose words have no more than `limit` branches in common.

    Attributes:
        words: `[n, N]`, one word of each orbit.
        sizes: `[n]` numbers of words of the orbits.
        inner: `[n]` numbers of pairs of words inside the orbit with exactly `limit` in common.
        limit: largest overlap allowed between two codewords, `A - d/2`.
    """

    words: Words
    sizes: Ints
    inner: Ints
    limit: int

    def select(self, indices: Ints) -> Candidates:
        """Returns those of some indices, in their order."""
        return Candidates(self.words[indices], self.sizes[indices], self.inner[indices], self.limit)


def full_orbits(
    group: Group, active: int, limit: int, most: int, samples: int, rng: np.random.Generator
) -> Candidates:
    """At most `most` orbits; among all words when they are few, else among `samples` blocks."""
    branches = group.shape[1]
    distant: list[Words] = []
    total = 0
    if comb(branches, active) <= ENUMERATED:
        distant.append(_distant_orbits(all_words(branches, active), group, limit))
    else:
        for _ in range(samples):
            block = _random_words(branches, active, BLOCK_DIGITS // branches, rng)
            distant.append(_distant_orbits(block, group, limit))
            total += len(distant[-1])
            if total >= most:
                break
    candidates = orbits_of(np.concatenate(distant), group, limit)
    return candidates.select(rng.permutation(len(candidates.words))[:most])


def short_orbits(
    group: Group, active: int, limit: int, size: int, most: int, rng: np.random.Generator
) -> Candidates:
    """Returns at most `most` orbits of `size` words, for a group that acts freely.

    A word has an orbit of `order / h` words when a subgroup of order `h` leaves it in place: it is
    then a union of `A / h` of the blocks into which the subgroup divides the columns.
    """
    order, branches = group.shape
    fixing = order // size
    distant = [np.zeros((0, branches), dtype=np.uint8)]
    if fixing * size == order and active % fixing == 0:
        subgroups: set[tuple[int, ...]] = {(0,)} if fixing == 1 else set()
        for _ in range(40):
            generators = rng.integers(1, order, size=int(rng.integers(1, 4))).tolist()
            members = tuple(subgroup(group, generators))
            if len(members) == fixing:
                subgroups.add(members)
        for members in sorted(subgroups):
            blocks = sorted(
                {tuple(sorted(group[list(members), j].tolist())) for j in range(branches)}
            )
            chosen = active // fixing
            if comb(len(blocks), chosen) <= 3000:
                picks = all_words(len(blocks), chosen)
            else:
                picks = _random_words(len(blocks), chosen, 3000, rng)
            words = np.zeros((len(picks), branches), dtype=np.uint8)
            for position, block in enumerate(blocks):
                words[:, list(block)] = picks[:, position : position + 1]
            distant.append(_distant_orbits(words, group, limit))
    candidates = orbits_of(np.concatenate(distant), group, limit)
    return candidates.select(rng.permutation(np.flatnonzero(candidates.sizes == size))[:most])


def orbits_of(words: Words, group: Group, limit: int) -> Candidates:
    """The orbits of these words, each counted once, without those with a conflict inside."""
    words = _one_per_orbit(_distant_orbits(words, group, limit), group)
    active = int(words[0].sum()) if len(words) else 0
    fixing = np.ones(len(words), dtype=np.int64)
    touching = np.zeros(len(words), dtype=np.int64)
    columns = np.ascontiguousarray(words.T)
    for permutation in group[1:]:
        common = (columns & columns[permutation]).sum(axis=0, dtype=np.uint8)
        fixing += common == active
        touching += (common == limit) & (common < active)
    sizes = len(group) // fixing
    return Candidates(words, sizes, sizes * (touching // fixing) // 2, limit)


def join(parts: Sequence[Candidates]) -> Candidates:
    """Returns the candidates of several lists with one limit."""
    return Candidates(
        np.concatenate([part.words for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.inner for part in parts]),
        parts[0].limit,
    )


def _random_words(branches: int, active: int, count: int, rng: np.random.Generator) -> Words:
    # In float64 there are no ties, which different processors would break differently.
    order = np.argpartition(rng.random((count, branches)), active - 1, axis=1)
    words = np.zeros((count, branches), dtype=np.uint8)
    np.put_along_axis(words, order[:, :active], 1, axis=1)
    return words


def _distant_orbits(words: Words, group: Group, limit: int) -> Words:
    """Returns the words that share at most `limit` branches with each of their other images."""
    if len(words) == 0:
        return words
    active = int(words[0].sum())
    # One column of the memory per word: moving columns is then copying contiguous rows.
    columns = np.ascontiguousarray(words.T)
    for permutation in _up_to_inverse(group):
        common = (columns & columns[permutation]).sum(axis=0, dtype=np.uint8)
        keep = (common <= limit) | (common == active)
        if not keep.all():
            columns = columns[:, keep]
    return np.ascontiguousarray(columns.T)


def _up_to_inverse(group: Group) -> Group:
    """The elements but the identity, one of each pair of inverses: x meets gx as g^-1 x meets x."""
    seen: set[bytes] = set()
    kept = []
    for permutation in group[1:]:
        if np.argsort(permutation).tobytes() not in seen:
            seen.add(permutation.tobytes())
            kept.append(permutation)
    return np.array(kept, dtype=np.intp).reshape(len(kept), group.shape[1])


def _one_per_orbit(words: Words, group: Group) -> Words:
    """One word of each orbit that occurs: images are told apart by sums of fixed random numbers."""
    labels = np.asarray(np.random.default_rng(0).integers(1 << 45, size=(group.shape[1],)))
    # Sums of at most 128 such numbers are exact in float64.
    keys_of_columns = labels[group].T.astype(np.float64)
    keys = np.empty(len(words))
    step = max(1, (1 << 22) // len(group))
    for start in range(0, len(words), step):
        keys[start : start + step] = (words[start : start + step] @ keys_of_columns).min(axis=1)
    return words[np.sort(np.unique(keys, return_index=True)[1])]


Group = npt.NDArray[np.intp]


def abelian(orders: Sequence[int]) -> Group:
    """Returns the product of the cyclic groups of these orders, acting on itself by addition."""
    elements = list(product(*map(range, orders)))
    index = {element: position for position, element in enumerate(elements)}
    return np.array(
        [
            [
                index[tuple((x + y) % n for x, y, n in zip(a, b, orders, strict=True))]
                for b in elements
            ]
            for a in elements
        ],
        dtype=np.intp,
    )


def metacyclic(normal: int, top: int, power: int) -> Group:
    """Z_n : Z_m with `(a, b)(c, d) = (a + power^b c, b + d)`, acting on itself from the left.

    `power^m = 1 mod n`. Dihedral groups have `m = 2` and `power = -1`; `(5, 4, 2)` is the group of
    the affine maps of GF(5).
    """
    if pow(power, top, normal) != 1 % normal:
        raise ValueError(f"power: expected power^{top} = 1 mod {normal}, got power {power}")
    elements = [(a, b) for b in range(top) for a in range(normal)]
    return np.array(
        [
            [
                (a + pow(power, b, normal) * c) % normal + normal * ((b + d) % top)
                for c, d in elements
            ]
            for a, b in elements
        ],
        dtype=np.intp,
    )


def regular_groups(order: int) -> Iterator[Group]:
    """Groups of this order acting on themselves: all abelian ones, then some metacyclic ones.

    Those with the most factors come first.
    """
    types = sorted(_abelian_types(order), key=lambda orders: (-len(orders), orders))
    for orders in types:
        yield abelian(orders)
    for top in range(2, order // 2 + 1):
        normal, rest = divmod(order, top)
        if rest == 0 and normal > 2:
            # Powers that generate the same multipliers give the same group.
            multipliers: set[frozenset[int]] = set()
            for power in range(2, normal):
                if pow(power, top, normal) == 1:
                    generated = frozenset(pow(power, e, normal) for e in range(top))
                    if generated not in multipliers:
                        multipliers.add(generated)
                        yield metacyclic(normal, top, power)


def images(word: Words, group: Group) -> Words:
    """`[orbit, N]`: the distinct images of one word `[N]`, ascending as binary numbers."""
    return np.unique(word[group], axis=0)


def subgroup(group: Group, generators: Sequence[int]) -> list[int]:
    """The elements generated by some elements of a group that acts freely, as row numbers."""
    # An element of a freely acting group is known by where it sends column 0.
    element = {int(image): g for g, image in enumerate(group[:, 0])}
    members, frontier = {0}, [0]
    while frontier:
        current = frontier.pop()
        for generator in generators:
            successor = element[int(group[generator, group[current, 0]])]
            if successor not in members:
                members.add(successor)
                frontier.append(successor)
    return sorted(members)


def _abelian_types(order: int) -> list[list[int]]:
    """Returns the abelian groups of an order as lists of prime-power orders of cyclic factors."""
    types: list[list[int]] = [[]]
    prime = 2
    while prod(types[0]) < order:
        exponent = 0
        while order // prod(types[0]) % prime ** (exponent + 1) == 0:
            exponent += 1
        if exponent:
            types = [
                [*orders, *(prime**part for part in parts)]
                for orders in types
                for parts in _partitions(exponent, exponent)
            ]
        prime += 1
    return types


def _partitions(total: int, largest: int) -> list[list[int]]:
    if total == 0:
        return [[]]
    return [
        [part, *rest]
        for part in range(min(total, largest), 0, -1)
        for rest in _partitions(total - part, part)
    ]
