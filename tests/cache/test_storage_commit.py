"""The commit protocol under fire: killed at every step, raced, out of disk; the result is always
the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from faults import SPEC, dump, fast, forked, kill, never, stop_at, temporaries
from strategies import (
    CONTAINERS,
    IDENTITY,
    image_spec,
    make_columns,
    make_measured,
    tree,
    write_cache,
)

import kdcache
from kdcache.cache import store
from kdcache.cache.store import TEMPORARY, Directory
from kdcache.cache.writer import create
from kdcache.errors import CacheIncomplete, KDCacheError

__all__ = ["fast"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_killed_at_every_step_and_resumed(
    container: str, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stop_at(10**9, never, monkeypatch)
    dump(fast / "whole", container)
    steps, whole = list(seen), tree(fast / "whole")
    assert {"mkdir", "create", "write", "sync", "link", "unlink", "sync_folder"} == set(
        steps
    ) and len(steps) > 40
    for at in range(len(steps)):
        path = fast / str(at)
        stop_at(at, kill, monkeypatch)
        [status] = forked(lambda path=path: dump(path, container))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found = tree(path)
        assert all(
            whole[name] == content for name, content in found.items() if TEMPORARY not in name
        )
        if "header.json" in found:
            with (
                pytest.raises(CacheIncomplete)
                if "manifest/00000001.json" not in found
                else kdcache.open(path)
            ):
                kdcache.open(path)
        stop_at(0, never, monkeypatch)
        if at % 2:
            dump(path, container)
        else:
            statuses = forked(
                lambda path=path: dump(path, container),
                lambda path=path: dump(path, container, True),
            )
            assert statuses == [0, 0], at
        assert tree(path) == whole, (at, steps[at])
    with kdcache.open(fast / "0") as cache:
        assert cache.check_all() == [] and cache.notes() == []


def test_killed_twice(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump(fast / "whole", "arrow")
    stop_at(30, kill, monkeypatch)
    forked(lambda: dump(fast / "c", "arrow"))
    stop_at(12, kill, monkeypatch)
    forked(lambda: dump(fast / "c", "arrow"))
    stop_at(0, never, monkeypatch)
    dump(fast / "c", "arrow")
    assert tree(fast / "c") == tree(fast / "whole")


@pytest.mark.parametrize("container", CONTAINERS)
def test_writers_race(container: str, fast: Path) -> None:
    dump(fast / "whole", container)
    for at in range(5):
        path = fast / str(at)
        work = [lambda path=path, i=i: dump(path, container, bool(i % 2)) for i in range(4)]
        assert forked(*work) == [0] * 4
        assert tree(path) == tree(fast / "whole")


def test_writers_with_other_numbers_race_to_one_commit(fast: Path) -> None:
    """Writers whose teachers differ in the last bit: one wins each shard, and nothing of the others
    stays.
    """
    spec = image_spec(samples=(0, 24))

    def write(seed: int) -> None:
        with create(fast / "c", spec, IDENTITY) as writer:
            for shard in range(spec.num_shards):
                writer.write(shard, make_columns(spec, shard, seed))

    assert forked(*(lambda seed=seed: write(seed) for seed in range(3))) == [0, 0, 0]
    with create(fast / "c", spec, IDENTITY) as writer:
        assert writer.missing() == []
    with kdcache.open(fast / "c") as cache:
        assert cache.check_all() == [] and cache.generation == 1
        for shard in range(spec.num_shards):
            values = cache.shard_columns(shard)["values"]
            assert any(
                np.array_equal(values, make_columns(spec, shard, seed)["values"])
                for seed in range(3)
            )
    assert len(tree(fast / "c/data")) == spec.num_shards and not temporaries(fast / "c")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_failing_disk_leaves_a_resumable_cache(
    container: str, code: int, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise OSError(code, os.strerror(code))

    seen = stop_at(10**9, never, monkeypatch)
    dump(fast / "whole", container)
    steps, whole = len(seen), tree(fast / "whole")
    said = {
        errno.ENOSPC: "disk full .* free space and run the same command again",
        errno.EDQUOT: "disk full",
        errno.EIO: "Input/output error",
        errno.EACCES: "not allowed",
    }[code]
    for at in range(0, steps, 1 if code == errno.ENOSPC else 7):
        path = fast / str(at)
        stop_at(at, fail, monkeypatch)
        with pytest.raises(KDCacheError, match=said) as caught:
            dump(path, container)
        assert type(caught.value) is KDCacheError and "\n" not in str(caught.value)
        if "writing shard" in str(caught.value):
            assert " of 2 shards are committed" in str(caught.value)
        found = tree(path) if path.exists() else {}
        assert all(whole[name] == content for name, content in found.items()), (
            "half a file, or a temporary"
        )
        stop_at(0, never, monkeypatch)
        dump(path, container)
        assert tree(path) == whole


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_real_limit_on_file_size(container: str, fast: Path) -> None:
    spec = image_spec(samples=(0, 40_000), views=(0, 1), records_per_shard=20_000)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        with create(fast / "c", spec, IDENTITY, container=container) as writer:
            try:
                writer.write(0, make_columns(spec, 0))
            except KDCacheError as e:
                assert "disk full" in str(e) and "0 of 2 shards are committed" in str(e), e
            else:
                raise AssertionError("no error")

    assert forked(limited) == [0]
    assert set(tree(fast / "c")) == {"header.json"}
    write_cache(fast / "c", spec, container)
    write_cache(fast / "d", spec, container)
    assert {n: c for n, c in tree(fast / "c").items() if "data/" in n} == {
        n: c for n, c in tree(fast / "d").items() if "data/" in n
    }


def test_a_file_that_its_owner_removes_meanwhile_needs_no_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(tmp_path)
    directory.make("data")
    directory.put("data/orphan", b"x")

    def owner(name: str) -> None:
        if name == "rename":
            os.unlink(tmp_path / "data" / "orphan")

    monkeypatch.setattr(Directory, "step", staticmethod(owner))
    assert directory.quarantine("data/orphan", lambda: True) is False
    assert list((tmp_path / "quarantine").iterdir()) == []


def test_a_live_temporary_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c"
    dump(path, "arrow")
    with Directory(path).temporary("data") as live:
        live.write(b"half a shard")
        dump(path, "arrow")
        assert temporaries(path) == [Path(live.path)]
        with kdcache.open(path) as cache:
            assert cache.check_all() == [] and TEMPORARY in cache.notes()[0]
    assert temporaries(path) == []


def test_sweeping_never_takes_a_live_temporary(fast: Path) -> None:
    """One process makes files as fast as it can, two sweep as fast as they can."""
    directory = Directory(fast)
    directory.make("commit")

    def put() -> None:
        for i in range(700):
            assert directory.put(f"commit/{i:08d}.json", b"x")
        directory.put("done", b"x")

    def sweep() -> None:
        while directory.size("done") is None:
            directory.drop_dead_temporaries("commit")

    assert forked(put, sweep, sweep) == [0, 0, 0]
    assert len(directory.names("commit")) == 700


def test_a_temporary_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweeper has the lock of a file just created, and deletes it a moment later."""
    real, sweepers = store._lock, []

    def late(fd: int, how: int) -> bool:
        if not sweepers:
            path = os.readlink(f"/proc/self/fd/{fd}")
            other = os.open(path, os.O_RDONLY)
            assert real(other, fcntl.LOCK_EX)
            sweepers.append(threading.Timer(0.1, lambda: (os.unlink(path), os.close(other))))
            sweepers[0].start()
        return real(fd, how)

    monkeypatch.setattr(store, "_lock", late)
    with Directory(tmp_path).temporary("") as temporary:
        sweepers[0].join()
        assert Path(temporary.path).exists()


