"""Each recipe of docs/adding.md, followed at run time: a toy entry goes through both stages, and gives
what its plain form gives.

Caches of an entry that is taken out again are refused by name, never read as something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_world import CLASSES, WIDTH, Net, Points
from torch import Tensor, nn

import kdcache
from kdcache.cache import codec, spec, values
from kdcache.cache.columns import Column
from kdcache.cache.features import decode_feature
from kdcache.cache.values import StoredValues, ValueCodec
from kdcache.data import sources
from kdcache.errors import NotBuilt, UsageError
from kdcache.kernels import row_loss
from kdcache.kernels.row_loss import Divergence
from kdcache.loss import divergences, targets
from kdcache.models import feature_recipes, specs
from kdcache.models.specs import BuildOptions, Built
from kdcache.student import match
from kdcache.teacher.verify import verify

STEP = 2.0**-8


def dump(out: Path, **options: Any) -> tuple[Any, Points, Net]:
    """An open cache of a small teacher's, with the data and the teacher."""
    data, teacher = Points(30), Net(32, seed=7).eval()
    report = kdcache.dump_teacher(
        teacher=teacher, data=data, out=out, batch_size=8, device="cpu", **options
    )
    assert report.complete
    return kdcache.open(out), data, teacher


def train(out: Path, cache: Any, data: Any, **options: Any) -> list[float]:
    """The losses of one epoch of a small student."""
    losses: list[float] = []
    options = {"student": Net(8), "batch_size": 10, "epochs": 1, "alpha": 1.0, **options}
    kdcache.train_student(
        cache=cache,
        data=data,
        out=out,
        device="cpu",
        on_step=lambda info: losses.append(info.loss.item()),
        **options,
    )
    return losses


def refused_without(cache: Path, table: Any, name: str, what: str) -> None:
    """A reader that lacks the entry says which."""
    entry = table.pop(name) if isinstance(table, dict) else table.remove(name)
    try:
        with pytest.raises(NotBuilt, match=f"needs {what}:{name}, which this version does not"):
            kdcache.open(cache)
    finally:
        table.__setitem__(name, entry) if isinstance(table, dict) else table.append(name)


# ---- a recipe for features


def test_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(activation: Tensor, mask: Tensor | None) -> Tensor:
        return activation.amax(1, keepdim=True)

    monkeypatch.setitem(feature_recipes.RECIPES, "peak", peak)
    spec.RECIPES.append("peak")
    try:
        cache, data, teacher = dump(tmp_path / "c", features=["body:peak"])
        assert "recipe:peak" in (tmp_path / "c" / "header.json").read_text()
        (feature,) = cache.spec.features
        found = decode_feature(feature, cache.read(np.arange(30)).columns)
        with torch.no_grad():
            want = teacher.body(data.x).amax(1, keepdim=True).numpy()
        np.testing.assert_allclose(found, want, rtol=2.0**-10)
        refused_without(tmp_path / "c", spec.RECIPES, "peak", "recipe")
    finally:
        spec.RECIPES.remove("peak")


# ---- a value codec: steps of 2^-8 below the row's maximum, in 16 bits


def to_steps(logits: Any, max_N: Any) -> StoredValues:
    depth = (max_N[:, None].astype(np.float64) - logits) / STEP
    with np.errstate(invalid="ignore"):
        code = np.where(depth < 65534.5, np.rint(depth), 65535)
    return StoredValues(code.astype(np.uint16), max_N)


def from_steps(stored: Any, step_N: Any) -> Any:
    return np.where(stored == 65535, -np.inf, 0 - stored * np.float32(STEP)).astype(np.float32)


STEPS = ValueCodec(
    dtype="uint16",
    encode=to_steps,
    decode=from_steps,
    minus_infinity=65535,
    ascending=lambda stored: -stored.astype(np.int32),
    begins_at_zero=lambda bits: bits.min(axis=1) == 0,
    least=STEP * (0.5 + 2.0**-10),
)


