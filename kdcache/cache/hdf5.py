"""A shard as an HDF5 file: one group per level, contiguous unfiltered datasets, ragged offsets as
`offsets`.

HDF5 lays out the file in memory, without the data; the columns are then written where it put them.
So a full disk never meets the library in the middle of a write, and nothing of the size of a shard
is held twice.
"""

from __future__ import annotations

import io
import mmap
from typing import Any

import h5py
import numpy as np

from kdcache.cache.columns import ROOT, Array, Column, Columns
from kdcache.cache.rawmap import Sink
from kdcache.cache.spec import CacheSpec

SUFFIX = "h5"
ALIGNMENT = 64
# Groups and headers of a shard are about 300 bytes a column; untouched pages of the skeleton cost
# nothing.
METADATA_ROOM = 2**24


class _Skeleton(io.RawIOBase):
    """The file that HDF5 writes its metadata to: sparse memory."""

    def __init__(self, capacity: int) -> None:
        self.memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.at = self.end = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.end}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        part = self.memory[self.at : self.at + len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)

    def write(self, data: Any) -> int:
        self.memory[self.at : self.at + len(data)] = bytes(data)
        self.at += len(data)
        self.end = max(self.end, self.at)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.end = self.at if size is None else size
        return self.end


def _members(spec: CacheSpec) -> list[tuple[str, list[tuple[str, str, Column | None]]]]:
    """(group, [(dataset, key in Columns, column or None for offsets)]) in the order of the file."""
    out = []
    for level in (None, *spec.levels()):
        name = ROOT if level is None else level.name
        datasets: list[tuple[str, str, Column | None]] = []
        if level is not None and level.ragged:
            datasets.append(("offsets", level.offsets, None))
        datasets += [(c.name, c.name, c) for c in spec.columns() if c.level == name]
        out.append((name, datasets))
    return out


def _untimed(kind: Any) -> Any:
    plist = h5py.h5p.create(kind)
    plist.set_obj_track_times(False)
    return plist


def _create(file: _Skeleton) -> Any:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    access.set_alignment(1, ALIGNMENT)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, file)
    return h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, _untimed(h5py.h5p.FILE_CREATE), access)


def _dataset(group: Any, name: str, array: Array, column: Column | None) -> int | None:
    """Reserve a contiguous dataset and say where its bytes go; None if it has none."""
    create = _untimed(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    dataset = h5py.h5d.create(
        group,
        name.encode(),
        h5py.h5t.py_create(array.dtype),
        h5py.h5s.create_simple(array.shape),
        dcpl=create,
    )
    if column is not None and column.dtype == "bfloat16":
        h5py.Dataset(dataset).attrs["dtype"] = np.bytes_(b"bfloat16")
    offset: int | None = dataset.get_offset()
    return offset if array.size else None


def write(file: Sink, spec: CacheSpec, columns: Columns, records: int) -> None:
    """Write contiguous storage columns as one file, front to back."""
    skeleton = _Skeleton(sum(a.nbytes + ALIGNMENT for a in columns.values()) + METADATA_ROOM)
    places: list[tuple[int, Array]] = []
    handle = _create(skeleton)
    try:
        for level, datasets in _members(spec):
            group = h5py.h5g.create(handle, level.encode(), gcpl=_untimed(h5py.h5p.GROUP_CREATE))
            for name, key, column in datasets:
                offset = _dataset(group, name, columns[key], column)
                if offset is not None:
                    places.append((offset, columns[key]))
    finally:
        handle.close()
    at = 0
    for offset, array in sorted(places, key=lambda place: place[0]):
        file.write(skeleton.memory[at:offset])
        file.write(array.reshape(-1).view(np.uint8).data)
        at = offset + array.nbytes
    file.write(skeleton.memory[at : skeleton.end])
    skeleton.memory.close()


def locate(path: str, data: Array, spec: CacheSpec, records: int) -> dict[str, int]:
    """Where HDF5 finds each column in the file; ValueError if it sees another dtype, shape or
    layout.
    """
    out = {}
    counts = {ROOT: records}
    with h5py.File(path, "r", locking=False) as file:
        for level, datasets in _members(spec):
            for name, key, column in datasets:
                dataset = file[level][name]
                dtype = np.dtype("<i8") if column is None else column.storage
                inner = () if column is None else column.shape
                rows = records + 1 if column is None else counts.setdefault(level, len(dataset))
                plain = dataset.chunks is None and dataset.id.get_create_plist().get_nfilters() == 0
                if dataset.dtype != dtype or dataset.shape != (rows, *inner) or not plain:
                    raise ValueError(
                        f"{path}: HDF5 reads dataset {level}/{name} as {dataset.dtype} "
                        f"{dataset.shape}"
                    )
                if dataset.size:
                    out[key] = int(dataset.id.get_offset())
    return out
