"""The instructions of a kernel made ready: operands are looked up once, and a step is a call of one
function.

A step takes the mask of the threads that execute it: True for all of them, else bool [T].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ptx_code import WIDTH, Address, Instruction, Kernel, Operand
from ptx_memory import UNSIGNED, WARP, Array, Buffer, Fault
from ptx_ops import NUMPY, Slack, arithmetic, compare, convert, doubled, pack

Mask = Any
Step = Callable[[Mask], None]


class Steps:
    """Registers of all threads of a program, and the steps that work on them."""

    def __init__(
        self,
        kernel: Kernel,
        parameters: dict[str, bytes],
        buffers: Sequence[Buffer],
        shared: Buffer,
        slack: Slack,
    ) -> None:
        self.parameters, self.buffers, self.shared, self.slack = parameters, buffers, shared, slack
        self.clock, self.threads = shared.clock, kernel.threads
        T = self.threads
        self.numbers = np.arange(T)
        self.bits: dict[str, Array] = {
            name: np.zeros(T, np.bool_ if bits == 1 else NUMPY[f"b{bits}"])
            for name, bits in kernel.registers.items()
        }
        self.special = {
            f"%{name}.{axis}": np.zeros(T, np.uint32)
            for name in ("tid", "ctaid", "nctaid")
            for axis in "xyz"
        }
        self.special["%tid.x"][:] = self.numbers

    def begin(self, size: Sequence[int], at: Sequence[int]) -> None:
        """Special registers of a program. Registers get a pattern that no zero hides behind."""
        for axis, many, one in zip("xyz", size, at, strict=True):
            self.special[f"%nctaid.{axis}"][:], self.special[f"%ctaid.{axis}"][:] = many, one
        for array in self.bits.values():
            array[...] = True if array.dtype == bool else 0x7FB7

    def step(self, ins: Instruction) -> Step:
        run = self._unguarded(ins)
        if not ins.guard:
            return run
        guard, negated = self.bits[ins.guard], ins.negated

        def guarded(mask: Mask) -> None:
            allowed = ~guard if negated else guard
            run(allowed.copy() if mask is True else mask & allowed)

        return guarded

    def _unguarded(self, ins: Instruction) -> Step:
        op, args = ins.op, ins.args
        if op[0] in ("ld", "st"):
            return self._access(ins)
        if op[0] == "atom":
            return self._atomic(ins)
        if op[0] == "ldmatrix":
            return self._matrices(ins)
        if op[0] in ("shfl", "redux"):
            return self._across(ins)
        if op[0] == "createpolicy":
            return lambda mask: None
        if op[0] == "bar":
            return self._warp_barrier
        if op[0] == "setp":
            return self._compare(ins)
        if op[0] == "mov" and any(isinstance(a, tuple) for a in args):
            return self._halves(ins)
        if op[0] == "selp":
            a, b, p = (
                self.source(args[1], op[-1]),
                self.source(args[2], op[-1]),
                self.source(args[3], "pred"),
            )
            return self._into(args[0], op[-1], lambda: np.where(p, a, b))
        if op[0] == "cvt":
            run = pack(op) if len(args) == 3 else convert(op)
            kind = "f32" if len(args) == 3 else op[-1]
            return self._into(args[0], op[-2], run, *(self.source(a, kind) for a in args[1:]))
        try:
            run = arithmetic(op, self.slack)
        except KeyError:
            raise NotImplementedError(
                f"the machine does not know the instruction {ins.text}"
            ) from None
        wide = doubled(op[-1]) if "wide" in op else op[-1]
        kinds = [op[-1], op[-1], wide]
        if op[-2] == "f32" and op[-1] in ("bf16", "f16"):  # of mixed precision
            wide = "f32"
            kinds = [op[-1], op[-1] if op[0] == "fma" else wide, wide]
        if op[0] in ("shl", "shr"):
            kinds[1] = "u32"
        elif op[0] == "bfe":
            kinds[1:] = "u32", "u32"
        return self._into(
            args[0], wide, run, *(self.source(a, k) for a, k in zip(args[1:], kinds, strict=False))
        )

    def source(self, operand: Operand, kind: str) -> Array:
        """An operand as an array of its type: a view of a register, or a constant."""
        assert isinstance(operand, str)
        dtype: Any = NUMPY[kind]
        array = self.bits.get(operand, self.special.get(operand))
        if array is not None:
            wider = array.itemsize // np.dtype(dtype).itemsize
            if not wider:
                raise ValueError(f"{operand} has {8 * array.itemsize} bits, and is read as {kind}")
            return array.view(dtype)[::wider]  # of a wider register the low bits
        if operand == "global_smem":
            return np.zeros(self.threads, dtype)
        value = int(operand[2:], 16) if operand[:2] in ("0f", "0F") else int(operand, 0)
        value &= 2 ** WIDTH[kind] - 1
        return np.full(
            self.threads, value, np.bool_ if kind == "pred" else NUMPY[f"b{WIDTH[kind]}"]
        ).view(dtype)

    def destination(self, operand: Operand, kind: str) -> Array:
        """A register as an array that takes values of a type; wider ones extend them by their sign."""
        assert isinstance(operand, str)
        array, dtype = self.bits[operand], np.dtype(NUMPY[kind])
        if array.itemsize > dtype.itemsize:
            return array.view(f"{dtype.kind}{array.itemsize}")
        return array.view(dtype)

    def _into(self, to: Operand, kind: str, run: Callable[..., Array], *sources: Array) -> Step:
        out = self.destination(to, kind)

        def step(mask: Mask) -> None:
            np.copyto(out, run(*sources), casting="unsafe", where=mask)

        return step

    def _compare(self, ins: Instruction) -> Step:
        """setp; of two halves (x2) into two predicates."""
        op, (to, *operands) = ins.op, ins.args
        assert isinstance(to, str) and len(operands) == 2, ins.text
        if not op[-1].endswith("x2"):
            return self._into(to, "pred", compare(op), *(self.source(a, op[-1]) for a in operands))
        run = compare((*op[:-1], op[-1][:-2]))
        halves = [
            [self.source(a, "b32").view(NUMPY[op[-1][:-2]])[half::2] for a in operands]
            for half in (0, 1)
        ]
        low, high = (
            self._into(one, "pred", run, *half)
            for one, half in zip(to.split("|"), halves, strict=True)
        )

        def both(mask: Mask) -> None:
            low(mask)
            high(mask)

        return both

    def _halves(self, ins: Instruction) -> Step:
        """mov between a register and those of its parts; the first is the lowest."""
        to, source = ins.args
        many, one = (to, source) if isinstance(to, tuple) else (source, to)
        assert isinstance(many, tuple) and isinstance(one, str)
        n = len(many)
        cells = self.bits[one].view(UNSIGNED[self.bits[one].itemsize // n])
        kind = f"b{8 * cells.itemsize}"
        if isinstance(to, tuple):
            parts = [
                self._into(part, kind, lambda i=i: cells[i::n])
                for i, part in enumerate(to)
                if part != "_"
            ]
        else:
            sources = [self.source(part, kind) for part in many]
            parts = [
                lambda mask, i=i: np.copyto(cells[i::n], sources[i], where=mask) for i in range(n)
            ]

        def step(mask: Mask) -> None:
            for part in parts:
                part(mask)

        return step

    def _across(self, ins: Instruction) -> Step:
        """shfl and redux: lanes of a warp see each other's operands. All lanes must take part."""
        op, kind = ins.op, ins.op[-1]
        a = self.source(ins.args[1], kind)
        if op[0] == "redux":
            fold: Any = {
                "add": np.add,
                "max": np.maximum,
                "min": np.minimum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }[op[2]]

            def across() -> Array:
                return np.repeat(fold.reduce(a.reshape(-1, WARP), axis=1, dtype=a.dtype), WARP)
        else:
            lane, clamp = self.source(ins.args[2], "u32"), self.source(ins.args[3], "u32")
            assert (
                op[2] in ("bfly", "idx", "up")
                and (clamp == (0 if op[2] == "up" else WARP - 1)).all()
            ), ins.text
            own, warp = self.numbers % WARP, self.numbers // WARP * WARP

            def across() -> Array:
                # up: lanes that are none of the warp's keep their own
                far = own - lane.astype(np.int64)
                return a[
                    warp
                    + {"bfly": own ^ lane, "idx": lane % WARP, "up": np.where(far < 0, own, far)}[
                        op[2]
                    ]
                ]

        put = self._into(ins.args[0], kind, across)

        def step(mask: Mask) -> None:
            if (
                mask is not True
                and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any()
            ):
                raise Fault(f"not all lanes of a warp execute {ins.text}")
            put(mask)

        return step

    def _warp_barrier(self, mask: Mask) -> None:
        warps = self._threads(mask)[::WARP] // WARP
        self.clock.current.warps[warps] = self.clock.step

    def _access(self, ins: Instruction) -> Step:
        """Loads and stores of parameters, shared and global memory, of one element or a vector."""
        op, kind = ins.op, ins.op[-1]
        address = next(a for a in ins.args if isinstance(a, Address))
        registers = ins.args[0] if op[0] == "ld" else ins.args[1]
        registers = registers if isinstance(registers, tuple) else (registers,)
        if "param" in op:
            value = np.frombuffer(self.parameters[address.base], NUMPY[kind])
            return self._into(registers[0], kind, lambda: np.broadcast_to(value, self.threads))
        where, size, signed = self._address(address), WIDTH[kind] // 8, NUMPY[kind]
        shared = "shared" in op
        if op[0] == "st":
            sources = [self.source(r, kind).view(UNSIGNED[size]) for r in registers]

            def store(mask: Mask) -> None:
                if (threads := self._threads(mask)).size:
                    at = where()[threads]
                    self._buffer(shared, at).store(
                        at, np.stack([s[threads] for s in sources], 1), threads
                    )

            return store
        outs = [self.destination(r, kind) for r in registers]

        def load(mask: Mask) -> None:
            if (threads := self._threads(mask)).size:
                at = where()[threads]
                found = (
                    self._buffer(shared, at)
                    .load(at, size, len(outs), threads, "acquire" not in op)
                    .view(signed)
                )
                if "acquire" in op:
                    self.clock.synchronise(int(at[0]), releases=False, acquires=True)
                for i, out in enumerate(outs):
                    out[threads] = found[:, i]

        return load

    def _atomic(self, ins: Instruction) -> Step:
        """atom.add, of one thread or of several to one place."""
        op, (to, address, operand) = ins.op, ins.args
        assert "add" in op and "global" in op and isinstance(address, Address), ins.text
        out, value, where = (
            self.destination(to, op[-1]),
            self.source(operand, op[-1]),
            self._address(address),
        )

        def step(mask: Mask) -> None:
            if (threads := self._threads(mask)).size:
                at = where()[threads]
                out[threads] = self._buffer(False, at).add(at, value[threads], threads)
                self.clock.synchronise(
                    int(at[0]),
                    releases="acq_rel" in op or "release" in op,
                    acquires="acq_rel" in op or "acquire" in op,
                )

        return step

    def _matrices(self, ins: Instruction) -> Step:
        """ldmatrix of 8 x 8 elements of 16 bits: lane 8 i + r of a warp gives where row r of matrix
        i starts; of each matrix lane l gets elements 2 (l mod 4) and the next of row l / 4."""
        op, (outs, address) = ins.op, ins.args
        assert "m8n8" in op and "trans" not in op and isinstance(address, Address), ins.text
        registers = outs if isinstance(outs, tuple) else (outs,)
        where, lane, warp = self._address(address), self.numbers % WARP, self.numbers // WARP * WARP

        def step(mask: Mask) -> None:
            assert mask is True, ins.text
            rows = where()
            for i, name in enumerate(registers):
                at = rows[warp + 8 * i + lane // 4] + 4 * (lane % 4)
                self.bits[name][:] = self.shared.load(at, 4, 1, self.numbers)[:, 0]

        return step

    def _threads(self, mask: Mask) -> Array:
        return self.numbers if mask is True else np.flatnonzero(mask)

    def _address(self, address: Address) -> Callable[[], Array]:
        array = (
            self.bits[address.base]
            if address.base in self.bits
            else self.source(address.base, "b64")
        )
        return lambda: array.astype(np.int64) + address.offset

    def _buffer(self, shared: bool, at: Array) -> Buffer:
        """The buffer that an access is to; an access beside all of them is one to the next before
        it.
        """
        if shared:
            return self.shared
        below = [buffer for buffer in self.buffers if buffer.base <= at[0]]
        if not below:
            raise Fault(f"an access to address {at[0]:#x}, where there is nothing")
        return max(below, key=lambda buffer: buffer.base)
