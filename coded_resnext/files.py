"""Files: text, JSON and tensors of unknown origin are read, and others written whole or not at
all."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import stat
import sys
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_TEXT = 16 * 2**20
# The results of a thousand classes are 24 MiB.
LARGEST_RESULTS = 256 * 2**20
# A value takes up to a hundred bytes of memory; of files that are written here, ten of the file.
BYTES_OF_A_VALUE = 8
# Whole numbers beyond 64 bits are refused, and lists inside lists inside ..: code that goes through
# what was read may call itself for each.
MOST_DIGITS, DEEPEST = 19, 64
# What code that was written for sound values raises for others.
UNFIT = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
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
    """Returns the content of a JSON file; raises as `read_text`, and a ValueError for what is no
    JSON."""
    return parse_json(read_text(path, largest), largest)


def parse_json(text: str, largest: int = LARGEST_TEXT) -> Any:
    """Returns the content of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, has a whole number of more than 19 digits,
            or more values than a file of `largest` bytes has use for.
    """
    require_few_values(text, ",[{", largest)
    try:
        content = json.loads(text, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON: {error}") from None
    level = [content]
    for _ in range(DEEPEST + 1):
        containers = (part for part in level if isinstance(part, dict | list))
        level = [
            value
            for part in containers
            for value in (part.values() if isinstance(part, dict) else part)
            if isinstance(value, dict | list)
        ]
        if not level:
            return content
    raise ValueError(f"expected JSON: more than {DEEPEST} lists or objects inside each other")


def _whole_number(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def parse_csv(text: str, delimiter: str = ",", *, largest: int = LARGEST_TEXT) -> list[list[str]]:
    """Returns the rows of a table; of how large a file it may have the cells `largest` says.

    Raises:
        ValueError: it is no CSV, or has more cells than a file has use for.
    """
    require_few_values(text, delimiter + "\n", largest)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"expected CSV: {error}") from None


def require_few_values(text: str, marks: str, largest: int = LARGEST_TEXT) -> None:
    """Refuses a text that would take much more memory as values, of which it has one for a mark."""
    if sum(map(text.count, marks)) > largest // BYTES_OF_A_VALUE:
        raise ValueError(f"expected at most {largest // BYTES_OF_A_VALUE:,} values, got more")


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 60, 60


def brief(value: object) -> str:
    """Returns a value as code for a message, in at most 80 characters.

    The whole is never made: lists that hold a list twice, again and again, have no end.
    """
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else f"{text[:78]}.."


def as_text(name: object) -> str:
    """Returns a name of a file as text that can be written: bytes that are no UTF-8 are escaped."""
    return str(name).encode(errors="backslashreplace").decode()


def printable(text: object) -> str:
    """Returns a name for one line of a terminal: what would move the cursor or hide text is
    escaped."""
    return "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in _HIDDEN else c
        for c in str(text)
    )


def printable_lines(text: object) -> str:
    """Returns a message for a terminal: as `printable`, but for its line ends."""
    return "\n".join(map(printable, str(text).split("\n")))


def say(text: object = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Prints for a person; this library prints in no other way, whatever a name or a file holds.

    Args:
        text: lines; as `printable_lines` they reach the terminal.
        file: `sys.stderr`, or `sys.stdout` for None.
        flush: whether at once.
    """
    print(printable_lines(text), file=file or sys.stdout, flush=flush)


