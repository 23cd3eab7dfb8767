"""Memory that knows who wrote and who read what: the checks of compute-sanitizer, and more.

Memory is cut into granules of the narrowest access that a kernel makes. Each remembers its last
writer and reader as a stamp (program, phase, lane): a phase ends at a barrier of the program. Two
accesses of one granule, at least one of them a store, are ordered when the same lane makes both or
a barrier lies between; those of two programs are never.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx.numerics import Array, i8, storage, u1

# Uninitialised bytes, in turn: NaN in every floating dtype, as in support.guarded_memory.
POISON = (0xFD, 0x7F)
LANE_BITS, PHASE_BITS = 12, 20
# In a stamp: more than one lane, more than one program.
SEVERAL_LANES = (1 << LANE_BITS) - 1
SEVERAL_PROGRAMS = ((1 << 31) - 1) << (LANE_BITS + PHASE_BITS)


def stamp(program: Array, phase: Array, lane: Array) -> Array:
    """Who accesses, as one number."""
    return (program.astype(i8) << (LANE_BITS + PHASE_BITS)) | (phase << LANE_BITS) | lane


def poisoned(size: int) -> Array:
    """Bytes that nobody has written."""
    return np.resize(np.array(POISON, u1), size)


@dataclass
class Fault:
    """What a check has seen at one instruction of a kernel."""

    kernel: str
    kind: str
    text: str
    """The instruction."""
    source: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        where = f"{self.kernel}: {self.kind} (x{self.count})"
        return f"{where}\n    {self.text}\n    {self.source}; {self.detail}"


class Shadow:
    """Who last wrote and read each granule."""

    def __init__(self, granules: int) -> None:
        self.writer = np.full(granules, -1, i8)
        self.reader = np.full(granules, -1, i8)
        self.atomic = np.zeros(granules, bool)
        """Whether the last store was an atomic operation."""

    @staticmethod
    def _conflicts(earlier: Array, now: Array) -> tuple[Array, Array]:
        """Which accesses another lane made without a barrier between, and which another program."""
        differs = np.where(earlier < 0, 0, earlier ^ now)
        return (differs > 0) & (differs <= SEVERAL_LANES), differs >> (LANE_BITS + PHASE_BITS) > 0

    def read(self, at: Array, now: Array) -> dict[str, Array]:
        """Notes reads of `at [lanes, granules]` by stamps of that shape; the conflicts by kind."""
        lanes, programs = self._conflicts(self.writer[at], now)
        earlier = self.reader[at]
        together, elsewhere = self._conflicts(earlier, now)
        merged = np.where(together, now | SEVERAL_LANES, now)
        merged = np.where(elsewhere, SEVERAL_PROGRAMS | merged, merged)
        self.reader[at] = merged
        # Lanes of this very instruction that read the same granule.
        lost = self.reader[at] != merged
        if lost.any():
            together, elsewhere = self._conflicts(self.reader[at], merged)
            both = merged | SEVERAL_LANES
            both = np.where(elsewhere, SEVERAL_PROGRAMS | both, both)
            self.reader[at[lost]] = both[lost]
        return {"read-after-write": lanes, "read of another program's store": programs}

    def write(self, at: Array, now: Array, atomic: bool = False) -> dict[str, Array]:
        """As `read`, of stores. Atomic operations do not conflict with one another."""
        after_write, others = self._conflicts(self.writer[at], now)
        after_read, readers = self._conflicts(self.reader[at], now)
        if atomic:
            both = self.atomic[at]
            after_write, others = after_write & ~both, others & ~both
            after_read, readers = after_read & ~both, readers & ~both
        self.writer[at] = now
        self.atomic[at] = atomic
        if not atomic:
            # Programs whose lanes store to one granule by this very instruction.
            others |= self._conflicts(self.writer[at], now)[1]
        return {
            "write-after-write": after_write,
            "write-after-read": after_read,
            "store to what another program stored": others,
            "store to what another program read": readers,
        }


class Space:
    """Bytes with shadows, where accesses of `width` bytes are checked lane by lane."""

    def __init__(self, name: str, size: int, granule: int) -> None:
        self.name, self.size, self.granule = name, size, granule
        self.bytes = poisoned(size)
        self.shadow = Shadow(size // granule)
        self.written = np.zeros(size // granule, bool)
        """Which granules hold something."""

    def granules(self, offset: Array, width: int) -> Array:
        """Those that accesses touch, `[lanes, granules]`."""
        return offset[:, None] // self.granule + np.arange(max(1, width // self.granule))

    def cells(self, width: int) -> Array:
        """The memory as rows of so many bytes, which an aligned access is one of."""
        return self.bytes[: self.size // width * width].reshape(-1, width)

    def load(self, offset: Array, width: int) -> Array:
        """Bytes `[lanes, width]`, without a check."""
        return self.cells(width)[offset // width]

    def store(self, offset: Array, data: Array) -> Array:
        """Stores bytes `[lanes, width]`; which lanes find other bytes at their place after it."""
        width = data.shape[1]
        cells, at = self.cells(width), offset // width
        cells[at] = data
        self.written[self.granules(offset, width)] = True
        return (cells[at] != data).any(1)


@dataclass
class Storage:
    """The memory of one or several tensors of a launch."""

    name: str
    address: int
    """On this machine."""
    data: Array
    """Its bytes, shared with the tensors."""
    spans: list[tuple[int, int]]
    """What the tensors cover; the rest is out of bounds."""
    written: Array
    """Which bytes are initialised."""
    start: int = 0
    """Offset in `GlobalMemory`."""


class GlobalMemory(Space):
    """All storages of a launch, with guards between them. Addresses are made up."""

    BASE = 0x7F00_0000_0000
    GUARD = 4096
    ALIGNMENT = 512
    """Of an allocation, as CUDA has it."""

    def __init__(self, storages: list[Storage], granule: int) -> None:
        end = self.GUARD
        for item in storages:
            item.start = end
            end = end + item.data.size + self.GUARD
            end += -end % self.ALIGNMENT
        super().__init__("global", end + self.GUARD, granule)
        self.storages = storages
        self.valid = np.zeros(self.size, bool)
        self.stored = np.zeros(self.size, bool)
        """Bytes that the launch has written."""
        for item in storages:
            inside = slice(item.start, item.start + item.data.size)
            self.bytes[inside] = item.data
            for low, high in item.spans:
                self.valid[item.start + low : item.start + high] = True
            head, tail = (-item.start) % granule, item.data.size // granule * granule
            whole = item.written[head:tail].reshape(-1, granule).all(1)
            self.written[inside.start // granule : inside.start // granule + whole.size] = whole

    def address_of(self, pointer: int) -> int:
        """Returns the made-up address of one on this machine."""
        for item in self.storages:
            if item.address <= pointer < item.address + item.data.size:
                return self.BASE + item.start + pointer - item.address
        # Of an empty tensor: an address that is good for nothing.
        return self.BASE

    def in_bounds(self, offset: Array, width: int) -> Array:
        inside = (offset >= 0) & (offset + width <= self.size)
        safe = np.where(inside, offset, 0)
        return inside & self.valid[safe] & self.valid[np.minimum(safe + width, self.size) - 1]

    def describe(self, offset: int) -> str:
        """Names a place by the storage that is nearest."""

        def distance(item: Storage) -> int:
            return max(item.start - offset, offset - item.start - item.data.size + 1, 0)

        item = min(self.storages, key=distance, default=None)
        return f"byte {offset - item.start} of {item.data.size} of {item.name}" if item else "?"

    def store(self, offset: Array, data: Array) -> Array:
        lost = super().store(offset, data)
        width = data.shape[1]
        self.stored[: self.size // width * width].reshape(-1, width)[offset // width] = True
        return lost

    def copy_back(self) -> None:
        """Gives the tensors what was stored."""
        for item in self.storages:
            inside = slice(item.start, item.start + item.data.size)
            stored = self.stored[inside]
            item.data[stored] = self.bytes[inside][stored]


class SharedMemory(Space):
    """The shared memory of programs that run together, each in a slot of its own."""

    def __init__(self, size: int, slots: int, granule: int) -> None:
        self.capacity = size
        self.slot = -(-size // 128) * 128 + 128
        super().__init__("shared", self.slot * slots, granule)
        count = self.size // granule
        self.landing = np.zeros(count, np.int32)
        """Copies of `cp.async` that are under way to each granule."""
        self.feeding = np.zeros(count, np.int32)
        """Products of `wgmma` that still read it."""
        self.unfenced = np.zeros(count, bool)
        """Written since the last `fence.proxy.async`."""

    def in_bounds(self, offset: Array, width: int) -> Array:
        """Of offsets in a program's own memory."""
        return (offset >= 0) & (offset + width <= self.capacity)

    def describe(self, offset: int) -> str:
        return f"byte {offset % self.slot} of {self.capacity}"


def typed(data: Array, size: int) -> Array:
    """Bytes `[lanes, width]` as elements of `size` bytes."""
    return np.ascontiguousarray(data).view(storage(size))
