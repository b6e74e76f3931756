"""Damage and lies: every one refused by our error, naming the file, and the column if it lies in
one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from forge import Forge, load
from strategies import CONTAINERS, IDENTITY, full_seed, image_spec, token_spec, tree, write_cache

import kdcache
from kdcache.cache.canonical import seal
from kdcache.cache.catalog import HEADER
from kdcache.cache.identity import Identity
from kdcache.cache.repair import MEND
from kdcache.errors import CacheCorrupt, CacheIncomplete, IdentityMismatch, KDCacheError, NotBuilt

TINY = token_spec(
    samples=(0, 3), records_per_shard=2, tiers=(1, 3), temperatures=("1",), features=()
)


@pytest.fixture(scope="module", params=CONTAINERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / request.param
    write_cache(path, TINY, request.param, seed=full_seed(TINY))
    return path


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "c"))


def read_all(path: Path) -> None:
    with kdcache.open(path) as cache:
        cache.read(np.arange(cache.num_records))


def column_at(path: Path, name: str, at: int) -> str | None:
    """The column that byte `at` of shard file `name` lies in."""
    for record in (path / "commit").iterdir():
        doc = load(record)
        if doc["file"] == name:
            for column, extent in doc["columns"].items():
                if extent["offset"] <= at < extent["offset"] + extent["length"]:
                    return str(column)
    return None


def every_byte(cache: Path) -> Iterator[tuple[Path, int]]:
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        for at in range(path.stat().st_size):
            yield path, at


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_flipped_bit_is_refused(container: str, tmp_path: Path) -> None:
    """One bit in every byte of every file of one shard, one bit in every 17th byte of a larger
    cache.
    """
    least = token_spec(
        samples=(0, 2),
        num_classes=9,
        tiers=(1,),
        temperatures=("1",),
        values="float32",
        labels=0,
        tokens=False,
        features=(),
    )
    for spec, stride, flips in ((least, 1, 4000), (TINY, 17, 700)):
        cache = tmp_path / str(stride)
        write_cache(cache, spec, container, seed=full_seed(spec))
        assert flip_bits(cache, stride) > flips
        read_all(cache)


def flip_bits(cache: Path, stride: int) -> int:
    """Flip and restore bits one after another, each time expecting a complaint at the right place;
    how many.
    """
    flips = 0
    for path, at in list(every_byte(cache))[::stride]:
        fd = os.open(path, os.O_RDWR)
        byte = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([byte[0] ^ (1 << (at * 7 % 8))]), at)
        with pytest.raises(CacheCorrupt) as caught:
            read_all(cache)
        said = str(caught.value)
        assert str(path) in said, (path, at, said)
        assert said.count(MEND) == (path.name != HEADER) and said.count(f"{path}:") <= 1, said
        if path.parent.name == "data":
            column = column_at(cache, path.name, at)
            assert f"column {column}:" in said if column else "outside the columns" in said, (
                at,
                said,
            )
        os.pwrite(fd, byte, at)
        os.close(fd)
        flips += 1
    return flips


def test_all_eight_bits_of_some_bytes(cache: Path) -> None:
    for path in (p for p in cache.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for at in range(5, len(data), len(data) // 7):
            for bit in range(8):
                path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
                with pytest.raises(CacheCorrupt, match=path.name):
                    read_all(cache)
        path.write_bytes(data)
    read_all(cache)


def test_every_truncation_and_extension_is_refused(cache: Path) -> None:
    for path in (p for p in cache.rglob("*") if p.is_file()):
        data = path.read_bytes()
        lengths = {
            0,
            1,
            len(data) // 2,
            len(data) - 1,
            len(data) + 1,
            len(data) + 4096,
            *range(0, len(data), 97),
        }
        for length in sorted(lengths - {len(data)}):
            path.write_bytes((data + bytes(5000))[:length])
            with pytest.raises(CacheCorrupt, match=path.name):
                read_all(cache)
        path.write_bytes(data)
    read_all(cache)


def test_every_missing_file_is_refused(cache: Path) -> None:
    for path in (p for p in cache.rglob("*") if p.is_file()):
        data = path.read_bytes()
        path.unlink()
        said = "not finished" if "manifest" in str(path) else path.name
        with pytest.raises((CacheCorrupt, CacheIncomplete), match=said):
            read_all(cache)
        path.mkdir()
        with pytest.raises(KDCacheError, match=path.name):
            read_all(cache)
        path.rmdir()
        os.mkfifo(path)
        with pytest.raises(KDCacheError, match=path.name):
            read_all(cache)
        path.unlink()
        path.write_bytes(data)
    read_all(cache)


def swap(a: Path, b: Path) -> None:
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


def test_swapped_shards_are_refused(tmp_path: Path) -> None:
    """Two shards of equal size, with their commit records or without."""
    spec = image_spec()
    for container in CONTAINERS:
        path = tmp_path / container
        write_cache(path, spec, container)
        data, commits = sorted((path / "data").iterdir()), sorted((path / "commit").iterdir())
        assert data[0].stat().st_size == data[2].stat().st_size
        swap(data[0], data[2])
        with pytest.raises(CacheCorrupt, match=f"{data[0].name}: column"):
            read_all(path)
        swap(data[0], data[2])
        swap(commits[0], commits[2])
        with pytest.raises(CacheCorrupt, match=r"commit/00000000\.json.*'shard' is wrong"):
            read_all(path)
        swap(data[0], data[2])
        with pytest.raises(CacheCorrupt, match=r"commit/00000000\.json"):
            read_all(path)
        swap(commits[0], commits[2])
        swap(data[0], data[2])
        read_all(path)


def test_shards_swapped_by_a_forger_lack_the_digest_of_the_manifest(
    whole: Path, tmp_path: Path
) -> None:
    """Commit records renumbered and sealed anew: still not those of the manifest."""
    forge = Forge(whole)
    forge.commits[0]["measured"] = {"rows": "2"}
    forge.write(tmp_path / "c", proofs=False)
    with pytest.raises(
        CacheCorrupt, match=r"commit/00000000\.json: its digest is .*, the manifest says"
    ):
        read_all(tmp_path / "c")


def test_parts_of_another_cache_are_refused(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    container = load(cache / "header.json")["container"]
    write_cache(
        other, TINY, container, Identity(data={"name": "letters"}, teacher={}), seed=full_seed(TINY)
    )
    for name in ("commit/00000001.json", "manifest/00000001.json", "header.json"):
        before = (cache / name).read_bytes()
        (cache / name).write_bytes((other / name).read_bytes())
        with pytest.raises(CacheCorrupt, match="of another cache"):
            read_all(cache)
        (cache / name).write_bytes(before)
    read_all(cache)
    with pytest.raises(
        IdentityMismatch, match=r"data\.name: cache has 'letters', given is 'numbers'"
    ) as caught:
        kdcache.open(other, expect=IDENTITY)
    assert "data.name" in [d.field for d in caught.value.fields]
    assert kdcache.open(other, expect=IDENTITY, accept=["data", "teacher"]).accepted


def test_damage_is_found_where_it_is_and_nowhere_else(cache: Path) -> None:
    """A student that reads other columns or shards is not stopped by it."""
    doc = load(cache / "commit/00000000.json")
    path, extent = cache / "data" / doc["file"], doc["columns"]["values_3"]
    data = bytearray(path.read_bytes())
    data[extent["offset"]] ^= 1
    path.write_bytes(data)
    with kdcache.open(cache) as opened:
        opened.read(np.arange(3), ["ids_1", "values_1"])
        opened.read(np.array([2]))
        for _ in range(2):  # and it stays found
            with pytest.raises(CacheCorrupt, match=r"column values_3: its digest"):
                opened.read(np.array([0]))
        assert len(opened.check_all()) == 1


def test_check_all_accounts_for_every_file(cache: Path) -> None:
    with kdcache.open(cache) as opened:
        seen: list[tuple[int, int]] = []
        assert opened.check_all(progress=lambda done, total: seen.append((done, total))) == []
        assert seen == [(1, 2), (2, 2)]
        strangers = [
            "notes.txt",
            "data/00000001-" + "a" * 32 + ".arrow",
            "data/x",
            "commit/00000007.json",
            "manifest/readme",
        ]
        for name in strangers:
            (cache / name).write_bytes(b"?")
        (cache / "quarantine").mkdir()
        (cache / "quarantine/old").write_bytes(b"?")
        for quick in (True, False):
            found = opened.check_all(quick=quick)
            assert len(found) == len(strangers) and all(
                any(f"{cache}/{n}:" in line for line in found) for n in strangers
            )
        assert opened.notes() == [
            f"{cache}/quarantine/old: put aside by an earlier repair; may be deleted"
        ]


def each_damage(cache: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    for name in tree(cache):
        yield name, lambda path: path.write_bytes(path.read_bytes()[:-1])
        yield name, lambda path: path.unlink()
        yield name, lambda path: path.write_bytes(path.read_bytes().replace(b"0", b"1"))


def test_check_all_of_an_open_cache_lists_and_never_raises(cache: Path) -> None:
    with kdcache.open(cache) as opened:
        for name, damage in each_damage(cache):
            before = (cache / name).read_bytes()
            damage(cache / name)
            found = opened.check_all()
            assert found and any(
                name in line or (name.startswith("manifest") and "manifest: no longer" in line)
                for line in found
            ), (name, found)
            (cache / name).write_bytes(before)
        shutil.rmtree(cache / "data")
        assert opened.check_all()
        (cache / "data").write_bytes(b"a file where a folder was")
        assert opened.check_all()


def rewrite(path: Path, **changes: object) -> None:
    doc = load(path)
    path.write_bytes(seal({**doc, **changes}))


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"format": 2}, "format 2; this version reads format 1"),
        (
            {"requires": ["kind:topk", "kind:topp"]},
            "needs kind:topp, which this version does not have",
        ),
        ({"container": "zarr"}, "container 'zarr'"),
    ],
)
def test_what_this_version_lacks_is_refused_by_name(
    changes: dict[str, object], said: str, cache: Path
) -> None:
    rewrite(cache / "header.json", **changes)
    with pytest.raises(NotBuilt, match=said):
        kdcache.open(cache)
