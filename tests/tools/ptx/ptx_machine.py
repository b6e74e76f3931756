"""Runs compiled kernels without a GPU: an interpreter of PTX, all threads of a program at once, in
numpy.

Triton's own interpreter runs the source, one program as one thread: it knows no layouts, no
shuffles, no shared memory, no barriers. This runs what the compiler made of it, and watches every
access (`ptx_memory.py`). Threads go in lockstep, those that are behind first; where no race is
found, every other order gives the same.

What it is not: a device. It knows no time, no cache, and nothing of what ptxas makes of PTX (which
may fuse a product and a sum that PTX leaves apart).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from ptx_code import Kernel
from ptx_memory import WARP, Array, Buffer, Clock, Fault
from ptx_ops import Slack
from ptx_steps import Mask, Step, Steps

CONTROL = {"bra", "bar", "ret", "exit"}


class Machine:
    """One kernel made ready, over buffers. `parameters`: the bytes of each, by name; `shared`:
    bytes of a program.

    `warps`: run one after the other, in this order, each until it waits; None: all at once.
    """

    def __init__(
        self,
        kernel: Kernel,
        parameters: dict[str, bytes],
        buffers: Sequence[Buffer],
        shared: int,
        slack: Slack,
        clock: Clock,
        warps: Sequence[int] | None = None,
    ) -> None:
        self.kernel, self.clock, self.warps = kernel, clock, warps
        self.shared = Buffer("shared memory", 0, np.zeros(shared, np.uint8), clock, shared=True)
        self.steps = Steps(kernel, parameters, buffers, self.shared, slack)
        self.ready: list[Step | None] = [
            None if i.op[0] in CONTROL and i.op[1:] != ("warp", "sync") else self.steps.step(i)
            for i in kernel.instructions
        ]

    def program(self, size: Sequence[int], number: int) -> Iterator[None]:
        """Runs a program of a grid, and lets others run before each access that they may wait for."""
        self.steps.begin(
            size, (number % size[0], number // size[0] % size[1], number // (size[0] * size[1]))
        )
        own, threads = self.clock.begin(number), Threads(self.kernel, self.warps)
        code = self.kernel.instructions
        while (pc := threads.next()) < len(code):
            step, ins = self.ready[pc], code[pc]
            if ins.op[0] == "atom" or "acquire" in ins.op:
                yield
                self.clock.current = own
            if step is not None:
                self.clock.at, self.clock.step = pc, self.clock.step + 1
                try:
                    step(threads.mask)
                except Fault as e:
                    places = [
                        f"{code[i].text} [{code[i].source}]" for i in (pc, e.other) if i is not None
                    ]
                    raise Fault(f"{e}: {'; after '.join(places)}") from e
                threads.go(pc + 1)
            elif ins.op[0] == "bar":
                assert ins.op[1:] == ("sync",) and ins.args == ("0",), ins.text
                if threads.wait(pc + 1):
                    self.clock.barrier()
            else:
                to = self.kernel.labels[str(ins.args[0])] if ins.op[0] == "bra" else len(code)
                if not ins.guard:
                    threads.go(to)
                else:
                    threads.part(self.steps.bits[ins.guard] != ins.negated, to, pc + 1)


class Threads:
    """Where the threads of a program are. Those at the least place go next, so that ways that
    parted meet again.
    """

    def __init__(self, kernel: Kernel, warps: Sequence[int] | None = None) -> None:
        count, self.end = kernel.threads, len(kernel.instructions)
        self.pc = 0  # of all threads, while they are together
        self.apart: Array | None = None  # of each thread, while they are not
        self.waiting = np.zeros(count, bool)
        self.mask: Mask = True
        # of each thread's warp, where they run one after the other
        self.turn: Array | None = None
        if warps is not None:
            self.turn = np.repeat(np.argsort(warps), WARP)
            self.apart = np.zeros(count, np.int64)

    def next(self) -> int:
        """The place to go on at; `mask` says which threads do. The end when all are there."""
        if self.apart is None:
            return self.pc
        ready = ~self.waiting
        if self.turn is not None and (going := ready & (self.apart < self.end)).any():
            ready = going & (self.turn == self.turn[going].min())
        self.pc = int(self.apart[ready].min())
        active = ready & (self.apart == self.pc)
        if active.all() and self.turn is None:
            self.apart, self.mask = None, True
        else:
            self.mask = active
        return self.pc

    def go(self, to: int) -> None:
        if self.apart is None:
            self.pc = to
        else:
            self.apart[self.mask] = to

    def part(self, taken: Array, to: int, otherwise: int) -> None:
        asked = taken if self.mask is True else taken[self.mask]
        if asked.all() or not asked.any():
            self.go(to if asked.all() else otherwise)
        elif self.apart is None:
            self.apart = np.where(taken, to, otherwise)
        else:
            self.apart[self.mask] = np.where(asked, to, otherwise)

    def wait(self, after: int) -> bool:
        """Threads come to a barrier; True when the last of them did."""
        if self.apart is None:
            self.pc = after
            return True
        self.go(after)
        self.waiting |= self.mask
        if not (self.waiting | (self.apart == self.end)).all():
            return False
        places = set(self.apart[self.waiting].tolist())
        if len(places) > 1:
            raise Fault(f"threads wait at {len(places)} different barriers")
        self.waiting[:] = False
        return True
