"""The teacher-side kernel compiled ahead of time for sm_80, sm_90 and sm_100, without a device,
within written budgets.

No build spills or has a stack; the sweep reads 16 bytes at a time, without a barrier, as does the
second look. Budgets were written from triton 3.7.1; another version may need others, which is then
a change to look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aot
import pytest
import torch
import triton

from kdcache.kernels import topk_lse as module

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAME = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


@dataclass(frozen=True)
class Build:
    """A kernel as a call would have it compiled; instructions per element of the sweep and of the
    second look.
    """

    name: str
    classes: int
    k: int
    instructions: tuple[float, float]
    dtype: torch.dtype = BF16
    temperatures: tuple[float, ...] = (1.0, 2.0)
    labels: int = 1
    moments: bool = False
    arches: tuple[int, ...] = (90,)
    registers: int | None = None  # a thread, if not the launcher's
    # whether the compiler is told that pointers are multiples of 16 bytes
    said: bool = True

    @property
    def aligned(self) -> bool:
        return self.classes * self.dtype.itemsize % 16 == 0

    def launch(self) -> tuple[dict[str, Any], int, int]:
        return module.build(
            self.classes,
            self.dtype,
            self.k,
            self.temperatures,
            self.labels,
            self.moments,
            self.aligned,
        )


BUILDS = [
    Build("128k", 128_256, 64, (9.0, 15.0), arches=(90, 100)),
    Build("128k-fp16", 128_256, 64, (8.3, 14.5), dtype=FP16, arches=(80,)),
    Build(
        "50257-moments",
        50_257,
        256,
        (10.9, 14.1),
        temperatures=(1,),
        labels=2,
        moments=True,
        arches=(80, 90),
    ),
    Build(
        "50257-fp32-moments",
        50_257,
        64,
        (9.8, 16.7),
        dtype=FP32,
        temperatures=(1,),
        moments=True,
        arches=(100,),
    ),
    Build("32k", 32_000, 16, (9.0, 14.8), labels=0),
    Build("151936", 151_936, 64, (14.5, 20.5), temperatures=(1, 2, 4, 0.5), labels=2),
    Build("262144", 262_144, 256, (8.0, 14.0), temperatures=(1,)),
]
# No room for what lives, alignment not told, and a temperature that is not a power of the other's
# base.
MUTANT = Build(
    "mutant", 32_000, 16, (9.0, 14.0), temperatures=(1.37, 1.0), labels=0, registers=40, said=False
)


def request(build: Build, arch: int) -> dict[str, Any]:
    """The call of a build, turned into what the compiler is asked; the constants come from the
    launcher itself.
    """
    constants, warps, registers = build.launch()
    absent = ["MEAN", "STD"] * (not build.moments) + ["LABELS", "LABEL_LOGIT"] * (not build.labels)
    signature = {
        "X": f"*{NAME[build.dtype]}",
        "IDS": "*i64",
        "LABELS": "*i64",
        "FLAG": "*i32",
        "SCRATCH": "*i32",
    }
    signature |= dict.fromkeys(("VALUES", "TAIL", "LABEL_LOGIT", "MEAN", "STD"), "*fp32")
    signature |= dict.fromkeys(("x_stride", "label_stride", "num_classes", "id_bits", "k"), "i32")
    sizes = ["x_stride", "num_classes"] if build.classes % 16 == 0 else []
    return {
        "name": build.name,
        "kernel": "kdcache.kernels.topk_rows:topk_rows",
        "arch": arch,
        "signature": signature,
        "constants": constants | dict.fromkeys(absent),
        "aligned": ["X", *sizes] if build.said else [],
        "warps": warps,
        "maxnreg": build.registers or registers,
    }


def complaints(build: Build, report: aot.Report) -> list[str]:
    """Where a report is over its budget. Loops with exponentials in order: sweep, its last tile,
    second look.
    """
    constants, _, registers = build.launch()
    vector, lane, groups = (
        constants["VEC"],
        constants["A"] * constants["B"],
        len(constants["TEMPS"][2]),
    )
    found = []
    if report.registers > registers or report.spills or report.stack or report.shared > 4096:
        found.append(
            f"{report.registers} registers, {report.spills} spills, {report.stack} bytes of stack, "
            f"{report.shared} shared"
        )
    loops = [loop for loop in report.loops if loop.exponentials]
    if len(loops) != 5:  # with those of a second round, and of what was set apart
        return [*found, f"loops: {report.loops}"]
    sweep, _, again, *_ = loops
    for name, loop, most, vectors, widest in (
        ("sweep", sweep, build.instructions[0], constants["A"], lane),
        ("second look", again, build.instructions[1], 1, constants["B"]),
    ):
        elements = vectors * vector
        if loop.instructions > most * elements or loop.exponentials > groups * elements * (
            1 + 1 / widest
        ):
            found.append(
                f"{name}: {loop.instructions / elements:.2f} instructions and "
                f"{loop.exponentials / elements:.2f} exponentials per element"
            )
        narrow = loop.scalar_loads - (loop is again)  # which lane a piece is of is one load
        if (
            narrow
            or loop.scalar_stores
            or loop.vector_loads != vectors
            or loop.barriers
            or loop.vector_stores
        ):
            found.append(f"{name}: narrow accesses or barriers: {loop}")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], aot.Report]:
    wanted = [request(build, arch) for build in [*BUILDS, MUTANT] for arch in build.arches]
    return {
        (r.name, r.arch): r for r in aot.reports(wanted, cache=tmp_path_factory.mktemp("triton"))
    }


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_the_kernel_is_within_its_budget(
    build: Build, compiled: dict[tuple[str, int], aot.Report]
) -> None:
    if triton.__version__ != "3.7.1":
        pytest.skip(f"budgets are triton 3.7.1's; this is {triton.__version__}")
    reports = {arch: compiled[build.name, arch] for arch in build.arches}
    assert {
        arch: found for arch, report in reports.items() if (found := complaints(build, report))
    } == {}


def test_budgets_can_be_broken(compiled: dict[tuple[str, int], aot.Report]) -> None:
    found = complaints(MUTANT, compiled[MUTANT.name, 90])
    assert any("spills" in text for text in found) and any("narrow" in text for text in found)
    assert any("exponentials per element" in text for text in found)
