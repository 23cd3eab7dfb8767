"""Writes docs/gallery.md and its pictures: ten test images with their paths, right and wrong.

    python docs/site/gallery.py cifar10_small

The pictures are those of the report, as Chromium shows it by day and by night.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from coded_resnext import Codebook
from coded_resnext.cli.report import write_report
from coded_resnext.deploy.extract import file_name
from coded_resnext.files import write_atomically
from coded_resnext.interpret import Evaluation, load_evaluation
from coded_resnext.interpret.decoding import Samples
from coded_resnext.models.checkpoint import find_model

DOCS = Path(__file__).parents[1]
IMAGES = 10
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Wide enough for the network from left to right.
VIEW = {"viewport": {"width": 1120, "height": 900}, "device_scale_factor": 1.5}
# What GitHub shows by day and by night; the site's style does the same.
ONLY = {"light": "#gh-light-mode-only", "dark": "#gh-dark-mode-only"}
HEAD = """# Gallery

Ten test images on their way through the network whose weights come along as `{name}`. The blocks go
from left to right. Framed branches work for the class that the image truly has, and a bar is the
energy that a branch has for this image. Below each block stands the class that its energies name,
and behind the last one what the classifier says ([how to read it](report.md#how-to-read-it)).

The images are chosen by a rule: one of each class, of every second class one that the network
misreads. The others are read rightly, if possible by the last block too, after an early one said
something else. Measured on {images}; weights {weights}.
`python docs/site/gallery.py {name}` makes this page, and `coded-resnext report {name}` one with
hundreds of images to choose from.
"""


def choose(samples: Samples, images: int = IMAGES) -> list[int]:
    """Returns rows of the samples: one of each of the first classes, every second one misread."""
    rows = []
    for number, target in enumerate(list(dict.fromkeys(samples.targets))[:images]):
        of_class = [row for row, one in enumerate(samples.targets) if one == target]
        right = [row for row in of_class if samples.predictions[row] == target]
        misread = [row for row in of_class if row not in right]
        late = [row for row in right if 0 < samples.settled[row] < len(samples.blocks)]
        rows.append(((late + right if number % 2 else misread) or of_class)[0])
    return rows


def sentence(evaluation: Evaluation, row: int) -> str:
    """Returns what every block and the classifier say of an image, and how much is on its path."""
    samples, names = evaluation.samples, evaluation.class_names
    assert samples is not None
    target = samples.targets[row]
    said, shares = [], []
    for block, info in zip(samples.blocks, evaluation.blocks, strict=True):
        word = Codebook.from_dict(evaluation.codebooks[info.codebook]).codewords[target]
        said.append(names[block.decoded[row]])
        on_path = block.energies[row][word.bool()].sum() / block.energies[row].sum()
        shares.append(f"{100 * float(on_path):.0f}")
    return (
        f"Test image {samples.positions[row]}, class {names[target]}. The blocks say "
        f"{_listed(said)}, with {_listed(shares)} % of the energy on the path of {names[target]}. "
        f"The classifier says {names[samples.predictions[row]]} "
        f"({100 * samples.probabilities[row]:.0f} %)."
    )


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def page(name: str) -> str:
    """Returns the page of shipped weights."""
    evaluation = load_evaluation(find_model(name))
    samples, provenance = evaluation.samples, evaluation.provenance
    assert samples is not None
    assert provenance is not None
    weights = (evaluation.weights_sha256 or "unknown")[:12]
    parts = [HEAD.format(name=name, images=provenance.test, weights=weights)]
    for row in choose(samples):
        names = evaluation.class_names
        target, said = names[samples.targets[row]], names[samples.predictions[row]]
        title = target if said == target else f"{target}, read as {said}"
        files = [picture_name(evaluation, row, scheme) + only for scheme, only in ONLY.items()]
        pictures = [f"![The path of a test image: {title}](gallery/{file})" for file in files]
        parts += [f"## {title.capitalize()}", *pictures, sentence(evaluation, row)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def picture_name(evaluation: Evaluation, row: int, scheme: str) -> str:
    """Returns the name of the picture of an image in a colour scheme, light or dark."""
    assert evaluation.samples is not None
    target = evaluation.samples.targets[row]
    stem = Path(file_name(target, evaluation.class_names[target])).stem
    return f"{stem}{'' if scheme == 'light' else '-dark'}.png"


def draw(name: str, folder: Path) -> None:
    """Writes the pictures of the page, and the curves of the training."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    weights = find_model(name)
    evaluation = load_evaluation(weights)
    samples = evaluation.samples
    assert samples is not None
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as copied, sync_playwright() as started:
        shutil.copytree(weights, copied, dirs_exist_ok=True)
        report = write_report(Path(copied))
        browser = started.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, BROWSERS))),
            args=["--no-sandbox", "--disable-dev-shm-usage"],
        )
        for scheme in ONLY:
            shown = browser.new_page(color_scheme=scheme, **VIEW)
            shown.goto(report.as_uri())
            shown.wait_for_selector("html[data-ready]", state="attached")
            shown.evaluate(
                "for (const part of document.querySelectorAll('details')) part.hidden = true"
            )

            def save(selector: str, file: str, shown: object = shown) -> None:
                taken = shown.locator(selector).first.screenshot()
                picture = Image.open(io.BytesIO(taken)).convert("RGB").quantize(128)
                buffer = io.BytesIO()
                picture.save(buffer, "png", optimize=True)
                write_atomically(folder / file, buffer.getvalue())

            for row in choose(samples):
                shown.select_option("#class-select", str(samples.targets[row]))
                shown.locator(f'input[name="shown"][value="{row}"]').check(force=True)
                save("#paths .card", picture_name(evaluation, row, scheme))
            save("#training .card", f"training{'' if scheme == 'light' else '-dark'}.png")
        browser.close()


def main() -> None:
    """Writes the page and its pictures."""
    name = sys.argv[1]
    draw(name, DOCS / "gallery")
    write_atomically(DOCS / "gallery.md", page(name).encode())


if __name__ == "__main__":
    main()
