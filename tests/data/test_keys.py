"""Keys against a second computation from the written byte layout, against golden values, and
against each other.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.data.keys import arrays_of, given_key, sample_key
from kdcache.errors import DataError


def written(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """One array as the docstring of kdcache/data/keys.py lays it out, written a second time."""
    out = struct.pack("<I", len(name.encode())) + name.encode()
    out += struct.pack("<I", len(dtype)) + dtype.encode()
    out += struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
    return out + data


def test_the_written_layout():
    x = np.arange(6, dtype=np.float32).reshape(2, 3) / 4
    data = written("input", "float32", (2, 3), struct.pack("<6f", *x.reshape(-1))) + written(
        "label", "int64", (), struct.pack("<q", 7)
    )
    assert sample_key(arrays_of((x, 7))) == xxhash.xxh3_64_intdigest(data)


# Made with `written` and xxhash, not with the code under test.
GOLDEN = [
    ((np.arange(6, dtype=np.float32).reshape(2, 3) / 4, 7), "b6ba4dfd4a3574bf"),
    ((np.zeros((0, 3), np.float16), None), "b8281370da90c60e"),
    ({"input_ids": [1, 2, 3], "labels": 0}, "d474d9c1a03fd4b7"),
    ({"text": "ä", "flag": True, "weight": 0.5}, "dfaa4255547d2546"),
    ({"big": np.uint64(2**64 - 1)}, "bd3cefd5a9267856"),
]


@pytest.mark.parametrize(("item", "key"), GOLDEN, ids=range(len(GOLDEN)))
def test_golden(item, key):
    assert f"{sample_key(arrays_of(item)):016x}" == key


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.int8, np.uint8, np.int32, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3),
    )
)
def test_integers_have_one_key_whatever_holds_them(array):
    wide = sample_key({"input": array.astype(np.int64)})
    assert sample_key({"input": array}) == wide
    assert sample_key({"input": torch.from_numpy(array)}) == wide
    # [] is a float array for numpy
    assert sample_key({"input": array.tolist()}) == wide or array.size == 0


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64]), hnp.array_shapes(max_dims=3)),
    st.data(),
)
def test_every_bit_counts(array, data):
    key = sample_key({"input": array})
    changed = array.copy()
    raw = changed.reshape(-1).view(np.uint8)
    raw[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert sample_key({"input": changed}) != key
    assert sample_key({"inputs": array}) != key
    assert sample_key({"input": array[None]}) != key


def test_layout_in_memory_does_not_count():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    key = sample_key({"a": array, "b": 1})
    assert sample_key({"b": 1, "a": np.asfortranarray(array)}) == key
    assert sample_key({"a": array.astype(">f4"), "b": np.array(1, ">i2")}) == key
    assert sample_key({"a": torch.from_numpy(array.T.copy()).T, "b": torch.tensor(1)}) == key


def test_bfloat16_is_its_sixteen_bits():
    tensor = torch.tensor([1.0, -2.5], dtype=torch.bfloat16)
    data = written("input", "bfloat16", (2,), struct.pack("<2H", 0x3F80, 0xC020))
    assert sample_key({"input": tensor}) == xxhash.xxh3_64_intdigest(data)
    assert sample_key({"input": tensor[0]}) == xxhash.xxh3_64_intdigest(
        written("input", "bfloat16", (), struct.pack("<H", 0x3F80))
    )


def test_images_and_text_are_their_bytes():
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert sample_key({"input": image.fromarray(pixels)}) == sample_key({"input": pixels})
    assert (
        sample_key({"input": "ä"})
        == sample_key({"input": b"\xc3\xa4"})
        == sample_key({"input": [0xC3, 0xA4]})
    )
    red, blue = image.new("P", (2, 2)), image.new("P", (2, 2))
    red.putpalette([255, 0, 0] * 256)
    blue.putpalette([0, 0, 255] * 256)
    # same indices, other pictures
    assert sample_key({"input": red}) != sample_key({"input": blue})


@pytest.mark.parametrize("item", [5, "text", (1, 2, 3), [1], {1: 2}])
def test_other_items_are_refused(item):
    with pytest.raises(DataError, match="expected"):
        arrays_of(item)


@pytest.mark.parametrize(
    "value",
    [object(), [1, [2, 3]], 1j, 2**70, ["a"], np.array([1], "M8[s]")],
    ids=["object", "ragged", "complex", "beyond int64", "text", "time"],
)
def test_values_without_bytes_are_refused_by_name(value):
    with pytest.raises(DataError, match="'field' is a"):
        sample_key({"field": value})


def test_a_datasets_own_key():
    assert given_key(0, "d") == 0
    assert given_key(np.uint64(2**64 - 1), "d") == 2**64 - 1
    assert given_key("00000000000000fF", "d") == 255
    for bad in (-1, 2**64, "ff", "0x000000000000ff", "00000000000000fg", 1.0, None, True):
        with pytest.raises(DataError, match=r"data 3: key\(\) gave"):
            given_key(bad, "data 3")
