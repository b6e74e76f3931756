"""Names that are there and lead to no file, files of others, and files that may not be read."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import SPEC, dump, forked
from strategies import IDENTITY, tree

import kdcache
from kdcache.cache.audit import UNREAD
from kdcache.cache.writer import create
from kdcache.errors import CacheCorrupt, KDCacheError
from kdcache.teacher.verify import verify


def listen(path: Path) -> None:
    """A socket; its address may have 107 bytes."""
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def damaged_elsewhere(path: Path) -> None:
    other = path.parent.parent.parent / f"elsewhere-{path.name}"
    other.write_bytes(b"x" * 100)
    path.symlink_to(other)


ODD: dict[str, Callable[[Path], None]] = {
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link in a circle": lambda path: path.symlink_to(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to a folder": lambda path: path.symlink_to("/tmp"),
    "a socket": listen,
    "a link to a bad file": damaged_elsewhere,
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("container", ["arrow", "hdf5"])
def test_whatever_has_the_name_of_a_file_is_found_and_mended(
    kind: str, container: str, tmp_path: Path
) -> None:
    dump(tmp_path / "whole", container)
    before = tree(tmp_path / "whole")
    file = next(name for name in before if name.startswith("data/"))
    for number, name in enumerate(
        (
            file,
            "commit/00000001.json",
            "manifest/00000001.json",
            "data/.tmp-x",
            "commit/.tmp-x",
            ".tmp-x",
        )
    ):
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", path)
        (path / name).unlink(missing_ok=True)
        ODD[kind](path / name)
        found = verify(path).problems
        assert any(name in problem for problem in found), (name, found)
        assert not verify(path, quick=True).ok, name
        dump(path, container)
        with kdcache.open(path) as cache:
            assert cache.check_all() == []
        aside = {p.name for p in (path / "quarantine").iterdir()}
        # A commit record that proves nothing goes with its file.
        assert aside - {"commit-00000000.json"} == {name.replace("/", "-")}
        shutil.rmtree(path / "quarantine")
        assert tree(path) == before


@pytest.mark.parametrize(
    "kind", [kind for kind in ODD if kind not in ("a folder", "a link to a folder")]
)
def test_whatever_has_the_name_of_a_folder_or_of_the_header_is_refused_by_name(
    kind: str, tmp_path: Path
) -> None:
    for name in ("data", "commit", "manifest", "header.json"):
        path = tmp_path / name
        dump(path, "arrow")
        shutil.move(path / name, tmp_path / f"{name}-away")
        ODD[kind](path / name)
        said = ["; ".join(verify(path).problems)]
        for use in (
            lambda path: create(path, SPEC, IDENTITY),
            lambda path: kdcache.open(path).check_all(),
        ):
            try:
                said.append("; ".join(use(path)))
            except KDCacheError as e:
                said.append(str(e))
        assert all(str(path / name) in text and "\n" not in text for text in said), (name, said)
        assert not (path / "quarantine").exists() and os.path.lexists(path / name)


def test_what_people_and_tools_put_beside_a_cache_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "c"
    dump(path, "arrow")
    beside = [
        "README.md",
        "README",
        "readme.txt",
        "LICENSE",
        "LICENCE.txt",
        "NOTICE",
        "CITATION.cff",
        ".gitattributes",
        ".gitignore",
        ".huggingface/x",
        ".git/config",
        ".cache/huggingface/y",
        ".DS_Store",
        "data/.DS_Store",
        "commit/.nfs0001",
        "manifest/._x",
    ]
    for name in beside:
        (path / name).parent.mkdir(exist_ok=True, parents=True)
        (path / name).write_text("x")
    report = verify(path)
    assert report.ok and verify(path, quick=True).ok
    assert sum("let be" in note for note in report.notes) == len(beside)
    dump(path, "arrow")
    assert all((path / name).exists() for name in beside) and not (path / "quarantine").exists()
    for stranger in ("thesis.txt", "data/README.md", "commit/README", "license"):
        (path / stranger).write_text("x")
        assert verify(path).ok == (stranger == "license"), stranger
        (path / stranger).unlink()


def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "c"
    dump(path, "arrow")
    before = tree(path)
    victims = [
        next(name for name in before if name.startswith("data/00000001")),
        "commit/00000000.json",
    ]

    def unprivileged() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        for name in victims:
            report = verify(path)
            assert any(f"{path / name}: {UNREAD}" in problem for problem in report.problems), (
                report.problems
            )
            assert report.advice is None
            with pytest.raises(
                KDCacheError, match="not allowed while creating the cache"
            ) as caught:
                create(path, SPEC, IDENTITY)
            assert "\n" not in str(caught.value)
            with pytest.raises(KDCacheError, match="not allowed while reading") as caught:
                kdcache.open(path).shard_columns(0)
            assert not isinstance(caught.value, CacheCorrupt)

    for parent in [tmp_path, *tmp_path.parents]:
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    tmp_path.chmod(0o777)
    for found in [path, *path.rglob("*")]:
        found.chmod(0o777 if found.is_dir() else 0o644)
    for name in victims:
        (path / name).chmod(0o000)
    assert forked(unprivileged) == [0]
    assert not (path / "quarantine").exists()
