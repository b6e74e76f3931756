"""Reading: any records in any order, from threads and forks, leaving nothing behind; and
converting.
"""

from __future__ import annotations

import errno
import os
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    CONTAINERS,
    IDENTITY,
    image_spec,
    make_columns,
    specs,
    token_spec,
    tree,
    write_cache,
)
from test_storage_roundtrip import check_batch, expected

import kdcache
from kdcache.cache import mapping
from kdcache.cache.convert import convert
from kdcache.cache.gather import Group, groups, run
from kdcache.cache.reader import Cache
from kdcache.cache.writer import create
from kdcache.errors import (
    CacheCorrupt,
    CacheExists,
    CacheIncomplete,
    IdentityMismatch,
    KDCacheError,
    UsageError,
)

SPEC = token_spec(samples=(0, 40), views=(0, 2), records_per_shard=7)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "c"
    write_cache(path, SPEC, "hdf5")
    return path


ORDERS = {
    "none": [],
    "one": [33],
    "forwards": list(range(80)),
    "backwards": list(range(79, -1, -1)),
    "repeats": [5, 5, 5, 71, 5],
    "one shard": [3, 1, 2],
    "one shard run": [1, 2, 3],
    "across shards": list(range(4, 18)),
    "shuffled": np.random.default_rng(0).permutation(80).tolist(),
    "sorted with holes": list(range(0, 80, 3)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_any_order(name: str, path: Path) -> None:
    records = np.array(ORDERS[name], np.int64)
    with kdcache.open(path) as cache:
        check_batch(cache.read(records), expected(SPEC, records)[0])
        some = cache.read(records, ["pos", "sample_key"])
        assert list(some.columns) == ["pos", "sample_key"] and list(some.offsets) == ["row"]
        assert len(some) == len(records) and np.array_equal(some.records, records)


@settings(max_examples=60, deadline=None)
@given(shards=st.lists(st.integers(0, 4), max_size=30), data=st.data())
def test_groups_cover_a_batch_exactly_once(shards: list[int], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, 9), min_size=len(shards), max_size=len(shards)))
    parts, back = groups(np.array(shards, np.int64), np.array(index, np.int64))
    assert [part.shard for part in parts] == sorted(set(shards))
    found = []
    for part in parts:
        assert part.target.start == len(found)
        found += [(part.shard, s) for s in np.arange(100)[part.source].tolist()]
        assert part.target.stop == len(found)
    way = range(len(found)) if back is None else back.tolist()
    assert [found[i] for i in way] == list(zip(shards, index, strict=True))


def test_consecutive_rows_are_copied_as_one_piece() -> None:
    parts, back = groups(np.array([0, 0, 1, 1]), np.array([3, 4, 0, 2]))
    assert parts[0] == Group(0, slice(3, 5), slice(0, 2)) and back is None
    assert run(np.array([7])) == slice(7, 8)
    assert isinstance(run(np.array([1, 3, 2, 4])), np.ndarray)


def test_records_and_columns_that_are_not_there(path: Path) -> None:
    with kdcache.open(path) as cache:
        for records in ([80], [-1], [0, 2**62]):
            with pytest.raises(UsageError, match="the cache has 0 to 79"):
                cache.read(np.array(records))
        with pytest.raises(UsageError, match="did you mean"):
            cache.read(np.array([0]), ["ids_4"])
        for bad in (np.zeros(3), np.zeros((2, 2), np.int64), np.int64(3)):
            with pytest.raises(UsageError, match="expected int64"):
                cache.read(bad)
        with pytest.raises(UsageError, match="shard 12"):
            cache.facts(12)
        assert cache.read(np.array([0]), []).columns == {}
    with pytest.raises(UsageError, match="closed"):
        cache.read(np.array([0]))


