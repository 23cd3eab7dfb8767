"""`coded-resnext doctor`: what is installed, what can run, and whether it is right."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from coded_resnext.files import say
from coded_resnext.kernels import Backend, backends, coded_aggregate, coding_loss
from coded_resnext.kernels.prebuilt import find_prebuilt, folders, toolchain

# Largest accepted difference from the float64 reference, relative to the largest value. float32
# carries 2**-24 per rounding and sums hundreds of terms; bfloat16 carries 2**-9 and is rounded
# once on the way in, once on the way out.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
PACKAGES = (
    "coded-resnext",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "scikit-learn",
    "matplotlib",
)


def run(_arguments: argparse.Namespace) -> int:
    """Prints the report, and returns 1 when an operation is wrong."""
    say(f"python         {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        say(f"{package:<14} {_version(package)}")
    say("devices        " + ", ".join(_device_name(device) for device in devices()))
    for name, reason in backends().items():
        say(f"backend        {name}: {'available' if reason is None else f'off: {reason}'}")
    for line in prebuilt_kernels():
        say(f"kernels        {line}")
    wrong = 0
    for label, error, tolerance in check_operations():
        verdict = "ok" if error <= tolerance else "WRONG"
        wrong += verdict != "ok"
        say(f"{verdict:<6} {label:<48} error {error:.1e} (at most {tolerance:.0e})")
    say("all operations agree with their definition" if wrong == 0 else f"{wrong} are WRONG")
    return int(wrong > 0)


def prebuilt_kernels() -> Iterator[str]:
    """Yields a line for each set of kernels that was compiled ahead of time, damage included."""
    indexes, faults = find_prebuilt()
    for source in indexes:
        damaged = sum(source.files(key) is None for key in source.kernels)
        text = f"{len(source.kernels)} prebuilt for {source.arch} in {source.folder}"
        if not source.is_current:
            text += f", of no use: they are for {source.toolchain}, this is {toolchain()}"
        elif damaged:
            text += f", {damaged} of them damaged: those are compiled when first used"
        yield text
    for fault in faults:
        yield f"left out: {fault}"
    if not indexes and not faults:
        searched = ", ".join(map(str, folders())) or "no folder"
        yield f"none prebuilt in {searched}; each is compiled when first used"


def devices() -> list[torch.device]:
    """Returns the CPU and the accelerators that are there."""
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator() or devices[0])
    return devices


def check_operations() -> Iterator[tuple[str, float, float]]:
    """Yields label, error against float64 and tolerance of every operation, backend and dtype.

    The error is the largest difference of any output or gradient, relative to its largest value.
    """
    for device in devices():
        for backend, reason in backends().items():
            if reason is not None:
                continue
            for dtype, tolerance in TOLERANCES.items():
                # Neither has float64; the kernels leave it to PyTorch, which is checked by itself.
                if dtype == torch.float64 and (device.type == "mps" or backend == "triton"):
                    continue
                name = str(dtype).removeprefix("torch.")
                label = f"coded_aggregate {backend} {device.type} {name}"
                yield label, aggregate_error(backend, device, dtype), tolerance
    for device in devices():
        dtype = torch.float32 if device.type == "mps" else torch.float64
        yield f"coding_loss {device.type}", coding_loss_error(device, dtype), TOLERANCES[dtype]
        if backends()["triton"] is None:
            error = coding_loss_error(device, torch.float32, "triton")
            yield f"coding_loss triton {device.type}", error, TOLERANCES[torch.float32]


def aggregate_error(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the error of `coded_aggregate`, of outputs and gradients, with both masks."""
    generator = torch.Generator().manual_seed(0)
    # Rounded to the dtype first, so that only the computation differs.
    h = torch.rand(3, 4 * 5, 7, 5, generator=generator).to(dtype)
    weight = torch.randn(12, 4 * 5, 1, 1, generator=generator).to(dtype)
    grad_y = torch.randn(3, 12, 7, 5, generator=generator).to(dtype)
    grad_energies = torch.randn(3, 4, generator=generator)
    drop = torch.tensor([[1.25, 0, 1.25, 1.25]]).expand(3, -1)
    keep = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]])

    def outputs(name: str, on: torch.device, of: torch.dtype) -> list[Tensor]:
        inputs = [v.to(on, of).requires_grad_() for v in (h, weight)]
        y, energies = coded_aggregate(
            inputs[0],
            inputs[1],
            4,
            drop_mask=drop,
            keep_mask=keep,
            backend=name,  # type: ignore[arg-type]
        )
        grads = torch.autograd.grad(
            (y, energies), inputs, (grad_y.to(y), grad_energies.to(energies))
        )
        return [value.detach().cpu().double() for value in (y, energies, *grads)]

    actual = outputs(backend, device, dtype)
    return _largest_error(actual, outputs("reference", torch.device("cpu"), torch.float64))


def coding_loss_error(
    device: torch.device, dtype: torch.dtype, backend: Backend = "torch"
) -> float:
    """Returns the error of `coding_loss` and its gradient against sums written out in Python."""
    codewords = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    rows, targets = [[2.5, 1.0, 0.25, 0.25], [0.0, 0.0, 4.0, 0.0]], [0, 2]
    energies = torch.tensor(rows, dtype=dtype, device=device, requires_grad=True)
    classes = torch.tensor(targets, device=device)
    loss = coding_loss(energies, codewords.to(device), classes, backend=backend)
    (grad,) = torch.autograd.grad(loss, energies)
    expected, expected_grad = 0.0, []
    for row, target in zip(rows, targets, strict=True):
        off = [0.5 * e - float(c) for e, c in zip(row, codewords[target].tolist(), strict=True)]
        expected += sum(x**4 for x in off) / 8
        expected_grad.append([0.5 * 4 * x**3 / 8 for x in off])
    actual = [loss.detach().cpu().double(), grad.cpu().double()]
    wanted = [torch.tensor(v, dtype=torch.float64) for v in (expected, expected_grad)]
    return _largest_error(actual, wanted)


def _largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    errors = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True)
    ]
    # max() would overlook a NaN.
    return max(error if error == error else float("inf") for error in errors)


def _version(package: str) -> str:
    if package == "torch":
        # With the suffix that tells the CUDA build, which the metadata leave out.
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type
