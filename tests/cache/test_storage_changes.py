"""Files that change after their first touch, and more of them than a process may map."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forge import load
from strategies import image_spec, make_columns, write_cache
from teacher_world import Points, mlp

import kdcache
from kdcache.cache import mapping
from kdcache.cache.shard import Shard
from kdcache.errors import CacheCorrupt, KDCacheError, UsageError
from kdcache.student.trainer import StepInfo
from kdcache.teacher.dump import dump_teacher

SPEC = image_spec(samples=(0, 40), records_per_shard=10)
ALL = np.arange(SPEC.num_records)
LARGE = image_spec(samples=(0, 4000), records_per_shard=2000, num_classes=300)  # many pages


def files(cache: Path) -> list[Path]:
    return sorted((cache / "data").iterdir())


def column_place(cache: Path, shard: int, name: str) -> tuple[int, int]:
    extent = load(cache / f"commit/{shard:08d}.json")["columns"][name]
    return extent["offset"], extent["length"]


def overwrite(path: Path, at: int, data: bytes, keep_times: bool = False) -> None:
    path.chmod(0o644)
    found = path.stat()
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)
    if keep_times:  # as rsync --inplace --times does
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("container", ["arrow", "hdf5"])
@pytest.mark.parametrize("keep_times", [False, True])
def test_bytes_that_change_in_place_are_proven_again_before_a_row_is_read(
    container: str, keep_times: bool, tmp_path: Path
) -> None:
    write_cache(tmp_path / "c", SPEC, container)
    with kdcache.open(tmp_path / "c") as cache:
        before = cache.read(ALL)
        victim = files(tmp_path / "c")[1]
        name = next(n for n in before.columns if n.startswith("values"))
        at, length = column_place(tmp_path / "c", 1, name)
        good = victim.read_bytes()[at : at + length]
        overwrite(victim, at, bytes(reversed(good)), keep_times)
        for _ in range(2):  # and stays refused
            with pytest.raises(
                CacheCorrupt, match=f"{victim.name}: column {name}: its digest"
            ) as caught:
                cache.read(ALL)
        assert "\n" not in str(caught.value)
        cache.read(np.arange(10))  # of another shard
        overwrite(victim, at, good, keep_times)
        np.testing.assert_array_equal(cache.read(ALL).columns[name], before.columns[name])


HARMLESS: dict[str, Callable[[Path], object]] = {
    "touched": os.utime,
    "made writable": lambda path: path.chmod(0o644),
    "deleted": Path.unlink,
    "linked": lambda path: os.link(path, path.parent.parent.parent / "link"),
    "moved": lambda path: path.rename(path.with_name("elsewhere")),
    "replaced by a copy": lambda path: (
        shutil.copy(path, path.with_name("x")),
        os.replace(path.with_name("x"), path),
    ),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_leaves_the_bytes_as_they_are_is_no_damage(change: str, tmp_path: Path) -> None:
    write_cache(tmp_path / "c", SPEC)
    with kdcache.open(tmp_path / "c") as cache:
        before = cache.read(ALL)
        for path in files(tmp_path / "c")[:1]:
            HARMLESS[change](path)
        after = cache.read(ALL)
        for name, column in before.columns.items():
            np.testing.assert_array_equal(column, after.columns[name])


@pytest.mark.parametrize("size", [0, 100, 8192, "half", "a byte less"])
def test_a_file_that_is_cut_is_an_error_and_no_bus_error(size: int | str, tmp_path: Path) -> None:
    write_cache(tmp_path / "c", LARGE)
    with kdcache.open(tmp_path / "c") as cache:
        cache.read(np.arange(LARGE.num_records))
        victim = files(tmp_path / "c")[0]
        victim.chmod(0o644)
        whole = victim.stat().st_size
        os.truncate(
            victim, size if isinstance(size, int) else whole // 2 if size == "half" else whole - 1
        )
        with pytest.raises(
            CacheCorrupt, match=f"{victim.name}: file has .* bytes, expected {whole}"
        ):
            cache.read(np.arange(LARGE.num_records))


def test_a_file_that_is_cut_between_the_look_and_the_copy_gives_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is looked at before the copy: what happens in between is a bus error, which zeros
    take the place of.
    """
    write_cache(tmp_path / "c", LARGE)
    with kdcache.open(tmp_path / "c") as cache:
        cache.read(np.arange(LARGE.num_records))
        victim, get = files(tmp_path / "c")[0], Shard.get
        victim.chmod(0o644)

        def cut(self: Shard, names: list[str]) -> dict[str, np.ndarray]:
            out = get(self, names)
            os.truncate(victim, 5000)
            return out

        monkeypatch.setattr(Shard, "get", cut)
        for records in (np.arange(LARGE.num_records), np.arange(1999, 0, -3)):
            with pytest.raises(
                CacheCorrupt, match=f"{victim.name}: (its bytes were cut off|file has 5000 bytes)"
            ):
                cache.read(records)
    write_cache(tmp_path / "d", LARGE)  # and maps of other caches are as they were
    with kdcache.open(tmp_path / "d") as cache:
        monkeypatch.undo()
        cache.read(np.arange(LARGE.num_records))