def test_many_start_one_cache_at_once(fast: Path) -> None:
    for at in range(15):
        path = fast / str(at)
        assert (
            forked(*(lambda path=path, i=i: dump(path, "arrow", bool(i % 2)) for i in range(3)))
            == [0] * 3
        )
        assert len(tree(path)) == 2 + 2 * SPEC.num_shards


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP])
@pytest.mark.parametrize("rename", [True, False])
def test_file_systems_without_hard_links(
    refusal: int, rename: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(tmp_path / "whole", "arrow")

    def link(*names: str) -> None:
        raise OSError(refusal, "no links here")

    monkeypatch.setattr(os, "link", link)
    if not rename:
        monkeypatch.setattr("ctypes.CDLL", lambda *a, **k: object())
    dump(tmp_path / "c", "arrow")
    dump(tmp_path / "c", "arrow")
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")
    directory = Directory(tmp_path / "c")
    assert not directory.put("commit/00000000.json", b"taken")
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")


def test_a_link_whose_answer_was_lost_has_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(tmp_path / "whole", "arrow")
    real = os.link

    def link(*names: str) -> None:
        real(*names)
        raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(os, "link", link)
    dump(tmp_path / "c", "arrow")
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")


@pytest.mark.parametrize("where", ["data", "commit"])
def test_a_bad_file_under_the_final_name_is_put_aside(where: str, tmp_path: Path) -> None:
    """A torn file appears after the sweep, where a shard is about to go."""
    dump(tmp_path / "whole", "arrow")
    name = sorted(n for n in tree(tmp_path / "whole") if n.startswith(where))[0]
    with create(tmp_path / "c", SPEC, IDENTITY, recorded={"numpy": "0"}) as writer:
        (tmp_path / "c" / name).write_bytes(tree(tmp_path / "whole")[name][:-9])
        for shard in (0, 1):
            writer.write(shard, make_columns(SPEC, shard), make_measured(SPEC, shard))
    after = tree(tmp_path / "c")
    assert {n: c for n, c in after.items() if "quarantine" not in n} == tree(tmp_path / "whole")
    assert f"quarantine/{name.replace('/', '-')}" in after
