"""The executor itself: small kernels against PyTorch, and planted faults, each of which is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ptx import driver
from ptx.driver import LaunchError
from support.guarded_memory import poisoned
from support.helpers import relative_error
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = relative_error(actual.double(), expected.double())
    assert error <= tolerance, error


# ---- what is computed


@triton.jit
def softmax(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    at = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    x = tl.load(x_ptr + at, mask=inside, other=-float("inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + at, (x / tl.sum(x, 0)).to(out_ptr.dtype.element_ty), mask=inside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [77, 128])
def test_masked_rows_and_reductions(dtype: torch.dtype, warps: int, columns: int) -> None:
    x = normal(5, columns, dtype=dtype)
    out = poisoned((5, columns), dtype)
    softmax[(5,)](x, out, columns, 128, num_warps=warps)
    near(out, x.double().softmax(1), {4: 1e-6, 2: 5e-3}[x.element_size()])


@triton.jit
def product(
    out_ptr,
    a_ptr,
    b_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TURN_A: tl.constexpr,
    TURN_B: tl.constexpr,
    FROM_REGISTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        if TURN_A:
            turned = (k < K)[:, None] & (m < M)[None, :]
            a = tl.trans(tl.load(a_ptr + k[:, None] * M + m[None, :], mask=turned, other=0.0))
        else:
            inside = (m < M)[:, None] & (k < K)[None, :]
            a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=inside, other=0.0)
        if TURN_B:
            turned = (n < N)[:, None] & (k < K)[None, :]
            b = tl.trans(tl.load(b_ptr + n[:, None] * K + k[None, :], mask=turned, other=0.0))
        else:
            inside = (k < K)[:, None] & (n < N)[None, :]
            b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=inside, other=0.0)
        if FROM_REGISTERS:
            a = (a.to(tl.float32) * 2.0).to(a.dtype)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total, mask=inside)


# Tile, warps and stages: of one to eight warps, and from no pipeline to one of four.
TILES = [
    ((16, 16, 16), 1, 1),
    ((32, 64, 32), 2, 3),
    ((64, 64, 64), 4, 1),
    ((128, 32, 32), 4, 2),
    ((64, 64, 32), 8, 4),
]
PRECISIONS = [
    (torch.bfloat16, "ieee", 1e-6),
    (torch.float16, "ieee", 1e-6),
    (torch.float32, "ieee", 1e-6),
    (torch.float32, "tf32", 2e-3),
    (torch.float32, "tf32x3", 1e-6),
]


@pytest.mark.parametrize(("tile", "warps", "stages"), TILES, ids=str)
@pytest.mark.parametrize(("dtype", "precision", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("turn", ["a b", "a' b", "a b'", "a' b'", "2a b"])
def test_products(
    tile: tuple[int, int, int],
    warps: int,
    stages: int,
    dtype: torch.dtype,
    precision: str,
    tolerance: float,
    turn: str,
) -> None:
    turn_a, turn_b, doubled = "a'" in turn, "b'" in turn, "2" in turn
    M, N, K = 70, 45, 136
    a = normal(*((K, M) if turn_a else (M, K)), dtype=dtype)
    b = normal(*((N, K) if turn_b else (K, N)), dtype=dtype)
    out = poisoned((M, N), torch.float32)
    grid = (-(-M // tile[0]), -(-N // tile[1]))
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    product[grid](out, a, b, M, N, K, *tile, turn_a, turn_b, doubled, precision, **options)
    left, right = (a.T if turn_a else a).double(), (b.T if turn_b else b).double()
    near(out, left @ right * (2 if doubled else 1), tolerance)


def test_the_products_of_an_architecture_are_its_own(arch: str) -> None:
    ran: list[driver.Launch] = []
    a = normal(64, 64, dtype=torch.bfloat16)
    out = torch.empty(64, 64)
    with driver.launches_go_to(ran.append):
        for stages in (1, 3):
            product[(1, 1)](
                out, a, a, 64, 64, 64, 64, 64, 64, False, False, False, "ieee", num_stages=stages
            )
    word = {"sm80": "mma.sync.aligned.m16n8k16", "sm90": "wgmma.mma_async"}[arch]
    assert all(word in launch.ptx for launch in ran)
    assert "cp.async.wait_group" in ran[1].ptx


@triton.jit
def count(values_ptr, histogram_ptr, sum_ptr, most_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values_ptr + at, mask=at < size, other=0)
    tl.atomic_add(histogram_ptr + value, 1, mask=at < size)
    tl.atomic_add(sum_ptr, tl.sum(value.to(tl.float32), 0))
    tl.atomic_max(most_ptr, tl.max(value, 0))


def test_atomic_operations() -> None:
    values = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(0)).int()
    histogram, total, most = torch.zeros(10).int(), torch.zeros(1), torch.zeros(1).int()
    count[(4,)](values, histogram, total, most, 1000, 256)
    assert torch.equal(histogram, torch.bincount(values, minlength=10).int())
    assert total.item() == values.sum()
    assert most.item() == values.max()


@triton.jit
def unlike_programs(x_ptr, out_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for trip in range(0, program * 3 + 1):
        total += tl.load(x_ptr + trip * BLOCK + lane)
    if program % 2 == 1:
        total = tl.cumsum(total * 2, 0)
    while tl.sum(total, 0) > 5.0:
        total *= 0.5
    tl.store(out_ptr + program * BLOCK + lane, total)


def test_programs_that_take_other_ways() -> None:
    x, out = normal(40, 64), poisoned((5, 64), torch.float32)
    unlike_programs[(5,)](x, out, 64)
    expected = torch.stack([x[: 3 * program + 1].double().sum(0) for program in range(5)])
    expected[1::2] = (2 * expected[1::2]).cumsum(1)
    for row in expected:
        while row.sum() > 5:
            row *= 0.5
    near(out, expected, 1e-6)


@triton.jit
def arithmetic(x_ptr, k_ptr, real_ptr, whole_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    k = tl.load(k_ptr + at)
    y = tl.sqrt(tl.abs(x)) + tl.log(tl.abs(x) + 1) * tl.rsqrt(tl.abs(x) + 0.5) + 1.0 / (x * x + 1)
    y = tl.where(x > 0, y, tl.maximum(y, x)) + tl.floor(x) + tl.fma(x, x, y)
    tl.store(real_ptr + at, y)
    n = (k // 7) * 3 + k % 5 + (k >> 3) ^ (k << 2) + (k.to(tl.int64) * 123456789 >> 20).to(tl.int32)
    n += x.to(tl.int32) + k.to(tl.int8).to(tl.int32) + (k.to(tl.uint32) // 11).to(tl.int32)
    tl.store(whole_ptr + at, n)


def test_arithmetic() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, generator=generator) * 3
    k = torch.randint(-(2**31), 2**31 - 1, (256,), generator=generator)
    real, whole = poisoned((256,), torch.float32), poisoned((256,), torch.int32)
    arithmetic[(1,)](x, k.int(), real, whole, 256)
    v = x.double()
    y = v.abs().sqrt() + (v.abs() + 1).log() * (v.abs() + 0.5).rsqrt() + 1 / (v * v + 1)
    near(real, torch.where(v > 0, y, torch.maximum(y, v)) + v.floor() + v * v + y, 1e-6)

    def wrap(value: Tensor) -> Tensor:
        return (value + 2**31) % 2**32 - 2**31

    left = wrap(wrap(k.div(7, rounding_mode="trunc") * 3) + k.fmod(5) + (k >> 3))
    n = left ^ wrap(wrap(k << 2) + wrap(k * 123456789 >> 20))
    n += x.trunc().long() + ((k & 255) + 128) % 256 - 128 + wrap(k % 2**32 // 11)
    assert torch.equal(whole, wrap(n).int())


@triton.jit
def positive(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32)
    tl.store(out_ptr + at, tl.where(x > 0, x * 2, 0.0).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_are_compared_one_by_one(dtype: torch.dtype) -> None:
    x, out = normal(512, dtype=dtype), poisoned((512,), dtype)
    positive[(1,)](x, out, 512)
    assert torch.equal(out, 2 * x.relu())


# ---- planted faults


@triton.jit
def shift(x_ptr, out_ptr, step, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at + tl.program_id(0) * step, tl.load(x_ptr + at))


@triton.jit
def promise(x_ptr, out_ptr, start, BLOCK: tl.constexpr):
    at = tl.max_contiguous(tl.multiple_of(start + tl.arange(0, BLOCK), BLOCK), BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + at))


@triton.jit
def there_and_back(x_ptr, out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + BLOCK + at, tl.load(out_ptr + (BLOCK - 1 - at)))


@triton.jit
def far_row(out_ptr, columns, rows, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out_ptr + row * columns + tl.arange(0, BLOCK), 1.0)


@triton.jit
def pile(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at // 2, tl.load(x_ptr + at))


def seen(launch: Any, *arguments: Any, **options: Any) -> str:
    """What the checks say of a launch."""
    with pytest.raises(LaunchError) as fault:
        launch(*arguments, **options)
    return "; ".join(fault.value.args)


def test_an_access_out_of_bounds_is_seen() -> None:
    assert "out of bounds" in seen(shift[(1,)], normal(127), torch.zeros(128), 0, 128)
    # Inside the storage, outside the tensor.
    assert "out of bounds" in seen(shift[(1,)], normal(130)[1:120], torch.zeros(128), 0, 128)
    assert "out of bounds" in seen(shift[(1,)], normal(128), torch.zeros(200)[:100], 0, 128)


def test_two_programs_at_one_address_are_seen() -> None:
    text = seen(shift[(2,)], normal(128), torch.zeros(255), 127, 128)
    assert "store to what another program stored" in text


def test_a_read_of_uninitialised_memory_is_seen() -> None:
    for dtype in (*DTYPES, torch.int64, torch.uint8):
        text = seen(shift[(1,)], poisoned((128,), dtype), torch.zeros(128, dtype=dtype), 0, 128)
        assert "read of what nobody wrote" in text


def test_a_wrong_multiple_is_seen() -> None:
    """The interpreter does not read `tl.multiple_of`; the compiler makes wide loads of it."""
    promise[(1,)](normal(1024), torch.zeros(512), 512, 512)
    assert "misaligned" in seen(promise[(1,)], normal(1024), torch.zeros(512), 3, 512)


def test_a_missing_barrier_is_seen() -> None:
    there_and_back[(1,)](normal(256), torch.zeros(512), 256, True)
    text = seen(there_and_back[(1,)], normal(256), torch.zeros(512), 256, False)
    assert "read-after-write" in text


def end_of(rows: int, columns: int, wide: bool) -> None:
    """Runs the last program on the last row of a tensor that has no other."""

    def far(launch: driver.Launch) -> None:
        launch.grid, launch.first = (rows, 1, 1), (rows - 1, 0, 0)
        launch.shifts = {0: (rows - 1) * columns * 4}
        driver.execute(launch)

    last = poisoned((columns,), torch.float32)
    with driver.launches_go_to(far):
        far_row[(1,)](last, columns, rows, columns, wide)
    assert (last == 1).all()


def test_offsets_past_two_to_the_31_are_seen() -> None:
    """fla#1080, megablocks#185, sglang#20389: an int32 product of offsets."""
    end_of(2**20, 1024, wide=False)
    end_of(2**22 + 1, 1024, wide=True)
    with pytest.raises(LaunchError, match="out of bounds"):
        end_of(2**22 + 1, 1024, wide=False)


