"""Write the shipped data files anew: `python -m coded_resnext.codebooks.regenerate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .algebra import CONSTRUCTIONS
from .shipped import FORMAT_VERSION, Size, digest, file_name
from .words import to_strings

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
    """The content of the data file of a constructed codebook."""
    construction = CONSTRUCTIONS[size]
    # Sorted, so that the order of the rows says nothing about the way they were made.
    words = sorted(to_strings(construction.build()))
    provenance = {
        "construction": construction.description,
        "made_by": f"coded_resnext.codebooks.algebra.CONSTRUCTIONS[{tuple(size)}]",
    }
    return _content(size, words, provenance)


def paper_content(size: Size) -> dict[str, Any]:
    """The content of the data file of a published table."""
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
    """Write every data file anew."""
    folder = Path(__file__).with_name("data")
    contents = [(size, "best", best_content(size)) for size in CONSTRUCTIONS]
    contents += [(size, "paper", paper_content(size)) for size in PAPER_TABLES]
    for size, variant, content in contents:
        path = folder / file_name(size, variant)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(path.name, content["sha256"])


if __name__ == "__main__":
    main()