def test_facts(path: Path) -> None:
    with kdcache.open(path) as cache:
        assert (cache.path, cache.spec, cache.identity, cache.container) == (
            path,
            SPEC,
            IDENTITY,
            "hdf5",
        )
        assert (
            cache.recorded == {"numpy": "0"}
            and cache.generation == 1
            and len(cache) == 80
            and not cache.accepted
        )
        assert len(cache.content_id) == 64 and cache.missing() == []
        rows = {i: make_columns(SPEC, i) for i in range(SPEC.num_shards)}
        assert [f.rows["row"] for f in cache.shards] == [len(c["pos"]) for c in rows.values()]
        assert [f.size for f in cache.shards] == [
            (path / "data" / f.file).stat().st_size for f in cache.shards
        ]
        sizes = cache.column_bytes()
        for name in sizes:
            assert sizes[name] == sum(c[name].nbytes for c in rows.values()), name
        assert cache.measured == {
            "rows": 78.0,
            "kl:1": pytest.approx(7.8),
            "odd": pytest.approx(12e-300),
        }
        assert cache.shard_measured(3) == {"rows": 4.0, "kl:1": 0.4, "odd": 1e-300}


def test_batches_belong_to_the_caller(path: Path) -> None:
    with kdcache.open(path) as cache:
        batch = cache.read(np.arange(80))
        for array in (*batch.columns.values(), *batch.offsets.values()):
            array[:] = 1
        check_batch(cache.read(np.arange(80)), expected(SPEC, np.arange(80))[0])
        with pytest.raises(ValueError):
            cache.shard_columns(0)["sample_key"][0] = 1


def test_expect_is_compared_field_by_field(path: Path) -> None:
    other = kdcache.Identity(data=IDENTITY.data, teacher={**IDENTITY.teacher, "dtype": "bfloat16"})
    with pytest.raises(
        IdentityMismatch, match=r"teacher\.dtype: cache has 'float32', given is 'bfloat16'"
    ):
        kdcache.open(path, expect=other)
    with kdcache.open(path, expect=other, accept=["teacher.dtype"]) as cache:
        assert cache.accepted == ["teacher.dtype"]
    with pytest.raises(UsageError, match=r"teacher\.dytpe"):
        kdcache.open(path, expect=other, accept=["teacher.dytpe"])


