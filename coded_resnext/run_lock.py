"""One training in a folder at a time: a lock of the operating system on a file in it.

The system lets go of the lock when the process ends, however it ends, so that the file alone means
nothing. A process that holds a folder may open it again; two of its threads are not kept apart.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

LOCK_FILE = ".lock"
# Open files by process and folder: closing any of them would let the lock go. A forked process
# has the dictionary and not the locks.
_held: dict[tuple[int, Path], int] = {}


def lock_folder(folder: Path) -> None:
    """Keep a folder for this process until it ends.

    Raises:
        ValueError: another process holds it; the message says which.
        OSError: the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks.
        return
    path = folder / LOCK_FILE
    key = (os.getpid(), folder.resolve())
    former = _held.get(key)
    if former is not None:
        if path.exists() and os.path.samestat(os.fstat(former), path.stat()):
            return
        # The folder was removed, and another is in its place.
        os.close(_held.pop(key))
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # Of the process and not of the open file: loader workers that outlive it hold nothing.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip()
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"out: {folder} is being written by another training ({holder}); wait for it, or "
                "choose another folder"
            ) from error
        print(
            f"{folder}: its file system has no locks; nothing keeps a second training out of it",
            file=sys.stderr,
        )
        return
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[key] = file
