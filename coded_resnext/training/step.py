"""One optimizer step of a coded network: mixing, forward, loss, backward, guard, update.

The device's part of a step, what it does between two decisions of the host, may be recorded once
and replayed for every batch: a GPU that is told of every launch by Python waits for Python, and a
coded ResNeXt-50 has 2,154 launches a step. A CUDA graph holds them all. What a step draws is drawn
anew in a replay, from the generators' state at that moment.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from coded_resnext.data.batches import Batch
from coded_resnext.data.preprocessing import derive_seed
from coded_resnext.files import brief, say
from coded_resnext.kernels.backend import Backend, named_backend
from coded_resnext.kernels.checks import check_targets
from coded_resnext.kernels.layout import HAS_TRITON, architecture
from coded_resnext.models.checkpoint import describe_network
from coded_resnext.models.grouped_conv import use_grouped_kernels
from coded_resnext.models.layers import copy_of
from coded_resnext.models.loss import CodedLoss, decode, masked_gradients
from coded_resnext.models.resnext import CodedResNeXt

from .config import TrainingConfig
from .guard import StepGuard, copy_all
from .processes import World
from .run_folder import require_same, versions

# Each process keeps running statistics of its own; PyTorch 2.14 has renamed the setting.
_BUFFERS_IN_EVERY_STEP = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
# A step of coded_resnext50_32x4d on an H100, as CUDA graphs: 37.8 ms compiled, 51.1 ms otherwise.
COMPILED_ON = ("sm90",)
Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Computed(NamedTuple):
    """What a step has computed before its update."""

    values: Tensor
    """The metrics."""
    bad: Tensor
    """Booleans: what was not finite."""
    overflow: Tensor
    """Whether the gradient was not, a boolean."""


class DevicePart(NamedTuple):
    """A step but for what the host reads and decides."""

    compute: Callable[[Tensor, Tensor], Computed]
    """Leaves the gradients of images and targets."""
    update: Callable[[Computed, Tensor], None]
    """Updates the weights, unless the second argument is 1."""


class Recording(Protocol):
    """Launches that can be made again."""

    def replay(self) -> None:
        """Makes them."""


def record(work: Callable[[], None]) -> Recording:
    """Records the launches of a function, which are not made yet, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # The data loader's threads may allocate memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph


def recorded(part: DevicePart, images: Tensor, targets: Tensor) -> DevicePart:
    """Records a step for batches with the shapes, dtypes and layouts of these.

    Every shape must have been through the step before, so that what is set up once is set up.
    """
    own_images, own_targets = torch.empty_like(images), torch.empty_like(targets)
    gate = torch.zeros((), device=images.device)
    computed: list[Computed] = []

    def fill() -> None:
        computed[:] = [part.compute(own_images, own_targets)]

    first = record(fill)
    second = record(lambda: part.update(computed[0], gate))

    def compute(images: Tensor, targets: Tensor) -> Computed:
        own_images.copy_(images)
        own_targets.copy_(targets)
        first.replay()
        return computed[0]

    def update(_: Computed, keeps: Tensor) -> None:
        gate.copy_(keeps)
        second.replay()

    return DevicePart(compute, update)


def unrecordable(device: torch.device, world: World) -> str | None:
    """Returns why the steps of a training cannot be recorded; None if they can."""
    if device.type != "cuda":
        return f"the network is on {device.type}, not on a GPU"
    if world.is_shared:
        return f"its gradients are added up over {world.size} processes"
    return None


def is_recorded(config: TrainingConfig, device: torch.device, world: World) -> bool:
    """Returns whether the steps of a training are recorded.

    Raises:
        ValueError: they have to be and cannot.
    """
    reason = unrecordable(device, world)
    if config.graph == "always" and reason is not None:
        raise ValueError(f"graph: a step cannot be recorded, since {reason}; expected auto")
    return config.graph != "never" and reason is None