def test_threads_that_read_a_file_as_it_is_cut_all_get_our_error(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", LARGE)
    said: list[str] = []
    with kdcache.open(tmp_path / "c") as cache:
        cache.read(np.arange(LARGE.num_records))
        started = threading.Barrier(5)

        def reading() -> None:
            started.wait()
            try:
                while True:
                    cache.read(np.arange(2000))
            except CacheCorrupt as e:
                said.append(str(e))

        threads = [threading.Thread(target=reading) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        victim = files(tmp_path / "c")[0]
        victim.chmod(0o644)
        os.truncate(victim, 4096)
        for thread in threads:
            thread.join(30)
    assert len(said) == 4 and all(victim.name in line for line in said)


SCRIPT = """
import mmap, os, sys
import numpy as np, kdcache
path = sys.argv[1]
if sys.argv[2] == "ours":
    cache = kdcache.open(path)
    cache.read(np.arange(10))
with open(sys.argv[3], "w+b") as file:
    file.truncate(8192)
    other = mmap.mmap(file.fileno(), 8192)
    os.truncate(sys.argv[3], 0)
    other[5000]
"""


@pytest.mark.parametrize("which", ["none", "ours"])
def test_a_bus_error_of_somebody_else_stays_what_it_is(which: str, tmp_path: Path) -> None:
    write_cache(tmp_path / "c", SPEC)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "c"), which, str(tmp_path / "x")],
        timeout=60,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGBUS


def test_what_cannot_be_is_proven_again_whoever_noticed_it(tmp_path: Path) -> None:
    """A store through another map moves no time at first: `prove` reads the bytes."""
    write_cache(tmp_path / "c", SPEC)
    with kdcache.open(tmp_path / "c") as cache:
        name = next(n for n in cache.read(ALL).columns if n.startswith("values"))
        cache.prove(ALL)
        victim = files(tmp_path / "c")[2]
        cache._shard(2)._signature = None  # a file system that tells no times
        at, length = column_place(tmp_path / "c", 2, name)
        overwrite(victim, at, bytes(length))
        cache.read(ALL)
        cache.prove(np.arange(10))
        with pytest.raises(CacheCorrupt, match=f"{victim.name}: column {name}"):
            cache.prove(np.array([25, 3]))


