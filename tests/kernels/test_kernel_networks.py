"""Whole blocks and networks in the fused data flow: golden tensors, and ten steps of training.

Blocks and networks of the golden tensors' sizes take the kernels of the coded operations from the
interpreter and PyTorch's convolutions; one golden block and the training take every kernel. The
golden network runs layer by layer in float32.
"""

from __future__ import annotations

import pytest
import torch
from support.helpers import GOLDEN, below, load_golden, map_and_energies, relative_error
from torch import Tensor

from coded_resnext import CodedLoss, CodedResNeXt, Stage
from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.rows import ALL_PASSES, LaunchRow, Plan
from coded_resnext.models.published import (
    published_block,
    published_block_state,
    published_model,
    published_model_state,
)

BLOCKS = sorted(path.stem for path in GOLDEN.glob("block_*.npz"))
# float32 against float64: energies and losses are sums of a few thousand rounded terms; gradients
# went through three convolutions and BatchNorms.
ENERGIES, GRADIENTS = 1e-5, 1e-4
# Of float64, after the sums of three stages.
EXACT = 1e-12
CODED_KERNELS = {"aggregate_forward", "aggregate_backward", "weighted_gram", "coding_loss"}


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "fused") for name in BLOCKS),
        pytest.param("block_imagenet_16of32_train", "triton", marks=pytest.mark.long),
    ],
)
def test_golden_block(name: str, backend: str) -> None:
    meta, golden = load_golden(name)
    block = published_block(below(golden, "state."), stride=meta["stride"]).float()
    block.backend = backend
    block.train(meta["train"])
    x = golden["x"].float().requires_grad_()
    y, energies = map_and_energies(block, x)
    loss = CodedLoss(
        [block.codebook],
        weight=meta["coding_loss_weight"],
        exponent=meta["exponent"],
        threshold=meta["threshold"],
        backend="triton",
    )
    terms = loss(torch.zeros(len(x), block.codebook.classes), [energies], golden["targets"])
    coding = terms.total - terms.cross_entropy
    ((y * golden["grad_y"].float()).sum() + coding).backward()
    assert relative_error(energies.double(), golden["energies"]) < ENERGIES
    assert relative_error(terms.coding[0].double(), golden["coding_loss"]) < ENERGIES
    assert relative_error(x.grad.double(), golden["grad_x"]) < GRADIENTS
    for parameter in block.parameters():
        parameter.data = parameter.grad
    grads = published_block_state(block)
    for key, expected in below(golden, "grad.").items():
        assert relative_error(grads[key].double(), expected) < GRADIENTS, key


@pytest.mark.parametrize(
    ("backend", "dtype", "forward", "gradients"),
    [
        pytest.param("fused", torch.float64, EXACT, EXACT, id="fused in float64"),
        pytest.param(
            *("triton", torch.float32, ENERGIES, GRADIENTS),
            id="kernels in float32",
            marks=pytest.mark.long,
        ),
    ],
)
def test_golden_network(
    backend: str,
    dtype: torch.dtype,
    forward: float,
    gradients: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fused data flow, and the kernels of the coded operations and of the loss layer by layer.

    In float32 a value of the fused flow that is 0 but for rounding changes its sign before a ReLU,
    of which there are some 430,000; blocks in float32 are compared above.
    """
    launched: list[str] = []
    launch = LaunchRow.launch

    def note(row: LaunchRow, *args: object) -> None:
        launched.append(row.kernel.partition(":")[2])
        launch(row, *args)

    monkeypatch.setattr(LaunchRow, "launch", note)
    meta, golden = load_golden("net_cifar10")
    model = published_model(below(golden, "state."), meta["architecture"]).to(dtype)
    for block in model.blocks:
        block.backend = backend
        if backend == "triton":
            # Keeps a block from being fused.
            block.reduce.register_forward_hook(lambda *_: None)
    x, targets = golden["x"].to(dtype), golden["targets"]
    with torch.no_grad():
        logits, energies = model.eval()(x, return_energies=True)
        alone = model(x, keep=int(golden["single_class"]))
    assert relative_error(logits.double(), golden["eval_logits"]) < forward
    assert relative_error(alone.double(), golden["single_class_logits"]) < forward
    for index, value in enumerate(energies):
        assert relative_error(value.double(), golden[f"eval_energies.{index}"]) < forward

    weight, exponent = meta["coding_loss_weight"], meta["exponent"]
    coding = "triton" if backend == "triton" else "auto"
    loss = CodedLoss(model.codebooks, weight=weight, exponent=exponent, backend=coding)
    logits, energies = model.train()(x, return_energies=True)
    terms = loss(logits, energies, targets)
    terms.total.backward()
    assert relative_error(terms.total.double(), golden["train_loss"]) < forward
    assert relative_error(sum(terms.coding).double(), golden["train_coding_loss"]) < forward
    for parameter in model.parameters():
        parameter.data = parameter.grad
    grads = published_model_state(model)
    for key, expected in below(golden, "grad.").items():
        assert relative_error(grads[key].double(), expected) < gradients, key
    assert set(launched) == (CODED_KERNELS if backend == "triton" else set())


def small_network(backend: str, drop_branches: float) -> CodedResNeXt:
    """A network like that of the digits, in little; each call makes the same."""
    torch.manual_seed(0)
    stages = [Stage(1, 16, 2, 8, 8), Stage(1, 16, 2, 10, 5, stride=2)]
    model = CodedResNeXt(
        stages, 10, stem_channels=8, in_channels=1, drop_branches=drop_branches, backend=backend
    )
    return model.to(memory_format=torch.channels_last)


def train(backend: str, steps: int) -> list[float]:
    """Losses of the small network on the same small random batches."""
    model = small_network(backend, drop_branches=0.1).train()
    loss = CodedLoss(model.codebooks, weight=6.0, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images = torch.rand(4, 1, 5, 5, generator=generator)
        targets = torch.randint(10, (4,), generator=generator)
        logits, energies = model(images, return_energies=True)
        total = loss(logits, energies, targets).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


@pytest.mark.long
@pytest.mark.usefixtures("memory")
def test_ten_steps_give_the_losses_of_pytorch() -> None:
    actual, expected = train("triton", 10), train("torch", 10)
    assert actual == pytest.approx(expected, rel=1e-4)
    # The losses differ from step to step by far more than that.
    assert max(expected) - min(expected) > 0.1


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False])
def test_a_network_by_kernels_compiles_whole(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass of every convolution by an interpreted kernel, forward and, in training, backward.

    In evaluation BatchNorm is folded, by kernels of its own.
    """
    every_pass = Plan(ALL_PASSES, "for this test", measured=ALL_PASSES)
    monkeypatch.setattr(conv1x1_rows, "OTHERS", every_pass)
    whole, eager = (small_network("triton", drop_branches=0.0).train(training) for _ in range(2))
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    outcomes: list[list[Tensor]] = []
    with torch.set_grad_enabled(training):
        for model, called in ((whole, compiled), (eager, eager)):
            logits, energies = called(images, return_energies=True)
            outcomes.append([logits, *energies])
            if training:
                total = logits.square().sum() + sum(e.pow(3).sum() for e in energies)
                outcomes[-1] += torch.autograd.grad(total, list(model.parameters()))
    # The graph sums gradients in an order of its own; a wrong choice of kernels stops before.
    for actual, expected in zip(*outcomes, strict=True):
        assert relative_error(actual, expected) < GRADIENTS
