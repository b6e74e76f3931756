"""Canonical JSON: one form of bytes, any other refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import canonical
from kdcache.errors import CacheCorrupt

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
plain_documents = st.dictionaries(st.text("abcdefgh_", max_size=5), plain_values, max_size=5)

FAST = settings(max_examples=100, deadline=None)


@FAST
@given(plain_documents)
def test_a_document_survives_and_has_one_form(document):
    data = canonical.seal(document)
    assert canonical.unseal(data, "x") == document
    body = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    digest = xxhash.xxh3_128_hexdigest(body)
    glue = b"," if document else b""
    assert data == body[:-1] + glue + b'"xxh3_128":"' + digest.encode() + b'"}\n'


@FAST
@given(plain_documents, st.data())
def test_any_flipped_bit_is_found(document, data):
    sealed = bytearray(canonical.seal(document))
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CacheCorrupt, match=r"^here: "):
        canonical.unseal(bytes(sealed), "here")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_other_bytes_are_refused_by_our_error(data):
    with pytest.raises(CacheCorrupt):
        canonical.unseal(data, "x")


def resealed(body):
    """A file with the right digest over a body in a form of its own."""
    body = body.encode()
    return body[:-1] + b',"xxh3_128":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"}\n'


@pytest.mark.parametrize(
    "body",
    [
        '{"b":1,"a":2}',
        '{"a": 1}',
        '{"a":1.0}',
        '{"a":1e3}',
        '{"a":-0}',
        '{"a":01}',
        '{"a":"é"}',
        '{"a":"\\u0041"}',
        '{"a":"\\/"}',
        '{"a":1,"a":1}',
        '{"a":{"b":1,"b":2}}',
        f'{{"a":{2**53}}}',
        '{"a":NaN}',
        '{"a":"\\u00E9"}',
        '{"a":' + "[" * 20 + "]" * 20 + "}",
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a":' + "9" * 5000 + "}",
    ],
)
def test_other_forms_are_refused(body):
    assert canonical.unseal(resealed('{"a":1}'), "x") == {"a": 1}
    with pytest.raises(CacheCorrupt):
        canonical.unseal(resealed(body), "x")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[:-1],
        lambda d: d + b"\n",
        lambda d: b" " + d,
        lambda d: b"\xef\xbb\xbf" + d,
        lambda d: b"[" + d + b"]",
        lambda d: b"",
    ],
)
def test_other_frames_are_refused(change):
    with pytest.raises(CacheCorrupt):
        canonical.unseal(change(canonical.seal({"a": 1})), "x")


@pytest.mark.parametrize(
    "value", [1.0, {1: 2}, 2**53, -(2**53), b"x", {"a": np.int64(1)}, float("nan"), {1, 2}]
)
def test_values_without_a_canonical_form(value):
    with pytest.raises(ValueError):
        canonical.dumps({"a": value})


def test_keys_after_the_digest_are_refused():
    with pytest.raises(ValueError, match="must sort before"):
        canonical.seal({"y": 1})