class TrainStep:
    """Makes optimizer steps. The host waits for the device only to read a finished step's flags.

    Args:
        model: the network, on its device. Its memory format and, for `sync_bn`, its BatchNorm
            layers are changed in place.
        config: optimizer, schedule, loss and precision.
        world: the processes that share a step.
        steps_per_epoch: for the schedule.

    Raises:
        ValueError: `sync_bn` without a GPU, an unknown `torchcompile`, a `graph` that has to be
            recorded and cannot, or processes whose network, settings or versions differ.
        ImportError: MixUp or CutMix without torchvision.

    Attributes:
        metrics: names of what is summed in every step.
        sums: sums of the metrics over the epoch so far, on this process.
        latest: metrics of the last step.
        lr: learning rate of the last step.
        stop: the signal that the processes have agreed to stop for, or 0.
        average: the moving average of the weights, or None.
    """

    def __init__(
        self,
        model: CodedResNeXt,
        config: TrainingConfig,
        world: World,
        steps_per_epoch: int,
        *,
        class_weight: Tensor | None = None,
    ) -> None:
        self.model, self.config, self.world = model, config, world
        self.steps_per_epoch = steps_per_epoch
        self.device = next(model.parameters()).device
        if config.sync_bn and world.is_shared:
            if self.device.type != "cuda":
                raise ValueError(
                    f"sync_bn: expected GPUs, got {self.device.type}; leave it out, and running "
                    "statistics are joined at an epoch's end (dist_bn)"
                )
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        require_same(
            world,
            {
                "network": describe_network(model),
                "training": config.to_dict(),
                "steps_per_epoch": steps_per_epoch,
                "versions": versions(),
            },
        )
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.device.type == "cuda":
            # The same convolutions, by wider groups where these were measured to be faster.
            use_grouped_kernels(model)
        backend = model.blocks[0].backend
        self.loss = CodedLoss(
            model.codebooks,
            weight=config.coding_weight,
            exponent=config.exponent,
            threshold=config.threshold,
            label_smoothing=config.smoothing,
            class_weight=class_weight,
            check_values=False,
            backend=backend,
        ).to(self.device)
        self.parameters = list(model.parameters())
        # Weights have two dimensions or more; biases and BatchNorm's parameters have one.
        decayed = [p for p in self.parameters if p.ndim > 1 or not config.filter_bias_and_bn]
        others = [p for p in self.parameters if p.ndim <= 1 and config.filter_bias_and_bn]
        groups: list[dict[str, Any]] = [{"params": decayed}]
        groups += [{"params": others, "weight_decay": 0.0}] if others else []
        self.optimizer = torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
            # Fused, it can be kept from changing anything by a flag on the device.
            fused=True,
        )
        if config.momentum:
            # Otherwise a first step that does not count would leave them undefined.
            for parameter in self.parameters:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = self._make_scaler()
        self.mixing = make_mixing(config, model.num_classes)

        self._parallel: DistributedDataParallel | None = None
        if world.is_shared:
            # Parameters are made equal by DistributedDataParallel, buffers not in every version.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
            settings: dict[str, Any] = {
                "device_ids": [self.device] if self.device.type == "cuda" else None,
                "gradient_as_bucket_view": True,
                _BUFFERS_IN_EVERY_STEP: False,
            }
            self._parallel = DistributedDataParallel(model, **settings)
        forward: Any = self._parallel or model
        compiler = compiler_for(config.torchcompile, self.device, backend)
        self._forward = compiled(forward, compiler)
        # After the processes have been given the same weights.
        self.average: WeightAverage | None = None
        if config.model_ema:
            self.average = WeightAverage(
                model, config.model_ema_decay, warmup=config.model_ema_warmup
            )

        blocks = range(1, len(model.codebooks) + 1)
        self.metrics = ["total", "cross_entropy", *(f"coding_{i}" for i in blocks)]
        self.metrics += ["train_accuracy", *(f"train_early_decoding_{i}" for i in blocks)]
        # float32 would lose digits over the steps of an ImageNet epoch.
        self.sums = torch.zeros(len(self.metrics), dtype=torch.float64, device=self.device)
        self.latest = self.sums.clone()
        self.lr = config.lr
        self.stop = 0
        terms = [f"coding loss of coded block {i}" for i in blocks]
        self._guard = StepGuard(
            [
                *(*terms, "cross-entropy", "total loss", "running statistics"),
                *("gradient", "optimizer state"),
            ],
            [*model.buffers(), self.sums],
            world,
        )
        self._unsettled: int | None = None
        self._part = DevicePart(self._compute, self._update)
        self._seen: Counter[Any] = Counter()
        self._recorded: tuple[Any, DevicePart] | None = None
        is_graph = is_recorded(config, self.device, world)
        self._lr = torch.tensor(config.lr, device=self.device) if is_graph else None

    def __call__(self, batch: Batch, step: int) -> None:
        """Makes a step.

        Args:
            batch: this process's samples.
            step: counted from 0 over the whole run.

        Raises:
            ValueError: targets that are no classes of the network.
            NonFiniteError: the step before was not finite; this one does not count either.
        """
        self.lr = self.config.lr_at(step, self.steps_per_epoch)
        # A recorded step reads it from the device.
        lr = self.lr if self._lr is None else self._lr.fill_(self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # MixUp, CutMix and DropSubNNs draw from the default generators, so that what they draw
        # depends on nothing else, and a resumed run draws the same.
        torch.manual_seed(derive_seed(self.config.seed, step, self.world.rank))
        # Here, where they still are on the host: the loss does not read an accelerator's values.
        check_targets(batch.targets, len(batch.images), self.model.num_classes)
        images, targets = self._to_device(batch)
        self._guard.begin()
        part = self._part_for(images, targets)
        computed = part.compute(images, targets)
        # The device is busy with this step while the host learns how the last one ended.
        self._settle()
        stop = self.world.signals.received
        gate = self._guard.post(step, computed.bad, stop, batch.indices)
        self._unsettled = step
        self.latest = computed.values
        part.update(computed, gate)

    def _part_for(self, images: Tensor, targets: Tensor) -> DevicePart:
        """Returns the device's part of a step, recorded if batches like this one come often."""
        if self._lr is None:
            return self._part
        kind = (
            *(images.shape, images.dtype, images.stride(), targets.shape, targets.dtype),
            # A recording would go on as the network was: changed, it is run as it is.
            *((id(module), module.training) for module in self.model.modules()),
            *((id(each), each.requires_grad) for each in self.model.parameters()),
        )
        self._seen[kind] += 1
        # Two steps have set up what is set up once. One shape is recorded, as a graph keeps memory.
        if self._recorded is None and self._seen[kind] == 3:
            try:
                self._recorded = kind, recorded(self._part, images, targets)
            except RuntimeError as error:
                if self.config.graph == "always":
                    raise
                say(f"steps are not recorded as CUDA graphs: {brief(error)}", file=sys.stderr)
                self._lr = None
                self.optimizer.zero_grad(set_to_none=True)
                self.scaler = self._make_scaler(self.scaler.state_dict())
        if self._recorded is not None and self._recorded[0] == kind:
            return self._recorded[1]
        return self._part

    def _make_scaler(self, state: dict[str, Any] | None = None) -> torch.amp.GradScaler:
        enabled = self.config.amp and self.config.amp_dtype == "float16"
        scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        if state is not None:
            scaler.load_state_dict(state)
        return scaler

    def _compute(self, images: Tensor, targets: Tensor) -> Computed:
        """Gradients of a batch, clipped, and what was not finite."""
        values = self._backward(images, targets)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.config.clip_grad is not None:
            clip_grads_with_norm_(self.parameters, self.config.clip_grad, norm)
        blocks = len(self.model.codebooks)
        losses = torch.cat([values[2 : 2 + blocks], values[1:2], values[:1]])
        overflow = ~norm.isfinite()
        # A float16 gradient may overflow while the scale is being found.
        scale = self.scaler.scale(torch.ones((), device=self.device))
        # Finite norms of both leave the momentum that follows from them finite.
        momenta = [values["momentum_buffer"] for values in self.optimizer.state.values()]
        state = ~get_total_norm(momenta).isfinite()
        largest = get_total_norm(running_statistics(self.model), norm_type=math.inf)
        others = [~largest.isfinite(), overflow & (scale <= 1), state]
        return Computed(values, torch.cat([~losses.isfinite(), torch.stack(others)]), overflow)

    def _update(self, computed: Computed, gate: Tensor) -> None:
        self.sums += computed.values
        found_inf = torch.maximum(gate, computed.overflow.float())
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Waits for the last step; model, average and `stop` are then up to date.

        Raises:
            NonFiniteError: it was not finite; weights, statistics and sums are those before it.
        """
        self._guard.begin()
        self._settle()

    def means(self, steps: int) -> dict[str, float]:
        """Means of the metrics over an epoch of so many steps and all processes; sums begin anew.

        All processes must call this.
        """
        means = self.world.add(self.sums.clone()) / (steps * self.world.size)
        self.sums.zero_()
        return dict(zip(self.metrics, means.tolist(), strict=True))

    def join_statistics(self) -> None:
        """Gives all processes the same running statistics of BatchNorm, as `dist_bn` says."""
        if not self.world.is_shared:
            return
        for model in self._networks():
            buffers = running_statistics(model)
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            if self.config.dist_bn == "broadcast" and not self.world.is_main:
                flat.zero_()
            self.world.add(flat)
            if self.config.dist_bn == "reduce":
                flat /= self.world.size
            parts = torch.split(flat, [buffer.numel() for buffer in buffers])
            copy_all(buffers, [p.view_as(b) for p, b in zip(parts, buffers, strict=True)])

    def state(self) -> dict[str, Any]:
        """Returns the state that all processes have in common, for a checkpoint; after `finish`."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = self.lr
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.model.state_dict(),
        }

    def local_state(self) -> dict[str, Any]:
        """Returns the state that differs between the processes, on the host."""
        statistics = [b.cpu() for model in self._networks() for b in model.buffers()]
        return {"statistics": statistics, "sums": self.sums.cpu()}

    def load(self, state: dict[str, Any], local: dict[str, Any]) -> None:
        """Goes back to a state of `state` and `local_state`."""
        # The momentum gets new memory.
        self._recorded = None
        self._seen.clear()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        # A run that has no step left writes it again.
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        for parameter, values in self.optimizer.state.items():
            # The fused step goes through memory: layouts must agree.
            own = torch.zeros_like(parameter)
            values["momentum_buffer"] = own.copy_(values["momentum_buffer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        statistics = [b for model in self._networks() for b in model.buffers()]
        copy_all(statistics, [value.to(self.device) for value in local["statistics"]])
        self.sums.copy_(local["sums"])

    def _networks(self) -> list[CodedResNeXt]:
        return [self.model] if self.average is None else [self.model, self.average.model]

    def _settle(self) -> None:
        step, self._unsettled = self._unsettled, None
        self.stop = self._guard.settle() or self.stop
        if step is not None and self.average is not None:
            # The weights are still those of that step; the statistics have gone further.
            statistics = self._guard.kept(running_statistics(self.model))
            self.average.update(self.parameters, statistics, step)
            # The number of batches seen is counted, not averaged.
            counts = [
                [b for b in m.buffers() if not b.is_floating_point()] for m in self._networks()
            ]
            copy_all(counts[1], self._guard.kept(counts[0]))

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.device, non_blocking=True)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = batch.targets.to(self.device, torch.int64, non_blocking=True)
        return self.mixing(images, targets) if self.mixing else (images, targets)

    def _backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Gradients of a batch, part by part; the metrics `[len(self.metrics)]`, float64."""
        count = self.config.grad_accum_steps
        parts = list(zip(images.chunk(count), targets.chunk(count), strict=True))
        values = torch.zeros_like(self.sums)
        for index, (part, part_targets) in enumerate(parts):
            share = len(part) / len(images)
            waits = index + 1 < len(parts) and self._parallel is not None
            context: AbstractContextManager[None] = nullcontext()
            if waits and self._parallel is not None:
                # The processes add their gradients up once, with the last part.
                context = self._parallel.no_sync()
            masking = masked_gradients(self.model, part_targets)
            with context:
                with (
                    masking if self.config.mask_gradients else nullcontext(),
                    torch.autocast(
                        self.device.type,
                        dtype=getattr(torch, self.config.amp_dtype),
                        enabled=self.config.amp,
                    ),
                ):
                    logits, energies = self._forward(part, return_energies=True)
                terms = self.loss(logits, energies, part_targets)
                self.scaler.scale(terms.total * share).backward()
            correct = self._correct(logits.detach(), energies, part_targets)
            losses = [term.detach() for term in terms.named().values()]
            values += share * torch.stack([*losses, *correct]).double()
        return values

    @torch.no_grad()
    def _correct(self, logits: Tensor, energies: list[Tensor], targets: Tensor) -> list[Tensor]:
        """Returns the shares of correct predictions; of a mixed image the larger part counts."""
        if targets.ndim == 2:
            targets = targets.argmax(1)
        # The loss has the codewords on the device already; a copy would make the host wait.
        codewords = self.loss.codewords()
        # A step that is not finite is the guard's to find.
        decoded = [
            decode(e.detach(), words, check_values=False)
            for e, words in zip(energies, codewords, strict=True)
        ]
        return [(said == targets).float().mean() for said in (logits.argmax(1), *decoded)]


def compiler_for(torchcompile: str, device: torch.device, backend: Backend) -> str:
    """Returns the backend of `torch.compile` that a setting means; empty for none.

    Args:
        torchcompile: the setting, where `auto` is what was measured to pay.
        device: of the network.
        backend: of its blocks; those that run layer by layer were measured.
    """
    if torchcompile != "auto":
        return torchcompile
    by_layers = named_backend(backend) in ("auto", "torch")
    pays = device.type == "cuda" and architecture(device.index or 0) in COMPILED_ON
    return "inductor" if by_layers and pays and HAS_TRITON else ""


def compiled(forward: Any, backend: str) -> Any:
    """Returns a function compiled by a backend of `torch.compile`, or as it is where there is none.

    Raises:
        ValueError: there is no such backend.
    """
    if not backend:
        return forward
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"torchcompile: expected one of {', '.join(known)}; got {backend!r}")
    return torch.compile(forward, backend=backend)


class WeightAverage:
    """A second network whose weights follow those of the first, (1 - decay) of the way each step.

    BatchNorm's running statistics are averaged like the weights.

    Args:
        model: the network to follow; the average begins at its weights.
        decay: of the average, `0 <= decay < 1`.
        warmup: at step t use `(1 + t) / (10 + t)` where that is less, so that a short run's
            average does not stay at the fresh weights.
    """

    def __init__(self, model: CodedResNeXt, decay: float, *, warmup: bool = False) -> None:
        self.model = copy_of(model).eval().requires_grad_(requires_grad=False)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], statistics: Sequence[Tensor], step: int) -> None:
        """Takes in the weights after a step.

        Args:
            parameters: of the network, in its order.
            statistics: floating-point buffers of the network, in its order.
            step: counted from 0 over the whole run.
        """
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.model.parameters()), list(parameters), step)
        own = running_statistics(self.model)
        if own:
            average(own, list(statistics), step)


def running_statistics(model: torch.nn.Module) -> list[Tensor]:
    """Returns the floating-point buffers of a network: BatchNorm's running means and variances."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def make_mixing(config: TrainingConfig, num_classes: int) -> Mixing | None:
    """Returns the mixing of a batch, or None where neither MixUp nor CutMix is on.

    The transforms are torchvision's: every image is mixed with its neighbour in the batch, by one
    share for all, drawn from PyTorch's default generator on the host. Images `[B, C, H, W]` and
    class indices `[B]` become images and class probabilities `[B, K]`; a batch that is left alone
    (`mixup_prob`) keeps its indices.

    Raises:
        ImportError: mixing is asked for and torchvision is not installed.
    """
    if not config.mixup and not config.cutmix:
        return None
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            "MixUp and CutMix need torchvision: pip install 'coded-resnext[train]'"
        ) from error
    transforms, weights = [], []
    if config.mixup:
        transforms.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
        weights.append(1 - config.mixup_switch_prob if config.cutmix else 1.0)
    if config.cutmix:
        transforms.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
        weights.append(config.mixup_switch_prob if config.mixup else 1.0)
    mixing: Mixing = v2.RandomApply([v2.RandomChoice(transforms, p=weights)], p=config.mixup_prob)
    return mixing
