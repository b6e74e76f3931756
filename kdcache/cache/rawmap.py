"""The raw map of a shard file: where each column's bytes lie, the same for every container.

Readers use nothing else: a file is mapped, and a column is `length` bytes at `offset`,
little-endian, row-major.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import xxhash

from kdcache.cache.columns import ROOT, Array, Columns
from kdcache.cache.spec import CacheSpec
from kdcache.errors import CacheCorrupt

ALIGNMENT = 8
OFFSET_BYTES = 8  # one entry of an offsets buffer, int64


class Sink(Protocol):
    """What a container is written to, front to back."""

    def write(self, data: bytes | memoryview, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one column lies in its file, and the XXH3-128 of its bytes. An empty column has offset
    0.
    """

    offset: int
    length: int
    digest: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything promised about one shard file. `commit` is the digest of its commit record."""

    shard: int
    file: str
    size: int
    file_digest: str
    rest_digest: str
    records: int
    rows: dict[str, int]
    columns: dict[str, Extent]
    measured: dict[str, str] = field(default_factory=dict)
    commit: str = ""


def level_rows(spec: CacheSpec, records: int, rows: Mapping[str, int]) -> dict[str, int]:
    """Rows of `record` and of every level below it."""
    return {ROOT: records, **{name: rows[name] for name in spec.layout.levels}}


def expected_lengths(spec: CacheSpec, records: int, rows: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every column of a shard with these numbers of rows."""
    counts, known = level_rows(spec, records, rows), spec.layout
    out = {key: (counts[level.parent] + 1) * OFFSET_BYTES for key, level in known.offsets.items()}
    return out | {c.name: counts[c.level] * c.row_bytes for c in known.columns.values()}


def check_extents(spec: CacheSpec, facts: Facts, where: str) -> None:
    """CacheCorrupt unless the row counts, lengths and offsets of `facts` can be those of one file
    of its size.
    """
    if facts.records != facts_records(spec, facts.shard):
        raise CacheCorrupt(
            f"{where}: shard {facts.shard} has {facts.records} records; the header gives it "
            f"{facts_records(spec, facts.shard)}"
        )
    counts = level_rows(spec, facts.records, facts.rows)
    for level in spec.layout.levels.values():
        if level.count is not None and counts[level.name] != counts[level.parent] * level.count:
            raise CacheCorrupt(
                f"{where}: {counts[level.name]} rows of level {level.name!r}; expected "
                f"{level.count} for each of {counts[level.parent]}"
            )
    end, last = 0, "the start of the file"
    lengths = expected_lengths(spec, facts.records, facts.rows)
    for name, extent in sorted(
        facts.columns.items(), key=lambda item: (item[1].offset, item[1].length)
    ):
        if extent.length != lengths[name]:
            raise CacheCorrupt(
                f"{where}: column {name} has {extent.length} bytes; its rows need {lengths[name]}"
            )
        if extent.length == 0 and extent.offset == 0:
            continue
        if extent.length == 0 or extent.offset % ALIGNMENT or extent.offset < end:
            raise CacheCorrupt(
                f"{where}: column {name} lies at byte {extent.offset}, which is not a multiple of "
                f"{ALIGNMENT} behind {last}"
            )
        end, last = extent.offset + extent.length, f"column {name}"
    if end > facts.size:
        raise CacheCorrupt(f"{where}: {last} ends at byte {end}, the file has {facts.size}")


def facts_records(spec: CacheSpec, shard: int) -> int:
    """Records of a shard, by the header alone."""
    at = spec.shard(shard)
    return at.stop - at.start


def view(data: Array, extent: Extent, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """A column as an array over the mapped bytes; `extent` has passed `check_extents` for this
    file.
    """
    part: Array = data[extent.offset : extent.offset + math.prod(shape) * dtype.itemsize]
    return part.view(dtype).reshape(shape)


def digest(data: Array) -> str:
    """XXH3-128 of the bytes of a contiguous array."""
    return xxhash.xxh3_128_hexdigest(data.reshape(-1).view(np.uint8).data)


def rest_digest(data: Array, extents: Iterable[Extent]) -> str:
    """XXH3-128 over all bytes of the file outside the columns, in the order of the file."""
    hasher, at = xxhash.xxh3_128(), 0
    for extent in sorted(extents, key=lambda e: (e.offset, e.length)):
        if extent.length:
            hasher.update(data[at : extent.offset].data)
            at = extent.offset + extent.length
    hasher.update(data[at:].data)
    return hasher.hexdigest()


def survey(data: Array, columns: Columns, offsets: Mapping[str, int]) -> dict[str, Extent]:
    """Extents of freshly written columns; ValueError unless every byte in the file is what was to
    be written.
    """
    out = {}
    for name, array in columns.items():
        wanted = array.reshape(-1).view(np.uint8)
        if not len(wanted):
            out[name] = Extent(0, 0, digest(wanted))
            continue
        offset = offsets[name]
        found = data[offset : offset + len(wanted)]
        if offset % ALIGNMENT or not np.array_equal(found, wanted):
            raise ValueError(f"column {name} at byte {offset}")
        out[name] = Extent(offset, len(wanted), digest(found))
    return out
