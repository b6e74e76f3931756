"""Starting, continuing, sealing and repairing a cache, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from faults import SPEC, dump, forked
from strategies import CONTAINERS, IDENTITY, image_spec, make_columns, token_spec, tree, write_cache

import kdcache
from kdcache.cache import repair
from kdcache.cache.identity import Identity
from kdcache.cache.store import TEMPORARY, Directory
from kdcache.cache.writer import create, existing_header
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


def test_processes_share_the_proving_of_a_continued_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads the files of its own part; damage anywhere is found by the rank whose part it is
    in.
    """
    spec, path, read = image_spec(samples=(0, 40), records_per_shard=5), tmp_path / "c", []
    write_cache(path, spec)
    files = sorted(p.name for p in (path / "data").iterdir())
    real = repair.map_file
    monkeypatch.setattr(
        repair, "map_file", lambda name, *size: (read.append(Path(name).name), real(name, *size))[1]
    )
    ranks = [create(path, spec, IDENTITY, share=(rank, 3)) for rank in range(3)]
    assert read == [f for rank in range(3) for f in files[rank::3]] and [
        w.missing() for w in ranks
    ] == [[], [], []]
    flip(path / "data" / files[4], 700)  # for rank 1 alone to see
    os.truncate(path / "data" / files[5], 100)  # for all of them
    assert create(path, spec, IDENTITY, share=(0, 3)).missing() == [5]
    assert create(path, spec, IDENTITY, share=(1, 3)).missing() == [4, 5]
    write_cache(path, spec)
    with kdcache.open(path) as cache:
        assert cache.check_all() == []


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
    for name in (
        "data/notes.txt",
        "data/00000000-" + "0" * 32 + ".arrow",
        "commit/00000009.json",
        "manifest/x",
        f"data/{TEMPORARY}0123",
    ):
        (path / name).write_bytes(b"what is this")
    dump(path, "arrow")
    after = tree(path)
    assert {n: c for n, c in after.items() if not n.startswith("quarantine/")} == before
    assert sorted(n for n in after if n not in before) == [
        "quarantine/commit-00000009.json",
        "quarantine/data-00000000-" + "0" * 32 + ".arrow",
        "quarantine/data-notes.txt",
        "quarantine/manifest-x",
    ]


def test_create_refuses_other_caches_and_other_things(tmp_path: Path) -> None:
    path = tmp_path / "c"
    dump(path, "arrow")
    before = tree(path)
    with pytest.raises(SpecMismatch, match=r"spec.tiers.*\n.*spec.values"):
        create(path, token_spec(samples=(0, 5), tiers=(2, 6), values="float16"), IDENTITY)
    with pytest.raises(SpecMismatch, match="container: cache has 'arrow', given is 'hdf5'"):
        create(path, SPEC, IDENTITY, container="hdf5")
    other = Identity(
        data={**IDENTITY.data, "revision": "2"}, teacher={**IDENTITY.teacher, "dtype": "bfloat16"}
    )
    with pytest.raises(IdentityMismatch) as caught:
        create(path, SPEC, other)
    assert [d.field for d in caught.value.fields] == ["data.revision", "teacher.dtype"]
    with pytest.raises(
        SpecMismatch, match=r"spec.samples: .*\n  data.revision: .*\n  teacher.dtype: "
    ):
        create(path, token_spec(samples=(0, 6)), other)
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
    # nothing committed: a torn header is put aside
    flip(tmp_path / "d/header.json", 100)
    dump(tmp_path / "d", "arrow")
    assert "quarantine/header.json" in tree(tmp_path / "d")


