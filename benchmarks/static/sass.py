"""Machine code of a compiled kernel: what its instructions are, and those of its main loop.

NVIDIA's disassembler comes with Triton. AMD code is read from the assembly that Triton keeps, and
what lanes add up from PTX.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LANES = 32
# mma, wgmma and tcgen05 of NVIDIA, in SASS; matrix instructions of AMD.
MATRIX = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCOMMA|v_mfma|v_smfmac)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its name, and the address that it jumps to, if any."""

    address: int
    name: str
    target: int | None = None

    @property
    def is_matrix(self) -> bool:
        """Returns whether it multiplies matrices on tensor cores."""
        return MATRIX.match(self.name) is not None

    @property
    def products(self) -> float:
        """Returns the multiply-accumulates that a warp does with it on tensor cores, 0 where it
        does not say.

        A Hopper instruction is issued by each of the four warps that share its work.
        """
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.name):
            return int(shape[1]) * int(shape[2]) * int(shape[3]) / 4
        if shape := re.match(r"HMMA\.(16)(8)(16|8|4)\b", self.name):
            return int(shape[1]) * int(shape[2]) * int(shape[3])
        return 0.0

    @property
    def global_bytes(self) -> int:
        """Returns the bytes of global memory that a thread moves with it, 0 for every other
        instruction.

        A bulk copy (TMA) does not say how much it moves, and counts as 0.
        """
        # LDGDEPBAR closes a group of copies.
        if self.name.startswith(("LDG", "STG")) and self.name != "LDGDEPBAR":
            for size in (128, 64):
                if f".{size}" in self.name:
                    return size // 8
            for mark, size in ((".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
                if mark in self.name:
                    return size
            return 4
        suffix = re.match(r"(?:global|buffer)_(?:load|store)_(.*)", self.name)
        if suffix is None:
            return 0
        for mark, size in (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("dword", 4)):
            if mark in suffix[1]:
                return size
        return 2 if "short" in suffix[1] or "16" in suffix[1] else 1


@dataclass(frozen=True)
class Code:
    """A kernel's code and what it takes of the machine."""

    instructions: Sequence[Instruction]
    registers: int
    spilled: int
    """Instructions that move registers to memory and back."""
    lanes: int

    def loops(self) -> list[Sequence[Instruction]]:
        """Bodies of the loops, smallest first: from the target of a backward jump to the jump."""
        index = {item.address: n for n, item in enumerate(self.instructions)}
        bodies = [
            self.instructions[index[item.target] : n + 1]
            for n, item in enumerate(self.instructions)
            if item.target is not None and item.target < item.address and item.target in index
        ]
        return sorted(bodies, key=len)

    def main_loop(self) -> Sequence[Instruction]:
        """Returns the smallest loop that multiplies matrices, or else the one that moves most
        bytes.

        A kernel without a loop that does either is its own main loop.
        """
        loops = self.loops()
        for body in loops:
            if any(item.is_matrix for item in body) and moved_bytes(body) > 0:
                return body
        busiest = max(loops, key=moved_bytes, default=self.instructions)
        return busiest if moved_bytes(busiest) > 0 else self.instructions


def moved_bytes(body: Sequence[Instruction]) -> int:
    """Returns the bytes of global memory that a thread moves in one pass through a body."""
    return sum(item.global_bytes for item in body)


def load_widths(body: Sequence[Instruction]) -> Counter[int]:
    """Returns how many global loads of a body have which width, in bytes a thread."""
    return Counter(
        item.global_bytes
        for item in body
        if item.global_bytes and item.name.startswith(("LDG", "global_load", "buffer_load"))
    )


def read_code(folder: Path) -> Code:
    """Returns the code of the kernel whose files lie in a folder of Triton's cache."""
    for path in folder.glob("*.cubin"):
        return _read_cubin(path)
    (path,) = folder.glob("*.amdgcn")
    return _read_amdgcn(path.read_text(encoding="utf-8"))


def _read_cubin(path: Path) -> Code:
    command = [str(TOOL), "-sass", "-res-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, path
    instructions = list(_parse_sass(text))
    spilled = sum(item.name.startswith(("LDL", "STL")) for item in instructions)
    return Code(instructions, int(usage[1]), spilled, LANES)


def _parse_sass(text: str) -> Iterator[Instruction]:
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)([^;]*);", re.M)
    for address, name, operands in pattern.findall(text):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        instruction = Instruction(int(address, 16), name, int(target[1], 16) if target else None)
        # Behind the end stands a jump to itself, then padding.
        if instruction.target == instruction.address:
            return
        yield instruction


def _parse_amdgcn(text: str) -> Iterator[Instruction]:
    """Yields instructions in order; a label is the address of what follows it."""
    body = text.partition("s_endpgm")[0]
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in body.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif item := re.match(r"\t([vs]_\w+|(?:global|buffer|ds|flat|scratch)_\w+)(.*)", line):
            code.append((item[1], item[2].strip()))
    for address, (name, operands) in enumerate(code):
        target = labels.get(operands.split()[0]) if "branch" in name and operands else None
        yield Instruction(address, name, target)


def _read_amdgcn(text: str) -> Code:
    def number(field: str) -> int:
        match = re.search(rf"\.{field}:\s+(\d+)", text)
        assert match is not None, field
        return int(match[1])

    return Code(
        list(_parse_amdgcn(text)),
        number("vgpr_count"),
        number("vgpr_spill_count") + number("sgpr_spill_count"),
        64,
    )


def unequal_sums(ptx: str) -> int:
    """Additions between lanes in PTX that come to different last bits in each of them.

    `fma(a, b, shuffle(a * b))` adds the rounded product of another lane to an unrounded one, while
    the other lane rounds the one that it keeps. Which lane's sum is stored where several store one
    address is undefined, so that a repeated launch need not give the same bits.
    """
    factors: dict[str, tuple[str, ...]] = {}
    received: dict[str, tuple[str, ...]] = {}
    count = 0
    for name, operands in re.findall(
        r"^\s*(?:@\S+\s+)?([a-z][\w.:]*)\s+([^;]*);", ptx, re.MULTILINE
    ):
        target, *sources = (operand.strip() for operand in operands.split(","))
        factors.pop(target, None)
        received.pop(target.partition("|")[0], None)
        if name.startswith("mul") and name.endswith(".f32"):
            factors[target] = tuple(sorted(sources))
        elif name.startswith("shfl.sync") and sources[0] in factors:
            received[target.partition("|")[0]] = factors[sources[0]]
        elif name.startswith("fma") and name.endswith(".f32"):
            count += received.get(sources[2]) == tuple(sorted(sources[:2]))
    return count
