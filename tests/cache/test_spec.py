"""The spec of a cache: what it keeps of what it is given, its columns, levels and shards, what is
refused by name.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import canonical
from kdcache.cache.columns import NAME, STORAGE, check_offsets
from kdcache.cache.spec import CacheSpec, FeatureSpec, spec_difference, temperature_name
from kdcache.errors import CacheCorrupt, NotBuilt, UsageError

FAST = settings(max_examples=100, deadline=None)


def topk(**change):
    return CacheSpec(
        **{
            **dict(
                kind="topk",
                num_classes=100,
                samples=(0, 10),
                records_per_shard=4,
                tiers=(2, 5),
                temperatures=("1", "2"),
            ),
            **change,
        }
    )


def feature(**change):
    return FeatureSpec(
        **{**dict(name="f", module="body.0", recipe="raw", dtype="int8", shape=(2, 3)), **change}
    )


# ---- spec
# -----------------------------------------------------------------------------------------------------


@st.composite
def features(draw, ragged):
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16", "int8"]))
    return FeatureSpec(
        name=draw(st.sampled_from("abc")),
        module=draw(st.text(max_size=9)),
        recipe=draw(st.sampled_from(["raw", "map", "pool", "cls", "last", "energy"])),
        dtype=dtype,
        shape=tuple(draw(st.lists(st.integers(1, 99), min_size=dtype == "int8", max_size=3))),
        level=draw(st.sampled_from(["record", "row"] if ragged else ["record"])),
    )


@st.composite
def specs(draw):
    kind = draw(st.sampled_from(["full", "topk", "none"]))
    rows = draw(st.sampled_from(["one", "ragged"]))
    found = {
        f.name: f
        for f in draw(st.lists(features(rows == "ragged"), min_size=kind == "none", max_size=3))
    }
    s0, v0 = draw(st.integers(0, 2**40)), draw(st.integers(0, 9))
    V = (
        draw(st.integers(1, {"full": 2**31 - 1, "topk": 2**32, "none": 0}[kind]))
        if kind != "none"
        else 0
    )
    has_rows = kind != "none"
    labels = draw(st.integers(0, 2)) if has_rows else 0
    tiers, temperatures = (), ()
    if kind == "topk":
        tiers = tuple(sorted(draw(st.sets(st.integers(1, min(V, 2**20)), min_size=1, max_size=3))))
        temperatures = tuple(
            sorted(
                draw(st.sets(st.sampled_from(["0.5", "1", "1.25", "2", "4", "10"]), min_size=1)),
                key=float,
            )
        )
    return CacheSpec(
        kind=kind,
        num_classes=V,
        samples=(s0, s0 + draw(st.integers(1, 50))),
        views=(v0, v0 + draw(st.integers(1, 4))),
        records_per_shard=draw(st.integers(1, 60)),
        seed=draw(st.integers(0, 2**53 - 1)),
        rows=rows,
        tiers=tiers,
        temperatures=temperatures,
        values=draw(st.sampled_from(["float32", "bfloat16", "float16", "uint8"])),
        labels=labels,
        label_weights=bool(labels) and draw(st.booleans()),
        moments=has_rows and draw(st.booleans()),
        row_weights=has_rows and draw(st.booleans()),
        view_keys=draw(st.booleans()),
        tokens=rows == "ragged" and draw(st.booleans()),
        features=tuple(found.values()),
    )


@FAST
@given(specs())
def test_a_spec_survives_its_json(spec):
    document = canonical.unseal(canonical.seal({"spec": spec.to_json()}), "x")["spec"]
    assert (
        CacheSpec.from_json(document) == spec
        and spec_difference(spec, CacheSpec.from_json(document)) == []
    )


@FAST
@given(specs())
def test_columns_and_levels_of_a_spec(spec):
    columns, levels = spec.columns(), {level.name: level for level in spec.levels()}
    assert len({c.name for c in columns}) == len(columns) and columns[0].name == "sample_key"
    for c in columns:
        assert NAME.fullmatch(c.name) and c.dtype in STORAGE and c.width >= 1
        assert c.level == "record" or c.level in levels
    assert {c.level for c in columns} == {"record", *levels}
    for level in levels.values():
        assert level.parent == "record"
        assert level.count == (None if level.name == "token" or spec.rows == "ragged" else 1)
    # Every id has its bits, and no plane is wider than needed.
    if spec.kind == "topk":
        low = 8 * STORAGE[spec.id_dtype].itemsize
        needed = (spec.num_classes - 1).bit_length()
        assert low + spec.high_bits >= needed and (low == 8) == (spec.num_classes <= 256)
        assert spec.high_bits in (0, 1, 2, 4, 8, 16) and (
            spec.high_bits <= 1 or 16 + spec.high_bits // 2 < needed
        )


@FAST
@given(specs())
def test_shards_hold_every_record_once(spec):
    seen = []
    for i in range(spec.num_shards):
        at = spec.shard(i)
        assert at.shard == i and 0 < at.stop - at.start <= spec.records_per_shard
        records = [spec.record(at.view, s) for s in range(at.start, at.stop)]
        shard, index = spec.locate(np.array(records))
        assert (shard == i).all() and index.tolist() == list(range(len(records)))
        seen += records
    assert seen == list(range(spec.num_records))
    with pytest.raises(IndexError):
        spec.locate(np.array([spec.num_records]))
    with pytest.raises(IndexError):
        spec.shard(spec.num_shards)


REFUSED = [
    (dict(kind="topq"), "kind 'topq' is unknown .did you mean"),
    (dict(values="float64"), "values 'float64' is unknown"),
    (dict(rows="many"), "rows 'many' is unknown"),
    (dict(samples=(3, 3)), r"samples are \[3, 3\)"),
    (dict(samples=(-1, 3)), "samples are"),
    (dict(samples=(0, 2**48 + 1)), "samples are"),
    (dict(views=(2, 1)), "views are"),
    (dict(records_per_shard=0), "records_per_shard is 0; expected 1 to"),
    (dict(seed=2**53), "seed is"),
    (dict(labels=17), "labels is 17; expected 0 to 16"),
    (dict(num_classes=0), "num_classes is 0; expected 1 to 4294967296"),
    (dict(num_classes=2**32 + 1), "num_classes is"),
    (dict(tiers=()), "tiers are"),
    (dict(tiers=(5, 2)), "tiers are"),
    (dict(tiers=(2, 2)), "tiers are"),
    (dict(tiers=(0, 2)), "tiers are"),
    (dict(tiers=tuple(range(1, 10))), "expected 1 to 8 ascending"),
    (dict(tiers=(101,)), "k is 101; expected at most the number of classes, 100"),
    (dict(tiers=(2**20 + 1,), num_classes=2**21), r"expected at most 2\^20"),
    (dict(temperatures=()), "0 temperatures; expected 1 to 16"),
    (dict(temperatures=("2", "1")), "must ascend"),
    (dict(temperatures=("1", "1")), "must ascend"),
    (dict(temperatures=("1.50",)), "'1.50' must be spelled '1.5'"),
    (dict(temperatures=("0",)), "temperature '0'"),
    (dict(temperatures=("nan",)), "temperature 'nan'"),
    (dict(label_weights=True), "label_weights needs labels"),
    (dict(tokens=True), "tokens needs rows='ragged'"),
    (dict(features=(feature(), feature(recipe="pool"))), "feature names repeat"),
    (dict(features=(feature(level="row"),)), "level 'row' needs rows='ragged'"),
    (
        dict(features=(feature(), feature(name="f_scale"))),
        "two columns have the same name: feature_f_scale",
    ),
    (dict(kind="full"), "kind full keeps every logit"),
    (dict(kind="full", tiers=(), temperatures=(), num_classes=2**31), "num_classes is"),
    (dict(kind="none"), "kind none keeps no rows"),
    (dict(kind="none", num_classes=0, tiers=(), temperatures=()), "kind none without a feature"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_a_spec_that_cannot_be_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        topk(**change)


@pytest.mark.parametrize("kind", ["topp", "sampled", "hybrid", "given"])
def test_kinds_of_later_are_refused_by_name(kind):
    with pytest.raises(NotBuilt, match=f"kind '{kind}' is not built yet"):
        topk(kind=kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name="Body.0"), "feature name 'Body.0'"),
        (dict(name=""), "feature name ''"),
        (dict(name="a" * 65), "at most 64"),
        (dict(recipe="mean"), "recipe 'mean' is unknown"),
        (dict(dtype="float64"), "feature dtype 'float64'"),
        (dict(level="token"), "feature level 'token'"),
        (dict(shape=(3, 0)), r"shape \[3, 0\] is empty"),
        (dict(shape=(2**16, 2**15)), r"2\^31 elements or more"),
        (dict(shape=(1,) * 7), "shape"),
        (dict(shape=()), "int8 needs a last axis"),
    ],
)
def test_a_feature_that_cannot_be_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        feature(**change)


def test_gram_is_not_built():
    with pytest.raises(NotBuilt, match="gram"):
        feature(recipe="gram")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@FAST
@given(st.data())
def test_a_fuzzed_spec_is_a_spec_or_a_usage_error(data):
    document = topk(features=(feature(),)).to_json()
    key = data.draw(st.sampled_from([*sorted(document), "extra"]))
    document[key] = data.draw(json_values | st.just(document.get(key)))
    if data.draw(st.booleans()):
        del document[data.draw(st.sampled_from(sorted(document)))]
    try:
        spec = CacheSpec.from_json(document)
    except UsageError:
        return
    assert spec.to_json() == document


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tiers", [2, True]),
        ("tiers", "25"),
        ("samples", [0, 1, 2]),
        ("samples", [0.0, 4]),
        ("labels", True),
        ("moments", 1),
        ("seed", "1"),
        ("features", [3]),
        ("features", [{}]),
        ("temperatures", [1]),
    ],
)
def test_json_types_are_exact(key, value):
    with pytest.raises(UsageError, match=f"spec.{key}"):
        CacheSpec.from_json({**topk().to_json(), key: value})


@pytest.mark.parametrize("document", [None, 3, "x", [], {}, [["kind", "topk"]]])
def test_a_spec_is_an_object(document):
    with pytest.raises(UsageError, match="spec: found"):
        CacheSpec.from_json(document)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (2, "2"),
        (2.0, "2"),
        ("1.50", "1.5"),
        (0.000001, "0.000001"),
        (999.999999, "999.999999"),
        (10, "10"),
        ("100", "100"),
    ],
)
def test_a_temperature_has_one_name(value, name):
    assert temperature_name(value) == name and temperature_name(name) == name


@pytest.mark.parametrize(
    "value", [0, -1, 1000, float("nan"), float("inf"), "x", "", 1e-7, "1.0000001"]
)
def test_temperatures_that_cannot_be(value):
    with pytest.raises(UsageError, match="temperature"):
        temperature_name(value)


def test_spec_difference_names_fields():
    found = spec_difference(topk(), topk(tiers=(2,), seed=1))
    assert [str(d) for d in found] == [
        "spec.seed: cache has 0, given is 1",
        "spec.tiers: cache has [2, 5], given is [2]",
    ]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2, 1, 3], "offsets fall at parent 1"),
        ([1, 1, 2, 3], "run from"),
        ([0, 1, 2, 4], "run from 0 to 3"),
        ([0, 3], "offsets of 3 parents"),
    ],
)
def test_offsets_are_checked(offsets, message):
    check_offsets(np.array([0, 0, 2, 3]), 3, 3, "x")
    with pytest.raises(CacheCorrupt, match=message):
        check_offsets(np.array(offsets), 3, 3, "x")


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        topk().seed = 1
