"""Identity: compared field by field."""

from __future__ import annotations

import pytest

from kdcache.cache.identity import Identity, difference, require_same, untold
from kdcache.errors import IdentityMismatch, UsageError, did_you_mean


def identity(**change):
    base = dict(
        data={
            "name": "digits",
            "num_samples": 10,
            "class_names": ["a", "b"],
            "probe": ["00", "11"],
        },
        teacher={"weights": "sha256-state-dict:00", "dtype": "float32"},
        tokenizer={"fingerprint": "ab"},
        activation="softmax",
    )
    return Identity(**{**base, **change})


def test_an_identity_survives_its_json():
    for one in (identity(), identity(tokenizer=None, activation="sigmoid")):
        assert Identity.from_json(one.to_json()) == one and difference(one, one) == []


def test_differences_are_named_field_by_field():
    other = identity(
        data={**identity().data, "num_samples": 11, "class_names": ["b", "a"], "probe": ["00"]},
        tokenizer=None,
        teacher={**identity().teacher, "adapters": "lora"},
    )
    assert [d.field for d in difference(identity(), other)] == [
        "data.class_names",
        "data.num_samples",
        "data.probe",
        "tokenizer",
        "teacher.adapters",
    ]
    said = {d.field: str(d) for d in difference(identity(), other)}
    assert said["data.class_names"].endswith(
        "cache has \"'a' at 0\", given is \"'b' there; 2 of 2 differ\""
    )
    assert said["data.probe"].endswith("cache has '2 entries', given is '1 entries'")


@pytest.mark.parametrize(
    ("part", "field", "one", "other"),
    [
        ("teacher", "class_names", ["cat", "dog"], ["dog", "cat"]),
        ("teacher", "tokenizer", "ab", "cd"),
        ("data", "preprocessing", "resize 224", "resize 256"),
    ],
)
def test_what_only_some_say_differs_where_both_say_it(part, field, one, other):
    """Names of classes, say, are compared with those of another, and with nothing where one has
    none.
    """
    a, b, silent = (
        identity(**{part: {**getattr(identity(), part), **more}})
        for more in ({field: one}, {field: other}, {})
    )
    assert {d.field.split(".")[1] for d in difference(a, b)} == {field}
    assert difference(a, silent) == difference(silent, b) == difference(a, a) == []


def test_what_a_cache_was_made_too_early_to_say_does_not_differ():
    later = identity(
        data={**identity().data, "inputs": ["input_ids"]},
        teacher={**identity().teacher, "config": {}},
    )
    assert difference(identity(), later) == [] and untold(identity(), later) == [
        "data.inputs",
        "teacher.config",
    ]
    assert untold(later, later) == [] and [d.field for d in difference(later, identity())] == [
        "data.inputs",
        "teacher.config",
    ]


def test_an_accepted_field_is_not_all_that_begin_like_it():
    one, other = (
        {**identity().teacher, "config": {"rope": a, "rope_theta": b}}
        for a, b in ((1, 500), (2, 10000))
    )
    with pytest.raises(IdentityMismatch, match=r"teacher\.config\.rope_theta") as caught:
        require_same(identity(teacher=one), identity(teacher=other), accept=["teacher.config.rope"])
    assert [d.field for d in caught.value.fields] == ["teacher.config.rope_theta"]


def test_what_is_accepted_is_returned_and_the_rest_refused():
    other = identity(data={**identity().data, "name": "mnist", "num_samples": 11})
    with pytest.raises(
        IdentityMismatch, match=r"data.name: cache has 'digits', given is 'mnist'\n.*--acc"
    ) as caught:
        require_same(identity(), other, accept=["data.num_samples"], where="here")
    assert [d.field for d in caught.value.fields] == ["data.name"]
    both = ["data.name", "data.num_samples"]
    assert (
        require_same(identity(), other, accept=both)
        == both
        == require_same(identity(), other, accept=["data"])
    )
    assert require_same(identity(), other, parts=["teacher"]) == []
    with pytest.raises(UsageError, match=r"--accept data.nam: .*did you mean 'data.name'"):
        require_same(identity(), other, accept=["data.nam"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data=None), "identity.data: expected an object"),
        (dict(teacher=[]), "identity.teacher: expected an object"),
        (dict(tokenizer="x"), "identity.tokenizer: expected an object or null"),
        (dict(activation="relu"), "identity.activation is 'relu'"),
        (dict(data={"x": 0.5}), "identity: float 0.5 has no canonical form"),
    ],
)
def test_an_identity_that_cannot_be_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        identity(**change)


@pytest.mark.parametrize(
    "document", [None, [], {}, {"data": {}}, {**identity().to_json(), "more": 1}]
)
def test_an_identity_has_exactly_its_keys(document):
    with pytest.raises(UsageError, match="identity: expected an object with the keys"):
        Identity.from_json(document)


def test_near_names():
    assert did_you_mean("digts", ["digits", "text"]) == " (did you mean 'digits'?)"
    assert (
        did_you_mean("zzz", ["digits", "text"]) == " (known: digits, text)"
        and did_you_mean("x", []) == ""
    )


def test_only_a_field_that_differs_alone_may_be_harmless():
    def said(**changes):
        with pytest.raises(IdentityMismatch) as caught:
            require_same(identity(), identity(**changes))
        return str(caught.value)

    data = identity().data
    assert said(data={**data, "name": "other"}).endswith("harmless: --accept data.name")
    assert "--accept" not in said(data={**data, "name": "other", "num_samples": 7})
    assert "--accept" not in said(data={**data, "probe": ["0" * 16]})
