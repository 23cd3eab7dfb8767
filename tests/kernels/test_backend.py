"""The public operations: the dispatch rule, and errors that name the argument."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from support.cases.coded import Case

from coded_resnext.kernels import (
    backend,
    backends,
    branch_energy,
    check_backend,
    coded_aggregate,
    coding_loss,
    coding_losses,
    layout,
    select_backend,
)
from coded_resnext.kernels.backend import BACKEND_VARIABLE
from coded_resnext.kernels.rows import ALL_PASSES, LaunchRow, Passes

CODEWORDS = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)


def test_auto_takes_the_gram_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert select_backend() == "torch"


def test_environment_replaces_auto_and_an_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert select_backend("auto") == "reference"
    assert select_backend("torch") == "torch"


def test_the_chosen_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("dispatch")
    h, weight = case.inputs(torch.float32)
    monkeypatch.setattr(
        "coded_resnext.kernels.coded.reference.coded_aggregate", lambda *_, **__: "the reference"
    )
    assert coded_aggregate(h, weight, case.N, backend="reference") == "the reference"
    assert coded_aggregate(h, weight, case.N, backend="torch") != "the reference"
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert coded_aggregate(h, weight, case.N) == "the reference"


def test_forced_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device was found" in backends()["triton"]
    with pytest.raises(RuntimeError, match=r"backend: 'triton' .* no CUDA device"):
        select_backend("triton")
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=BACKEND_VARIABLE):
        select_backend()
    # A GPU does not help tensors that are elsewhere.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    h, weight = Case("elsewhere").inputs(torch.float32)
    with pytest.raises(RuntimeError, match="'triton' was asked for but h is on cpu"):
        coded_aggregate(h, weight, 4)


def test_what_the_kernels_do_not_take_runs_elsewhere_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for case, dtype in ((Case("double"), torch.float64), (Case("wide", N=1, D=65), torch.float32)):
        h, weight = case.inputs(dtype)
        expected = coded_aggregate(h, weight, case.N, backend="torch")
        for _ in range(2):
            actual = coded_aggregate(h, weight, case.N, backend="triton")
            # PyTorch's own operations in both, on the same data.
            assert all(map(torch.equal, actual, expected))
    reasons = [record.getMessage() for record in caplog.records]
    assert len(reasons) == 2
    assert "not torch.float64" in reasons[0]
    assert "up to 64 channels, not 65" in reasons[1]


def test_a_command_refuses_kernels_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "backends", lambda: {"triton": None})
    check_backend("triton", "cpu")
    monkeypatch.setattr(layout, "interpreted", lambda: False)
    check_backend("triton")
    check_backend("triton", torch.device("cuda", 1))
    check_backend("torch", "cpu")
    with pytest.raises(ValueError, match=r"backend: 'triton' .* do not run on the device cpu"):
        check_backend("triton", "cpu")


def test_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of auto, .*; got 'cuda'"):
        select_backend("cuda")  # type: ignore[arg-type]
    monkeypatch.setenv(BACKEND_VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{BACKEND_VARIABLE}: .* got 'fast'"):
        select_backend()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(3, 12, 4)}, r"h: expected .*\[B, N\*D, H, W\], got .*\[3, 12, 4\]"),
        ({"h": torch.zeros(3, 12, 4, 4, dtype=torch.int64)}, "h: expected a floating-point"),
        ({"h": torch.zeros(0, 12, 4, 4)}, r"h: expected at least one sample.*\[0, 12, 4, 4\]"),
        ({"branches": 5}, "branches: expected a divisor of 12 channels, got 5"),
        ({"branches": 0}, "branches: expected a divisor of 12 channels, got 0"),
        ({"weight": torch.zeros(8, 11, 1, 1)}, r"weight: expected \[C, 12, 1, 1\], got \[8, 11"),
        ({"weight": torch.zeros(8, 12)}, r"weight: expected \[C, 12, 1, 1\], got \[8, 12\]"),
        ({"drop_mask": torch.ones(3, 5)}, r"drop_mask: expected \[3, 4\], got \[3, 5\]"),
        ({"keep_mask": torch.ones(4)}, r"keep_mask: expected \[3, 4\], got \[4\]"),
        (
            {"weight": torch.zeros(8, 12, 1, 1, device="meta")},
            "weight: expected .* cpu .* got meta",
        ),
        ({"aggregation": "mean"}, "aggregation: expected 'sum' or 'concat', got 'mean'"),
        (
            {"aggregation": "concat", "weight": torch.zeros(6, 3, 1, 1)},
            "weight: expected output channels divisible by 4 branches, got 6",
        ),
    ],
)
def test_aggregate_refuses_bad_input(change: dict[str, Any], message: str) -> None:
    h, weight = Case("valid").inputs(torch.float32)
    arguments: dict[str, Any] = {"h": h, "weight": weight, "branches": 4}
    coded_aggregate(**arguments)
    with pytest.raises(ValueError, match=message):
        coded_aggregate(**{**arguments, **change})


def test_coding_loss_by_hand() -> None:
    energies = torch.tensor([[2.0, 1.0, 0.5, 0.5]], dtype=torch.float64)
    # r = 1/2; class 1 wants 0, 1, 1, 0; the deviations are 1, -1/2, -3/4, 1/4.
    loss = coding_loss(energies, CODEWORDS, torch.tensor([1]))
    assert loss.item() == pytest.approx((1 + 0.5**4 + 0.75**4 + 0.25**4) / 4)
    loss = coding_loss(energies, CODEWORDS, torch.tensor([1]), exponent=1, threshold=0.3)
    assert loss.item() == pytest.approx((0.7 + 0.2 + 0.45 + 0) / 4)


def test_soft_targets_mix_the_codewords() -> None:
    energies = torch.tensor([[2.0, 1.0, 0.5, 0.5]], dtype=torch.float64)
    half = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    # The mixed codeword is 1/2, 1, 1/2, 0.
    expected = (0.5**2 + 0.5**2 + 0.25**2 + 0.25**2) / 4
    assert coding_loss(energies, CODEWORDS, half, exponent=2).item() == pytest.approx(expected)
    certain = torch.eye(3, dtype=torch.float64)[[1]]
    by_index = coding_loss(energies, CODEWORDS, torch.tensor([1]))
    assert coding_loss(energies, CODEWORDS, certain).item() == pytest.approx(by_index.item())


@pytest.mark.parametrize("exponent", [1, 2, 2.5, 4])
def test_coding_loss_gradcheck(exponent: float) -> None:
    generator = torch.Generator().manual_seed(0)
    energies = torch.rand(5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.tensor([0, 1, 2, 1, 0])
    assert torch.autograd.gradcheck(
        lambda e: coding_loss(e, CODEWORDS, targets, exponent=exponent, threshold=0.1), (energies,)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 3])}, "targets: expected classes 0 to 2, got 3"),
        ({"targets": torch.tensor([-1, 0])}, "targets: expected classes 0 to 2, got -1"),
        ({"targets": torch.tensor([0.0, 1.0])}, "targets: expected integer class indices"),
        ({"targets": torch.tensor([0])}, r"targets: expected shape \[2\] or \[2, 3\], got \[1\]"),
        ({"targets": torch.zeros(2, 3).long()}, "targets: expected floating-point probabilities"),
        ({"targets": torch.full((2, 3), torch.nan)}, "targets: expected finite numbers"),
        ({"energies": torch.full((2, 4), torch.inf)}, "energies: expected finite numbers"),
        ({"energies": torch.zeros(2, 5)}, r"energies: expected \[B, N\] .* \[2, 5\] for \[3, 4\]"),
        ({"exponent": 0.5}, "exponent: expected a number of at least 1, got 0.5"),
        ({"exponent": float("nan")}, "exponent: expected a number of at least 1, got nan"),
        ({"threshold": -1.0}, "threshold: expected a number of at least 0, got -1.0"),
    ],
)
def test_coding_loss_refuses_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "energies": torch.ones(2, 4),
        "codewords": CODEWORDS,
        "targets": torch.tensor([0, 2]),
    }
    coding_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        coding_loss(**{**arguments, **change})


def test_debug_flag_refuses_numbers_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = Case("debug").inputs(torch.float32)
    weight[0, 0] = float("nan")
    assert coded_aggregate(h, weight, 4)[1].isnan().any()
    monkeypatch.setenv("CODED_RESNEXT_DEBUG", "1")
    with pytest.raises(ValueError, match="weight: expected finite numbers"):
        coded_aggregate(h, weight, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(12)}, "bias: expected scale and bias, or neither"),
        ({"scale": torch.ones(12), "bias": torch.ones(11)}, r"bias: expected \[12\] .*got \[11\]"),
        ({"scale": torch.ones(12).int(), "bias": torch.ones(12)}, "scale: expected floating-point"),
        ({"branches": 5}, "branches: expected a divisor of 12 channels, got 5"),
        ({"h": torch.zeros(0, 12, 4, 4)}, "h: expected at least one sample"),
    ],
)
def test_branch_energy_refuses_bad_input(change: dict[str, Any], message: str) -> None:
    h, weight = Case("valid").inputs(torch.float32)
    arguments: dict[str, Any] = {"h": h, "weight": weight, "branches": 4}
    branch_energy(**arguments)
    with pytest.raises(ValueError, match=message):
        branch_energy(**{**arguments, **change})


def test_passes_are_what_their_encoding_says() -> None:
    every = [Passes(*flags) for flags in itertools.product((False, True), repeat=4)]
    assert [Passes.decoded(passes.encoded()) for passes in every] == every
    assert len({passes.encoded() for passes in every}) == len(every)
    assert Passes(forward=True, weight=True).within(Passes(weight=True)) == Passes(weight=True)


def test_signs_are_kept_where_kernels_write_and_read_whole_bytes() -> None:
    assert ALL_PASSES.keeps_signs(256)
    assert not ALL_PASSES.keeps_signs(12)
    assert not Passes(forward=True, weight=True).keeps_signs(256)
    assert not Passes(input=True).keeps_signs(256)


def test_torch_and_reference_energies_agree() -> None:
    h, weight = Case("energies").inputs(torch.float64)
    scale, bias = torch.full((12,), 0.5).double(), torch.full((12,), -0.1).double()
    actual, expected = (
        branch_energy(h, weight, 4, scale=scale, bias=bias, backend=backend)
        for backend in ("torch", "reference")
    )
    assert actual.tolist() == [pytest.approx(row) for row in expected.tolist()]


def test_many_branches_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """triton#4701: 512 branches asked for 164 KB of shared memory, and 1000 for more than any GPU
    has."""
    energies, codewords = [torch.rand(2, 512)], [torch.eye(3, 512, dtype=torch.bool)]
    launched: list[Any] = []
    monkeypatch.setattr(LaunchRow, "launch", lambda *row: launched.append(row))
    kernels, torchs = (
        coding_losses(energies, codewords, torch.tensor([0, 2]), decode=True, backend=name)
        for name in ("triton", "torch")
    )
    assert not launched
    assert kernels.decoded is not None
    assert kernels.losses[0].item() == pytest.approx(torchs.losses[0].item())


class Device(NamedTuple):
    """What a tensor on a GPU says of where it is."""

    index: int = 0
    type: str = "cuda"


class OnGpu(NamedTuple):
    """What the dispatch rule reads of activations on a GPU."""

    is_cuda: bool = True
    device: Device = Device()
    dtype: torch.dtype = torch.float32


@pytest.mark.parametrize(
    ("triton", "capability", "reason"),
    [
        (True, (7, 5), None),
        (True, (12, 0), None),
        (True, (6, 1), "Triton compiles for GPUs from sm70 on, not for sm61"),
        (False, (9, 0), "Triton is not installed"),
    ],
)
def test_a_gpu_that_triton_does_not_know_is_pytorchs(
    triton: bool, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mamba#387, triton#8182: the kernels were chosen, and ended inside Triton."""
    monkeypatch.setattr(layout, "HAS_TRITON", triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    layout.architecture.cache_clear()
    try:
        assert layout.unsupported(OnGpu()) == reason  # type: ignore[arg-type]
    finally:
        layout.architecture.cache_clear()


KERNELS = {
    "aggregate_forward": "normalize_branches",
    "aggregate_backward": "normalize_branches_backward",
    "energy_forward": "branch_energy",
    "energy_backward": "branch_energy_backward",
    "weighted_gram": "both backward passes",
}


@pytest.mark.parametrize("memory", [65536, 101376, 166912], ids=["T4", "RTX 30 and 40", "A100"])
@pytest.mark.parametrize("large", KERNELS)
def test_a_kernel_that_does_not_fit_is_pytorchs(
    large: str, memory: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vllm#36802, triton#8182: a T4 and an RTX have less shared memory than what was tried on."""
    launched: list[str] = []
    real = LaunchRow.launch

    def launch(row: LaunchRow, grid: tuple[int, ...], *arguments: Any) -> None:
        launched.append(row.kernel.partition(":")[2])
        real(row, grid, *arguments)

    monkeypatch.setattr(LaunchRow, "launch", launch)
    # As the last stage of ResNeXt-101 32x8d once did on sm86.
    taken = 131072
    monkeypatch.setattr(layout, "shared_memory_of", lambda r: taken if large in r.kernel else 0)
    monkeypatch.setattr(layout, "shared_memory", lambda _: memory)

    def results(name: Any) -> list[torch.Tensor]:
        h, weight = (value.requires_grad_() for value in Case("limits").inputs(torch.float32))
        y, energies = coded_aggregate(h, weight, 4, backend=name)
        raw = branch_energy(h, weight, 4, backend=name)
        total = y.square().mean() + energies.square().mean() + raw.square().mean()
        return [y, energies, raw, *torch.autograd.grad(total, (h, weight))]

    for value, expected in zip(results("triton"), results("torch"), strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=1e-6)
    fits = memory >= taken
    assert (large in launched) == fits
    assert {"aggregate_forward", "energy_forward"} <= {*launched, large}
    said = [r.getMessage() for r in caplog.records if "shared memory" in r.getMessage()]
    text = f"{large} needs {taken} bytes of shared memory, and the GPU has {memory}"
    assert said == ([] if fits else [f"PyTorch runs instead of a kernel: {text}"])
