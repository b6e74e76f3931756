"""Memory of the machine in `ptx_machine.py`: bounds, alignment, races, and how many bytes went each
way.

A race is an access to bytes that another thread accessed since the last barrier, one of the two
being a write; between programs it is one since the launch, unless one released and the other
acquired. If there is none, the order of threads cannot matter, and what one order gives is what all
give. Two threads that write the same value are no race.

One kind is let pass: several threads read a place in one instruction, and the first of them then
writes there. So triton does where a block has fewer elements than there are threads: all hold
copies, the first stores. What a late reader then holds matters only if it is used for more than
that store, which no one access shows: tests run the threads in several orders and compare the bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# bytes that are watched together: the smallest access to memory there is
GRANULE = 2
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY, MANY = -1, -2
WARP = 32


class Fault(Exception):
    """An access that a device would not survive, or whose result depends on the order of threads.
    `other`: the instruction that it is in conflict with, if there is one."""

    def __init__(self, text: str, other: int | None = None) -> None:
        super().__init__(text)
        self.other = other


@dataclass
class Progress:
    """Where one program is: its stretch of time between barriers, and what it knows of the others.

    `known[p]`: the last stretch of program p whose accesses come before those of this program,
    because p released them and this one acquired them; `learned`: the same from the next barrier
    on, for the threads that did not acquire.
    """

    program: int
    now: int
    began: int
    known: Array
    learned: Array
    # step of each warp's own last barrier
    warps: Array = field(default_factory=lambda: np.zeros(32, np.int64))


class Clock:
    """Time in a launch. Every barrier and every program begins a stretch of its own, with a number
    of its own.
    """

    def __init__(self, programs: int = 1) -> None:
        self.programs, self.ticks = programs, 0
        # the instruction that is executed; how many were
        self.at = self.step = 0
        # address of an atomic -> what those who release there know
        self.released: dict[int, Array] = {}
        self.current = self.begin(0)

    def begin(self, program: int) -> Progress:
        self.ticks += 1
        never = np.full(self.programs, NOBODY)
        self.current = Progress(program, self.ticks, self.ticks, never, never.copy())
        return self.current

    def barrier(self) -> None:
        self.ticks += 1
        self.current.now = self.ticks
        self.current.known = np.maximum(self.current.known, self.current.learned)

    def synchronise(self, address: int, releases: bool, acquires: bool) -> None:
        """An atomic access. What comes before the last barrier is released, by all threads of the
        program.
        """
        me = self.current
        there = self.released.setdefault(address, np.full(self.programs, NOBODY))
        if acquires:
            me.learned = np.maximum(me.learned, there)
        if releases:
            there[:] = np.maximum(there, me.known)
            there[me.program] = max(there[me.program], me.now - 1)


class Watch:
    """Of each granule: when it was last accessed, by which thread, of which program, in which
    instruction.
    """

    def __init__(self, granules: int) -> None:
        self.when, self.thread, self.program, self.at, self.step = (
            np.full(granules, NOBODY) for _ in range(5)
        )

    def note(self, index: Array, threads: Array, clock: Clock) -> None:
        self.when[index], self.program[index], self.at[index] = (
            clock.current.now,
            clock.current.program,
            clock.at,
        )
        self.step[index], self.thread[index] = clock.step, threads

    def others(self, index: Array, threads: Array, clock: Clock) -> Array:
        """Where another thread was since the last barrier of the program, or of the warp of both."""
        last, warp = self.thread[index], threads // WARP
        met = (
            (last // WARP == warp) & (last != MANY) & (self.step[index] < clock.current.warps[warp])
        )
        found: Array = (self.when[index] == clock.current.now) & (last != threads) & ~met
        return found

    def strangers(self, index: Array, clock: Clock) -> Array:
        """Where another program was in this launch, and nothing says that it was before."""
        other = self.program[index]
        found: Array = (other != NOBODY) & (other != clock.current.program)
        found &= self.when[index] > clock.current.known[other]
        return found


class Buffer:
    """Bytes that start at an address. `shared`: of one program, and nothing in it until it is
    written.
    """

    def __init__(
        self, name: str, base: int, data: Array, clock: Clock, shared: bool = False
    ) -> None:
        self.name, self.base, self.data, self.clock, self.shared = name, base, data, clock, shared
        self.loaded = self.stored = 0  # bytes that were asked for
        granules = -(-len(data) // GRANULE)
        self.read, self.written = Watch(granules), Watch(granules)

    def load(
        self, address: Array, size: int, count: int, threads: Array, watched: bool = True
    ) -> Array:
        """[threads, count] elements of `size` bytes, unsigned. `threads`: numbers of those that
        ask, ascending.
        """
        at = self._at(address, size * count, threads)
        self.loaded += size * count * len(threads)
        if watched:
            self._watch_load(self._granules(at, size * count), threads[:, None])
        return self._cells(size)[(at // size)[:, None] + np.arange(count)]

    def store(self, address: Array, values: Array, threads: Array) -> None:
        """values [threads, count], unsigned."""
        size, count = values.itemsize, values.shape[1]
        at = self._at(address, size * count, threads)
        self.stored += size * count * len(threads)
        cells, index = self._cells(size), (at // size)[:, None] + np.arange(count)
        same = (cells[index] == values).all(1)
        cells[index] = values
        if not np.array_equal(cells[index], values):
            raise Fault(
                f"{self.name}: threads of one instruction write different values to one place"
            )
        self._watch_store(self._granules(at, size * count), threads[:, None], same[:, None])

    def add(self, address: Array, values: Array, threads: Array) -> Array:
        """Atomic: each thread adds its value and gets what was there."""
        at, cells = self._at(address, values.itemsize, threads), self._cells(values.itemsize)
        old = np.empty_like(values)
        for i, place in enumerate(at // values.itemsize):
            old[i] = cells[place]
            cells[place] += values[i]
        return old

    def _cells(self, size: int) -> Array:
        cells: Array = self.data[: len(self.data) // size * size].view(UNSIGNED[size])
        return cells

    def _at(self, address: Array, size: int, threads: Array) -> Array:
        at: Array = address.astype(np.int64) - self.base
        if (address.astype(np.uint64) % np.uint64(size)).any():
            raise Fault(f"{self.name}: an access of {size} bytes is not at a multiple of {size}")
        outside = (at < 0) | (at + size > len(self.data))
        if outside.any():
            i = int(outside.argmax())
            raise Fault(
                f"thread {threads[i]} accesses {size} bytes at byte {at[i]} of {self.name}, which "
                f"has {len(self.data)}"
            )
        return at

    def _granules(self, at: Array, size: int) -> Array:
        granules: Array = (at // GRANULE)[:, None] + np.arange(max(size // GRANULE, 1))
        return granules

    def _watch_load(self, index: Array, threads: Array) -> None:
        clock, read = self.clock, self.read
        if self.shared and (self.written.when[index] < clock.current.began).any():
            raise Fault(f"{self.name} is read where nothing was written")
        self._refuse(
            self.written.others(index, threads, clock),
            "reads what {} wrote",
            self.written,
            index,
            threads,
        )
        if not self.shared:
            self._refuse(
                self.written.strangers(index, clock),
                "reads what {} of another program wrote",
                self.written,
                index,
                threads,
            )
        old, fresh = read.thread[index], read.when[index] != clock.current.now
        # Of copies the first thread's stays. (numpy walks through a view with a negative stride
        # from its other end.)
        read.thread[index[::-1].copy()] = np.broadcast_to(threads, index.shape)[::-1].copy()
        first = read.thread[index]
        read.note(index, np.where(fresh | (old == first), first, MANY), clock)

    def _watch_store(self, index: Array, threads: Array, same: Array) -> None:
        clock = self.clock
        for watch, did in ((self.read, "read"), (self.written, "wrote")):
            self._refuse(
                watch.others(index, threads, clock) & ~same,
                f"writes over what {{}} {did}",
                watch,
                index,
                threads,
            )
            if not self.shared:
                self._refuse(
                    watch.strangers(index, clock),
                    f"writes over what {{}} of another program {did}",
                    watch,
                    index,
                    threads,
                )
        self.written.note(index, threads, clock)

    def _refuse(self, wrong: Array, does: str, watch: Watch, index: Array, threads: Array) -> None:
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            granule = index[i, j]
            other = (
                "several threads"
                if watch.thread[granule] == MANY
                else f"thread {watch.thread[granule]}"
            )
            raise Fault(
                f"race in {self.name} at byte {GRANULE * granule}: thread {threads[i, 0]} "
                f"{does.format(other)}, with no barrier between",
                int(watch.at[granule]),
            )
