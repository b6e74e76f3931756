"""Soft targets from cached columns, against softmax in float64 and the numpy codec."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.codec import decode_rows, encode_rows
from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.cache.values import pack_high
from kdcache.errors import UsageError
from kdcache.loss.targets import SoftTargets, _plane, soft_targets, targets_from_logits
from kdcache.loss.tensor_arguments import check_temperature
from kdcache.loss.topk import exact_topk, tail_lse

VALUES = ("float32", "bfloat16", "float16", "uint8")


def make_batch(spec: CacheSpec, columns: dict[str, np.ndarray]) -> Any:
    """All that soft targets read of a batch of cached records."""
    return SimpleNamespace(spec=spec, columns=dict(columns))


def topk_batch(
    logits: torch.Tensor,
    *,
    tiers: tuple[int, ...],
    values: str,
    temperatures: tuple[str, ...] = ("1", "2"),
    labels: torch.Tensor | None = None,
    weight: np.ndarray | None = None,
) -> Any:
    """What a dump would have written for teacher logits float32 [N, V]."""
    ids, head = exact_topk(logits, tiers[-1])
    none = torch.full((len(logits), 0), -1)
    known = none if labels is None else labels
    stored = [float(t) for t in temperatures]
    tails = torch.stack(
        [tail_lse(logits, torch.cat([ids[:, :k], known], 1), head[:, 0], stored) for k in tiers], 1
    )
    spec = CacheSpec(
        kind="topk",
        num_classes=logits.shape[1],
        samples=(0, max(1, len(logits))),
        records_per_shard=100,
        tiers=tiers,
        values=values,
        temperatures=temperatures,
        labels=known.shape[1],
        row_weights=weight is not None,
    )
    rows = Rows(ids=ids.numpy(), logits=head.numpy(), tail_lse=tails.numpy(), weight=weight)
    if labels is not None:
        picked = torch.where(labels < 0, -torch.inf, logits.gather(1, labels.clamp(min=0)))
        rows = replace(rows, label=labels.numpy(), label_logit=picked.numpy())
    return make_batch(spec, encode_rows(spec, rows).columns)


def full_batch(logits: torch.Tensor, values: str = "float32") -> Any:
    spec = CacheSpec(
        kind="full",
        num_classes=logits.shape[1],
        samples=(0, len(logits)),
        records_per_shard=100,
        values=values,
    )
    return make_batch(spec, encode_rows(spec, Rows(logits=logits.numpy())).columns)


def teacher(seed: int, rows: int, classes: int, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


def random_labels(seed: int, rows: int, classes: int, count: int) -> torch.Tensor | None:
    """int64 [rows, count] of -1 to classes - 1; some of a row may be equal."""
    return (
        torch.from_numpy(np.random.default_rng(seed).integers(-1, classes, (rows, count)))
        if count
        else None
    )


def total(targets: SoftTargets) -> torch.Tensor:
    mass = targets.log_probs_NK.double().exp().sum(-1)
    return mass if targets.log_tail_N is None else mass + targets.log_tail_N.double().exp()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    classes=st.integers(4, 40),
    data=st.data(),
    temperature=st.sampled_from(["1", "2"]),
    num_labels=st.integers(0, 3),
    scale=st.sampled_from([1.0, 25.0]),
)
def test_float32_head_and_tail_are_the_softmax(
    seed: int,
    rows: int,
    classes: int,
    data: st.DataObject,
    temperature: str,
    num_labels: int,
    scale: float,
) -> None:
    logits = teacher(seed, rows, classes, scale)
    tiers = tuple(sorted(data.draw(st.sets(st.integers(1, classes - 1), min_size=1, max_size=3))))
    k = data.draw(st.sampled_from(tiers))
    labels = random_labels(seed, rows, classes, num_labels)
    found = soft_targets(
        topk_batch(logits, tiers=tiers, values="float32", labels=labels),
        temperature=temperature,
        k=k,
    )
    log_q = torch.log_softmax(logits.double() / float(temperature), -1)
    ids, _ = exact_topk(logits, k)
    assert (
        found.ids_NK is not None
        and torch.equal(found.ids_NK, ids)
        and found.temperature == float(temperature)
    )
    # z - max, / T, the normaliser: three roundings of numbers up to 8 * scale.
    close = {"rtol": 1e-6, "atol": 4 * 8 * scale * 6e-8 + 1e-6}
    torch.testing.assert_close(found.log_probs_NK.double(), log_q.gather(1, ids), **close)
    assert found.log_tail_N is not None
    rest = torch.logsumexp(log_q.scatter(1, ids, -torch.inf), -1)
    torch.testing.assert_close(found.log_tail_N.double(), rest, **close)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    values=st.sampled_from(VALUES),
    classes=st.integers(4, 30),
    data=st.data(),
    num_labels=st.integers(0, 2),
    scale=st.sampled_from([1.0, 40.0]),
)
def test_every_codec_decodes_as_numpy_does_and_sums_to_one(
    seed: int, values: str, classes: int, data: st.DataObject, num_labels: int, scale: float
) -> None:
    logits = teacher(seed, 3, classes, scale)
    logits[0, :2] = -torch.inf
    tiers = tuple(sorted(data.draw(st.sets(st.integers(1, classes - 1), min_size=1, max_size=2))))
    k = data.draw(st.sampled_from(tiers))
    labels = random_labels(seed, 3, classes, num_labels)
    batch = topk_batch(logits, tiers=tiers, values=values, labels=labels)
    found = soft_targets(batch, temperature=2, k=k)
    want = decode_rows(batch.spec, batch.columns, k)
    assert want.tail_lse is not None
    assert found.ids_NK is not None and np.array_equal(found.ids_NK.numpy(), want.ids)
    head, tail = want.relative.astype(np.float64) / 2, want.tail_lse[:, 1:2].astype(np.float64)
    normaliser = np.log(np.exp(head).sum(1, keepdims=True) + np.exp(tail))
    assert np.allclose(found.log_probs_NK.numpy(), head - normaliser, rtol=1e-6, atol=2e-5)
    assert np.allclose(found.log_tail_N, (tail - normaliser)[:, 0], rtol=1e-6, atol=2e-5)
    assert float((total(found) - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("values", VALUES)
def test_full_rows(values: str) -> None:
    logits = teacher(3, 5, 33)
    batch = full_batch(logits, values)
    found = soft_targets(batch, temperature=3.25, k=33)
    assert found.ids_NK is None and found.log_tail_N is None and found.temperature == 3.25
    want = torch.log_softmax(
        torch.from_numpy(decode_rows(batch.spec, batch.columns).logits).double() / 3.25, -1
    )
    torch.testing.assert_close(found.log_probs_NK.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cache_equals_the_live_teacher_bit_for_bit(temperature: float) -> None:
    logits = teacher(4, 6, 300)
    live = targets_from_logits(logits, temperature=temperature)
    full = soft_targets(full_batch(logits), temperature=temperature)
    everything = soft_targets(
        topk_batch(logits, tiers=(20, 300), values="float32"), temperature=temperature
    )
    for cached in (full, everything):
        assert cached.ids_NK is None and torch.equal(cached.log_probs_NK, live.log_probs_NK)
    assert torch.equal(
        targets_from_logits(logits, temperature=temperature, k=300).log_probs_NK, live.log_probs_NK
    )
    sparse = soft_targets(
        topk_batch(logits, tiers=(20, 300), values="float32"), temperature=temperature, k=20
    )
    live = targets_from_logits(logits, temperature=temperature, k=20)
    for name in ("ids_NK", "log_probs_NK", "log_tail_N"):
        assert torch.equal(getattr(sparse, name), getattr(live, name)), name
    # Shuffled, or one at a time: each row the same bits.
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    shuffled = targets_from_logits(logits[order], temperature=temperature, k=20)
    assert torch.equal(shuffled.log_probs_NK, live.log_probs_NK[order])
    single = [targets_from_logits(row[None], temperature=temperature, k=20) for row in logits]
    assert torch.equal(
        torch.cat([t.log_tail_N for t in single if t.log_tail_N is not None]), live.log_tail_N
    )


@pytest.mark.parametrize("values", ["float16", "uint8"])
def test_topk_of_all_classes_equals_full_of_the_same_codec(values: str) -> None:
    logits = teacher(5, 4, 50)
    full = soft_targets(full_batch(logits, values), temperature=2)
    everything = soft_targets(topk_batch(logits, tiers=(50,), values=values), temperature=2)
    assert torch.equal(full.log_probs_NK, everything.log_probs_NK)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([1, 2, 4, 8, 16]), count=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_high_planes_of_ids(bits: int, count: int, seed: int) -> None:
    high = np.random.default_rng(seed).integers(0, 2**bits, (3, count))
    plane = torch.from_numpy(pack_high(high << 16, bits))
    assert np.array_equal(_plane(plane, bits, count).numpy(), high)


def test_ids_above_16_bits() -> None:
    logits = teacher(6, 2, 70_000)
    found = soft_targets(topk_batch(logits, tiers=(5, 17), values="float16"), temperature=1)
    want = logits.sort(dim=-1, descending=True, stable=True).indices[:, :17]
    assert (
        found.ids_NK is not None and torch.equal(found.ids_NK, want) and bool((want > 65535).any())
    )


def test_row_weights_and_slicing() -> None:
    weight = np.array([1.0, 0.0, 0.5, 2.0], np.float32)
    found = soft_targets(
        topk_batch(teacher(7, 4, 10), tiers=(3,), values="float16", weight=weight), temperature=1
    )
    assert (
        found.weight_N is not None
        and found.weight_N.tolist() == weight.tolist()
        and len(found) == 4
    )
    some = found[torch.tensor([True, False, True, False])].to("cpu")
    assert some.weight_N is not None and some.ids_NK is not None and found.ids_NK is not None
    assert some.weight_N.tolist() == [1.0, 0.5] and torch.equal(some.ids_NK, found.ids_NK[[0, 2]])
    assert len(found[1:]) == 3


def test_draws_have_ids_and_no_tail_and_stay_draws() -> None:
    draws = SoftTargets(
        1.0, 9, torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 2), None, torch.tensor([1.0, 2.0])
    )
    some = draws[1:].to("cpu")
    assert draws.drawn and some.drawn and some.log_tail_N is None
    assert some.ids_NK is not None and some.ids_NK.tolist() == [[3, 4]]
    logits = teacher(11, 2, 9)
    assert not any(
        t.drawn
        for t in (
            targets_from_logits(logits, temperature=1),
            targets_from_logits(logits, temperature=1, k=3),
            soft_targets(topk_batch(logits, tiers=(3,), values="float16"), temperature=1),
        )
    )


def test_read_only_columns_are_taken() -> None:
    batch = full_batch(teacher(8, 2, 4))
    batch.columns["values"].flags.writeable = False
    assert len(soft_targets(batch, temperature=1)) == 2


def test_no_gradient_reaches_the_live_teacher() -> None:
    logits = teacher(9, 2, 6).requires_grad_()
    assert not targets_from_logits(logits, temperature=1.0).log_probs_NK.requires_grad


def test_refusals() -> None:
    batch = topk_batch(teacher(10, 2, 9), tiers=(2, 4), values="float16")
    cases: list[tuple[Any, str]] = [
        (
            lambda: soft_targets(batch, temperature=3),
            "temperature 3 was not stored in the cache; stored: 1, 2",
        ),
        (lambda: soft_targets(batch, temperature=0), "expected a number above 0"),
        (
            lambda: soft_targets(batch, temperature=1, k=3),
            "k is 3, which is no tier of the cache; tiers: 2, 4",
        ),
        (lambda: soft_targets(full_batch(teacher(1, 2, 5)), temperature=1, k=4), "k is 4"),
        (
            lambda: targets_from_logits(torch.zeros(2, 3, 4), temperature=1.0),
            "expected floating \\[N, V\\]",
        ),
        (lambda: targets_from_logits(torch.zeros(2, 3), temperature=1.0, k=4), "k is 4"),
        (
            lambda: SoftTargets(1.0, 5, None, torch.zeros(2, 4), None),
            "4 entries are kept of 5 classes",
        ),
        (
            lambda: SoftTargets(1.0, 5, None, torch.zeros(2, 5), torch.zeros(2)),
            "log_tail_N is given without ids_NK",
        ),
        (
            lambda: SoftTargets(
                1.0, 5, torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6), None
            ),
            "6 entries",
        ),
        (
            lambda: SoftTargets(1.0, 5, None, torch.zeros(2, 5), None, torch.ones(3)),
            "weight_N is \\[3\\]",
        ),
        (lambda: SoftTargets(0.0, 5, None, torch.zeros(2, 5), None), "positive"),
        (
            lambda: SoftTargets(1.0, 5, None, np.zeros((2, 5)), None),
            r"log_probs_NK is a numpy array \[2, 5\]",
        ),
        (
            lambda: SoftTargets(1.0, 5, None, torch.zeros(5), None),
            r"log_probs_NK is \[5\] of torch.float32; expected",
        ),
        (
            lambda: SoftTargets("1", 5, None, torch.zeros(2, 5), None),
            r"temperature is '1' \(str\); expected a number",
        ),
        (
            lambda: SoftTargets(1.0, 5, None, torch.zeros(2, 5), None, [1.0, 1.0]),
            r"weight_N is \[1.0, 1.0\] \(list\)",
        ),
        (
            lambda: soft_targets(batch, temperature=1, k=2.0),
            r"k is 2.0 \(float\); expected an integer",
        ),
        (
            lambda: soft_targets(batch, temperature=1, k="4"),
            r"k is '4' \(str\); expected an integer",
        ),
        (lambda: soft_targets(batch, temperature=1, k=True), r"k is True \(bool\)"),
        (lambda: soft_targets(batch, temperature=1, device="gpu"), "device is 'gpu'"),
        (lambda: soft_targets(batch, temperature=None), "temperature is None"),
        (
            lambda: soft_targets(batch, temperature=torch.tensor(1.0)),
            "temperature is a tensor .* expected a number",
        ),
        (lambda: soft_targets(batch, temperature=1.1234567), "at most 6 decimals"),
        (
            lambda: soft_targets(teacher(1, 2, 5), temperature=1),
            "batch is a Tensor; expected what cache.read",
        ),
        (
            lambda: targets_from_logits(np.zeros((2, 5)), temperature=1),
            "teacher logits is a numpy array",
        ),
        (
            lambda: targets_from_logits(torch.zeros(2, 5).long(), temperature=1),
            "of torch.int64; expected floating",
        ),
        (
            lambda: targets_from_logits(torch.zeros(2, 5), temperature=1, k=3.0),
            r"k is 3.0 \(float\)",
        ),
    ]
    if not torch.cuda.is_available():
        cases.append(
            (
                lambda: soft_targets(batch, temperature=1, device="cuda"),
                "device is 'cuda', and torch sees no",
            )
        )
    for call, message in cases:
        with pytest.raises(UsageError, match=message):
            call()
    del batch.columns["values_4"]
    with pytest.raises(UsageError, match="'values_4' is needed and was not read"):
        soft_targets(batch, temperature=1)
    feature = FeatureSpec(name="f", module="m", recipe="raw", dtype="float32", shape=(2,))
    none = CacheSpec(
        kind="none", num_classes=0, samples=(0, 2), records_per_shard=2, features=(feature,)
    )
    with pytest.raises(UsageError, match="no soft targets"):
        soft_targets(make_batch(none, {"feature_f": np.zeros((2, 2), np.float32)}), temperature=1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [[5, 2], [3, 3]],
            r"of 2 rows: row 1 has the id 3 twice \(of draws add up the weights\); expected each "
            r"of 0 to 5",
        ),
        ([[0, 6], [1, 2]], "row 0 has the id 6; expected each of 0 to 5 at most once"),
        ([[0, 1], [-1, 2]], "row 1 has the id -1"),
    ],
)
@pytest.mark.parametrize("tail", [None, torch.zeros(2)])
def test_ids_are_looked_at_where_targets_are_made(
    ids: list[list[int]], message: str, tail: torch.Tensor | None
) -> None:
    good = SoftTargets(2.0, 6, torch.tensor([[5, 2], [3, 1]]), torch.zeros(2, 2), tail)
    for make in (
        lambda: SoftTargets(2.0, 6, torch.tensor(ids), torch.zeros(2, 2), tail),
        lambda: replace(good, ids_NK=torch.tensor(ids)),
    ):
        with pytest.raises(UsageError, match=message):
            make()
    assert good.to("cpu")[:1].ids_checked and good == replace(good, ids_checked=True)
    # What cannot be looked at without waiting is not: there it is the caller's word.
    SoftTargets(2.0, 6, torch.tensor(ids, device="meta"), torch.zeros(2, 2, device="meta"), None)


@pytest.mark.parametrize("k", [None, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_of_a_teacher_that_is_no_distribution_is_named(
    dtype: torch.dtype, k: int | None
) -> None:
    logits = teacher(12, 4, 5).to(dtype)
    for at, value, found in (
        ((2, 3), torch.nan, "row 2 have nan"),
        ((1, 0), torch.inf, "row 1 have inf"),
        ((3, slice(None)), -torch.inf, "row 3 are all -inf"),
    ):
        bad = logits.clone()
        bad[at] = value
        with pytest.raises(
            UsageError,
            match=f"teacher logits of {found}; expected finite ones, or -inf for classes",
        ):
            targets_from_logits(bad, temperature=2.0, k=k)
    logits[0, :4] = -torch.inf  # what rules out all classes but one is a distribution
    assert bool(
        targets_from_logits(logits, temperature=2.0, k=k).log_probs_NK.isnan().logical_not().all()
    )
    assert len(targets_from_logits(logits[:0], temperature=2.0, k=k)) == 0


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float32(1.1), "1.1"),
        (np.float32(0.3) * np.float32(3), "0.9"),
        (1.1 * 1.1, "1.21"),
        (np.float64(1.21), "1.21"),
        (np.float16(1.5), "1.5"),
        (np.float16(1.1), "1.1"),
        (np.float32(123.456), "123.456"),
        (np.int64(3), "3"),
        (2, "2"),
        ("1.50", "1.5"),
    ],
)
def test_temperatures_of_every_dtype_are_decimals(value: Any, name: str) -> None:
    assert check_temperature(value) == name
    assert targets_from_logits(torch.zeros(1, 3), temperature=value).temperature == float(name)


@pytest.mark.parametrize(
    "value", [1.1234567, np.float64(1.1234567), np.float32("nan"), np.float32(0), np.float32(1e9)]
)
def test_what_is_no_decimal_of_6_digits_is_refused_in_every_dtype(value: Any) -> None:
    with pytest.raises(UsageError, match="above 0 and below 1000 with at most 6 decimals"):
        check_temperature(value)


def test_a_short_repr() -> None:
    targets = targets_from_logits(teacher(13, 400, 50), temperature=1.5, k=20)
    assert repr(targets) == (
        "SoftTargets(400 rows at temperature 1.5, 20 of 50 classes (largest and tail), "
        "torch.float32 on cpu)"
    )
    assert "50 of 50 classes (all)" in repr(
        targets_from_logits(teacher(13, 4, 50), temperature=1.5)
    )
    draws = replace(targets, log_tail_N=None, weight_N=torch.ones(400))
    assert "(draws), with weights, " in repr(draws)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_on_a_device_a_bad_row_spoils_no_other(value: float) -> None:
    logits = teacher(14, 5, 40)
    want = targets_from_logits(logits, temperature=2.0, k=4)
    logits[2, 7] = value
    found = targets_from_logits(logits.cuda(), temperature=2.0, k=4).to("cpu")
    keep = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found.ids_NK[keep], want.ids_NK[keep]) and bool(
        found.log_probs_NK[2].isnan().any()
    )
    torch.testing.assert_close(
        found.log_probs_NK[keep], want.log_probs_NK[keep], rtol=1e-6, atol=1e-6
    )
