"""Programs that share a row in one launch: the arithmetic of two launches to the bit, the order of
memory, no deadlock.

The interpreter runs one program after the other, so a wait would not end there: it is run twice
over the same scratch with counters that say that all have arrived, and what the first time leaves
is what the second finds. Races and deadlocks can show on a device only (`-m gpu`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aot
import kernel_world as world
import pytest
import torch
import triton
from kernel_world import Case, usual
from test_aot import BUILDS, request
from torch import Tensor

from kdcache.kernels import kd_launch, kd_loss
from kdcache.kernels.kd_loss import kd_loss_rows

CASES = [
    Case(num_classes=1272, labels="two", kept=64),
    Case(num_classes=1271, layout="odd", labels="some", weights="some"),
    Case(
        num_classes=1272,
        layout="padded",
        temperature=1.37,
        labels="twice",
        divergence="jsd",
        dtype=torch.bfloat16,
    ),
    Case(
        num_classes=1271,
        layout="strided",
        labels="none",
        temperature=0.5,
        rows=1,
        dtype=torch.float16,
    ),
    Case(num_classes=1272, tail="uniform", stats=True, softcap=30.0, labels="in"),
]


class Twice:
    """A kernel whose programs count `parts` arrivals before any has arrived, launched a second time
    over its traces.
    """

    def __init__(self, kernel: Any, counters: list[Tensor]) -> None:
        self.kernel, self.counters = kernel, counters

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **constants: Any) -> None:
            assert constants["STAGE"] == 3 and len(grid) == 1
            for _ in range(2):
                self.counters[0][0] = 0
                self.kernel[grid](*given, **constants)
            assert int(self.counters[0][0]) == grid[0]  # every part of every row was taken

        return launch


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_launch_computes_what_two_do(
    case: Case, parts: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.compiled():
        pytest.skip(
            "compiled, programs wait for each other in truth: see below, and kernels/test_ptx.py"
        )
    problem, counters = world.problem(case), []
    expected = world.run(problem, device, parts=parts)

    def arrived(x_NV: Tensor, parts: int, form: str) -> Tensor:
        counters[:] = [torch.full((1 + len(x_NV),), parts, dtype=torch.int32)]
        return counters[0]

    monkeypatch.setattr(kd_launch, "_counters", arrived)
    monkeypatch.setattr(kd_launch, "kd_rows", Twice(kd_launch.kd_rows, counters))
    monkeypatch.setattr(kd_loss, "_check", lambda *_: None)
    out, gradient, *_ = world.run(problem, device, parts=parts, form="one launch")
    assert all(torch.equal(a, b) for a, b in zip(out, expected[0], strict=True))
    assert torch.equal(gradient, expected[1])


def test_what_cannot_run_in_one_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = usual()
    with pytest.raises(ValueError, match="form 'three'; known"):
        kd_loss_rows(problem.logits, **problem.keywords, form="three")
    if triton.knobs.runtime.interpret:
        with pytest.raises(
            ValueError, match=r"interpreter .* would not end; give form='two launches'"
        ):
            kd_loss_rows(problem.logits, **problem.keywords, parts=2, form="one launch")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=4)
    )
    with pytest.raises(
        ValueError, match=r"5 programs share a row .* the device has 4 multiprocessors"
    ):
        kd_launch._counters(problem.logits, 5, "one launch")
    counters = kd_launch._counters(problem.logits, 4, "one launch")
    assert counters is not None and counters.dtype == torch.int32 and counters.tolist() == [0] * 4
    assert kd_launch._counters(problem.logits, 5, "two launches") is None


def long_rows(
    rows: int, classes: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """Logits and targets made on the device: K = 64, one label."""
    torch.manual_seed(seed)
    logits = torch.randn(rows, classes, device="cuda").mul_(3).to(dtype)
    ids = (
        torch.rand(rows, classes, device="cuda").topk(64).indices
        if classes < 2**15
        else (
            torch.randint(classes // 64, (rows, 64), device="cuda")
            + torch.arange(64, device="cuda") * (classes // 64)
        )
    )
    log_probs = torch.log_softmax(torch.randn(rows, 65, device="cuda"), -1)
    return logits, {
        "ids": ids,
        "log_probs": log_probs[:, :64].contiguous(),
        "log_tail": log_probs[:, 64].contiguous(),
        "labels": torch.randint(classes, (rows,), device="cuda"),
        "temperature": 2.0,
    }


def run_form(logits: Tensor, keywords: dict[str, Any], **form: Any) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    loss = kd_loss_rows(x, **keywords, inplace=True, **form)[0]
    return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]


def wait_for_device(seconds: float = 60) -> None:
    """Until the device has done what it was given. A process whose device hangs cannot end in an
    orderly way.
    """
    done, until = torch.cuda.Event(), time.monotonic() + seconds
    done.record()
    while not done.query():
        if time.monotonic() > until:
            print(
                f"the device has not finished after {seconds} s: a deadlock",
                file=sys.__stderr__,
                flush=True,
            )
            os._exit(1)
        time.sleep(0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "classes", "parts"),
    [(1, 128_256, 64), (7, 50_257, 5), (132, 262_144, 2), (1000, 32_000, 8), (4096, 8_192, 3)],
)
def test_one_launch_gives_what_two_do(
    rows: int, classes: int, parts: int, dtype: torch.dtype, device: str
) -> None:
    if device == "cpu":
        pytest.skip("a wait for another program does not end in the interpreter")
    logits, keywords = long_rows(rows, classes, dtype)
    expected = run_form(logits, keywords, parts=parts)
    found = run_form(logits, keywords, parts=parts, form="one launch")
    wait_for_device()
    assert all(world.same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_a_hundred_launches_race_and_none_loses(device: str) -> None:
    """Many rows of short parts, so that rows begin and end all the time, on two streams at once."""
    if device == "cpu":
        pytest.skip("a wait for another program does not end in the interpreter")
    logits, keywords = long_rows(4096, 4096, torch.bfloat16)
    expected = run_form(logits, keywords, parts=8)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    first = None
    for _ in range(50):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run_form(logits, keywords, parts=8, form="one launch"))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        wait_for_device()
        first = found[0] if first is None else first
        assert all(torch.equal(a, b) for each in found for a, b in zip(each, first, strict=True))
    assert first is not None and all(world.same(a, b) for a, b in zip(first, expected, strict=True))


@pytest.mark.parametrize(("classes", "most"), [(70_144, 285), (128_256, 155), (151_936, None)])
def test_rows_are_split_where_that_ends_sooner(classes: int, most: int | None) -> None:
    """By the work of the busiest of 132 multiprocessors, in rows: whole waves of them, or the parts
    that fall to it. All rows have to be in L2 still when the second launch reads them: none of
    151,936 classes are."""
    lengths = {rows: kd_launch.part_length(rows, classes) for rows in range(132, 1000)}
    parts = {rows: -(-classes // length) for rows, length in lengths.items() if length < classes}
    assert max(parts, default=None) == most and 132 not in parts
    for rows, many in parts.items():
        assert (
            rows * classes * 2 <= 40e6
            and -(-rows * many // 132) * lengths[rows] < 0.97 * -(-rows // 132) * classes
        )
    assert most is None or -(-133 * parts[133] // 132) * lengths[133] < 0.6 * 2 * classes
    # a second launch takes as long as it would save
    assert kd_launch.part_length(133, 64_000) >= 64_000


WITH_SASS = """
import json, sys
from dataclasses import asdict
import aot
said, tool = [], aot._tool
def keep(*given):
    said.append(tool(*given))
    return said[-1]