def table_cell(value: object) -> object:
    """Returns a value for a cell of CSV: text that a spreadsheet would compute begins with `'`."""
    if isinstance(value, str):
        text = printable(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return value


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: names the file; what it held before is intact.
    """
    path = Path(path)
    try:
        with open_folder(path.parent) as (folder, names):
            _write_in(folder, names / path.name, content)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write ({error.strerror or error}); older files are intact",
            str(path),
        ) from error


def _write_in(folder: int | None, path: Path, content: bytes) -> None:
    """Writes a file; its path is one for this `dir_fd`."""

    def create(name: str, flags: int) -> int:
        return os.open(name, flags, 0o666, dir_fd=folder)

    # Nobody can guess the name, and "x" writes through no link.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb", opener=create) as file:
            if folder is not None:
                with suppress(FileNotFoundError):
                    mode = os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode
                    if stat.S_ISREG(mode):
                        # What its owner keeps from others stays so.
                        os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path, src_dir_fd=folder, dst_dir_fd=folder)
        if folder is not None:
            os.fsync(folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)


def require_room(folder: str | Path, size: int) -> None:
    """Makes a folder, and refuses one that cannot take so many bytes, before the work for it.

    Raises:
        OSError: it cannot be made or written, or its disk has less room.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot write", str(folder))
    free = shutil.disk_usage(folder).free
    if free < size:
        wanted = f"expected {-(-size >> 20)} MiB of free space, got {free >> 20}"
        raise OSError(errno.ENOSPC, wanted, str(folder))


# Folders inside folders that may be a stranger's: they are never reached through a link.
_own: set[Path] = set()


def make_folder(folder: str | Path, name: str) -> Path:
    """Makes a folder of a known name in a folder that may be a stranger's, and returns it.

    Nothing that is written into it later goes through a link, whatever is put in its place.

    Raises:
        ValueError: it is a link, so that what is written would be elsewhere.
        OSError: it cannot be made.
    """
    path = own_folder(folder, name)
    path.mkdir(parents=True, exist_ok=True)
    return path


def own_folder(folder: str | Path, name: str) -> Path:
    """Returns the path of such a folder, as `make_folder`, whether it is there or not."""
    path = Path(folder) / name
    if path.is_symlink():
        raise ValueError(f"{path}: expected a folder, got a link; remove it")
    _own.add(path)
    return path


@contextmanager
def open_folder(path: Path) -> Iterator[tuple[int | None, Path]]:
    """Yields a descriptor of a folder, which is that folder whatever is put in its place.

    Yields:
        The `dir_fd` of functions of `os`, None where the system has none (Windows), and what
        comes before the names of files for it.

    Raises:
        OSError: it cannot be opened, or is one of `make_folder` with a link in its place.
    """
    if os.open not in os.supports_dir_fd:
        yield None, path
        return
    descriptor = _open_folder(path)
    try:
        yield descriptor, Path()
    finally:
        os.close(descriptor)


def _open_folder(path: Path) -> int:
    if path not in _own:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    with open_folder(path.parent) as (above, _):
        return os.open(path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)


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
            content = torch.load(file, map_location="cpu", weights_only=True)
        _require_own_memory(content, size)
        return content
    # What loading raises depends on what the file is.
    except Exception as error:
        raise ValueError(
            "expected tensors and plain values, which is all that is loaded, since anything else "
            f"could run code; got: {_reason(error)}"
        ) from error


def _require_own_memory(content: Any, size: int) -> None:
    """Refuses tensors that are larger than their file: whose numbers are one number many times."""
    from torch import Tensor

    waiting, seen, total = [content], set[int](), 0
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif hasattr(value, "__dict__"):
            waiting += vars(value).values()
    if total > 4 * size:
        raise ValueError(f"tensors of {total:,} bytes in a file of {size:,}")


def load_arrays(path: str | Path, names: Sequence[str], largest: int) -> dict[str, NDArray[Any]]:
    """Returns arrays of an `.npz` file, compressed or not.

    Args:
        path: the file.
        names: of the arrays.
        largest: bytes of all of them; more is refused before it is in memory.

    Raises:
        ValueError: the file is damaged, lacks an array, or has larger ones. The message does not
            name it.
        OSError: it cannot be read.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            entries = [archive.getinfo(f"{name}.npy") for name in names]
            if sum(entry.file_size for entry in entries) > largest:
                raise ValueError(f"arrays of more than {largest >> 20} MiB")
            for entry in entries:
                with archive.open(entry) as file:
                    _require_described_size(file, entry.file_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except OSError:
        raise
    # What NumPy raises depends on the damage; zip and its packing have errors of their own.
    except Exception as error:
        raise ValueError(f"damaged, or not an archive of arrays: {error}") from error


def _require_described_size(file: Any, size: int) -> None:
    """Refuses an array whose header promises more numbers than its entry has bytes."""
    from numpy.lib import format as npy

    headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, _, dtype = headers[npy.read_magic(file)](file)
    if math.prod(shape) * max(dtype.itemsize, 1) > size:
        raise ValueError(f"an array {list(shape)} in {size:,} bytes")


def _reason(error: Exception) -> str:
    """Returns why PyTorch refuses a file, without its advice to trust the file instead."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"a reference to {named[1]}"
    return str(error).splitlines()[0].split("In PyTorch 2.6")[0][:200] if str(error) else "nothing"