def test_lanes_that_store_other_bits_are_seen() -> None:
    """Which of them is stored is undefined; of equal bits it is all the same."""
    pile[(1,)](torch.ones(128), torch.zeros(64), 128)
    assert "different values" in seen(pile[(1,)], normal(128), torch.zeros(64), 128)


@pytest.mark.parametrize("taken", ["cp.async.wait_group", "bar.sync", "fence.proxy", "wgmma.wait"])
def test_what_a_pipeline_lacks_is_seen(taken: str, arch: str) -> None:
    """Of a product in three stages; some waits and barriers are made twice."""
    seen = []

    def without_one(launch: driver.Launch) -> None:
        driver.execute(launch)
        lines = launch.ptx.split("\n")
        for number in (n for n, line in enumerate(lines) if line.strip().startswith(taken)):
            text = "\n".join([*lines[:number], *lines[number + 1 :]])
            seen.append(bool(replace(launch, ptx=text).run()))

    a, b = normal(64, 160, dtype=torch.bfloat16), normal(160, 64, dtype=torch.bfloat16)
    out = poisoned((64, 64), torch.float32)
    sizes = (64, 64, 160, 64, 64, 32)
    with driver.launches_go_to(without_one):
        product[(1, 1)](out, a, b, *sizes, False, False, False, "ieee", num_stages=3)
    assert any(seen) or (arch == "sm80" and not seen)
