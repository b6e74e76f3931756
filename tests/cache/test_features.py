"""The codec of cached activations: bounds of its rounding, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_definitions import FAST, feature

from kdcache.cache.features import decode_feature, encode_feature
from kdcache.errors import DataError, UsageError


@FAST
@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=6, max_size=6))
def test_int8_features_are_within_half_a_scale(values):
    x = np.array(values, np.float32).reshape(1, 2, 3)
    columns = encode_feature(feature("int8", (2, 3)), x)
    scale = columns["feature_f_scale"]
    assert np.array_equal(scale, np.abs(x).max(-1) / np.float32(127)) and scale.shape == (1, 2)
    found = decode_feature(feature("int8", (2, 3)), columns)
    wide = scale.astype(float)[..., None]
    # below, deepest / 127 itself has lost bits
    inside = np.broadcast_to(wide >= 2.0**-126, x.shape)
    assert (np.abs(found - x.astype(float)) <= wide * (0.5 + 127 * 2.0**-23))[inside].all()
    assert np.abs(columns["feature_f"].astype(int)).max() <= 127


def test_int8_refuses_what_would_decode_to_infinity():
    with pytest.raises(DataError, match="too large for int8"):
        encode_feature(feature("int8", (1,)), np.array([[3.4028235e38]], np.float32))


def test_int8_zero_vector():
    columns = encode_feature(feature("int8", (3,)), np.zeros((2, 3), np.float32))
    assert columns["feature_f_scale"].tolist() == [0, 0] and not columns["feature_f"].any()


@pytest.mark.parametrize(
    ("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895313892515355e38)]
)
def test_features_hold_what_fits_and_refuse_what_does_not(dtype, largest):
    x = np.array([[1.5, -largest], [0.0, largest]], np.float32)
    assert np.array_equal(
        decode_feature(feature(dtype, (2,)), encode_feature(feature(dtype, (2,)), x)), x
    )
    x[1, 0] = np.float32(largest) * np.float32(1.0039)
    with pytest.raises(
        DataError, match=f"record 8: feature f of module 'body.3' .* too large for {dtype}"
    ):
        encode_feature(feature(dtype, (2,)), x, first_record=7)


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_refuse_nan_and_infinity(dtype, bad):
    with pytest.raises(DataError, match=r"record 1, row 0: feature f .*NaN or infinite"):
        encode_feature(
            feature(dtype, (1,)), np.array([[0], [bad]], np.float32), offsets=np.array([0, 1, 2])
        )


def test_feature_shapes_and_columns_are_checked():
    assert decode_feature(
        feature("float32", ()), encode_feature(feature("float32", ()), np.ones(2, np.float32))
    ).sum()
    with pytest.raises(UsageError, match=r"float32 \[2, 4\] given; expected float32 \[N, 3\]"):
        encode_feature(feature("int8", (3,)), np.zeros((2, 4), np.float32))
    with pytest.raises(UsageError, match="'feature_f_scale', which was not read"):
        decode_feature(feature("int8", (3,)), {"feature_f": np.zeros((2, 3), np.int8)})
