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

from kdcache.bench import lm_head_speed


def test_it_runs_as_a_module_and_says_that_no_kernel_was_timed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdcache.bench.lm_head_speed", "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    found = json.loads(last)
    assert (
        lines[-1] == found["note"] == lm_head_speed.SAY_CPU
        and not found["kernels_timed"]
        and found["errors"] == []
    )
    assert set(found["contenders"]) == {
        "kd_linear, 64 KB",
        "kd_linear, 64 KB, frozen head",
        "whole logits",
        lm_head_speed.BARE,
    }
    for name, one in found["contenders"].items():
        assert one["seconds"]["min"] > 0 and one["flop_per_second"] > 0
        assert name == lm_head_speed.BARE or one["gradient_error"] < 1e-5
    assert found["operations"] == 6 * 64 * 1000 * 32


def test_the_floor_is_what_can_be_counted() -> None:
    sizes = lm_head_speed.SIZES["cuda"]
    assert (
        round(lm_head_speed.operations(sizes) / 1e12, 1) == 25.8
        and round(lm_head_speed.model_bytes(sizes) / 1e9) == 43
    )
    said = " ".join((lm_head_speed.__doc__ or "").split())
    assert "25.8 TFLOP" in said and "43 GB" in said and "floor" in said


def test_a_gradient_that_is_not_finite_is_an_error_and_the_line_is_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lm_head_speed, "gradient_error", lambda *_: float("nan"))
    found = lm_head_speed.lm_head_speed(quick=True, rounds=1, device="cpu")
    assert len(found["errors"]) == 3 and "gradient is off by nan" in found["errors"][0]
    json.dumps(found, allow_nan=False)


def test_a_wrong_gradient_is_noticed() -> None:
    problem = lm_head_speed.Problem.of(lm_head_speed.QUICK["cpu"], torch.device("cpu"))
    hidden_NH, _ = lm_head_speed.whole(problem, lm_head_speed.torch_engine)
    assert (
        lm_head_speed.gradient_error(problem, hidden_NH)
        < 1e-5
        < 0.01
        < lm_head_speed.gradient_error(problem, hidden_NH * 2)
    )
