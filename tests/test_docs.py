"""Pages whose blocks run as they stand, and notebooks, in an empty folder."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from timing import GPUS

from coded_resnext import create_model, from_pretrained
from coded_resnext.data.datasets import DATA_VARIABLE, load_digits_split
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import predict_early
from coded_resnext.interpret import load_evaluation, load_pictures
from coded_resnext.interpret.comparing import mean_and_deviation, summary_table
from coded_resnext.interpret.results import PICTURES_FILE
from coded_resnext.models.checkpoint import find_model, network_of, shipped_weights

ROOT = Path(__file__).parents[1]
# A block of code, or indented lines behind an empty one.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```|^\n((?: {4}[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(python|coded-resnext|make|torchrun|for|cp|\w+=\S+) ?")
# Those of tutorial.md and tools.md have tests of their own.
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md")]
    if path.name not in ("tutorial.md", "tools.md", "CHANGELOG.md")
)

# Minutes each, which continuous integration has not: `make docs-check` runs them.
SLOW = ("docs/ablations.md", "docs/deployment.md", "docs/reproduce.md", "docs/weights.md")
# What is not run here, and why.
NOT_RUN = {
    r"^make ": "makes an environment, and takes minutes to hours",
    r"benchmarks/gpu/(?!tune.py --op coded)": "needs a GPU",
    r"--benchmark-only|taskset": "times an idle machine",
    r"benchmarks/static/|build-kernels|--dry-run": "compiles kernels for minutes",
    r"ptx.plugin": "runs in a checkout alone; tests/ptx/test_ptx.py starts it there",
    r"tests/version_matrix.py": "makes environments of 5 GB each",
    r"train/early_exit.py": "trains 5 networks a run; tests/train/test_train_early_exit.py does so",
    r"train/digits.py --out runs/digits": "trains for minutes; tests/train/test_digits.py does so",
    r"train/(imagenet|finetune).py": "needs photographs; tests/train/test_train_scripts.py trains",
    r"coded-resnext pack": "needs photographs; tests/data/test_pack.py packs some",
    r"--scale (short|full)(?!.*--plan)|ablations.py cifar100": "trains for hours on a GPU",
    r"--push|push_to_hub\(": "uploads",
    r"to_aot_package\(": "compiles for a minute; tests/deploy/test_export.py does so",
    r"--architecture|--publish": "needs published weights; tests/cli/test_convert.py makes some",
    r"^(weights=|cp )|--out \$weights": "writes the package's own weights",
}
CIFAR = (
    r"\1 --dataset synthetic --train-images 60 --test-images 30 --epochs 1 --warmup-epochs 0 "
    "--batch-size 20 --device cpu"
)
# What is smaller here than on the page, or has a name of which a page speaks in general.
SCALED = {
    r"for seed in 0 1.*?;": "for seed in 0;",
    r"(train/digits.py)": r"\1 --epochs 1",
    r"(scale.py)( imagenet)?": r"\1 start-up 10 1000",
    r"(bench_export.py digits)": r"\1 --classes 2",
    r"(ablations.py digits) --epochs 15": r"\1 --epochs 1 --seeds 0 --rows 'exponent 2'",
    r"(train/cifar.py)(.*?)( --out| *#|\n|$)": CIFAR.replace(r"\1", r"\1\2", 1) + r"\3",
    r"(reproduce.py --scale small)": CIFAR + " --seeds 0 --rows 'plain twin' --augment-on cpu",
    r"--config cifar10(_cpu(_drop)?)?\b": "--config cifar10_small",
    r"--(epochs [234]|train-images [124]000|test-images 1000|batch-size 50)\b": "",
    r"\bRUN DATA\b": "runs/digits digits",
    r"\bRUN\b": "runs/digits",
    r"(coded_)?resnext50_32x4d": r"\1resnext17_10x4d",
}
# What a page takes for given.
GIVEN = {
    "docs/codebooks.md": "import numpy as np\nconfusions = np.ones((39, 39))\n",
    "docs/grouped_convolution.md": "from coded_resnext import create_model\n"
    "model = create_model('coded_resnext_digits')\n",
    "docs/kernels.md": "import torch\nfrom coded_resnext import CodedLoss, create_model\n"
    "model = create_model('coded_resnext_digits')\n"
    "criterion = CodedLoss(model.codebooks)\n"
    "images, targets = torch.rand(4, 1, 8, 8), torch.arange(4)\n",
    "docs/weights.md": "import torch\nfrom coded_resnext import create_model\n"
    "from safetensors.torch import save_file\n"
    "torch.save(create_model('coded_resnext_digits').state_dict(), 'epoch-7.pt')\n"
    "plain = create_model('resnext17_10x4d', head_bias=True)\n"
    "save_file(plain.state_dict(), 'resnext17_10x4d.safetensors')\n"
    "images, names = torch.rand(2, 3, 32, 32), list('abcdefghij')\n"
    "batches = [(images, torch.arange(2))]\n",
}
# Smaller than the notebooks' own settings.
NOTEBOOKS = {
    "early_exit_and_one_class": "IMAGES = 240",
    "train_and_look": "EPOCHS = 2",
    "your_own_classifier": "EPOCHS, IMAGES = 2, 12",
}


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The code of a page in its order: what it is written in, and the lines."""
    blocks = []
    for language, fenced, indented in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        code = textwrap.dedent(fenced or indented)
        if language in ("sh", "python"):
            blocks.append((language, code))
        elif indented and COMMAND.match(code):
            blocks.append(("sh", code))
    return blocks


