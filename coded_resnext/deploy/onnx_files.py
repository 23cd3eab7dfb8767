"""ONNX files of `export.to_onnx`: comparing them with PyTorch, and int8 variants of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_resnext.files import write_atomically
from coded_resnext.kernels.checks import check_finite

TOLERANCE = 1e-4
"""Largest difference between PyTorch and onnxruntime, in units of the largest output above 1."""


def require_onnx() -> None:
    """Say which extra has the libraries, when one is missing.

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
    """Compare an ONNX file with the network that it was made of.

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
    """Write an int8 variant of an ONNX file: convolutions and head, by static calibration.

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