def steps_in_torch(raw: Tensor, step_N: Tensor | None) -> Tensor:
    code = raw.to(torch.int64) & 0xFFFF
    return torch.where(code == 65535, -torch.inf, 0 - code.float() * STEP)


@pytest.mark.parametrize("kind", [{}, {"k": 3, "kind": "topk"}])
def test_a_value_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setitem(values.CODECS, "steps", STEPS)
    monkeypatch.setitem(targets.UNPACKED, "steps", steps_in_torch)
    cache, data, teacher = dump(tmp_path / "c", values="steps", **kind)
    with torch.no_grad():
        logits = teacher(data.x).double().numpy()
    batch = cache.read(np.arange(30))
    rows = codec.decode_rows(cache.spec, batch.columns)
    ids = np.arange(CLASSES)[None].repeat(30, 0) if rows.ids is None else rows.ids
    want = np.take_along_axis(logits, ids, 1) - logits.max(1, keepdims=True)
    assert np.abs(rows.relative - want).max() <= STEP / 2 + 1e-6
    # the targets are of the decoded values
    found = kdcache.soft_targets(batch, temperature=1.0)
    if rows.ids is None:
        plain = torch.log_softmax(torch.from_numpy(rows.relative), -1)
        torch.testing.assert_close(found.log_probs_NK, plain, rtol=0, atol=1e-6)
    assert verify(tmp_path / "c", teacher=teacher, data=data, device="cpu").ok
    did_you_mean = kdcache.open(tmp_path / "c")
    exact, *_ = dump(tmp_path / "exact", values="float32", **kind)
    a, b = train(tmp_path / "a", did_you_mean, data), train(tmp_path / "b", exact, data)
    assert a == pytest.approx(b, rel=0.02) and a != b
    refused_without(tmp_path / "c", values.CODECS, "steps", "values")
    monkeypatch.delitem(targets.UNPACKED, "steps")
    with pytest.raises(ValueError, match="'steps' has no unpacking here"):
        kdcache.soft_targets(batch, temperature=1.0)


# ---- a kind of rows: all logits, the last class first


def reversed_columns(of: Any) -> list[Column]:
    return [Column("reversed", "row", of.codec.dtype, (of.num_classes,))]


def test_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = replace(spec.KINDS["full"], entries=reversed_columns)
    entries = codec.Entries(
        lambda spec, rows, stored: {"reversed": stored[:, ::-1]},
        lambda spec, need, k: need("reversed")[:, ::-1],
    )
    monkeypatch.setitem(spec.KINDS, "reversed", kind)
    monkeypatch.setitem(codec.ENTRIES, "reversed", entries)
    monkeypatch.setitem(
        targets.STORED, "reversed", lambda unpack, k: unpack.column("reversed").flip(1)
    )
    cache, data, _ = dump(tmp_path / "c", kind="reversed", values="float32")
    full, *_ = dump(tmp_path / "full", kind="full", values="float32")
    a, b = (one.read(np.arange(30)).columns for one in (cache, full))
    assert np.array_equal(a["reversed"], b["values"][:, ::-1]) and "values" not in a
    assert train(tmp_path / "a", cache, data) == train(tmp_path / "b", full, data)
    refused_without(tmp_path / "c", spec.KINDS, "reversed", "kind")


# ---- a divergence: the squared Hellinger distance, 1 - sum sqrt(p q)


def hellinger(
    log_q: Tensor, log_p: Tensor, divergence: Divergence, wants: bool
) -> tuple[Tensor, Tensor | None]:
    both = ((log_q + log_p) / 2).exp()
    overlap = divergences.row_sum(both)
    # p_i (c_i - sum p c) for c = dD/dp = -sqrt(q / p) / 2
    slope = (log_p.exp() * overlap[:, None] - both) / 2
    return 1 - overlap, slope if wants else None


