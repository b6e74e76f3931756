"""What triton makes of the kernels, run without a GPU: `pytest -m gpu --ptx`, which also runs the
other tests of the kernels so. Here: that no order of threads or programs matters, that each barrier
is needed, and that the bytes are those of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import kernel_world as world
import pytest
import torch
from kernel_world import Case, kd_loss_rows, run
from ptx_code import Kernel
from ptx_memory import Fault
from torch import Tensor

pytestmark = pytest.mark.gpu
CASES = [
    Case(num_classes=1272, labels="two", kept=64, inplace=True),
    Case(num_classes=1271, layout="odd", weights="some"),
    Case(num_classes=4096, dtype=torch.bfloat16, temperature=1.37, divergence="jsd"),
    Case(
        num_classes=1271,
        layout="odd",
        dtype=torch.float16,
        inplace=True,
        tail="conditional",
        kept=8,
        labels="none",
    ),
    Case(num_classes=1272, tail="uniform", softcap=30.0, labels="in"),
]


@pytest.fixture
def bench(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import triton

    if triton.knobs.runtime.interpret or device != "cpu":
        pytest.skip("needs triton to compile, and no device: run pytest -m gpu --ptx")
    import ptx_driver

    kept = dict(vars(ptx_driver.BENCH))
    ptx_driver.BENCH.launches = []
    yield ptx_driver.BENCH
    vars(ptx_driver.BENCH).update(kept)


def bits(ran: world.Ran) -> list[Tensor]:
    out, gradient, *_ = ran
    return [t.contiguous().view(torch.uint8) for t in (*out, gradient)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_order_of_warps_or_programs_matters(case: Case, bench: Any) -> None:
    """Warps one after the other, first to last and last to first, and programs last to first: the
    same bits.
    """
    problem = world.problem(case)
    expected = bits(run(problem, "cpu"))
    for warps, order in (
        (range, range),
        (lambda n: reversed(range(n)), lambda n: reversed(range(n))),
    ):
        bench.warps, bench.order = warps, order
        assert all(
            torch.equal(a, b) for a, b in zip(bits(run(problem, "cpu")), expected, strict=True)
        )


def barriers(kernel: Kernel) -> list[int]:
    """Places of barriers that the source asks for, and not the compiler."""
    return [
        i
        for i, ins in enumerate(kernel.instructions)
        if ins.op[:2] == ("bar", "sync") and asked_for(ins.source)
    ]


def asked_for(source: str) -> bool:
    import linecache
    from pathlib import Path

    import kdcache.kernels.kd_rows as at

    name, line = source.split(" ")[0].split(":")[:2]
    return "debug_barrier" in linecache.getline(str(Path(at.__file__).parent / name), int(line))


def without(place: int, of: str, found: list[int]) -> Callable[[Kernel], Kernel]:
    """Takes the barrier number `place` out of a kernel, and notes how many there are."""

    def change(kernel: Kernel) -> Kernel:
        if kernel.name != of:
            return kernel
        found[:] = barriers(kernel)
        kept = list(kernel.instructions)
        kept[found[place]] = replace(kept[found[place]], op=("bar", "warp", "sync"), args=("-1",))
        return replace(kernel, instructions=kept)

    return change


@pytest.mark.parametrize("inplace", [True, False])
def test_no_barrier_of_a_row_can_be_spared(inplace: bool, bench: Any) -> None:
    """Rows of several warps: without any one of the barriers that the source writes, a race is
    found.
    """
    problem = world.problem(Case(num_classes=4096, kept=64, labels="two", inplace=inplace))
    found, spared = [0], []
    place = 0
    while place < len(found):
        bench.change = without(place, "kd_rows", found)
        try:
            run(problem, "cpu")
            spared.append(place)
        except Fault as e:
            assert "race" in str(e)
        place += 1
    assert len(found) == 3 and spared == []


@pytest.mark.parametrize(("classes", "kept"), [(32_000, 64), (50_257, 16), (128_256, 64)])
def test_the_bytes_are_those_of_the_model(classes: int, kept: int, bench: Any) -> None:
    """Of a row of bf16, in place: the sweeps read 4 V and write 2 V; besides, each of the K + J
    entries is read and written a few times, by copies of it at most as many as there are threads.
    """
    case = Case(rows=2, num_classes=classes, kept=kept, dtype=torch.bfloat16, inplace=True)
    problem = world.problem(case)
    run(problem, "cpu")
    kernel, scaling = bench.launches[-2:]
    threads, name = 512, "X+G"
    assert 0 <= kernel.loaded[name] - 2 * 4 * classes <= 2 * 2 * 4 * threads
    assert 2 * 2 * kept <= kernel.stored[name] - 2 * 2 * classes <= 2 * 2 * (2 * kept + 2 + 16)
    # a factor of 1 moves nothing
    assert (scaling.loaded["G+OUT"], scaling.stored["G+OUT"]) == (0, 0)


def test_without_labels_and_teacher_nothing_is_read(bench: Any) -> None:
    problem = world.problem(
        Case(num_classes=32_000, labels="ignored", dtype=torch.bfloat16, inplace=True)
    )
    keywords = problem.keywords | {"row_weight": torch.zeros(3)}
    x = problem.logits.clone().requires_grad_()
    loss = kd_loss_rows(x, **keywords, inplace=True)[0]
    assert (
        bench.launches[-1].loaded["X+G"] == 0
        and loss.tolist() == [0, 0, 0]
        and bool((x == 0).all())
    )
