"""Codebooks as unions of orbits: groups, their orbits, and which of these to unite.

Representatives are sampled whose orbits keep their distance. A union of orbits is free of
conflicts, of the right total size, and has few pairs at distance d. What it has to do with an orbit
is the orbit's size times what it has to do with one of its words. So all accounts are kept per
representative, and taking an orbit in or out costs `n * orbit size` overlaps instead of their
square.

Shapes: N branches, A active; n candidates, each the representative of an orbit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import comb, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .annealing import even_out
from .words import Ints, Words, all_words, is_balanced, overlaps

# All words are tried when there are no more than this, else a sample in blocks of so many digits.
ENUMERATED = 200_000
BLOCK_DIGITS = 1 << 20
Group = npt.NDArray[np.intp]
# Memory for the accounts of orbits that were met, in bytes.
CACHE_BYTES = 1 << 28
Counts = npt.NDArray[np.uint16]
# Subgroups of one order, and exchanges that level column loads, which are tried.
SUBGROUPS, EXCHANGES = 6, 2000
# Words among which single ones are chosen.
POOL = 4000


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
    """Returns at most `most` orbits, of all words when they are few, else of `samples` blocks."""
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
    """Returns the orbits of these words, each counted once, without those with a conflict
    inside."""
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
    """Returns one of each pair of inverses: x meets gx as g^-1 x meets x."""
    seen: set[bytes] = set()
    kept = []
    for permutation in group[1:]:
        if np.argsort(permutation).tobytes() not in seen:
            seen.add(permutation.tobytes())
            kept.append(permutation)
    return np.array(kept, dtype=np.intp).reshape(len(kept), group.shape[1])


def _one_per_orbit(words: Words, group: Group) -> Words:
    """Returns a word of each orbit; images are told apart by sums of fixed random numbers."""
    labels = np.asarray(np.random.default_rng(0).integers(1 << 45, size=(group.shape[1],)))
    # Sums of at most 128 such numbers are exact in float64.
    keys_of_columns = labels[group].T.astype(np.float64)
    keys = np.empty(len(words))
    step = max(1, (1 << 22) // len(group))
    for start in range(0, len(words), step):
        keys[start : start + step] = (words[start : start + step] @ keys_of_columns).min(axis=1)
    return words[np.sort(np.unique(keys, return_index=True)[1])]


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
    """Returns Z_n : Z_m, acting on itself: `(a, b)(c, d) = (a + power^b c, b + d)`.

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
    """Returns `[orbit, N]`: the distinct images of one word `[N]`, ascending as binary numbers."""
    return np.unique(word[group], axis=0)


def subgroup(group: Group, generators: Sequence[int]) -> list[int]:
    """Returns the elements generated by some elements of a group that acts freely, as row
    numbers."""
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


class Union(NamedTuple):
    """A choice of orbits without conflicts, and its number of pairs at the minimum distance."""

    chosen: tuple[int, ...]
    pairs: int