def test_threads_share_a_cache(path: Path) -> None:
    """First touches and later reads from eight threads, each batch right."""
    wanted = expected(SPEC, np.arange(80))[0]
    for _ in range(5):
        with kdcache.open(path) as cache, ThreadPoolExecutor(8) as pool:
            barrier = threading.Barrier(8)

            def work(seed: int, cache: Cache = cache, barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                for records in np.random.default_rng(seed).integers(0, 80, (10, 16)):
                    check_batch(
                        cache.read(records), {n: [c[i] for i in records] for n, c in wanted.items()}
                    )

            list(pool.map(work, range(8)))


def test_a_fork_reads_on_though_a_lock_was_held(path: Path) -> None:
    cache = kdcache.open(path)
    cache.read(np.arange(20))
    # as another thread would hold them during the fork
    with cache._lock, cache._shard(0)._lock:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                check_batch(cache.read(np.arange(80)), expected(SPEC, np.arange(80))[0])
                os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    check_batch(cache.read(np.arange(80)), expected(SPEC, np.arange(80))[0])


def test_a_cache_travels_to_other_processes(path: Path, tmp_path: Path) -> None:
    with kdcache.open(path) as cache:
        twin = pickle.loads(pickle.dumps(cache))
        assert twin.content_id == cache.content_id
        check_batch(twin.read(np.arange(80)), expected(SPEC, np.arange(80))[0])
    write_cache(tmp_path / "c", SPEC)
    kept = pickle.dumps(kdcache.open(tmp_path / "c"))
    (tmp_path / "c").rename(tmp_path / "d")
    write_cache(tmp_path / "c", SPEC, seed=1)
    with pytest.raises(CacheCorrupt, match="the cache was replaced"):
        pickle.loads(kept)


def maps(path: Path) -> int:
    """The mapped files of the cache at `path` alone: another test's cache may still wait for the
    collector.
    """
    return sum(f"{path}/data/" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_nothing_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write_cache(path, SPEC)
    cache = kdcache.open(path)
    descriptors = len(os.listdir("/proc/self/fd"))
    batch = cache.read(np.arange(80))
    assert len(os.listdir("/proc/self/fd")) == descriptors and maps(path) >= SPEC.num_shards
    cache.close()
    del cache
    assert maps(path) == 0 and len(batch) == 80
    for _ in range(200):
        with kdcache.open(path) as cache:
            cache.read(np.array([3, 50]))
    del cache
    assert len(os.listdir("/proc/self/fd")) == descriptors and maps(path) == 0


def test_views_of_a_shard_outlive_the_cache(path: Path) -> None:
    with kdcache.open(path) as cache:
        columns = cache.shard_columns(2)
    del cache
    assert all(
        columns[name].tobytes() == value.tobytes() for name, value in make_columns(SPEC, 2).items()
    )


def test_a_cache_is_read_while_it_is_written(tmp_path: Path) -> None:
    spec = image_spec()  # two views of shards of 3 and 2 records
    with create(tmp_path / "c", spec, IDENTITY) as writer:
        writer.write(0, make_columns(spec, 0), {"rows": 3.0})
        with pytest.raises(CacheIncomplete, match="1 of 4 shards are committed"):
            kdcache.open(tmp_path / "c")
        with kdcache.open(tmp_path / "c", allow_partial=True) as cache:
            assert (cache.content_id, cache.generation, cache.missing()) == ("", 0, [1, 2, 3])
            assert len(cache.shards) == 1 and cache.measured == {"rows": 3.0}
            assert cache.column_bytes()["values"] == 3 * 5 * 2
            check_batch(cache.read(np.array([2, 0])), expected(spec, np.array([2, 0]))[0])
            with pytest.raises(CacheIncomplete, match="shard 1 is not committed yet"):
                cache.read(np.array([0, 3]))
            assert len(cache.check_all()) == 4  # three shards, and no seal
            writer.write(1, make_columns(spec, 1))
            check_batch(cache.read(np.array([3, 0])), expected(spec, np.array([3, 0]))[0])
            assert len(pickle.loads(pickle.dumps(cache)).shards) == 2
        for shard in (2, 3):
            writer.write(shard, make_columns(spec, shard))
    with kdcache.open(tmp_path / "c", allow_partial=True) as cache:
        assert cache.generation == 1


def test_no_cache_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CacheIncomplete, match="no cache here"):
            kdcache.open(place)
    (tmp_path / "file").write_text("x")
    with pytest.raises(KDCacheError, match="while opening the cache"):
        kdcache.open(tmp_path / "file")


def test_a_failing_map_is_our_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int | None:
        mapping.ctypes.set_errno(errno.ENOMEM)
        return mapping._MAP_FAILED

    monkeypatch.setattr(mapping._libc, "mmap", refuse)
    with (
        kdcache.open(path) as cache,
        pytest.raises(KDCacheError, match="Cannot allocate memory while reading"),
    ):
        cache.read(np.array([0]))


@settings(max_examples=15, deadline=None)
@given(spec=specs(), seed=st.integers(0, 99))
def test_conversion_is_lossless(
    spec: kdcache.CacheSpec, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("convert")
    content_id = write_cache(folder / "a", spec, "arrow", seed=seed)
    assert convert(folder / "a", folder / "h") == content_id
    assert convert(folder / "h", folder / "b") == content_id
    assert convert(folder / "h", folder / "g", "hdf5") == content_id
    assert tree(folder / "a") == tree(folder / "b") and tree(folder / "h") == tree(folder / "g")
    with kdcache.open(folder / "h") as cache:
        assert cache.container == "hdf5" and cache.check_all() == []


def test_conversion_continues_and_refuses(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    content_id = convert(path, out)
    (out / "manifest/00000001.json").unlink()
    sorted((out / "commit").iterdir())[3].unlink()
    assert convert(path, out) == content_id
    with pytest.raises(UsageError, match="into itself"):
        convert(path, path)
    with pytest.raises(UsageError, match="container 'parquet' is unknown"):
        convert(path, tmp_path / "p", "parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(CacheExists):
        convert(path, tmp_path / "full")
    with create(tmp_path / "liar", SPEC, IDENTITY) as writer:
        writer.write(0, make_columns(SPEC, 0, seed=5))
    before = tree(tmp_path / "liar")
    with pytest.raises(
        CacheExists, match=r"liar: its shard 0 has another column .* remove the folder, or choose"
    ):
        convert(path, tmp_path / "liar", "arrow")
    assert tree(tmp_path / "liar") == before


def test_conversion_does_not_spread_damage(tmp_path: Path) -> None:
    for container in CONTAINERS:
        source = tmp_path / container
        write_cache(source, image_spec(), container)
        file = sorted((source / "data").iterdir())[1]
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(CacheCorrupt, match=file.name):
            convert(source, tmp_path / f"{container}-out")
        assert not tree(tmp_path / f"{container}-out/manifest")
