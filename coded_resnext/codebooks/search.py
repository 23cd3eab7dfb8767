"""A codebook for any number of classes and branches: large distance first, then few pairs at it.

From the largest distance that the bounds leave open down to 2, each is tried by

* all codebooks, where there are few;
* annealing of balanced words by switches when there are few words (`codebooks/annealing.py`);
* unions of orbits of groups that act on the branches, trimmed to the number of classes
  (`codebooks/orbits.py`), else.

Distance 2 is always reached. All budgets count steps, never time: the same arguments give the same
words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, islice
from math import comb
from random import Random
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .annealing import Annealed, anneal, even_out, even_words
from .bounds import distance_bound, pair_bound
from .orbits import (
    Accounts,
    Group,
    Union,
    enumerate_unions,
    exchange,
    full_orbits,
    join,
    regular_groups,
    short_orbits,
    trim,
)
from .words import Words, all_words, distance_histogram, first_duplicate, from_sets

# A distance is hopeless when a random word would be too near to more than so many others.
HOPELESS = 12.0
# With more classes the first group that serves is enough: the others gain little and take long.
LARGE = 5000
FEW = 40
# All codebooks are looked at where there are so few words, and digits of codebooks, in all.
SMALL_WORDS, SMALL = 1000, 10_000_000

Kept = TypeVar("Kept", Union, Annealed)


class Effort(NamedTuple):
    """Budgets of a search.

    Attributes:
        groups: groups tried per distance.
        candidates: orbits to choose from, at most.
        comparisons: of candidates and codewords in one filling of the slots, at most.
        blocks: blocks of random words sampled for them.
        exchanges: exchanges of orbits, per 4000 candidates x 32 orbits.
        nodes: branchings of the exhaustive search.
        switches: moves of the annealing.
    """

    groups: int
    candidates: int
    comparisons: int
    blocks: int
    exchanges: int
    nodes: int
    switches: int


EFFORTS = {
    "fast": Effort(1, 2000, 100_000_000, 4, 60, 2_000, 2_000),
    "default": Effort(4, 8000, 600_000_000, 20, 800, 60_000, 60_000),
    "thorough": Effort(64, 30_000, 4_000_000_000, 100, 6000, 2_000_000, 1_000_000),
}


class SearchResult(NamedTuple):
    """The best codebook of a search.

    Attributes:
        words: `[K, N]` codewords.
        distance: their minimum distance.
        pairs: number of pairs at it.
        interrupted: whether Ctrl-C ended the search early.
    """

    words: Words
    distance: int
    pairs: int
    interrupted: bool = False


class Progress(NamedTuple):
    """State of a running search: what is tried, and the best so far (distance 0: none yet)."""

    trying: str
    distance: int
    pairs: int


def search(
    classes: int,
    branches: int,
    active: int,
    effort: str = "default",
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Returns `K` distinct words of length `N` and weight `A`, column loads equal within one.

    Ctrl-C ends the search and keeps the best words so far (of distance 2 when there are none).

    Args:
        classes: `K >= 2`.
        branches: `N`.
        active: `A`, from 1 to `N`.
        effort: `"fast"`, `"default"` or `"thorough"`.
        seed: the words depend on the seed and nothing else.
        report: called when something new is tried and when something better is found.

    Raises:
        ValueError: the size is impossible, or an argument is not among the ones above.
    """
    check_size(classes, branches, active)
    if effort not in EFFORTS:
        raise ValueError(f"effort: expected one of {', '.join(EFFORTS)}, got {effort!r}")
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    if 2 * active > branches:
        complement = search(classes, branches, branches - active, effort, seed, report)
        return complement._replace(words=(1 - complement.words).astype(np.uint8))
    if _is_small(classes, branches, active):
        return _best_of_all(classes, branches, active, seed)
    return _Search(classes, branches, active, EFFORTS[effort], seed, report).run()


def _is_small(classes: int, branches: int, active: int) -> bool:
    """Says whether all codebooks of a size can be looked at."""
    words = comb(branches, active)
    return words <= SMALL_WORDS and comb(words - 1, classes - 1) * classes * branches <= SMALL


