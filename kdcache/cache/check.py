"""What columns must satisfy beyond their bytes being intact: at the writer's door, and on a
reader's first touch.

After these checks no id, label or scale in a batch can lead out of bounds or to a silent NaN,
whoever wrote the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kdcache.cache.columns import MAX_ELEMENTS, STORAGE, Array, Column, Columns, check_offsets
from kdcache.cache.rawmap import level_rows
from kdcache.cache.spec import CacheSpec
from kdcache.cache.values import add_high
from kdcache.errors import CacheCorrupt, DataError, UsageError, did_you_mean

CHUNK_ELEMENTS = 2**19  # ids looked at together: a few MiB of temporaries
Get = Callable[[str], Array]  # a column of the shard by name, its bytes already proven
# Bits of +inf: a pattern at or above, as a signed integer, is +inf or NaN; above the same with the
# sign bit, as an unsigned integer, is a negative NaN (at it: -inf).
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
FINITE = ("max", "step", "mean", "std", "weight", "label_weight")
NOT_NEGATIVE = ("step", "std", "weight", "label_weight")
MOST_WEIGHT = 2.0**64  # the sum over a shard, of at most 2^31, is then finite in float32
WEIGHTS = ("weight", "label_weight")
# of int8: the largest code times it is finite
MOST_SCALE = float(np.finfo(np.float32).max) / 127


def prepare(
    spec: CacheSpec, records: int, columns: Mapping[str, Array]
) -> tuple[Columns, dict[str, int]]:
    """Contiguous columns in the order of the spec, and the rows of each level.

    UsageError naming the column for a missing or unknown one, another dtype or shape, or 2^31
    elements and more; DataError for offsets that do not run from 0 to the number of rows.
    """
    known = spec.layout
    names = known.names
    valid = set(names)
    for name in (*columns, *names):
        if name not in columns:
            raise UsageError(f"column {name} is missing; this spec needs {', '.join(names)}")
        if name not in valid:
            raise UsageError(f"column {name} is not of this spec{did_you_mean(name, names)}")
    rows = {}
    counts = {"record": records}
    for level in known.levels.values():
        above = counts[level.parent]
        if level.count is not None:
            counts[level.name] = above * level.count
        else:
            offsets = _typed(level.offsets, columns[level.offsets], np.dtype("<i8"), (above + 1,))
            try:
                check_offsets(offsets, above, int(offsets[-1]), f"column {level.offsets}")
            except CacheCorrupt as e:
                raise DataError(str(e)) from e
            counts[level.name] = int(offsets[-1])
        rows[level.name] = counts[level.name]
    out = {key: np.ascontiguousarray(columns[key]) for key in known.offsets}
    for column in known.columns.values():
        array = _typed(
            column.name, columns[column.name], column.storage, (counts[column.level], *column.shape)
        )
        if array.size >= MAX_ELEMENTS:
            raise UsageError(
                f"column {column.name} has {array.size} elements; a shard holds fewer than 2^31: "
                "take a smaller records_per_shard"
            )
        out[column.name] = np.ascontiguousarray(array)
    return out, rows


def _typed(name: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        found = (
            f"{array.dtype} {list(array.shape)}"
            if isinstance(array, np.ndarray)
            else type(array).__name__
        )
        raise UsageError(f"column {name}: {found} given, expected {dtype} {list(shape)}")
    return array


def problem(
    spec: CacheSpec, records: int, rows: Mapping[str, int], name: str, get: Get
) -> str | None:
    """What is wrong with column `name`, None if nothing is. `get` gives it, and others of its shard
    it is judged by.
    """
    counts = level_rows(spec, records, rows)
    level = spec.layout.offsets.get(name)
    if level is not None:
        # outside: what is wrong with the file is said by who reads it
        offsets = get(name)
        try:
            check_offsets(offsets, counts[level.parent], counts[level.name], f"column {name}")
        except CacheCorrupt as e:
            return str(e)
        return None
    column = spec.layout.columns[name]
    if not counts[column.level]:
        return None
    if name.startswith("ids_") and column.level == "row":
        return _bad_ids(spec, tier_of(name), get)
    if name.startswith("values_") and column.level == "row":
        return _bad_values(spec, column, get(name)) or _rising(spec, column, get)
    if name == "label_logit":
        return _bad_values(spec, column, get(name)) or _above_the_maximum(spec, get)
    return _bad_values(spec, column, get(name), spec.layout.scales)


def judged_with(spec: CacheSpec, name: str) -> list[str]:
    """The columns that `problem` of column `name` clears: itself, and of ids all those of its tier
    and smaller ones.
    """
    return id_columns(spec, tier_of(name)) if name.startswith("ids_") else [name]


def tier_of(name: str) -> int:
    """The k of a column `ids_<k>` or `ids_<k>_high`."""
    return int(name.split("_")[1])


def id_columns(spec: CacheSpec, k: int) -> list[str]:
    return [
        name
        for tier in spec.tiers
        if tier <= k
        for name in (f"ids_{tier}", *([f"ids_{tier}_high"] if spec.high_bits else []))
    ]


def _rising(spec: CacheSpec, column: Column, get: Get) -> str | None:
    """A value of a tier above the one before it in its row, which is the last of a smaller tier for
    the first (7.3).
    """
    values = get(column.name)
    at = spec.tiers.index(tier_of(column.name))
    before = get(f"values_{spec.tiers[at - 1]}")[:, -1:] if at else values[:, :1]
    step = max(1, CHUNK_ELEMENTS // values.shape[1])
    for start in range(0, len(values), step):
        stop = start + step
        part = spec.codec.ascending(
            np.concatenate([before[start:stop], values[start:stop]], axis=1)
        )
        rises = part[:, 1:] > part[:, :-1]
        if bool(rises.any()):
            return (
                f"column {column.name}: row {start + int(np.argmax(rises.any(axis=1)))} has a "
                "value that rises"
            )
    return None


def _above_the_maximum(spec: CacheSpec, get: Get) -> str | None:
    """A label's logit above the largest of its row: beside it the support would be nothing, or not a
    number.
    """
    logits = get("label_logit")
    if spec.codec.relative:
        most = get("max")
    else:
        most = spec.codec.most(get(f"values_{spec.tiers[0]}")[:, 0])
    # of -inf the values' own check speaks
    wrong = (logits > most[:, None]) & (most > -np.inf)[:, None]
    if bool(wrong.any()):
        return (
            f"column label_logit: row {int(np.argmax(wrong.any(axis=1)))} has a label above its "
            "row's maximum"
        )
    return None


def _bad_values(
    spec: CacheSpec, column: Column, values: Array, scales: frozenset[str] = frozenset()
) -> str | None:
    name, classes = column.name, spec.num_classes
    # entry 0 of a support is its maximum
    if name in ("values", f"values_{min(spec.tiers, default=0)}"):
        bits = (values if name == "values" else values[:, :1]).view(f"<u{values.itemsize}")
        step = max(1, CHUNK_ELEMENTS // bits.shape[1])
        for start in range(0, len(bits), step):
            part = bits[start : start + step]
            if bool((part == spec.codec.minus_infinity).all(axis=1).any()):
                return f"column {name} has a row without a maximum: it is -inf"
            begins = spec.codec.begins_at_zero
            if begins is not None and not bool(begins(part).all()):
                return f"column {name} has a row whose values do not begin at 0, its maximum"
    if column.dtype in INFINITY:
        finite = name in FINITE or name.startswith("feature_")
        if not _floats_good(values, column.dtype, allow_minus_infinity=not finite):
            return f"column {name} has a NaN, +inf" + (" or -inf" if finite else "")
        if (name in NOT_NEGATIVE or name in scales) and float(values.min()) < 0:
            return f"column {name} has a negative number"
        if name in WEIGHTS and float(values.max()) > MOST_WEIGHT:
            return f"column {name} has a weight above 2^64"
        if name in scales and float(values.max()) > MOST_SCALE:
            return f"column {name} has a scale by which its codes become infinite"
    elif column.dtype == "int8" and int(values.min()) < -127:
        return f"column {name} has the code -128; codes are -127 to 127"
    elif name == "label" and not -1 <= int(values.min()) <= int(values.max()) < classes:
        return f"column {name} has a label outside -1 to {classes - 1}"
    elif name == "token" and spec.num_tokens and int(values.max()) >= spec.num_tokens:
        return f"column {name} has a token outside 0 to {spec.num_tokens - 1}"
    elif name == "pos" and int(values.min()) < 0:
        return f"column {name} has a negative position"
    return None


def _floats_good(values: Array, dtype: str, *, allow_minus_infinity: bool) -> bool:
    """No NaN, no +inf, and no -inf unless allowed: two integer maxima, at memory speed."""
    size = STORAGE[dtype].itemsize
    flat, infinity = values.reshape(-1), INFINITY[dtype]
    highest = int(flat.view(f"<i{size}").max())
    lowest = int(flat.view(f"<u{size}").max())
    minus_infinity = infinity + (1 << (8 * size - 1))
    return highest < infinity and (
        lowest <= minus_infinity if allow_minus_infinity else lowest < minus_infinity
    )


def _bad_ids(spec: CacheSpec, k: int, get: Get) -> str | None:
    """An id of V or more, or one twice in a row, among the entries of tier `k` and all smaller
    ones.
    """
    columns = [get(name) for name in id_columns(spec, k)]
    step = max(1, CHUNK_ELEMENTS // k)
    for start in range(0, len(columns[0]), step):
        ids = _assemble(spec, [c[start : start + step] for c in columns], k)
        if int(ids.max()) >= spec.num_classes:
            row = start + int(np.argmax((ids >= spec.num_classes).any(axis=1)))
            return f"column ids_{k}: row {row} has an id outside 0 to {spec.num_classes - 1}"
        ids.sort(axis=1)
        twice = ids[:, 1:] == ids[:, :-1]
        if bool(twice.any()):
            return (
                f"column ids_{k}: row {start + int(np.argmax(twice.any(axis=1)))} has an id twice"
            )
    return None


def _assemble(spec: CacheSpec, parts: list[Array], k: int) -> Array:
    """Ids [n, k] of the tiers up to `k`, unsigned, as one new array."""
    if not spec.high_bits:
        return np.concatenate(parts, axis=1)
    out = np.empty((len(parts[0]), k), np.uint32)
    for tier, low, high in zip(spec.tiers, parts[::2], parts[1::2], strict=False):
        start, stop = spec.tier_range(tier)
        out[:, start:stop] = low
        add_high(out[:, start:stop], high, spec.high_bits)
    return out
