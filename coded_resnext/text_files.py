"""Text of unknown origin: read from files no larger than expected, and shown on a terminal."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

LARGEST_TEXT = 16 * 2**20
# The results of a thousand classes are 24 MiB.
LARGEST_RESULTS = 256 * 2**20
# Control and format characters (among them the marks of writing direction), separators of lines
# and paragraphs, and what a file name has that is no UTF-8.
_HIDDEN = ("Cc", "Cf", "Zl", "Zp", "Cs")


def read_text(path: str | Path, largest: int = LARGEST_TEXT) -> str:
    """The text of a file.

    Args:
        path: the file.
        largest: bytes; a larger file is refused before it is in memory.

    Raises:
        ValueError: the file is larger, or is not text in UTF-8. The message does not name it.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        limit = f"{largest >> 20} MiB" if largest >= 2**20 else f"{largest >> 10} KiB"
        raise ValueError(f"expected at most {limit}, the file is larger")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("expected text in UTF-8, got other bytes") from None


def read_json(path: str | Path, largest: int = LARGEST_TEXT) -> Any:
    """The content of a JSON file; raises as `read_text`, and a ValueError for what is no JSON."""
    return parse_json(read_text(path, largest))


def parse_json(text: str) -> Any:
    """The content of a JSON text; a ValueError also where it is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON: {error}") from None


def printable(text: object) -> str:
    """A name for one line of a terminal: what would move the cursor or hide text is escaped."""
    return "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in _HIDDEN else c
        for c in str(text)
    )


def printable_lines(text: object) -> str:
    """A message for a terminal: as `printable`, but for its line ends."""
    return "\n".join(map(printable, str(text).split("\n")))
