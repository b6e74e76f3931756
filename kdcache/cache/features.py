"""Cached activations <-> columns: float32, float16, bfloat16, or int8 with a float32 scale along
the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcache.cache.columns import Array, Columns
from kdcache.cache.rows import RowNames
from kdcache.cache.spec import FEATURE_DTYPES, FeatureSpec
from kdcache.cache.values import from_bfloat16, to_bfloat16
from kdcache.errors import UsageError

CODES = 127


def encode_feature(
    feature: FeatureSpec, activation: Array, *, first_record: int = 0, offsets: Array | None = None
) -> Columns:
    """Storage columns of activations float32 [N, *shape], one for each record, or row of a ragged
    level.

    `first_record` is the number of the first record, `offsets` int64 [records + 1] say whose row
    each row is; both only name a bad one. UsageError for another shape or dtype, DataError for NaN,
    an infinity, or a finite value that the feature's dtype cannot hold.
    """
    if activation.dtype != np.float32 or activation.shape[1:] != feature.shape:
        raise UsageError(
            f"feature {feature.name}: {activation.dtype} {list(activation.shape)} given; expected "
            f"float32 [N, {', '.join(map(str, feature.shape))}]"
        )

    names = RowNames(first_record, offsets)
    what = f"feature {feature.name} of module {feature.module!r}"
    names.require(np.isfinite(activation), f"{what} has a NaN or infinite activation")
    if feature.dtype == "float32":
        return {feature.column: np.ascontiguousarray(activation, "<f4")}
    if feature.dtype == "int8":
        codes, scales = _to_int8(activation)
        with np.errstate(over="ignore"):
            names.require(
                np.isfinite(scales * np.float32(CODES)),
                f"{what} has an activation too large for int8",
            )
        return {feature.column: codes, f"{feature.column}_scale": scales}
    if feature.dtype not in ("bfloat16", "float16"):
        raise _unknown(feature.dtype)
    with np.errstate(over="ignore"):
        stored = (
            to_bfloat16(activation) if feature.dtype == "bfloat16" else activation.astype("<f2")
        )
    back = from_bfloat16(stored) if feature.dtype == "bfloat16" else stored
    names.require(
        np.isfinite(back),
        f"{what} has an activation too large for {feature.dtype}; use float32 or int8",
    )
    return {feature.column: stored}


def _to_int8(x: Array) -> tuple[Array, Array]:
    scale = (np.abs(x).max(axis=-1) / np.float32(CODES)).astype(np.float32)
    quotient = x / np.where(scale > 0, scale, 1)[..., None].astype(np.float64)
    code = np.where(scale[..., None] > 0, np.clip(np.rint(quotient), -CODES, CODES), 0)
    return code.astype(np.int8), scale


def decode_feature(feature: FeatureSpec, columns: Mapping[str, Array]) -> Array:
    """float32 [N, *shape] of the columns of a feature. UsageError if one was not read."""
    for column in feature.columns():
        if column.name not in columns:
            raise UsageError(
                f"feature {feature.name} needs column {column.name!r}, which was not read"
            )
    stored = np.asarray(columns[feature.column])
    if feature.dtype == "bfloat16":
        return from_bfloat16(stored)
    if feature.dtype == "int8":
        scale = np.asarray(columns[f"{feature.column}_scale"], np.float32)
        with np.errstate(over="ignore"):
            out: Array = stored.astype(np.float32) * scale[..., None]
        return out
    if feature.dtype not in ("float16", "float32"):
        raise _unknown(feature.dtype)
    return stored.astype(np.float32, copy=False)


def _unknown(dtype: str) -> ValueError:
    """A dtype that the spec knows and these functions do not: never to be read as another one."""
    return ValueError(
        f"feature dtype {dtype!r} has no encoding here; expected one of {', '.join(FEATURE_DTYPES)}"
    )
