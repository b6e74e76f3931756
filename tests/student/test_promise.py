"""A cached epoch equals an epoch with the live teacher; plain training is the same path without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import CLASSES, Net, Points, TinyLM, Windows, equal_weights, write_cache
from torch import nn

from kdcache.student.loader import Loader
from kdcache.student.train import train_student
from kdcache.student.trainer import StepInfo
from kdcache.teacher.dump import dump_teacher


class Trace:
    """Loss and weights after every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def __call__(self, info: StepInfo) -> None:
        self.losses.append(info.loss.item())
        self.weights.append(
            {name: value.clone() for name, value in info.model.state_dict().items()}
        )

    def same_as(self, other: Trace) -> bool:
        return self.losses == other.losses and all(
            torch.equal(a[name], b[name])
            for a, b in zip(self.weights, other.weights, strict=True)
            for name in a
        )


def trained(tmp_path: Path, name: str, student: nn.Module, **options: Any) -> Trace:
    trace = Trace()
    report = train_student(
        student=student, out=tmp_path / name, on_step=trace, **{"epochs": 3, "lr": 0.01, **options}
    )
    assert report.finished and report.steps == len(trace.losses)
    return trace


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_classification_from_the_cache_is_the_live_teacher_bit_for_bit(
    tmp_path: Path, alpha: float
) -> None:
    data, teacher = Points(48), Net(32, seed=7)
    cache = write_cache(tmp_path / "cache", data, teacher, per_shard=16)
    options = {"data": data, "batch_size": 16, "shuffle": False, "alpha": alpha}
    cached = trained(tmp_path, "cached", Net(8, dropout=0.3, norm=True), cache=cache, **options)
    live = trained(
        tmp_path, "live", Net(8, dropout=0.3, norm=True), live_teacher=teacher, **options
    )
    assert len(cached.losses) == 9
    assert cached.same_as(live)
    other = trained(
        tmp_path, "other", Net(8, dropout=0.3, norm=True), live_teacher=Net(32, seed=8), **options
    )
    assert not cached.same_as(other)  # the teacher does take part


@pytest.mark.parametrize("container", ["arrow", "hdf5"])
def test_both_stages_end_to_end_are_the_live_teacher_bit_for_bit(
    tmp_path: Path, container: str
) -> None:
    data, teacher = Points(48), Net(32, seed=7)
    dump_teacher(
        teacher=teacher,
        data=data,
        out=tmp_path / "cache",
        kind="full",
        values="float32",
        batch_size=16,
        records_per_shard=32,
        container=container,
        device="cpu",
    )
    options = {"data": data, "batch_size": 16, "shuffle": False, "device": "cpu"}
    cached = trained(tmp_path, "cached", Net(8, dropout=0.3), cache=tmp_path / "cache", **options)
    assert cached.same_as(
        trained(tmp_path, "live", Net(8, dropout=0.3), live_teacher=teacher, **options)
    )


@pytest.mark.parametrize("tokens", [True, False])
def test_language_from_the_cache_is_the_live_teacher_bit_for_bit(
    tmp_path: Path, tokens: bool
) -> None:
    data, teacher = Windows(24), TinyLM(16, seed=3)
    cache = write_cache(
        tmp_path / "cache", data, teacher, per_shard=8, tokens=tokens, labels=tokens
    )
    options = {"batch_size": 8, "shuffle": False, "temperature": 1.5, "alpha": 0.5}
    cached = trained(
        tmp_path,
        "cached",
        TinyLM(dropout=0.2),
        cache=cache,
        data=None if tokens else data,
        **options,
    )
    live = trained(
        tmp_path, "live", TinyLM(dropout=0.2), live_teacher=teacher, data=data, **options
    )
    assert cached.same_as(live)


def test_shuffled_it_agrees_within_the_noise_of_running_the_teacher_in_other_batches(
    tmp_path: Path,
) -> None:
    data, teacher = Points(60), Net(512, seed=7)
    # large logits, so that their rounding can be seen
    teacher.head.weight.data *= 20
    caches = {
        size: write_cache(tmp_path / f"cache{size}", data, teacher, per_shard=size)
        for size in (1, 7, 60)
    }
    options = {"data": data, "batch_size": 12, "epochs": 4}
    runs = [
        trained(tmp_path, f"cached{size}", Net(8), cache=cache, **options)
        for size, cache in caches.items()
    ]
    live = trained(tmp_path, "live", Net(8), live_teacher=teacher, **options)

    def distance(a: Trace, b: Trace) -> float:
        return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))

    noise = max(distance(a, b) for a in runs for b in runs)
    assert 0 < noise < 1e-4 * max(live.losses)  # it is rounding, and there is some
    # The live run is one more batching: a maximum over 3 pairs of draws against one over 3 others;
    # 3 is ample.
    assert all(distance(run, live) <= 3 * noise for run in runs)


