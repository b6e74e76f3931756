"""verify: a whole cache with its own teacher passes; anything else is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_world import Noisy, Points, Sentences, Speaker, mlp
from torch import nn

import kdcache
from kdcache.errors import UsageError
from kdcache.teacher.agreement import cached_answer
from kdcache.teacher.dump import dump_teacher
from kdcache.teacher.verify import VerifyReport, verify


def nudged(net: nn.Module, by: float) -> nn.Module:
    """A copy of `net` with one weight matrix moved by up to `by`."""
    out = copy.deepcopy(net)
    weight = next(p for p in out.parameters() if p.dim() == 2)
    with torch.no_grad():
        weight += by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return out


def check(path: Path, net: nn.Module, data: Any, **options: Any) -> VerifyReport:
    return verify(path, teacher=net, data=data, device="cpu", **options)


CASES: dict[str, dict[str, Any]] = {
    "full float32": {"values": "float32"},
    "full float16": {"values": "float16"},
    "full uint8": {"values": "uint8"},
    "full bfloat16": {"values": "bfloat16"},
    "topk float32": {"k": 3, "values": "float32", "features": ["0:raw:float32", "1:raw:int8"]},
    "topk float16": {"k": 3, "tiers": [1], "features": ["0:raw:float16", "1:raw:bfloat16"]},
    "topk uint8": {"k": 9, "values": "uint8", "labels": False},
    "topk bfloat16": {"k": 12, "values": "bfloat16"},
    "bfloat16 teacher": {"k": 3, "values": "bfloat16", "dtype": "bfloat16"},
    "features alone": {"kind": "none", "features": ["0:raw:int8"]},
    "views": {"k": 3, "data": Noisy(20), "views": 2, "records_per_shard": 7},
    "sequences": {
        "k": 3,
        "teacher": Speaker(),
        "data": Sentences(),
        "batch_size": 7,
        "features": ["embed:raw:float16", "embed:pool:float32"],
    },
    "wide logits": {
        "values": "uint8",
        "k": 12,
        "teacher": nn.Sequential(mlp(), nn.Hardtanh(-400, 400)),
        "data": Points(),
        "scale": 60.0,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_right_teacher_passes_and_one_moved_by_a_hundredth_does_not(
    tmp_path: Path, name: str
) -> None:
    options = {"teacher": mlp(), "data": Points(), "batch_size": 8, **CASES[name]}
    scale = options.pop("scale", None)
    if scale:
        with torch.no_grad():
            options["teacher"][0][2].weight.mul_(scale)
    net, data = options.pop("teacher"), options.pop("data")
    dump_teacher(teacher=net, data=data, out=tmp_path / "c", device="cpu", **options)
    good = check(tmp_path / "c", net, data, samples=30)
    assert good.ok and good.problems == ()
    assert (
        good.worst_difference is not None
        and good.tolerance is not None
        and good.live_difference is not None
    )
    assert good.worst_difference <= good.tolerance
    # bfloat16 keeps 8 bits of a weight of size 1: a hundredth is only a few of its steps, and its
    # sums are as coarse.
    moved = nudged(net, 0.3 if "bfloat16" in name or "uint8" in name else 0.01)
    bad = check(tmp_path / "c", moved, data, samples=30)
    assert not bad.ok
    assert any("teacher.weights" in p for p in bad.problems)
    differs = [p for p in bad.problems if "the teacher's answer differs from the cache" in p]
    assert differs and f"record {bad.worst_record} (sample" in differs[0]
    json.dumps(bad.to_json())


def test_without_a_teacher_every_byte_is_read_and_quickly_only_sizes(tmp_path: Path) -> None:
    dump_teacher(
        teacher=mlp(), data=Points(), out=tmp_path / "c", device="cpu", records_per_shard=20
    )
    seen: list[tuple[int, int]] = []
    report = verify(tmp_path / "c", progress=lambda done, total: seen.append((done, total)))
    assert report.ok and report.shards == 3 and report.content_id and seen[-1] == (3, 3)
    assert report.records is None and report.advice is None
    assert verify(tmp_path / "c", quick=True).ok
    victim = sorted((tmp_path / "c/data").iterdir())[1]
    victim.chmod(0o644)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert verify(tmp_path / "c", quick=True).ok
    report = verify(tmp_path / "c")
    assert not report.ok and victim.name in report.problems[0]
    assert report.advice is not None and "given again" in report.advice
    victim.write_bytes(data[:-8])
    report = verify(tmp_path / "c", quick=True)
    assert not report.ok and f"expected {len(data)}" in report.problems[0]
    victim.unlink()
    assert victim.name in verify(tmp_path / "c", quick=True).problems[0]
    dump_teacher(
        teacher=mlp(), data=Points(), out=tmp_path / "c", device="cpu", records_per_shard=20
    )
    assert verify(tmp_path / "c").ok


def test_a_cut_file_is_named_once(tmp_path: Path) -> None:
    dump_teacher(teacher=Speaker(), data=Sentences(), out=tmp_path / "c", device="cpu", k=2)
    (victim,) = (tmp_path / "c/data").iterdir()
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes()[:-8])
    assert verify(tmp_path / "c").problems[0].count(str(victim)) == 1


def test_a_damaged_header_is_a_problem_and_not_a_crash(tmp_path: Path) -> None:
    dump_teacher(teacher=mlp(), data=Points(), out=tmp_path / "c", device="cpu")
    header = tmp_path / "c/header.json"
    header.chmod(0o644)
    header.write_bytes(header.read_bytes()[:-9])
    report = verify(tmp_path / "c")
    assert not report.ok and "header.json" in report.problems[0]


def test_other_data_is_named_before_the_teacher_speaks(tmp_path: Path) -> None:
    dump_teacher(teacher=mlp(), data=Points(), out=tmp_path / "c", device="cpu")
    other = Points()
    other.x[49] += 1
    report = check(tmp_path / "c", mlp(), other, samples=50)
    assert any("data.probe" in p for p in report.problems)
    assert any("sample 49: sample_key in the cache" in p for p in report.problems)
    shorter = check(tmp_path / "c", mlp(), Points(10))
    assert any("data.num_samples" in p for p in shorter.problems)
    assert any("the data has 10 samples" in p for p in shorter.problems)


def test_other_views_of_the_same_samples_are_named_as_such(tmp_path: Path) -> None:
    class Louder(Noisy):
        def view(self, sample_id: int, view: int, rng: np.random.Generator) -> Any:
            x, y = super().view(sample_id, view, rng)
            return (x if sample_id != 17 else 2 * x), y

    dump_teacher(teacher=mlp(), data=Noisy(20), out=tmp_path / "c", device="cpu", views=2)
    report = check(tmp_path / "c", mlp(), Louder(20), samples=40)
    assert len(report.problems) == 1 and "sample 17: view_key in the cache" in report.problems[0]


class Moved(nn.Module):
    """A net whose logits grow by `scale`, and by `wobble` with every call; all but the first three
    are lowered.
    """

    def __init__(self, scale: float = 0.0, wobble: float = 0.0, lowered: float = 0.0) -> None:
        super().__init__()
        self.net, self.by, self.wobble, self.lowered = mlp(), 1 + scale, wobble, lowered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.by += self.wobble
        z_BV = self.net(x) * self.by
        return torch.where(z_BV < z_BV.topk(3).values[:, -1:], z_BV - self.lowered, z_BV)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, False),
        ({"scale": 1e-4}, True),
        ({"lowered": 0.01}, True),
        ({"wobble": 1e-6}, False),
        ({"wobble": 1e-6, "scale": 1e-3}, True),
    ],
)
def test_a_ten_thousandth_is_found_also_in_a_tail_unless_two_runs_differ_as_much(
    tmp_path: Path, change: dict[str, float], found: bool
) -> None:
    dump_teacher(
        teacher=Moved(wobble=change.get("wobble", 0.0)),
        data=Points(),
        out=tmp_path / "c",
        device="cpu",
        k=3,
        values="float32",
        batch_size=50,
    )
    report = check(tmp_path / "c", Moved(**change), Points())
    assert (
        any("differs from the cache" in problem for problem in report.problems)
        == found
        == (not report.ok)
    )
    assert report.live_difference is not None and (report.live_difference > 1e-5) == (
        "wobble" in change
    )


def test_a_teacher_of_other_shapes_is_a_problem_and_not_a_crash(tmp_path: Path) -> None:
    dump_teacher(teacher=mlp(), data=Points(), out=tmp_path / "c", device="cpu")
    report = check(tmp_path / "c", mlp(5), Points())
    assert any("12 classes" in p for p in report.problems)
    dump_teacher(teacher=Speaker(), data=Sentences(), out=tmp_path / "s", device="cpu", k=2)
    shifted = Sentences()
    shifted.items = [{"input_ids": item["input_ids"]} for item in shifted.items]
    report = check(tmp_path / "s", Speaker(), shifted)
    assert not report.ok


def test_what_rounding_may_do_is_an_upper_bound_and_not_a_loose_one(tmp_path: Path) -> None:
    """Against the values before encoding: never more than the bound, and somewhere at least a third
    of it.
    """
    net, data = mlp(), Points(400)
    with torch.inference_mode():
        logits = net(data.x).numpy().astype(np.float64)
    for values in ("float16", "bfloat16", "uint8"):
        dump_teacher(
            teacher=net,
            data=data,
            out=tmp_path / values,
            device="cpu",
            values=values,
            batch_size=400,
        )
        with kdcache.open(tmp_path / values) as cache:
            said = cached_answer(cache.spec, cache.read(np.arange(400)))
        apart = np.abs(said.parts["logits"] - (logits - logits.max(1, keepdims=True)))
        share = apart / np.maximum(said.rounding["logits"], 1e-30)
        assert share.max() <= 1.001 and share.max() > 1 / 3, values


def test_usage() -> None:
    with pytest.raises(UsageError, match="--teacher and --data"):
        verify("somewhere", teacher=mlp())
    with pytest.raises(UsageError, match="--samples is 0"):
        verify("somewhere", samples=0)
