"""Codecs against definitions: plain loops in float64, exact rational arithmetic, and the laws of
the format.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_definitions import (
    FAST,
    TEMPERATURES,
    VALUES,
    dense_logits,
    feature,
    log_sum,
    make_rows,
    topk_spec,
    total_log_mass,
)

from kdcache.cache.catalog import KNOWN
from kdcache.cache.codec import decode_rows, encode_rows
from kdcache.cache.features import decode_feature, encode_feature
from kdcache.cache.rows import Rows
from kdcache.cache.spec import FEATURE_DTYPES, KINDS, LEVELS, RECIPES, CacheSpec, FeatureSpec
from kdcache.cache.values import (
    CODECS,
    add_high,
    from_bfloat16,
    pack_high,
    to_bfloat16,
    value_codec,
)

# One V below, at and above every change of id width and of high plane.
CLASSES = (
    1,
    2,
    255,
    256,
    257,
    2**16,
    2**16 + 1,
    2**17,
    2**17 + 1,
    2**18,
    2**18 + 1,
    2**20,
    2**20 + 1,
    2**24,
    2**24 + 1,
    2**31,
    2**31 + 1,
    2**32,
)


# ---- ids
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", CLASSES)
def test_ids_survive_for_every_width(V):
    rng = np.random.default_rng(V)
    k = min(V, 13)
    picked = {0, V - 1, *rng.integers(0, V, 40).tolist()} if V > 13 else set(range(V))
    ids = np.array([rng.permutation(sorted(picked))[:k] for _ in range(3)], np.int64).reshape(3, k)
    logits = np.sort(rng.normal(size=(3, k)).astype(np.float32))[:, ::-1]
    tiers = tuple(sorted({1, max(1, k // 2), k}))
    tail = np.full((3, len(tiers), 1), -np.inf if V == k else -1.0, np.float32)
    if V == k:
        tail[:, :-1] = -1.0
    spec = topk_spec(V, tiers, temperatures=("1",))
    columns = encode_rows(spec, Rows(logits=logits, ids=ids, tail_lse=tail)).columns
    for tier in tiers:
        assert np.array_equal(decode_rows(spec, columns, tier).ids, ids[:, :tier])
    for c in spec.columns()[1:]:
        assert columns[c.name].shape == (3, *c.shape) and columns[c.name].dtype == c.storage


@FAST
@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_high_plane_is_a_bit_string(high_bits, count, seed):
    ids = np.random.default_rng(seed).integers(0, 2 ** (16 + high_bits), (2, count))
    plane = pack_high(ids, high_bits)
    # one big integer
    bits = [sum((int(i) >> 16) << (high_bits * j) for j, i in enumerate(row)) for row in ids]
    length = -(-count * high_bits // 8)
    assert [bytes(p) for p in plane] == [b.to_bytes(length, "little") for b in bits]
    for dtype in (np.int64, np.uint32):
        back = (ids & 0xFFFF).astype(dtype)
        add_high(back, plane, high_bits)
        assert np.array_equal(back, ids) and back.dtype == dtype


# ---- values
# ---------------------------------------------------------------------------------------------------


@FAST
@given(dense_logits())
def test_float32_is_bit_exact(z):
    full = CacheSpec(
        kind="full", num_classes=z.shape[1], samples=(0, 9), records_per_shard=9, values="float32"
    )
    encoded = encode_rows(full, Rows(logits=z))
    decoded = decode_rows(full, encoded.columns)
    assert decoded.logits.tobytes() == z.tobytes() and np.array_equal(decoded.max, z.max(1))
    assert all(encoded.measured[f"kl:{t}"] == 0 for t in ("1", "2", "4"))
    spec = topk_spec(z.shape[1], (z.shape[1],))
    rows = make_rows(spec, z)
    columns = encode_rows(spec, rows).columns
    assert columns[f"values_{spec.k}"].tobytes() == rows.logits.tobytes()
    assert columns["tail_lse"].tobytes() == rows.tail_lse.tobytes()


@FAST
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_bfloat16_is_the_nearest_even(values):
    x = np.array(values, np.float32)
    bits = to_bfloat16(x)
    exact = from_bfloat16(bits)
    # what bfloat16 holds stays as it is
    assert np.array_equal(to_bfloat16(exact), bits)
    for value, found, code in zip(x, exact, bits, strict=True):
        if not (np.isfinite(value) and np.isfinite(found)):
            # halfway from the largest to 2^128
            assert math.isinf(value) or abs(value) >= 2.0**128 - 2.0**119
            continue
        neighbours = from_bfloat16(np.array([int(code) - 1, int(code) + 1]).astype(np.uint16))
        error = abs(Fraction(float(value)) - Fraction(float(found)))
        for other in neighbours[np.isfinite(neighbours)]:
            away = abs(Fraction(float(value)) - Fraction(float(other)))
            assert error < away or (error == away and code % 2 == 0) or float(other) == float(found)


def test_uint8_keeps_what_lies_120_below_the_maximum_and_nothing_below():
    below = np.nextafter(np.float32(-120), np.float32(-121))
    stored = CODECS["uint8"].encode(
        np.array([[0, -120, below]], np.float32), np.zeros(1, np.float32)
    )
    assert stored.values.tolist() == [[0, 254, 255]]
    assert CODECS["uint8"].decode(stored.values, stored.step).tolist()[0][1:] == [-120, -np.inf]


@FAST
@given(dense_logits())
def test_uint8_is_within_half_a_step(z):
    stored = CODECS["uint8"].encode(z, z.max(1))
    decoded = CODECS["uint8"].decode(stored.values, stored.step)
    # the format takes the difference in float32
    relative = z - z.max(1)[:, None]
    kept = relative >= -120
    assert np.array_equal(decoded == -np.inf, ~kept)
    deepest = np.where(kept, -relative, 0).max(1)
    assert np.array_equal(stored.step, (deepest / np.float32(254)).astype(np.float32))
    step = stored.step.astype(float)[:, None]
    exact = -stored.values.astype(float) * step
    # A step below 2^-126 has lost bits of deepest / 254; codes then stop at 254.
    assert (np.abs(relative - exact) <= step / 2 * (1 + 1e-12))[kept & (step >= 2.0**-126)].all()
    # one float32 rounding of code * step
    assert (np.abs(decoded - exact)[kept] <= 120 * 2.0**-24).all()
    assert not np.signbit(decoded[(stored.values == 0)]).any()


@pytest.mark.parametrize("values", VALUES)
@FAST
@given(z=dense_logits())
def test_rounding_keeps_the_order(values, z):
    z = -np.sort(-z, axis=1)
    stored = CODECS[values].encode(z, z.max(1))
    decoded = CODECS[values].decode(stored.values, stored.step)
    assert not np.isnan(decoded).any() and (decoded[:, :-1] >= decoded[:, 1:]).all()
    assert (
        decoded[:, 0]
        == (
            0
            if stored.max is not None
            else from_bfloat16(to_bfloat16(z[:, 0]))
            if values == "bfloat16"
            else z[:, 0]
        )
    ).all()


def test_float16_limits():
    z = np.array([[1.0, 1.0 - 65504, 1.0 - 65519, 1.0 - 65520, -np.inf]], np.float32)
    stored = CODECS["float16"].encode(z, z.max(1))
    assert stored.values.tolist() == [[0, -65504, -65504, -np.inf, -np.inf]]


def test_uint8_step_may_be_zero():
    z = np.array([[5, 5, 5, -np.inf], [1, 1, 1 - 121, 1 - 1e9]], np.float32)
    stored = CODECS["uint8"].encode(z, z.max(1))
    assert stored.step.tolist() == [0, 0] and stored.values.tolist() == [
        [0, 0, 0, 255],
        [0, 0, 255, 255],
    ]
    assert CODECS["uint8"].decode(stored.values, stored.step)[0].tolist() == [
        0,
        0,
        0,
        -np.inf,
    ]


def test_all_tiers_share_one_step():
    z = np.array([[0, -1, -2, -90.0]], np.float32)
    spec = topk_spec(1000, (2, 4), "uint8", ("1",))
    rows = Rows(logits=z, ids=np.arange(4)[None], tail_lse=np.full((1, 2, 1), -3, np.float32))
    columns = encode_rows(spec, rows).columns
    assert columns["step"] == np.float32(90) / np.float32(254)
    assert columns["values_2"].tolist() == [[0, 3]] and columns["values_4"].tolist() == [[6, 254]]


# ---- tails and labels
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
@FAST
@given(data=st.data())
def test_no_mass_is_lost(values, data):
    """Head and tail of every tier hold the mass of all V classes; what each step may lose is
    derived below.
    """
    z = data.draw(dense_logits())
    V = z.shape[1]
    tiers = tuple(sorted(data.draw(st.sets(st.integers(1, V), min_size=1, max_size=3))))
    labels = data.draw(st.integers(0, 2))
    label = (
        np.array(
            data.draw(
                st.lists(st.integers(-1, V - 1), min_size=labels * len(z), max_size=labels * len(z))
            ),
            np.int64,
        ).reshape(len(z), labels)
        if labels
        else None
    )
    spec = topk_spec(V, tiers, values, labels=labels)
    rows = make_rows(spec, z, label)
    columns = encode_rows(spec, rows).columns
    step = columns["step"].astype(float) if values == "uint8" else np.zeros(len(z))
    for k in tiers:
        decoded = decode_rows(spec, columns, k)
        assert np.array_equal(decoded.ids, rows.ids[:, :k])
        for t, name in enumerate(TEMPERATURES):
            found, T = total_log_mass(decoded, name, t), float(name)
            for n in range(len(z)):
                x = z[n].astype(float) - float(decoded.max[n])
                expected = log_sum(list(x / T))
                # log-mass moves by at most the largest move of one exponent: half a step; half a
                # unit of the last place of a float16, a bfloat16 logit (8 bits), a float32; all of
                # entries with mass above 1e-40, which are within 100 T of the maximum.
                reach, size = 100 * T, np.abs(z[n][z[n] > -200]).max()
                moved = {
                    "uint8": step[n] / 2 + 120 * 2**-24,
                    "float16": reach * 2**-11 + 2**-25,
                    "bfloat16": size * 2**-8 + 2**-130,
                    "float32": 0,
                }[values]
                rounding = (reach + size) * 2**-23 / T + (abs(expected) + reach / T) * 2**-22
                assert abs(found[n] - expected) <= moved / T + rounding + 1e-9, (k, name, n)
                p = np.exp(
                    np.append(decoded.relative[n].astype(float) / T, decoded.tail_lse[n, t])
                    - found[n]
                )
                assert abs(p.sum() - 1) < 1e-12


def test_dropped_mass_joins_every_tier_that_held_it():
    z = np.array([[0, -1, -121, -130.0]], np.float32)
    tail = np.array([[[-5.0, -3], [-130, -33], [-131, -34]]], np.float32)
    spec = topk_spec(1000, (2, 3, 4), "uint8", ("1", "4"))
    encoded = encode_rows(spec, Rows(logits=z, ids=np.arange(4)[None], tail_lse=tail))
    found = encoded.columns["tail_lse"][0]
    for t, T in enumerate((1, 4)):
        expected = [
            tail[0, 0, t],
            log_sum([tail[0, 1, t], -121 / T]),
            log_sum([tail[0, 2, t], -121 / T, -130 / T]),
        ]
        assert found[:, t].tolist() == np.array(expected, np.float32).tolist()
    # finite: the dropped entries count with the tail
    assert 0 <= encoded.measured["kl:4"] < 1e-6


def test_bfloat16_rebases_the_tail_to_the_stored_maximum():
    z = np.array([[100.2, 99.0, -np.inf]], np.float32)
    spec = topk_spec(1000, (3,), "bfloat16", ("1", "2"))
    rows = Rows(logits=z, ids=np.arange(3)[None], tail_lse=np.array([[[-1, -0.5]]], np.float32))
    decoded = decode_rows(spec, encode_rows(spec, rows).columns)
    # bfloat16 has steps of 0.5 there
    assert decoded.max[0] == 100.0
    shift = float(np.float32(100.2)) - 100.0
    assert decoded.tail_lse[0].tolist() == [np.float32(-1 + shift), np.float32(-0.5 + shift / 2)]


def test_labels_join_the_tail_once_and_only_outside_the_head():
    spec = topk_spec(100, (2, 4), "float32", ("2",), labels=2)
    logits = np.tile(np.array([[3, 2, 1, 0]], np.float32), (4, 1))
    label = np.array([[7, 7], [12, -1], [9, 50], [50, 60]])
    label_logit = np.array([[2, 2], [1, -np.inf], [0, -1], [-1, -2]], np.float32)
    rows = Rows(
        logits=logits,
        ids=np.tile([[5, 7, 12, 9]], (4, 1)),
        tail_lse=np.full((4, 2, 1), -4, np.float32),
        label=label,
        label_logit=label_logit,
    )
    columns = encode_rows(spec, rows).columns
    small, large = decode_rows(spec, columns, 2), decode_rows(spec, columns, 4)

    def joined(*logits):
        return np.float32(log_sum([-4, *((x - 3) / 2 for x in logits)]))

    # Tier 2 holds ids 5 and 7, tier 4 also 12 and 9.
    assert small.tail_lse[:, 0].tolist() == [joined(), joined(1), joined(0, -1), joined(-1, -2)]
    assert large.tail_lse[:, 0].tolist() == [joined(), joined(), joined(-1), joined(-1, -2)]
    once = encode_rows(
        spec,
        Rows(
            logits=logits,
            ids=rows.ids,
            tail_lse=rows.tail_lse,
            label=np.full((4, 2), 50),
            label_logit=np.full((4, 2), -1, np.float32),
        ),
    ).columns
    assert decode_rows(spec, once, 4).tail_lse[:, 0].tolist() == [joined(-1)] * 4


def test_unknown_label_has_no_logit():
    spec = topk_spec(9, (1,), temperatures=("1",), labels=1)
    rows = Rows(
        logits=np.ones((1, 1), np.float32),
        ids=np.zeros((1, 1), int),
        tail_lse=np.zeros((1, 1, 1), np.float32),
        label=np.array([[-1]]),
        label_logit=np.array([[np.nan]], np.float32),
    )
    assert encode_rows(spec, rows).columns["label_logit"] == -np.inf


@pytest.mark.parametrize("V", [200, 70_000, 2**32])
@pytest.mark.parametrize("values", VALUES)
def test_no_rows_are_rows(values, V):
    spec = topk_spec(V, (2, 5), values, labels=1)
    rows = Rows(
        logits=np.zeros((0, 5), np.float32),
        ids=np.zeros((0, 5), int),
        label=np.zeros((0, 1), int),
        tail_lse=np.zeros((0, 2, 3), np.float32),
        label_logit=np.zeros((0, 1), np.float32),
    )
    encoded = encode_rows(spec, rows, offsets=np.zeros(4, np.int64))
    assert encoded.measured["rows"] == 0 == encoded.measured["kl:1"]
    assert decode_rows(spec, encoded.columns, 2).ids.shape == (0, 2)
    full = CacheSpec(
        kind="full",
        num_classes=3,
        samples=(0, 1),
        records_per_shard=1,
        values=values,
        rows="ragged",
    )
    encoded = encode_rows(full, Rows(logits=np.zeros((0, 3), np.float32), pos=np.zeros(0, int)))
    assert decode_rows(full, encoded.columns).logits.shape == (0, 3)
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        columns = encode_feature(
            feature(dtype, (2, 3)), np.zeros((0, 2, 3), np.float32), offsets=np.zeros(4, np.int64)
        )
        assert decode_feature(feature(dtype, (2, 3)), columns).shape == (0, 2, 3)


def test_every_name_of_the_spec_is_read_as_itself_and_no_other_name_is() -> None:
    """A codec that is entered in the spec alone must be refused, not read as the one that happens
    to be last.
    """
    assert (
        KNOWN.items()
        >= {
            "kind": KINDS,
            "values": CODECS,
            "level": LEVELS,
            "recipe": RECIPES,
            "feature": FEATURE_DTYPES,
        }.items()
    )
    logits, top = np.array([[3.0, 1.0]], np.float32), np.array([3.0], np.float32)
    for codec in CODECS.values():
        stored = codec.encode(logits, top)
        assert codec.decode(stored.values, stored.step).dtype == np.float32
    feature = FeatureSpec(name="f", module="m", recipe="raw", dtype="float16", shape=(2,))
    object.__setattr__(feature, "dtype", "float8")
    for use in (
        lambda: value_codec("float8"),
        lambda: encode_feature(feature, logits),
        lambda: decode_feature(feature, {"feature_f": logits}),
    ):
        with pytest.raises(ValueError, match="'float8' has no encoding here"):
            use()