class Accounts:
    """For an orbit, how each candidate stands to it; computed when first asked for."""

    def __init__(self, candidates: Candidates, group: Group) -> None:
        self.candidates = candidates
        self.group = group
        self._rows = candidates.words.T.astype(np.float32)
        self._columns: dict[int, tuple[Counts, Counts]] = {}
        self._compatible: dict[int, int] = {}
        self._most = max(64, CACHE_BYTES // (4 * max(1, len(candidates.words))))

    def orbit(self, index: int) -> Words:
        """Returns `[size, N]`, the words of the orbit of a candidate."""
        word: Words = self.candidates.words[index]
        if self.candidates.sizes[index] == len(self.group):
            orbit: Words = word[self.group]
            return orbit
        return images(word, self.group)

    def column(self, index: int) -> tuple[Counts, Counts]:
        """Counts for each candidate the words of this orbit too near to it, and just near
        enough."""
        if index not in self._columns:
            common = self.orbit(index).astype(np.float32) @ self._rows
            limit = self.candidates.limit
            if len(self._columns) >= self._most:
                del self._columns[next(iter(self._columns))]
            self._columns[index] = (
                (common > limit).sum(axis=0, dtype=np.uint16),
                (common == limit).sum(axis=0, dtype=np.uint16),
            )
        return self._columns[index]

    def compatible(self, index: int) -> int:
        """Returns the candidates without a conflict with this one, as the bits of a number."""
        if index not in self._compatible:
            free = np.packbits(self.column(index)[0] == 0, bitorder="little")
            self._compatible[index] = int.from_bytes(free.tobytes(), "little")
        return self._compatible[index]

    def words(self, union: Union) -> Words:
        """Returns `[K, N]`, the codewords of a union."""
        return np.concatenate([self.orbit(index) for index in union.chosen])


def exchange(
    accounts: Accounts,
    slots: Sequence[int],
    steps: int,
    patience: int,
    enough: int,
    rng: np.random.Generator,
    report: Callable[[Union], None],
) -> Union | None:
    """Orbits of the sizes `slots`, found by exchanging one at a time.

    Greedy filling, then min-conflicts with a tabu list: take out a costly orbit, put in the one
    that fits best. The price of a conflict falls while there is none and rises otherwise.

    Args:
        accounts: the candidates.
        slots: size of each orbit to choose.
        steps: exchanges to make.
        patience: gives up after so many exchanges in a row with conflicts.
        enough: stops when no more pairs than this are at the minimum distance.
        rng: source of randomness.
        report: called with every improvement.

    Returns:
        The best choice met, or None when every one had a conflict.
    """
    sizes, inner = accounts.candidates.sizes, accounts.candidates.inner.astype(np.float64)
    count = len(sizes)
    if any(np.count_nonzero(sizes == size) < slots.count(size) for size in set(slots)):
        return None
    barred = {size: np.where(sizes == size, 0.0, np.inf) for size in set(slots)}
    weights = sizes.astype(np.float64)
    conflicts, near = np.zeros(count), np.zeros(count)
    tabu = np.zeros(count, dtype=np.int64)
    chosen: list[int] = []
    best: Union | None = None

    def insert(size: int, price: float, step: int) -> None:
        score = (price * conflicts + near) * weights + inner + barred[size]
        score += rng.random(count) * 0.5
        score[chosen] = np.inf
        allowed = tabu <= step
        # Where all orbits of the size are chosen or tabu, one that is tabu has to do.
        if np.isfinite(score[allowed]).any():
            score[~allowed] = np.inf
        index = int(np.argmin(score))
        clashing, touching = accounts.column(index)
        np.add(conflicts, clashing, out=conflicts)
        np.add(near, touching, out=near)
        chosen.append(index)

    def remove(position: int) -> int:
        index = chosen.pop(position)
        clashing, touching = accounts.column(index)
        np.subtract(conflicts, clashing, out=conflicts)
        np.subtract(near, touching, out=near)
        return index

    for size in slots:
        insert(size, 1e6, 0)
    price, last_clean = 1.5 * len(accounts.group), 0
    for step in range(1, steps + 1):
        members = np.array(chosen)
        own = np.array([[column[i] for column in accounts.column(i)] for i in chosen], dtype=float)
        clashing = (conflicts[members] - own[:, 0]) * weights[members]
        touching = (near[members] - own[:, 1]) * weights[members]
        if not clashing.any():
            last_clean = step
            price = max(price * 0.95, 2.0)
            pairs = int(touching.sum() / 2 + inner[members].sum())
            if best is None or pairs < best.pairs:
                best = Union(tuple(chosen), pairs)
                report(best)
        else:
            price = min(price * 1.02, 1e4)
        if step - last_clean > patience or (best is not None and best.pairs <= enough):
            break
        loads = price * clashing + touching + inner[members]
        loads += rng.random(len(chosen)) * loads.std() * 1.5
        removed = remove(int(np.argmax(loads)))
        tabu[removed] = step + 5 + int(rng.integers(5 + len(slots) // 4))
        insert(int(sizes[removed]), price, step)
    return best


def enumerate_unions(
    accounts: Accounts, total: int, nodes: int, enough: int, report: Callable[[Union], None]
) -> Union | None:
    """Returns the best union of exactly `total` words, by exhaustive search up to `nodes`
    branchings.

    Orbits are the vertices of a graph, compatible ones its edges; a union is a clique. Candidates
    are taken in ascending order; a branch is left when its orbits cannot reach the total or its
    pairs reach the best ones known.
    """
    sizes = accounts.candidates.sizes.tolist()
    inner = accounts.candidates.inner.tolist()
    of_size = {
        size: sum(1 << index for index, other in enumerate(sizes) if other == size)
        for size in sorted(set(sizes))
    }
    best: Union | None = None
    left = nodes

    def descend(missing: int, pool: int, chosen: list[int], pairs: int) -> None:
        nonlocal best, left
        if best is not None and (pairs >= best.pairs or best.pairs <= enough):
            return
        if missing == 0:
            best = Union(tuple(chosen), pairs)
            report(best)
            return
        reach = sum((pool & members).bit_count() * size for size, members in of_size.items())
        while pool and left > 0 and reach >= missing:
            lowest = pool & -pool
            index = lowest.bit_length() - 1
            pool ^= lowest
            reach -= sizes[index]
            if sizes[index] > missing:
                continue
            left -= 1
            near = accounts.column(index)[1]
            added = inner[index] + sum(int(near[other]) * sizes[other] for other in chosen)
            descend(
                missing - sizes[index],
                pool & accounts.compatible(index),
                [*chosen, index],
                pairs + added,
            )

    descend(total, (1 << len(sizes)) - 1, [], 0)
    return best


def trim(
    words: Words, count: int, group: Group, distance: int, rng: np.random.Generator
) -> Words | None:
    """Returns balanced `[count, N]` of the words of a union of orbits.

    A few words may be changed in two digits when the choice alone does not level the loads.

    Returns:
        The words, at least `distance` apart when the given ones are; None when none was found.
    """
    branches = words.shape[1]
    active = int(words[0].sum())
    degrees = _degrees(words, active - distance // 2)
    keep = np.ones(len(words), dtype=bool)
    for order in range(branches, 1, -1):
        units = int(keep.sum() - count) // order
        if branches % order == 0 and active * order % branches == 0 and units:
            for unit in _even_units(words, keep, degrees, group, order, rng)[:units]:
                keep[unit] = False
    left = np.flatnonzero(keep)
    surplus = len(left) - count
    if surplus:
        pool = left[rng.permutation(len(left))[: max(POOL, 2 * surplus)]]
        keep[pool[_level_choice(words[pool], surplus, rng)]] = False
    return even_out(words[keep], distance)


def _degrees(words: Words, limit: int) -> Ints:
    """Returns `[K]` numbers of words at the minimum distance; zeros where counting would take
    long."""
    if len(words) > 6000:
        return np.zeros(len(words), dtype=np.int64)
    degrees: Ints = (overlaps(words, words) == limit).sum(axis=1, dtype=np.int64)
    return degrees


def _even_units(
    words: Words,
    keep: npt.NDArray[np.bool_],
    degrees: Ints,
    group: Group,
    order: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Returns disjoint sets of `order` rows that load all columns equally, most pairs first."""
    row_of = {row.tobytes(): index for index, row in enumerate(words) if keep[index]}
    best: list[list[int]] = []
    best_score = -1
    for members in _subgroups(group, order, rng):
        blocks = np.unique(np.sort(group[members].T, axis=1), axis=0)
        ones = words[:, blocks].sum(axis=2)
        even = np.flatnonzero((ones == ones[:, :1]).all(axis=1) & keep)
        even = even[np.argsort(-degrees[even], kind="stable")]
        taken: set[int] = set()
        units = []
        for index in even[: 64 * order].tolist():
            if index not in taken:
                unit = {row_of.get(image.tobytes(), -1) for image in words[index][group[members]]}
                taken |= unit
                if len(unit) == order and -1 not in unit:
                    units.append(sorted(unit))
        score = sum(int(degrees[unit].sum()) for unit in units[:4])
        if units and score > best_score:
            best, best_score = units, score
    return best


def _subgroups(group: Group, order: int, rng: np.random.Generator) -> list[list[int]]:
    """Returns some subgroups of an order, found by generating from random elements."""
    subgroups = {tuple(range(len(group)))} if order == len(group) else set()
    for _ in range(0 if subgroups else 60):
        generators = rng.integers(1, len(group), size=int(rng.integers(1, 5))).tolist()
        members = tuple(subgroup(group, generators))
        if len(members) == order:
            subgroups.add(members)
        if len(subgroups) == SUBGROUPS:
            break
    return [list(members) for members in sorted(subgroups)]


def _level_choice(words: Words, count: int, rng: np.random.Generator) -> Ints:
    """Returns the indices of `count` words with column loads as equal as exchanges make them."""
    rows = words.astype(np.float64)
    chosen = rng.permutation(len(words))[:count]
    ideal = count * int(words[0].sum()) / words.shape[1]
    best, best_cost = chosen.copy(), np.inf
    for _ in range(EXCHANGES):
        loads = rows[chosen].sum(axis=0)
        cost = float(((loads - ideal) ** 2).sum())
        if cost < best_cost:
            best, best_cost = chosen.copy(), cost
            if is_balanced(words[best]):
                break
        position = int(rng.integers(count))
        without = loads - rows[chosen[position]] - ideal
        score = 2 * rows @ without + rng.random(len(words)) * (1.5 if rng.random() < 0.3 else 0.01)
        score[chosen] = np.inf
        chosen[position] = int(np.argmin(score))
    return best
