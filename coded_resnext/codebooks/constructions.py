"""Codebooks by algebra: the shipped ones, each from its mathematical definition.

The 32 branches of the ImageNet codebooks are the points of the affine space AG(5, 2): branch `j` is
the vector of the binary digits of `j`, addition is exclusive or. A word is a set of points.
Shapes: `words[K, N]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coded_resnext.files import say

from .bounds import pair_bound
from .files import FORMAT_VERSION, Size, digest, file_name
from .orbits import (
    Accounts,
    Group,
    abelian,
    enumerate_unions,
    full_orbits,
    join,
    metacyclic,
    orbits_of,
)
from .words import Words, all_words, from_sets, overlaps, to_strings

# Irreducible and primitive: x generates the multiplicative group of the field.
FIELD_16 = 0b10011  # x^4 + x + 1
FIELD_32 = 0b100101  # x^5 + x^2 + 1


def field_product(a: int, b: int, modulus: int) -> int:
    """Returns the product in GF(2^m); bits of a number are a polynomial over GF(2)."""
    degree = modulus.bit_length() - 1
    result = 0
    while b:
        if b & 1:
            result ^= a
        b >>= 1
        a <<= 1
        if a >> degree:
            a ^= modulus
    return result


def bch_16_of_32() -> Words:
    """Returns 1000 words 16/32 at distance 12 from the extended BCH code [32, 11, 12].

    Its words are `x -> c + Tr(a x + b x^3)` over GF(32), with Tr the trace to GF(2). For b != 0 the
    quadratic form behind Tr(b x^3) has rank 4, so that a word has weight 12, 16 or 20: two words
    differ in at least 12 points. 1054 words have weight 16, closed under complement. 1000 of them
    remain after removing 27 pairs of complements; a pair loads every branch once, which
    keeps the loads equal. The 31 pairs with b = 0 are affine hyperplanes at mutual distance 16 or
    32: removing 27 of those pairs removes 54 * 256 different pairs of words at distance 12, the
    most that 54 words can take along.
    """
    powers = [field_product(field_product(x, x, FIELD_32), x, FIELD_32) for x in range(32)]

    def trace(x: int) -> int:
        total = 0
        for _ in range(5):
            total ^= x
            x = field_product(x, x, FIELD_32)
        return total

    traces = [trace(x) for x in range(32)]
    words = np.array(
        [
            [
                c ^ traces[field_product(a, x, FIELD_32) ^ field_product(b, powers[x], FIELD_32)]
                for x in range(32)
            ]
            for b, a, c in product(range(32), range(32), range(2))
        ],
        dtype=np.uint8,
    )
    # The words with b = 0 come first, complements side by side.
    half: Words = words[words.sum(axis=1) == 16]
    return half[54:]


def planes_4_of_32() -> Words:
    """Returns 1000 planes of AG(5, 2): 4/32 at distance 4, proved optimal.

    Two planes that share three points are equal, so planes are at distance 4 at least. A plane is
    one of the 8 translates of a subspace {0, u, v, u + v}, a line of PG(4, 2). Multiplication by a
    generator of GF(32)* splits the 155 lines into 5 orbits of 31, each with 3 lines on every point.
    All planes of 4 orbits are 124 * 8 = 992 words in which every pair of branches occurs 12 times;
    the 8 translates of one more line add one to 48 of the 496 pairs. That is as even as it can be,
    and pairs of words at distance 4 are pairs of words with two branches in common.
    """
    lines = {frozenset({u, v, u ^ v}) for u, v in combinations(range(1, 32), 2)}
    orbits = []
    while lines:
        line = min(lines, key=sorted)
        orbit = [line]
        for _ in range(30):
            orbit.append(frozenset(field_product(2, point, FIELD_32) for point in orbit[-1]))
        orbits.append(orbit)
        lines -= set(orbit)
    chosen = [line for orbit in orbits[:4] for line in orbit] + [orbits[4][0]]
    planes = {
        frozenset({0, *line}): [
            frozenset(point ^ shift for point in (0, *line)) for shift in range(32)
        ]
        for line in chosen
    }
    return from_sets(
        [
            sorted(plane)
            for translates in planes.values()
            for plane in sorted(set(translates), key=sorted)
        ],
        32,
    )


def singer_group() -> Group:
    """Returns E_32 : Z_15 of order 480: translations of GF(2) x GF(16), and GF(16)*."""
    table = []
    for power in range(15):
        factor = 1
        for _ in range(power):
            factor = field_product(factor, 2, FIELD_16)
        turned = [(j & 16) | field_product(factor, j & 15, FIELD_16) for j in range(32)]
        table += [[point ^ shift for point in turned] for shift in range(32)]
    return np.array(table, dtype=np.intp)


def orbits_8_of_32() -> Words:
    """Returns 1000 words 8/32 at distance 8 from orbits of E_32 : Z_15.

    Two orbits of 480 words and one of 60 are at mutual distance 8. The 60 are the translates of 15
    subspaces of dimension 3. Each subspace has 4 translates, which load every branch once: leaving
    out those of 5 subspaces gives 1000 words and equal loads. The 5 whose words have most
    pairs at distance 8 are left out.
    """
    group, limit = singer_group(), 4
    subspaces = {
        frozenset(a * u ^ b * v ^ c * w for a, b, c in product(range(2), repeat=3))
        for u, v, w in combinations(range(1, 32), 3)
        if w != u ^ v
    }
    flats = orbits_of(from_sets(sorted(map(sorted, subspaces)), 32), group, limit)
    large = full_orbits(group, 8, limit, 2000, 60, np.random.default_rng(0))
    large = large.select(np.flatnonzero(large.sizes == 480))
    accounts = Accounts(join([flats, large]), group)
    union = enumerate_unions(accounts, 1020, 10**7, 0, lambda union: None)
    assert union is not None, "the orbits of the sample have such a union"
    words = accounts.words(union)
    near = overlaps(words, words) == limit
    # The translates of a subspace are the words that contain one point more than it, for all
    # points: moved to 0 they are the same set. The rows of the 60 words come first.
    sets = [np.flatnonzero(word).tolist() for word in words[:60]]
    directions = [tuple(sorted(point ^ points[0] for point in points)) for points in sets]
    units = [
        [row for row in range(60) if directions[row] == direction]
        for direction in sorted(set(directions))
    ]
    pairs = np.array([[np.count_nonzero(near[np.ix_(a, b)]) for b in units] for a in units])
    degrees = np.array([np.count_nonzero(near[unit]) for unit in units])

    def pairs_removed(chosen: Sequence[int]) -> int:
        return int(degrees[list(chosen)].sum() - pairs[np.ix_(chosen, chosen)].sum() // 2)

    removed = max(combinations(range(15), 5), key=pairs_removed)
    return np.delete(words, [row for unit in removed for row in units[unit]], axis=0)


def best_union(group: Group, classes: int, active: int, distance: int) -> Words:
    """Returns the union of orbits of a group with the fewest pairs at a distance, among all its
    unions.

    The words of a size must be few enough to go through all of them.
    """
    limit = active - distance // 2
    candidates = orbits_of(all_words(group.shape[1], active), group, limit)
    enough = pair_bound(classes, group.shape[1], active, distance) or 0
    accounts = Accounts(candidates, group)
    union = enumerate_unions(accounts, classes, 10**9, enough, lambda union: None)
    assert union is not None, "the group has no such union"
    return accounts.words(union)


def _complement(words: Words) -> Words:
    return (1 - words).astype(np.uint8)


class Construction(NamedTuple):
    """How a shipped codebook is made.

    Attributes:
        build: makes the codewords `[K, N]`.
        description: the mathematics in one sentence.
    """

    build: Callable[[], Words]
    description: str


def _orbits(name: str, group: Group, classes: int, active: int, distance: int) -> Construction:
    return Construction(
        lambda: best_union(group, classes, active, distance),
        f"orbits of {name} acting regularly on the branches: the union of {classes} words with the "
        f"fewest pairs at distance {distance}, by exhaustive search",
    )


F_20 = "the affine group AGL(1, 5) of order 20"

CONSTRUCTIONS: dict[Size, Construction] = {
    Size(10, 10, 3): _orbits("Z_10", abelian([2, 5]), 10, 3, 4),
    Size(10, 10, 5): _orbits("Z_10", abelian([2, 5]), 10, 5, 4),
    Size(100, 16, 4): _orbits("Z_16", abelian([16]), 100, 4, 4),
    Size(100, 16, 8): _orbits("the modular group of order 16", metacyclic(8, 2, 5), 100, 8, 6),
    Size(100, 20, 4): _orbits("Z_20", abelian([4, 5]), 100, 4, 4),
    Size(100, 20, 8): _orbits(F_20, metacyclic(5, 4, 2), 100, 8, 8),
    Size(100, 20, 12): Construction(
        lambda: _complement(best_union(metacyclic(5, 4, 2), 100, 8, 8)),
        f"complements of the 8/20 words: orbits of {F_20}",
    ),
    Size(100, 20, 16): Construction(
        lambda: _complement(best_union(abelian([4, 5]), 100, 4, 4)),
        "complements of the 4/20 words: orbits of Z_20",
    ),
    Size(1000, 32, 4): Construction(
        planes_4_of_32,
        "planes of AG(5, 2): the translates of four Singer orbits of lines of PG(4, 2) and of one "
        "more line",
    ),
    Size(1000, 32, 8): Construction(
        orbits_8_of_32,
        "two orbits of 480 and one of 60 of the group E_32 : Z_15, without the translates of five "
        "of its fifteen 3-dimensional subspaces",
    ),
    Size(1000, 32, 16): Construction(
        bch_16_of_32,
        "words of weight 16 of the extended BCH code [32, 11, 12] without 27 pairs of complements",
    ),
    Size(1000, 32, 24): Construction(
        lambda: _complement(orbits_8_of_32()),
        "complements of the 8/32 words: orbits of E_32 : Z_15",
    ),
}


# The tables that were published with the method, for CIFAR-10.
PAPER = "Coded ResNeXt: a network for designing disentangled information paths"


CIFAR10 = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


PAPER_TABLES = {
    Size(10, 10, 3): (
        "1001001000 0110001000 1010000001 0000001110 0001010100 "
        "0010100100 0000110010 0100010001 0001100001 1100000010"
    ),
    Size(10, 10, 5): (
        "1010100011 0101010101 1101100010 0011001101 1010010101 "
        "1001001110 1011101000 0100011110 0110111000 0100110011"
    ),
}


def best_content(size: Size) -> dict[str, Any]:
    """Returns the content of the data file of a constructed codebook."""
    construction = CONSTRUCTIONS[size]
    # Sorted, so that the order of the rows says nothing about the way they were made.
    words = sorted(to_strings(construction.build()))
    provenance = {
        "construction": construction.description,
        "made_by": f"coded_resnext.codebooks.constructions.CONSTRUCTIONS[{tuple(size)}]",
    }
    return _content(size, words, provenance)


def paper_content(size: Size) -> dict[str, Any]:
    """Returns the content of the data file of a published table."""
    words = PAPER_TABLES[size].split()
    provenance = {"construction": "published table for CIFAR-10", "source": PAPER}
    return {**_content(size, words, provenance), "class_names": CIFAR10}


def _content(size: Size, words: list[str], provenance: dict[str, str]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "classes": size.classes,
        "branches": size.branches,
        "active": size.active,
        "provenance": provenance,
        "sha256": digest(words),
        "codewords": words,
    }


def main() -> None:
    """Writes every data file anew."""
    folder = Path(__file__).with_name("data")
    contents = [(size, "best", best_content(size)) for size in CONSTRUCTIONS]
    contents += [(size, "paper", paper_content(size)) for size in PAPER_TABLES]
    for size, variant, content in contents:
        path = folder / file_name(size, variant)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say(f"{path.name} {content['sha256']}")


if __name__ == "__main__":
    main()
