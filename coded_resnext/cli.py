"""The command line: `coded-resnext COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import doctor
from .codebooks import command as codebook
from .commands import build_kernels, convert, export, extract, info, predict, report
from .interpret import command as evaluate
from .text_files import printable_lines


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each adds its own and sets `run`."""
    parser = argparse.ArgumentParser(
        prog="coded-resnext",
        description="Networks whose branches are assigned to classes before training.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    modules = (
        build_kernels,
        codebook,
        convert,
        doctor,
        evaluate,
        export,
        extract,
        info,
        predict,
        report,
    )
    for module in modules:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when all is well, 2 when the input is at fault, 130 when interrupted."""
    arguments = make_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"coded-resnext: {printable_lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("coded-resnext: interrupted", file=sys.stderr)
        return 130
    return code
