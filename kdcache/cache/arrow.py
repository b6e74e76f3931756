"""A shard as an Arrow IPC file: one uncompressed record batch, a table row per record.

Record columns are top-level fields. A lower level is one list column of structs: fixed-size for R
rows per record, large-list for a ragged level, whose offsets buffer is the level's offsets. pyarrow
only writes and checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from kdcache.cache.columns import ROOT, Array, Column, Columns
from kdcache.cache.rawmap import Sink
from kdcache.cache.spec import CacheSpec

SUFFIX = "arrow"


def _type(column: Column) -> Any:
    base = pa.from_numpy_dtype(column.storage)
    return pa.list_(pa.field("item", base, nullable=False), column.width) if column.shape else base


def _field(column: Column) -> Any:
    # bfloat16 has no Arrow type; other tools see uint16 and this note.
    note = {b"dtype": b"bfloat16"} if column.dtype == "bfloat16" else None
    return pa.field(column.name, _type(column), nullable=False, metadata=note)


def _schema(spec: CacheSpec) -> Any:
    fields = [_field(c) for c in spec.columns() if c.level == ROOT]
    for level in spec.levels():
        struct = pa.struct([_field(c) for c in spec.columns() if c.level == level.name])
        item = pa.field("item", struct, nullable=False)
        kind = pa.large_list(item) if level.count is None else pa.list_(item, level.count)
        fields.append(pa.field(level.name, kind, nullable=False))
    return pa.schema(fields)


def _array(column: Column, values: Array) -> Any:
    base = pa.from_numpy_dtype(column.storage)
    flat = pa.Array.from_buffers(base, values.size, [None, pa.py_buffer(values)], 0)
    if not column.shape:
        return flat
    return pa.Array.from_buffers(_type(column), len(values), [None], 0, children=[flat])


def write(file: Sink, spec: CacheSpec, columns: Columns, records: int) -> None:
    """Write contiguous storage columns as one file, front to back."""
    schema = _schema(spec)
    arrays = [_array(c, columns[c.name]) for c in spec.columns() if c.level == ROOT]
    for level in spec.levels():
        members = [c for c in spec.columns() if c.level == level.name]
        kind = schema.field(level.name).type
        rows = len(columns[members[0].name])
        struct = pa.Array.from_buffers(
            kind.value_type, rows, [None], 0, children=[_array(c, columns[c.name]) for c in members]
        )
        buffers = [None, pa.py_buffer(columns[level.offsets])] if level.ragged else [None]
        arrays.append(pa.Array.from_buffers(kind, records, buffers, 0, children=[struct]))
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    options = pa.ipc.IpcWriteOptions(compression=None, use_threads=False)
    with (
        pa.PythonFile(file, mode="w") as sink,
        pa.ipc.new_file(sink, schema, options=options) as writer,
    ):
        writer.write_batch(batch)


def locate(path: str, data: Array, spec: CacheSpec, records: int) -> dict[str, int]:
    """Where Arrow finds each column in the mapped file; ValueError if it sees another schema or
    number of records.
    """
    reader = pa.ipc.open_file(pa.py_buffer(data))
    batch = reader.get_batch(0)
    if (
        reader.num_record_batches != 1
        or batch.num_rows != records
        or not reader.schema.equals(_schema(spec), True)
    ):
        raise ValueError(
            f"{path}: Arrow reads another schema or number of records than was written"
        )
    batch.validate(full=True)
    base = data.ctypes.data
    return {
        name: buffer.address - base for name, buffer in _buffers(spec, batch) if buffer is not None
    }


def _buffers(spec: CacheSpec, batch: Any) -> Iterator[tuple[str, Any]]:
    for column in spec.columns():
        if column.level == ROOT:
            yield column.name, _data(column, batch.column(column.name))
    for level in spec.levels():
        outer = batch.column(level.name)
        if level.ragged:
            yield level.offsets, outer.buffers()[1]
        members = [c for c in spec.columns() if c.level == level.name]
        for i, column in enumerate(members):
            yield column.name, _data(column, outer.values.field(i))


def _data(column: Column, array: Any) -> Any:
    return (array.values if column.shape else array).buffers()[1]
