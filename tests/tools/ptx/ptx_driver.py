"""A driver for triton that compiles for a GPU and runs what came out on CPU tensors, in
`ptx_machine.py`.

`install()` before the first launch, in a process where triton compiles (TRITON_INTERPRET=0). From
then on kernels are specialised, compiled and launched as they are on a device, up to PTX; ptxas is
not called. A launch knows the storages of the tensors it is given and nothing else: an access
beside them is a fault.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import ptx_code
import torch
from ptx_machine import Machine
from ptx_memory import WARP, Buffer, Clock, Fault
from ptx_ops import Slack
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

SCALARS = {
    "i1": "?",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u1": "?",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "fp16": "e",
    "fp32": "f",
    "fp64": "d",
}


@dataclass
class Launch:
    """What a launch did: bytes that threads asked for and gave, by the name of the argument."""

    name: str
    grid: tuple[int, int, int]
    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)


@dataclass
class Bench:
    """What launches share: slack of approximate instructions, whether products and sums are fused
    as ptxas may do it, the order of programs, and a list of what was done."""

    slack: Slack = field(default_factory=Slack)
    fuse: bool = False
    # programs that run at once, of kernels in which they may wait for each other
    resident: int = 4
    # of so many, their order, if they shall not run at once
    warps: Callable[[int], Any] | None = None
    # of a kernel before it runs
    change: Callable[[ptx_code.Kernel], ptx_code.Kernel] | None = None
    order: Callable[[int], Any] = range
    launches: list[Launch] = field(default_factory=list)


BENCH = Bench()
MOST_TURNS = 1000  # in which no program ends
INSTALLED = False
KERNELS: dict[str, ptx_code.Kernel] = {}  # by their text


class Launcher:
    """What triton calls with the grid and the arguments of a launch; constants are among them, and
    are left out.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        names = src.fn.arg_names
        self.signature = [
            (names[i] if isinstance(i, int) else i, kind) for i, kind in src.signature.items()
        ]
        self.shared = metadata.shared

    def __call__(
        self, x: int, y: int, z: int, stream: int, kernel: ptx_code.Kernel, *given: Any
    ) -> None:
        args = given[-len(self.signature) :]
        taken = [
            (name, kind, arg)
            for (name, kind), arg in zip(self.signature, args, strict=True)
            if kind != "constexpr"
        ]
        clock = Clock(x * y * z)
        buffers = buffers_of(
            {name: arg for name, _, arg in taken if isinstance(arg, Tensor)}, clock
        )
        values = [b"".join(_bytes(kind, arg)) for _, kind, arg in taken]
        # scratch that these kernels have none of
        values += [bytes(8)] * (len(kernel.parameters) - len(values))
        kernel = ptx_code.fused(kernel) if BENCH.fuse else kernel
        kernel = kernel if BENCH.change is None else BENCH.change(kernel)
        warps = None if BENCH.warps is None else list(BENCH.warps(kernel.threads // WARP))
        meet = any(ins.op[0] == "atom" for ins in kernel.instructions)
        machines = [
            Machine(
                kernel,
                dict(zip(kernel.parameters, values, strict=True)),
                buffers,
                self.shared,
                BENCH.slack,
                clock,
                warps,
            )
            for _ in range(BENCH.resident if meet else 1)
        ]
        run_all(machines, (x, y, z), list(BENCH.order(x * y * z)))
        BENCH.launches.append(
            Launch(
                kernel.name,
                (x, y, z),
                {b.name: b.loaded for b in buffers},
                {b.name: b.stored for b in buffers},
            )
        )


def run_all(machines: list[Machine], size: tuple[int, int, int], waiting: list[int]) -> None:
    """All programs of a grid, as many at once as there are machines, which take turns. Fault where
    none gets on.
    """
    running = {
        machine: machine.program(size, waiting.pop(0)) for machine in machines[: len(waiting)]
    }
    idle = 0
    while running:
        for machine, program in list(running.items()):
            idle += 1
            if next(program, "ended") == "ended":
                idle = 0
                del running[machine]
                if waiting:
                    running[machine] = machine.program(size, waiting.pop(0))
        if idle > MOST_TURNS * len(machines):
            raise Fault(
                f"{len(running)} programs wait for others, {len(waiting)} have not begun: none "
                "gets on"
            )


def _bytes(kind: str, arg: Any) -> Any:
    if kind.startswith("*"):
        yield struct.pack("<Q", arg.data_ptr() if arg is not None else 0)
    else:
        yield struct.pack("<" + SCALARS[kind], arg)


def buffers_of(tensors: dict[str, Tensor], clock: Clock) -> list[Buffer]:
    """One for each storage, under the names of all tensors in it."""
    found: dict[int, list[str]] = {}
    storages = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        found.setdefault(storage.data_ptr(), []).append(name)
        storages[storage.data_ptr()] = storage
    return [
        Buffer(
            "+".join(names),
            at,
            np.asarray(torch.tensor([], dtype=torch.uint8).set_(storages[at])),
            clock,
        )
        for at, names in found.items()
        if storages[at].nbytes()
    ]


class Driver(DriverBase):
    """A device of one capability that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda name, code, shared, device: (
                None,
                _kernel(code.decode()),
                0,
                0,
                1024,
            ),
            get_device_properties=lambda device: {
                "max_shared_mem": 227 * 1024,
                "multiprocessor_count": 132,
            },
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the machine knows no time")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _kernel(text: str) -> ptx_code.Kernel:
    if text not in KERNELS:
        KERNELS[text] = ptx_code.read(text)
    return KERNELS[text]


def install(arch: int = 90) -> None:
    """From now on triton launches here. The last stage of its compiler gives the PTX itself instead
    of a cubin, under a key of its own: triton keeps what it compiled in a folder that others read.
    """
    global INSTALLED
    if INSTALLED:
        return
    INSTALLED = True
    key = CUDABackend.hash
    CUDABackend.hash = lambda self: f"{key(self)}-ptx"
    CUDABackend.make_cubin = lambda self, src, metadata, opt, capability: src.encode()
    driver.set_active(Driver(arch))