def test_a_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(divergences.DIVERGENCES, "hellinger", hellinger)
    monkeypatch.setattr(row_loss, "DIVERGENCES", [*row_loss.DIVERGENCES, "hellinger"])
    g = torch.Generator().manual_seed(3)
    z = torch.randn(5, 9, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 9, generator=g, dtype=torch.float64)
    for tail, k in (("bucket", None), ("bucket", 4), ("conditional", 4)):
        kept = kdcache.targets_from_logits(t.float(), temperature=2.0, k=k)
        loss = kdcache.kd_loss(z, targets=kept, alpha=1.0, divergence="hellinger", tail=tail)
        (found,) = torch.autograd.grad(loss, z)
        log_p = torch.log_softmax(z / 2, -1)
        q = kept.log_probs_NK.double().exp()
        if k is not None:
            p = log_p.exp().gather(1, kept.ids_NK)
            if tail == "bucket":
                q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
                p = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1)
            else:
                p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        else:
            p = log_p.exp()
        plain = 4 * (1 - (p * q).sqrt().sum(1)).mean()
        (want,) = torch.autograd.grad(plain, z)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-8)
    cache, data, _ = dump(tmp_path / "c")
    losses = train(tmp_path / "run", cache, data, divergence="hellinger")
    assert losses and losses != train(tmp_path / "other", cache, data)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="divergence 'hellinger' is unknown"):
        kdcache.kd_loss(z, targets=kept, divergence="hellinger")


# ---- a loss on a feature, a data SPEC, a model SPEC


def test_a_loss_on_a_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(match.LOSSES, "l1", lambda a, b: (a - b).abs().mean())
    cache, data, teacher = dump(tmp_path / "c", features=["body:raw:float32"])
    student = Net(32, seed=1)
    before = [p.detach().clone() for p in student.body.parameters()]
    with torch.no_grad():
        want = (student.body(data.x) - teacher.body(data.x)).abs().mean().item()
    seen: list[float] = []
    kdcache.train_student(
        student=student,
        cache=cache,
        data=data,
        out=tmp_path / "run",
        match=["body=body_raw:l1"],
        ce_weight=0.0,
        kd_weight=0.0,
        batch_size=30,
        max_steps=1,
        device="cpu",
        on_step=lambda info: seen.append(info.loss.item()),
    )
    assert seen == [pytest.approx(want, rel=1e-5)]
    assert all((a != b).any() for a, b in zip(before, student.body.parameters(), strict=True))


def test_a_data_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def grid(text: str, classes: int = CLASSES) -> Points:
        return Points(int(text), classes=classes)

    monkeypatch.setitem(sources.SOURCES, "grid", ("COUNT", grid))
    report = kdcache.dump_teacher(
        teacher=Net(32, seed=7), data="grid:30", out=tmp_path / "c", device="cpu"
    )
    assert report.num_records == 30
    losses = train(tmp_path / "a", tmp_path / "c", "grid:30")
    assert losses == train(tmp_path / "b", tmp_path / "c", Points(30))
    with pytest.raises(UsageError, match="expected grid:COUNT"):
        train(tmp_path / "d", tmp_path / "c", "grid")
    with pytest.raises(UsageError, match="colour"):
        train(tmp_path / "e", tmp_path / "c", "grid:30", data_args={"colour": 1})


def test_a_model_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(rest: str, wanted: BuildOptions, /) -> Built:
        with wanted.seeded():
            module = nn.Sequential(
                nn.Linear(WIDTH, int(rest)), nn.Tanh(), nn.Linear(int(rest), CLASSES)
            )
        return Built(module, wanted.random, CLASSES)

    monkeypatch.setitem(specs.MODELS, "wide", ("WIDTH", wide))
    cache, data, _ = dump(tmp_path / "c")
    plain: Callable[[], nn.Module] = lambda: wide("6", BuildOptions(seed=0)).module  # noqa: E731
    a = train(tmp_path / "a", cache, data, student="wide:6", seed=0)
    assert a == train(tmp_path / "b", cache, data, student=plain(), seed=0)
    with pytest.raises(UsageError, match="expected wide:WIDTH"):
        train(tmp_path / "d", cache, data, student="wide")
