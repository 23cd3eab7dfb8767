"""Settings as one flat table of names: read from YAML, overridden by flags, checked, written back.

A group of settings is a frozen dataclass whose fields have docstrings; the names of all groups are
the keys of the YAML file and, with hyphens, the flags of the command line.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .text_files import read_text

Group = TypeVar("Group")
# Settings are a few kilobytes; what YAML is read into takes a hundred times its size.
LARGEST_YAML = 256 * 2**10
DEEPEST_YAML = 20


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is larger than 256 KiB, no YAML, or no mapping; the message names the file.
        ImportError: PyYAML is missing.
    """
    yaml = _yaml()
    path = Path(path)
    try:
        text = read_text(path, LARGEST_YAML)
        _check_tokens(yaml, text)
        content = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config: expected a file, found none: {path}") from error
    except OSError:
        raise
    # PyYAML's own errors are not all that odd values and tags raise in it.
    except Exception as error:
        raise ValueError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: expected settings, one 'name: value' in a line")
    return content


def _check_tokens(yaml: types.ModuleType, text: str) -> None:
    """Refuse what takes PyYAML hours or all memory; a ValueError says what."""
    depth = 0
    for token in yaml.scan(text):
        # A few lines of aliases can stand for more values than there is memory.
        if isinstance(token, yaml.AliasToken):
            raise ValueError("expected no aliases (*name)")
        # The scanner takes a time that grows as the square of the depth.
        kind = type(token).__name__
        depth += kind.endswith(("SequenceStartToken", "MappingStartToken"))
        depth -= kind.endswith(("SequenceEndToken", "MappingEndToken", "BlockEndToken"))
        if depth > DEEPEST_YAML:
            raise ValueError(f"expected at most {DEEPEST_YAML} levels of lists and mappings")


def write_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML that `read_yaml` reads back."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    text: str = _yaml().safe_dump(plain, sort_keys=False, width=96, allow_unicode=True)
    return text


def check_names(settings: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a setting that does not exist.

    Raises:
        ValueError: names it, and the known ones that look alike.
    """
    for name in settings:
        if name not in known:
            alike = difflib.get_close_matches(name, known, 3, 0.7)
            hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
            raise ValueError(f"{name}: there is no such setting{hint}")


def make_group(group: type[Group], settings: Mapping[str, Any]) -> Group:
    """A group from those of the settings that are its own; what is left out has its default.

    Raises:
        ValueError: a value has the wrong type or range, or a setting without a default is missing.
    """
    hints = get_type_hints(group)
    values = {}
    for field in _fields(group):
        if field.name in settings:
            values[field.name] = convert(field.name, settings[field.name], hints[field.name])
        elif field.default is MISSING:
            raise ValueError(f"{field.name}: expected a value, since it has no default")
    return group(**values)


def convert(name: str, value: Any, hint: Any) -> Any:
    """A value of YAML or of the command line as a type; the number 1e-4 is a string to YAML.

    Raises:
        ValueError: it is no such value.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (each for each in inner if each is not type(None))
        return convert(name, value, hint)
    if origin is Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(convert(name, each, inner[0]) for each in value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{name}: expected {_describe(hint)}, got {value!r}")


def add_flags(parser: argparse.ArgumentParser, group: type, *, leave_out: Sequence[str]) -> None:
    """Add a flag for every setting of a group; those that are not given leave no trace.

    Args:
        parser: where to.
        group: a dataclass.
        leave_out: settings without a flag.
    """
    hints, docs = get_type_hints(group), _field_docs(group)
    section = parser.add_argument_group((group.__doc__ or "").split("\n\n")[0].rstrip("."))
    for field in _fields(group):
        if field.name in leave_out:
            continue
        hint, flag = hints[field.name], f"--{field.name.replace('_', '-')}"
        options: dict[str, Any] = {
            # argparse formats help with %.
            "help": docs.get(field.name, "").replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "dest": field.name,
        }
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is tuple:
            options |= {"nargs": "*", "type": _parser(get_args(hint)[0]), "metavar": "VALUE"}
        else:
            options |= {"type": _parser(hint), "metavar": "VALUE"}
        section.add_argument(flag, **options)


def _parser(hint: Any) -> Callable[[str], Any]:
    """What argparse calls on the text of a flag; the checks follow in `convert`."""

    def parse(text: str) -> Any:
        if get_origin(hint) in (Union, types.UnionType) and text.lower() == "none":
            return None
        for kind in (int, float):
            if kind in (hint, *get_args(hint)):
                return kind(text)
        return text

    parse.__name__ = _describe(hint)  # argparse says "invalid .. value"
    return parse


def _describe(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if each is type(None) else _describe(each) for each in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list, each {_describe(inner[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


def _fields(group: type) -> tuple[Field[Any], ...]:
    return fields(group)


def _field_docs(group: type) -> dict[str, str]:
    """The docstrings below the fields of a class, which Python itself does not keep."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(definition, ast.ClassDef)
    docs, name = {}, ""
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr):
            docs[name] = " ".join(str(ast.literal_eval(statement.value)).split())
        else:
            name = ""
    return docs


def _yaml() -> types.ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("recipes need PyYAML: pip install 'coded-resnext[train]'") from error
    module: types.ModuleType = yaml
    return module
