"""`coded-resnext build-kernels`: compile the Triton kernels before anybody waits for them.

`coded-resnext tune` measures where they win.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from coded_resnext.files import say
from coded_resnext.kernels.build.build import BuildError, build, missing
from coded_resnext.kernels.prebuilt import default_folder
from coded_resnext.models.checkpoint import load_model
from coded_resnext.models.registry import create_model, list_models
from coded_resnext.training.config import TrainingConfig
from coded_resnext.training.processes import World
from coded_resnext.training.ways import choose_way


def run(arguments: argparse.Namespace) -> int:
    """Builds or checks the kernels, and returns the exit status.

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


def run_tune(arguments: argparse.Namespace) -> int:
    """Measures the ways to compute a step of a network, and returns 1 where none could be.

    Raises:
        ValueError: a number that cannot be, no such network, a damaged file.
        OSError: a file cannot be read.
    """
    for flag in ("batch_size", "image_size", "seconds"):
        value = getattr(arguments, flag)
        if value is not None and value <= 0:
            raise ValueError(f"--{flag.replace('_', '-')}: expected more than 0, got {value}")
    is_known = arguments.model in list_models()
    model = create_model(arguments.model) if is_known else load_model(arguments.model).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    settings: dict[str, Any] = {"amp": True, "amp_dtype": dtype} if dtype != "float32" else {}
    settings |= {"batch_size": arguments.batch_size, "channels_last": True, "torchcompile": "auto"}
    config = TrainingConfig(epochs=1, lr=0.1, **settings)

    choice = choose_way(
        model.to(device),
        arguments.image_size or model.image_size,
        config,
        world=World(device=device),
        seconds=arguments.seconds,
        anew=arguments.anew,
    )
    if choice is None:
        say("nothing was measured: there is one way, or there was no time", file=sys.stderr)
        return 1
    say(json.dumps(choice.to_dict(), indent=1) if arguments.json else f"{choice}, {choice.gain}")
    return 0


def _present_arch() -> str:
    if not torch.cuda.is_available():
        raise ValueError("--arch: expected a capability such as 90, since there is no GPU here")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"
