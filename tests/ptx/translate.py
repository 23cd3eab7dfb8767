"""Translates PTX to steps over NumPy lanes, and runs the programs of a launch.

Each instruction becomes a function of the batch. What `OPERATIONS` lists works lane by lane on
values of one type; all else has a method named after its opcode. An instruction that is in neither
raises NotImplementedError when its block is first run.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from ptx import numerics
from ptx.machine import Batch, Grid, Mask
from ptx.memory import Fault, GlobalMemory, Space
from ptx.numerics import NARROW, WIDTHS, Array, f4, f8, native, storage, u4, u8
from ptx.parser import Instruction, Kernel

Step = Callable[[Batch], None]
Read = Callable[[Batch], Any]
Write = Callable[[Batch, Array], None]
Edges = list[tuple[int, Mask]]

_REGISTER = re.compile(r"%(\w+)")
_IMMEDIATE = re.compile(r"-?(0x[0-9A-Fa-f]+|\d+)U?")
_FLOAT = re.compile(r"0([fFdD])([0-9A-Fa-f]+)")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
# Steps of a batch after which a loop is taken for endless.
MOST_STEPS = 2_000_000


def fused(a: Array, b: Array, c: Array) -> Array:
    """`a b + c` rounded once; of float32 in float64, which rounds twice in rare cases."""
    if a.dtype == f4:
        return (a.astype(f8) * b + c).astype(f4)
    return a * b + c


def exactly(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An approximation of the hardware, computed in float64 instead."""
    return lambda x: function(x.astype(f8)).astype(x.dtype)


OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mul.lo": operator.mul,
    "mul.hi": numerics.multiply_high,
    "mul.wide": numerics.multiply_wide,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: numerics.multiply_wide(a, b) + c,
    "mad": fused,
    "fma": fused,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else numerics.divide(a, b),
    "rem": numerics.remainder,
    "neg": operator.neg,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
    "copysign": lambda sign, size: np.copysign(size, sign),
    "ex2": exactly(np.exp2),
    "lg2": exactly(np.log2),
    "rcp": exactly(np.reciprocal),
    "sqrt": exactly(np.sqrt),
    "rsqrt": exactly(lambda x: 1 / np.sqrt(x)),
    "tanh": exactly(np.tanh),
    "sin": exactly(np.sin),
    "cos": exactly(np.cos),
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "bfi": numerics.insert_bits,
    "bfe": numerics.extract_bits,
    "shl": numerics.shift_left,
    "shr": numerics.shift_right,
    "prmt": numerics.permute_bytes,
}
# Operands that are 32-bit counts whatever the type, by their place from the end.
COUNTS = {"shl": 1, "shr": 1, "bfe": 2, "bfi": 2}
_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda _, new: new,
}
_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
# What changes no value here: order between memories, hints and what one thread does for itself.
_NOTHING = ("membar", "prefetch", "griddepcontrol", "pragma")


def cache_of_lanes(number: Any) -> Read:
    """Returns how to read a number for every lane; nobody writes into what is read."""
    every = cache(lambda lanes: np.full(lanes, number))
    return lambda batch: every(batch.lanes)


def members(text: str) -> list[str]:
    """The registers of a vector operand; a single one of a scalar."""
    return [part.strip() for part in text.strip("{} ").split(",")]


