"""What stands in a cache's folder, judged: proven commits are kept, everything torn or foreign goes
to quarantine.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from kdcache.cache import catalog
from kdcache.cache.catalog import Header, Manifest, commit_name, manifest_name
from kdcache.cache.mapping import map_file
from kdcache.cache.rawmap import Facts, digest
from kdcache.cache.store import TEMPORARY, Directory
from kdcache.errors import CacheCorrupt, UsageError

FOLDERS = ("data", "commit", "manifest")
NUMBERED = re.compile(r"(\d{8})\.json")
MEND = (
    "the dump-teacher command that made the cache, given again, puts the bad files aside and "
    "writes only them anew"
)
BESIDE = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors)([._-].*)?", re.I
)
SHARD_FILE = re.compile(r"(\d{8})-([0-9a-f]{32})\.(arrow|h5)")


@contextlib.contextmanager
def mendable() -> Iterator[None]:
    """What is found corrupt while a cache with a good header is read is said with what mends it."""
    try:
        yield
    except CacheCorrupt as e:
        if MEND in str(e):
            raise
        raise CacheCorrupt(f"{e}; {MEND}") from e


def outside_caches(path: str | os.PathLike[str]) -> None:
    """UsageError if `path` lies in the folder of a cache: a file there that no promise accounts for
    is damage to it.
    """
    for above in Path(os.path.realpath(path)).parents:
        if (above / catalog.HEADER).is_file() and (above / "commit").is_dir():
            raise UsageError(
                f"{path}: lies inside the cache {above}, whose repair would put it aside; choose a "
                "place outside of it"
            )


def read_commit(directory: Directory, header: Header, shard: int) -> Facts | None:
    """The facts of a committed shard, None if it is not committed; CacheCorrupt for a record that
    cannot be true.
    """
    name = commit_name(shard)
    data = directory.read(name, catalog.commit_limit(header.spec))
    return None if data is None else catalog.parse_commit(data, directory.full(name), header, shard)


def prove(directory: Directory, facts: Facts) -> None:
    """CacheCorrupt unless the file of a shard is there, whole, with every byte as promised."""
    path = directory.full(f"data/{facts.file}")
    try:
        data = map_file(path, facts.size)
    except FileNotFoundError as e:
        raise CacheCorrupt(f"{path}: the file of shard {facts.shard} is missing") from e
    found = digest(data)
    if found != facts.file_digest:
        raise CacheCorrupt(
            f"{path}: its digest is {found}, the commit record says {facts.file_digest}"
        )


def anything_committed(directory: Directory) -> bool:
    """Whether a file of a shard or a manifest is there, good or bad: the header is then a promise
    that was used.
    """
    return any(not name.startswith(".") for folder in FOLDERS for name in directory.names(folder))


def let_be(name: str, folder: str = "") -> bool:
    """Whether a name is none of a cache's, but of what people and tools put beside its files:
    nobody reads it as part of the cache, and it is no damage."""
    hidden = name.startswith(".") and not name.startswith(TEMPORARY)
    return hidden or (not folder and BESIDE.fullmatch(name) is not None)


def proven(directory: Directory, header: Header, shard: int) -> Facts | None:
    """The facts of a committed shard after reading all of its file; None if it is not committed, or
    wrongly.
    """
    try:
        facts = read_commit(directory, header, shard)
        if facts is not None:
            prove(directory, facts)
        return facts
    except CacheCorrupt:
        return None


def remove_bad_commit(directory: Directory, header: Header, shard: int) -> None:
    """Quarantine the commit record of a shard, and then its file, if they do not prove each other."""
    try:
        facts = read_commit(directory, header, shard)
    except CacheCorrupt:
        facts = None
    directory.quarantine(commit_name(shard), lambda: proven(directory, header, shard) is None)
    if facts is not None:
        remove_bad_file(directory, facts.file)


def remove_bad_file(directory: Directory, name: str) -> None:
    """Quarantine a shard file that is not what its name says."""
    path = directory.full(f"data/{name}")

    def bad() -> bool:
        match = SHARD_FILE.fullmatch(name)
        try:
            return match is None or digest(map_file(path)) != match[2]
        except (CacheCorrupt, FileNotFoundError):
            return True

    directory.quarantine(f"data/{name}", bad)


def in_place(directory: Directory, header: Header, shard: int) -> Facts | None:
    """The facts of a committed shard whose file has its size, without reading the file; None if it
    is not so.
    """
    try:
        facts = read_commit(directory, header, shard)
    except CacheCorrupt:
        return None
    return (
        facts if facts is not None and directory.size(f"data/{facts.file}") == facts.size else None
    )


def sweep(directory: Directory, header: Header, share: tuple[int, int] = (0, 1)) -> None:
    """Make a cache fit to be continued: dead temporaries deleted, whatever is torn or not
    understood in quarantine.

    Committed files are read and proven where shard % world == rank, for `share` = (rank, world); of
    the others, which another rank proves at the same time, only the size is looked at.
    """
    rank, world = share
    for folder in FOLDERS:
        directory.drop_dead_temporaries(folder)
    for name in directory.names("commit"):
        match = NUMBERED.fullmatch(name)
        if match and int(match[1]) < header.spec.num_shards:
            shard = int(match[1])
            good = (
                proven(directory, header, shard)
                if shard % world == rank
                else in_place(directory, header, shard)
            )
            if not good:
                remove_bad_commit(directory, header, shard)
        elif not name.startswith("."):
            directory.quarantine(f"commit/{name}", lambda: True)
    for name in directory.names("data"):
        match = SHARD_FILE.fullmatch(name)
        ours = (
            match
            and int(match[1]) < header.spec.num_shards
            and match[3] == catalog.SUFFIXES[header.container]
        )
        if not ours and not name.startswith("."):
            directory.quarantine(f"data/{name}", lambda: True)
    _sweep_manifests(directory, header)


def _sweep_manifests(directory: Directory, header: Header) -> None:
    # A manifest names its parent: from the first bad one on, none can stand.
    good = len(_chain(directory, header, len(directory.names("manifest")))[0])
    for name in directory.names("manifest"):
        match = NUMBERED.fullmatch(name)
        if not (match and 1 <= int(match[1]) <= good) and not name.startswith("."):
            directory.quarantine(
                f"manifest/{name}", partial(_manifest_is_bad, directory, header, name)
            )


def _manifest_is_bad(directory: Directory, header: Header, name: str) -> bool:
    match = NUMBERED.fullmatch(name)
    if match is None:
        return True
    try:
        return len(read_manifests(directory, header, last=int(match[1]))) < int(match[1])
    except CacheCorrupt:
        return True


def read_manifests(directory: Directory, header: Header, last: int | None = None) -> list[Manifest]:
    """The chain of manifests, up to generation `last`; CacheCorrupt if one is bad, of another cache
    or missing.
    """
    numbers = [int(m[1]) for m in map(NUMBERED.fullmatch, directory.names("manifest")) if m]
    top = max(numbers, default=0) if last is None else last
    if top > len(numbers):
        raise CacheCorrupt(
            f"{directory.full('manifest')}: has {len(numbers)} manifests, the last is numbered "
            f"{top}"
        )
    chain, wrong = _chain(directory, header, top)
    if wrong is not None:
        raise wrong
    return chain


def _chain(
    directory: Directory, header: Header, top: int
) -> tuple[list[Manifest], CacheCorrupt | None]:
    """The manifests from the first up to `top`, as far as they are good, and what is wrong with the
    next. Only the last has its body: what came before was only repaired."""
    chain: list[Manifest] = []
    limit = catalog.manifest_limit(header.spec)
    for generation in range(1, top + 1):
        name = manifest_name(generation)
        parent = chain[-1].digest if chain else None
        try:
            data = directory.read(name, limit)
            if data is None:
                raise CacheCorrupt(
                    f"{directory.full(name)}: missing; the manifest after it names it as its parent"
                )
            found = catalog.parse_manifest(data, directory.full(name), header, generation, parent)
        except CacheCorrupt as e:
            return chain, e
        if chain:
            chain[-1] = replace(chain[-1], body={})
        chain.append(found)
    return chain, None
