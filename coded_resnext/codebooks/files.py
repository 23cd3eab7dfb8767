"""Codewords from files: JSON, text and CSV, as they come.

* JSON: an object with a list `codewords` (and any fields of `Codebook.to_dict`), or a bare list;
  the words are strings of 0 and 1 or lists of 0 and 1.
* Text and CSV: one word per line, digits together or apart (`0110`, `0 1 1 0`, `0,1,1,0`), a class
  name before it if wanted; empty lines and lines that begin with `#` are left out.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from ..text_files import parse_json, read_text


def read_document(path: str | Path) -> dict[str, Any]:
    """The content of a file of codewords as a dictionary with a list `codewords` of strings.

    The words themselves are not checked.

    Raises:
        ValueError: the file is too large, is not text, or holds no list of words.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        return _from_json(text)
    return _from_lines(text)


def _from_json(text: str) -> dict[str, Any]:
    data = parse_json(text)
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
    lines = [line.strip() for line in text.splitlines()]
    entries = [_name_and_word(line) for line in lines if line and not line.startswith("#")]
    if not entries:
        raise ValueError("expected one codeword per line, got none")
    words = [word for _, word in entries]
    names = [name for name, _ in entries]
    return {"codewords": words, "class_names": names} if all(names) else {"codewords": words}


def _name_and_word(line: str) -> tuple[str, str]:
    """Splits a line; a class name may hold spaces, and in CSV (quoted) also commas."""
    together = re.fullmatch(r"(?:(.*?)[\s,;]+)?([01]{2,})", line)
    if together and '"' not in line:
        return together[1] or "", together[2]
    fields = next(csv.reader([line])) if "," in line else re.split(r"[\s;]+", line)
    fields = [field.strip() for field in fields]
    split = len(fields)
    while split > 0 and fields[split - 1] in ("0", "1"):
        split -= 1
    # Without single digits at the end the last field is the word.
    split = min(split, len(fields) - 1)
    return " ".join(fields[:split]), "".join(fields[split:])
