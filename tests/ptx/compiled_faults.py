"""The checks at work on the project's kernels: bugs that the interpreter cannot see, barriers,
waits and masks that are taken away, and offsets past 2^31 elements.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from ptx import driver
from ptx.driver import Launch, LaunchError, launches_go_to
from support.cases import coded, conv1x1, recompute
from support.cases.conv3x3 import GroupedCase
from support.guarded_memory import guarded_memory
from torch import Tensor

from coded_resnext.kernels import branch_energy, coding_losses, grouped_conv3x3, replay
from coded_resnext.kernels.coded import aggregate, energy
from coded_resnext.kernels.recompute import launch as recompute_launch
from coded_resnext.kernels.rows import ALL_PASSES, COMPILED

# ---- what is run

CASE = coded.Case("d16", B=3, N=10, D=16, H=5, W=5, layout="channels_last", drop=True, keep=True)


def behind_a_map(case: coded.Case = CASE, off: int = 0) -> dict[str, Tensor]:
    """Energies of activations behind BatchNorm's map, `off` elements behind an aligned address."""
    h, weight = case.inputs(torch.bfloat16)
    rows = h.permute(0, 2, 3, 1)
    flat = torch.cat([rows.new_zeros(off), rows.flatten()])[off:]
    h = flat.view(rows.shape).permute(0, 3, 1, 2).requires_grad_()
    scale, bias = torch.randn(2, case.N * case.D, generator=torch.Generator().manual_seed(1))
    value = branch_energy(h, weight, case.N, scale=scale, bias=bias, backend="triton")
    (grad,) = torch.autograd.grad(value.sum(), h)
    return {"energies": value, "grad_h": grad}


