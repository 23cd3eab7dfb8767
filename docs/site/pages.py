"""What MkDocs adds to docs/: pages that lie elsewhere in the repository, and links out of it.

The README is the first page. The pages of notebooks are their cells, without outputs. The pages of
commands and settings end with what the code says of them. Shipped weights have their reports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import relpath
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
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


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/, and the reports of the shipped weights."""
    from coded_resnext.interpret.report import gather, render
    from coded_resnext.models.checkpoint import find_model, shipped_weights

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
    from coded_resnext.models.checkpoint import shipped_weights

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
