"""Codewords in files: those that come with the package, and JSON, CSV and text of any origin.

The package has a JSON file under `data/` for every size and variant. Variants: `best`, the best
that is known; `paper`, the published codewords; `paper_d8`, a second published table of the same
size, for ImageNet, which the published code calls `D8`. Each file has the fields of
`Codebook.to_dict` and two more: `provenance`, which says how the codewords were made and how to
make them again, and `sha256`, the digest of the codewords.

CSV has a class in a row: its name, and a column for every branch. Text has a class in a line, its
name and its codeword. A name that could be taken for something else is in quotes in both. Neither
format needs names; a file has one for every class or for none.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from coded_resnext.files import parse_csv, parse_json, read_text, require_few_values

FORMAT_VERSION = 1
VARIANTS = ("best", "paper", "paper_d8")
# Which table codewords are, for a person; None for those that are not shipped.
IN_WORDS: dict[str | None, str] = {
    "best": "the best known codewords",
    "paper": "the published codewords",
    "paper_d8": "the published codewords D8",
    None: "codewords of its own",
}
ENDINGS = (".json", ".csv", ".txt")
# The first cell of the row of titles in CSV.
TITLE = "class"
DIGITS = ("0", "1")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_PLAIN_NAME = re.compile(r"\w([\w .'-]*\w)?", re.ASCII)


class Size(NamedTuple):
    """The numbers that name a codebook: classes `K`, branches `N`, active branches `A`."""

    classes: int
    branches: int
    active: int

    def __str__(self) -> str:
        return f"{self.classes} x {self.active}/{self.branches}"


def digest(words: Iterable[str]) -> str:
    """Returns the SHA-256 of the codewords as text, one per line, in hexadecimal."""
    return hashlib.sha256("\n".join(words).encode("ascii")).hexdigest()


def file_name(size: Size, variant: str = "best") -> str:
    """Returns the data file of a size by name: `K100_8of20.json`, `K10_3of10_paper.json`."""
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


class _Entry(NamedTuple):
    """A class in a file without structure; `name` is None where it has none."""

    name: str | None
    word: str


def read_document(path: str | Path) -> dict[str, Any]:
    """Returns what a file of codewords holds, with a list `codewords` of strings.

    The words themselves are not checked.

    Raises:
        ValueError: the file is too large, is not text, holds no list of words, has names for some
            of the words, or a line that may be a comment and may be a class.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        return _from_json(text)
    require_few_values(text, ",; \t\n")
    tables = (_from_table(text, delimiter) for delimiter in ",;\t")
    entries = next((table for table in tables if table is not None), None)
    entries = _from_lines(text) if entries is None else entries
    if not entries:
        raise ValueError("expected one codeword per line, got none")
    words, names = [entry.word for entry in entries], [entry.name for entry in entries]
    if all(name is None for name in names):
        return {"codewords": words}
    if None in names:
        raise ValueError(
            f"expected a name for every class or for none, got none for class {names.index(None)}, "
            f"{words[names.index(None)][:80]}"
        )
    return {"codewords": words, "class_names": names}


