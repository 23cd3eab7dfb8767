"""What each command takes and says about itself.

This stands apart from what the commands do, which needs PyTorch: asking for help does not wait
for that. Of the package only what does without it is imported here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from coded_resnext import __version__
from coded_resnext.codebooks.files import VARIANTS, Size, shipped_sizes
from coded_resnext.codebooks.search import EFFORTS

# Defined in modules that need PyTorch, and held against them by a test.
BACKENDS = ("auto", "reference", "torch", "fused", "triton")
KERNELS_VARIABLE = "CODED_RESNEXT_KERNELS"
NETWORKS = (
    "coded_resnext14_32x1d",
    "coded_resnext17_10x4d",
    "coded_resnext29_10x11d",
    "coded_resnext29_20x6d",
    "coded_resnext50_32x4d",
    "coded_resnext50_32x4d_c3",
    "coded_resnext50_32x4d_c4",
    "coded_resnext50_32x4d_c5",
    "coded_resnext_cifar10_small",
    "coded_resnext_digits",
    "resnext14_32x1d",
    "resnext17_10x4d",
    "resnext29_10x11d",
    "resnext29_20x6d",
    "resnext50_32x4d",
    "resnext_cifar10_small",
    "resnext_digits",
)
OPSET = 18

RUN = "model file, folder of a run, or name of shipped weights, which `coded-resnext models` lists"
_DATA = (
    "a folder of images, DATA/CLASS/* or DATA/{train,test}/CLASS/*; a CSV of path, label and "
    "perhaps split; hf:NAME, an image set of Hugging Face's datasets; 'digits', the test images of "
    "scikit-learn's digits; or cifar10, cifar100 or synthetic, as the run's recipe takes them from "
    "the folder $CODED_RESNEXT_DATA (./digits is a folder)"
)
WHICH = "a file, or a shipped codebook such as 100x8/20 or 10x5/10:paper"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands.

    What it parses has `function`: "MODULE:NAME" in this package, which takes the arguments and
    returns the exit status.
    """
    parser = argparse.ArgumentParser(
        prog="coded-resnext",
        description="Networks whose branches are assigned to classes before training.",
    )
    parser.add_argument("--version", action="version", version=f"coded-resnext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_build_kernels(commands)
    _add_calibrate(commands)
    _add_codebook(commands)
    _add_convert(commands)
    _add_doctor(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_extract(commands)
    _add_info(commands)
    _add_models(commands)
    _add_pack(commands)
    _add_predict(commands)
    _add_report(commands)
    _add_train(commands)
    _add_tune(commands)
    return parser


def _add_build_kernels(commands: Commands) -> None:
    parser = commands.add_parser(
        "build-kernels",
        help="compile the Triton kernels ahead of time",
        description="Compile every shipped kernel for some GPU architectures. No GPU is needed. "
        "A second run compiles what has changed. Processes find the result by themselves in the "
        f"default folder, elsewhere by the variable {KERNELS_VARIABLE}.",
        epilog="Exit status 1 when a kernel does not compile, or with --check when one is missing.",
    )
    parser.add_argument(
        "--arch",
        action="append",
        metavar="CAPABILITY",
        help="compute capability without the dot, such as 80, 90 or 100; may be given several "
        "times (default: that of the GPU in this machine)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="(default: this Triton's folder in the user's cache, which `doctor` names)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: processors)")
    parser.add_argument(
        "--check", action="store_true", help="compile nothing, list what the folder lacks"
    )
    parser.set_defaults(function="build_kernels:run")


def _add_calibrate(commands: Commands) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="choose the margins at which images leave a trained network early",
        description="Choose the margins of early exit on images that the network was not trained "
        "on, and write them into the run's folder, where `predict --early` and `export "
        "--early-exit` find them.",
        epilog="What early exit does is to be measured on other images than these: a margin looks "
        "better than it is on the images that chose it.",
    )
    parser.add_argument(
        "checkpoint", metavar="RUN", help="model file, or the folder of a run that has one"
    )
    parser.add_argument("data", metavar="DATA", help=_DATA)
    parser.add_argument(
        "--max-accuracy-loss",
        type=float,
        default=0.001,
        metavar="SHARE",
        help="largest share of the images that early exit may lose (default %(default)s)",
    )
    parser.add_argument(
        "--agreement", action="store_true", help="two consecutive decoders must agree"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images at a time (default %(default)s)"
    )
    parser.set_defaults(function="calibrate:run")


def _add_train(commands: Commands) -> None:
    # Its settings are those of a recipe, which need PyTorch: `cli/train.py` reads what follows.
    parser = commands.add_parser(
        "train",
        help="train a network by a recipe: cifar10, imagenet, or a folder of images",
        add_help=False,
    )
    parser.set_defaults(function="train:run")


def _add_tune(commands: Commands) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure the ways to compute a training step on this machine",
        description="Measure the ways to compute a training step of a network on this machine: "
        "layer by layer and by the kernels, as it is, compiled and as CUDA graphs. What was "
        "measured is remembered: a training of the same network, batch, image size and precision "
        "takes the fastest way without measuring again.",
        epilog="A way that computes something else or fails is left out, with its reason. Exit "
        "status 1 where nothing was measured.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"{RUN}; or one of {', '.join(NETWORKS)}")
    parser.add_argument(
        "--batch-size", type=int, default=256, help="images in a step (default %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="(default: that of the network)"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of mixed precision; float32 for none (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        help="after which no other way is begun (default %(default)s)",
    )
    parser.add_argument("--anew", action="store_true", help="measure also what is remembered")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(function="build_kernels:run_tune")


def _add_codebook(subparsers: Commands) -> None:
    parser = subparsers.add_parser(
        "codebook",
        help="search, show, verify, compare and export codebooks",
        description="Codebooks: which branches work for which class.",
        epilog="shipped: " + ", ".join(_shipped_names()),
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    one = commands.add_parser("search", help="find a codebook for any number of classes")
    one.add_argument("classes", type=int, help="number of classes K")
    one.add_argument("branches", type=int, help="number of branches N")
    one.add_argument("active", type=int, help="active branches per class A")
    one.add_argument("--effort", choices=list(EFFORTS), default="default")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument(
        "-o",
        "--output",
        type=Path,
        help="file to write, CSV or text by its ending, else JSON; without it the table",
    )
    one.set_defaults(function="codebook:run_search")

    one = commands.add_parser("show", help="table, distances, loads and bounds")
    one.add_argument("codebook", help=WHICH)
    one.add_argument("--png", type=Path, help="also draw it into this file")
    one.set_defaults(function="codebook:run_show")

    one = commands.add_parser("verify", help="say rule by rule what holds (status 1: no codebook)")
    one.add_argument("file", type=Path, help="JSON, text or CSV of codewords")
    one.set_defaults(function="codebook:run_verify")

    one = commands.add_parser("compare", help="two codebooks side by side")
    one.add_argument("first", help=WHICH)
    one.add_argument("second", help=WHICH)
    one.set_defaults(function="codebook:run_compare")

    one = commands.add_parser("export", help="write a codebook as JSON, CSV or text")
    one.add_argument("codebook", help=WHICH)
    one.add_argument("output", type=Path, help="file to write; its ending, .json, .csv or .txt")
    one.set_defaults(function="codebook:run_export")


def _add_convert(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="bring in a published checkpoint or a plain ResNeXt, or write published names",
        description="Turn weights of other software into a model file of ours. Nothing in a "
        "checkpoint is executed.",
        epilog="A coded network made of plain weights has to be trained on: its coded blocks "
        "normalise, which the plain ones did not.",
    )
    parser.add_argument(
        "source", metavar="FILE", help="safetensors or PyTorch checkpoint; or a RUN"
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--network",
        metavar="NAME",
        help="FILE is a plain ResNeXt of timm or torchvision, or ours; start this network of the "
        f"registry from it: {', '.join(NETWORKS)}",
    )
    kind.add_argument(
        "--architecture",
        type=Path,
        metavar="JSON",
        help="FILE has the names of the published code; this is its list of layers",
    )
    kind.add_argument(
        "--publish", action="store_true", help="RUN is ours; write it under the published names"
    )
    parser.add_argument(
        "--classes", metavar="FILE", type=Path, help="names of the classes, one a line, in order"
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="K", help="with --network; another number, a fresh head"
    )
    parser.add_argument(
        "--in-channels", type=int, metavar="C", help="with --network; 1 for grey, 3 for RGB"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="the file, or a folder for it"
    )
    parser.set_defaults(function="convert:run")


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="versions, devices, backends, and a check of every operation",
        description="Print versions, devices and backends, and check every operation, forward and "
        "backward, against its float64 definition. Exit status 1 when one is wrong.",
    )
    parser.set_defaults(function="doctor:run")


def _add_evaluate(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="the paper's evaluation of a trained network",
        description="Accuracy, early decoding, removal of branches and one-class classifiers of a "
        "trained network.",
        epilog="Thresholds of the one-class classifiers are chosen on training images; where "
        "there are none, on the test images themselves, which the output says.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=RUN)
    parser.add_argument(
        "data",
        metavar="DATA",
        help=_DATA,
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write evaluation.json, and the figures as PNG and SVG, into this folder",
    )
    parser.add_argument("--csv", action="store_true", help="write the tables as CSV into DIR too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--outside",
        type=Path,
        metavar="IMAGES",
        help="images of none of the classes, for the one-class classifiers: a folder, a CSV with a "
        "column path, or hf:NAME",
    )
    parser.add_argument(
        "--negatives",
        metavar="N",
        help="images of other classes that a one-class classifier is tested with for each of its "
        "class, or 'all' (default: 9 with 100 classes or more, all with fewer)",
    )
    parser.add_argument(
        "--test-images",
        type=int,
        metavar="N",
        help="remove branches from about so many test images, and test the one-class classifiers "
        "on these (default: all)",
    )
    parser.add_argument(
        "--removal-images",
        type=int,
        metavar="N",
        help="remove branches from about so many test images (default: as --test-images)",
    )
    parser.add_argument(
        "--threshold-images",
        type=int,
        metavar="N",
        help="choose the thresholds of the one-class classifiers on about so many training images "
        "(default: all)",
    )
    parser.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="test the one-class classifiers of so many classes (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="decides the images and classes that are drawn, and the order in which branches are "
        "removed (default 0)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="random orders in which branches are removed (default 5)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="images at a time (default 256 for digits, 64 for folders)",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="who computes the blocks (%(default)s); with triton the network runs on the GPU",
    )
    parser.set_defaults(function="evaluate:run")


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a trained network for other software, or to share it",
        description="Write a network, or a part of it, as ONNX (compared with onnxruntime), as a "
        "torch.export program, as an AOTInductor package, or as a folder with a model card.",
        epilog="examples/ has programs that run the ONNX files with onnxruntime and NumPy alone.",
    )
    parser.add_argument("checkpoint", metavar="RUN", help=RUN)
    parser.add_argument(
        "--format",
        choices=["onnx", "program", "aot", "shared"],
        default="onnx",
        help="onnx; a torch.export program; an aot package, which needs a C++ compiler; or shared: "
        "safetensors, JSON and a model card (default onnx)",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--class",
        dest="class_name",
        metavar="CLASS",
        help="the classifier of one class, by name or index, BatchNorm folded in",
    )
    part.add_argument(
        "--heads", action="store_true", help="the network with what each early decoder says"
    )
    part.add_argument(
        "--early-exit",
        action="store_true",
        help="one ONNX file for each part between exits, with the run's margins",
    )
    parser.add_argument(
        "--int8",
        metavar="IMAGES",
        nargs="+",
        help="also an int8 ONNX file, calibrated on these training images: files, folders, CSV "
        "files or hf:NAME",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="height and width that the files are for (default: the run's)",
    )
    parser.add_argument(
        "--opset", type=int, default=OPSET, help=f"version of the ONNX operators (default {OPSET})"
    )
    parser.add_argument(
        "--name", default="Coded ResNeXt", help="title of the model card (default Coded ResNeXt)"
    )
    parser.add_argument("--license", help="licence of the weights for the model card, such as mit")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the shared folder to the Hugging Face Hub"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="the file or folder (default: in RUN/export)"
    )
    parser.set_defaults(function="export:run")


