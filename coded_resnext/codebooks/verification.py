"""What holds of a document of codewords, rule by rule."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from .bounds import codebook_bounds
from .shipped import digest
from .words import distance_histogram, from_strings, is_balanced


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
    """Names, their number and the format version, as whoever loads the file asks for them."""
    from .codebook import Codebook  # Not before: it needs PyTorch, which help does without.

    name = "readable as a codebook"
    try:
        return Rule(name, True, str(Codebook.from_dict(document)).splitlines()[0])
    except ValueError as error:
        return Rule(name, False, str(error))


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
