"""The networks that bench_model.py times side by side: coded and plain, by whom they are run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from coded_resnext import CodedLoss, CodedResNeXt, create_model, use_grouped_kernels
from coded_resnext.kernels import ConvBackend
from coded_resnext.models.fused import block as fused

Layout = Literal["nchw", "nhwc"]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# What only timm's network of that size is compared with.
TIMM = "resnext50_32x4d"


@dataclass(frozen=True)
class Contender:
    """A network, how it is run, and what it is called in the table."""

    kind: Literal["coded", "plain", "timm"]
    backend: str = "torch"
    """Of the coded operations and blocks; `torch` runs layer by layer."""
    compile: str | None = None
    """Mode of `torch.compile`, or None for eager."""
    layout: Layout = "nhwc"
    written: bool = False
    """Whether the fused data flow writes the last convolution of every block, which it otherwise
    leaves out of plain blocks."""
    grouped: ConvBackend = "torch"
    """Who computes the grouped convolutions of blocks that run layer by layer."""

    @property
    def name(self) -> str:
        """Kind, backend, mode and layout."""
        mode = "eager" if self.compile is None else f"compiled {self.compile}"
        name = f"{self.kind}, {self.backend}, {mode}, {self.layout}" + ", written" * self.written
        return name if self.grouped == "torch" else f"{name}, groups {self.grouped}"

    def build(self, network: str, overrides: dict[str, Any]) -> nn.Module:
        """The network `coded_NAME`, its plain twin, or timm's."""
        torch.manual_seed(0)
        model: nn.Module
        if self.kind == "timm":
            import timm

            model = timm.create_model(TIMM, pretrained=False)
        else:
            prefix = "coded_" if self.kind == "coded" else ""
            model = create_model(prefix + network, backend=self.backend, **overrides)
        for module in model.modules():
            # At zero, where it begins, nothing would be left for the backward pass to do.
            if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
                nn.init.ones_(module.weight)
        if self.grouped != "torch":
            use_grouped_kernels(model, self.grouped)
        return model.to(memory_format=FORMATS[self.layout])


def contenders(network: str, *, kernels: bool, compiled: bool) -> Iterator[Contender]:
    """Who is timed for a network.

    Args:
        network: its name without `coded_`.
        kernels: whether the Triton kernels can run.
        compiled: whether there is a compiler.
    """
    modes = [None, *(("default", "max-autotune") if compiled else ())]
    backends = ["torch", "fused", *(["triton"] if kernels else [])]
    for mode in modes:
        for layout in ("nchw", "nhwc"):
            # The network as it is published runs layer by layer, in the layout that it finds.
            yield Contender("plain", "torch", mode, layout)  # type: ignore[arg-type]
    for kind in ("plain", "coded"):
        for backend in backends:
            for mode in modes[:2]:
                if (kind, backend) != ("plain", "torch"):
                    yield Contender(kind, backend, mode)  # type: ignore[arg-type]
    for mode in modes[:2]:
        yield Contender("coded", "reference", mode)
        if network.endswith(TIMM):
            yield Contender("timm", "torch", mode)
    for backend in backends[1:]:
        for mode in modes[:2]:
            yield Contender("coded", backend, mode, written=True)


class Runner:
    """A contender on fixed inputs: training steps and inference.

    Args:
        contender: which.
        network: its name without `coded_`.
        images, targets: a batch, on its device.
        dtype: of autocast; float32 for none.
        overrides: arguments of the network.
    """

    def __init__(
        self,
        contender: Contender,
        network: str,
        images: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        overrides: dict[str, Any],
    ) -> None:
        self.contender = contender
        self.model = contender.build(network, overrides).to(images.device)
        self.images = images.contiguous(memory_format=FORMATS[contender.layout])
        self.targets, self.dtype = targets, dtype
        self.loss = None
        if isinstance(self.model, CodedResNeXt):
            self.loss = CodedLoss(self.model.codebooks, check_values=False).to(images.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.call: Any = self.model
        if contender.compile is not None:
            torch.compiler.reset()
            mode = None if contender.compile == "default" else contender.compile
            self.call = torch.compile(self.model, mode=mode, dynamic=False)

    def train(self) -> Tensor:
        """One step; its loss."""
        self.model.train()
        limit = 0 if self.contender.written else fused.RECOMPUTED
        with self._autocast(), patch.object(fused, "RECOMPUTED", limit):
            if self.loss is None:
                total = nn.functional.cross_entropy(self.call(self.images), self.targets)
            else:
                logits, energies = self.call(self.images, return_energies=True)
                total = self.loss(logits, energies, self.targets).total
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.detach()

    @torch.no_grad()
    def infer(self) -> Tensor:
        """Logits in evaluation."""
        self.model.eval()
        with self._autocast():
            logits: Tensor = self.call(self.images)
        return logits

    def _autocast(self) -> torch.autocast:
        device = self.images.device.type
        half = self.dtype != torch.float32
        return torch.autocast(device, dtype=self.dtype if half else None, enabled=half)
