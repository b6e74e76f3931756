"""The benchmark of the loss behind an LM head: it runs on a CPU, says what it did not time, and its
floor is right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kdcache.bench import kd_linear


def test_it_runs_as_a_module_and_says_that_no_kernel_was_timed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdcache.bench.kd_linear", "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    found = json.loads(last)
    assert (
        lines[-1] == found["note"] == kd_linear.SAY_CPU
        and not found["kernels_timed"]
        and found["errors"] == []
    )
    assert set(found["contenders"]) == {
        "kd_linear, 64 KB",
        "kd_linear, 64 KB, frozen head",
        "whole logits",
        kd_linear.BARE,
    }
    for name, one in found["contenders"].items():
        assert one["seconds"]["min"] > 0 and one["flop_per_second"] > 0
        assert name == kd_linear.BARE or one["gradient_error"] < 1e-5
    assert found["operations"] == 6 * 64 * 1000 * 32


def test_the_floor_is_what_can_be_counted() -> None:
    sizes = kd_linear.SIZES["cuda"]
    assert (
        round(kd_linear.operations(sizes) / 1e12, 1) == 25.8
        and round(kd_linear.model_bytes(sizes) / 1e9) == 43
    )
    said = " ".join((kd_linear.__doc__ or "").split())
    assert "25.8 TFLOP" in said and "43 GB" in said and "floor" in said


def test_a_gradient_that_is_not_finite_is_an_error_and_the_line_is_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kd_linear, "gradient_error", lambda *_: float("nan"))
    found = kd_linear.kd_linear(quick=True, rounds=1, device="cpu")
    assert len(found["errors"]) == 3 and "gradient is off by nan" in found["errors"][0]
    json.dumps(found, allow_nan=False)


def test_a_wrong_gradient_is_noticed() -> None:
    problem = kd_linear.Problem.of(kd_linear.QUICK["cpu"], torch.device("cpu"))
    hidden_NH, _ = kd_linear.whole(problem, kd_linear.torch_engine)
    assert (
        kd_linear.gradient_error(problem, hidden_NH)
        < 1e-5
        < 0.01
        < kd_linear.gradient_error(problem, hidden_NH * 2)
    )
