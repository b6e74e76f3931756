"""What metrics.jsonl says of the rows of a run, from a student's logits by hand in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from student_world import Net, Points, TinyLM, Windows, run, write_cache
from test_logits_memory import Headed

import kdcache
from kdcache.student.head import WholeLogits
from kdcache.student.step import LOOK_EVERY, STATISTICS, TrainStep


def by_hand(z: torch.Tensor, targets: Any) -> list[float]:
    """Means of entropy at T = 1, of mass on the teacher's classes at T, of equal first classes."""
    z = z.double()
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p).sum(1)
    p = torch.softmax(z / targets.temperature, -1)
    ids = targets.ids_NK
    kept = torch.arange(z.shape[1]).expand_as(z) if ids is None else ids
    first = kept.gather(1, targets.log_probs_NK.argmax(1, keepdim=True))[:, 0]
    mass = p.gather(1, kept).sum(1)
    return [x.double().mean().item() for x in (entropy, mass, z.argmax(1) == first)]


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("micro", [16, 5])
def test_a_run_says_what_its_rows_look_like(tmp_path: Path, k: int | None, micro: int) -> None:
    data, student = Points(48), Net(8)
    options: Any = {} if k is None else {"kind": "topk", "tiers": (k,)}
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7).eval(), **options)
    first = next(iter(kdcache.Loader(cache, data, batch_size=micro, temperature=2.0, seed=5)))
    with torch.no_grad():
        want = by_hand(student(first["inputs"]), first["targets"])
    lines = run(
        tmp_path / "run",
        student,
        cache=cache,
        data=data,
        batch_size=16,
        micro_batch_size=micro,
        max_steps=LOOK_EVERY + 2,
        seed=5,
        temperature=2.0,
    )
    steps = [line for line in lines if "loss" in line]
    assert [steps[0][name] for name in STATISTICS] == pytest.approx(want, rel=1e-5)
    assert 0 < want[0] and 0 < want[1] <= 1 + 1e-9
    looked = [line["step"] for line in steps if STATISTICS[0] in line]
    assert looked == [1, LOOK_EVERY + 1]


def test_without_a_teacher_there_is_nothing_to_say(tmp_path: Path) -> None:
    lines = run(tmp_path / "run", Net(8), data=Points(32), alpha=0.0, batch_size=16, max_steps=2)
    assert not {*STATISTICS} & {key for line in lines for key in line}


def test_a_head_inside_the_loss_says_the_same(tmp_path: Path) -> None:
    cache = write_cache(
        tmp_path / "cache", Windows(24), TinyLM(16, seed=3), kind="topk", tiers=(5,), tokens=True
    )
    options: Any = {"cache": cache, "batch_size": 8, "max_steps": 2, "device": "cpu"}
    whole = run(tmp_path / "whole", Headed(seed=1), **options)
    chunks = run(tmp_path / "chunks", Headed(seed=1), logits_memory="2 KB", **options)
    for name in STATISTICS:
        assert chunks[0][name] == pytest.approx(whole[0][name], rel=1e-5)


def test_rows_of_weight_0_count_for_nothing() -> None:
    g = torch.Generator().manual_seed(2)
    z, t = (torch.randn(6, 9, generator=g) for _ in range(2))
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0])
    targets = kdcache.targets_from_logits(t, temperature=2.0, k=4)
    student = WholeLogits(torch.nn.Identity(), torch.device("cpu"), "float32")
    step: Any = SimpleNamespace(student=student, settings=SimpleNamespace(classes=None))
    found = TrainStep._look(step, z, dataclasses.replace(targets, weight_N=weights))
    counted = weights > 0
    assert found.tolist() == pytest.approx(by_hand(z[counted], targets[counted]), rel=1e-5)
    nobody = dataclasses.replace(targets, weight_N=torch.zeros(6))
    assert TrainStep._look(step, z, nobody).isnan().all()