def _best_of_all(classes: int, branches: int, active: int, seed: int) -> SearchResult:
    """Returns the best of all codebooks with the first word; any word is as good as any other."""
    words = all_words(branches, active)
    chosen = np.array(list(combinations(range(1, len(words)), classes - 1)), dtype=np.int64)
    chosen = np.hstack([np.zeros((len(chosen), 1), dtype=np.int64), chosen])
    loads = words[chosen].sum(axis=1, dtype=np.int64)
    chosen = chosen[np.ptp(loads, axis=1) <= 1]
    common = words.astype(np.int64) @ words.T
    overlaps = np.stack([common[chosen[:, i], chosen[:, j]] for i, j in _pairs(classes)], axis=1)
    most = overlaps.max(axis=1)
    pairs = (overlaps == most[:, None]).sum(axis=1)
    best = np.flatnonzero((most == most.min()) & (pairs == pairs[most == most.min()].min()))
    index = best[np.random.default_rng(seed).integers(len(best))]
    return SearchResult(words[chosen[index]], 2 * (active - int(most[index])), int(pairs[index]))


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


def check_size(classes: int, branches: int, active: int) -> None:
    """Raises a ValueError that says why when no codebook of a size exists."""
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    if branches < 1:
        raise ValueError(f"branches: expected at least 1, got {branches}")
    if not 1 <= active <= branches:
        raise ValueError(f"active: expected 1 to {branches} of {branches} branches, got {active}")
    if classes > comb(branches, active):
        raise ValueError(
            f"classes: {branches} branches with {active} active have only "
            f"{comb(branches, active)} different codewords, got {classes} classes"
        )


