"""The commit protocol under fire: killed at every step, raced, out of disk; the result is always the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from strategies import CONTAINERS, IDENTITY, image_spec, make_columns, make_measured, token_spec, tree, write_cache

import kdcache
from kdcache.cache import store
from kdcache.cache.identity import Identity
from kdcache.cache.store import TEMPORARY, Directory
from kdcache.cache.writer import create
from kdcache.errors import (
    CacheCorrupt,
    CacheExists,
    CacheIncomplete,
    DataError,
    IdentityMismatch,
    KDCacheError,
    SpecMismatch,
    UsageError,
)

SPEC = token_spec(samples=(0, 5))           # shards of 3 and 2 records


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory: the tests that sync thousands of times."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def forked(*work: Callable[[], object]) -> list[int]:
    """Run each callable in a child of its own, at once; their wait statuses. Threads of libraries are idle by then."""
    children = []
    for run in work:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            status = 1
            try:
                run()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def dump(path: Path, container: str, backwards: bool = False) -> None:
    with create(path, SPEC, IDENTITY, container=container, recorded={"numpy": "0"}) as writer:
        for shard in sorted(writer.missing(), reverse=backwards):
            writer.write(shard, make_columns(SPEC, shard), make_measured(SPEC, shard))


def stop_at(step: int, stop: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Call `stop` before the file operation number `step`; the list of all operations so far."""
    seen: list[str] = []

    def hook(name: str) -> None:
        seen.append(name)
        if len(seen) > step:
            stop(name)

    monkeypatch.setattr(Directory, "step", staticmethod(hook))
    return seen


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def never(name: str) -> None:
    pass


def temporaries(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.name.startswith(TEMPORARY)]


