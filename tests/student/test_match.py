"""Hint losses: parsing, hooks, projections, gradients; formulas recomputed in the tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.cache.features import decode_feature, encode_feature
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.data.padding import Real
from kdcache.errors import NotBuilt, UsageError
from kdcache.student.match import LOSSES, Match, Matches, feature_tensors, parse_match


def feature(
    name: str, recipe: str, *shape: int, dtype: str = "float32", level: str = "record"
) -> FeatureSpec:
    return FeatureSpec(
        name=name, module="teacher", recipe=recipe, dtype=dtype, shape=shape, level=level
    )


class Images(nn.Module):
    """Maps, a batch norm and a dropout (both change something in training mode), a vector, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.drop(self.norm(self.conv(x)).mean((2, 3)))))
        return out


class Words(nn.Module):
    """A tuple of hidden states (B, L, F), as transformer layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 5)
        self.layer = Wrapped()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.layer(self.embed(ids))[0]
        return out


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.linear(x), None


def images_and_student() -> tuple[Tensor, Images]:
    torch.manual_seed(0)
    return torch.randn(3, 1, 8, 8), Images()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("body.0=pen:mse", Match("body.0", "pen", "mse", 1.0)),
        ("a=b:cosine:0.25", Match("a", "b", "cosine", 0.25)),
    ],
)
def test_parse(text: str, want: Match) -> None:
    assert parse_match(text) == want
    assert parse_match(str(want)) == want


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("body", UsageError, "expected STUDENT_MODULE=FEATURE:LOSS"),
        ("body=pen", UsageError, "expected STUDENT_MODULE=FEATURE:LOSS"),
        ("=pen:mse", UsageError, "expected STUDENT_MODULE=FEATURE:LOSS"),
        ("body=pen:mse:1:2", UsageError, "expected STUDENT_MODULE=FEATURE:LOSS"),
        ("body=pen:msee", UsageError, "did you mean 'mse'"),
        ("body=pen:rkd_angle", NotBuilt, "loss 'rkd_angle' is not built yet"),
        ("body=pen:mse:x", UsageError, "weight 'x' is not a positive number"),
        ("body=pen:mse:-1", UsageError, "weight '-1'"),
        ("body=pen:mse:nan", UsageError, "weight 'nan'"),
    ],
)
def test_parse_refuses(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_match(text)


def test_equal_widths_need_no_projection() -> None:
    x, student = images_and_student()
    matches = Matches(
        student,
        [parse_match("body=f:mse:0.5"), parse_match("conv=e:cosine")],
        [feature("f", "raw", 6), feature("e", "energy", 8, 8)],
    )
    matches.prepare(lambda: student(x))
    assert list(matches.parameters()) == [] and not any(m is student for m in matches.modules())
    seen: dict[str, Tensor] = {}
    student.body.register_forward_hook(lambda m, i, o: seen.__setitem__("body", o))
    student.conv.register_forward_hook(lambda m, i, o: seen.__setitem__("conv", o))
    student(x)
    cached = {"f": torch.randn(3, 6), "e": torch.rand(3, 8, 8)}
    loss = matches(cached)
    body, energy = seen["body"].double(), seen["conv"].double().square().mean(1)
    mse = ((body - cached["f"]) ** 2).mean()
    a, b = energy.flatten(1), cached["e"].double().flatten(1)
    cos = 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    assert loss.item() == pytest.approx((0.5 * mse + cos).item(), rel=1e-5)
    assert [v.item() for v in matches.losses.values()] == pytest.approx(
        [mse.item(), cos.item()], rel=1e-5
    )
    gradient = torch.autograd.grad(loss, [student.body[0].weight, student.conv.weight])
    assert all(bool(g.any()) for g in gradient)


def test_the_cosine_of_maps_is_of_the_channels_at_each_place() -> None:
    a, b = (
        torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)).double()
        for seed in (0, 1)
    )
    places = [(i, y, x) for i in range(2) for y in range(4) for x in range(5)]
    cos = [
        float(a[i, :, y, x] @ b[i, :, y, x] / a[i, :, y, x].norm() / b[i, :, y, x].norm())
        for i, y, x in places
    ]
    assert LOSSES["cosine"](a, b).item() == pytest.approx(1 - sum(cos) / 40)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """|| Q_S / ||Q_S|| - Q_T / ||Q_T|| || of each record, by (2) of arXiv 1612.03928 with Q the
    vectorised sum over channels of the squares of an activation (B, C, H, W)."""
    q_s, q_t = (a.double().pow(2).sum(1).reshape(len(a), -1) for a in (student, teacher))
    return (q_s / q_s.norm(dim=1, keepdim=True) - q_t / q_t.norm(dim=1, keepdim=True)).norm(dim=1)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_energies_are_matched_as_attention_maps(loss: str) -> None:
    """By either loss up to the constant that `attention_map` says, in value and gradient; the scale
    of a map or of its channels' number is none of its business, and a map that differs in its rows
    alone is another."""
    x, student = images_and_student()
    matches = Matches(student, [parse_match(f"conv=e:{loss}")], [feature("e", "energy", 8, 8)])
    matches.prepare(lambda: student(x))
    seen: list[Tensor] = []
    student.conv.register_forward_hook(lambda m, i, o: seen.append(o))
    student(x)
    teacher = torch.randn(3, 7, 8, 8)
    for scale in (1.0, 100.0):
        found = matches({"e": scale * teacher.square().mean(1)})
        want = attention_transfer(seen[-1], teacher).square().mean() / (64 if loss == "mse" else 2)
        assert found.item() == pytest.approx(want.item(), rel=1e-4)
        theirs, ours = (
            torch.autograd.grad(one, student.conv.weight, retain_graph=True)[0]
            for one in (want, found)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
        student(x)
    rows = seen[-1].detach() * torch.logspace(-5, 5, 8, base=2)[:, None]
    assert matches({"e": rows.square().mean(1)}).item() > {"mse": 1e-3, "cosine": 0.05}[loss]


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("shape", [(0, 6), (0, 4, 8, 8), (0, 3, 6)])
def test_no_rows_are_no_loss_and_no_gradient(loss: str, shape: tuple[int, ...]) -> None:
    student = torch.zeros(shape, requires_grad=True)
    value = LOSSES[loss](student, torch.zeros(shape))
    value.backward()
    assert value.item() == 0 and student.grad is not None


def test_projections_are_learned_and_bring_the_loss_down() -> None:
    x, student = images_and_student()
    matches = Matches(
        student,
        [parse_match("conv=map:mse"), parse_match("body=vec:cosine")],
        [feature("map", "map", 7, 8, 8), feature("vec", "raw", 9)],
        seed=4,
    )
    matches.prepare(lambda: student(x))
    assert [tuple(p.shape) for p in matches.parameters()] == [(7, 4, 1, 1), (7,), (9, 6), (9,)]
    cached = {"map": torch.randn(3, 7, 8, 8), "vec": torch.randn(3, 9)}
    optimizer = torch.optim.Adam([*student.parameters(), *matches.parameters()], lr=0.03)
    losses = []
    for _ in range(60):
        student(x)
        loss = matches(cached)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        assert all(p.grad is not None and bool(p.grad.any()) for p in matches.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_prepare_changes_neither_student_nor_random_state() -> None:
    x, student = images_and_student()
    student.body.eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    modes = [m.training for m in student.modules()]
    state = torch.get_rng_state()

    def projections(seed: int) -> list[Tensor]:
        matches = Matches(
            student,
            [parse_match("body=f:mse"), parse_match("body=f:cosine")],
            [feature("f", "raw", 9)],
            seed=seed,
        )
        matches.prepare(lambda: student(x))
        matches.close()
        return list(matches.parameters())

    first, again, other = projections(1), projections(1), projections(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert [m.training for m in student.modules()] == modes
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert torch.equal(first[2], again[2]) and not torch.equal(first[2], other[2])
    assert not torch.equal(first[0], first[2])  # two matches of one run do not start alike
    # Uniform on +-1/sqrt(6), as nn.Linear: variance 1 / 18, here of 54 draws.
    assert (
        float(first[0].detach().abs().max()) <= 6**-0.5
        and 0.4 / 18 < float(first[0].detach().var()) < 1.7 / 18
    )


def test_sequences_masks_and_rows() -> None:
    torch.manual_seed(1)
    student, ids = Words(), torch.randint(0, 10, (2, 4))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    rows = torch.tensor([[True, True, False, False], [True, False, False, False]])
    matches = Matches(
        student,
        [parse_match("layer=last:mse"), parse_match("layer=rows:mse")],
        [feature("last", "last", 5), feature("rows", "raw", 5, level="row")],
    )
    matches.prepare(lambda: student(ids), real=Real({"attention_mask": mask != 0}), row_mask=rows)
    hidden = student(ids)
    cached = {"last": torch.randn(2, 5), "rows": torch.randn(3, 5)}
    want = ((torch.stack([hidden[0, 2], hidden[1, 1]]) - cached["last"]) ** 2).mean()
    want = (
        want
        + ((torch.stack([hidden[0, 0], hidden[0, 1], hidden[1, 0]]) - cached["rows"]) ** 2).mean()
    )
    student(ids)
    real = Real({"attention_mask": mask != 0})
    assert matches(cached, real=real, row_mask=rows).item() == pytest.approx(want.item(), rel=1e-6)
    student(ids)
    with pytest.raises(
        UsageError, match="needs a row mask over its first two axes; none was given"
    ):
        matches(cached, real=Real({"attention_mask": mask != 0}))


def test_half_precision_student_and_double_student() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x, student = images_and_student()
        student.to(dtype)
        matches = Matches(student, [parse_match("body=f:mse")], [feature("f", "raw", 9)])
        matches.prepare(lambda: student(x.to(dtype)))  # noqa: B023 - called at once
        student(x.to(dtype))
        assert matches({"f": torch.zeros(3, 9)}).dtype == wide
        assert all(p.dtype == wide for p in matches.parameters())


def test_evaluation_keeps_nothing_and_a_missing_pass_is_said() -> None:
    x, student = images_and_student()
    matches = Matches(student, [parse_match("body=f:mse")], [feature("f", "raw", 6)])
    with pytest.raises(RuntimeError, match="prepare has not run"):
        matches({"f": torch.zeros(3, 6)})
    matches.prepare(lambda: student(x))
    with torch.no_grad():
        student(x)
    with pytest.raises(UsageError, match="did not run module 'body'"):
        matches({"f": torch.zeros(3, 6)})


@pytest.mark.parametrize(
    ("match", "spec", "message"),
    [
        ("body=g:mse", feature("f1", "raw", 6), "the cache has no feature 'g'"),
        ("bodi=f:mse", feature("f", "raw", 6), "no module 'bodi' \\(did you mean 'body'"),
    ],
)
def test_names_that_are_not_there(match: str, spec: FeatureSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Matches(Images(), [parse_match(match)], [spec])


@pytest.mark.parametrize(
    ("match", "spec", "message"),
    [
        (
            "conv=f:mse",
            feature("f", "map", 7, 4, 4),
            "is \\[4, 8, 8\\] and the cached feature \\[7, 4, 4\\]",
        ),
        (
            "conv=f:mse",
            feature("f", "energy", 8, 9),
            "is \\[8, 8\\] and the cached feature \\[8, 9\\]",
        ),
        ("conv=f:mse", feature("f", "raw", 4), "is \\[4, 8, 8\\] and the cached feature \\[4\\]"),
        ("conv=f:mse", feature("f", "cls", 4), "recipe 'cls'"),
    ],
)
def test_shapes_that_cannot_meet(match: str, spec: FeatureSpec, message: str) -> None:
    x, student = images_and_student()
    matches = Matches(student, [parse_match(match)], [spec])
    with pytest.raises(UsageError, match=message):
        matches.prepare(lambda: student(x))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_cached_features_decode_as_numpy_does(dtype: str) -> None:
    spec = CacheSpec(
        kind="none",
        num_classes=0,
        samples=(0, 4),
        records_per_shard=4,
        features=(feature("f", "raw", 3, 5, dtype=dtype),),
    )
    values = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    columns = encode_feature(spec.features[0], values)
    batch: Any = SimpleNamespace(spec=spec, columns=columns)
    assert np.array_equal(
        feature_tensors(batch, ["f"])["f"].numpy(), decode_feature(spec.features[0], columns)
    )
    with pytest.raises(UsageError, match="no feature 'g'"):
        feature_tensors(batch, ["g"])


def test_a_feature_of_another_shape_than_its_spec_is_refused() -> None:
    x, student = images_and_student()
    matches = Matches(student, [parse_match("body=f:mse")], [feature("f", "raw", 6)])
    matches.prepare(lambda: student(x))
    student(x)
    with pytest.raises(UsageError, match="only the widths may differ"):
        matches({"f": torch.zeros(2, 6)})
