"""Levels and columns: the shape of everything a cache holds, and how the names of dtypes become
bytes.

A column is (name, level, dtype, inner shape). Levels form a tree below `record`; a level has a
constant number of rows per parent, or is ragged and then has one int64 offsets buffer. Nothing is
nullable and no column has zero width.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import CacheCorrupt

Array = npt.NDArray[Any]
# storage arrays by column name, and "<level>.offsets" of each ragged level
Columns = dict[str, Array]

# bfloat16 has no numpy dtype: its 16 bits travel as uint16.
STORAGE: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "uint8": "<u1",
        "uint16": "<u2",
        "uint32": "<u4",
        "uint64": "<u8",
        "int8": "<i1",
        "int32": "<i4",
        "int64": "<i8",
        "float16": "<f2",
        "float32": "<f4",
        "bfloat16": "<u2",
    }.items()
}
NAME = re.compile(r"[a-z0-9_]{1,64}")
ROOT = "record"
MAX_ELEMENTS = 2**31  # of one column in one shard


@dataclass(frozen=True, slots=True)
class Level:
    """Rows below a parent level: `count` rows for each parent row, or ragged (count None)."""

    name: str
    parent: str
    count: int | None

    @property
    def ragged(self) -> bool:
        return self.count is None

    @property
    def offsets(self) -> str:
        """Key of the offsets buffer of a ragged level in a `Columns` mapping."""
        return f"{self.name}.offsets"


@dataclass(frozen=True, slots=True)
class Column:
    """A fixed-width array [rows of `level`, *shape] of `dtype` (a key of STORAGE)."""

    name: str
    level: str
    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def storage(self) -> np.dtype[Any]:
        return STORAGE[self.dtype]

    @property
    def width(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.width * self.storage.itemsize

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "level": self.level,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }


def level_json(level: Level) -> dict[str, Any]:
    return {"name": level.name, "parent": level.parent, "count": level.count}


def check_offsets(offsets: Array, parents: int, rows: int, where: str) -> None:
    """CacheCorrupt unless `offsets` [parents + 1] starts at 0, never falls and ends at `rows`."""
    if offsets.shape != (parents + 1,) or int(offsets[0]) != 0 or int(offsets[-1]) != rows:
        raise CacheCorrupt(f"{where}: offsets of {parents} parents must run from 0 to {rows}")
    if parents and bool((offsets[1:] < offsets[:-1]).any()):
        raise CacheCorrupt(
            f"{where}: offsets fall at parent {int(np.argmax(offsets[1:] < offsets[:-1]))}"
        )
