"""Codewords from files: JSON, text and CSV, as they come.

* JSON: an object with a list `codewords` (and any fields of `Codebook.to_dict`), or a bare list;
  the words are strings of 0 and 1 or lists of 0 and 1.
* Text and CSV: one word per line, digits together or apart (`0110`, `0 1 1 0`, `0,1,1,0`), a class
  name before it if wanted; empty lines and lines that begin with `#` are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

LARGEST_FILE = 16 * 1024 * 1024


def read_document(path: str | Path) -> dict[str, Any]:
    """The content of a file of codewords as a dictionary with a list `codewords` of strings.

    The words themselves are not checked.

    Raises:
        ValueError: the file is too large, is not text, or holds no list of words.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"expected at most {LARGEST_FILE >> 20} MiB, the file is larger")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("expected text in UTF-8, got other bytes") from None
    if text.lstrip()[:1] in ("{", "["):
        return _from_json(text)
    return _from_lines(text)


def _from_json(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected JSON: {error}") from None
    document = data if isinstance(data, dict) else {"codewords": data}
    words = document.get("codewords")
    if not isinstance(words, list):
        raise ValueError('expected an object with a list "codewords"')
    return {**document, "codewords": [_joined(word) for word in words]}


def _joined(word: Any) -> Any:
    """A list of 0 and 1 as a string; anything else as it is."""
    if isinstance(word, list) and all(type(digit) is int and digit in (0, 1) for digit in word):
        return "".join(map(str, word))
    return word


def _from_lines(text: str) -> dict[str, Any]:
    names: list[str] = []
    words: list[str] = []
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            fields = [field.strip('"') for field in re.split(r"[\s,;]+", line.strip(" ,;\t\r"))]
            digits = len(fields)
            while digits > 1 and fields[digits - 1] in ("0", "1"):
                digits -= 1
            # Single digits at the end of the line are one word; else the last field is.
            split = digits if digits < len(fields) - 1 else len(fields) - 1
            if digits == 1 and fields[0] in ("0", "1") and len(fields) > 1:
                split = 0
            words.append("".join(fields[split:]))
            names.append(" ".join(fields[:split]))
    if not words:
        raise ValueError("expected one codeword per line, got none")
    return {"codewords": words, "class_names": names} if all(names) else {"codewords": words}