aot._tool = keep
for one in json.load(sys.stdin):
    print(json.dumps([asdict(aot.compile_kernel(one)), said[-1]]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[aot.Report, list[str]]]:
    """Half of a row of 256K and, for one architecture, 32,000 columns of few rows, with their
    instructions.
    """
    wanted = []
    for base, arch in ((0, 80), (0, 90), (7, 100)):
        asked = request(replace(BUILDS[base], name=f"one-launch-{base}"), arch)
        asked["signature"] |= {"KEPT": "*bf16", "COUNTERS": "*i32"}
        for name in ("STATE", "KEPT", "LABELLED", "COUNTERS"):
            del asked["constants"][name]
        wanted.append(
            asked
            | {
                "constants": asked["constants"] | {"STAGE": 3},
                "aligned": [*asked["aligned"], "part"],
            }
        )
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run(
        [sys.executable, "-c", WITH_SASS],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1] / "tools",
        timeout=600,
        check=True,
    )
    return [
        (
            aot.Report(
                **{
                    **report,
                    "loops": [aot.Loop(**one) for one in report["loops"]],
                    "whole": aot.Loop(**report["whole"]),
                }
            ),
            [code for _, code in aot.sass_lines(sass)],
        )
        for report, sass in map(json.loads, done.stdout.splitlines())
    ]


@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="budgets are triton 3.7.1's")
def test_one_launch_is_within_the_budgets_of_a_row(
    compiled: list[tuple[aot.Report, list[str]]],
) -> None:
    for report, _ in compiled:
        build = BUILDS[int(report.name[-1])]
        assert (report.spills, report.stack) == (0, 0) and report.registers <= build.shape.registers
        # the wait is in neither
        sums, gradient = (loop for loop in report.loops if loop.exponentials)
        assert gradient.vector_stores == gradient.vector_loads and not sums.vector_stores
        for loop, most in zip((sums, gradient), build.instructions, strict=True):
            assert loop.instructions <= (most + 0.2) * 8 * loop.vector_loads
            assert (loop.scalar_loads, loop.scalar_stores, loop.barriers) == (0, 0, 0)


def test_arrivals_release_and_waits_acquire(compiled: list[tuple[aot.Report, list[str]]]) -> None:
    """In machine code: part taken, first sweep, barrier, fence, arrival, then a load that is
    repeated until all are there and drops the multiprocessor's own cache, barrier, second sweep."""
    order = [
        r"ATOMG.*ADD.STRONG.GPU",
        r"LDG.*\.128",
        r"BAR.SYNC",
        r"MEMBAR.*GPU",
        r"ATOMG.*ADD.STRONG.GPU",
        r"CCTL.IVALL",
        r"LDG.*STRONG.GPU",
        r"CCTL.IVALL",
        r"BAR.SYNC",
        r"STG.*\.128",
    ]
    for _, code in compiled:
        at = -1
        for wanted in order:
            at = next((i for i in range(at + 1, len(code)) if re.search(wanted, code[i])), -1)
            assert at >= 0, f"{wanted} is missing, or in another place"
        assert (
            sum("ATOMG" in line for line in code) == 2
            and sum("STRONG" in line for line in code) == 3
        )