def aggregated(case: coded.Case = CASE, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return coded.outputs_and_gradients(case, dtype, "triton", dtype)


def lost() -> None:
    generator = torch.Generator().manual_seed(0)
    energies = torch.rand(17, 10, generator=generator)
    targets = torch.randn(17, 100, generator=generator).softmax(1)
    book = torch.rand(100, 10, generator=generator) < 0.5
    coding_losses([energies], [book], targets, decode=True, backend="triton")


def convolved(stride: int) -> None:
    case = GroupedCase("d11", N=4, D=11, B=3, H=7, W=9, stride=stride)
    leaves = {k: v.requires_grad_() for k, v in case.inputs(torch.bfloat16).items()}
    y, statistics = grouped_conv3x3(
        **leaves, groups=case.N, stride=stride, statistics=True, backend="triton"
    )
    assert statistics is not None
    torch.autograd.grad(y.float().sum() + statistics.sum(), list(leaves.values()))


def multiplied(join: bool) -> None:
    """A 1x1 convolution between BatchNorms; of a sum that ends a block, or of a map."""
    case = conv1x1.ProductCase("odd", I=24, O=12, B=1, H=3, W=3, join=join)
    conv1x1.called(case, case.inputs(torch.bfloat16), ALL_PASSES)


def recomputed() -> None:
    """A 1x1 convolution whose output is not stored: every kernel of its own."""
    has = recompute.Case("odd", I=24, O=12, B=1, H=3, W=3).inputs(torch.bfloat16)
    before = (has["scale"], has["bias"])
    ends = ("out_scale", "out_bias", "residual", "residual_scale", "residual_bias")
    weight, gain, level = has["weight"], has["out_scale"], has["out_bias"]
    mean, scatter = recompute_launch.moments(has["x"], *before)
    pixels = has["x"].numel() // len(mean)
    _, spread = recompute_launch.product_statistics(weight, mean, scatter, pixels)
    recompute_launch.product_join(has["x"], *before, weight, *(has[name] for name in ends), True)
    of_product = weight.flatten(1).float()
    recompute_launch.map_gradients(level, of_product, weight)
    recompute_launch.weight_gradients(
        of_product, weight, spread, mean, gain, gain, level, pixels, torch.float32
    )
    square, shift = recompute_launch.moments_gradients(weight, gain, level)
    recompute_launch.moments_gradient(has["grad"], weight, square, shift, has["x"], *before)


# ---- bugs in the source


@contextmanager
def planted(kernel: Any, right: str, wrong: str) -> Iterator[None]:
    """The kernel with other text in the place of some of its own."""
    source = kernel.src
    assert source.count(right) == 1

    def change(text: str) -> None:
        kernel._unsafe_update_src(text)
        kernel.device_caches.clear()
        COMPILED.clear()
        replay.forget()

    change(source.replace(right, wrong))
    try:
        yield
    finally:
        change(source)


BASE = "base = sample.to(tl.int64) * (PIXELS * CHANNELS)"


def test_a_wrong_multiple_of_is_found() -> None:
    behind_a_map(off=1)
    rows = "z_ptr + sample.to(tl.int64) * (PIXELS * CHANNELS) + over_pixels(channel, MATRIX)"
    wrong = planted(energy.energy_forward, rows, f"tl.multiple_of({rows}, (1, 1, 16))")
    with wrong, pytest.raises(LaunchError, match="misaligned"):
        behind_a_map(off=1)


@pytest.mark.parametrize("kernel", [aggregate.aggregate_forward, aggregate.aggregate_backward])
def test_a_dropped_barrier_is_found(kernel: Any) -> None:
    aggregated()
    dropped = planted(kernel, "tl.debug_barrier()", "pass")
    with dropped, pytest.raises(LaunchError, match="read-after-write"):
        aggregated()


def far(batch: int, last: int) -> Callable[[Launch], None]:
    """Makes `batch` samples the last of `last`, of which the others do not exist."""

    def run(launch: Launch) -> None:
        programs = launch.grid[0]
        count = last // (batch // programs)
        for index, (name, kind, value) in enumerate(launch.arguments):
            if not isinstance(value, Tensor):
                if value == batch:
                    launch.arguments[index] = (name, kind, last)
                continue
            rows = {batch: last - batch, programs: count - programs}.get(value.shape[0], 0)
            launch.shifts[index] = rows * value.stride(0) * value.element_size()
        launch.grid, launch.first = (count, *launch.grid[1:]), (count - programs, 0, 0)
        driver.execute(launch)

    return run


FAR = replace(CASE, B=16, N=4)
# Samples of 1600 elements: the last ones lie behind 2^32 elements.
LAST = 2**22


@pytest.mark.parametrize("run", [aggregated, behind_a_map])
def test_offsets_past_two_to_the_32(run: Callable[[coded.Case], dict[str, Tensor]]) -> None:
    near = run(FAR)
    with launches_go_to(far(FAR.B, LAST)):
        there = run(FAR)
    # The same instructions on the same numbers.
    assert all(torch.equal(near[name], there[name]) for name in near)


def test_an_int32_product_of_offsets_is_found() -> None:
    narrow = planted(aggregate.aggregate_forward, BASE, BASE.replace(".to(tl.int64)", ""))
    with narrow, launches_go_to(far(FAR.B, LAST)), pytest.raises(LaunchError, match="of bounds"):
        aggregated(FAR)


# ---- what is taken from the compiled code

MASK = re.compile(r"^\s*@!?%p\d+\s+(?=(ld|st)\.global)")
TAKEN = {
    "barriers": re.compile(r"^\s*(bar\.(warp\.)?sync|barrier\.)"),
    "waits for copies": re.compile(r"^\s*cp\.async\.wait"),
    "waits for products": re.compile(r"^\s*wgmma\.wait_group"),
    "fences": re.compile(r"^\s*fence\.proxy\.async"),
    "masks of loads": re.compile(r"^\s*@!?%p\d+\s+ld\.global"),
    "masks of stores": re.compile(r"^\s*@!?%p\d+\s+st\.global"),
}
# Of a kind that a kernel has often, so many places, evenly spread.
MOST = 8


class Removals:
    """Runs every compiled kernel without one instruction, or one mask, after the other."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """By kernel, kind and how it was found: by a check, by other results, or not at all."""

    def __call__(self, launch: Launch) -> None:
        tensors = [value for *_, value in launch.arguments if isinstance(value, Tensor)]
        before = [tensor.clone() for tensor in tensors]
        driver.execute(launch)
        if launch.ptx in self.seen:
            return
        self.seen.add(launch.ptx)
        right = [tensor.clone() for tensor in tensors]
        for kind, text in self.mutants(launch.ptx):
            self.give(tensors, before)
            faults = replace(launch, ptx=text).run()
            same = all(map(self.equal, tensors, right))
            how = "by a check" if faults else "needless" if same else "by results"
            self.counts[launch.name, kind, how] += 1
        self.give(tensors, right)

    @staticmethod
    def equal(one: Tensor, other: Tensor) -> bool:
        return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))

    @staticmethod
    def give(tensors: list[Tensor], values: list[Tensor]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    @staticmethod
    def mutants(ptx: str) -> Iterator[tuple[str, str]]:
        lines = ptx.split("\n")
        for kind, pattern in TAKEN.items():
            places = [number for number, line in enumerate(lines) if pattern.match(line)]
            for number in places[:: -(-len(places) // MOST)] if places else ():
                changed = MASK.sub("", lines[number]) if "masks" in kind else ""
                yield kind, "\n".join([*lines[:number], changed, *lines[number + 1 :]])


RUNS: dict[str, Callable[[], Any]] = {
    "aggregate": aggregated,
    "aggregate in float32": lambda: aggregated(dtype=torch.float32),
    "aggregate of 44": lambda: aggregated(replace(CASE, D=44, N=3)),
    "energies": behind_a_map,
    "energies of 44": lambda: behind_a_map(replace(CASE, D=44, N=3)),
    "losses": lost,
    "convolution": lambda: convolved(1),
    "convolution of stride 2": lambda: convolved(2),
    "product": lambda: multiplied(join=False),
    "product of a sum": lambda: multiplied(join=True),
    "recomputed product": recomputed,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_is_taken_away_is_found_or_needless(
    run: Callable[[], Any], record_property: Callable[[str, object], None]
) -> None:
    """A barrier between two warps' accesses is missed by a check; a mask, where it is used."""
    removals = Removals()
    with guarded_memory(), launches_go_to(removals):
        run()
    found: Counter[str] = Counter()
    for (name, kind, how), number in sorted(removals.counts.items()):
        record_property(f"{name}: {kind}, {how}", number)
        print(f"{name}: {kind}, {how}: {number}")
        found[kind] += number * (how != "needless")
    assert all(found.values()), found
