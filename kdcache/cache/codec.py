"""Rows <-> the row columns of a cache: the order of a support, id planes, value codecs, tails and
labels.

The bits are fixed by docs/format.md; what a lossy codec leaves is the teacher from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from kdcache.cache.columns import STORAGE, Array, Columns
from kdcache.cache.measure import log_sum_exp, measure
from kdcache.cache.rows import RowNames, Rows, check_rows, labels_outside, tail_with_labels
from kdcache.cache.spec import CacheSpec
from kdcache.cache.values import add_high, pack_high
from kdcache.errors import UsageError


@dataclass(frozen=True, slots=True)
class Encoded:
    """Row columns in storage dtype by name, and what encoding and truncation cost (see `measure`)."""

    columns: Columns
    measured: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRows:
    """N rows of one tier, or of a full cache.

    ids int64 [N, K], None where all V are there in id order. logits float32 [N, K]: raw for float32
    and bfloat16, max + value otherwise. relative float32 [N, K] = logit - max, exact for float16
    and uint8. max float32 [N]. tail_lse float32 [N, T] of everything outside the support, labels
    included; None for kind full. The others as in `Rows`, None where the spec has no such column or
    it was not read.
    """

    ids: Array | None
    logits: Array
    relative: Array
    max: Array
    tail_lse: Array | None
    label: Array | None = None
    label_weight: Array | None = None
    label_logit: Array | None = None
    mean: Array | None = None
    std: Array | None = None
    weight: Array | None = None
    pos: Array | None = None


def encode_rows(
    spec: CacheSpec, rows: Rows, *, first_record: int = 0, offsets: Array | None = None
) -> Encoded:
    """The row columns of `rows`, and sums that say what the encoding lost.

    `first_record` is the number of the first record, `offsets` int64 [records + 1] say whose row
    each row is where rows are ragged; both only name a row in an error. UsageError for a wrong
    dtype or shape, DataError naming the row for content the format has no place for: NaN, +inf, a
    row of -inf, ids or labels out of range or in disorder.
    """
    names = RowNames(first_record, offsets)
    check_rows(spec, rows, names)
    columns: Columns = {}
    measured: dict[str, float] = {}
    if rows.logits is not None:
        columns |= _encode_values(spec, rows, names)
    if rows.label is not None and rows.label_logit is not None:
        columns["label_logit"] = np.where(rows.label >= 0, rows.label_logit, np.float32(-np.inf))
    for field in ("label", "label_weight", "mean", "std", "weight", "pos"):
        if getattr(rows, field) is not None:
            columns[field] = getattr(rows, field)
    stored = {
        c.name: np.ascontiguousarray(columns[c.name], STORAGE[c.dtype])
        for c in spec.columns()
        if c.name in columns
    }
    if rows.logits is not None:
        decoded = decode_rows(spec, stored)
        measured = measure(spec, rows, decoded.relative, decoded.tail_lse)
    return Encoded(stored, measured)


def _encode_values(spec: CacheSpec, rows: Rows, names: RowNames) -> Columns:
    assert rows.logits is not None
    logits = rows.logits
    max_N = logits.max(axis=1)
    codec = spec.codec
    stored = codec.encode(logits, max_N)
    decoded = codec.decode(stored.values, stored.step)
    if codec.overflows:
        names.require(
            decoded != np.inf, f"a logit is too large for {spec.values}; use float32 values"
        )
        names.require(
            decoded.max(axis=1, initial=-np.inf) != -np.inf, f"every logit is -inf in {spec.values}"
        )
    columns: Columns = {}
    if stored.max is not None:
        columns["max"] = stored.max
    if stored.step is not None:
        columns["step"] = stored.step
    columns |= ENTRIES[spec.kind].encode(spec, rows, stored.values)
    if spec.is_sparse:
        base_N = max_N if codec.relative else decoded[:, 0]
        columns["tail_lse"] = _encode_tail(spec, rows, decoded, base_N)
    return columns


def _encode_tail(spec: CacheSpec, rows: Rows, decoded: Array, base_N: Array) -> Array:
    """tail_lse float32 relative to `base_N`, the decoded maximum, with the mass of entries that
    became -inf.
    """
    assert rows.logits is not None and rows.tail_lse is not None
    logits, base_N1 = rows.logits, base_N.astype(np.float64)[:, None]
    # not 0 only where bfloat16 rounded the maximum
    shift_N1 = logits[:, :1] - base_N1
    dropped = (decoded == -np.inf) & (logits != -np.inf)
    some = np.flatnonzero(dropped.any(axis=1))
    out: Array = rows.tail_lse.astype(np.float64)
    with np.errstate(over="ignore", divide="ignore"):
        relative = np.where(dropped[some], logits[some] - base_N1[some], -np.inf)
        for i, temperature in enumerate(map(float, spec.temperatures)):
            out[:, :, i] += shift_N1 / temperature
            for tier, k in enumerate(spec.tiers):
                out[some, tier, i] = np.logaddexp(
                    out[some, tier, i], log_sum_exp(relative[:, :k] / temperature)
                )
        return out.astype(np.float32)


def decode_rows(spec: CacheSpec, columns: Mapping[str, Array], k: int | None = None) -> DecodedRows:
    """Rows of the row columns [N, *shape] of a cache: of tier `k`, the largest one if None.

    UsageError for a k that is no tier, or where a column that is needed was not read.
    """
    k = check_tier(spec, k)

    def need(name: str) -> Array:
        if name not in columns:
            raise UsageError(f"column {name!r} is needed to decode rows, and was not read")
        return np.asarray(columns[name])

    tiers = [t for t in spec.tiers if t <= k]
    stored = ENTRIES[spec.kind].stored(spec, need, k)
    step_N = need("step") if spec.codec.stepped else None
    if spec.codec.relative:
        max_N = need("max").astype(np.float32, copy=False)
        relative = spec.codec.decode(stored, step_N)
        with np.errstate(over="ignore"):
            logits = max_N[:, None] + relative
    else:
        logits = spec.codec.decode(stored, step_N)
        max_N = logits[:, 0] if tiers else logits.max(axis=1)
        with np.errstate(over="ignore"):
            relative = logits - max_N[:, None]
    extra = {
        name: np.asarray(columns[name])
        for name in ("label", "label_weight", "label_logit", "mean", "std", "weight", "pos")
        if name in columns
    }
    for name in {"label", "pos"} & set(extra):
        extra[name] = extra[name].astype(np.int64)
    if not tiers:
        return DecodedRows(
            ids=None, logits=logits, relative=relative, max=max_N, tail_lse=None, **extra
        )
    ids = _decode_ids(spec, need, tiers)
    tail = need("tail_lse")[:, len(tiers) - 1].astype(np.float32, copy=False)
    if spec.labels:
        outside = labels_outside(ids, need("label").astype(np.int64))
        if outside.any():
            relative_label = (
                need("label_logit").astype(np.float64) - max_N.astype(np.float64)[:, None]
            )
            with np.errstate(over="ignore"):
                tail = tail_with_labels(tail, relative_label, outside, spec.temperatures).astype(
                    np.float32
                )
    return DecodedRows(ids=ids, logits=logits, relative=relative, max=max_N, tail_lse=tail, **extra)


@dataclass(frozen=True, slots=True)
class Entries:
    """How the entries of a row of one kind lie in its columns (`CacheSpec` says which these are).

    encode: stored values [N, K] and the rows they are of -> columns. stored: columns, by a function
    that gives one by its name -> stored values [N, k] of tier k.
    """

    encode: Callable[[CacheSpec, Rows, Array], Columns]
    stored: Callable[[CacheSpec, Callable[[str], Array], int], Array]


def _encode_tiers(spec: CacheSpec, rows: Rows, values: Array) -> Columns:
    columns: Columns = {}
    assert rows.ids is not None
    for k in spec.tiers:
        tier = slice(*spec.tier_range(k))
        ids = rows.ids[:, tier].astype(np.int64)
        columns[f"ids_{k}"] = ids & 0xFFFF
        if spec.high_bits:
            columns[f"ids_{k}_high"] = pack_high(ids, spec.high_bits)
        columns[f"values_{k}"] = values[:, tier]
    return columns


def _stored_tiers(spec: CacheSpec, need: Callable[[str], Array], k: int) -> Array:
    parts = [need(f"values_{tier}") for tier in spec.tiers if tier <= k]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


ENTRIES = {
    "full": Entries(
        lambda spec, rows, values: {"values": values}, lambda spec, need, k: need("values")
    ),
    "topk": Entries(_encode_tiers, _stored_tiers),
}


def _decode_ids(spec: CacheSpec, need: Callable[[str], Array], tiers: list[int]) -> Array:
    parts = []
    for k in tiers:
        part = need(f"ids_{k}").astype(np.int64)
        if spec.high_bits:
            add_high(part, need(f"ids_{k}_high"), spec.high_bits)
        parts.append(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def check_tier(spec: CacheSpec, k: int | None) -> int:
    """`k`, or the largest tier (V of a full cache) if None; UsageError if it is none of the tiers."""
    if not spec.has_rows:
        raise UsageError("this cache keeps no rows, only features")
    if k is not None and k not in (spec.tiers or (spec.num_classes,)):
        held = (
            f"the tiers {', '.join(map(str, spec.tiers))}"
            if spec.tiers
            else f"all {spec.num_classes} classes"
        )
        raise UsageError(f"k is {k}; this cache keeps {held}: k must be one of them")
    return spec.k if k is None else k


def row_columns(spec: CacheSpec, k: int | None = None) -> list[str]:
    """Names of the columns that `decode_rows` reads for tier `k`, in the order of the file."""
    k = check_tier(spec, k)
    other = {
        name for t in spec.tiers if t > k for name in (f"ids_{t}", f"ids_{t}_high", f"values_{t}")
    }
    return [
        c.name
        for c in spec.columns()
        if c.level == "row" and c.name not in other and not c.name.startswith("feature_")
    ]
