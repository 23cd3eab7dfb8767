"""Counts what a training step launches on a GPU, by the line that launches it; no GPU is needed.

    python benchmarks/cpu/launches.py coded_resnext50_32x4d --backend triton

The step runs on tensors of the true sizes that have no values (PyTorch's FakeTensorMode), so that
shapes, strides and dtypes are followed and nothing is computed. Every call of ATen counts as one
launch, but for those that only look at a tensor in another way or allocate one; every launch of a
Triton kernel counts as one, by the settings of sm90. A library may launch several kernels for one
call: a profile differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coded_resnext import CodedLoss, create_model
from coded_resnext.kernels import checks, layout
from coded_resnext.kernels.conv1x1 import library
from coded_resnext.kernels.rows import LaunchRow, without_launches

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("coded_resnext", "kernels")
# Calls that start no kernel: another view of a tensor, an allocation, a question.
NOTHING = {
    *(
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "squeeze",
    ),
    *("t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"),
    *("device", "is_same_size", "result_type", "sym_size", "sym_stride"),
    *("_record_function_enter_new", "_record_function_exit"),
}


class Counting(TorchDispatchMode):
    """Notes each call that starts a kernel, with the line of the project that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[str] = Counter()

    def note(self, name: str, tensors: Iterable[object]) -> None:
        self.launches[place(), name] += 1
        each = {id(value): value for value in tensors if isinstance(value, Tensor)}
        self.bytes[name] += sum(value.numel() * value.element_size() for value in each.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name not in NOTHING:
            self.note(name, tree_leaves((args, kwargs, result)))
        return result


def place() -> str:
    """Returns the innermost line of the library on the stack, or what runs without one."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in LIBRARY:
            name = str(path.relative_to(ROOT)).replace("coded_resnext/kernels", "kernels")
            return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    node = torch._C._current_autograd_node()
    return "(PyTorch)" if node is None else f"(autograd) {node.name()}"


@contextmanager
def _as_on_a_gpu() -> Iterator[Counting]:
    """Lets kernels be chosen as on sm90, and counts in place of launching."""
    counting = Counting()

    def launch(row: LaunchRow, _grid: object, *arguments: object) -> None:
        counting.note(f"triton {row.kernel.partition(':')[2]}", arguments)

    def wide_product(left: Tensor, right: Tensor) -> Tensor:
        # One product by cuBLAS, which PyTorch has on a GPU alone.
        result = left.new_empty(left.shape[1], right.shape[1], dtype=torch.float32)
        counting.note("mm", (left, right, result))
        return result

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(LaunchRow, "launch", launch))
        stack.enter_context(mock.patch.object(layout, "architecture_of", return_value="sm90"))
        stack.enter_context(mock.patch.object(layout, "too_large", return_value=None))
        # Values are looked at on the CPU alone.
        stack.enter_context(mock.patch.object(checks, "_readable", return_value=False))
        stack.enter_context(mock.patch.object(library, "_sums_wide", return_value=True))
        stack.enter_context(mock.patch.object(library, "_wide_product", wide_product))
        stack.enter_context(without_launches())
        yield counting


def launches_of_step(
    name: str, backend: str, *, batch: int = 256, size: int = 160
) -> Counter[tuple[str, str]]:
    """Returns the launches of `counted_step`, by place and kernel."""
    return counted_step(name, backend, batch=batch, size=size).launches


def counted_step(name: str, backend: str, *, batch: int = 256, size: int = 160) -> Counting:
    """Counts a training step in bfloat16 autocast: its launches, and the bytes of their tensors.

    Args:
        name: of a network.
        backend: of its blocks, and of its loss.
        batch, size: images, and their height and width in pixels.
    """
    model = create_model(name, backend=backend).train().to(memory_format=torch.channels_last)
    loss = CodedLoss(model.codebooks, weight=4.0, backend=backend)
    with _as_on_a_gpu() as counting, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for key, value in tensors.items():
                    if value is not None:
                        tensors[key] = mode.from_tensor(value)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        images = torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)
        targets = torch.zeros(batch, dtype=torch.int64)

        def step() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits, energies = model(images, return_energies=True)
            total: Tensor = loss(logits, energies, targets).total
            total.backward()
            optimizer.step()
            optimizer.zero_grad()

        # The first step makes the optimizer's state.
        step()
        counting.launches.clear()
        counting.bytes.clear()
        with counting:
            step()
    return counting


def table(launches: Counter[tuple[str, str]], most: int) -> str:
    """Returns the places with the most launches as Markdown."""
    by_place: dict[str, Counter[str]] = {}
    for (where, name), count in launches.items():
        by_place.setdefault(where, Counter())[name] += count
    rows = sorted(by_place.items(), key=lambda item: -item[1].total())[:most]
    lines = ["| place | launches | of |", "|---|---|---|"]
    for where, counts in rows:
        of = ", ".join(f"{name} {count}" for name, count in counts.most_common(6))
        lines.append(f"| {where} | {counts.total()} | {of} |")
    return "\n".join(lines)


def table_of_bytes(counting: Counting, most: int) -> str:
    """Returns the kernels with the most bytes as Markdown: each tensor of a launch once."""
    counts: Counter[str] = Counter()
    for (_, name), count in counting.launches.items():
        counts[name] += count
    lines = ["| kernel | launches | GB | ms at 3.0 TB/s |", "|---|---|---|---|"]
    for name, size in counting.bytes.most_common(most):
        lines.append(f"| {name} | {counts[name]} | {size / 1e9:.2f} | {size / 3e9:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table of a network."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", help="name of a network, such as coded_resnext50_32x4d")
    parser.add_argument("--backend", default="triton", help="of its blocks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=160, help="pixels (default: %(default)s)")
    parser.add_argument("--most", type=int, default=40, help="rows (default: %(default)s)")
    parser.add_argument("--bytes", action="store_true", help="by kernel, with bytes, not by line")
    options = parser.parse_args()
    counted = counted_step(options.network, options.backend, batch=options.batch, size=options.size)
    by_kernel = table_of_bytes(counted, options.most)
    print(by_kernel if options.bytes else table(counted.launches, options.most))
    total, moved = counted.launches.total(), counted.bytes.total() / 1e9
    print(
        f"\n{total} launches and {moved:.1f} GB of a step of {options.network} by {options.backend}"
    )


if __name__ == "__main__":
    main()
