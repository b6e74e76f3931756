"""The kernels compiled ahead of time for sm_80, sm_90 and sm_100, without a device, within written
budgets.

A budget is per kernel: registers, no spills, 128-bit accesses alone in the loops over the row, no
barrier in them, and instructions and exponentials per element. Registers set how many programs
share a multiprocessor: those must have enough bytes under way, and not more rows than L2 holds.
Budgets were written from triton 3.7.1; another version may need others, which is then a change to
look at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import aot
import pytest
import torch
import triton

from kdcache.kernels import kd_launch
from kdcache.kernels.row_loss import Divergence, RowLoss

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
# bytes of those that 132 multiprocessors have under way, of an L2 of 50 MB
MOST_ROWS = 40e6
LEAST_LOADS = 24 * 1024  # bytes that one has asked for at once; see `Tiles.of`


@dataclass(frozen=True)
class Build:
    """A kernel as a call would have it compiled, and what it may cost: instructions per element of
    both sweeps.
    """

    name: str
    num_classes: int
    instructions: tuple[float, float]
    dtype: str = "bf16"
    temperature: float = 2.0
    kept: int = 64
    labels: int = 1
    tail: str = "bucket"
    divergence: str = "forward_kl"
    aligned: bool = True
    inplace: bool = True
    softcap: float | None = None
    logit_scale: float = 1.0
    beyond: int = 0  # classes of the student alone
    tiles: kd_launch.Tiles | None = None
    # whether the compiler is told that pointers are multiples of 16 bytes
    said: bool = True

    @property
    def shape(self) -> kd_launch.Tiles:
        sums = self.softcap is not None or self.tail == "uniform"
        return self.tiles or kd_launch.Tiles.of(
            self.num_classes, ELEMENT[self.dtype], sums, self.slow
        )

    @property
    def slow(self) -> bool:
        return self.softcap is not None or self.beyond > 0

    def exponentials(self) -> tuple[float, float]:
        """Per element: one, or two for a temperature off the list; in sweep 1 as many more per
        thread and tile. A softcap takes one more per element."""
        both = self.labels > 0 and self.kept > 0
        each = 2 if both and kd_launch.powers(self.temperature) is None else 1
        cap = 0 if self.softcap is None else 1
        return each * (1 + ELEMENT[self.dtype] / 16 / self.shape.height) + cap, each + cap


BUILDS = [
    Build("kd-128k-T2", 128_256, (7.3, 6.8)),
    Build("kd-128k-T1", 128_256, (6.2, 5.7), temperature=1.0),
    Build("kd-128k-T1.37", 128_256, (9.3, 8.8), temperature=1.37),
    Build("kd-128k-T3/2-mixup", 128_256, (8.4, 7.8), temperature=1.5, labels=2),
    Build("ce-128k", 128_256, (6.2, 5.7), kept=0),
    Build("kd-128k-T2-beside", 128_256, (7.3, 7.0), inplace=False),
    Build("kd-50257-T2", 50_257, (7.7, 7.0), aligned=False),
    Build("kd-32k-T2", 32_000, (7.7, 7.1)),
    Build("kd-256k-T2", 262_144, (7.3, 6.8)),
    Build("kd-32k-T2-fp32", 32_000, (6.4, 5.1), dtype="fp32"),
    Build(
        "kd-1000-jsd-fp16",
        1_000,
        (6.2, 5.9),
        dtype="fp16",
        divergence="jsd",
        temperature=4.0,
        labels=0,
    ),
    Build("ce-50257", 50_257, (6.5, 5.9), kept=0, aligned=False),
    Build("kd-4096-T1.37", 4_096, (10.3, 9.4), temperature=1.37),
]
ARCHES = (80, 90, 100)
# Besides the exponentials that a budget counts, the softcap takes one rsqrt per element and sweep.
TERMS = [
    Build("kd-128k-T2-softcap", 128_256, (28.9, 29.1), softcap=30.0),
    Build("kd-128k-T2-uniform", 128_256, (12.9, 7.2), tail="uniform"),
    Build("kd-128k-T2-uniform-wider", 128_256, (20.4, 14.1), tail="uniform", beyond=128),
]
# Every term at once, in the parts that share a row.
PARTS = [
    BUILDS[7],
    Build(
        "kd-32k-T2-all",
        32_000,
        (37.0, 28.9),
        tail="uniform",
        softcap=30.0,
        logit_scale=0.5,
    ),
]


def request(build: Build, arch: int) -> dict[str, Any]:
    """The call of a build, turned into what the compiler is asked; the constants come from the
    launcher itself.
    """

    def some(width: int) -> torch.Tensor | None:
        return torch.empty(1, width) if width else None

    rows = RowLoss(
        build.num_classes,
        some(build.labels),
        ids_NK=some(build.kept),
        log_probs_NK=some(build.kept),
        teacher_classes=build.num_classes - build.beyond,
        temperature=build.temperature,
        divergence=Divergence(build.divergence, tail=build.tail),
        logit_scale=build.logit_scale,
        softcap=build.softcap,
    )
    size = ELEMENT[build.dtype]
    constants = kd_launch.kernel_constants(
        rows, size, True, build.inplace, build.aligned, build.num_classes
    )
    constants |= {"STAGE": 0} | dict.fromkeys(("STATE", "KEPT", "LABELLED"))
    if build.tiles:
        constants |= {"R": build.tiles.height, "C": constants["VEC"] * 32 * build.tiles.warps}
    absent = ["ROW_WEIGHT", "LABEL_WEIGHT"]
    for name in ("gain", "rate", "taught"):
        absent += [name] * (getattr(kd_launch, name)(rows) is None)
    absent += ["LABELS", "CE_SCALE"] * (not build.labels)
    absent += ["IDS", "LOG_Q", "LOG_TAIL", "KD_SCALE"] * (not build.kept)
    constants |= dict.fromkeys(absent)
    signature = dict.fromkeys(("X", "G"), f"*{build.dtype}") | dict.fromkeys(
        ("LABELS", "IDS"), "*i64"
    )
    signature |= dict.fromkeys(
        (
            "LOSS",
            "CE",
            "KD",
            "LABEL_WEIGHT",
            "LOG_Q",
            "LOG_TAIL",
            "ROW_WEIGHT",
            "CE_SCALE",
            "KD_SCALE",
            "STATE",
            "KEPT",
            "LABELLED",
        ),
        "*fp32",
    )
    signature |= dict.fromkeys(
        (
            "x_stride",
            "g_stride",
            "label_stride",
            "label_weight_stride",
            "id_stride",
            "q_stride",
            "num_classes",
            "width",
            "kept",
            "num_labels",
            "taught",
            "part",
            "parts",
        ),
        "i32",
    )
    signature |= dict.fromkeys(("c", "c2", "temperature", "beta", "gain", "rate"), "fp32")
    sizes = (
        ["x_stride", "g_stride", "num_classes", "width"]
        if build.aligned and build.num_classes % 16 == 0
        else []
    )
    return {
        "name": build.name,
        "kernel": "kdcache.kernels.kd_rows:kd_rows",
        "arch": arch,
        "signature": signature,
        "constants": constants,
        "aligned": ["X", "G", *sizes] if build.said else [],
        "warps": build.shape.warps,
        "maxnreg": build.shape.registers,
    }


def full_request(arch: int, name: str = "full", classes: int = 1000) -> dict[str, Any]:
    """A teacher over all classes, bfloat16 logits, one label, in place."""
    rows = RowLoss(
        classes, torch.empty(1, 1), log_probs_NK=torch.empty(1, classes), temperature=4.0
    )
    absent = ["LABEL_WEIGHT", "ROW_WEIGHT", "taught"]
    absent += ["unit", "gain", "rate"] * (name != "every term")
    constants = kd_launch.full_constants(rows, 2, True, True) | dict.fromkeys(absent)
    signature = {"X": "*bf16", "G": "*bf16", "LABELS": "*i64"} | dict.fromkeys(
        (
            "LOSS",
            "CE",
            "KD",
            "LABEL_WEIGHT",
            "LOG_Q",
            "ROW_WEIGHT",
            "CE_SCALE",
            "KD_SCALE",
        ),
        "*fp32",
    )
    signature |= dict.fromkeys(
        (
            "x_stride",
            "g_stride",
            "label_stride",
            "label_weight_stride",
            "q_stride",
            "num_classes",
            "width",
            "num_labels",
        ),
        "i32",
    )
    signature |= dict.fromkeys(("c", "temperature", "beta", "unit", "gain", "rate"), "fp32")
    return {
        "name": name,
        "kernel": "kdcache.kernels.kd_full:kd_full",
        "arch": arch,
        "signature": signature,
        "constants": constants,
        "aligned": ["X", "G", "LOG_Q"],
        "warps": kd_launch.full_warps(constants["BLOCK"], "forward_kl"),
    }


def staged(stage: int, build: Build) -> dict[str, Any]:
    """A part of 32,000 columns of a longer row."""
    asked = request(build, 90)
    asked["signature"]["KEPT"] = f"*{build.dtype}"
    constants = {
        k: v for k, v in asked["constants"].items() if k not in ("STATE", "KEPT", "LABELLED")
    }
    return asked | {
        "name": f"{build.name}-stage-{stage}",
        "constants": constants | {"STAGE": stage},
        "aligned": [*asked["aligned"], "part"],
    }


def programs(report: aot.Report, warps: int) -> int:
    """That share a multiprocessor: by its registers, a thread's in steps of 8, its 64 warps, and
    its 32 places.
    """
    return min(65_536 // (-(-report.registers // 8) * 8 * 32 * warps), 64 // warps, 32)


def occupancy(build: Build, report: aot.Report) -> list[str]:
    """Where a multiprocessor holds too few programs to be kept busy, or more than L2 keeps the rows
    of. Long rows, of which one each does not fit, have no more than that one; what is slow waits
    for arithmetic."""
    many, shape, row = (
        programs(report, build.shape.warps),
        build.shape,
        build.num_classes * ELEMENT[build.dtype],
    )
    found = []
    if many > 1 and many * 132 * row > MOST_ROWS:
        found.append(
            f"{many} programs to a multiprocessor keep {many * 132 * row / 1e6:.0f} MB of rows "
            "under way"
        )
    if many * shape.height * shape.warps * 512 < LEAST_LOADS * (2 / 3 if build.slow else 1):
        found.append(
            f"{many} programs to a multiprocessor read {many * shape.height * shape.warps // 2} KB "
            "at once"
        )
    return found


def complaints(build: Build, report: aot.Report) -> list[str]:
    """Where a report is over its build's budget; nothing if it is not."""
    vector = 16 // ELEMENT[build.dtype]
    sums = [
        loop
        for loop in report.loops
        if loop.exponentials and not loop.vector_stores and loop.vector_loads
    ]
    gradients = [
        loop
        for loop in report.loops
        if loop.exponentials and loop.vector_stores and loop.vector_loads
    ]
    found = occupancy(build, report) + (
        [] if len(sums) == len(gradients) == 1 else [f"loops: {report.loops}"]
    )
    if report.registers > build.shape.registers or report.spills or report.stack:
        found.append(
            f"{report.registers} registers, {report.spills} spills, {report.stack} bytes of stack"
        )
    if report.shared > 1024:
        found.append(f"{report.shared} bytes of shared memory")
    for loop, most, exponentials in zip(
        sums + gradients, build.instructions, build.exponentials(), strict=False
    ):
        elements = loop.vector_loads * vector
        if loop.instructions > most * elements or loop.exponentials > exponentials * elements:
            found.append(
                f"{loop.instructions / elements:.2f} instructions and "
                f"{loop.exponentials / elements:.2f} exponentials per element; budget {most} and "
                f"{exponentials}"
            )
        if loop.scalar_loads or loop.scalar_stores or loop.barriers:
            found.append(f"narrow accesses or barriers in a loop: {loop}")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], aot.Report]:
    """Every build for every architecture, parts of rows and mutants for sm_90."""
    wanted = [request(build, arch) for build in BUILDS + TERMS for arch in ARCHES]
    wanted += [staged(stage, build) for stage in (1, 2) for build in PARTS]
    wanted += [full_request(arch) for arch in ARCHES] + [full_request(90, "every term")]
    wanted += [full_request(90, "long", 8192)]
    wanted += [request(mutant, 90) for mutant in MUTANTS.values()]
    found = aot.reports(wanted, cache=tmp_path_factory.mktemp("triton"))
    return {(report.name, report.arch): report for report in found}