def test_no_more_files_are_mapped_than_may_be_and_none_is_proven_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = image_spec(samples=(0, 60), records_per_shard=1)
    write_cache(tmp_path / "c", spec)
    before = mapping.count()
    monkeypatch.setattr(mapping, "MOST", before + 8)
    proven: list[str] = []
    real = Shard._prove_commit
    monkeypatch.setattr(
        Shard, "_prove_commit", lambda self: (proven.append(self.path), real(self))[1]
    )
    expected = [make_columns(spec, shard) for shard in range(spec.num_shards)]
    with kdcache.open(tmp_path / "c") as cache:
        rng = np.random.default_rng(0)
        for round in range(3):
            order = rng.permutation(spec.num_records)
            for start in range(0, len(order), 5):
                batch = cache.read(order[start : start + 5])
                for i, record in enumerate(order[start : start + 5]):
                    for name, column in batch.columns.items():
                        np.testing.assert_array_equal(column[i], expected[record][name][0])
                assert mapping.count() <= before + 8 + 5
            assert len(proven) == spec.num_shards, round
        victim = files(tmp_path / "c")[7]
        for record in (7, *range(10, 40)):
            cache.read(np.array([record]))
        overwrite(victim, 200, b"\xff" * 8)  # let go of, changed, and asked for again
        with pytest.raises(CacheCorrupt, match=victim.name):
            cache.read(np.array([7]))
        monkeypatch.setattr(mapping, "MOST", 4)
        with pytest.raises(
            UsageError, match="the 5 records lie in 5 shards; at most 4 can be mapped at once"
        ):
            cache.read(np.arange(5))


@pytest.mark.parametrize(
    ("bits", "seen"), [(0xFF, "an id that is no class"), (None, "a file that was cut")]
)
@pytest.mark.parametrize("times", [True, False])
def test_a_run_over_a_cache_that_changes_stops_and_names_the_file(
    bits: int | None, seen: str, times: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump_teacher(
        teacher=mlp(),
        data=Points(200),
        out=tmp_path / "c",
        k=4,
        values="float32",
        records_per_shard=50,
        device="cpu",
    )
    with kdcache.open(tmp_path / "c") as cache:
        if not times:  # of a file system that tells none
            monkeypatch.setattr(mapping, "signature", lambda path: None)
        victim = files(tmp_path / "c")[2]
        at, length = column_place(tmp_path / "c", 2, "ids_4")

        def harm(info: StepInfo) -> None:
            if info.step == 3:
                if bits is None:
                    victim.chmod(0o644)
                    os.truncate(victim, 64)
                else:
                    overwrite(victim, at, bytes([bits]) * length)

        with pytest.raises(
            CacheCorrupt, match=rf"{victim.name}.*the dump-teacher command"
        ) as caught:
            kdcache.train_student(
                student=mlp(),
                data=Points(200),
                cache=cache,
                out=tmp_path / "r",
                epochs=30,
                batch_size=20,
                temperature=1,
                device="cpu",
                on_step=harm,
            )
        assert "\n" not in str(caught.value), seen


def test_a_loss_that_is_no_number_is_not_blamed_on_the_rate_where_bytes_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "signature", lambda path: None)
    dump_teacher(
        teacher=mlp(),
        data=Points(200),
        out=tmp_path / "c",
        k=4,
        values="float32",
        records_per_shard=50,
        device="cpu",
    )
    options = {
        "student": mlp(),
        "data": Points(200),
        "cache": tmp_path / "c",
        "epochs": 30,
        "batch_size": 20,
        "temperature": 1,
        "device": "cpu",
    }
    victim = files(tmp_path / "c")[1]
    at, length = column_place(tmp_path / "c", 1, "tail_lse")
    good = victim.read_bytes()[at : at + length]

    def harm(info: StepInfo) -> None:
        if info.step == 3:
            overwrite(victim, at, b"\xff" * length)  # NaN

    with pytest.raises(
        CacheCorrupt, match=rf"{victim.name}: column tail_lse.*the dump-teacher command"
    ):
        kdcache.train_student(**options, out=tmp_path / "r", on_step=harm)
    overwrite(victim, at, good)
    with pytest.raises(KDCacheError, match="training has diverged: take a lower lr"):
        kdcache.train_student(**options, out=tmp_path / "s", lr=1e30, optimizer="sgd")
