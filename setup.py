"""Packaging of Coded ResNeXt: `kernels/` is installed as `coded_resnext.kernels`."""

from pathlib import Path

from setuptools import setup

VERSION = "0.1.0"

TRAIN = ["pillow>=10", "scikit-learn>=1.5", "tensorboard>=2.17", "tqdm>=4.66"]
REPORT = ["jinja2>=3.1", "matplotlib>=3.9", "pillow>=10", "scikit-learn>=1.5"]
CODES = ["matplotlib>=3.9"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.2"]
BROWSER = ["axe-playwright-python>=0.1.7", "playwright>=1.50"]
TEST = [*TRAIN, *REPORT, "hypothesis>=6.100", "pytest>=8.3", *BROWSER]
BENCH = ["pytest-benchmark>=5.1"]
DEV = [*TEST, *BENCH, "build>=1.2", "mypy==2.4.1", "ruff==0.17.6"]

setup(
    name="coded-resnext",
    version=VERSION,
    description="Coded ResNeXt: multi-branch networks whose branches are assigned to classes",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Listed in full: package discovery does not see through the package_dir mapping.
    packages=[
        "coded_resnext",
        "coded_resnext.codebooks",
        "coded_resnext.commands",
        "coded_resnext.interpret",
        "coded_resnext.interpret.report",
        "coded_resnext.kernels",
    ],
    package_dir={"coded_resnext.kernels": "kernels"},
    package_data={
        "coded_resnext": ["py.typed"],
        "coded_resnext.codebooks": ["data/*.json"],
        "coded_resnext.interpret.report": ["assets/*"],
    },
    install_requires=[
        "numpy>=2",
        "safetensors>=0.4",
        "torch>=2.11",
        'triton>=3.6,<3.10; platform_system == "Linux"',
    ],
    extras_require={
        "train": TRAIN,
        "report": REPORT,
        "codes": CODES,
        "export": EXPORT,
        "test": TEST,
        "bench": BENCH,
        "dev": DEV,
        "all": sorted({*TRAIN, *REPORT, *CODES, *EXPORT, *DEV}),
    },
    entry_points={"console_scripts": ["coded-resnext = coded_resnext.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