@pytest.mark.parametrize("build", BUILDS + TERMS, ids=lambda build: build.name)
def test_the_kernel_is_within_its_budget(
    build: Build, compiled: dict[tuple[str, int], aot.Report]
) -> None:
    if triton.__version__ != "3.7.1":
        pytest.skip(f"budgets are triton 3.7.1's; this is {triton.__version__}")
    reports = [report for (name, _), report in compiled.items() if name == build.name]
    assert len(reports) == len(ARCHES)
    assert {report.arch: found for report in reports if (found := complaints(build, report))} == {}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("build", PARTS, ids=lambda build: build.name)
def test_a_part_of_a_row_costs_what_a_row_does(
    build: Build, stage: int, compiled: dict[tuple[str, int], aot.Report]
) -> None:
    report = compiled[f"{build.name}-stage-{stage}", 90]
    (loop,) = (loop for loop in report.loops if loop.exponentials)
    assert (report.spills, report.stack, loop.scalar_loads, loop.scalar_stores, loop.barriers) == (
        0,
        0,
        0,
        0,
        0,
    )
    assert bool(loop.vector_stores) == (stage == 2) and report.registers <= build.shape.registers
    assert loop.instructions <= build.instructions[stage - 1] * 8 * loop.vector_loads


@pytest.mark.parametrize("arch", ARCHES)
def test_a_row_of_all_classes_stays_in_registers(
    arch: int, compiled: dict[tuple[str, int], aot.Report]
) -> None:
    """1000 classes over 64 threads: two vectors of logits and four of the teacher a thread, each
    read once.
    """
    report = compiled["full", arch]
    assert (report.spills, report.stack) == (0, 0) and report.registers <= 128
    assert (report.whole.vector_loads, report.whole.vector_stores) == (6, 2)
    assert report.whole.exponentials <= 3 * 16 + 8


