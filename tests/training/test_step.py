"""One optimizer step: parts, clipping, precision, averaging, and what keeps it from counting."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny_training import BOOK, IMAGES, TARGETS, assert_same, make_config, make_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from coded_resnext import CodedLoss, CodedResNeXt, Stage
from coded_resnext.data.batches import Batch
from coded_resnext.models.loss import masked_gradients
from coded_resnext.training.config import TrainingConfig
from coded_resnext.training.guard import NonFiniteError
from coded_resnext.training.processes import World
from coded_resnext.training.step import TrainStep

BATCH = Batch(IMAGES[:8], TARGETS[:8], torch.arange(8))


def freeze_batch_norm(model: CodedResNeXt) -> CodedResNeXt:
    """Samples no longer depend on each other; the last scales are not 0, so that all count."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.1)
            module.eval()
    return model


def make_step(model: CodedResNeXt, config: TrainingConfig | None = None) -> TrainStep:
    return TrainStep(model, config or make_config(), World(), 3)


def parameters(model: CodedResNeXt) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def run(batches: int = 6, model: CodedResNeXt | None = None, **changes: Any) -> TrainStep:
    """Some steps of a network, batch after batch."""
    step = make_step(model or make_model(), make_config(**changes))
    for index in range(batches):
        start = 8 * (index % 3)
        chosen = slice(start, start + 8)
        step(Batch(IMAGES[chosen], TARGETS[chosen], torch.arange(24)[chosen]), index)
    step.finish()
    return step


def test_a_step_is_sgd_on_the_published_loss() -> None:
    config = make_config(coding_weight=2.0, smoothing=0.1, weight_decay=1e-2)
    model = make_model(drop_branches=0.0).double()
    twin = make_model(drop_branches=0.0).double()
    batch = BATCH._replace(images=BATCH.images.double())
    step = make_step(model, config)
    optimizer = torch.optim.SGD(twin.parameters(), momentum=0.9, nesterov=True, weight_decay=1e-2)
    loss = CodedLoss(twin.codebooks, weight=2.0, label_smoothing=0.1)
    for index in range(3):
        step(batch, index)
        optimizer.param_groups[0]["lr"] = config.lr_at(index, 3)
        logits, energies = twin(batch.images, return_energies=True)
        optimizer.zero_grad()
        terms = loss(logits, energies, batch.targets)
        terms.total.backward()
        optimizer.step()
        expected = [*terms.named().values(), (logits.argmax(1) == batch.targets).double().mean()]
        assert step.latest[:4].tolist() == pytest.approx([value.item() for value in expected])
    for ours, theirs in zip(parameters(model), parameters(twin), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(parts: int) -> None:
    """Parts of 3, 3 and 2 samples count by their size."""
    found = []
    for count in (1, parts):
        model = freeze_batch_norm(make_model(drop_branches=0.0).double())
        step = make_step(model, make_config(batch_size=24, grad_accum_steps=count))
        step(BATCH._replace(images=BATCH.images.double()), 0)
        found.append((parameters(model), step.latest))
    for whole, added in zip(*(weights for weights, _ in found), strict=True):
        assert torch.allclose(whole, added, rtol=0, atol=1e-14)
    # What is logged is float32, of which the parts are rounded one by one.
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)


