"""Exports: `torch.export` programs, ONNX files with int8 variants of them, and compiled packages.

What leaves is made of PyTorch's own operations: exporting takes the plain-PyTorch form of the coded
operation whatever backend the network has. The batch is dynamic, the image size is fixed.

An ONNX file is compared with PyTorch when it is written. It says in its metadata what it is, each
value in JSON (`Signature.notes`), so that a program with nothing but onnxruntime and NumPy can use
it: see `examples/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import write_atomically
from coded_resnext.kernels.checks import check_finite, check_integers, typed
from coded_resnext.models.block import CodedBottleneck, classify, features
from coded_resnext.models.layers import copy_of
from coded_resnext.models.loss import read_class
from coded_resnext.models.resnext import CodedResNeXt, own_network, usual_image_size

from .early_exit import check_early_exit
from .extract import ExtractedClassifier, ExtractedNetwork

FORMAT_VERSION = 1
OPSET = 18
"""Version of the ONNX operators that files are written in."""
CHECKED_BATCHES = (1, 2, 7)
__all__ = [
    "OPSET",
    "Heads",
    "export_early_exit",
    "to_aot_package",
    "to_exported_program",
    "to_onnx",
]
TOLERANCE = 1e-4
"""Largest difference between PyTorch and onnxruntime, in units of the largest output above 1."""


class Heads(nn.Module):
    """A network that also returns what each of its early decoders says, (9).

    Args:
        model: with at least one coded block; or a wrapper around it.

    Raises:
        ValueError: a plain network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = own_network(model).eval()
        check_early_exit(self.model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps images to logits `[B, K]`, decoded classes `[B, L]` and their margins `[B, L]`."""
        logits, energies = self.model(images, return_energies=True)
        read = [
            read_class(value, block.codewords)
            for value, block in zip(energies, self.model.coded_blocks, strict=True)
        ]
        classes, margins = zip(*read, strict=True)
        return logits, torch.stack(classes, 1), torch.stack(margins, 1)


class ExitPart(nn.Module):
    """The layers from behind one coded block to the next, or to the logits.

    Args:
        stem: the stem, of the first part.
        blocks: the blocks, the coded one last; or those behind the last coded one.
        head: the classifier, of the last part.
        input_shape: the shape of the map that comes in, without the batch.
    """

    def __init__(
        self,
        stem: nn.Module | None,
        blocks: Sequence[CodedBottleneck],
        head: nn.Module | None,
        input_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.input_shape = input_shape

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Maps `x` to the logits `[B, K]`; or to the next map, a class `[B]` and a margin `[B]`."""
        if self.stem is not None:
            x = self.stem(x)
        blocks: Any = list(self.blocks)
        x, energies = features(blocks, x)
        if self.head is not None:
            return classify(self.head, x)
        return x, *read_class(energies[-1], blocks[-1].codewords)


@torch.no_grad()
def exit_parts(model: CodedResNeXt, image_size: int) -> list[ExitPart]:
    """Cuts a network behind each coded block: L parts may decide, and one has the classifier.

    Args:
        model: with at least one coded block, in evaluation mode; the parts share its weights.
        image_size: height and width of the images.

    Raises:
        ValueError: a plain network, or one in training mode.
    """
    check_early_exit(model)
    groups: list[list[CodedBottleneck]] = [[]]
    for block in model.blocks:
        groups[-1].append(block)
        if block.is_coded:
            groups.append([])
    x = torch.zeros(1, model.in_channels, image_size, image_size).to(model.head.weight)
    parts: list[ExitPart] = []
    for blocks in groups[:-1]:
        stem = None if parts else model.stem
        parts.append(ExitPart(stem, blocks, None, tuple(x.shape[1:])).eval())
        x = parts[-1](x)[0]
    return [*parts, ExitPart(None, groups[-1], model.head, tuple(x.shape[1:])).eval()]


Exportable = CodedResNeXt | ExtractedNetwork | Heads | ExitPart


@dataclass(frozen=True)
class Signature:
    """What goes into an exported network, what comes out, and what its file says about it."""

    input_name: str
    input_shape: tuple[int, ...]
    """The shape of the input, without the batch."""
    output_names: tuple[str, ...]
    notes: dict[str, Any]
    """Kind, classes, threshold, image size and preprocessing, JSON-ready."""

    def example(self, batch: int, like: Tensor) -> Tensor:
        """Draws noise for so many samples, in the dtype of a tensor and on its device."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, *self.input_shape, generator=generator).to(like)


def signature(
    network: Exportable, image_size: int | None, preprocessing: Preprocessing | None
) -> Signature:
    """Returns the signature of a network under the rules of `to_exported_program`.

    Raises:
        ValueError: the image size is not positive.
    """
    if isinstance(network, ExitPart):
        outputs = ("map", "class", "margin") if network.head is None else ("logits",)
        return Signature("x", network.input_shape, outputs, {"format_version": FORMAT_VERSION})
    inner = network.model if isinstance(network, Heads) else network
    if isinstance(inner, ExtractedNetwork):
        channels = inner.config.in_channels
        own_size = inner.config.image_size or usual_image_size(inner.config.stem)
    else:
        channels, own_size = inner.in_channels, inner.image_size
    if image_size is None:
        image_size = own_size if preprocessing is None else preprocessing.size
    check_integers(image_size=image_size)
    single = isinstance(inner, ExtractedClassifier)
    has_heads = isinstance(network, Heads)
    notes = {
        "format_version": FORMAT_VERSION,
        "kind": "classifier" if single else "heads" if has_heads else "network",
        "class_names": list(inner.class_names),
        "threshold": inner.threshold if isinstance(inner, ExtractedClassifier) else None,
        "image_size": image_size,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
    }
    outputs = ("logits", "classes", "margins") if has_heads else ("logits",)
    return Signature("images", (channels, image_size, image_size), outputs, notes)


@typed
def to_exported_program(
    network: nn.Module,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> ExportedProgram:
    """Returns a network as a `torch.export` program in evaluation mode, with its own weights.

    Args:
        network: a whole network or a wrapper around it, one that was cut out, or `Heads(model)`,
            which also gives what the early decoders say.
        image_size: height and width; left out, that of the preprocessing or, without one, of the
            images that the network is made for.
        preprocessing: how images become the input.

    Raises:
        ValueError: the image size is not positive.
    """
    frozen = _frozen(network)
    shapes = signature(frozen, image_size, preprocessing)
    with torch.no_grad():
        # Of two samples, since torch.export takes a size of one for a constant.
        program = torch.export.export(
            frozen,
            (shapes.example(2, next(frozen.parameters())),),
            dynamic_shapes=({0: Dim("batch", min=1)},),
        )
    foreign = {
        str(node.target)
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten"
    }
    assert not foreign, f"expected PyTorch's own operations alone, got {sorted(foreign)}"
    return program


@typed
def to_onnx(
    network: nn.Module,
    path: str | Path,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    opset: int = OPSET,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes a network as an ONNX file that agrees with it at batches of 1, 2 and 7.

    Args:
        network: as for `to_exported_program`; the weights in float32.
        path: the file; an older one stays until this is complete and has been compared.
        image_size: as for `to_exported_program`.
        preprocessing: as for `to_exported_program`.
        opset: version of the ONNX operators, at least 18.
        metadata: JSON-ready, kept with what the file says about itself.

    Raises:
        ValueError: the weights are not in float32, the opset cannot be written, or
            onnxruntime's outputs differ from the network's by more than 1e-4.
        ImportError: onnx, onnxscript or onnxruntime is missing; the message names the extra.
    """
    require_onnx()
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < OPSET:
        raise ValueError(f"opset: expected an integer of at least {OPSET}, got {opset!r}")
    dtype = next(network.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"network: expected float32 weights, got {dtype}; try network.float()")
    frozen = _frozen(network).cpu()
    shapes = signature(frozen, image_size, preprocessing)
    exported = torch.onnx.export(
        to_exported_program(frozen, image_size=image_size, preprocessing=preprocessing),
        dynamo=True,
        opset_version=opset,
        input_names=[shapes.input_name],
        output_names=list(shapes.output_names),
        verbose=False,
    )
    assert exported is not None
    # A conversion that fails is logged and no error.
    written = exported.model.opset_imports.get("")
    if written != opset:
        raise ValueError(f"opset: expected one that can be written, got {opset}, not {written}")
    for key, value in {**shapes.notes, **(metadata or {})}.items():
        exported.model.metadata_props[key] = json.dumps(value, allow_nan=False)
    path = Path(path)
    like = next(frozen.parameters())
    with TemporaryDirectory() as folder:
        unfinished = Path(folder) / path.name
        exported.save(unfinished, external_data=False)
        check_onnx(unfinished, frozen, [shapes.example(batch, like) for batch in CHECKED_BATCHES])
        write_atomically(path, unfinished.read_bytes())
    return path


@typed
def export_early_exit(
    model: nn.Module,
    folder: str | Path,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    opset: int = OPSET,
    metadata: dict[str, Any] | None = None,
) -> list[Path]:
    """Writes a network as ONNX files that end behind its coded blocks: `part-0.onnx`, ..

    Each takes the map of the one before, the first the images, and gives its own map with the class
    that its energies show and the margin of that reading; the last gives the logits. A program
    that drops, between the parts, the samples whose margin suffices computes no more for them.

    Args:
        model: with at least one coded block.
        folder: made when it does not exist.
        image_size: as for `to_onnx`.
        preprocessing: as for `to_onnx`.
        opset: as for `to_onnx`.
        metadata: as for `to_onnx`.

    Returns:
        The files, first part first.

    Raises:
        ValueError, ImportError: as `to_onnx`; also a plain network.
    """
    require_onnx()
    frozen = _frozen(model)
    whole = signature(frozen, image_size, preprocessing)
    parts = exit_parts(frozen, whole.notes["image_size"])
    notes = {**whole.notes, **(metadata or {}), "kind": "part", "parts": len(parts)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        to_onnx(part, folder / f"part-{index}.onnx", opset=opset, metadata=notes)
        for index, part in enumerate(parts)
    ]


@typed
def to_aot_package(
    network: nn.Module,
    path: str | Path,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Path:
    """Compiles a network with AOTInductor for the device it is on.

    Args:
        network: as for `to_exported_program`.
        path: the file, whose name ends in `.pt2`; `torch._inductor.aoti_load_package` loads it.
        image_size: as for `to_exported_program`.
        preprocessing: as for `to_exported_program`.

    Raises:
        ValueError: the name does not end in `.pt2`.
        RuntimeError: compiling failed, usually for want of a C++ compiler.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path.name}")
    program = to_exported_program(network, image_size=image_size, preprocessing=preprocessing)
    with TemporaryDirectory() as folder:
        unfinished = Path(folder) / path.name
        try:
            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
        except Exception as error:
            raise RuntimeError(
                f"{path}: AOTInductor could not compile the network (it needs a C++ compiler): "
                f"{error}"
            ) from error
        write_atomically(path, unfinished.read_bytes())
    return path


def _frozen(network: nn.Module) -> Any:
    """Returns a copy in evaluation mode, out of its wrapper, of PyTorch's own operations."""
    if not isinstance(network, Exportable):
        network = own_network(network)
    network = copy_of(network)
    network.eval().requires_grad_(False)
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        # That of a quantised layer is a method, that of a parametrisation a module.
        if callable(weight) and not isinstance(weight, nn.Module):
            kind = type(module)
            raise ValueError(
                f"{name}: expected a layer of floating-point weights, got {kind.__module__}."
                f"{kind.__name__}; export the network and quantise the file"
            )
        # Whatever chooses among implementations has this attribute.
        if hasattr(module, "backend"):
            module.backend = "torch"
    return network


def require_onnx() -> None:
    """Says which extra has the libraries, when one is missing.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime cannot be imported.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ONNX files need onnx, onnxscript and onnxruntime: "
            f"pip install 'coded-resnext[export]' ({error})"
        ) from error


def check_onnx(path: str | Path, network: nn.Module, inputs: Iterable[Tensor]) -> float:
    """Compares an ONNX file with the network that it was made of.

    Returns:
        The largest difference of the floating-point outputs, in units of the largest above 1.

    Raises:
        ValueError: it is larger than 1e-4, or no number.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    worst = 0.0
    for x in inputs:
        with torch.inference_mode():
            outputs = network(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for theirs, ours in zip(session.run(None, {name: x.numpy()}), outputs, strict=True):
            # Decoded classes follow from the numbers, and may differ where those tie.
            if ours.is_floating_point():
                difference = np.abs(theirs - ours.numpy()).max() / max(1.0, ours.abs().max().item())
                # Unlike max(), this keeps NaN.
                worst = float(np.maximum(worst, difference))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{path}: expected the outputs of PyTorch to {TOLERANCE}, got ones that differ by "
            f"{worst:.2g}"
        )
    return worst


def quantize_onnx(source: str | Path, path: str | Path, images: Iterable[Tensor]) -> Path:
    """Writes an int8 variant of an ONNX file: convolutions and head, by static calibration.

    Weights become int8 with a scale for each output channel, activations uint8 with ranges measured
    on the images. Energies and normalisation stay in float32. Of the 8 bits of a weight 7 are used:
    processors without VNNI add two products in 16 bits, which overflow with 8.

    Args:
        source: a file that `to_onnx` wrote.
        path: the file to write.
        images: batches of preprocessed training images `[B, C, H, W]`; a few hundred images do. Of
            a part behind the first, the maps that come in.

    Raises:
        ValueError: no images, none of the shape that the file takes, or numbers that are not
            finite.
        ImportError: as `require_onnx`.
    """
    require_onnx()
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter(images)
    first = next(batches, None)
    if first is None:
        raise ValueError("images: expected at least one batch, got none")

    takes = onnxruntime.InferenceSession(str(source)).get_inputs()[0]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, tensors: Iterator[Tensor]) -> None:
            self._tensors = tensors

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._tensors, None)
            if batch is None:
                return None
            if list(batch.shape[1:]) != takes.shape[1:]:
                expected = ", ".join(map(str, takes.shape[1:]))
                raise ValueError(f"images: expected [B, {expected}], got {list(batch.shape)}")
            check_finite("images", batch.cpu())
            return {takes.name: batch.float().cpu().numpy()}

    path = Path(path)
    with TemporaryDirectory() as folder:
        prepared, unfinished = (Path(folder) / name for name in ("prepared", path.name))
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(unfinished),
            Reader(chain([first], batches)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        write_atomically(path, unfinished.read_bytes())
    return path