def test_longer_rows_and_every_term_stay_in_registers(
    compiled: dict[tuple[str, int], aot.Report],
) -> None:
    for name in ("every term", "long"):
        report = compiled[name, 90]
        assert (
            report.spills,
            report.stack,
            report.whole.vector_loads,
            report.whole.vector_stores,
        ) == (0, 0, 6, 2)


USUAL = BUILDS[0]
MUTANTS = {
    "registers": replace(USUAL, name="tiles-too-tall", tiles=kd_launch.Tiles(16, 16)),
    "programs": replace(USUAL, name="few-registers", tiles=kd_launch.Tiles(2, 16, 64)),
    "exponentials": replace(USUAL, name="one-row-per-tile", tiles=kd_launch.Tiles(1, 16)),
    "narrow": replace(USUAL, name="alignment-not-said", said=False),
}


def test_budgets_can_be_broken(compiled: dict[tuple[str, int], aot.Report]) -> None:
    """Too tall a tile spills, few registers put twice the rows under way, one row per tile pays for
    more exponentials, hidden alignment narrows accesses."""
    found = {why: complaints(USUAL, compiled[mutant.name, 90]) for why, mutant in MUTANTS.items()}
    assert any("spills" in text for text in found["registers"])
    assert any("2 programs to a multiprocessor keep 68 MB" in text for text in found["programs"])
    assert any(
        "KB at once" in text
        for text in occupancy(Build("short", 1000, (0, 0)), compiled[USUAL.name, 90])
    )
    assert any("exponentials per element" in text for text in found["exponentials"])
    assert any("scalar_loads=64" in text for text in found["narrow"])
    assert complaints(USUAL, compiled[USUAL.name, 90]) == []
