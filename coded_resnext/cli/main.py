"""The command line: `coded-resnext COMMAND`."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module

from coded_resnext.files import say

from .arguments import make_parser

# 128 and the number of SIGPIPE, the signal that ends other programs whose output nobody reads.
NOBODY_READS = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status.

    It is 0 when all is well, 1 when the command says so, 2 when the input is at fault, 130 when
    interrupted, and 141 when nobody reads the output any more, as in `coded-resnext .. | head -1`.
    """
    try:
        return _run_or_say_why_not(argv)
    except BrokenPipeError:
        _drop_output()
        return NOBODY_READS


def _run_or_say_why_not(argv: Sequence[str] | None) -> int:
    try:
        try:
            return _run(argv)
        finally:
            # Now, since an error at the end of the interpreter could not be caught.
            sys.stdout.flush()
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        say(f"coded-resnext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("coded-resnext: interrupted", file=sys.stderr)
        return 130


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    module, function = arguments.function.split(":")
    if module == "train":
        # The settings of a recipe are its arguments.
        arguments.settings = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Imported only now, since most of them need PyTorch.
    code: int = getattr(import_module(f".{module}", __package__), function)(arguments)
    return code


def _nobody_reads() -> bool:
    """Whether what read the output or the messages has closed its end."""
    if not hasattr(select, "poll"):
        return True
    pipes = select.poll()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Without a mask only errors are reported.
        pipes.register(stream.fileno(), 0)
    return bool(pipes.poll(0))


def _drop_output() -> None:
    """Send what is still in the buffers to nowhere; Python would write it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        os.dup2(nowhere, stream.fileno())
