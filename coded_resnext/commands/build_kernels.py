"""`coded-resnext build-kernels`: compile the Triton kernels before anybody waits for them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..kernels.build import BuildError, build, missing
from ..kernels.prebuilt import FOLDERS_VARIABLE, default_folder


def add_parser(commands: Any) -> None:
    """Add `build-kernels` to the commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "build-kernels",
        help="compile the Triton kernels ahead of time",
        description="Compile every shipped kernel for some GPU architectures. No GPU is needed. "
        "A second run compiles what has changed. Processes find the result by themselves in the "
        f"default folder, elsewhere by the variable {FOLDERS_VARIABLE}.",
        epilog="Exit status 1 when a kernel does not compile, or with --check when one is missing.",
    )
    parser.add_argument(
        "--arch",
        action="append",
        metavar="CAPABILITY",
        help="compute capability without the dot, such as 80, 90 or 100; may be given several "
        "times (default: that of the GPU in this machine)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"(default: {default_folder()})")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: processors)")
    parser.add_argument(
        "--check", action="store_true", help="compile nothing, list what the folder lacks"
    )
    parser.set_defaults(run=run)


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
    try:
        if arguments.check:
            lacking = missing(archs, folder)
            print("\n".join(lacking) if lacking else f"{folder}: all kernels are there")
            return int(bool(lacking))
        built = build(archs, folder, jobs=arguments.jobs)
    except BuildError as error:
        print(f"coded-resnext: {error}", file=sys.stderr)
        return 1
    for arch, entries in built.items():
        kernels = len({entry["key"] for entry in entries})
        print(f"{arch}: {kernels} kernels for {len(entries)} launch settings")
    print(f"in {folder}; {folder / 'build'} is needed by the next build only")
    return 0


def _present_arch() -> str:
    if not torch.cuda.is_available():
        raise ValueError("--arch: expected a capability such as 90, since there is no GPU here")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"
