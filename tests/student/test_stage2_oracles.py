"""What a run is asked reaches the arithmetic: seed, label weights, the weight of a match."""

import numpy as np
import pytest
import torch
from student_world import BODY, Net, Points, TinyLM, Windows, write_cache
from test_order import plain_sample
from torch import nn

import kdcache
from kdcache.cache.codec import encode_rows
from kdcache.cache.identity import Identity
from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec
from kdcache.data.identify import identify
from kdcache.data.samples import Samples
from kdcache.student.loader import Loader
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher


@pytest.mark.parametrize("seed", [0, 5])
def test_the_seed_of_a_loader_is_that_of_the_order(seed: int) -> None:
    loader = Loader(None, Points(21), batch_size=8, epochs=2, seed=seed)
    ids = [i for batch in loader for i in batch["sample_ids"].tolist()]
    assert ids == [plain_sample(21, seed, position) for position in range(42)]


class Mixed(Points):
    """Two weighted labels a record, as of mixup."""

    def __getitem__(self, i: int):
        share = (i % 5) / 4
        return {
            "x": self.x[i],
            "labels": torch.stack([self.y[i], self.y[i - 1]]),
            "label_weight": torch.tensor([share, 1 - share]),
        }


class Named(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize("cached", [False, True])
def test_the_weights_of_labels_are_in_the_loss_of_a_run(tmp_path, cached: bool) -> None:
    data, student = Mixed(24), Named(8)
    share = torch.tensor([(i % 5) / 4 for i in range(24)])
    with torch.no_grad():
        log_p = torch.log_softmax(student(data.x), -1)
    picked = torch.stack([log_p[torch.arange(24), data.y], log_p[torch.arange(24), data.y.roll(1)]])
    want = -(share * picked[0] + (1 - share) * picked[1]).mean()
    source = {}
    if cached:
        dump_teacher(teacher=Named(32, seed=7), data=data, out=tmp_path / "cache", device="cpu")
        source = {"cache": tmp_path / "cache"}
    report = train_student(
        student=student,
        data=data,
        out=tmp_path / "run",
        max_steps=1,
        batch_size=24,
        device="cpu",
        alpha=0.5 if cached else 0.0,
        **source,
    )
    assert report.training["ce"] == pytest.approx(want.item(), rel=1e-5)


def moved(student: nn.Module, plain: nn.Module, loss: torch.Tensor, lr: float = 0.1) -> None:
    """The student is where one step of plain SGD on this loss brings its equal."""
    loss.backward()
    for (name, a), b in zip(student.named_parameters(), plain.parameters(), strict=True):
        want = b.detach() if b.grad is None else b.detach() - lr * b.grad
        torch.testing.assert_close(a.detach(), want, rtol=1e-4, atol=1e-6, msg=name)
        assert b.grad is None or bool((b.grad != 0).any())


class Weighed(Windows):
    """Tokens that are labels too, each with a weight; every fifth has no label."""

    def __getitem__(self, i: int):
        ids = super().__getitem__(i)["input_ids"]
        places = torch.arange(len(ids))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(places % 5 == 4, -100),
            "label_weight": ((i + places) % 4) / 2,
        }


@pytest.mark.parametrize("cached", [False, True])
def test_the_weights_of_tokens_are_in_the_gradient_of_a_run(tmp_path, cached: bool) -> None:
    """The row at p predicts token p + 1 and has the weight of that one; the mean is over the
    labelled rows.
    """
    data, student, plain = Weighed(6), TinyLM(), TinyLM()
    source = {}
    if cached:
        dump_teacher(teacher=TinyLM(12, seed=3), data=data, out=tmp_path / "cache", device="cpu")
        source = {"cache": tmp_path / "cache"}
    train_student(
        student=student,
        data=data,
        out=tmp_path / "run",
        max_steps=1,
        batch_size=6,
        micro_batch_size=4,
        alpha=0.0,
        optimizer="sgd",
        lr=0.1,
        device="cpu",
        **source,
    )
    total, count = torch.zeros(()), 0
    for item in data:
        ids, weight = item["input_ids"], item["label_weight"]
        log_p = torch.log_softmax(plain(ids[None])[0], -1)
        for p in range(len(ids) - 1):
            if (p + 1) % 5 != 4:
                total, count = total - weight[p + 1] * log_p[p, ids[p + 1]], count + 1
    moved(student, plain, total / count)


def test_the_weights_of_rows_in_a_cache_are_in_the_gradient_of_a_run(tmp_path) -> None:
    """D is averaged by them, over all micro-batches of a step."""
    data, student, plain = Points(12), Net(8), Net(8)
    logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
    weight = torch.arange(12) % 4 / 2
    samples = Samples(data)
    identity = Identity(data=identify(samples)[0], teacher={"num_classes": 7})
    spec = CacheSpec(
        kind="full",
        num_classes=7,
        samples=(0, 12),
        records_per_shard=12,
        values="float32",
        row_weights=True,
    )
    with kdcache.create(tmp_path / "cache", spec, identity) as writer:
        rows = encode_rows(spec, Rows(logits=logits.numpy(), weight=weight.numpy()))
        keys = np.array([samples.sample_key(i) for i in range(12)], np.uint64)
        writer.write(0, {"sample_key": keys, **rows.columns})
    train_student(
        student=student,
        data=data,
        cache=tmp_path / "cache",
        out=tmp_path / "run",
        max_steps=1,
        batch_size=12,
        micro_batch_size=5,
        alpha=1.0,
        temperature=2.0,
        optimizer="sgd",
        lr=0.1,
        device="cpu",
    )
    kd_N = nn.functional.kl_div(
        torch.log_softmax(plain(data.x) / 2, -1), torch.softmax(logits / 2, -1), reduction="none"
    ).sum(-1)
    moved(student, plain, 4 * (weight * kd_N).sum() / weight.sum())


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_the_weight_of_a_match_is_in_the_gradient(tmp_path, weight: float) -> None:
    """One step of plain SGD on the weighted sum of two means over the batch, which micro-batches of
    5, 5, 5 and 1 share by their records; each is reported, unweighted, under its name."""
    data, teacher, student, plain = Points(16), Net(32, seed=7).eval(), Net(32), Net(32)
    cache = write_cache(tmp_path / "cache", data, teacher, features=[BODY])
    names = ["body=body:cosine:0.5", f"body=body:mse:{weight:g}"]
    report = train_student(
        student=student,
        cache=cache,
        data=data,
        out=tmp_path / "run",
        ce_weight=0.0,
        kd_weight=0.0,
        match=names,
        batch_size=16,
        micro_batch_size=5,
        max_steps=1,
        optimizer="sgd",
        lr=0.1,
        device="cpu",
    )
    with torch.no_grad():
        want = teacher.body(data.x)
    cosine = 1 - nn.functional.cosine_similarity(plain.body(data.x), want).mean()
    mse = nn.functional.mse_loss(plain.body(data.x), want)
    assert [report.training[f"match {name}"] for name in names] == pytest.approx(
        [cosine.item(), mse.item()], rel=1e-5
    )
    moved(student, plain, 0.5 * cosine + weight * mse)
