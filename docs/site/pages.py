"""What the site has beside the pages of docs/: pages that lie elsewhere, and what code says.

MkDocs adds the pages that lie elsewhere in the repository, and links out of it. The README is the
first page. The pages of notebooks are their cells, without outputs. The pages of commands and
settings end with what the code says of them. Shipped weights have their reports.

Their gallery is docs/gallery.md, so that it is there without the site: ten test images with their
paths, right and wrong. This command writes it with its pictures, which are those of the report, as
Chromium shows it by day and by night:

    python docs/site/pages.py cifar10_small
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from posixpath import relpath
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from coded_resnext import Codebook
from coded_resnext.cli.report import write_report
from coded_resnext.deploy.extract import file_name
from coded_resnext.files import write_atomically
from coded_resnext.interpret import Evaluation, load_evaluation
from coded_resnext.interpret.decoding import Samples
from coded_resnext.interpret.report import gather, render
from coded_resnext.models.checkpoint import find_model, shipped_weights

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# The name of a page on the site, and its file.
ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security-policy.md": "SECURITY.md",
    "kernels/README.md": "kernels/README.md",
    **{
        f"examples/{path.stem}.md": f"examples/{path.name}"
        for path in sorted((ROOT / "examples").glob("*.ipynb"))
    },
}
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
# Of the gallery.
IMAGES = 10
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Wide enough for the network from left to right.
VIEW = {"viewport": {"width": 1120, "height": 900}, "device_scale_factor": 1.5}
# What GitHub shows by day and by night; the site's style does the same.
ONLY = {"light": "#gh-light-mode-only", "dark": "#gh-dark-mode-only"}
GALLERY = """# Gallery

Each picture shows the path of a test image through the network with the shipped weights
`{name}`. The blocks go from left to right. The frames mark the branches that work for the true
class, and a bar is the energy of a branch for this image. The class below a block is the one
that its energies decode to. The classifier's prediction is at the end ([how to read
it](report.md#how-to-read-it)).

A rule chooses one image of each class. The network misclassifies the image of every second
class and classifies the others correctly. Of these it prefers images for which an early block
says something else and the last block is right. Measured on {images}; weights {weights}.
`python docs/site/pages.py {name}` makes this page, and `coded-resnext report {name}` makes one
with hundreds of images to choose from.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/, and the reports of the shipped weights."""
    from mkdocs.structure.files import File

    for name in shipped_weights():
        report = render(gather(find_model(name)))
        files.append(File.generated(config, f"reports/{name}.html", content=report))
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = notebook(json.loads(text), source) if source.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links between pages to the site, and others to the repository, where it is named.

    A link to a file that does not exist stays as it is, so that MkDocs warns.
    """
    uri = page.file.src_uri
    if uri == "index.md":
        # It is alone in its section.
        page.meta["hide"] = ["navigation"]
    folder = (ROOT / ELSEWHERE.get(uri, f"docs/{uri}")).parent
    pages = {(ROOT / source).resolve(): name for name, source in ELSEWHERE.items()}

    def led(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups(default="")
        path = (folder / target).resolve()
        if ":" in target or not path.is_relative_to(ROOT) or not path.exists():
            return match[0]
        name = pages.get(path)
        if name is None and path.is_relative_to(ROOT / "docs"):
            name = path.relative_to(ROOT / "docs").as_posix()
        if name is not None:
            return f"{image}[{label}]({relpath(name, os.path.dirname(uri) or '.')}{anchor})"
        if not config.repo_url:
            return label
        return f"[{label}]({config.repo_url.rstrip('/')}/blob/main/{path.relative_to(ROOT)})"

    filled = {"api/recipe.md": recipe, "commands.md": commands, "gallery.md": reports}
    return LINK.sub(led, markdown) + ("\n\n" + filled[uri]() if uri in filled else "")


def notebook(cells: dict[str, Any], source: str) -> str:
    """Returns the page of a notebook: its text, and its code as blocks."""
    parts = []
    for cell in cells["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, *rest = parts
    return "\n\n".join([title, f"*The notebook is `{source}`.*", *rest])


def reports() -> str:
    """Returns links to the reports, which are there on the site alone."""
    links = [f"- [{name}](reports/{name}.html)" for name in shipped_weights()]
    return "\n".join(["## The reports of the weights that come along", "", *links])


def commands() -> str:
    """Returns what `coded-resnext --help` says, and that of every command."""
    from coded_resnext.cli.arguments import make_parser

    # The width of what argparse writes.
    os.environ["COLUMNS"] = "80"
    parser = make_parser()
    parts = [f"```text\n{parser.format_help()}```"]
    for command in subcommands(parser):
        if command.prog != "coded-resnext train":
            parts.append(f"## {command.prog}\n\n```text\n{command.format_help()}```")
    return "\n\n".join(parts)


def subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Returns the parsers of all commands of a parser, and of their commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from subcommands(command)


def recipe() -> str:
    """Returns a table for each group of a recipe's settings."""
    from coded_resnext.training.recipe import GROUPS

    parts = []
    for group in GROUPS:
        hints = get_type_hints(group, include_extras=True)
        title = (group.__doc__ or "").split("\n\n")[0].split(";")[0].rstrip(".")
        rows = ["| setting | default | what it says |", "|---|---|---|"]
        for field in dataclasses.fields(group):
            if field.name not in hints or not get_args(hints[field.name]):
                continue
            default = field.default
            if default is dataclasses.MISSING:
                default = "required"
            text = get_args(hints[field.name])[1]
            rows.append(f"| `{field.name}` | `{default}` | {text} |")
        parts.append(f"## {title}\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


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


def gallery(name: str) -> str:
    """Returns the gallery of shipped weights."""
    evaluation = load_evaluation(find_model(name))
    samples, provenance = evaluation.samples, evaluation.provenance
    assert samples is not None
    assert provenance is not None
    weights = (evaluation.weights_sha256 or "unknown")[:12]
    parts = [GALLERY.format(name=name, images=provenance.test, weights=weights)]
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
    """Writes the pictures of the gallery, and the curves of the training."""
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
    """Writes the gallery and its pictures."""
    name, docs = sys.argv[1], ROOT / "docs"
    draw(name, docs / "gallery")
    write_atomically(docs / "gallery.md", gallery(name).encode())


if __name__ == "__main__":
    main()