def check_description(document: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Returns the names of the classes of a document; a ValueError says what cannot be read.

    Args:
        document: with a `format_version` and `class_names`, or without.
        classes: the number of its codewords.
    """
    version = document.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version: expected {FORMAT_VERSION}, got {version!r}")
    return checked_names(document.get("class_names"), classes)


def checked_names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    """Returns the names of so many classes, their numbers without names, or raises a ValueError."""
    if class_names is None:
        return tuple(map(str, range(classes)))
    several = isinstance(class_names, Iterable) and not isinstance(class_names, str)
    names = tuple(class_names) if several else ()
    if not several or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names: expected {classes} strings, got {class_names!r:.80}")
    if len(names) != classes:
        raise ValueError(f"class_names: expected {classes} names, got {len(names)}")
    if len(set(names)) != classes:
        double = Counter(names).most_common(1)[0][0]
        raise ValueError(f"class_names: expected distinct names, got {double!r} more than once")
    return names


def write_document(document: Mapping[str, Any], ending: str) -> str:
    """Returns a codebook, described by `Codebook.to_dict`, as the text of a file.

    Args:
        document: of the codebook.
        ending: of the file's name; `.csv` and `.txt` give these, any other JSON.
    """
    names, words = document["class_names"], document["codewords"]
    if ending.lower() == ".csv":
        text = io.StringIO()
        table = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        table.writerow([TITLE, *(f"branch {branch}" for branch in range(len(words[0])))])
        table.writerows([name, *map(int, word)] for name, word in zip(names, words, strict=True))
        return text.getvalue()
    if ending.lower() == ".txt":
        pairs = zip(names, words, strict=True)
        return "".join(f"{_quoted_if_odd(name)} {word}\n" for name, word in pairs)
    return json.dumps(document, indent=1) + "\n"


def _quoted_if_odd(name: str) -> str:
    if _PLAIN_NAME.fullmatch(name):
        return name
    return '"' + name.replace('"', '""') + '"'


def _from_json(text: str) -> dict[str, Any]:
    data = parse_json(text)
    document = data if isinstance(data, dict) else {"codewords": data}
    words = document.get("codewords")
    if not isinstance(words, list):
        raise ValueError('expected an object with a list "codewords"')
    return {**document, "codewords": [_joined(word) for word in words]}


def _joined(word: Any) -> Any:
    """Returns a list of 0 and 1 as a string; anything else as it is."""
    if isinstance(word, list) and all(type(digit) is int and digit in (0, 1) for digit in word):
        return "".join(map(str, word))
    return word


def _from_table(text: str, delimiter: str) -> list[_Entry] | None:
    """Returns the classes of a table, one in a row; None for a text that is no table."""
    try:
        rows = parse_csv(text, delimiter)
    except ValueError:
        return None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    titles = next((i for i, row in enumerate(rows) if _is_title(row)), None)
    if titles is not None:
        # Nothing after the titles is a comment.
        rows = rows[titles + 1 :]
    else:
        comments = [row for row in rows if row[0].lstrip().startswith("#")]
        rows = [row for row in rows if not row[0].lstrip().startswith("#")]
    columns = {len(row) for row in rows}
    if len(columns) != 1 or columns == {1}:
        return None
    words = [_digits(row[1:]) for row in rows]
    if not all(words):
        return None
    if titles is None:
        _refuse_ambiguous([_Entry(row[0], _digits(row[1:])) for row in comments], words[0])
    if titles is None and columns != {2} and all(row[0].strip() in DIGITS for row in rows):
        return [_Entry(None, row[0].strip() + word) for row, word in zip(rows, words, strict=True)]
    # As it is written: spaces are a part of a name in a cell.
    return [_Entry(row[0], word) for row, word in zip(rows, words, strict=True)]


def _is_title(row: Sequence[str]) -> bool:
    return len(row) > 1 and row[0] == TITLE and not _digits(row[1:])


def _digits(cells: Sequence[str]) -> str:
    """Returns the word in cells, one digit in each or all in one; nothing where it is no word."""
    word = "".join(cell.strip() for cell in cells)
    in_cells = all(cell.strip() in DIGITS for cell in cells)
    return word if word and not set(word) - set(DIGITS) and (in_cells or len(cells) == 1) else ""


def _from_lines(text: str) -> list[_Entry]:
    entries: list[_Entry] = []
    comments: list[_Entry] = []
    position = 0
    while position < len(text):
        start = re.compile(r"\s*").match(text, position)
        position = start.end() if start else position
        quoted = _QUOTED.match(text, position)
        end = text.find("\n", quoted.end() if quoted else position)
        end = len(text) if end < 0 else end
        if quoted:
            rest = text[quoted.end() : end].strip(" \t\r,;")
            name, word = _name_and_word(rest)
            if name is not None:
                raise ValueError(f"expected a codeword after {quoted[0][:80]}, got {rest[:80]!r}")
            entries.append(_Entry(quoted[1].replace('""', '"'), word))
        elif line := text[position:end].strip():
            (comments if line.startswith("#") else entries).append(_name_and_word(line))
        position = end
    if entries:
        _refuse_ambiguous(comments, entries[0].word)
    return entries


def _refuse_ambiguous(comments: Sequence[_Entry], word: str) -> None:
    """Refuses a comment that could be a class, since it ends in a word as long as the others."""
    for comment in comments:
        if len(comment.word) == len(word) and not set(comment.word) - set(DIGITS):
            raise ValueError(
                f"{comment.name or '#'!r} may be a comment, or a class whose codeword is "
                f"{comment.word[:80]}: put a name that begins with # in quotes, and in CSV below a "
                f"row of titles whose first is {TITLE!r}"
            )


def _name_and_word(line: str) -> _Entry:
    """Splits a line; a class name may hold spaces and commas."""
    before = line.rstrip("01")
    end = len(before)
    while end and (before[end - 1] in ",;" or before[end - 1].isspace()):
        end -= 1
    if len(line) - len(before) > 1 and (not before or end < len(before)):
        return _Entry(before[:end] or None, line[len(before) :])
    fields = re.split(r"[\s,;]+", line)
    split = len(fields)
    while split > 0 and fields[split - 1] in DIGITS:
        split -= 1
    # Without single digits at the end the last field is the word.
    split = min(split, len(fields) - 1)
    return _Entry(" ".join(fields[:split]) or None, "".join(fields[split:]))