def test_topk_with_k_equal_to_v_is_full_bit_for_bit(tmp_path: Path) -> None:
    data, teacher = Points(48), Net(32, seed=7)
    full = write_cache(tmp_path / "full", data, teacher)
    topk = write_cache(tmp_path / "topk", data, teacher, kind="topk", tiers=(3, CLASSES))
    options = {"data": data, "batch_size": 20}
    a = trained(tmp_path, "a", Net(8), cache=full, **options)
    assert a.same_as(trained(tmp_path, "b", Net(8), cache=topk, **options))
    assert not a.same_as(trained(tmp_path, "c", Net(8), cache=topk, k=3, **options))


def test_alpha_0_is_a_plain_training_loop(tmp_path: Path) -> None:
    data = Points(50)
    trace = trained(
        tmp_path,
        "run",
        student := Net(8),
        data=data,
        alpha=0.0,
        batch_size=16,
        optimizer="sgd",
        seed=5,
        epochs=2,
        warmup=2,
    )
    plain = Net(8)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step, batch in enumerate(Loader(None, data, batch_size=16, epochs=2, seed=5)):
        rate = 0.01 * min(1, (step + 1) / 2)
        if step >= 2:
            rate *= 0.5 * (
                1 + torch.cos(torch.tensor(torch.pi * (step - 2) / 5, dtype=torch.float64)).item()
            )
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = batch["sample_ids"]
        loss = nn.functional.cross_entropy(plain(data.x[ids]), data.y[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 7
    # Cross-entropy and its gradient are summed in another order: a few units of the last place,
    # each step anew.
    assert trace.losses == pytest.approx(losses, rel=1e-5)
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_plain_training_sees_the_batches_of_distillation(tmp_path: Path) -> None:
    data, seen = Points(50), []
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    for source in (cache, None):
        loader = Loader(source, data, batch_size=12, epochs=2.5, seed=3)
        seen.append(
            [(b["sample_ids"].tolist(), b["position"], b["labels"].tolist()) for b in loader]
        )
    assert seen[0] == seen[1]
    flat = [i for ids, _, _ in seen[0] for i in ids]
    assert (
        sorted(flat[:50]) == sorted(flat[50:100]) == list(range(50)) and len(set(flat[100:])) == 25
    )
    assert flat[:50] != flat[50:100]


def test_alpha_0_with_a_cache_reads_no_rows_and_trains_the_same(tmp_path: Path) -> None:
    data = Points(50)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    assert Loader(cache, data, batch_size=4, targets=False).columns == ["sample_key", "label"]
    with_cache = trained(tmp_path, "a", Net(8), cache=cache, data=data, alpha=0.0)
    assert with_cache.same_as(trained(tmp_path, "b", Net(8), data=data, alpha=0.0))


def test_what_is_drawn_in_training_leaves_the_callers_generator(tmp_path: Path) -> None:
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    trained(tmp_path, "run", student := Net(8, dropout=0.5), data=Points(20), alpha=0.0)
    assert torch.equal(torch.rand(1), first)
    assert not equal_weights(student, Net(8, dropout=0.5))
    # nor does it decide what is drawn: the seed of the run does
    torch.manual_seed(99)
    trained(tmp_path, "again", again := Net(8, dropout=0.5), data=Points(20), alpha=0.0)
    trained(tmp_path, "asleep", asleep := Net(8, dropout=0.5).eval(), data=Points(20), alpha=0.0)
    # and a student that comes in eval mode, as from_pretrained gives it, trains
    assert equal_weights(student, asleep)
    trained(
        tmp_path,
        "other",
        other := Net(8, dropout=0.5),
        data=Points(20),
        alpha=0.0,
        seed=1,
        shuffle=False,
    )
    trained(
        tmp_path,
        "third",
        third := Net(8, dropout=0.5),
        data=Points(20),
        alpha=0.0,
        seed=2,
        shuffle=False,
    )
    assert equal_weights(student, again) and not equal_weights(other, third)
