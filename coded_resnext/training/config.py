"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

AmpDtype = Literal["bfloat16", "float16"]
ClassWeight = Literal["none", "balanced"]
DistBn = Literal["reduce", "broadcast"]
Graph = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class TrainingConfig:
    """Optimizer, schedule, loss and how a step is computed.

    SGD with Nesterov momentum, a linear warm-up and one cosine. A field that means what a flag of
    timm's training script means has its name. One name is the same and its meaning is not: timm's
    `batch_size` counts one process's images.
    """

    epochs: Annotated[
        int, "Epochs of warm-up and cosine decay together; cooldown_epochs are added after them."
    ]
    batch_size: Annotated[
        int, "Images in an optimizer step, counted over all processes and accumulated parts."
    ]
    lr: Annotated[float, "Learning rate at the end of the warm-up."]
    min_lr: Annotated[
        float, "Learning rate at the last step of the cosine decay and during the cool-down."
    ] = 0.0
    warmup_epochs: Annotated[
        float, "Epochs during which the learning rate grows linearly from warmup_lr to lr."
    ] = 0.0
    warmup_lr: Annotated[float, "Learning rate at which the warm-up begins."] = 0.0
    warmup_prefix: Annotated[
        bool,
        "Begin the cosine decay after the warm-up. Without it, the decay counts from the first "
        "epoch, and the warm-up replaces its beginning, as published.",
    ] = True
    sched_on_updates: Annotated[
        bool,
        "Change the learning rate in every step. Without it, the rate changes once an epoch, as "
        "published.",
    ] = True
    cooldown_epochs: Annotated[int, "Epochs at min_lr that follow the cosine decay."] = 0
    momentum: Annotated[float, "Nesterov momentum of SGD."] = 0.9
    weight_decay: Annotated[float, "Weight decay of the parameters."] = 5e-4
    filter_bias_and_bn: Annotated[
        bool, "Leave biases and the parameters of BatchNorm without weight decay."
    ] = False
    clip_grad: Annotated[
        float | None,
        "Largest norm of the gradient of all parameters together; without it, gradients are not "
        "clipped.",
    ] = None
    coding_weight: Annotated[
        float, "Weight mu of the coding loss in the total loss, equation (8)."
    ] = 6.0
    exponent: Annotated[float, "Exponent q of the coding loss, equation (7)."] = 4.0
    threshold: Annotated[float, "Threshold t of the coding loss, equation (7)."] = 0.0
    smoothing: Annotated[
        float, "Label smoothing of the cross-entropy; the coding loss is not smoothed."
    ] = 0.0
    mask_gradients: Annotated[
        bool,
        "Let only the branches of an image's class learn from it: the paper's alternative to the "
        "coding loss, meant for coding_weight 0.",
    ] = False
    class_weight: Annotated[
        ClassWeight,
        "Weights of the classes in both terms of the loss: none, or balanced, which is in inverse "
        "proportion to their numbers of training images.",
    ] = "none"
    balanced_sampler: Annotated[
        bool,
        "Draw training images with replacement, each class as often as any other; an epoch has as "
        "many images as otherwise.",
    ] = False
    mixup: Annotated[float, "Parameter of the Beta distribution of MixUp; 0 turns MixUp off."] = 0.0
    cutmix: Annotated[
        float, "Parameter of the Beta distribution of CutMix; 0 turns CutMix off."
    ] = 0.0
    mixup_prob: Annotated[float, "Probability that a batch is mixed at all."] = 1.0
    mixup_switch_prob: Annotated[
        float, "Probability of CutMix rather than MixUp, where both are on."
    ] = 0.5
    grad_accum_steps: Annotated[
        int,
        "Number of parts in which a process computes its share of a batch; BatchNorm sees one "
        "part at a time.",
    ] = 1
    amp: Annotated[bool, "Use automatic mixed precision."] = False
    amp_dtype: Annotated[
        AmpDtype,
        "Dtype of automatic mixed precision; with float16 the loss is scaled against underflow.",
    ] = "bfloat16"
    channels_last: Annotated[
        bool, "Keep images and activations in channels-last memory format."
    ] = False
    torchcompile: Annotated[
        str,
        "Backend of torch.compile for the forward pass, such as inductor; without it, the network "
        "is not compiled. With auto, it is compiled on the GPUs where that was measured to pay.",
    ] = ""
    graph: Annotated[
        Graph,
        "Record the launches of a step as CUDA graphs and replay them for every batch, so that the "
        "GPU does not wait for Python. With auto, this is done on one GPU, and not with several "
        "processes.",
    ] = "auto"
    sync_bn: Annotated[
        bool, "Take BatchNorm statistics over all processes in every step; this needs GPUs."
    ] = False
    dist_bn: Annotated[
        DistBn,
        "What becomes of BatchNorm's running statistics at the end of an epoch: their mean over "
        "the processes (reduce), or those of the first process (broadcast).",
    ] = "reduce"
    model_ema: Annotated[
        bool,
        "Also keep an exponential moving average of the weights, which is evaluated and saved "
        "beside them.",
    ] = False
    model_ema_decay: Annotated[float, "Decay of the moving average in each step."] = 0.9998
    model_ema_warmup: Annotated[
        bool,
        "Let the moving average begin faster, with a decay of at most (1 + step) / (10 + step).",
    ] = False
    seed: Annotated[
        int,
        "Seed of the initial weights, the order of the images, their augmentation, mixing, and "
        "DropSubNNs.",
    ] = 0
    log_interval: Annotated[
        int, "Steps between two readings of the losses, for the progress bar and TensorBoard."
    ] = 50
    recovery_interval: Annotated[
        int, "Steps between checkpoints within an epoch; 0 saves at the end of each epoch only."
    ] = 0
    detect_dead_branches: Annotated[
        bool,
        "After every epoch, name the branches that have no energy for any test image of any class.",
    ] = False
    log_wandb: Annotated[bool, "Also log to Weights & Biases."] = False

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 1),
            ("min_lr", self.min_lr, 0),
            ("warmup_epochs", self.warmup_epochs, 0),
            ("warmup_lr", self.warmup_lr, 0),
            ("cooldown_epochs", self.cooldown_epochs, 0),
            ("weight_decay", self.weight_decay, 0),
            ("coding_weight", self.coding_weight, 0),
            ("exponent", self.exponent, 1),
            ("threshold", self.threshold, 0),
            ("mixup", self.mixup, 0),
            ("cutmix", self.cutmix, 0),
            ("grad_accum_steps", self.grad_accum_steps, 1),
            ("seed", self.seed, 0),
            ("log_interval", self.log_interval, 1),
            ("recovery_interval", self.recovery_interval, 0),
        ):
            if not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name}: expected a finite number of at least {low}, got {value}")
        for name, positive in (("lr", self.lr), ("clip_grad", self.clip_grad)):
            if positive is not None and not (math.isfinite(positive) and positive > 0):
                raise ValueError(f"{name}: expected a number above 0, got {positive}")
        for name, value in (
            ("momentum", self.momentum),
            ("smoothing", self.smoothing),
            ("model_ema_decay", self.model_ema_decay),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected 0 <= value < 1, got {value}")
        for name, value in (
            ("mixup_prob", self.mixup_prob),
            ("mixup_switch_prob", self.mixup_switch_prob),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a probability, got {value}")
        for name, choice, choices in (
            ("amp_dtype", self.amp_dtype, get_args(AmpDtype)),
            ("class_weight", self.class_weight, get_args(ClassWeight)),
            ("dist_bn", self.dist_bn, get_args(DistBn)),
            ("graph", self.graph, get_args(Graph)),
        ):
            if choice not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {choice!r}")
        for name, rate in (("min_lr", self.min_lr), ("warmup_lr", self.warmup_lr)):
            if rate > self.lr:
                raise ValueError(f"{name}: expected at most lr, {self.lr}, got {rate}")
        for name, count in (("epochs", self.epochs), ("cooldown_epochs", self.cooldown_epochs)):
            if not isinstance(count, int):
                raise ValueError(f"{name}: expected a whole number, got {count!r}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected fewer than {self.epochs} epochs, got {self.warmup_epochs}"
            )
        if self.warmup_epochs and not (self.sched_on_updates or self.warmup_lr):
            raise ValueError(
                "warmup_lr: expected a number above 0 without sched_on_updates, since the whole "
                "first epoch has this learning rate; got 0"
            )

        if self.mask_gradients and (self.mixup or self.cutmix or self.torchcompile):
            raise ValueError(
                "mask_gradients: expected neither mixup nor cutmix, whose images have no one "
                "class, nor torchcompile (--torchcompile '')"
            )

    @property
    def total_epochs(self) -> int:
        """Returns the number of epochs of the whole run, the cool-down included."""
        return self.epochs + self.cooldown_epochs

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Returns the learning rate of a step, counted from 0 over the whole run.

        Step by step, the first step of a warm-up has risen already, and the last step of the decay
        has `min_lr`. Epoch by epoch, the first epoch has `warmup_lr`, as in timm.
        """
        if self.sched_on_updates:
            now, risen, epoch = step, step + 1, steps_per_epoch
            end = self.epochs * steps_per_epoch - 1
        else:
            now = risen = step // steps_per_epoch
            epoch, end = 1, self.epochs
        warmup = self.warmup_epochs * epoch
        if now < warmup:
            return self.warmup_lr + (self.lr - self.warmup_lr) * min(risen / warmup, 1.0)
        begin = warmup if self.warmup_prefix else 0
        falling = end - begin
        # A warm-up up to the last step leaves nothing to fall in.
        passed = min((now - begin) / falling, 1.0) if falling > 0 else float(now > end)
        cosine = 0.5 * (1 + math.cos(math.pi * passed))
        return self.min_lr + (self.lr - self.min_lr) * cosine

    def local_batch_size(self, processes: int) -> int:
        """Returns the number of images of an optimizer step on each of so many processes.

        Raises:
            ValueError: the processes and the accumulated parts do not divide the batch; the
                message names the nearest batch sizes that they divide.
        """
        parts = processes * self.grad_accum_steps
        if self.batch_size % parts:
            below = self.batch_size // parts * parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            raise ValueError(
                f"batch_size: expected a multiple of {parts} ({processes} processes, "
                f"{self.grad_accum_steps} accumulated parts each), got {self.batch_size}; "
                f"choose {nearest}, or another number of processes"
            )
        return self.batch_size // processes

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        return asdict(self)
