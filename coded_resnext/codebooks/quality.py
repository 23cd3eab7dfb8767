"""How good codewords are: the rules that they keep, one by one, and their errors.

The model of the errors: every branch says "active" or "not active" for an image, each independently
wrong with probability p, and the class with the nearest codeword is chosen (ties are broken
evenly).
"""

from __future__ import annotations

from collections import Counter
from math import comb
from typing import Any, NamedTuple

import numpy as np

from .bounds import codebook_bounds
from .files import check_description, digest
from .words import CHUNK_ENTRIES, Words, distance_histogram, from_strings, is_balanced


class Rule(NamedTuple):
    """A rule and its outcome.

    Attributes:
        name: what the rule asks for.
        holds: whether it holds.
        finding: what is the case.
        required: whether words that break it are no codebook at all.
    """

    name: str
    holds: bool
    finding: str
    required: bool = True


def verify(document: dict[str, Any]) -> list[Rule]:
    """Checks the words of a document (`files.read_document`) rule by rule.

    Rules that make no sense when an earlier one is broken are left out.
    """
    words = document["codewords"]
    rules = [Rule("at least two classes", len(words) >= 2, f"{len(words)} words")]
    odd = [i for i, word in enumerate(words) if not isinstance(word, str) or set(word) - {"0", "1"}]
    shown = f"word {odd[0]} is {str(words[odd[0]])[:40]!r}" if odd else "0 and 1"
    rules.append(Rule("words of 0 and 1 only", not odd, shown))
    if odd or not words:
        return rules
    rules.append(_uniform("words of equal length", [len(word) for word in words], "digits"))
    weights = [word.count("1") for word in words]
    rules.append(_uniform("equal number of ones", weights, "ones"))
    rules.append(Rule("at least one active branch", min(weights) > 0, f"least {min(weights)} ones"))
    double = next(((word, count) for word, count in Counter(words).most_common(1)), ("", 0))
    rules.append(
        Rule(
            "no word twice",
            double[1] == 1,
            "all different"
            if double[1] == 1
            else f"word {words.index(double[0])} occurs {double[1]} times",
        )
    )
    stated = {"classes": len(words), "branches": len(words[0]), "active": weights[0]}
    for field, value in stated.items():
        if field in document:
            said = document[field]
            rules.append(Rule(f'"{field}" as stated', said == value, f"{value}, stated {said!r}"))
    if "sha256" in document:
        same = document["sha256"] == digest(words)
        rules.append(Rule("sha256 as stated", same, "same" if same else digest(words)))
    if all(rule.holds for rule in rules):
        rules += [_readable(document), *_measures(words)]
    return rules


def _readable(document: dict[str, Any]) -> Rule:
    """Checks the names, their number and the format version, as whoever loads the file does."""
    name, words = "readable as a codebook", document["codewords"]
    try:
        check_description(document, len(words))
    except ValueError as error:
        return Rule(name, False, str(error))
    sizes = f"{words[0].count('1')} of {len(words[0])} branches each"
    return Rule(name, True, f"{len(words)} classes, {sizes}")


def _uniform(name: str, values: list[int], unit: str) -> Rule:
    odd = next((i for i, value in enumerate(values) if value != values[0]), None)
    if odd is None:
        return Rule(name, True, f"{values[0]} {unit}")
    return Rule(name, False, f"word 0 has {values[0]} {unit}, word {odd} has {values[odd]}")


def _measures(words: list[str]) -> list[Rule]:
    matrix = from_strings(words)
    loads = matrix.sum(axis=0, dtype=int)
    balanced = is_balanced(matrix)
    histogram = distance_histogram(matrix)
    bounds = codebook_bounds(len(words), len(words[0]), int(matrix[0].sum()), histogram, balanced)
    return [
        Rule(
            "branches loaded equally, within one",
            balanced,
            f"{loads.min()} to {loads.max()} classes per branch",
            required=False,
        ),
        Rule("largest possible distance", bounds.optimal_distance, str(bounds), required=False),
    ]


class Quality(NamedTuple):
    """Distances, loads and errors of a codebook.

    Attributes:
        distances: number of pairs of classes at each distance, ascending.
        column_loads: for each branch, the number of classes that it works for.
        flip_probability: the probability `p` of a wrong branch.
        error_bound: upper bound (union bound) on the probability of a wrong class.
        error: the probability of a wrong class, estimated from random errors.
        standard_error: standard deviation of that estimate.
    """

    distances: dict[int, int]
    column_loads: tuple[int, ...]
    flip_probability: float
    error_bound: float
    error: float
    standard_error: float


def quality(
    words: Words, flip_probability: float = 0.1, trials: int = 10_000, seed: int = 0
) -> Quality:
    """Measures a codebook `[K, N]`.

    Args:
        words: codewords of equal weight.
        flip_probability: `p`, from 0 to 0.5.
        trials: random patterns of wrong branches.
        seed: the estimate depends on the seed and nothing else.

    Raises:
        ValueError: the probability or the number of trials is out of range.
    """
    if not 0 <= flip_probability <= 0.5:
        raise ValueError(f"flip_probability: expected 0 to 0.5, got {flip_probability}")
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    distances = distance_histogram(words)
    error, deviation = _simulated_error(words, flip_probability, trials, seed)
    return Quality(
        distances,
        tuple(words.sum(axis=0, dtype=np.int64).tolist()),
        flip_probability,
        min(1.0, _union_bound(distances, len(words), flip_probability)),
        error,
        deviation,
    )


def _union_bound(distances: dict[int, int], classes: int, p: float) -> float:
    """Returns the sum over the other classes of the probability that theirs is the nearer word.

    Only the d digits in which two words differ count: more than d/2 must be wrong, and exactly d/2
    lose every other time.
    """

    def confused(distance: int) -> float:
        def wrong(count: int) -> float:
            return float(comb(distance, count) * p**count * (1 - p) ** (distance - count))

        half = distance // 2
        return wrong(half) / 2 + sum(wrong(count) for count in range(half + 1, distance + 1))

    return sum(2 * pairs * confused(distance) for distance, pairs in distances.items()) / classes


def _simulated_error(words: Words, p: float, trials: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    K, N = words.shape
    rows = words.astype(np.float32)
    failures = np.empty(trials)
    step = max(1, CHUNK_ENTRIES // K)
    for start in range(0, trials, step):
        stop = min(start + step, trials)
        classes = rng.integers(K, size=stop - start)
        decisions = words[classes] ^ (rng.random((stop - start, N)) < p)
        # All codewords have one weight, so the nearest has most ones in common with the decisions.
        common = decisions.astype(np.float32) @ rows.T
        own = common[np.arange(len(classes)), classes][:, None]
        ties = np.count_nonzero(common == own, axis=1)
        failures[start:stop] = np.where((common > own).any(axis=1), 1.0, 1.0 - 1.0 / ties)
    return float(failures.mean()), float(failures.std() / trials**0.5)
