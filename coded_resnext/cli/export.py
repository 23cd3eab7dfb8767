"""`coded-resnext export`: a trained network as ONNX, a program, a package, or a shared folder."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

from coded_resnext.data.labelled import images_of_no_class
from coded_resnext.data.loaders import EvalImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.deploy.early_exit import EXIT_FILE
from coded_resnext.deploy.export import (
    Exportable,
    Heads,
    export_early_exit,
    quantize_onnx,
    to_aot_package,
    to_exported_program,
    to_onnx,
)
from coded_resnext.deploy.extract import extract_classifier, file_name
from coded_resnext.deploy.hub import Pretrained, push_to_hub, save_pretrained
from coded_resnext.files import make_folder, say, write_atomically
from coded_resnext.interpret.results import Companions
from coded_resnext.models.checkpoint import LoadedModel, load_model

from .extract import parse_class

FOLDER = "export"
EARLY_EXIT_FOLDER = "early-exit"
SHARED_FOLDER = "shared"
SUFFIXES = {"onnx": ".onnx", "program": ".pt2", "aot": ".aot.pt2"}
CALIBRATION_BATCH = 32


def run(arguments: argparse.Namespace) -> int:
    """Writes, says what was written, and returns the exit status.

    Raises:
        ValueError: no such class, arguments that do not go together, or a file that disagrees with
            the network.
        OSError: a file cannot be read or written.
        ImportError: a library is missing.
    """
    _check(arguments)
    loaded = load_model(arguments.checkpoint)
    companions = Companions(arguments.checkpoint, loaded.model)
    if arguments.format == "shared":
        folder = arguments.out or make_folder(companions.target, FOLDER)
        out = arguments.out or make_folder(folder, SHARED_FOLDER)
        shared = Pretrained(
            loaded.model,
            loaded.preprocessing,
            companions.thresholds(),
            companions.early_exit(),
            loaded.training,
            companions.results(),
            arguments.name,
            arguments.license,
        )
        say(f"wrote {save_pretrained(shared, out)}")
        if arguments.push:
            say(f"pushed {push_to_hub(out, arguments.push)}")
        return 0
    for path in _write(arguments, loaded, companions):
        say(f"wrote {path} ({path.stat().st_size:,} bytes)")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses arguments that do not go together."""
    part = arguments.class_name is not None or arguments.heads or arguments.early_exit
    if arguments.format == "shared" and (part or arguments.int8):
        raise ValueError("--format shared: expected the whole network, without --int8")
    if arguments.push and arguments.format != "shared":
        raise ValueError("--push: expected with --format shared only")
    if arguments.format != "onnx" and (arguments.int8 or arguments.early_exit):
        raise ValueError("--int8, --early-exit: expected with --format onnx only")
    if arguments.int8 and arguments.early_exit:
        raise ValueError("--int8: expected for a single file, not with --early-exit")


def _write(
    arguments: argparse.Namespace, loaded: LoadedModel, companions: Companions
) -> list[Path]:
    """Writes what is asked for, and returns the files."""
    model = loaded.model
    dtype = model.head.weight.dtype
    if arguments.format == "onnx" and dtype != torch.float32:
        own = str(dtype).removeprefix("torch.")
        say(f"the weights are written in float32, they were in {own}")
        model.float()
    options = {"image_size": arguments.image_size, "preprocessing": loaded.preprocessing}
    target = arguments.out or make_folder(companions.target, FOLDER)
    if arguments.early_exit:
        criterion = companions.early_exit()
        if criterion is None:
            raise ValueError(
                f"--early-exit: expected {companions.folder / EXIT_FILE} for these weights; "
                "`coded-resnext calibrate RUN DATA` makes it"
            )
        notes = {"early_exit": criterion.to_dict()}
        out = arguments.out or make_folder(target, EARLY_EXIT_FOLDER)
        return export_early_exit(model, out, opset=arguments.opset, metadata=notes, **options)
    network: Exportable = model
    name = "network"
    if arguments.heads:
        network, name = Heads(model), "heads"
    elif arguments.class_name is not None:
        index = parse_class(model, arguments.class_name)
        threshold = companions.thresholds().get(model.class_names[index])
        network = extract_classifier(model, index, threshold=threshold, fold_batch_norm=True)
        name = Path(file_name(index, model.class_names[index])).stem
    out = arguments.out or target / f"{name}{SUFFIXES[arguments.format]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.format == "program":
        content = io.BytesIO()
        torch.export.save(to_exported_program(network, **options), content)
        write_atomically(out, content.getvalue())
        return [out]
    if arguments.format == "aot":
        return [to_aot_package(network, out, **options)]
    files = [to_onnx(network, out, opset=arguments.opset, **options)]
    if arguments.int8:
        batches = _calibration(arguments.int8, loaded.preprocessing)
        files.append(quantize_onnx(out, out.with_suffix(".int8.onnx"), batches))
    return files


def _calibration(paths: list[str], preprocessing: Preprocessing | None) -> list[torch.Tensor]:
    """Batches of the images that an int8 file is calibrated on."""
    if preprocessing is None:
        raise ValueError("--int8: expected a model with a preprocessing, got one without")
    images = images_of_no_class(paths)
    return [batch for batch, _ in EvalImages(images, preprocessing, CALIBRATION_BATCH)]
