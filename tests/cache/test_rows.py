"""What encoding reports, and every row it refuses, by record and row."""

from __future__ import annotations

import numpy as np
import pytest
from row_definitions import VALUES, make_rows, topk_spec

from kdcache.cache.codec import decode_rows, encode_rows, row_columns
from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.errors import DataError, UsageError

# ---- what is measured
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_measured_sums_follow_their_definitions(values):
    rng = np.random.default_rng(5)
    z = (rng.normal(size=(6, 11)) * 5).astype(np.float32)
    spec = topk_spec(11, (2, 5), values, ("1", "2"), labels=1)
    rows = make_rows(spec, z, rng.integers(0, 11, (6, 1)))
    encoded = encode_rows(spec, rows)
    decoded = decode_rows(spec, encoded.columns)
    assert encoded.measured["rows"] == 6
    for t, T in enumerate((1.0, 2.0)):
        x = z.astype(float) / T
        p = np.exp(x - x.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        for k in (2, 5):
            mass = np.take_along_axis(p, rows.ids[:, :k], 1).sum(1)
            assert encoded.measured[f"mass:{k}:{T:.0f}"] == pytest.approx(mass.sum(), rel=1e-6)
            assert encoded.measured[f"truncation:{k}:{T:.0f}"] == pytest.approx(
                -np.log(mass).sum(), rel=1e-5
            )
        head = np.take_along_axis(p, rows.ids, 1)
        head = np.append(head, 1 - head.sum(1, keepdims=True), 1)
        q = np.exp(
            np.append(
                decoded.relative.astype(float) / T, decoded.tail_lse[:, t, None].astype(float), 1
            )
        )
        q /= q.sum(1, keepdims=True)
        expected = (head * np.log(head / q)).sum()
        assert encoded.measured[f"kl:{T:.0f}"] == pytest.approx(
            expected, abs=1e-6 if values != "float32" else 1e-9
        )
        assert (encoded.measured[f"kl:{T:.0f}"] == 0) == (values == "float32")


def test_measured_of_a_full_cache_leaves_out_what_was_dropped():
    spec = CacheSpec(
        kind="full", num_classes=3, samples=(0, 1), records_per_shard=1, values="uint8"
    )
    measured = encode_rows(spec, Rows(logits=np.array([[0, -60.1, -130]], np.float32))).measured
    assert set(measured) == {"rows", "kl:1", "kl:2", "kl:4"} and 0 <= measured["kl:4"] < 1e-6


def test_measured_does_not_depend_on_the_order_of_rows():
    z = (np.random.default_rng(1).normal(size=(300, 1000)) * 4).astype(np.float32)  # two chunks
    spec = CacheSpec(
        kind="full", num_classes=1000, samples=(0, 300), records_per_shard=300, values="float16"
    )
    assert (
        encode_rows(spec, Rows(logits=z)).measured
        == encode_rows(spec, Rows(logits=z[::-1].copy())).measured
    )


# ---- refusals
# -------------------------------------------------------------------------------------------------


def good_rows(**change):
    base = dict(
        logits=np.array([[2, 1, 1, 0]] * 3, np.float32),
        ids=np.array([[3, 1, 2, 0]] * 3),
        tail_lse=np.full((3, 2, 1), -1, np.float32),
        label=np.array([[3], [9], [-1]]),
        label_logit=np.array([[2], [-1], [-np.inf]], np.float32),
        label_weight=np.ones((3, 1), np.float32),
        mean=np.zeros(3, np.float32),
        std=np.ones(3, np.float32),
        weight=np.ones(3, np.float32),
        pos=np.array([0, 1, 0]),
    )
    for name, (at, value) in change.items():
        base[name] = base[name].copy()
        base[name][at] = value
    return Rows(**base)


GOOD_SPEC = dict(
    tiers=(2, 4),
    temperatures=("1",),
    labels=1,
    label_weights=True,
    moments=True,
    row_weights=True,
    rows="ragged",
)
BAD = [
    (dict(logits=((1, 0), np.nan)), "NaN"),
    (dict(logits=((1, 0), np.inf)), r"\+inf"),
    (dict(logits=(1, -np.inf)), "every logit is -inf"),
    (dict(logits=((1, 3), 1.5)), "out of order"),
    (dict(ids=((1, slice(1, 3)), [2, 1])), "out of order"),
    (dict(ids=((1, 3), 10)), "id 10 is out of range; expected 0 to 9"),
    (dict(ids=((1, 3), -1)), "id -1 is out of range"),
    (dict(ids=((1, 3), 3)), "an id occurs twice"),
    (dict(tail_lse=((1, 1, 0), np.nan)), "tail_lse is NaN"),
    (dict(tail_lse=((1, 1, 0), np.inf)), "tail_lse is NaN or"),
    (dict(label=((1, 0), 10)), r"label 10 is out of range; expected -1 \(unknown\) or 0 to 9"),
    (dict(label=((1, 0), -100)), "label -100"),
    (dict(label_logit=((1, 0), np.nan)), "label_logit is NaN"),
    (dict(label_logit=((1, 0), 0.5)), "above the last logit"),
    (dict(label=((1, 0), 2), label_logit=((1, 0), 0.5)), "not the logit that the support has"),
    (dict(label_weight=((1, 0), -1)), "label_weight must be"),
    (dict(mean=(1, -np.inf)), "mean must be finite"),
    (dict(std=(1, np.nan)), "std must be"),
    (dict(weight=(1, np.inf)), "weight must be"),
    (dict(pos=(1, -1)), "pos must be"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_bad_rows_are_refused_by_record_and_row(change, message):
    spec = topk_spec(10, **GOOD_SPEC)
    encode_rows(spec, good_rows(), first_record=40, offsets=np.array([0, 0, 2, 3]))
    with pytest.raises(DataError, match=f"^record 41, row 1: .*{message}"):
        encode_rows(spec, good_rows(**change), first_record=40, offsets=np.array([0, 0, 2, 3]))
    with pytest.raises(DataError, match=r"^record 8: "):
        encode_rows(spec, good_rows(**change), first_record=7)


def test_a_tail_of_no_classes_must_be_empty():
    spec = topk_spec(3, (1, 2), temperatures=("1",), labels=1)
    rows = dict(
        logits=np.array([[2, 1]], np.float32),
        ids=np.array([[0, 1]]),
        label=np.array([[2]]),
        label_logit=np.array([[0]], np.float32),
    )
    encode_rows(spec, Rows(**rows, tail_lse=np.array([[[-1], [-np.inf]]], np.float32)))
    with pytest.raises(DataError, match="tier 2 must be -inf"):
        encode_rows(spec, Rows(**rows, tail_lse=np.array([[[-1], [-9]]], np.float32)))


def test_a_label_that_occurs_twice_has_one_logit():
    spec = topk_spec(30, (1,), temperatures=("1",), labels=2)
    rows = dict(
        logits=np.ones((1, 1), np.float32),
        ids=np.zeros((1, 1), int),
        label=np.array([[7, 7]]),
        tail_lse=np.zeros((1, 1, 1), np.float32),
    )
    encode_rows(spec, Rows(**rows, label_logit=np.array([[-1, -1]], np.float32)))
    with pytest.raises(DataError, match="one label occurs with two values"):
        encode_rows(spec, Rows(**rows, label_logit=np.array([[-1, -2]], np.float32)))


def test_bfloat16_overflow_is_refused():
    spec = CacheSpec(
        kind="full", num_classes=2, samples=(0, 1), records_per_shard=1, values="bfloat16"
    )
    with pytest.raises(DataError, match="record 0: a logit is too large for bfloat16"):
        encode_rows(spec, Rows(logits=np.array([[3.4e38, 0]], np.float32)))
    with pytest.raises(DataError, match="every logit is -inf in bfloat16"):
        encode_rows(spec, Rows(logits=np.array([[-3.4e38, -3.4e38]], np.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=np.zeros((3, 4))), "rows.logits: float64"),
        (
            dict(logits=np.zeros((3, 5), np.float32)),
            r"rows.logits: float32 \[3, 5\] given; expected float32 \[3, 4\]",
        ),
        (dict(ids=np.zeros((2, 4), int)), "rows.ids"),
        (dict(label=None), "rows.label is missing"),
        (dict(label=np.zeros((3, 1), np.float32)), "expected integers"),
    ],
)
def test_wrong_arrays_are_usage_errors(change, message):
    rows = good_rows()
    fields = {name: getattr(rows, name) for name in Rows.__dataclass_fields__}
    with pytest.raises(UsageError, match=message):
        encode_rows(topk_spec(10, **GOOD_SPEC), Rows(**{**fields, **change}))


def test_a_field_without_a_column_is_refused():
    spec = CacheSpec(kind="full", num_classes=2, samples=(0, 1), records_per_shard=1)
    with pytest.raises(UsageError, match=r"rows\.mean is given"):
        encode_rows(spec, Rows(logits=np.zeros((1, 2), np.float32), mean=np.zeros(1, np.float32)))


def test_k_must_be_a_tier_and_columns_must_be_read():
    spec = topk_spec(10, **GOOD_SPEC)
    columns = encode_rows(spec, good_rows()).columns
    with pytest.raises(UsageError, match="k is 3; this cache keeps the tiers 2, 4"):
        decode_rows(spec, columns, 3)
    few = row_columns(spec, 2)
    assert "values_4" not in few and "tail_lse" in few
    assert decode_rows(spec, {name: columns[name] for name in few}, 2).ids.tolist() == [[3, 1]] * 3
    with pytest.raises(UsageError, match="'ids_4' is needed"):
        decode_rows(spec, {name: columns[name] for name in [*few, "values_4"]}, 4)
    full = CacheSpec(kind="full", num_classes=2, samples=(0, 1), records_per_shard=1)
    with pytest.raises(UsageError, match="all 2 classes"):
        decode_rows(full, {}, 1)


def test_a_cache_of_features_has_no_rows():
    feature = FeatureSpec(
        name="f", module="m", recipe="raw", dtype="float32", shape=(2,), level="row"
    )
    spec = CacheSpec(
        kind="none",
        num_classes=0,
        samples=(0, 1),
        records_per_shard=1,
        rows="ragged",
        features=(feature,),
    )
    assert encode_rows(spec, Rows(pos=np.arange(3))).columns["pos"].tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="only features"):
        decode_rows(spec, {})
