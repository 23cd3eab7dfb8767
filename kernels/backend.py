"""Which backend runs, and why: the rule for every operation, said once in the log.

Backends:
    `reference`  the unfused definition; any floating dtype; for checks.
    `torch`      the exact Gram form in plain PyTorch; every device.
    `fused`      for a block the fused data flow (coded_resnext/models/fused/block.py): each of its
                 operators by kernels where these have been seen to win, and by PyTorch elsewhere;
                 every device. For an operation alone, `torch`.
    `triton`     the kernels, for a block in the fused data flow, on CUDA devices; on CPU tensors in
                 Triton's interpreter.
    `auto`       `torch`: no measurement on a GPU has shown yet where the kernels win.

The environment variable CODED_RESNEXT_BACKEND, unless empty, replaces `auto`; an explicit argument
wins over it.
What the kernels do not take (float64, branches wider than 64 channels) runs as `torch` does, and is
logged once for each reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import layout
from .rows import Passes, Plan

Backend = Literal["auto", "reference", "torch", "fused", "triton"]

BACKEND_VARIABLE = "CODED_RESNEXT_BACKEND"
LOGGER = logging.getLogger("coded_resnext")
_SAID: set[str] = set()


def backends() -> dict[str, str | None]:
    """Returns every backend by name, with the reason why it cannot run here, or None if it can."""
    reason = None
    if not layout.HAS_TRITON:
        reason = "Triton is not installed"
    elif not torch.cuda.is_available() and not layout.interpreted():
        reason = "no CUDA device was found (on a CPU: TRITON_INTERPRET=1, for checks only)"
    return {"reference": None, "torch": None, "fused": None, "triton": reason}


def select_backend(backend: Backend = "auto") -> str:
    """Returns the backend that runs for a request, `auto` resolved.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend was asked for by name and cannot run here.
    """
    requested = requested_backend(backend)
    return "torch" if requested == "auto" else requested


def check_backend(backend: Backend, device: str | torch.device | None = None) -> None:
    """Refuses a backend in one sentence, for commands.

    Args:
        backend: the one that was asked for.
        device: where the network will be, if this is known.

    Raises:
        ValueError: no such backend, or it cannot run here or on this device.
    """
    try:
        requested = requested_backend(backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    on_gpu = device is None or torch.device(device).type == "cuda"
    if requested == "triton" and not (on_gpu or layout.interpreted()):
        raise ValueError(
            f"backend: 'triton' was asked for but its kernels do not run on the device {device}; "
            "choose a GPU, or another backend"
        )


def requested_backend(backend: Backend) -> str:
    """Returns the backend as `select_backend`, but `auto` where nobody names one."""
    requested = named_backend(backend)
    source = "backend" if backend != "auto" else BACKEND_VARIABLE
    if requested != "triton":
        return requested
    reason = backends()[requested]
    if reason is not None:
        raise RuntimeError(f"{source}: {requested!r} was asked for but cannot run: {reason}")
    return requested


def named_backend(backend: Backend) -> str:
    """Returns the backend that is named by the argument or the environment, able to run or not.

    Raises:
        ValueError: no such backend.
    """
    source = "backend" if backend != "auto" else BACKEND_VARIABLE
    name = backend if backend != "auto" else os.environ.get(BACKEND_VARIABLE) or "auto"
    if name not in get_args(Backend):
        expected = ", ".join(get_args(Backend))
        raise ValueError(f"{source}: expected one of {expected}; got {name!r}")
    return name


ConvBackend = Literal["auto", "torch", "merged", "triton"]


def check_conv_backend(backend: str) -> None:
    """Refuses a backend of a convolution that does not exist."""
    if backend not in get_args(ConvBackend):
        expected = ", ".join(get_args(ConvBackend))
        raise ValueError(f"backend: expected one of {expected}; got {backend!r}")


def architecture_of_kernels(x: Tensor, backend: ConvBackend, reason: str | None) -> str | None:
    """Returns the architecture whose selection table says which passes run kernels, or None.

    Args:
        x: the activations.
        backend: what is to compute.
        reason: why the kernels cannot run on `x`, or None.

    Raises:
        ValueError: no such backend.
        RuntimeError: `triton` was asked for and cannot run here; the message says why.
    """
    check_conv_backend(backend)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend: 'triton' was asked for but cannot run: {reason}")
    wanted = backend == "triton" or (backend == "auto" and x.is_cuda)
    return layout.architecture_of(x) if wanted and reason is None else None


@cache
def choose_passes(
    convolution: str, sizes: object, arch: str, forced: bool, planned: Callable[[str, Any], Plan]
) -> Passes:
    """Returns the passes of a convolution that run kernels, and says once which they are.

    Args:
        convolution, sizes: its kind and its static sizes.
        arch: the architecture.
        forced: whether `triton` was asked for, which takes the kernels wherever the convolution's
            selection table has them; `auto` does only where they have been timed to win.
        planned: returns the line of the table for an architecture and sizes.
    """
    plan = planned(arch, sizes)
    passes = plan.passes if forced else plan.measured
    kernels = f"kernels for {passes.words()}: {plan.reason}"
    # The compiler calls what calls this as it is, so that it may log.
    log_once(LOGGER, f"{convolution}, {sizes}, {arch}: {kernels}")
    return passes


def say_once(logger: logging.Logger, text: str, level: int = logging.INFO) -> None:
    """Log a sentence the first time that it comes up, and never while a graph is traced."""
    if not torch.compiler.is_compiling():
        log_once(logger, text, level)


def log_once(logger: logging.Logger, text: str, level: int = logging.INFO) -> None:
    if text not in _SAID:
        _SAID.add(text)
        logger.log(level, text)
