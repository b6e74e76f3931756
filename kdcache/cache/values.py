"""Numbers as bits: value codecs, bfloat16 and id planes, each a pair of small functions.

Raw codecs (float32, bfloat16) hold logits; relative ones (float16, uint8) hold logit - max. -inf is
a legal value of each of them. Rounding is monotone everywhere, so a row that does not rise before
encoding does not rise after it. `CODECS` has all that the rest of the package knows of a codec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kdcache.cache.columns import Array

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


def add_high(ids: Array, plane: Array, high_bits: int) -> None:
    """Put the high bits of a plane uint8 [N, bytes] into ids [N, count], which are the low 16 and of
    any integer dtype that holds both. In place, without temporaries of that width.
    """
    if high_bits == 16:
        ids |= np.ascontiguousarray(plane, np.uint8).view("<u2").astype(np.uint32) << np.uint32(16)
        return
    per_byte = 8 // high_bits
    for j in range(min(per_byte, ids.shape[1])):
        part = ids[:, j::per_byte]
        byte = plane[:, : part.shape[1]] >> np.uint8(j * high_bits)
        part |= (byte & np.uint8((1 << high_bits) - 1)).astype(np.uint32) << np.uint32(16)


class StoredValues(NamedTuple):
    """Values [N, K] in storage dtype, and the row columns `max` and `step` float32 [N] where the
    codec has them.
    """

    values: Array
    max: Array | None = None
    step: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCodec:
    """How the logits of a row are stored, and what is known of the stored values.

    dtype: of the column, a key of `columns.STORAGE`. relative: values are logit - max, and the
    maximum is a column of its own. stepped: so is the size of a step. lossless: decoding gives the
    very logits. overflows: a finite logit may become an infinity.
    """

    dtype: str
    # logits float32 [N, K] without NaN or +inf, and their finite row maxima float32 [N]
    encode: Callable[[Array, Array], StoredValues]
    # stored [N, K], steps float32 [N] or None -> float32 [N, K]: logits, or logit - max if relative
    decode: Callable[[Array, Array | None], Array]
    # the bits of -inf
    minus_infinity: int
    # stored values as integers in the order of what they mean
    ascending: Callable[[Array], Array]
    # of bits [N, K]: whether the largest of a row is 0, its maximum from itself; relative codecs
    begins_at_zero: Callable[[Array], Array] | None = None
    stepped: bool = False
    lossless: bool = False
    overflows: bool = False
    # rounding to nearest moves a value by at most this part of its size, and this much in any case
    half_unit: float = 0.0
    least: float = 0.0

    @property
    def relative(self) -> bool:
        """Whether values are relative to the row's maximum, which is then a column."""
        return self.begins_at_zero is not None

    def rounding(self, relative: Array, size: Array, step_N: Array | None) -> Array:
        """The most that storing moved each value: float64 [N, K].

        relative: the decoded logits less their row's maximum; size: |logit|, both float64 [N, K],
        infinities allowed; step_N: of a stepped codec.
        """
        depth = np.where(np.isfinite(relative), np.abs(relative), 0)
        if step_N is not None:  # half a step, and what float32 rounds of code * step
            half = np.asarray(step_N, np.float64)[:, None] / 2
            moved: Array = half + depth * 2.0**-23 + self.least
        elif self.relative:
            moved = depth * self.half_unit + self.least
        else:  # of the logit and of the maximum that it is compared with
            finite = np.where(np.isfinite(size), size, 0)
            moved = (finite + finite.max(axis=1, keepdims=True)) * self.half_unit + 2 * self.least
        return moved

    def most(self, stored_N: Array) -> Array:
        """The largest logits float32 [N] from which these values of a raw codec may be rounded."""
        logits_N = self.decode(stored_N, None)
        if self.lossless:
            return logits_N
        with np.errstate(over="ignore", invalid="ignore"):
            above = logits_N + np.abs(logits_N) * np.float32(2 * self.half_unit)
            above = above + np.float32(2 * self.least)
        return np.where(np.isinf(logits_N), logits_N, above)


