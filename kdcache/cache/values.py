"""Numbers as bits: value codecs, bfloat16 and id planes, each a pair of small functions.

Raw codecs (float32, bfloat16) hold logits; relative ones (float16, uint8) hold logit - max. -inf is
a legal value of each of them. Rounding is monotone everywhere, so a row that does not rise before
encoding does not rise after it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kdcache.cache.columns import Array
from kdcache.cache.spec import RELATIVE_VALUES, VALUES

# uint8 keeps [max - 120, max]: exp(-120) is 1e-52, below float32's least exp
FLOOR = np.float32(-120)
CODES = 254  # highest uint8 code of a finite value
MINUS_INFINITY = 255  # its uint8 code


def to_bfloat16(x: Array) -> Array:
    """float32 without NaN -> bfloat16 bits (uint16), nearest, ties to even; too large a size
    becomes an infinity.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    out: Array = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(
        16
    )
    return out.astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """bfloat16 bits (uint16) -> float32, exact."""
    out: Array = (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return out


def pack_high(ids: Array, high_bits: int) -> Array:
    """The bits of ids [N, K] above the low 16 as a plane uint8 [N, ceil(K * high_bits / 8)].

    Entry j has bits [j * high_bits, (j + 1) * high_bits) of its row, least significant first in
    each byte and each entry; the bits after the last entry are 0.
    """
    high = np.asarray(ids, np.int64) >> 16
    if high_bits == 16:
        pairs: Array = np.ascontiguousarray(high.astype("<u2")).view(np.uint8)
        return pairs
    per_byte = 8 // high_bits
    high = np.pad(high, ((0, 0), (0, -high.shape[1] % per_byte))).astype(np.uint8)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(high_bits)
    out: Array = np.bitwise_or.reduce(
        high.reshape(len(high), high.shape[1] // per_byte, per_byte) << shifts, axis=-1
    )
    return out


def unpack_high(plane: Array, high_bits: int, count: int) -> Array:
    """The high parts int64 [N, count] of a plane uint8 [N, bytes]: ids are low + (high << 16)."""
    plane = np.ascontiguousarray(plane, np.uint8)
    if high_bits == 16:
        whole: Array = plane.view("<u2").astype(np.int64)
        return whole
    per_byte = 8 // high_bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(high_bits)
    high = (plane[:, :, None] >> shifts) & np.uint8((1 << high_bits) - 1)
    out: Array = high.reshape(len(plane), plane.shape[1] * per_byte)[:, :count].astype(np.int64)
    return out


class StoredValues(NamedTuple):
    """Values [N, K] in storage dtype, and the row columns `max` and `step` float32 [N] where the
    codec has them.
    """

    values: Array
    max: Array | None = None
    step: Array | None = None


def encode_values(codec: str, logits: Array, max_N: Array) -> StoredValues:
    """Logits float32 [N, K] without NaN or +inf, and their finite row maxima float32 [N], as stored
    values.
    """
    if codec == "float32":
        return StoredValues(np.ascontiguousarray(logits, "<f4"))
    if codec == "bfloat16":
        return StoredValues(to_bfloat16(logits))
    with np.errstate(over="ignore"):  # too far below the maximum is -inf
        relative = logits - max_N[:, None]
        if codec == "float16":
            return StoredValues(relative.astype("<f2"), max_N)
    if codec == "uint8":
        return StoredValues(*_to_uint8(relative, max_N))
    raise _unknown(codec)


def _unknown(codec: str) -> ValueError:
    """A codec that the spec knows and these functions do not: never to be read as another one."""
    return ValueError(
        f"value codec {codec!r} has no encoding here; expected one of {', '.join(VALUES)}"
    )


def _to_uint8(relative: Array, max_N: Array) -> tuple[Array, Array, Array]:
    kept = relative >= FLOOR
    depth = np.where(kept, -relative, np.float32(0))
    step_N = (depth.max(axis=1) / np.float32(CODES)).astype(np.float32)
    # In float64 the quotient is exact to 1e-16: its rounding never adds to the half step. A step
    # that rounded down among the subnormals would give codes above 254.
    quotient = depth / np.where(step_N > 0, step_N, 1)[:, None].astype(np.float64)
    code = np.where(step_N[:, None] > 0, np.minimum(np.rint(quotient), CODES), 0)
    return np.where(kept, code, MINUS_INFINITY).astype(np.uint8), max_N, step_N


def decode_values(codec: str, stored: Array, max_N: Array | None, step_N: Array | None) -> Array:
    """float32 [N, K]: logits of a raw codec, logit - max of a relative one."""
    if codec == "float32":
        return np.asarray(stored, np.float32)
    if codec == "bfloat16":
        return from_bfloat16(stored)
    if codec == "float16":
        return np.asarray(stored).astype(np.float32)
    if codec != "uint8":
        raise _unknown(codec)
    if step_N is None:
        raise ValueError("uint8 values need their steps")
    with np.errstate(over="ignore"):
        depth = stored.astype(np.float32) * np.asarray(step_N, np.float32)[:, None]
    # 0 - 0 is +0.0
    out: Array = np.where(stored == MINUS_INFINITY, -np.inf, 0 - depth).astype(np.float32)
    return out


def is_relative(codec: str) -> bool:
    """Whether a codec's values are relative to the row's maximum, which is then a column."""
    return codec in RELATIVE_VALUES
