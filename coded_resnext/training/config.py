"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

AmpDtype = Literal["bfloat16", "float16"]
DistBn = Literal["reduce", "broadcast"]


@dataclass(frozen=True)
class TrainingConfig:
    """Optimizer, schedule, loss and how a step is computed.

    SGD with Nesterov momentum, a linear warm-up and one cosine, both step by step. A field that
    means what a flag of timm's training script means has its name. One name is the same and its
    meaning is not: timm's `batch_size` counts one process's images.
    """

    epochs: int
    """Of warm-up and cosine; `cooldown_epochs` come after them."""
    batch_size: int
    """Images of an optimizer step, over all processes and accumulated parts."""
    lr: float
    """Learning rate at the end of the warm-up."""
    min_lr: float = 0.0
    """At the last step of the cosine and through the cool-down."""
    warmup_epochs: float = 0.0
    """Over these the learning rate grows linearly from zero; the cosine begins after them."""
    cooldown_epochs: int = 0
    """Epochs at `min_lr` after `epochs`."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On all parameters, BatchNorm's too, as published."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters together; None does not clip."""
    coding_weight: float = 6.0
    """`mu` of the total loss (8)."""
    exponent: float = 4.0
    """`q` of the coding loss (7)."""
    threshold: float = 0.0
    """`t` of the coding loss (7)."""
    smoothing: float = 0.0
    """Label smoothing, of the cross-entropy only."""
    mixup: float = 0.0
    """Parameter of MixUp's Beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Parameter of CutMix's Beta distribution; 0 is off."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix, where both are on."""
    grad_accum_steps: int = 1
    """Parts in which a process computes its share of a batch; BatchNorm sees a part at a time."""
    amp: bool = False
    """Automatic mixed precision."""
    amp_dtype: AmpDtype = "bfloat16"
    """`float16` scales the loss against underflow."""
    channels_last: bool = False
    torchcompile: str = ""
    """Backend of `torch.compile` for the forward pass, such as `inductor`; empty is off."""
    sync_bn: bool = False
    """BatchNorm statistics over all processes in every step; on GPUs only."""
    dist_bn: DistBn = "reduce"
    """Running statistics of BatchNorm at an epoch's end: mean over the processes, or the first's.
    """
    model_ema: bool = False
    """Also keep an exponential moving average of the weights, evaluated and saved beside them."""
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    """Average over fewer steps at first: a decay of at most `(1 + step) / (10 + step)`."""
    seed: int = 0
    """Of the weights, the order of the images, their augmentation, mixing, and DropSubNNs."""
    log_interval: int = 50
    """Steps between two readings of the losses: the progress bar and TensorBoard."""
    recovery_interval: int = 0
    """Steps between checkpoints within an epoch; 0 saves at the ends of epochs only."""
    detect_dead_branches: bool = False
    """After every epoch, name the branches that have no energy for any test image of any class."""
    log_wandb: bool = False
    """Log to Weights & Biases too."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 1),
            ("min_lr", self.min_lr, 0),
            ("warmup_epochs", self.warmup_epochs, 0),
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
            ("dist_bn", self.dist_bn, get_args(DistBn)),
        ):
            if choice not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {choice!r}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected fewer than {self.epochs} epochs, got {self.warmup_epochs}"
            )

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, the cool-down included."""
        return self.epochs + self.cooldown_epochs

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / warmup
        last = max(self.epochs * steps_per_epoch - 1 - warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min((step - warmup) / last, 1.0)))
        return self.min_lr + (self.lr - self.min_lr) * cosine

    def local_batch_size(self, processes: int) -> int:
        """Images of an optimizer step on each of so many processes.

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
        """JSON-ready."""
        return asdict(self)
