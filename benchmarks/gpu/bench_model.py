"""Training steps and inference of whole networks: this project, PyTorch's compiler, timm.

    python benchmarks/gpu/bench_model.py --out benchmarks/results/gpu_model.json --plot model.png

One run, the same images for all. Coded and plain networks by each backend; the plain one eager and
by `torch.compile`, in both layouts; timm's; and the published form of the coded one, which forms
the branch tensor. Logits are compared before anything is timed. A row has images a second, peak
memory, the kernels of a step, and what share of the time the least traffic of the blocks would
take, where a GPU's bandwidth is known.

That traffic is what the kernels of the fused data flow move (`BlockMaps`). Every tensor of the size
of a map is counted once for each kernel that reads or writes it; vectors, weights, partial sums and
the bits of signs are not. The table is that of docs/fused_block.md.

`--tiny` takes every path at sizes that a CPU bears; its times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from timing import find_gpu
from torch import Tensor, nn

from coded_resnext import (
    CodedBottleneck,
    CodedLoss,
    CodedResNeXt,
    Stage,
    create_model,
    use_grouped_kernels,
)
from coded_resnext.kernels import ConvBackend, backends
from coded_resnext.models.fused import block as fused
from coded_resnext.training.run_folder import describe_machine

Layout = Literal["nchw", "nhwc"]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# What only timm's network of that size is compared with.
TIMM = "resnext50_32x4d"
# Image size and batch of each network.
SETTINGS = {
    "resnext50_32x4d": (160, 256),
    "resnext29_20x6d": (32, 128),
    "resnext29_10x11d": (32, 128),
}
STEPS = 20
# How far logits of two ways to compute a network may be apart, relative to the largest: bfloat16
# rounds every map, some fifty times in a row.
AGREEMENT = {torch.bfloat16: 0.1, torch.float32: 1e-3}
# Stages, image size and batch of a dry run: a plain one, coded ones, a projection, a stride.
TINY_STAGES = (Stage(1, 16, 2, 8, 8), Stage(2, 16, 2, 10, 5, stride=2))
TINY = (8, 2)
TINY_CLASSES = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="write the rows to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw images a second to this file")
    parser.add_argument("--network", action="append", choices=SETTINGS, help="(default: all)")
    parser.add_argument("--batch", type=int, help="images of a step (default: the network's)")
    parser.add_argument("--size", type=int, help="pixels of an edge (default: the network's)")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of each contender")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for a CPU")
    arguments = parser.parse_args()
    for name in ("batch", "size", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    for path in filter(None, (arguments.out, arguments.plot)):
        if not path.parent.is_dir():
            parser.error(f"{path}: expected a folder that exists")
    if not torch.cuda.is_available() and not arguments.tiny:
        print("bench_model: no GPU was available: nothing was timed; see --tiny", file=sys.stderr)
        return 2
    content = bench_models(
        arguments.network or list(SETTINGS),
        batch=arguments.batch,
        size=arguments.size,
        steps=arguments.steps,
        compiled=not arguments.no_compile,
        tiny=arguments.tiny,
    )
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(content["rows"]))
    if arguments.plot is not None:
        plot(content["rows"], arguments.plot)
    return int(any(row["wrong"] for row in content["rows"]))


def bench_models(
    networks: list[str],
    *,
    batch: int | None = None,
    size: int | None = None,
    steps: int = STEPS,
    compiled: bool = True,
    tiny: bool = False,
) -> dict[str, Any]:
    """Returns the rows of every network, JSON-ready."""
    rows = []
    for network in networks:
        for row in bench_network(network, batch, size, steps, compiled=compiled, tiny=tiny):
            print(json.dumps(row))
            rows.append(row)
    return {"machine": describe_machine(), "tiny": tiny, "rows": rows}


def bench_network(
    network: str, batch: int | None, size: int | None, steps: int, *, compiled: bool, tiny: bool
) -> Iterator[dict[str, Any]]:
    """Yields a row for every contender; one that fails is named with its error."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_size, default_batch = TINY if tiny else SETTINGS[network]
    batch, size = batch or default_batch, size or default_size
    overrides: dict[str, Any] = {}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    classes = TINY_CLASSES if tiny else create_model(network).num_classes
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    targets = torch.randint(classes, (batch,), generator=generator).to(device)
    expected: dict[str, Tensor] = {}
    kernels = backends()["triton"] is None and device.type == "cuda"
    for contender in contenders(network, kernels=kernels, compiled=compiled):
        if tiny:
            overrides = tiny_overrides(contender)
        row: dict[str, Any] = {
            "network": network,
            "contender": contender.name,
            "batch": batch,
            "size": size,
            "dtype": str(dtype).removeprefix("torch."),
            "wrong": None,
        }
        try:
            runner = Runner(contender, network, images, targets, dtype, overrides)
            logits = runner.infer().float()
            first = expected.setdefault(contender.kind, logits)
            apart = float((logits - first).abs().max() / first.abs().max())
            row["apart"] = apart
            if not apart <= AGREEMENT[dtype]:
                row["wrong"] = (
                    f"logits are {apart:.1e} apart from those of the first {contender.kind}"
                )
            else:
                row |= measure(runner, contender, batch, size, steps, dtype.itemsize)
        except (RuntimeError, ValueError) as error:
            row["wrong"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def tiny_overrides(contender: Contender) -> dict[str, Any]:
    """Returns the arguments that make a network of a few channels of a named one, with its
    classes."""
    if contender.kind == "timm":
        return {}
    coded = contender.kind == "coded"
    stages = [
        stage
        if coded
        else Stage(
            stage.depth,
            stage.channels,
            stage.width,
            stage.branches,
            stage.branches,
            stride=stage.stride,
        )
        for stage in TINY_STAGES
    ]
    return {
        "stages": stages,
        "num_classes": TINY_CLASSES,
        "stem": "conv3x3",
        "stem_channels": 8,
        "codebooks": None,
    }


def measure(
    runner: Runner, contender: Contender, batch: int, size: int, steps: int, item: int
) -> dict[str, Any]:
    """Returns the times, memory and kernels of a contender whose logits are right."""
    row: dict[str, Any] = {}
    device = runner.images.device
    gpu = find_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    for name, run in (("train", runner.train), ("infer", runner.infer)):
        for _ in range(3):
            run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(run, device, steps)
        row[f"{name}_ms"] = 1000 * seconds
        row[f"{name}_images_per_second"] = batch / seconds
        if device.type == "cuda":
            row[f"{name}_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            row[f"{name}_kernels"] = kernels_of(run)
        if isinstance(runner.model, CodedResNeXt):
            moved = least_bytes(runner.model, batch, size, item, training=name == "train")
            row[f"{name}_least_bytes"] = moved
            if gpu is not None:
                row[f"{name}_floor_share"] = gpu.floor(moved) / seconds
    return row


def median_seconds(run: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Returns the median time of a call, the device's work included."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def kernels_of(run: Callable[[], Any]) -> int:
    """Returns the kernels, copies and fills that a call launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as text, with what each is to the best compiled plain network."""
    lines = [f"{'network, contender':<62} {'train/s':>9} {'ratio':>6} {'infer/s':>9} {'MiB':>7}"]
    for row in rows:
        label = f"{row['network']}: {row['contender']}"
        if row["wrong"]:
            lines.append(f"{label:<62} {row['wrong']}")
            continue
        rate = row["train_images_per_second"]
        best = best_plain(rows, row["network"])
        ratio = "" if best is None else f"{rate / best:.2f}"
        memory = row.get("train_peak_mib")
        memory_text = "" if memory is None else f"{memory:.0f}"
        infer = row["infer_images_per_second"]
        lines.append(f"{label:<62} {rate:>9.0f} {ratio:>6} {infer:>9.0f} {memory_text:>7}")
    return "\n".join(lines)


def best_plain(rows: list[dict[str, Any]], network: str) -> float | None:
    """Returns the images a second that the best plain network layer by layer trains."""
    rates = [
        row["train_images_per_second"]
        for row in rows
        if row["network"] == network
        and not row["wrong"]
        and row["contender"].startswith("plain, torch,")
    ]
    return max(rates, default=None)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the images a second that each contender trains, a panel for each network."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(8, 1 + 3.2 * len(networks)), layout="constrained")
    for axes, network in zip(
        figure.subplots(len(networks), squeeze=False)[:, 0], networks, strict=True
    ):
        shown = [row for row in rows if row["network"] == network and not row["wrong"]]
        names = [row["contender"] for row in shown]
        axes.barh(names, [row["train_images_per_second"] for row in shown], color="tab:blue")
        axes.invert_yaxis()
        axes.set_title(network)
        axes.set_xlabel("images a second, training")
    figure.savefig(path, dpi=150)


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
        """Returns kind, backend, mode and layout."""
        mode = "eager" if self.compile is None else f"compiled {self.compile}"
        name = f"{self.kind}, {self.backend}, {mode}, {self.layout}" + ", written" * self.written
        return name if self.grouped == "torch" else f"{name}, groups {self.grouped}"

    def build(self, network: str, overrides: dict[str, Any]) -> nn.Module:
        """Returns the network `coded_NAME`, its plain twin, or timm's."""
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
    """Yields the contenders of a network.

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
        """Takes one step; returns its loss."""
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
        """Returns the logits in evaluation."""
        self.model.eval()
        with self._autocast():
            logits: Tensor = self.call(self.images)
        return logits

    def _autocast(self) -> torch.autocast:
        device = self.images.device.type
        half = self.dtype != torch.float32
        return torch.autocast(device, dtype=self.dtype if half else None, enabled=half)


@dataclass(frozen=True)
class BlockMaps:
    """Elements of the tensors of one block."""

    x: int
    """`[B, C_in, H, W]`, its input."""
    y1: int
    """`[B, N*D, H, W]`."""
    y2: int
    """`[B, N*D, OH, OW]`, and so is `h'` of a coded block."""
    y3: int
    """`[B, C, OH, OW]`, its output."""
    stride: int
    coded: bool
    projection: bool
    before: BlockMaps | None
    """The block whose output is still to be computed; None for a first block."""
    recomputed: bool
    """Whether its last convolution is computed where it is read."""
    skip_recomputed: bool
    """Whether that of its skip connection is, by PyTorch."""

    def evaluation(self) -> dict[str, int]:
        """Returns the elements that each operator moves where no gradients are wanted."""
        elements = {
            "folded_conv1x1": self.x + self.y1,
            "folded_grouped_conv3x3": self.y1 + self.y2,
            "expand folded_conv1x1": self.y2 + 2 * self.y3,
        }
        if self.projection:
            both = self.y2 + self.x // self.stride**2
            elements |= {"side_by_side": 2 * both, "expand folded_conv1x1": both + self.y3}
        return elements

    def forward(self) -> dict[str, int]:
        """Returns the elements that each operator's kernels move on the way to a backward pass."""
        elements = {"reduce": self.x + self.y1, "grouped": self.y1 + self.y2}
        if self.before is not None:
            elements |= {"join": self.before.joining()}
            # Where the sum is not a kernel of its own, it is the prologue of the convolution.
            elements["reduce"] -= 0 if self.before.recomputed else self.x
        if self.coded:
            elements["normalize"] = 2 * self.y2
        elements["expand"] = self.y2 if self.recomputed else self.y2 + self.y3
        if self.projection:
            elements["skip"] = self._picked if self.skip_recomputed else self._picked + self.y3
        return elements

    @property
    def _picked(self) -> int:
        """Returns the elements of the pixels that the skip connection's convolution takes."""
        return self.x // self.stride**2

    def joining(self) -> int:
        """Returns the elements that the sum at the block's end takes and gives."""
        own = (self.y2 if self.recomputed else self.y3) + 2 * self.y3
        return own + (self._picked + self.y3 if self.skip_recomputed else 0)

    def backward(self) -> dict[str, int]:
        """Returns the elements that each operator's kernels move.

        The gradient of a convolution's output is written once as BatchNorm behind it makes it, for
        the gradient of the weight.
        """
        of_input = self.y2 if self.coded else 2 * self.y2
        elements = {
            "expand input": 3 * self.y3 + of_input,
            "expand weight": self.y3 + self.y2,
            "grouped": 4 * self.y2 + 3 * self.y1,
            "reduce input": 3 * self.y1 + self.x,
            "reduce weight": self.y1 + self.x,
        }
        if self.recomputed:
            elements["expand input"] = self.y3 + 2 * self.y2
        if self.before is not None:
            elements["reduce input"] += self.before.parting() - self.x
        if self.coded:
            elements["normalize"] = 4 * self.y2
        if self.projection:
            of_skip = 2 * self._picked if self.skip_recomputed else 2 * self.y3 + self._picked
            elements |= {"skip input": of_skip + self.y3, "skip weight": self.y3 + self._picked}
        return elements

    def parting(self) -> int:
        """Returns the elements at the sum's gradient, which the next block's first convolution adds
        to another one: that one, the result, and what the sums for the BatchNorms before it
        need."""
        mapped = self.projection and not self.skip_recomputed
        return (2 + (not self.recomputed) + mapped) * self.y3


def maps_of(model: CodedResNeXt, batch: int, size: int) -> list[BlockMaps]:
    """Returns the blocks of a network for a batch of square images."""
    if model.config["stem"] != "conv3x3":
        size = (size + 3) // 4
    blocks: list[BlockMaps] = []
    for block in model.blocks:
        out = -(-size // block.stride)
        wide = block.reduce.out_channels
        recomputed = not block.is_coded and wide <= fused.RECOMPUTED
        blocks.append(
            BlockMaps(
                batch * block.in_channels * size**2,
                batch * wide * size**2,
                batch * wide * out**2,
                batch * block.expand.out_channels * out**2,
                block.stride,
                block.is_coded,
                _projects(block),
                blocks[-1] if blocks else None,
                recomputed,
                recomputed and _projects(block) and block.in_channels <= fused.RECOMPUTED,
            )
        )
        size = out
    return blocks


def _projects(block: CodedBottleneck) -> bool:
    return len(list(block.skip.parameters())) > 0


def least_bytes(model: CodedResNeXt, batch: int, size: int, item: int, *, training: bool) -> int:
    """Returns the bytes that evaluation, or a training step, moves through the blocks, not stem and
    head.

    Args:
        model: the network.
        batch, size: of the images.
        item: bytes of an element.
        training: whether it is a training step; evaluation without gradients otherwise.
    """
    blocks = maps_of(model, batch, size)
    if not training:
        return item * sum(sum(maps.evaluation().values()) for maps in blocks)
    elements = sum(
        sum(each.values()) for maps in blocks for each in (maps.forward(), maps.backward())
    )
    # The map behind the last block is written by itself; its gradient's ReLU reads it.
    last = blocks[-1]
    return item * (elements + last.joining() + last.parting() + last.y3)


if __name__ == "__main__":
    sys.exit(main())
