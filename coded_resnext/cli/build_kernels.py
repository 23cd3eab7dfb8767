"""`coded-resnext build-kernels`: compile the Triton kernels before anybody waits for them."""

from __future__ import annotations

import argparse
import sys

import torch

from coded_resnext.files import say
from coded_resnext.kernels.build.build import BuildError, build, missing
from coded_resnext.kernels.prebuilt.index import default_folder


def run(arguments: argparse.Namespace) -> int:
    """Build or check; the exit status.

    Raises:
        ValueError: an architecture or a number of processes that cannot be.
    """
    archs = arguments.arch or [_present_arch()]
    for arch in archs:
        if not (arch.isdecimal() and int(arch) >= 80):
            raise ValueError(
                f"--arch: expected a capability from 80 on without a dot, such as 90, got {arch!r}"
            )
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {arguments.jobs}")
    archs = [f"sm{arch}" for arch in archs]
    folder = arguments.out or default_folder()
    if folder is None:
        raise ValueError("--out: expected a folder, since this user has no home; got none")
    try:
        if arguments.check:
            lacking = missing(archs, folder)
            say("\n".join(lacking) if lacking else f"{folder}: all kernels are there")
            return int(bool(lacking))
        built = build(archs, folder, jobs=arguments.jobs)
    except BuildError as error:
        say(f"coded-resnext: {error}", file=sys.stderr)
        return 1
    for arch, entries in built.items():
        kernels = len({entry["key"] for entry in entries})
        say(f"{arch}: {kernels} kernels for {len(entries)} launch settings")
    say(f"in {folder}; {folder / 'build'} is needed by the next build only")
    return 0


def build_missing(arch: str) -> None:
    """Compiles the kernels of an architecture, `sm90`, that are not there; says so, and by whom.

    Where they cannot be compiled now, each is when it is first launched.
    """
    folder = default_folder()
    if folder is None or not arch.startswith("sm") or not missing([arch], folder):
        return
    say(f"compiling the kernels for {arch}, once, into {folder}", file=sys.stderr)
    try:
        build([arch], folder)
    except (BuildError, OSError) as error:
        say(f"they are compiled as they are needed instead: {error}", file=sys.stderr)


def _present_arch() -> str:
    if not torch.cuda.is_available():
        raise ValueError("--arch: expected a capability such as 90, since there is no GPU here")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"