def test_weight_decay_can_leave_out_biases_and_batch_norm() -> None:
    """By the groups that timm's own optimizer has for the same network and setting."""
    optim = pytest.importorskip("timm.optim")
    model = make_model()
    for filtered in (False, True):
        step = make_step(model, make_config(filter_bias_and_bn=filtered, weight_decay=0.25))
        theirs = optim.create_optimizer_v2(
            model, "sgd", lr=0.1, weight_decay=0.25, filter_bias_and_bn=filtered
        )
        ours, expected = (
            {
                id(parameter): group["weight_decay"]
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
            for optimizer in (step.optimizer, theirs)
        )
        assert ours == expected
        assert set(ours.values()) == ({0.0, 0.25} if filtered else {0.25})


def test_a_step_may_mask_gradients_in_place_of_the_coding_loss() -> None:
    """Its gradient is that of the cross-entropy within `masked_gradients`, part by part."""
    config = make_config(
        mask_gradients=True, coding_weight=0.0, weight_decay=0.0, grad_accum_steps=2
    )
    for masked in (True, False):
        model = freeze_batch_norm(make_model(drop_branches=0.0))
        before = parameters(model)
        with masked_gradients(model, BATCH.targets) if masked else nullcontext():
            loss = F.cross_entropy(model(BATCH.images), BATCH.targets)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        step = make_step(model, config)
        step(BATCH, 0)
        step.finish()
        # The first step of Nesterov's momentum goes 1.9 times as far as the gradient.
        moves = [(a - b) / (-1.9 * step.lr) for a, b in zip(parameters(model), before, strict=True)]
        alike = [
            torch.allclose(move, gradient, rtol=1e-3, atol=1e-4)
            for move, gradient in zip(moves, expected, strict=True)
        ]
        assert all(alike) == masked


def test_clipping_bounds_the_gradient_of_all_parameters_together() -> None:
    def change(clip: float | None) -> float:
        model = make_model(drop_branches=0.0)
        before = parameters(model)
        config = make_config(
            momentum=0.0, weight_decay=0.0, clip_grad=clip, warmup_epochs=0, lr=1.0
        )
        make_step(model, config)(BATCH, 0)
        pairs = zip(before, parameters(model), strict=True)
        return float(torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt())

    free = change(None)
    assert change(0.01) == pytest.approx(0.01, rel=1e-3)
    assert change(2 * free) == pytest.approx(free, rel=1e-6)


def test_branches_are_dropped_by_seed_step_and_process() -> None:
    def drawn(seed: int, index: int, rank: int) -> list[float]:
        seen = []
        model = make_model(drop_branches=0.5)
        model.coded_blocks[0].drop.register_forward_hook(lambda _m, _i, mask: seen.append(mask))
        world = World(rank=rank)
        TrainStep(model, make_config(seed=seed), world, 3)(BATCH, index)
        return seen[0].flatten().tolist()

    reference = drawn(0, 4, 0)
    assert drawn(0, 4, 0) == reference
    others = [drawn(1, 4, 0), drawn(0, 5, 0), drawn(0, 4, 1)]
    assert all(other != reference for other in others)


def test_the_average_follows_the_weights_and_the_statistics() -> None:
    model = make_model()
    step = make_step(model, make_config(model_ema=True, model_ema_decay=0.8))
    assert step.average is not None
    names = [n for n, v in model.state_dict().items() if v.is_floating_point()]
    expected = {name: model.state_dict()[name].double().clone() for name in names}
    for index in range(5):
        step(BATCH, index)
        # The step has counted only when its flags have been read.
        step.finish()
        for name in names:
            expected[name].lerp_(model.state_dict()[name].double(), 0.2)
    for name in names:
        found = step.average.model.state_dict()[name].double()
        assert torch.allclose(found, expected[name], rtol=1e-5, atol=1e-7), name
    assert not torch.equal(step.average.model.head.weight, model.head.weight)

    # When flags are read makes no difference: here with the next step, and at the end.
    late = make_model()
    delayed = make_step(late, make_config(model_ema=True, model_ema_decay=0.8))
    for index in range(5):
        delayed(BATCH, index)
    delayed.finish()
    assert delayed.average is not None
    assert_same(dict(delayed.average.model.state_dict()), dict(step.average.model.state_dict()))


def test_a_warmed_up_average_leaves_the_fresh_weights_sooner() -> None:
    def distance(step: TrainStep) -> float:
        assert step.average is not None
        return (step.average.model.head.weight - step.model.head.weight).norm().item()

    cold = run(model_ema=True, model_ema_decay=0.999)
    warm = run(model_ema=True, model_ema_decay=0.999, model_ema_warmup=True)
    # 0.11 to 0.14 over eight seeds, here and under the oldest instructions of portability.py.
    assert distance(warm) < 0.5 * distance(cold)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_follows_float32(dtype: str) -> None:
    """Losses of three steps, to sixteen times the rounding of the type: they are fourth powers.

    Over eight seeds of weights 0.01 to 0.6 of that, under the oldest instructions of
    tests/portability.py too, and 0.6 for this one: AMD EPYC, torch 2.14.1, 2026-11-29.
    """
    tolerance = 16 * torch.finfo(getattr(torch, dtype)).eps / 2
    found = []
    for changes in ({}, {"amp": True, "amp_dtype": dtype}):
        step = make_step(make_model(drop_branches=0.0), make_config(**changes))
        if step.scaler.is_enabled():
            # Its first scale is found by overflows; this one is small enough from the start.
            step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 128.0})
        for index in range(3):
            step(BATCH, index)
        step.finish()
        assert all(p.dtype == torch.float32 for p in step.parameters)
        found.append(step)
    exact, mixed = found
    assert mixed.scaler.is_enabled() == (dtype == "float16")
    assert mixed.sums[:3].tolist() == pytest.approx(exact.sums[:3].tolist(), rel=tolerance)
    assert mixed.sums.tolist() != exact.sums.tolist()


