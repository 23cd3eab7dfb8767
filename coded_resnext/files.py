"""Files: text, JSON and tensors of unknown origin are read, and others written whole or not at
all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_TEXT = 16 * 2**20
# The results of a thousand classes are 24 MiB.
LARGEST_RESULTS = 256 * 2**20
# Control and format characters (among them the marks of writing direction), separators of lines
# and paragraphs, and what a file name has that is no UTF-8.
_HIDDEN = ("Cc", "Cf", "Zl", "Zp", "Cs")


def read_text(path: str | Path, largest: int = LARGEST_TEXT) -> str:
    """Returns the text of a file.

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
    """Returns the content of a JSON text; a ValueError also where it is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON: {error}") from None


def as_text(name: object) -> str:
    """A name of a file as text that can be written: bytes that are no UTF-8 are escaped."""
    return str(name).encode(errors="backslashreplace").decode()


def printable(text: object) -> str:
    """A name for one line of a terminal: what would move the cursor or hide text is escaped."""
    return "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in _HIDDEN else c
        for c in str(text)
    )


def printable_lines(text: object) -> str:
    """Returns a message for a terminal: as `printable`, but for its line ends."""
    return "\n".join(map(printable, str(text).split("\n")))


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: names the file; what it held before is intact.
    """
    path = Path(path)
    # Nobody can guess the name, and "x" writes through no link.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write ({error.strerror or error}); older files are intact",
            str(path),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal; an OSError where it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(file: BinaryIO, allowed: Sequence[type] = ()) -> Any:
    """Returns the content of a file of `torch.save`, on the CPU.

    Args:
        file: open for reading bytes, and seekable.
        allowed: classes that may occur beside tensors and plain values.

    Raises:
        ValueError: a file that is damaged, that holds anything else, or an archive with compressed
            or overlapping parts.
    """
    import torch  # Not before, since asking the command line for help does without it.

    size = file.seek(0, 2)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if compressed or sum(entry.file_size for entry in entries) > size:
                raise ValueError("an archive that is compressed")
        file.seek(0)
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    # What loading raises depends on what the file is.
    except Exception as error:
        raise ValueError(
            "expected tensors and plain values, which is all that is loaded, since anything else "
            f"could run code; got: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Why PyTorch refuses a file, without its advice to trust the file instead."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"a reference to {named[1]}"
    return str(error).splitlines()[0].split("In PyTorch 2.6")[0][:200] if str(error) else "nothing"
