"""What goes into a shard comes out, byte for byte, in both containers, by the raw map and by their
libraries.
"""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    CONTAINERS,
    IDENTITY,
    full_seed,
    image_spec,
    make_columns,
    specs,
    token_spec,
    tree,
    write_cache,
)

import kdcache
from kdcache.cache.columns import Columns
from kdcache.cache.spec import CacheSpec
from kdcache.errors import DataError, UsageError


def fast_folder() -> str | None:
    """A file system in memory, where syncing costs nothing."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def expected(
    spec: CacheSpec, records: np.ndarray, seed: int = 0
) -> tuple[dict[str, list[np.ndarray]], Columns]:
    """The columns of some records by the plainest means: a list of per-record arrays."""
    shards = {i: make_columns(spec, i, seed) for i in range(spec.num_shards)}
    ragged = {level.name: level.offsets for level in spec.levels() if level.ragged}
    out: dict[str, list[np.ndarray]] = {c.name: [] for c in spec.columns()}
    for record in records.tolist():
        view, sample = divmod(record, spec.num_samples)
        shard = view * spec.shards_per_view + sample // spec.records_per_shard
        at, columns = sample % spec.records_per_shard, shards[shard]
        for column in spec.columns():
            rows = at
            if column.level in ragged:
                offsets = columns[ragged[column.level]]
                rows = slice(int(offsets[at]), int(offsets[at + 1]))
            out[column.name].append(columns[column.name][rows])
    return out, {}


def check_batch(batch: kdcache.cache.reader.Batch, wanted: dict[str, list[np.ndarray]]) -> None:
    levels = {c.name: c for c in batch.spec.columns()}
    for name, values in batch.columns.items():
        column = levels[name]
        assert (
            values.dtype == column.storage and values.flags.writeable and values.flags.c_contiguous
        )
        if column.level in batch.offsets:
            offsets = batch.offsets[column.level]
            assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(values)
            found = [values[a:b] for a, b in pairwise(offsets)]
        else:
            assert values.shape == (len(batch), *column.shape)
            found = list(values)
        assert len(found) == len(wanted[name])
        for a, b in zip(found, wanted[name], strict=True):
            assert a.tobytes() == b.tobytes() and a.shape == b.shape, name


@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_round_trip_is_exact(container: str, spec: CacheSpec, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32))
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        content_id = write_cache(Path(folder) / "c", spec, container, seed=seed)
        with kdcache.open(Path(folder) / "c", expect=IDENTITY) as cache:
            assert (
                cache.content_id == content_id
                and cache.spec == spec
                and cache.num_records == spec.num_records
            )
            asked = st.lists(st.integers(0, spec.num_records - 1), max_size=12)
            for records in (np.arange(spec.num_records), np.array(data.draw(asked), np.int64)):
                batch = cache.read(records)
                assert list(batch.columns) == [c.name for c in spec.columns()]
                check_batch(batch, expected(spec, records, seed)[0])
            assert cache.check_all() == [] and cache.notes() == []


@settings(max_examples=15, deadline=None)
@given(spec=specs(), seed=st.integers(0, 2**32))
def test_both_containers_have_one_content_id(spec: CacheSpec, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        ids = {write_cache(Path(folder) / name, spec, name, seed=seed) for name in CONTAINERS}
        assert len(ids) == 1
        assert write_cache(Path(folder) / "other", spec, "arrow", seed=seed + 1) not in ids


@pytest.mark.parametrize("container", CONTAINERS)
def test_files_are_a_function_of_their_content(container: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_cache(tmp_path / name, token_spec(), container)
        time.sleep(1.1)  # HDF5 and most others write times in whole seconds
    a = tree(tmp_path / "a")
    assert a == tree(tmp_path / "b")
    assert len(a) == 2 + 2 * 3 and not any(b"/tmp" in content for content in a.values())


def test_arrow_reads_the_file_as_documented(tmp_path: Path) -> None:
    spec = token_spec()
    write_cache(tmp_path / "c", spec, "arrow")
    for shard, path in enumerate(sorted((tmp_path / "c/data").iterdir())):
        columns = make_columns(spec, shard)
        table = pa.ipc.open_file(str(path)).read_all()
        table.validate(full=True)
        assert table.num_rows == spec.shard(shard).stop - spec.shard(shard).start
        assert not any(field.nullable for field in table.schema)
        assert table.schema.field("row").type.value_field.type.field("feature_h").metadata == {
            b"dtype": b"bfloat16"
        }
        assert table["sample_key"].to_pylist() == columns["sample_key"].tolist()
        offsets = columns["row.offsets"]
        for record, rows in enumerate(table["row"].to_pylist()):
            part = slice(int(offsets[record]), int(offsets[record + 1]))
            assert [row["ids_5"] for row in rows] == columns["ids_5"][part].tolist()
            assert [row["pos"] for row in rows] == columns["pos"][part].tolist()
            assert [row["tail_lse"] for row in rows] == columns["tail_lse"][part].reshape(
                len(rows), 4
            ).tolist()


def test_hdf5_reads_the_file_as_documented(tmp_path: Path) -> None:
    spec = token_spec()
    write_cache(tmp_path / "c", spec, "hdf5")
    for shard, path in enumerate(sorted((tmp_path / "c/data").iterdir())):
        columns = make_columns(spec, shard)
        with h5py.File(path, "r") as file:
            assert sorted(file) == ["record", "row", "token"]
            assert np.array_equal(file["row/offsets"][:], columns["row.offsets"])
            for column in spec.columns():
                dataset = file[column.level][column.name]
                assert dataset.chunks is None and dataset.compression is None
                assert dataset[:].tobytes() == columns[column.name].tobytes()
                if dataset.size:
                    assert dataset.id.get_offset() % 64 == 0


def test_a_level_without_a_single_row(tmp_path: Path) -> None:
    for container in CONTAINERS:
        spec = token_spec(samples=(0, 2))
        columns = make_columns(spec, 0, most_rows=1)
        assert len(columns["pos"]) == 0
        with kdcache.create(tmp_path / container, spec, IDENTITY, container=container) as writer:
            writer.write(0, columns)
        with kdcache.open(tmp_path / container) as cache:
            batch = cache.read(np.array([1, 0, 1]))
            assert batch.columns["ids_5"].shape == (0, 3) and batch.offsets["row"].tolist() == [
                0,
                0,
                0,
                0,
            ]
            assert cache.check_all() == []


BAD_COLUMNS = {
    "missing": (lambda c: c.pop("max"), "max"),
    "unknown": (lambda c: c.update(maxx=c["max"]), "maxx"),
    "dtype": (lambda c: c.update(max=c["max"].astype(np.float64)), "max"),
    "big-endian": (lambda c: c.update(max=c["max"].astype(">f4")), "max"),
    "rows": (lambda c: c.update(max=c["max"][:-1]), "max"),
    "inner shape": (lambda c: c.update(values=c["values"][:, :-1]), "values"),
    "not an array": (lambda c: c.update(max=c["max"].tolist()), "max"),
    "records": (lambda c: c.update(sample_key=c["sample_key"][:-1]), "sample_key"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_a_writer_refuses_columns_of_another_form(name: str, tmp_path: Path) -> None:
    spec, (spoil, column) = image_spec(), BAD_COLUMNS[name]
    columns = make_columns(spec, 0)
    spoil(columns)
    with (
        pytest.raises(UsageError, match=column),
        kdcache.create(tmp_path / "c", spec, IDENTITY) as writer,
    ):
        writer.write(0, columns)
    assert not tree(tmp_path / "c/data") and len(writer.missing()) == spec.num_shards


def spoil(name: str, value: float, spec: CacheSpec) -> Columns:
    columns = make_columns(spec, 0, full_seed(spec))
    columns[name].reshape(-1)[-1] = value
    return columns


BAD_CONTENT = [
    ("max", np.nan),
    ("max", -np.inf),
    ("step", -1),
    ("step", np.inf),
    ("tail_lse", np.nan),
    ("tail_lse", np.inf),
    ("label", 100_000),
    ("label", -2),
    ("token", 100_000),
    ("pos", -1),
    ("feature_h", 0x7F80),
    ("feature_h", 0xFF80),
    ("feature_h", 0xFFC0),
    ("row.offsets", -1),
    ("row.offsets", 0),
    ("label_logit", np.nan),
]


@pytest.mark.parametrize("name,value", BAD_CONTENT)
def test_a_writer_refuses_content_that_readers_would(
    name: str, value: float, tmp_path: Path
) -> None:
    spec = token_spec()
    columns = spoil(name, value, spec)
    with (
        pytest.raises((DataError, UsageError), match=name),
        kdcache.create(tmp_path / "c", spec, IDENTITY) as writer,
    ):
        writer.write(0, columns)
    assert len(writer.missing()) == 3


def test_a_writer_refuses_an_id_beyond_the_classes(tmp_path: Path) -> None:
    spec = token_spec()
    columns = make_columns(spec, 0, full_seed(spec))
    columns["ids_5"][-1, 0], columns["ids_5_high"][-1] = 100_000 & 0xFFFF, 1
    with (
        pytest.raises(DataError, match=r"ids_5: row \d+ has an id outside 0 to 99999"),
        kdcache.create(tmp_path / "c", spec, IDENTITY) as writer,
    ):
        writer.write(0, columns)


def test_a_writer_refuses_an_id_twice_even_across_tiers(tmp_path: Path) -> None:
    spec = token_spec()
    columns = make_columns(spec, 0, full_seed(spec))
    columns["ids_5"][0, 1] = columns["ids_2"][0, 1]
    columns["ids_5_high"][0] = columns["ids_2_high"][0] & 2 | (columns["ids_5_high"][0] & 0b101)
    with (
        pytest.raises(DataError, match="ids_5: row 0 has an id twice"),
        kdcache.create(tmp_path / "c", spec, IDENTITY) as writer,
    ):
        writer.write(0, columns)