def commands_of(code: str) -> list[str]:
    """The commands of a shell's block: lines, with those that go on joined; a loop is one."""
    if code.startswith("for "):
        return [code]
    return code.replace("\\\n", " ").strip().splitlines()


def reason_of(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


def scaled(code: str) -> str:
    code = code.replace("\\\n", " ")
    for pattern, smaller in SCALED.items():
        code = re.sub(pattern, smaller, code)
    return code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a reader has: the scripts of the checkout, a trained run, and a few photographs."""
    for name in ("train", "benchmarks", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "coded_resnext/models/weights/digits", tmp_path / "runs" / "digits")
    pixels = (load_digits_split().test_images[:4, 0] * 50 + 80).clamp(0, 255).byte().numpy()
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{index}.png")
    shutil.copy(tmp_path / "photos" / "0.png", tmp_path / "photo.png")
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_every_block_of_a_page_runs(page: str, folder: Path) -> None:
    if page in SLOW and os.environ.get("CODED_RESNEXT_DOCS") != "all":
        pytest.skip("it takes minutes: `make docs-check` runs it")
    environment = {
        **os.environ,
        "CODED_RESNEXT_DATA": str(folder / "data"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    environment.pop("TRITON_INTERPRET")
    start = time.perf_counter(), os.times()
    run = 0
    not_run: list[str] = []

    def execute(command: list[str]) -> None:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command[-1]}\n{result.stdout}\n{result.stderr}"

    # Blocks of Python go on from one another, those of a shell are commands of their own.
    python = GIVEN.get(page, "")
    for kind, code in blocks_of(page):
        parts = code.splitlines() if kind == "python" else commands_of(code)
        left_out = [part for part in parts if reason_of(part)]
        not_run += left_out
        run += len(left_out) < len(parts)
        code = scaled("\n".join(part for part in parts if part not in left_out))
        if kind == "python":
            python += code + "\n"
        else:
            # A page that takes weights for given has made them before its first command.
            if run == 1 and page in GIVEN:
                execute([sys.executable, "-c", GIVEN[page]])
            execute(["bash", "-ec", code])
    if python:
        execute([sys.executable, "-c", python])
    seconds, used = time.perf_counter() - start[0], os.times()
    computed = sum(used[2:4]) - sum(start[1][2:4])
    print(
        f"{page}: {run} of {len(blocks_of(page))} blocks run, {seconds:.0f} s, "
        f"{computed:.0f} s of the processor"
    )
    for part in not_run:
        print(f"  not run: {part.strip():.60}: {reason_of(part)}")


def test_what_is_not_run_or_smaller_is_on_a_page() -> None:
    code = "\n".join(
        command
        for page in PAGES
        for kind, block in blocks_of(page)
        for command in (commands_of(block) if kind == "sh" else block.splitlines())
    )
    for pattern in [*NOT_RUN, *SCALED]:
        assert re.search(pattern, code, re.MULTILINE), pattern
    assert set(GIVEN) <= set(PAGES)


def test_figures_of_the_shipped_digits_are_those_of_the_weights() -> None:
    """Tables of networks that the code no longer made stood beside one another as of one recipe."""
    page = " ".join((ROOT / "docs/deployment.md").read_text(encoding="utf-8").split())
    page = page.replace(" %", "%")
    shipped, split = from_pretrained("digits"), load_digits_split()
    assert shipped.early_exit is not None
    early = predict_early(shipped.model, split.test_images, shipped.early_exit)
    with torch.no_grad():
        classes = shipped.model(split.test_images).argmax(1)
    left = early.exit_blocks.bincount(minlength=5).tolist()
    saved = 1 - float(early.macs.double().mean()) / network_cost(shipped.model, 8).macs
    right, right_early = (
        float((said == split.test_targets).double().mean()) for said in (classes, early.classes)
    )
    assert f"leaves {left[0]}, {left[1]}, {left[2]}, {left[3]} and {left[4]} at block" in page
    assert f"saves {saved:.1%}" in page
    assert f"is {right_early:.2%} with early exit and {right:.2%} without" in page
    assert f"| network | 360 of 360 | {right:.2%}" in page
    saving = f"early exit saves on digits | {saved:.0%}".replace("%", " %")
    assert saving in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", shipped_weights())
def test_the_table_of_weights_has_their_figures(name: str) -> None:
    results = from_pretrained(name).results
    early = ", ".join(f"{100 * share:.1f}" for share in results["early_decoding"])
    images = load_evaluation(find_model(name)).test_samples
    parameters = sum(p.numel() for p in create_model(network_of(name)).parameters())
    size = sum(path.stat().st_size for path in find_model(name).iterdir()) / 1e6
    row = (
        f"| `{name}` | `{network_of(name)}`, {parameters:,} parameters | "
        f"{100 * results['test_accuracy']:.2f} % of {images:,} images | {early} % | {size:.1f} MB |"
    )
    assert row in (ROOT / "docs/weights.md").read_text(encoding="utf-8")


def test_the_gallery_has_an_image_of_each_class_and_misread_ones() -> None:
    """Images were picked by taste."""
    site = runpy.run_path(str(ROOT / "docs/site/pages.py"))
    samples = load_evaluation(find_model("digits")).samples
    assert samples is not None
    rows = site["choose"](samples)
    targets = [samples.targets[row] for row in rows]
    assert targets == list(range(10))
    said = zip(samples.targets, samples.predictions, strict=True)
    misread = {target for target, predicted in said if predicted != target}
    for place, row in enumerate(rows):
        is_right = samples.predictions[row] == samples.targets[row]
        assert is_right == (place % 2 == 1 or targets[place] not in misread)
    assert site["gallery"]("digits").count("#gh-dark-mode-only") == 10


def test_figures_of_photographs_are_those_of_the_shipped_weights() -> None:
    site = runpy.run_path(str(ROOT / "docs/site/pages.py"))
    page = site["gallery"]("cifar10_small")
    assert page == (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((gallery/[^#]+)#", page)
    assert len(pictures) == 20
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)
    readme, reproduction = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/reproduce.md")
    )
    evaluation = load_evaluation(find_model("cifar10_small"))
    [cat] = [
        row
        for row in site["choose"](evaluation.samples)
        if evaluation.class_names[evaluation.samples.targets[row]] == "cat"
    ]
    assert site["sentence"](evaluation, cat) in " ".join(readme.split())
    runs = json.loads((ROOT / "benchmarks/results/cifar10_cpu.json").read_text())["runs"]
    [shipped] = runs["coded, 30 epochs"]
    assert shipped["test_accuracy"] == evaluation.test_accuracy
    assert f"| {100 * evaluation.test_accuracy:.2f} % |" in readme
    # How long a run takes is not the network's.
    table = summary_table(
        {kind: [{**run, "seconds": 0} for run in each] for kind, each in runs.items()}
    )
    for line in table.replace(" ± ?", "").splitlines()[2:-1]:
        assert line in reproduction
    accuracies = (
        mean_and_deviation([100 * run["test_accuracy"] for run in runs[f"{kind}, 24 epochs"]], 1, 2)
        for kind in ("coded", "plain")
    )
    assert " | ".join(f"{accuracy} %" for accuracy in accuracies) in readme


def test_no_verdict_on_the_paper_without_its_scale() -> None:
    """A claim that holds or does not hold says in the same sentence after which training."""
    text = " ".join((ROOT / "docs/ablations.md").read_text().split())
    verdicts = re.findall(r"\*\*([^*]*\bholds?\b[^*]*)\*\*", text)
    assert len(verdicts) == len(re.findall(r"this (?:does not hold|holds)", text)) >= 6
    for verdict in verdicts:
        assert re.search(r"after \d+ epochs on .* this (does not hold|holds)", verdict), verdict


def test_what_an_h200_can_issue_is_the_same_on_every_page() -> None:
    h200 = next(gpu for gpu in GPUS if gpu.name == "H200")
    stated = [
        float(number)
        for page in ("docs/benchmarks.md", "docs/grouped_convolution.md", "kernels/README.md")
        for number in re.findall(
            r"H200(?: can issue)? (0\.\d+)", (ROOT / page).read_text(encoding="utf-8")
        )
    ]
    assert len(stated) == 4
    assert all(abs(number - h200.issue_per_byte) < 0.005 for number in stated)


def test_notebooks_hold_no_outputs_and_every_one_is_run() -> None:
    paths = sorted((ROOT / "examples").glob("*.ipynb"))
    assert [path.stem for path in paths] == sorted(NOTEBOOKS)
    for path in paths:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def write_cifar10(folder: Path) -> None:
    """Writes the test images that the shipped network's report shows, as a data set."""
    run = find_model("cifar10_small")
    evaluation, pictures = load_evaluation(run), load_pictures(run / PICTURES_FILE)
    for place, target in zip(evaluation.samples.positions, evaluation.samples.targets, strict=True):
        # No notebook trains on them, but a data set has training images.
        for part in ("train", "test"):
            path = folder / part / evaluation.class_names[target] / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(pictures[place].partition(",")[2]))


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    folder = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([folder, os.environ["PATH"]]))
    # The kernels of Triton are not interpreted where a person runs it.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DATA_VARIABLE not in os.environ:
        write_cifar10(tmp_path / "data" / "cifar10")
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", 4)
    settings = [cell.metadata.get("tags") == ["parameters"] for cell in notebook.cells].index(True)
    notebook.cells.insert(settings + 1, nbformat.v4.new_code_cell(NOTEBOOKS[name]))
    # An error in a cell is raised here.
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any(output.get("data", {}).get("image/png") for output in outputs)
