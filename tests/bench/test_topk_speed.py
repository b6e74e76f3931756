"""The race over what is kept of a teacher's logits: who runs, what is counted, and that a wrong
answer is said.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from kdcache.bench import topk_speed as module
from kdcache.cli import main


def test_it_ends_in_one_line_and_says_what_was_not_timed() -> None:
    done = CliRunner().invoke(
        main, ["bench", "topk-lse", "--quick", "--rounds", "1", "--device", "cpu"]
    )
    assert done.exit_code == 0, (done.stderr, done.exception)
    *lines, last = done.stdout.splitlines()
    found = json.loads(last)
    assert (
        lines[-1] == found["note"] == module.SAY_CPU
        and found["kernels_timed"] is False
        and found["errors"] == []
    )
    assert [case["num_classes"] for case in found["cases"]] == [100, 127]
    for case in found["cases"]:
        assert set(case["contenders"]) == {"topk + logsumexp", "exact torch"}
        assert case["model_bytes"] == 8 * (case["num_classes"] * 2 + 12 * 8 + 4 * 2 + 16)


def test_the_floor_can_be_counted_by_hand() -> None:
    assert (
        module.model_bytes(8192, 128_256, 64, 2, 2)
        == 8192 * (256_512 + 768 + 8 + 16)
        == 2_107_834_368
    )
    assert module.CUDA.classes == (1000, 32_000, 50_257, 128_256, 151_936, 262_144)
    assert module.CUDA.rows == 8192 and module.CUDA.flush_bytes > 126 * 2**20


def test_a_case_that_breaks_ends_the_race_and_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    race = module.race_shape

    def broken(track: object, sizes: object, rounds: int, classes: int, *others: int) -> object:
        if classes == 127:
            raise RuntimeError("illegal memory access")
        return race(track, sizes, rounds, classes, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "race_shape", broken)
    found = module.topk_speed(quick=True, rounds=1, device="cpu")
    assert (
        found["errors"] == ["V=127 k=8: RuntimeError: illegal memory access"]
        and found["left_out"] == 0
    )
    assert found["cases"][0]["contenders"]["exact torch"]["seconds"]["median"] > 0
    assert "V=100 k=8  exact torch" in module.render(found)


def test_the_kernel_is_asked_for_the_same_answer(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(3, 127, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    labels = torch.tensor([0, 5, 126], device=device)
    assert module.differs(logits, 8, labels) == []
    right = module.fused

    def wrong(*args: object) -> object:
        found = right(*args)  # type: ignore[arg-type]
        return replace(found, tail_lse_NT=found.tail_lse_NT + 1e-3, ids_NK=found.ids_NK.flip(1))

    monkeypatch.setattr(module, "fused", wrong)
    assert module.differs(logits, 8, labels) == [
        "ids differ from the exact torch form",
        "tail lse differ from the exact torch form",
    ]
