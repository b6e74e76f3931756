"""The race between tiles: who runs, that each runs with its own tiles, and what is said where
nothing can be timed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdcache.bench import kd_tiles as bench
from kdcache.bench.kd_contenders import Fused, make_problem
from kdcache.bench.track import Track
from kdcache.errors import UsageError
from kdcache.kernels import kd_launch
from kdcache.kernels.kd_launch import Tiles


@pytest.mark.parametrize("classes", bench.Sizes().classes)
def test_the_tiles_in_use_are_among_the_candidates_and_all_differ(classes: int) -> None:
    found = bench.candidates(classes, 2)
    assert bench.Way(Tiles.of(classes, 2)) in found and len({str(way) for way in found}) == len(
        found
    )
    # of a multiprocessor
    assert all(way.tiles.warps * 32 * way.tiles.registers <= 65_536 for way in found)
    assert any(way.tiles.reverse for way in found) == (classes > 100_000)
    assert {way.parts for way in found} == ({None, 2} if classes > 200_000 else {None})


def test_each_candidate_launches_with_its_own_tiles(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(3, 131, 8, 2.0, torch.float32, torch.device(device))
    fused, seen = Fused.of(problem), []
    constants = kd_launch.kernel_constants

    def noted(*given: Any) -> dict[str, Any]:
        seen.append(constants(*given))
        return seen[-1]

    monkeypatch.setattr(kd_launch, "kernel_constants", noted)
    expected = fused(inplace=False)
    for way in (*bench.candidates(131, 4)[:2], bench.Way(Tiles(2, 1), 2)):
        problem.restore()
        found = way.run(fused)
        assert isinstance(found, torch.Tensor)
        assert (seen[-1]["R"], seen[-1]["C"]) == (way.tiles.height, 4 * 32 * way.tiles.warps)
        # another order of sums
        assert float((found - expected).abs().max()) <= 4 * torch.finfo(torch.float32).eps
    assert kd_launch.Tiles is Tiles


def test_a_case_says_who_was_best_and_what_missed(device: str) -> None:
    sizes = bench.Sizes(rows=3, kept=8, dtype=torch.float32, copy_bytes=1024, flush_bytes=1024)
    case = bench.one_case(Track(torch.device(device), 1024, 1024), sizes, 1, 131, 2.0)
    assert (
        case["chosen"] in case["contenders"]
        and case["best"] in case["contenders"]
        and case["errors"] == []
    )
    for found in case["contenders"].values():
        assert found["second_read_misses"] == pytest.approx(2 / found["share_of_copy"] - 2)
        assert math.isfinite(found["second_read_misses"])
    text = bench.render({"rows": 3, "dtype": "float32", "cases": [case]})
    assert text.count("V=131 T=2") == len(case["contenders"]) and text.count(" *") == 1


def test_a_case_that_breaks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(bench, "one_case", broken)
    case = bench.try_case(Track(torch.device("cpu"), 16, 16), bench.Sizes(), 1, 131, 2.0)
    assert bench.progress(case) == "V=131 T=2: RuntimeError: illegal memory access"
    assert "second read" in bench.render({"rows": 3, "dtype": "float32", "cases": [case]})


def test_without_a_device_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="needs a CUDA device"):
        bench.kd_tiles(bench.Sizes())
