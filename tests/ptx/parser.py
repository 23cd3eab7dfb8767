"""The PTX of one Triton kernel, as basic blocks of instructions with their lines in the source."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LABEL = re.compile(r"([$\w]+):\s*")
_STATEMENT = re.compile(r"(?:@(!?)%?([\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_JUMPS = ("bra", "bra.uni", "ret", "exit")
# Directives of a whole line, of which the executor needs nothing.
_IGNORED = (".pragma", ".file", ".section", ".maxn", ".minn", ".reqntid")


@dataclass
class Instruction:
    """One statement: `@pred opcode operands`."""

    predicate: str | None
    negated: bool
    opcode: str
    operands: list[str]
    text: str
    source: str
    """File and line of the Triton source, as `.loc` names them."""
    line: int
    """Number of the statement's line in the PTX, for reports that count places."""

    @property
    def words(self) -> list[str]:
        """The opcode's parts: `ld.global.v4.b32` has four."""
        return self.opcode.replace("::", "_").split(".")


@dataclass
class Kernel:
    """A kernel of one module, ready to be translated."""

    name: str
    parameters: list[str]
    """Names, in order."""
    threads: int
    registers: dict[str, str]
    """The type of each register, by its name or by the letters that its name begins with."""
    blocks: list[list[Instruction]]
    labels: dict[str, int]
    """The block that each label stands before."""
    shared_symbols: list[str]
    """Names of arrays in shared memory; Triton has one."""

    def type_of(self, register: str) -> str:
        """Returns the type that a register was declared with: `b32`, `pred` and so on."""
        letters = re.fullmatch(r"([A-Za-z_]+)\d*", register)
        return self.registers.get(register) or self.registers[letters[1] if letters else ""]


def split_operands(text: str) -> list[str]:
    """Splits at the commas that are in no bracket."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


@dataclass
class _Body:
    """What has been read of a kernel's body."""

    files: dict[str, str]
    registers: dict[str, str] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    source: str = "?"
    scopes: int = 1

    def label(self, name: str) -> None:
        if name.startswith(("$L__tmp", "$L__func")):
            return
        if self.blocks[-1]:
            self.blocks.append([])
        self.labels[name] = len(self.blocks) - 1

    def statement(self, text: str, line: int) -> None:
        match = _STATEMENT.match(text)
        if match is None:
            raise NotImplementedError(f"PTX statement: {text}")
        negation, predicate, opcode, operands = match.groups()
        instruction = Instruction(
            predicate, negation == "!", opcode, split_operands(operands), text, self.source, line
        )
        self.blocks[-1].append(instruction)
        if opcode in _JUMPS:
            self.blocks.append([])

    def declare(self, text: str) -> None:
        """`.reg .b32 %r<12>`, or a scratch register of inline assembly, `.reg .pred p`."""
        kind, names = text.split(None, 2)[1:]
        for name in names.split(","):
            self.registers[name.strip().lstrip("%").partition("<")[0]] = kind.lstrip(".")

    def read(self, line: str, number: int) -> None:
        """One line without its comment: any number of labels, scopes and statements."""
        while line:
            label = _LABEL.match(line)
            if label:
                self.label(label[1])
                line = line[label.end() :]
            elif line.startswith(".loc"):
                _, file, row = line.split()[:3]
                self.source = f"{self.files.get(file, file)}:{row}"
                return
            elif line.startswith(_IGNORED):
                return
            elif line[0] in "{}":
                self.scopes += 1 if line[0] == "{" else -1
                line = line[1:]
            else:
                text, _, line = line.partition(";")
                if text.startswith(".reg"):
                    self.declare(text)
                elif text.strip():
                    self.statement(text.strip(), number)
            line = line.strip()


def parse(ptx: str) -> Kernel:
    """Returns the kernel of a module that Triton compiled."""
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    files = {
        number: (name or path).rpartition("/")[2]
        for number, path, name in re.findall(
            r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', ptx, re.MULTILINE
        )
    }
    entry = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    if entry is None or threads is None:
        raise NotImplementedError("PTX without an entry, or without its number of threads")
    body = _Body(files)
    start = ptx.index("{", entry.end()) + 1
    for number, line in enumerate(ptx[start:].split("\n"), ptx[:start].count("\n")):
        body.read(line.partition("//")[0].strip(), number)
        # What follows the kernel are sections of debug information.
        if not body.scopes:
            break
    return Kernel(
        name=entry[1],
        parameters=[words.split()[-1] for words in entry[2].split(",") if words.strip()],
        threads=int(threads[1]),
        registers=body.registers,
        blocks=body.blocks,
        labels=body.labels,
        shared_symbols=re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[", ptx),
    )
