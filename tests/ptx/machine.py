"""The state of programs that run together, and what an instruction does that touches more than its
own lane: memory, copies under way, barriers, shuffles, matrices.

Every thread of every program of a batch is a lane, and all lanes take an instruction at once. The
product of a `wgmma` is there when it is issued; that what it reads stays until it is waited for is
checked. Masks are `[lanes]`, or None for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ptx import numerics
from ptx.memory import LANE_BITS, Fault, GlobalMemory, SharedMemory, Space, stamp, typed
from ptx.numerics import Array, i8, u1, u2, u4, u8
from ptx.parser import Instruction, Kernel

Mask = Array | None
Grid = tuple[int, int, int]


@dataclass
class Copy:
    """A `cp.async` under way."""

    lanes: Array
    offset: Array
    data: Array
    group: Array
    """The lane's group that waits for it; -1 before it is committed."""
    instruction: Instruction

    def split(self, which: Array) -> Copy:
        """Returns the part of some lanes."""
        parts = (self.lanes[which], self.offset[which], self.data[which], self.group[which])
        return Copy(*parts, self.instruction)


class Batch:
    """Programs of one launch that run together."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        faults: dict[tuple[str, int], Fault],
        programs: Array,
        grid: Grid,
        shared_bytes: int,
        shared_granule: int,
    ) -> None:
        """`programs [count, 3]` are their places in the grid."""
        self.kernel, self.memory, self.faults, self.grid = kernel, memory, faults, grid
        self.threads, self.count = kernel.threads, len(programs)
        self.lanes = self.threads * self.count
        every = np.arange(self.lanes)
        self.slot = every // self.threads
        self.thread = (every % self.threads).astype(u4)
        self.place = [programs[self.slot, axis].astype(u4) for axis in range(3)]
        linear = programs[:, 0] + grid[0] * (programs[:, 1] + grid[1] * programs[:, 2])
        self.program = linear[self.slot]
        self.shared = SharedMemory(shared_bytes, self.count, shared_granule)
        # Who a lane is. In shared memory lanes of a warp are not told apart, but for a kernel of
        # one warp, where barriers are those of the warp.
        warp = self.thread if self.threads == 32 else self.thread // 32
        phase = np.zeros(self.lanes, i8)
        self.stamps: dict[Space, Array] = {
            memory: stamp(self.program, phase, self.thread),
            self.shared: stamp(0 * self.program, phase, warp),
        }
        self.registers: dict[str, Array] = {}
        self.mask: Mask = None
        self.committed = np.zeros(self.lanes, i8)
        self.copies: list[Copy] = []
        self.products: list[list[Array]] = [[]]
        """Granules that the `wgmma` of each group read; the last group is not committed."""
        self.totals: dict[str, int] = {}
        """Registers that hold a sum under way, and how many groups were committed before it."""
        self.product_groups = 0

    # ---- lanes

    def special(self, name: str) -> Array:
        """A register of the hardware, such as `ctaid.x`."""
        if name == "laneid":
            return self.thread & u4(31)
        kind, _, letter = name.partition(".")
        axis = "xyz".index(letter)
        if kind == "tid":
            return self.thread if axis == 0 else np.zeros(self.lanes, u4)
        if kind == "ctaid":
            return self.place[axis]
        value = {"ntid": self.threads if axis == 0 else 1, "nctaid": self.grid[axis]}[kind]
        return np.full(self.lanes, value, u4)

    def fault(self, kind: str, instruction: Instruction, lanes: Array, detail: str) -> None:
        """Notes a fault, once for each instruction."""
        first = int(lanes[0])
        who = f"program {self.program[first]} thread {self.thread[first]} ({len(lanes)} lanes)"
        key = (kind, instruction.line)
        if key in self.faults:
            self.faults[key].count += 1
        else:
            self.faults[key] = Fault(
                self.kernel.name, kind, instruction.text, instruction.source, f"{who}: {detail}"
            )

    # ---- memory

    def _access(
        self, space: Space, address: Array, width: int, mask: Mask, at: Instruction
    ) -> tuple[Array, Array]:
        """The lanes whose access is allowed, and their offsets."""
        lanes = np.arange(self.lanes) if mask is None else np.flatnonzero(mask)
        own = address[lanes].astype(u8).view(i8)
        if space is self.memory:
            own = own - self.memory.BASE
        inside, aligned = space.in_bounds(own, width), own & (width - 1) == 0
        allowed = inside & aligned
        if not allowed.all():
            for kind, which in (("out of bounds", inside), ("misaligned", aligned)):
                if not which.all():
                    bad = np.flatnonzero(~which)
                    detail = f"{width} bytes at {space.describe(int(own[bad[0]]))}"
                    self.fault(f"{space.name}: {kind}", at, lanes[bad], detail)
            lanes, own = lanes[allowed], own[allowed]
        if space is self.shared:
            own = own + self.slot[lanes] * self.shared.slot
        return lanes, own

    def _expect_none(
        self, kind: str, bad: Array, lanes: Array, offset: Array, space: Space, at: Instruction
    ) -> None:
        """Faults where any granule of a lane's access is bad."""
        if bad.any():
            rows = np.flatnonzero(bad.any(1))
            self.fault(
                f"{space.name}: {kind}", at, lanes[rows], space.describe(int(offset[rows[0]]))
            )

    def _check_read(
        self, space: Space, lanes: Array, offset: Array, width: int, at: Instruction
    ) -> Array:
        granules = space.granules(offset, width)
        now = np.broadcast_to(self.stamps[space][lanes, None], granules.shape)
        bad = {"read of what nobody wrote": ~space.written[granules]}
        if isinstance(space, SharedMemory):
            bad["read under a copy"] = space.landing[granules] > 0
        for kind, where in (bad | space.shadow.read(granules, now)).items():
            self._expect_none(kind, where, lanes, offset, space, at)
        return granules

    def _check_write(
        self,
        space: Space,
        lanes: Array,
        offset: Array,
        width: int,
        at: Instruction,
        atomic: bool = False,
    ) -> Array:
        granules = space.granules(offset, width)
        now = np.broadcast_to(self.stamps[space][lanes, None], granules.shape)
        bad = {}
        if isinstance(space, SharedMemory):
            bad["write under a copy"] = space.landing[granules] > 0
            bad["write under a wgmma"] = space.feeding[granules] > 0
            space.unfenced[granules] = True
        for kind, where in (bad | space.shadow.write(granules, now, atomic)).items():
            self._expect_none(kind, where, lanes, offset, space, at)
        return granules

    def _put(self, space: Space, lanes: Array, offset: Array, data: Array, at: Instruction) -> None:
        lost = space.store(offset, data)
        if lost.any():
            self._expect_none(
                "lanes of one store write different values to an address",
                lost[:, None],
                lanes,
                offset,
                space,
                at,
            )

    def load(
        self, space: Space, address: Array, size: int, count: int, mask: Mask, at: Instruction
    ) -> Array:
        """`count` elements of `size` bytes for each lane, `[lanes, count]`; 0 where masked."""
        width = size * count
        lanes, offset = self._access(space, address, width, mask, at)
        out = np.zeros((self.lanes, count), numerics.storage(size))
        if lanes.size:
            self._check_read(space, lanes, offset, width, at)
            out[lanes] = typed(space.load(offset, width), size)
        return out

    def store(
        self, space: Space, address: Array, values: list[Array], mask: Mask, at: Instruction
    ) -> None:
        """Stores one element of each of the values."""
        data = np.stack(values, 1).view(u1)
        lanes, offset = self._access(space, address, data.shape[1], mask, at)
        if lanes.size:
            self._check_write(space, lanes, offset, data.shape[1], at)
            self._put(space, lanes, offset, data[lanes], at)

    def atomic(
        self,
        change: Callable[[Any, Any], Any],
        address: Array,
        values: Array,
        mask: Mask,
        at: Instruction,
    ) -> Array:
        """Changes one number after another, lanes in order; what was there before."""
        size = values.dtype.itemsize
        lanes, offset = self._access(self.memory, address, size, mask, at)
        before = np.zeros(self.lanes, values.dtype)
        if lanes.size:
            granules = self._check_write(self.memory, lanes, offset, size, at, atomic=True)
            unwritten = ~self.memory.written[granules]
            self._expect_none(
                "read of what nobody wrote", unwritten, lanes, offset, self.memory, at
            )
            self.memory.stored[offset[:, None] + np.arange(size)] = True
        cells = self.memory.bytes[: self.memory.size // size * size].view(values.dtype)
        for lane, cell in zip(lanes, offset // size, strict=True):
            before[lane] = cells[cell]
            cells[cell] = change(cells[cell], lane)
        return before

    # ---- copies that are waited for

    def copy(
        self, to: Array, source: Array, size: int, used: Array, mask: Mask, at: Instruction
    ) -> None:
        """`cp.async` of `size` bytes, of which only `used` come from memory; the rest is 0."""
        lanes, offset = self._access(self.shared, to, size, mask, at)
        data = np.zeros((self.lanes, size), u1)
        for length in np.unique(used[lanes]):
            part = np.zeros(self.lanes, bool)
            part[lanes] = used[lanes] == length
            item = min(8, size) if length == size else 1
            if length:
                loaded = self.load(self.memory, source, item, int(length) // item, part, at)
                data[part, :length] = loaded[part].view(u1)
        granules = self._check_write(self.shared, lanes, offset, size, at)
        np.add.at(self.shared.landing, granules, 1)
        group = np.full(lanes.size, -1)
        self.copies.append(Copy(lanes, offset, data[lanes], group, at))

    def commit_copies(self, mask: Mask) -> None:
        """Closes the group of every lane."""
        for copy in self.copies:
            open_ = copy.group < 0
            copy.group = np.where(open_, self.committed[copy.lanes], copy.group)
        self.committed[slice(None) if mask is None else mask] += 1

    def wait_for_copies(self, pending: int, mask: Mask, every: bool = False) -> None:
        """Until at most so many groups are under way, or, with `every`, none and none open."""
        waiting = []
        for copy in self.copies:
            done = (copy.group >= 0) & (copy.group < self.committed[copy.lanes] - pending) | every
            if mask is not None:
                done &= mask[copy.lanes]
            landed, rest = copy.split(done), copy.split(~done)
            if landed.lanes.size:
                granules = self.shared.granules(landed.offset, landed.data.shape[1])
                np.subtract.at(self.shared.landing, granules, 1)
                self.shared.unfenced[granules] = True
                self.shared.shadow.writer[granules] = self.stamps[self.shared][landed.lanes, None]
                self._put(self.shared, landed.lanes, landed.offset, landed.data, copy.instruction)
            if rest.lanes.size:
                waiting.append(rest)
        self.copies = waiting

    # ---- warps and programs

    def barrier(self, mask: Mask, at: Instruction) -> None:
        """All threads of a program meet; a new phase begins."""
        arrived = np.ones(self.lanes, bool) if mask is None else mask
        programs = arrived.reshape(self.count, -1)
        torn = np.repeat(programs.any(1) & ~programs.all(1), self.threads)
        if torn.any():
            self.fault("barrier that not all threads reach", at, np.flatnonzero(torn), "")
        for stamps in self.stamps.values():
            stamps[arrived] += 1 << LANE_BITS

    def shuffle(
        self, mode: str, x: Array, choice: Array, clamp: Array, mask: Mask, at: Instruction
    ) -> tuple[Array, Array]:
        """What another lane of the warp holds, and whether there is such a lane."""
        lane = np.arange(self.lanes) % 32
        choice, clamp = choice.astype(i8) & 31, clamp.astype(i8)
        segment, clamp = (clamp >> 8) & 31, clamp & 31
        low = lane & segment
        high = low | (clamp & ~segment)
        other = {
            "up": lane - choice,
            "down": lane + choice,
            "bfly": lane ^ choice,
            "idx": low | (choice & ~segment),
        }[mode]
        exists = other >= high if mode == "up" else other <= high
        other = np.where(exists, other, lane) + np.arange(self.lanes) // 32 * 32
        if mask is not None and (mask & ~mask[other]).any():
            self.fault("shuffle from a lane that is not there", at, np.flatnonzero(~mask), "")
        return x[other], exists

    # ---- matrices in shared memory

    def _rows(self, count: int, mask: Mask) -> Array:
        """Which lanes name a row of one of `count` matrices of 8 by 8."""
        named = np.arange(self.lanes) % 32 < 8 * count
        return named if mask is None else named & mask

    def load_matrices(
        self, address: Array, count: int, transposed: bool, mask: Mask, at: Instruction
    ) -> list[Array]:
        """`ldmatrix`: a lane gets two neighbours of row `lane / 4` of each matrix."""
        rows = self.load(self.shared, address, 8, 2, self._rows(count, mask), at).view(u2)
        matrices = rows.reshape(-1, 32, 8)[:, : 8 * count].reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(matrices).reshape(-1, count, 32, 2).view(u4)[..., 0]
        return [pairs[:, index].reshape(-1) for index in range(count)]

    def store_matrices(
        self, address: Array, values: list[Array], transposed: bool, mask: Mask, at: Instruction
    ) -> None:
        """`stmatrix`, the reverse."""
        count = len(values)
        pairs = np.stack(values, 1).view(u2).reshape(-1, 32, count, 2).transpose(0, 2, 1, 3)
        matrices = pairs.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        rows = np.zeros((self.lanes // 32, 32, 8), u2)
        rows[:, : 8 * count] = matrices.reshape(-1, 8 * count, 8)
        halves = rows.reshape(-1, 8).view(u8)
        self.store(
            self.shared,
            address,
            [np.ascontiguousarray(halves[:, index]) for index in range(2)],
            self._rows(count, mask),
            at,
        )

    def _described(
        self, descriptor: Array, count: int, kind: str, transposed: bool, at: Instruction
    ) -> Array:
        """`[warps, count, k]` of the matrix behind each warp's descriptor; `k` has 32 bytes."""
        start, leading, stride = (
            (((descriptor >> u8(place)) & u8(0x3FFF)) << u8(4)).astype(i8)[:, None, None]
            for place in (0, 16, 32)
        )
        swizzle = int(descriptor[0] >> u8(62))
        width = (16, 128, 64, 32)[swizzle]
        if ((descriptor >> u8(49)) & u8(7)).any() or (transposed and not swizzle):
            raise NotImplementedError(f"a matrix descriptor of {at.text}")
        if transposed:
            row, k = np.arange(0, count, 8)[:, None], np.arange(16)
            across = width // 2
            offset = start + row // across * leading + k // 8 * stride + k % 8 * width
            offset = offset + row % across * 2
        else:
            row, half = np.arange(count)[:, None], np.arange(2)
            step = leading if swizzle == 0 else 16
            offset = start + row // 8 * stride + row % 8 * width + step * half
        offset ^= ((offset >> 7) & (0, 7, 3, 1)[swizzle]) << 4
        # Eight neighbours at a time, all read by the first lane of the warp.
        warps = np.broadcast_to(np.arange(len(descriptor))[:, None, None], offset.shape).ravel()
        lanes, offset = warps * 32, offset.ravel()
        outside = ~self.shared.in_bounds(offset, 16)
        if outside.any():
            where = self.shared.describe(int(offset[outside][0]))
            self.fault("shared: out of bounds", at, lanes[outside], where)
            offset = np.where(outside, 0, offset)
        offset = offset + self.slot[lanes] * self.shared.slot
        granules = self._check_read(self.shared, lanes, offset, 16, at)
        unfenced = self.shared.unfenced[granules]
        self._expect_none(
            "wgmma without a fence.proxy.async", unfenced, lanes, offset, self.shared, at
        )
        granules = np.unique(granules)
        self.shared.feeding[granules] += 1
        self.products[-1].append(granules)
        data = numerics.elements(self.shared.load(offset, 16), kind)
        if not transposed:
            return data.reshape(len(descriptor), count, -1)
        blocks = data.reshape(-1, count // 8, 16, 8).transpose(0, 1, 3, 2)
        return blocks.reshape(-1, count, 16)

    def wgmma(
        self,
        kind: str,
        total: list[Array],
        a: list[Array] | Array,
        b: Array,
        used: Array,
        transposed: tuple[bool, bool],
        at: Instruction,
    ) -> list[Array]:
        """A product of four warps, `[64, k]` by `[k, columns]`; 16 rows of it for each warp."""
        right = self._described(b[::32], 2 * len(total), kind, transposed[1], at)
        if isinstance(a, list):
            left = numerics.operand(a, kind, False, right.shape[2])
        else:
            whole = self._described(a[::32], 64, kind, transposed[0], at)
            warp = np.arange(len(whole))
            left = whole.reshape(len(whole), 4, 16, -1)[warp, warp % 4]
        return numerics.accumulate(left @ right.transpose(0, 2, 1), total, used.reshape(-1, 32, 1))

    def commit_products(self) -> None:
        self.products.append([])
        self.product_groups += 1

    def wait_for_products(self, pending: int) -> None:
        """Until at most so many groups still read their operands."""
        done = max(0, len(self.products) - 1 - pending)
        for group in self.products[:done]:
            for granules in group:
                self.shared.feeding[granules] -= 1
        self.products = self.products[done:]
        last = self.product_groups - pending
        self.totals = {name: group for name, group in self.totals.items() if group >= last}

    def touch(self, names: set[str], at: Instruction) -> None:
        """Registers are read or written; copies of sums under way are under way too."""
        under_way = names & self.totals.keys()
        if not under_way:
            return
        if at.words[0] == "mov":
            self.totals |= dict.fromkeys(names, max(self.totals[name] for name in under_way))
        else:
            self.fault("register of a wgmma under way", at, np.arange(1), " ".join(under_way))