class Translator:
    """Makes the steps of a kernel whose arguments are bound."""

    def __init__(self, kernel: Kernel, arguments: dict[str, int]) -> None:
        self.kernel, self.arguments = kernel, arguments
        opcodes = (ins.words[0] for block in kernel.blocks for ins in block)
        self.has_wgmma = "wgmma" in opcodes

    # ---- operands

    def read(self, text: str, kind: str) -> Read:
        """Returns how to read an operand as values of a type, as `numerics.from_bits` has them."""
        bits = self._bits(text, WIDTHS[kind])
        if (kind[0] in "bu" and kind not in NARROW) or kind == "pred":
            return bits
        if kind in NARROW:
            return lambda batch: numerics.from_bits(bits(batch), kind)
        dtype = native(kind)
        return lambda batch: bits(batch).view(dtype)

    def _bits(self, text: str, width: int) -> Read:
        number = self._number(text, width)
        if number is not None:
            return cache_of_lanes(number)
        name, _, extra = text.partition("+")
        if name in self.kernel.shared_symbols:
            if len(self.kernel.shared_symbols) > 1:
                raise NotImplementedError("several arrays in shared memory")
            return cache_of_lanes(storage(width)(int(extra or "0", 0)))
        name = text.lstrip("%").replace("$", "_")
        if text.startswith(("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid")):
            return lambda batch: batch.special(name)
        own = WIDTHS[self.kernel.type_of(name)]
        read = self._register(name, own)
        if own == width:
            return read
        # A narrower type takes the lower bits, a wider one zeros above them.
        dtype = storage(width)
        return lambda batch: read(batch).astype(dtype)

    @staticmethod
    def _register(name: str, width: int) -> Read:
        garbage = storage(width)(0xDEADBEEFDEADBEEF & ((1 << 8 * width) - 1))

        def read(batch: Batch) -> Array:
            value = batch.registers.get(name)
            # A register that holds nothing yet, as before the first trip of a loop.
            return np.full(batch.lanes, garbage) if value is None else value

        return read

    @staticmethod
    def _number(text: str, width: int) -> Any:
        """The bits of an immediate operand; None if it is none."""
        real = _FLOAT.fullmatch(text)
        if real:
            return storage(len(real[2]) // 2)(int(real[2], 16)) if real[1] else None
        if not _IMMEDIATE.fullmatch(text):
            return None
        return storage(width)(int(text.rstrip("U"), 0) & ((1 << 8 * width) - 1 if width else 1))

    def write(self, target: str, kind: str, ins: Instruction, rounding: str | None = "rn") -> Write:
        """Returns how to assign values of a type to a register, in the active lanes alone."""
        if target == "_":
            return lambda batch, values: None
        name = target.lstrip("%").replace("$", "_")
        own = WIDTHS[self.kernel.type_of(name)]
        before, active = self._register(name, own), self.active(ins)
        dtype = storage(own)
        # A signed type keeps its sign in a wider register.
        wide = native(f"s{8 * own}") if kind[0] == "s" and own > WIDTHS[kind] else None

        def assign(batch: Batch, values: Array) -> None:
            if wide is not None:
                bits = values.astype(wide).view(dtype)
            else:
                bits = numerics.to_bits(values, kind, rounding)
                bits = bits if bits.dtype == dtype else bits.astype(dtype)
            mask = active(batch)
            batch.registers[name] = bits if mask is None else np.where(mask, bits, before(batch))

        return assign

    def active(self, ins: Instruction) -> Callable[[Batch], Mask]:
        """Returns how to tell which lanes an instruction is for."""
        if ins.predicate is None:
            return lambda batch: batch.mask
        read = self.read(ins.predicate, "pred")

        def mask(batch: Batch) -> Mask:
            chosen = ~read(batch) if ins.negated else read(batch)
            return chosen if batch.mask is None else chosen & batch.mask

        return mask

    def vector(self, text: str, kind: str) -> Callable[[Batch], list[Array]]:
        """Returns how to read all registers of a vector operand."""
        reads = [self.read(part, kind) for part in members(text)]
        return lambda batch: [read(batch) for read in reads]

    def write_vector(self, text: str, kind: str, ins: Instruction) -> Callable[..., None]:
        """Returns how to assign a list of values to the registers of a vector operand."""
        writes = [self.write(part, kind, ins) for part in members(text)]

        def assign(batch: Batch, values: list[Array]) -> None:
            for write, value in zip(writes, values, strict=True):
                write(batch, value)

        return assign

    def address(self, text: str, wide: bool) -> Read:
        """Returns how to read `[register + number]`; shared memory has addresses of 32 bits."""
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise NotImplementedError(f"address {text}")
        kind = "u64" if wide else "u32"
        base, extra = self.read(match[1], kind), self.read(match[2] or "0", kind)
        return base if match[2] is None else lambda batch: base(batch) + extra(batch)

    # ---- instructions

    def step(self, ins: Instruction) -> Step | None:
        """Returns what an instruction does; None if it does nothing."""
        words = ins.words
        if words[0] in _NOTHING:
            return None
        special = getattr(self, f"_{words[0]}", self._lanewise)
        try:
            step: Step | None = special(ins, words)
            return self._watched(ins, step) if self.has_wgmma and step else step
        except (KeyError, IndexError, StopIteration) as error:
            raise NotImplementedError(f"{ins.text} at {ins.source}: {error!r}") from error

    @staticmethod
    def _watched(ins: Instruction, step: Step) -> Step:
        """The step in a kernel with `wgmma`, whose sums may be used when they are waited for."""
        if ins.words[0] == "wgmma":
            return step
        names = set(_REGISTER.findall(" ".join(ins.operands)))

        def run(batch: Batch) -> None:
            if batch.totals:
                batch.touch(names, ins)
            step(batch)

        return run

    def _lanewise(self, ins: Instruction, words: list[str]) -> Step:
        name, kind = words[0], words[-1]
        modifier = next((f"{name}.{m}" for m in words if f"{name}.{m}" in OPERATIONS), name)
        function = OPERATIONS[modifier]
        if "sat" in words:
            raise NotImplementedError(ins.text)
        if modifier == "prmt":
            kind = "b32"
        result = kind if "wide" not in words else f"{kind[0]}{16 * WIDTHS[kind]}"
        sources = ins.operands[1:]
        kinds = [kind] * len(sources)
        for place in range(COUNTS.get(name, 0)):
            kinds[-1 - place] = "u32"
        if modifier == "mad.wide":
            kinds[2] = result
        reads = [self.read(text, own) for text, own in zip(sources, kinds, strict=True)]
        write = self.write(ins.operands[0], result, ins)
        rectified = "relu" in words

        def run(batch: Batch) -> None:
            values = function(*[read(batch) for read in reads])
            write(batch, np.maximum(values, 0) if rectified else values)

        return run

    def _mov(self, ins: Instruction, words: list[str]) -> Step:
        kind = words[-1]
        target, source = ins.operands
        if kind != "pred":
            kind = f"b{8 * WIDTHS[kind]}"
        if target.startswith("{"):
            parts = len(members(target))
            size = WIDTHS[kind] // parts
            read, writes = self.read(source, kind), self.write_vector(target, f"b{8 * size}", ins)

            def split(batch: Batch) -> None:
                pieces = np.ascontiguousarray(read(batch)).view(storage(size)).reshape(-1, parts)
                writes(batch, [pieces[:, index].copy() for index in range(parts)])

            return split
        write = self.write(target, kind, ins)
        if source.startswith("{"):
            each = self.vector(source, f"b{8 * WIDTHS[kind] // len(members(source))}")
            dtype = storage(WIDTHS[kind])
            return lambda batch: write(batch, np.stack(each(batch), 1).view(dtype)[:, 0])
        read = self.read(source, kind)
        return lambda batch: write(batch, read(batch))

    def _selp(self, ins: Instruction, words: list[str]) -> Step:
        kind = f"b{8 * WIDTHS[words[-1]]}"
        first, second = (self.read(text, kind) for text in ins.operands[1:3])
        choice, write = self.read(ins.operands[3], "pred"), self.write(ins.operands[0], kind, ins)
        return lambda batch: write(batch, np.where(choice(batch), first(batch), second(batch)))

    def _setp(self, ins: Instruction, words: list[str]) -> Step:
        kind, relation = words[-1], words[1]
        joins = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
        join = next((joins[word] for word in words[2:-1] if word in joins), None)
        a, b = (self.read(text, kind) for text in ins.operands[1:3])
        third = self.read(ins.operands[3], "pred") if join else None
        writes = [self.write(text, "pred", ins) for text in ins.operands[0].split("|")]
        pairs = kind.endswith("x2")
        if len(writes) != 1 + pairs:
            raise NotImplementedError(ins.text)

        def run(batch: Batch) -> None:
            result = numerics.compare(a(batch), b(batch), relation)
            for index, write in enumerate(writes):
                own = result[:, index] if pairs else result
                write(batch, join(own, third(batch)) if join and third else own)

        return run

    def _cvt(self, ins: Instruction, words: list[str]) -> Step:
        roundings = ("rn", "rz", "rna", *numerics.WHOLE)
        rounding = next((word for word in words if word in roundings), None)
        to, source = (word for word in words[1:] if word in WIDTHS)
        if {"sat", "satfinite", "relu", "rm", "rp"} & set(words):
            raise NotImplementedError(ins.text)
        write = self.write(ins.operands[0], to, ins, rounding)
        if to in ("f16x2", "bf16x2"):
            # The first operand is the upper half.
            high, low = (self.read(text, source) for text in ins.operands[1:])
            return lambda batch: write(batch, np.stack([low(batch), high(batch)], 1))
        read = self.read(ins.operands[1], source)
        if to == "tf32":
            bits = self.read(ins.operands[1], "u32")
            return lambda batch: write(batch, (bits(batch) + u4(0x1000)) & u4(0xFFFFE000))
        if to[0] in "su" and source[0] not in "su":
            dtype = native(to)
            return lambda batch: write(
                batch, numerics.to_integer(read(batch), dtype, rounding or "rzi")
            )
        if rounding in numerics.WHOLE:
            whole = numerics.WHOLE[rounding]
            return lambda batch: write(batch, whole(read(batch)))
        if to[0] in "su":
            dtype = native(to)
            return lambda batch: write(batch, read(batch).astype(dtype))
        exact = source[0] in "su" and WIDTHS[source] < 8
        return lambda batch: write(batch, read(batch).astype(f8) if exact else read(batch))

    def _shf(self, ins: Instruction, words: list[str]) -> Step:
        low, high, count = (self.read(text, "u32") for text in ins.operands[1:])
        write = self.write(ins.operands[0], "b32", ins)
        how = {"left": words[1] == "l", "wrap": words[2] == "wrap"}
        return lambda batch: write(
            batch, numerics.funnel(low(batch), high(batch), count(batch), **how)
        )

    def _lop3(self, ins: Instruction, words: list[str]) -> Step:
        reads = [self.read(text, "b32") for text in ins.operands[1:4]]
        table, write = int(ins.operands[4], 0), self.write(ins.operands[0], "b32", ins)
        return lambda batch: write(
            batch, numerics.logic3(*(read(batch) for read in reads), table=table)
        )

    def _popc(self, ins: Instruction, words: list[str]) -> Step:
        read, write = self.read(ins.operands[1], words[-1]), self.write(ins.operands[0], "u32", ins)
        return lambda batch: write(batch, np.bitwise_count(read(batch)))

    # ---- memory

    @staticmethod
    def _space(words: list[str]) -> Callable[[Batch], Space]:
        shared = any(word.startswith("shared") for word in words)
        return lambda batch: batch.shared if shared else batch.memory

    def _ld(self, ins: Instruction, words: list[str]) -> Step:
        size = WIDTHS[words[-1]]
        target, source = ins.operands[:2]
        if words[1] == "param":
            value = storage(size)(self.arguments[source.strip("[] ")] & ((1 << 8 * size) - 1))
            write = self.write(target, f"b{8 * size}", ins)
            return lambda batch: write(batch, np.full(batch.lanes, value))
        space, active = self._space(words), self.active(ins)
        address = self.address(source, "shared" not in words[1])
        kind = words[-1] if words[-1][0] == "s" else f"b{8 * size}"
        count, writes = len(members(target)), self.write_vector(target, kind, ins)
        dtype = native(kind)

        def run(batch: Batch) -> None:
            data = batch.load(space(batch), address(batch), size, count, active(batch), ins)
            writes(batch, [data[:, index].copy().view(dtype) for index in range(count)])

        return run

    def _st(self, ins: Instruction, words: list[str]) -> Step:
        space, active = self._space(words), self.active(ins)
        address = self.address(ins.operands[0], not any(w.startswith("shared") for w in words))
        values = self.vector(ins.operands[1], f"b{8 * WIDTHS[words[-1]]}")
        return lambda batch: batch.store(
            space(batch), address(batch), values(batch), active(batch), ins
        )

    def _atom(self, ins: Instruction, words: list[str]) -> Step:
        kind = words[-1]
        name = next(word for word in words if word in _ATOMIC or word == "cas")
        if "global" not in words or (kind in NARROW and kind != "f16"):
            raise NotImplementedError(ins.text)
        operands = list(ins.operands)
        target = operands.pop(0) if words[0] == "atom" else "_"
        dtype = f"b{8 * WIDTHS[kind]}" if kind == "b32" else kind
        address, active = self.address(operands[0], True), self.active(ins)
        values = [self.vector(text, dtype) for text in operands[1:]]
        write = self.write(members(target)[0], dtype, ins)

        def run(batch: Batch) -> None:
            given = [value(batch)[0] for value in values]

            def change(old: Any, lane: int) -> Any:
                if name == "cas":
                    return given[1][lane] if old == given[0][lane] else old
                return _ATOMIC[name](old, given[0][lane])

            write(batch, batch.atomic(change, address(batch), given[0], active(batch), ins))

        return run

    _red = _atom

    def _cp(self, ins: Instruction, words: list[str]) -> Step:
        active = self.active(ins)
        if words[2] == "commit_group":
            return lambda batch: batch.commit_copies(active(batch))
        if words[2] in ("wait_group", "wait_all"):
            pending = int(ins.operands[0], 0) if ins.operands else 0
            every = words[2] == "wait_all"
            return lambda batch: batch.wait_for_copies(pending, active(batch), every)
        if words[2] not in ("ca", "cg"):
            raise NotImplementedError(ins.text)
        to, source = self.address(ins.operands[0], False), self.address(ins.operands[1], True)
        size = int(ins.operands[2], 0)
        # Behind the size may stand that of the source, and a hint for the cache.
        extra = ins.operands[3] if len(ins.operands) > 3 else ins.operands[2]
        used = self.read(ins.operands[2] if extra.startswith("%rd") else extra, "u32")
        return lambda batch: batch.copy(
            to(batch), source(batch), size, used(batch), active(batch), ins
        )

    # ---- warps and programs

    def _bar(self, ins: Instruction, words: list[str]) -> Step | None:
        active = self.active(ins)
        if words[1] == "warp" and self.kernel.threads > 32:
            return None
        if len(ins.operands) > 1 and words[1] != "warp":
            raise NotImplementedError(f"a barrier of some threads: {ins.text}")
        return lambda batch: batch.barrier(active(batch), ins)

    _barrier = _bar

    def _shfl(self, ins: Instruction, words: list[str]) -> Step:
        targets = ins.operands[0].split("|")
        x, choice, clamp = (self.read(text, "b32") for text in ins.operands[1:4])
        active, write = self.active(ins), self.write(targets[0], "b32", ins)
        exists = self.write(targets[1], "pred", ins) if len(targets) > 1 else None

        def run(batch: Batch) -> None:
            value, there = batch.shuffle(
                words[2], x(batch), choice(batch), clamp(batch), active(batch), ins
            )
            write(batch, value)
            if exists is not None:
                exists(batch, there)

        return run

    def _redux(self, ins: Instruction, words: list[str]) -> Step:
        read, write = (
            self.read(ins.operands[1], words[-1]),
            self.write(ins.operands[0], words[-1], ins),
        )
        reduce = _REDUCTIONS[words[2]].reduce
        return lambda batch: write(
            batch,
            np.repeat(reduce(read(batch).reshape(-1, 32), axis=1), 32).astype(native(words[-1])),
        )

    def _vote(self, ins: Instruction, words: list[str]) -> Step:
        read = self.read(ins.operands[1], "pred")
        ballot = words[2] == "ballot"
        write = self.write(ins.operands[0], "b32" if ballot else "pred", ins)

        def run(batch: Batch) -> None:
            warps = read(batch).reshape(-1, 32)
            if ballot:
                result = (warps << np.arange(32, dtype=u4)).sum(1).astype(u4)
            else:
                result = {"any": warps.any, "all": warps.all}[words[2]](1)
            write(batch, np.repeat(result, 32))

        return run

    def _createpolicy(self, ins: Instruction, words: list[str]) -> Step:
        write = self.write(ins.operands[0], "b64", ins)
        return lambda batch: write(batch, np.zeros(batch.lanes, u8))

    def _fence(self, ins: Instruction, words: list[str]) -> Step | None:
        if words[1] != "proxy":
            return None
        return lambda batch: batch.shared.unfenced.fill(False)

    # ---- matrices

    def _ldmatrix(self, ins: Instruction, words: list[str]) -> Step:
        address, active = self.address(ins.operands[1], False), self.active(ins)
        count, transposed = len(members(ins.operands[0])), "trans" in words
        writes = self.write_vector(ins.operands[0], "b32", ins)
        return lambda batch: writes(
            batch, batch.load_matrices(address(batch), count, transposed, active(batch), ins)
        )

    def _stmatrix(self, ins: Instruction, words: list[str]) -> Step:
        address, active = self.address(ins.operands[0], False), self.active(ins)
        values, transposed = self.vector(ins.operands[1], "b32"), "trans" in words
        return lambda batch: batch.store_matrices(
            address(batch), values(batch), transposed, active(batch), ins
        )

    def _mma(self, ins: Instruction, words: list[str]) -> Step:
        shape = next(word for word in words if word.startswith("m16n8k"))
        result, kind, _, total = words[words.index("col") + 1 :][:4]
        if (result, total) != ("f32", "f32"):
            raise NotImplementedError(ins.text)
        a, b, c = (self.vector(text, "b32") for text in ins.operands[1:4])
        writes = self.write_vector(ins.operands[0], "b32", ins)
        k = int(shape.removeprefix("m16n8k"))
        return lambda batch: writes(batch, numerics.mma(k, kind, a(batch), b(batch), c(batch)))

    def _wgmma(self, ins: Instruction, words: list[str]) -> Step | None:
        if words[1] == "fence":
            return None
        if words[1] == "commit_group":
            return lambda batch: batch.commit_products()
        if words[1] == "wait_group":
            pending = int(ins.operands[0], 0)
            return lambda batch: batch.wait_for_products(pending)
        target, first, second, used, *flags = ins.operands
        if (
            words[-3] != "f32"
            or words[-1] not in ("f16", "bf16", "tf32")
            or flags[:2] != ["1", "1"]
        ):
            raise NotImplementedError(ins.text)
        registers = first.startswith("{")
        a: Any = self.vector(first, "b32") if registers else self.read(first, "b64")
        b, total, keep = (
            self.read(second, "b64"),
            self.vector(target, "b32"),
            self.read(used, "pred"),
        )
        # Those of `a` are there for a matrix in memory alone.
        turned = [flag == "1" for flag in flags[2:]]
        transposed = (turned[0] if len(turned) > 1 else False, turned[-1] if turned else False)
        writes, active = self.write_vector(target, "b32", ins), self.active(ins)

        def run(batch: Batch) -> None:
            if active(batch) is not None:
                raise NotImplementedError(f"{ins.text} of some programs")
            writes(
                batch,
                batch.wgmma(
                    words[-1], total(batch), a(batch), b(batch), keep(batch), transposed, ins
                ),
            )

        return run


class Program:
    """A kernel with its arguments, whose blocks are translated when they are first run."""

    def __init__(self, kernel: Kernel, arguments: dict[str, int]) -> None:
        self.kernel = kernel
        self.translator = Translator(kernel, arguments)
        self.blocks: dict[int, tuple[list[Step], Callable[[Batch], Edges]]] = {}

    def _translated(self, index: int) -> tuple[list[Step], Callable[[Batch], Edges]]:
        """The steps of a block, and where its lanes go from it."""
        if index not in self.blocks:
            block = self.kernel.blocks[index]
            last = block[-1] if block else None
            jumps = last is not None and last.words[0] in ("bra", "ret", "exit")
            body = block[:-1] if jumps else block
            steps = [step for ins in body if (step := self.translator.step(ins)) is not None]
            self.blocks[index] = steps, self._exits(index, last if jumps else None)
        return self.blocks[index]

    def _exits(self, index: int, jump: Instruction | None) -> Callable[[Batch], Edges]:
        if jump is None:
            return lambda batch: [(index + 1, batch.mask)]
        if jump.words[0] != "bra":
            if jump.predicate is not None:
                raise NotImplementedError(jump.text)
            return lambda batch: []
        target = self.kernel.labels[jump.operands[0]]
        if jump.predicate is None:
            return lambda batch: [(target, batch.mask)]
        active = self.translator.active(jump)

        def branch(batch: Batch) -> Edges:
            taken = active(batch)
            assert taken is not None
            rest = ~taken if batch.mask is None else batch.mask & ~taken
            return [
                (at, lanes) for at, lanes in ((target, taken), (index + 1, rest)) if lanes.any()
            ]

        return branch

    def run(self, batch: Batch) -> None:
        """Runs all lanes; where they part, those in the earliest block go first."""
        waiting: dict[int, Mask] = {0: None}
        for _ in range(MOST_STEPS):
            if not waiting:
                return
            index = min(waiting)
            batch.mask = waiting.pop(index)
            if index >= len(self.kernel.blocks):
                continue
            if batch.mask is not None and batch.mask.all():
                batch.mask = None
            steps, exits = self._translated(index)
            for step in steps:
                step(batch)
            for target, lanes in exits(batch):
                there = waiting.get(target)
                waiting[target] = lanes if there is None or lanes is None else there | lanes
        raise RuntimeError(f"{self.kernel.name}: an endless loop")


def accesses(kernel: Kernel, shared: bool) -> Iterator[int]:
    """The widths in bytes of a kernel's accesses of one memory."""
    for ins in (ins for block in kernel.blocks for ins in block):
        words = ins.words
        if words[0] == "cp" and words[2] in ("ca", "cg"):
            # A source of fewer bytes is read byte by byte.
            yield int(ins.operands[2], 0) if shared or len(ins.operands) == 3 else 1
        elif words[0] in ("ld", "st", "atom", "red") and words[1] != "param":
            vector = ins.operands[0 if words[0] == "ld" else 1]
            count = len(members(vector)) if words[0] in ("ld", "st") else 1
            if any(word.startswith("shared") for word in words) == shared:
                yield WIDTHS[words[-1]] * count


def run_grid(
    kernel: Kernel,
    arguments: dict[str, int],
    memory: GlobalMemory,
    programs: Array,
    grid: Grid,
    shared_bytes: int,
    lanes: int,
) -> list[Fault]:
    """Runs programs of a launch, so many lanes of them at once; what the checks have seen.

    Args:
        programs: `[count, 3]`, their places in the grid.
    """
    program = Program(kernel, arguments)
    granule = min(accesses(kernel, shared=True), default=16)
    faults: dict[tuple[str, int], Fault] = {}
    together = max(1, lanes // kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(programs), together):
            part = programs[first : first + together]
            batch = Batch(kernel, memory, faults, part, grid, shared_bytes, granule)
            program.run(batch)
            if batch.copies:
                batch.fault(
                    "cp.async that is never waited for",
                    batch.copies[0].instruction,
                    batch.copies[0].lanes,
                    "",
                )
    return list(faults.values())