def value_codec(name: str) -> ValueCodec:
    """The codec of that name; ValueError for one that is not there: it is never read as another."""
    if name not in CODECS:
        raise ValueError(
            f"value codec {name!r} has no encoding here; expected one of {', '.join(CODECS)}"
        )
    return CODECS[name]


def _to_float16(logits: Array, max_N: Array) -> StoredValues:
    with np.errstate(over="ignore"):  # too far below the maximum is -inf
        return StoredValues((logits - max_N[:, None]).astype("<f2"), max_N)


def _to_uint8(logits: Array, max_N: Array) -> StoredValues:
    with np.errstate(over="ignore"):
        relative = logits - max_N[:, None]
    kept = relative >= FLOOR
    depth = np.where(kept, -relative, np.float32(0))
    step_N = (depth.max(axis=1) / np.float32(CODES)).astype(np.float32)
    # In float64 the quotient is exact to 1e-16: its rounding never adds to the half step. A step
    # that rounded down among the subnormals would give codes above 254.
    quotient = depth / np.where(step_N > 0, step_N, 1)[:, None].astype(np.float64)
    code = np.where(step_N[:, None] > 0, np.minimum(np.rint(quotient), CODES), 0)
    return StoredValues(np.where(kept, code, MINUS_INFINITY).astype(np.uint8), max_N, step_N)


def _from_uint8(stored: Array, step_N: Array | None) -> Array:
    if step_N is None:
        raise ValueError("uint8 values need their steps")
    with np.errstate(over="ignore"):
        depth = stored.astype(np.float32) * np.asarray(step_N, np.float32)[:, None]
    # 0 - 0 is +0.0
    out: Array = np.where(stored == MINUS_INFINITY, -np.inf, 0 - depth).astype(np.float32)
    return out


def _float_order(stored: Array) -> Array:
    """The bits of floats with the sign taken as that of an integer, which numpy compares faster."""
    bits: Array = stored.view(f"<i{stored.itemsize}")
    sign = bits >> np.array(8 * stored.itemsize - 1, bits.dtype)  # 0 or -1
    out: Array = ((bits & np.iinfo(bits.dtype).max) ^ sign) - sign
    return out


def _float16_begins_at_zero(bits: Array) -> Array:
    zero = ((bits << 1) & 0xFFFF == 0).any(axis=1)  # of either sign
    # as an integer, a positive number is positive
    out: Array = zero & (bits.view("<i2").max(axis=1) <= 0)
    return out


def _uint8_begins_at_zero(codes: Array) -> Array:
    out: Array = codes.min(axis=1) == 0
    return out


CODECS = {
    "float32": ValueCodec(
        dtype="float32",
        encode=lambda logits, max_N: StoredValues(np.ascontiguousarray(logits, "<f4")),
        decode=lambda stored, step_N: np.asarray(stored, np.float32),
        minus_infinity=0xFF800000,
        ascending=_float_order,
        lossless=True,
    ),
    "bfloat16": ValueCodec(
        dtype="bfloat16",
        encode=lambda logits, max_N: StoredValues(to_bfloat16(logits)),
        decode=lambda stored, step_N: from_bfloat16(stored),
        minus_infinity=0xFF80,
        ascending=_float_order,
        overflows=True,
        half_unit=2.0**-8,
        least=2.0**-134,  # half the smallest bfloat16
    ),
    "float16": ValueCodec(
        dtype="float16",
        encode=_to_float16,
        decode=lambda stored, step_N: np.asarray(stored).astype(np.float32),
        minus_infinity=0xFC00,
        ascending=_float_order,
        begins_at_zero=_float16_begins_at_zero,
        half_unit=2.0**-11,
        least=2.0**-25,  # half the smallest float16
    ),
    "uint8": ValueCodec(
        dtype="uint8",
        encode=_to_uint8,
        decode=_from_uint8,
        minus_infinity=MINUS_INFINITY,
        # codes count down from the maximum
        ascending=lambda stored: -stored.astype(np.int16),
        begins_at_zero=_uint8_begins_at_zero,
        stepped=True,
        # 254 codes of a step that float32 can only hold to half of its smallest, 2^-149
        least=2.0**-141,
    ),
}