def test_an_overflow_in_float16_skips_the_step_and_lowers_the_scale() -> None:
    model = make_model()
    step = make_step(model, make_config(amp=True, amp_dtype="float16"))
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 2.0**40})
    before = parameters(model)
    step(BATCH, 0)
    step.finish()
    assert_same(parameters(model), before)
    assert step.scaler.get_scale() == 2.0**39
    assert all(not values["momentum_buffer"].any() for values in step.optimizer.state.values())


def test_an_overflow_at_the_lowest_scale_is_an_error() -> None:
    step = make_step(make_model(), make_config(amp=True, amp_dtype="float16"))
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1.0})
    with torch.no_grad():
        step.model.head.weight *= 1e30
    step(BATCH, 0)
    with pytest.raises(NonFiniteError, match="gradient not finite"):
        step.finish()


def test_a_step_that_is_not_finite_changes_nothing_and_is_told_one_step_late() -> None:
    step = run(4)
    model = step.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    momenta = [v["momentum_buffer"].clone() for v in step.optimizer.state.values()]
    sums = step.sums.clone()
    step(BATCH._replace(images=BATCH.images * torch.nan), 4)
    # The device knows already; the host does not ask.
    assert_same(parameters(model), [before[name] for name, _ in model.named_parameters()])
    with pytest.raises(NonFiniteError) as caught:
        step(BATCH, 5)
    assert caught.value.step == 4
    assert caught.value.indices == list(range(8))
    losses = ["coding loss of coded block 1", "cross-entropy", "total loss"]
    assert caught.value.terms == [*losses, "running statistics", "gradient"]
    assert_same(dict(model.state_dict()), before)
    assert_same([v["momentum_buffer"] for v in step.optimizer.state.values()], momenta)
    assert torch.equal(step.sums, sums)


