"""The race over the distillation loss: who runs, what is counted, and that a wrong gradient or a
failure is said.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from kdcache.bench import kd_contenders as world
from kdcache.bench import loss_speed, track
from kdcache.bench.races import RACES
from kdcache.cli import main
from kdcache.errors import UsageError

CPU = torch.device("cpu")


def bench(*args: str) -> Result:
    return CliRunner().invoke(main, ["bench", "loss", "--quick", "--rounds", "1", *args])


def problem(
    temperature: float = 2.0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> world.Problem:
    return world.make_problem(6, 131, 5, temperature, dtype, torch.device(device))


def small_track() -> track.Track:
    return track.Track(CPU, copy_bytes=1024, flush_bytes=1024)


def test_on_a_cpu_the_torch_engine_is_raced_and_the_kernels_are_said_to_be_untimed(
    tmp_path: Path,
) -> None:
    result = bench(
        "--device", "cpu", "--results", str(tmp_path), "--plot", str(tmp_path / "plots" / "p.png")
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    *lines, last = result.stdout.splitlines()
    found = json.loads(last)
    assert (
        lines[-1] == found["note"] == loss_speed.SAY_CPU
        and found["kernels_timed"] is False
        and found["errors"] == []
    )
    assert [(case["num_classes"], case["temperature"], case["k"]) for case in found["cases"]] == [
        (100, 2.0, 8),
        (127, 2.0, 8),
    ]
    # 16 rows of float32: logits and gradient, 8 ids and log-probabilities, tail, label, three
    # results
    assert found["cases"][0]["model_bytes"] == 16 * (2 * 100 * 4 + 8 * (4 + 4) + 4 + 8 + 12)
    for case in found["cases"]:
        assert set(case["contenders"]) == {"torch engine", "torch engine, in place", "definition"}
        for one in case["contenders"].values():
            assert one["bytes_per_second"] == pytest.approx(
                case["model_bytes"] / one["seconds"]["median"]
            )
            assert one["share_of_copy"] == pytest.approx(
                one["bytes_per_second"] / case["copy_bytes_per_second"]
            )
            assert max(one["gradient_error"].values()) < 1e-5
    (kept,) = tmp_path.glob("*.json")
    assert kept.name.startswith("kd_loss_cpu_20") and kept.read_text() == last + "\n"
    assert (tmp_path / "plots" / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_least_bytes_at_the_size_that_is_named() -> None:
    assert (
        loss_speed.model_bytes(8192, 128_256, 64, 2)
        == 8192 * (4 * 128_256 + 64 * 8 + 24)
        == 4_207_083_520
    )


def test_the_cases_are_those_that_were_promised() -> None:
    assert loss_speed.CUDA.classes == (
        1000,
        4096,
        10_000,
        32_000,
        50_257,
        128_256,
        151_936,
        262_144,
    )
    assert len(list(loss_speed.CUDA.cases())) == 8 * 2 * 3 and loss_speed.CUDA.rows == 8192
    assert loss_speed.CUDA.dtype == torch.bfloat16 and loss_speed.CUDA.flush_bytes > 126 * 2**20


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench("--device", "cuda")
    assert result.exit_code == 2 and "sees no CUDA device" in result.stderr
    with pytest.raises(UsageError, match="expected cpu, cuda or cuda:N"):
        track.choose_device("mps")
    assert track.choose_device(None) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="the interpreter would be timed"):
        track.choose_device("cuda:0")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # set_device wants to know which
    assert track.choose_device("cuda") == torch.device("cuda:1")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    monkeypatch.setattr(loss_speed, "loss_speed", lambda **_: pytest.fail("it was timed"))
    result = bench("--plot", str(tmp_path / "p.png"))
    assert result.exit_code == 2 and "--plot needs matplotlib" in result.stderr


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_kernel_is_asked_for_the_same_loss(
    temperature: float, inplace: bool, device: str
) -> None:
    """In the interpreter, or with -m gpu on the device: what is timed gives the definition's
    gradient.
    """
    p = problem(temperature, device=device)
    assert max(world.gradient_errors(p, partial(world.Fused.of(p), inplace)).values()) < 2e-6
    # in place the logits are gone, and can be put back
    assert torch.equal(p.logits_NV, p.kept_NV) != inplace
    p.restore()
    assert torch.equal(p.logits_NV, p.kept_NV)


def test_errors_see_a_wrong_gradient_in_the_head_and_in_the_tail() -> None:
    p = problem()
    assert p.targets.ids_NK is not None
    right = world.define(p)
    named = torch.cat([p.targets.ids_NK, p.labels_N[:, None]], 1)
    in_tail = torch.ones_like(right, dtype=torch.bool).scatter(1, named, False)
    head = world.gradient_errors(p, lambda: torch.where(in_tail, right, 1.1 * right))
    tail = world.gradient_errors(p, lambda: torch.where(in_tail, 1.1 * right, right))
    assert head["max"] == pytest.approx(0.1, rel=1e-3) and head["tail"] < 1e-6
    assert tail["tail"] == pytest.approx(0.1, rel=1e-3)
    poisoned = torch.full_like(right, torch.nan)
    assert all(e != e for e in world.gradient_errors(p, lambda: poisoned).values())


def test_the_problem_is_a_proper_one() -> None:
    p = world.make_problem(30, 97, 24, 2.0, torch.bfloat16, CPU)
    ids, t = p.targets.ids_NK, p.targets
    assert ids is not None and t.log_tail_N is not None
    assert all(len(set(row)) == 24 and 0 <= min(row) and max(row) < 97 for row in ids.tolist())
    torch.testing.assert_close(t.log_probs_NK.exp().sum(1) + t.log_tail_N.exp(), torch.ones(30))
    assert int((ids == p.labels_N[:, None]).any(1).sum()) >= 10
    q_NV = world.dense_teacher(t, torch.float64)
    torch.testing.assert_close(q_NV.sum(1), torch.ones(30, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        q_NV.gather(1, ids), t.log_probs_NK.double().exp(), rtol=1e-6, atol=0
    )


def test_a_rival_over_a_dense_teacher_is_held_to_its_own_definition() -> None:
    """CE + KL to dense probabilities, in plain torch and Liger's units, is right by that measure,
    and wrong by the sparse one in the units of that."""
    p = problem()
    q_NV = world.dense_teacher(p.targets, torch.float32)

    def dense() -> Tensor:
        log_p = torch.log_softmax(p.logits_NV / 2.0, -1)
        kd = torch.nn.functional.kl_div(log_p, q_NV, reduction="sum")
        value = torch.nn.functional.cross_entropy(p.logits_NV, p.labels_N, reduction="sum") + 4 * kd
        return torch.autograd.grad(value, p.logits_NV)[0]

    assert max(world.gradient_errors(p, dense, q_NV).values()) < 1e-6
    assert (
        1e-3
        < world.gradient_errors(p, lambda: dense() * (1 - world.ALPHA) / len(p.labels_N))["tail"]
        < 1
    )


def test_what_fails_is_left_out_and_said_and_what_is_destroyed_is_put_back() -> None:
    calls: list[str] = []

    def fail() -> None:
        raise MemoryError("2 GB\nmore")

    found = small_track().race(
        {
            "a": track.Entrant(lambda: calls.append("run"), lambda: calls.append("prepare")),
            "rival": track.Entrant(fail),
            "ours": track.Entrant(fail, own=True),
        },
        rounds=2,
        model_bytes=2048,
        warmups=1,
    )
    # twice beforehand, one warm-up, two rounds
    assert calls == ["prepare", "run"] * (2 + 1 + 2)
    assert found["contenders"]["rival"] == {"failed": "MemoryError: 2 GB"}
    assert found["errors"] == ["ours: MemoryError: 2 GB"]
    assert set(found["contenders"]["a"]) == {
        "seconds",
        "bytes_per_second",
        "share_of_copy",
        "peak_bytes",
    }


def test_on_cuda_the_events_stand_right_around_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("synchronize")

        def elapsed_time(self, _stop: Event) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _cycles: said.append("wait"))
    course = small_track()
    course.device = torch.device("cuda")
    course.dirt = SimpleNamespace(
        zero_=lambda: said.append("write"),  # type: ignore[assignment]
        sum=lambda: said.append("read"),
    )
    assert course.seconds(lambda: said.append("run"), lambda: said.append("prepare")) == 0.0015
    # Read last: what the caches hold then is clean, and nothing of it is written back while the run
    # is timed.
    assert said == ["prepare", "write", "read", "wait", "record", "run", "record", "synchronize"]


def test_a_wrong_gradient_of_ours_is_an_error_after_all_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = world.engine
    monkeypatch.setattr(
        world, "engine", lambda p, inplace=False: engine(p, inplace) * (1 if inplace else 2)
    )
    result = bench("--device", "cpu", "--results", str(tmp_path))
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(
        "Error: V=100 T=2 K=8: torch engine: its gradient is off"
    )
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert json.loads(result.stdout.splitlines()[-1])["errors"] == [
        text
        for text in json.loads(next(tmp_path.glob("*.json")).read_text())["errors"]
        if "torch engine:" in text
    ]


def test_a_gradient_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loss_speed, "gradient_errors", lambda *_: {"max": 0.0, "tail": float("nan")}
    )
    found = loss_speed.loss_speed(quick=True, rounds=1, device="cpu")
    assert len(found["errors"]) == 2 * 2 and found["cases"][0]["contenders"]["torch engine"][
        "gradient_error"
    ] == {"max": 0.0, "tail": None}
    json.dumps(found, allow_nan=False)


def test_a_case_that_breaks_ends_the_race_and_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = world.make_problem

    def broken(rows: int, classes: int, *others: Any) -> world.Problem:
        if classes == 127:
            raise RuntimeError("illegal memory access")
        return make(rows, classes, *others)

    monkeypatch.setattr(loss_speed, "make_problem", broken)
    found = loss_speed.loss_speed(quick=True, rounds=1, device="cpu")
    assert found["errors"] == ["V=127 T=2 K=8: RuntimeError: illegal memory access"]
    assert (
        "contenders" in found["cases"][0] and found["cases"][1]["failed"] == "illegal memory access"
    )
    assert "illegal memory access" in loss_speed.render(
        found
    ) and "V=100 T=2 K=8  definition" in loss_speed.render(found)
    json.dumps(found, allow_nan=False)


def test_a_race_that_takes_too_long_leaves_the_rest_out_and_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clock = iter((0.0, 1.0, 421.0, 422.0))
    monkeypatch.setattr(track, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = track.each_case([(1,), (2,), (3,)], lambda n: {"n": n}, str)
    assert (
        found == [{"n": 1}]
        and "left out, as 420 s are over: [(2,), (3,)]" in capsys.readouterr().out
    )
    cases = loss_speed.CUDA.cases()
    assert {k for _, _, k in cases[:12]} == {loss_speed.CUDA.compiled_at} and len(
        set(cases)
    ) == len(cases)
    loss_speed.draw(
        {"cases": [], "rows": 1, "dtype": "", "kernels_timed": False}, tmp_path / "p.png"
    )


def test_table_and_plot_of_a_race_on_a_device(tmp_path: Path) -> None:
    """A made-up result: rivals that ran out of memory or out of numbers."""
    one = {
        "seconds": {"median": 2e-3, "min": 2e-3, "max": 2e-3},
        "bytes_per_second": 1e12,
        "share_of_copy": 0.25,
        "peak_bytes": 3_000_000,
        "gradient_error": {"max": 0.002, "tail": None},
    }
    cases = [
        {
            "num_classes": v,
            "temperature": t,
            "k": 64,
            "copy_bytes_per_second": 4e12,
            "errors": [],
            "contenders": {"kernel": one, "definition": {"failed": "OutOfMemoryError: 9 GB"}},
        }
        for v in (1000, 32_000)
        for t in (1.0, 2.0)
    ]
    result = {
        "cases": cases,
        "rows": 8192,
        "dtype": "bfloat16",
        "kernels_timed": True,
        "note": None,
        "liger": False,
        "errors": [],
        "machine": {"gpus": ["made up"]},
    }
    text = loss_speed.render(result)
    assert "V=32000 T=2 K=64  definition: OutOfMemoryError: 9 GB" in text
    assert "liger-kernel is not installed: not raced" in text
    (line,) = (line for line in text.splitlines() if line.startswith("V=1000 T=1 K=64  kernel"))
    assert line.split()[-8:] == ["kernel", "2", "1000", "25", "3", "2.0e-03", "not", "finite"]
    loss_speed.draw(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("race", RACES, ids=lambda race: race.name)
def test_an_entry_names_a_benchmark(race: Any) -> None:
    module = importlib.import_module(f"kdcache.bench.{race.module}")
    assert callable(getattr(module, race.module)) and callable(module.render)
    assert ("plot" in race.options) == hasattr(module, "draw")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="no CUDA device, or triton interprets in this process: run pytest -m gpu",
)
def test_on_a_device_the_kernels_are_timed() -> None:
    result = bench("--device", "cuda")
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kernels_timed"] and found["errors"] == []
    for case in found["cases"]:
        assert {"kernel, in place", "kernel", "torch engine", "definition"} <= set(
            case["contenders"]
        )
        assert case["contenders"]["kernel, in place"]["seconds"]["median"] > 0
