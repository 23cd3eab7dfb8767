"""Ways out: `torch.export` programs, ONNX files, and compiled packages.

What leaves is made of PyTorch's own operations: exporting takes the plain-PyTorch form of the coded
operation whatever backend the network has. The batch is dynamic, the image size is fixed.

An ONNX file says in its metadata what it is, each value in JSON (`Signature.notes`), so that a
program with nothing but onnxruntime and NumPy can use it: see `examples/`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.export import Dim, ExportedProgram

from .data import Preprocessing
from .export_parts import Heads, Network, exit_parts, signature
from .models import CodedResNeXt
from .onnx_files import check_onnx, require_onnx

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

Exported = TypeVar("Exported", bound=Network)


def to_exported_program(
    network: Network,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> ExportedProgram:
    """A network as a `torch.export` program in evaluation mode, with weights of its own.

    Args:
        network: a whole network, one that was cut out, or `Heads(model)`, which also gives what the
            early decoders say.
        image_size: height and width; left out, that of the preprocessing, or 32 (224 with the stem
            for large images).
        preprocessing: how images become the input.

    Raises:
        ValueError: the image size is not positive.
    """
    network = _frozen(network)
    shapes = signature(network, image_size, preprocessing)
    with torch.no_grad():
        # Of two samples, since torch.export takes a size of one for a constant.
        program = torch.export.export(
            network,
            (shapes.example(2, next(network.parameters())),),
            dynamic_shapes=({0: Dim("batch", min=1)},),
        )
    foreign = {
        str(node.target)
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten"
    }
    assert not foreign, f"expected PyTorch's own operations alone, got {sorted(foreign)}"
    return program


def to_onnx(
    network: Network,
    path: str | Path,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    opset: int = OPSET,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write a network as an ONNX file that agrees with it at batches of 1, 2 and 7.

    Args:
        network, image_size, preprocessing: as for `to_exported_program`; the weights in float32.
        path: the file; an older one stays until this is complete and has been compared.
        opset: version of the ONNX operators.
        metadata: JSON-ready, kept with what the file says about itself.

    Raises:
        ValueError: the weights are not in float32, or onnxruntime's outputs differ from the
            network's by more than 1e-4.
        ImportError: onnx, onnxscript or onnxruntime is missing; the message names the extra.
    """
    require_onnx()
    dtype = next(network.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"network: expected float32 weights, got {dtype}; try network.float()")
    network = _frozen(network)
    network.cpu()
    shapes = signature(network, image_size, preprocessing)
    exported = torch.onnx.export(
        to_exported_program(network, image_size=image_size, preprocessing=preprocessing),
        dynamo=True,
        opset_version=opset,
        input_names=[shapes.input_name],
        output_names=list(shapes.output_names),
        verbose=False,
    )
    assert exported is not None
    for key, value in {**shapes.notes, **(metadata or {})}.items():
        exported.model.metadata_props[key] = json.dumps(value, allow_nan=False)
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.tmp")
    like = next(network.parameters())
    try:
        exported.save(unfinished, external_data=False)
        check_onnx(unfinished, network, [shapes.example(batch, like) for batch in CHECKED_BATCHES])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def export_early_exit(
    model: CodedResNeXt,
    folder: str | Path,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    opset: int = OPSET,
    metadata: dict[str, Any] | None = None,
) -> list[Path]:
    """Write a network as ONNX files that end behind its coded blocks: `part-0.onnx`, ..

    Each takes the map of the one before, the first the images, and gives its own map with the class
    that its energies show and the margin of that reading; the last gives the logits. A program
    that drops, between the parts, the samples whose margin suffices computes no more for them.

    Args:
        model: with at least one coded block.
        folder: made when it does not exist.
        image_size, preprocessing, opset, metadata: as for `to_onnx`.

    Returns:
        The files, first part first.

    Raises:
        ValueError, ImportError: as `to_onnx`; also a plain network.
    """
    require_onnx()
    whole = signature(model, image_size, preprocessing)
    parts = exit_parts(_frozen(model), whole.notes["image_size"])
    notes = {**whole.notes, **(metadata or {}), "kind": "part", "parts": len(parts)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        to_onnx(part, folder / f"part-{index}.onnx", opset=opset, metadata=notes)
        for index, part in enumerate(parts)
    ]


def to_aot_package(
    network: Network,
    path: str | Path,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Path:
    """Compile a network with AOTInductor for the device it is on.

    Args:
        network, image_size, preprocessing: as for `to_exported_program`.
        path: the file, whose name ends in `.pt2`; `torch._inductor.aoti_load_package` loads it.

    Raises:
        ValueError: the name does not end in `.pt2`.
        RuntimeError: compiling failed, usually for want of a C++ compiler.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path.name}")
    program = to_exported_program(network, image_size=image_size, preprocessing=preprocessing)
    try:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path.absolute()))
    except Exception as error:
        raise RuntimeError(
            f"{path}: AOTInductor could not compile the network (it needs a C++ compiler): {error}"
        ) from error
    return path


def _frozen(network: Exported) -> Exported:
    """A copy in evaluation mode that is made of PyTorch's own operations."""
    network = copy.deepcopy(network)
    network.eval().requires_grad_(False)
    for module in network.modules():
        # Whatever chooses among implementations has this attribute.
        if hasattr(module, "backend"):
            module.backend = "torch"  # type: ignore[assignment]
    return network
