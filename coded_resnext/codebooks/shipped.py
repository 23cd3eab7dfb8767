"""The codebooks that come with the package: JSON files under `data/`, one per size and variant.

Variants: `best`, the best that is known; `paper`, the published codewords; `paper_d8`, a second
published table of the same size, for ImageNet, which the published code calls `D8`.

Each file has the fields of `Codebook.to_dict` and two more: `provenance`, which says how the
codewords were made and how to make them again, and `sha256`, the digest of the codewords.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from coded_resnext.files import parse_json

FORMAT_VERSION = 1
VARIANTS = ("best", "paper", "paper_d8")
# Which table codewords are, for a person; None for those that are not shipped.
IN_WORDS: dict[str | None, str] = {
    "best": "the best known codewords",
    "paper": "the published codewords",
    "paper_d8": "the published codewords D8",
    None: "codewords of its own",
}


class Size(NamedTuple):
    """The numbers that name a codebook: classes `K`, branches `N`, active branches `A`."""

    classes: int
    branches: int
    active: int

    def __str__(self) -> str:
        return f"{self.classes} x {self.active}/{self.branches}"


def digest(words: Iterable[str]) -> str:
    """SHA-256 of the codewords as text, one per line, in hexadecimal."""
    return hashlib.sha256("\n".join(words).encode("ascii")).hexdigest()


def file_name(size: Size, variant: str = "best") -> str:
    """Name of the data file of a size: `K100_8of20.json`, `K10_3of10_paper.json`."""
    suffix = "" if variant == "best" else f"_{variant}"
    return f"K{size.classes}_{size.active}of{size.branches}{suffix}.json"


def shipped_sizes(variant: str = "best") -> tuple[Size, ...]:
    """Returns the sizes that are shipped, ascending."""
    _check_variant(variant)
    sizes = []
    for entry in files(__package__).joinpath("data").iterdir():
        stem, _, kind = entry.name.removesuffix(".json").partition("_")
        ratio, _, kind = kind.partition("_")
        if entry.name.endswith(".json") and (kind or "best") == variant:
            active, branches = ratio.split("of")
            sizes.append(Size(int(stem[1:]), int(branches), int(active)))
    return tuple(sorted(sizes))


def load_shipped(size: Size, variant: str = "best") -> dict[str, Any]:
    """Returns the content of a data file, its codewords checked against its digest.

    Raises:
        ValueError: there is no such variant, none is shipped in this size (the message names the
            sizes that are), or the file is damaged.
    """
    sizes = shipped_sizes(variant)
    if size not in sizes:
        raise ValueError(
            f"no {variant!r} codebook of {size} (classes x active/branches) is shipped; there are "
            f"{', '.join(map(str, sizes))}"
        )
    name = file_name(size, variant)
    path = files(__package__).joinpath("data", name)
    content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    if digest(content["codewords"]) != content["sha256"]:
        raise ValueError(f"{name}: the codewords do not match their sha256; install anew")
    return content


def variant_of(size: Size, words: Sequence[str]) -> str | None:
    """Returns the variant that these codewords are, the published where both are; None for none."""
    shipped = (v for v in ("paper", "paper_d8", "best") if size in shipped_sizes(v))
    return next((v for v in shipped if load_shipped(size, v)["sha256"] == digest(words)), None)


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