def _add_extract(commands: Commands) -> None:
    parser = commands.add_parser(
        "extract",
        help="cut the classifiers of single classes out of a trained network",
        description="Write the part of a network that works for a class, or for several, as a "
        "network of its own.",
        epilog="One class gives a yes-or-no classifier, several a network with one logit for each. "
        "The threshold is, unless given, the one in the run's evaluation.json, when there is one.",
    )
    parser.add_argument("checkpoint", metavar="RUN", help=RUN)
    parser.add_argument(
        "classes",
        metavar="CLASS",
        nargs="*",
        help="name of a class, or its index if none is named so",
    )
    parser.add_argument("--all", action="store_true", help="one classifier for each class")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="the file; with --all the folder (default: in RUN/classifiers)",
    )
    parser.add_argument("--threshold", type=float, help="logits of at least this say yes")
    parser.add_argument(
        "--fold", action="store_true", help="fold BatchNorm into the convolutions (faster)"
    )
    parser.add_argument(
        "--skip-rank",
        type=float,
        metavar="SHARE",
        help="replace projection skips by their best approximation of this share of the rank",
    )
    parser.add_argument(
        "--codebooks",
        nargs="+",
        metavar="FILE",
        help="refuse a network whose codebooks or class order differ from these, one a coded stage",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of sentences")
    parser.set_defaults(function="extract:run")


def _add_info(commands: Commands) -> None:
    parser = commands.add_parser(
        "info",
        help="what a trained network is and costs",
        description="Architecture, codebooks, parameters, multiply-accumulates, and what the "
        "classifier of one class costs beside the whole network.",
        epilog="Shares are by all tensors, and without projection skips, as the paper counts.",
    )
    parser.add_argument("checkpoint", metavar="RUN", help=RUN)
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="of which multiply-accumulates are counted (default: the run's)",
    )
    parser.add_argument(
        "--latency", action="store_true", help="measure the time of one image on this machine"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of sentences")
    parser.set_defaults(function="info:run")


def _add_models(commands: Commands) -> None:
    parser = commands.add_parser(
        "models",
        help="list the networks, and the weights that come with the package",
        description="The networks that can be made, and the weights that come with the package: "
        "each has a name that stands wherever a command takes a RUN, without any download.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(function="models:run")


def _add_pack(commands: Commands) -> None:
    parser = commands.add_parser(
        "pack",
        help="write a folder of images anew with smaller JPEGs, to train from",
        description="Write a folder of images anew, once: images whose shorter side is longer are "
        "resized, all others are copied. An interrupted command goes on where it was.",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="with train/CLASS and test/CLASS, or CLASS"
    )
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument(
        "--shorter-side", type=int, default=256, metavar="PIXELS", help="(default 256)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default 90)")
    parser.add_argument(
        "--shard-images",
        type=int,
        metavar="N",
        help="write tar files of so many images each, and images.csv, which training takes",
    )
    parser.add_argument(
        "--workers", type=int, default=4, help="processes that resize (default 4); 0 for none"
    )
    parser.set_defaults(function="convert:run_pack")


def _add_predict(commands: Commands) -> None:
    parser = commands.add_parser(
        "predict",
        help="classify image files",
        description="The class of every image, where that was decided, and the branches that had "
        "the most energy in every coded block. Without early exit: from which coded block on every "
        "block shows this class, so that the image could have stopped there.",
        epilog="Images of any size are brought to the network's input by the preprocessing that "
        "the run was trained with.",
    )
    parser.add_argument("checkpoint", metavar="RUN", help=RUN)
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="image files, folders that hold some, CSV files with a column path, or hf:NAME",
    )
    parser.add_argument(
        "--early",
        action="store_true",
        help="stop computing for an image once a coded block shows its class, by the margins that "
        "`coded-resnext calibrate` left in the run",
    )
    parser.add_argument(
        "--margin",
        type=float,
        help="the same by this margin, 0 to 1, for all blocks instead of the run's",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default 64)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(function="predict:run")


def _add_report(commands: Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="the results of a run as one web page",
        description="Write one HTML file, which needs no network, of what the run's folder holds: "
        "paths, test images, removed branches, one-class classifiers, early exit, codebooks, "
        "training and configuration.",
        epilog="Nothing is measured here: `coded-resnext eval RUN DATA --out RUN` makes results. "
        "What a run does not have the page lists.",
    )
    parser.add_argument(
        "folder", metavar="RUN", help="the folder of a run, or the name of shipped weights"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html)"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="DIR", help="also write the results' tables as CSV"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also draw the results as PNG and SVG"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the content as JSON instead of writing the page"
    )
    parser.set_defaults(function="report:run")


def _shipped_names() -> list[str]:
    def name(size: Size, variant: str) -> str:
        ending = "" if variant == "best" else f":{variant}"
        return f"{size.classes}x{size.active}/{size.branches}{ending}"

    return [name(size, variant) for variant in VARIANTS for size in shipped_sizes(variant)]