class _Search:
    def __init__(
        self,
        classes: int,
        branches: int,
        active: int,
        effort: Effort,
        seed: int,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self.classes, self.branches, self.active = classes, branches, active
        self.effort, self.seed, self.report = effort, seed, report
        self.best: SearchResult | None = None
        self.interrupted = False

    def run(self) -> SearchResult:
        try:
            for distance in self.distances():
                self.attempt(distance)
                if self.best is not None or self.interrupted:
                    break
        except KeyboardInterrupt:
            self.interrupted = True
        if self.best is None:
            self.offer(self.floor())
        assert self.best is not None
        return self.best._replace(interrupted=self.interrupted)

    def distances(self) -> Iterator[int]:
        """Distances above 2 that are worth trying, largest first."""
        K, N, A = self.classes, self.branches, self.active
        for distance in range(distance_bound(K, N, A), 2, -2):
            # Few or nearly all words may be placed far better than random ones.
            special = K <= FEW or comb(N, A) < 20 * K
            if special or _expected_conflicts(K, N, A, distance) <= HOPELESS:
                yield distance

    def attempt(self, distance: int) -> None:
        enough = pair_bound(self.classes, self.branches, self.active, distance)
        if enough is None:
            return
        groups = self.effort.groups if self.classes <= LARGE else min(2, self.effort.groups)
        if self.classes >= self.branches:
            for index, group in enumerate(islice(regular_groups(self.branches), groups)):
                self.tell(f"distance {distance}, orbits of group {index + 1}")
                self.unite(
                    distance, group, enough, np.random.default_rng([self.seed, distance, index])
                )
                if self.interrupted or (self.best is not None and self.best.pairs <= enough):
                    return
                if self.best is not None and self.classes > LARGE:
                    break
        if self.classes <= 3 * self.branches:
            self.tell(f"distance {distance}, switches")
            steps = self.effort.switches * 64 // (64 + self.classes)
            random = Random(f"{self.seed} {distance}")  # noqa: S311
            loads = np.zeros(self.branches, dtype=np.int64)
            start = even_words(loads, self.classes, self.active, random)
            annealed = self.keep_latest(anneal, start, 0, distance, steps, enough, random)
            if annealed is not None:
                self.offer(annealed.words)

    def unite(self, distance: int, group: Group, enough: int, rng: np.random.Generator) -> None:
        """Offers the best unions of orbits of one group."""
        limit = self.active - distance // 2
        effort = self.effort
        full, rest = divmod(self.classes, self.branches)
        # Filling the slots compares every candidate with every codeword.
        wanted = effort.candidates + 60 * full
        most = max(4 * full + 8, min(wanted, effort.comparisons // self.classes))
        candidates = full_orbits(group, self.active, limit, most, effort.blocks, rng)
        slots = [self.branches] * full
        short = self.short_size(rest)
        if short:
            parts = short_orbits(group, self.active, limit, short, most, rng)
            if len(parts.words) >= rest // short:
                candidates = join([candidates, parts])
                slots += [short] * (rest // short)
        if sum(slots) < self.classes:
            slots.append(self.branches)
        if len(candidates.words) < len(slots):
            return
        accounts = Accounts(candidates, group)
        steps = min(
            2 * effort.exchanges,
            max(8, effort.exchanges * 4000 * 32 // (len(candidates.words) * max(32, len(slots)))),
        )
        patience = max(8, steps // 3)
        union = self.keep_latest(exchange, accounts, slots, steps, patience, enough, rng)
        self.offer_union(accounts, union, distance, rng)
        if len(slots) <= 10 and not self.interrupted:
            accounted = effort.comparisons // (len(candidates.words) * self.branches)
            nodes = effort.nodes if accounted >= len(candidates.words) else accounted
            union = self.keep_latest(enumerate_unions, accounts, self.classes, nodes, enough)
            self.offer_union(accounts, union, distance, rng)

    def short_size(self, rest: int) -> int:
        """Returns the size of short orbits that add up to `rest` words; 0: there are none."""
        for fixing in range(2, self.branches):
            size, remainder = divmod(self.branches, fixing)
            if remainder == 0 and self.active % fixing == 0 and rest and rest % size == 0:
                return size
        return 0

    def offer_union(
        self, accounts: Accounts, union: Union | None, distance: int, rng: np.random.Generator
    ) -> None:
        if union is not None:
            words: Words | None = accounts.words(union)
            assert words is not None
            if len(words) > self.classes:
                words = trim(words, self.classes, accounts.group, distance, rng)
            if words is not None:
                self.offer(words)

    def keep_latest(self, method: Callable[..., Kept | None], *arguments: Any) -> Kept | None:
        """Returns what a method returns, or what it last reported when Ctrl-C ended it."""
        latest: list[Kept] = []
        try:
            return method(*arguments, report=latest.append)
        except KeyboardInterrupt:
            self.interrupted = True
            return latest[-1] if latest else None

    def offer(self, words: Words) -> None:
        if len(words) != self.classes:
            raise RuntimeError(f"expected {self.classes} words, the search has {len(words)}")
        distances = distance_histogram(words)
        distance = min(distances)
        candidate = SearchResult(words, distance, distances[distance])
        if self.best is None or (distance, -candidate.pairs) > (
            self.best.distance,
            -self.best.pairs,
        ):
            self.best = candidate
            self.tell("found")

    def tell(self, trying: str) -> None:
        if self.report is not None:
            distance, pairs = (0, 0) if self.best is None else self.best[1:3]
            self.report(Progress(trying, distance, pairs))

    def floor(self) -> Words:
        """Returns distinct balanced words: distance 2, which is always possible."""
        random = Random(f"{self.seed} floor")  # noqa: S311
        if comb(self.branches, self.active) <= 4 * self.classes:
            words = all_words(self.branches, self.active)
            order = sorted(range(len(words)), key=lambda index: random.random())
            words = words[sorted(order[: self.classes])]
        else:
            words = even_words(
                np.zeros(self.branches, dtype=np.int64), self.classes, self.active, random
            )
            while (pair := first_duplicate(words)) is not None:
                members = random.sample(range(self.branches), self.active)
                words[pair[1]] = from_sets([members], self.branches)[0]
        level = even_out(words, 2)
        assert level is not None
        return level


def _expected_conflicts(classes: int, branches: int, active: int, distance: int) -> float:
    """Returns the number of words that a random word is expected to be too near to."""
    near = sum(
        comb(active, common) * comb(branches - active, active - common)
        for common in range(active - distance // 2 + 1, active + 1)
    )
    return (classes - 1) * near / comb(branches, active)