def test_a_header_without_a_shard_blocks_nobody_but_those_at_work(tmp_path: Path) -> None:
    path, other = tmp_path / "c", token_spec(samples=(0, 5), tiers=(2, 6), values="float16")
    with create(path, SPEC, IDENTITY) as alive:
        for spec, container in ((other, "arrow"), (SPEC, "hdf5")):
            assert existing_header(path) is not None
            with pytest.raises(SpecMismatch, match="another dump into it seems to be alive"):
                create(path, spec, IDENTITY, container=container)
        # of the same cache: they agree
        with create(path, SPEC, IDENTITY, recorded={"a": "1"}) as second:
            assert second._header.digest == alive._header.digest
        context = multiprocessing.get_context("fork")
        begun = context.Event()
        worker = context.Process(target=lambda: (begun.set(), time.sleep(60)))
        worker.start()  # it outlives its parent's writer
        assert begun.wait(60)  # and has closed, as any child does first, what it inherited
    assert existing_header(path) is None
    with create(path, other, IDENTITY, container="hdf5", recorded={"a": "2"}) as writer:
        worker.kill()
        worker.join()
        writer.write(0, make_columns(other, 0))
    with pytest.raises(SpecMismatch) as caught:
        create(path, SPEC, IDENTITY)
    assert "seems to be alive" not in str(caught.value)
    with kdcache.open(path, allow_partial=True) as cache:
        assert cache.recorded == {"a": "2"} and cache.container == "hdf5"
    assert not [name for name in tree(path) if "quarantine" in name]


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    dump(tmp_path / "c", "arrow")
    (tmp_path / "open").mkdir(mode=0o555)

    def unprivileged() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        for path in (tmp_path / "d", tmp_path / "open/c"):
            with pytest.raises(
                KDCacheError, match="not allowed while creating the cache"
            ) as caught:
                create(path, SPEC, IDENTITY)
            assert "\n" not in str(caught.value)

    assert forked(unprivileged) == [0]


def test_a_name_that_cannot_be_freed_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with create(tmp_path / "c", SPEC, IDENTITY) as writer:
        (tmp_path / "c/commit/00000000.json").symlink_to(tmp_path / "nowhere")
        monkeypatch.setattr(Directory, "quarantine", lambda *_: False)
        with pytest.raises(KDCacheError, match="a bad commit record keeps this name"):
            writer.write(0, make_columns(SPEC, 0))


def test_bytes_that_did_not_arrive_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that answers well and keeps something else: found by reading back, before anything is
    committed.
    """
    spec, real = image_spec(num_classes=100), os.write
    columns = make_columns(spec, 0)

    def lossy(fd: int, data: memoryview) -> int:
        block = bytearray(data)
        if (len(block) == columns["values"].nbytes) == of_a_column:
            block[min(len(block), 20) - 1] ^= 16
        return real(fd, block)

    for container in CONTAINERS:
        for of_a_column in (True, False):
            path = tmp_path / f"{container}-{of_a_column}"
            with create(path, spec, IDENTITY, container=container) as writer:
                monkeypatch.setattr(os, "write", lossy)
                with pytest.raises(KDCacheError, match=r"is not what was written.*0 of 4 shards"):
                    writer.write(0, columns)
                monkeypatch.undo()
            assert set(tree(path)) == {"header.json"}


def test_measured_are_sums_over_shards(tmp_path: Path) -> None:
    dump(tmp_path / "c", "arrow")
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.measured == {"rows": 3.0, "kl:1": 0.1 + 0.2, "odd": 2e-300}
    with create(tmp_path / "d", SPEC, IDENTITY) as writer:
        writer.write(0, make_columns(SPEC, 0), {"a": float("inf"), "b": 1e308, "c": float("nan")})
        writer.write(1, make_columns(SPEC, 1), {"a": float("-inf"), "b": 1e308})
    with kdcache.open(tmp_path / "d") as cache:
        assert (
            cache.measured["b"] == float("inf")
            and np.isnan([cache.measured["a"], cache.measured["c"]]).all()
        )


def test_data_errors_leave_the_cache_resumable(tmp_path: Path) -> None:
    with pytest.raises(DataError), create(tmp_path / "c", image_spec(), IDENTITY) as writer:
        columns = make_columns(image_spec(), 0)
        columns["max"][0] = np.nan
        writer.write(0, columns)
    write_cache(tmp_path / "c", image_spec())