def test_a_gradient_alone_may_be_what_is_not_finite() -> None:
    step = make_step(make_model())
    step.model.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = parameters(step.model)
    step(BATCH, 0)
    with pytest.raises(NonFiniteError) as caught:
        step.finish()
    assert caught.value.terms == ["gradient"]
    assert_same(parameters(step.model), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_an_optimizer_state_alone_may_be_what_is_not_finite(value: float) -> None:
    """Of a damaged checkpoint, or so large that its square overflows: as its next sum may."""
    step = run(2)
    step.optimizer.state[step.model.head.weight]["momentum_buffer"][0, 0] = value
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    step(BATCH, 2)
    assert_same(parameters(step.model), [before[name] for name, _ in step.model.named_parameters()])
    with pytest.raises(NonFiniteError) as caught:
        step.finish()
    assert caught.value.terms == ["optimizer state"]
    assert_same(dict(step.model.state_dict()), before)


@pytest.mark.parametrize("place", ["input", "block 1", "block 2", "block 3"])
def test_the_first_place_that_is_not_finite_is_named(place: str) -> None:
    """Three coded blocks: an image, or the activations before the energies of one of them."""
    torch.manual_seed(0)
    stages = [Stage(1, 8, 2, 4, 4), Stage(3, 8, 2, 4, 2)]
    model = CodedResNeXt(stages, 3, codebooks=[BOOK], in_channels=1, stem_channels=8)
    step = make_step(model)
    step(BATCH, 0)
    step.finish()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = BATCH.images.clone()
    number = 1
    if place == "input":
        images[3, 0, 0, 0] = torch.nan
    else:
        number = int(place[-1])
        block = model.coded_blocks[number - 1]
        block.grouped_bn.register_forward_hook(lambda _, __, y: y + torch.inf)
    step(BATCH._replace(images=images), 1)
    with pytest.raises(NonFiniteError) as caught:
        step.finish()
    assert caught.value.terms[0] == f"coding loss of coded block {number}"
    assert_same(dict(model.state_dict()), before)


def test_a_loss_alone_may_be_what_is_not_finite() -> None:
    """An infinite logit of another class leaves a finite gradient only of itself."""
    step = make_step(make_model())
    before = parameters(step.model)
    real = step.loss.forward

    def infinite(*arguments: Any) -> Any:
        terms = real(*arguments)
        return terms._replace(cross_entropy=terms.cross_entropy.detach() + torch.inf)

    step.loss.forward = infinite  # type: ignore[method-assign]
    step(BATCH, 0)
    assert_same(parameters(step.model), before)
    with pytest.raises(NonFiniteError, match="step 0: cross-entropy not finite"):
        step.finish()


def test_state_goes_into_a_network_of_another_memory_layout() -> None:
    """The fused optimizer step goes through memory, so that layouts must agree."""
    config = {"model_ema": True}
    first = run(3, **config)
    state, local = first.state(), first.local_state()
    for layout in (torch.contiguous_format, torch.channels_last):
        model = make_model().to(memory_format=layout)
        step = make_step(model, make_config(**config))
        step.load(state, local)
        for parameter, values in step.optimizer.state.items():
            assert values["momentum_buffer"].stride() == parameter.stride()
        assert_same(dict(step.model.state_dict()), dict(first.model.state_dict()))
        assert torch.equal(step.sums, first.sums)


def test_channels_last_changes_no_more_than_rounding() -> None:
    found = []
    for laid_out in (False, True):
        model = make_model(drop_branches=0.0, in_channels=3).double()
        seen: list[bool] = []
        model.register_forward_pre_hook(
            lambda _, x, seen=seen: seen.append(
                x[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
        step = make_step(model, make_config(channels_last=laid_out))
        for index in range(3):
            step(BATCH._replace(images=BATCH.images.repeat(1, 3, 1, 1).double()), index)
        step.finish()
        weight = model.blocks[0].grouped.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == laid_out
        assert seen == [laid_out] * 3
        found.append(parameters(model))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.long
def test_compiled_steps_are_the_same() -> None:
    """With the compiler's front end alone, whose result must be the same to the bit."""
    plain, compiled = run(3), run(3, torchcompile="eager")
    assert_same(parameters(compiled.model), parameters(plain.model))
    with pytest.raises(ValueError, match=r"torchcompile: expected one of .*inductor.* got 'fast'"):
        make_step(make_model(), make_config(torchcompile="fast"))


class Reads(TorchDispatchMode):
    """Counts how often a number is taken out of a tensor, for which the host waits on a GPU."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(
        make_model(),
        make_config(
            clip_grad=1.0, model_ema=True, amp=True, amp_dtype="float16", grad_accum_steps=2
        ),
    )
    step(BATCH, 0)
    # Values in the host's memory are checked there; on a GPU's tensors nobody looks.
    monkeypatch.setattr("coded_resnext.kernels.checks._readable", lambda _: False)
    with Reads() as reads:
        step(BATCH, 1)
        assert reads.count == 0
        step.latest[0].item()
        assert reads.count == 1


def test_sync_bn_wants_gpus() -> None:
    with pytest.raises(ValueError, match=r"sync_bn: expected GPUs, got cpu; leave it out"):
        TrainStep(make_model(), make_config(sync_bn=True), World(size=2), 3)
    # Alone there is nothing to synchronise.
    make_step(make_model(), make_config(sync_bn=True))(BATCH, 0)