@pytest.mark.parametrize("container", CONTAINERS)
def test_killed_at_every_step_and_resumed(container: str, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stop_at(10**9, never, monkeypatch)
    dump(fast / "whole", container)
    steps, whole = list(seen), tree(fast / "whole")
    assert {"mkdir", "create", "write", "sync", "link", "unlink", "sync_folder"} == set(steps) and len(steps) > 40
    for at in range(len(steps)):
        path = fast / str(at)
        stop_at(at, kill, monkeypatch)
        [status] = forked(lambda path=path: dump(path, container))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found = tree(path)
        assert all(whole[name] == content for name, content in found.items() if TEMPORARY not in name)
        if "header.json" in found:
            with pytest.raises(CacheIncomplete) if "manifest/00000001.json" not in found else kdcache.open(path):
                kdcache.open(path)
        stop_at(0, never, monkeypatch)
        if at % 2:
            dump(path, container)
        else:
            statuses = forked(lambda path=path: dump(path, container), lambda path=path: dump(path, container, True))
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
    """Writers whose teachers differ in the last bit: one wins each shard, and nothing of the others stays."""
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
            assert any(np.array_equal(values, make_columns(spec, shard, seed)["values"]) for seed in range(3))
    assert len(tree(fast / "c/data")) == spec.num_shards and not temporaries(fast / "c")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_failing_disk_leaves_a_resumable_cache(container: str, code: int, fast: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(code, os.strerror(code))

    seen = stop_at(10**9, never, monkeypatch)
    dump(fast / "whole", container)
    steps, whole = len(seen), tree(fast / "whole")
    said = {errno.ENOSPC: "disk full .* free space and run the same command again",
            errno.EDQUOT: "disk full", errno.EIO: "Input/output error", errno.EACCES: "not allowed"}[code]
    for at in range(0, steps, 1 if code == errno.ENOSPC else 7):
        path = fast / str(at)
        stop_at(at, fail, monkeypatch)
        with pytest.raises(KDCacheError, match=said) as caught:
            dump(path, container)
        assert type(caught.value) is KDCacheError and "\n" not in str(caught.value)
        if "writing shard" in str(caught.value):
            assert " of 2 shards are committed" in str(caught.value)
        found = tree(path) if path.exists() else {}
        assert all(whole[name] == content for name, content in found.items()), "half a file, or a temporary"
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
    assert {n: c for n, c in tree(fast / "c").items() if "data/" in n} == \
        {n: c for n, c in tree(fast / "d").items() if "data/" in n}


def test_an_exception_never_seals(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), create(tmp_path / "c", SPEC, IDENTITY) as writer:
        for shard in writer.missing():
            writer.write(shard, make_columns(SPEC, shard))
        raise ZeroDivisionError
    assert not tree(tmp_path / "c/manifest")
    with pytest.raises(CacheIncomplete, match="2 of 2 shards are committed and it is not sealed"):
        kdcache.open(tmp_path / "c")
    with create(tmp_path / "c", SPEC, IDENTITY) as writer:
        assert writer.missing() == []
    assert kdcache.open(tmp_path / "c").content_id


def test_seal_wants_every_shard(tmp_path: Path) -> None:
    with create(tmp_path / "c", SPEC, IDENTITY) as writer:
        writer.write(1, make_columns(SPEC, 1))
        with pytest.raises(CacheIncomplete, match="1 of 2 shards are missing: 0;"):
            writer.seal()
    assert not tree(tmp_path / "c/manifest")
    with pytest.raises(UsageError, match="closed"):
        writer.write(0, make_columns(SPEC, 0))


def test_writing_a_shard_again_changes_nothing(tmp_path: Path) -> None:
    dump(tmp_path / "c", "arrow")
    before = tree(tmp_path / "c")
    with create(tmp_path / "c", SPEC, IDENTITY) as writer:
        writer.write(0, make_columns(SPEC, 0, seed=9), {"other": 1.0})
    assert tree(tmp_path / "c") == before


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["data", "commit", "manifest"])
def test_damage_to_a_sealed_cache_is_repaired_in_place(name: str, tmp_path: Path) -> None:
    dump(tmp_path / "c", "arrow")
    before = tree(tmp_path / "c")
    flip(sorted((tmp_path / "c" / name).iterdir())[0], 700)
    with pytest.raises(CacheCorrupt):
        kdcache.open(tmp_path / "c").read(np.arange(5))
    dump(tmp_path / "c", "arrow")
    after = tree(tmp_path / "c")
    assert {n: c for n, c in after.items() if not n.startswith("quarantine/")} == before
    assert any(n.startswith("quarantine/") for n in after)
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.check_all() == [] and cache.generation == 1
        assert any("quarantine" in note for note in cache.notes())


def test_a_repair_with_other_numbers_is_a_new_generation(tmp_path: Path) -> None:
    path = tmp_path / "c"
    dump(path, "arrow")
    with kdcache.open(path) as cache:
        old, first = cache.content_id, (path / "manifest/00000001.json").read_bytes()
    sorted((path / "data").iterdir())[0].unlink()
    with create(path, SPEC, IDENTITY) as writer:
        assert writer.missing() == [0]
        writer.write(0, make_columns(SPEC, 0, seed=1))
    with kdcache.open(path) as cache:
        assert cache.generation == 2 and cache.content_id != old and cache.check_all() == []
    assert (path / "manifest/00000001.json").read_bytes() == first
    flip(path / "manifest/00000001.json", 50)
    with pytest.raises(CacheCorrupt, match=r"00000001\.json"):
        kdcache.open(path)
    with create(path, SPEC, IDENTITY) as writer:
        assert writer.missing() == []
    with kdcache.open(path) as cache:
        assert cache.generation == 1 and cache.check_all() == []


def test_resume_puts_aside_what_it_does_not_understand(tmp_path: Path) -> None:
    path = tmp_path / "c"
    dump(path, "arrow")
    before = tree(path)
    for name in ("data/notes.txt", "data/00000000-" + "0" * 32 + ".arrow", "commit/00000009.json", "manifest/x",
                 f"data/{TEMPORARY}0123"):
        (path / name).write_bytes(b"what is this")
    dump(path, "arrow")
    after = tree(path)
    assert {n: c for n, c in after.items() if not n.startswith("quarantine/")} == before
    assert sorted(n for n in after if n not in before) == [
        "quarantine/commit-00000009.json", "quarantine/data-00000000-" + "0" * 32 + ".arrow",
        "quarantine/data-notes.txt", "quarantine/manifest-x"]


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


def test_a_temporary_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert forked(*(lambda path=path, i=i: dump(path, "arrow", bool(i % 2)) for i in range(3))) == [0] * 3
        assert len(tree(path)) == 2 + 2 * SPEC.num_shards


def test_create_refuses_other_caches_and_other_things(tmp_path: Path) -> None:
    path = tmp_path / "c"
    dump(path, "arrow")
    before = tree(path)
    with pytest.raises(SpecMismatch, match=r"spec.tiers.*\n.*spec.values"):
        create(path, token_spec(samples=(0, 5), tiers=(2, 6), values="float16"), IDENTITY)
    with pytest.raises(SpecMismatch, match="container: cache has 'arrow', given is 'hdf5'"):
        create(path, SPEC, IDENTITY, container="hdf5")
    other = Identity(data={**IDENTITY.data, "revision": "2"}, teacher={**IDENTITY.teacher, "dtype": "bfloat16"})
    with pytest.raises(IdentityMismatch) as caught:
        create(path, SPEC, other)
    assert [d.field for d in caught.value.fields] == ["data.revision", "teacher.dtype"]
    create(path, SPEC, IDENTITY, recorded={"numpy": "another version"}).close()
    assert tree(path) == before
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.txt").write_text("dear")
    with pytest.raises(CacheExists, match=r"thesis\.txt"):
        create(tmp_path / "d", SPEC, IDENTITY)
    with pytest.raises(CacheExists, match="a file stands"):
        create(tmp_path / "d/thesis.txt", SPEC, IDENTITY)
    with pytest.raises(UsageError, match="did you mean 'arrow'"):
        create(tmp_path / "e", SPEC, IDENTITY, container="arow")
    with pytest.raises(UsageError, match="take larger shards"):
        create(tmp_path / "e", image_spec(samples=(0, 2**40), records_per_shard=1), IDENTITY)
    assert not (tmp_path / "e").exists() and sorted(tree(tmp_path / "d")) == ["thesis.txt"]


def test_a_damaged_header_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "c"
    dump(path, "arrow")
    flip(path / "header.json", 100)
    before = tree(path)
    with pytest.raises(CacheCorrupt, match=r"header\.json"):
        dump(path, "arrow")
    assert tree(path) == before
    (path / "header.json").unlink()
    with pytest.raises(CacheCorrupt, match="missing, but commit/ holds"):
        dump(path, "arrow")
    with pytest.raises(CacheCorrupt, match=r"header\.json: missing"):
        kdcache.open(path)
    create(tmp_path / "d", SPEC, IDENTITY).close()
    flip(tmp_path / "d/header.json", 100)               # nothing committed: a torn header is put aside
    dump(tmp_path / "d", "arrow")
    assert "quarantine/header.json" in tree(tmp_path / "d")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(KDCacheError, match="not allowed while creating the cache"):
        create(tmp_path / "c", SPEC, IDENTITY)


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP])
@pytest.mark.parametrize("rename", [True, False])
def test_file_systems_without_hard_links(refusal: int, rename: bool, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_link_whose_answer_was_lost_has_succeeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_name_that_cannot_be_freed_ends_in_an_error(tmp_path: Path) -> None:
    with create(tmp_path / "c", SPEC, IDENTITY) as writer:
        (tmp_path / "c/commit/00000000.json").symlink_to(tmp_path / "nowhere")
        with pytest.raises(KDCacheError, match="a bad commit record keeps this name"):
            writer.write(0, make_columns(SPEC, 0))


def test_bytes_that_did_not_arrive_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that answers well and keeps something else: found by reading back, before anything is committed."""
    real = os.write

    def lossy(fd: int, data: memoryview) -> int:
        block = bytearray(data)
        if len(block) > 40:
            block[20] ^= 16
        return real(fd, block)

    with create(tmp_path / "c", image_spec(num_classes=100), IDENTITY) as writer:
        monkeypatch.setattr(os, "write", lossy)
        with pytest.raises((KDCacheError, ValueError, OSError)):
            writer.write(0, make_columns(image_spec(num_classes=100), 0))
        monkeypatch.undo()
    assert set(tree(tmp_path / "c")) == {"header.json"}


def test_measured_are_sums_over_shards(tmp_path: Path) -> None:
    dump(tmp_path / "c", "arrow")
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.measured == {"rows": 3.0, "kl:1": 0.1 + 0.2, "odd": 2e-300}
    with create(tmp_path / "d", SPEC, IDENTITY) as writer:
        writer.write(0, make_columns(SPEC, 0), {"a": float("inf"), "b": 1e308, "c": float("nan")})
        writer.write(1, make_columns(SPEC, 1), {"a": float("-inf"), "b": 1e308})
    with kdcache.open(tmp_path / "d") as cache:
        assert cache.measured["b"] == float("inf") and np.isnan([cache.measured["a"], cache.measured["c"]]).all()


def test_data_errors_leave_the_cache_resumable(tmp_path: Path) -> None:
    with pytest.raises(DataError), create(tmp_path / "c", image_spec(), IDENTITY) as writer:
        columns = make_columns(image_spec(), 0)
        columns["max"][0] = np.nan
        writer.write(0, columns)
    write_cache(tmp_path / "c", image_spec())
