"""The command line: `coded-resnext COMMAND`."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

# 128 and the number of SIGPIPE, the signal that ends other programs whose output nobody reads.
NOBODY_READS = 141


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Lets Ctrl-C end the process at once, with a line and status 130, while modules are imported.

    That takes seconds, and libraries make other errors of an interrupt that comes in between.
    Where somebody has another use for the signal, and beside the main thread, it changes nothing.
    """

    def end(number: int, frame: FrameType | None) -> None:
        script = os.path.basename(sys.argv[0])
        name = "coded-resnext" if script in ("-m", "__main__.py") else script
        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(128 + number)

    former = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or former is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


with ended_by_interrupt():
    from coded_resnext.files import say

    from .arguments import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

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
    with ended_by_interrupt():
        command = getattr(import_module(f".{module}", __package__), function)
    code: int = command(arguments)
    return code


def train_by_recipe(script: str, description: str | None, *, default: str) -> int:
    """Runs the command line of a training script and returns the exit status, see `train.main`."""
    with ended_by_interrupt():
        from .train import main as train
    return train(script, description, default=default)


def _nobody_reads() -> bool:
    """Says whether what read the output or the messages has closed its end."""
    if not hasattr(select, "poll"):
        return True
    pipes = select.poll()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Without a mask only errors are reported.
        pipes.register(stream.fileno(), 0)
    return bool(pipes.poll(0))


def _drop_output() -> None:
    """Sends what is still in the buffers to nowhere; Python would write it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        os.dup2(nowhere, stream.fileno())
