"""Everything that can be checked about a cache without its teacher: every byte, every promise,
every file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from kdcache.cache import catalog, repair
from kdcache.cache.catalog import HEADER, Header, Manifest, commit_name
from kdcache.cache.rawmap import Facts
from kdcache.cache.shard import Shard
from kdcache.cache.store import DENIED, QUARANTINE, TEMPORARY, Directory, is_plain
from kdcache.errors import KDCacheError
from kdcache.user.code_errors import printable

UNREAD = "may not be read by this user: whether it is whole is not known; check its permissions"


def check_all(
    directory: Directory,
    header: Header,
    manifest: Manifest | None,
    progress: Callable[[int, int], None] | None = None,
    *,
    quick: bool = False,
) -> list[str]:
    """What is wrong, a line each. `quick` reads no shard file: names, sizes and the JSON files
    only.
    """
    found: list[str] = []
    used: set[str] = set()
    total = header.spec.num_shards
    for shard in range(total):
        found += _check_shard(directory, header, manifest, shard, used, quick)
        if progress is not None:
            progress(shard + 1, total)
    try:
        if (
            catalog.parse_header(directory.read(HEADER) or b"", directory.full(HEADER)).digest
            != header.digest
        ):
            found.append(f"{directory.full(HEADER)}: no longer the header that was opened")
        chain = repair.read_manifests(directory, header)
        if manifest is not None and manifest.digest not in [m.digest for m in chain]:
            found.append(
                f"{directory.full('manifest')}: no longer holds the manifest that was opened"
            )
        if not chain:
            found.append(f"{directory.path}: not sealed")
        found += _check_folders(directory, total, used)
    except (KDCacheError, OSError) as e:
        found.append(_said(e))
    return found


def _check_shard(
    directory: Directory,
    header: Header,
    manifest: Manifest | None,
    shard: int,
    used: set[str],
    quick: bool,
) -> Iterator[str]:
    where = directory.full(commit_name(shard))
    committed: Facts | None = None
    try:
        committed = repair.read_commit(directory, header, shard)
        if committed is None:
            yield f"{where}: shard {shard} is not committed"
    except (KDCacheError, OSError) as e:
        yield _said(e)
    try:
        promised = manifest.facts(shard) if manifest else committed
    except KDCacheError as e:
        yield str(e)
        return
    if promised is None:
        return
    used.add(promised.file)
    if (
        committed
        and manifest
        and (committed.commit != promised.commit or _plain(committed) != _plain(promised))
    ):
        yield f"{where}: the commit record and the manifest disagree about shard {shard}"
    if quick:
        size = directory.size(f"data/{promised.file}")
        if size != promised.size:
            found = "missing, or no plain file;" if size is None else f"has {size} bytes,"
            yield (
                f"{directory.full(f'data/{promised.file}')}: {found} expected {promised.size} bytes"
            )
        return
    yield from _check_bytes(directory, header, promised)


def _check_bytes(directory: Directory, header: Header, promised: Facts) -> Iterator[str]:
    opened = Shard(directory, header, promised)
    bad = False
    for name in header.spec.layout.names:
        try:
            opened.get([name])
        except (KDCacheError, OSError) as e:
            bad = True
            yield _said(e)
            # the file itself: every column would say the same
            if f"column {name}" not in str(e):
                break
    if not bad:
        try:
            repair.prove(directory, promised)
        except (KDCacheError, OSError) as e:
            yield _said(e)


def _said(error: Exception) -> str:
    """A problem in one line. What may not be read is not known to be damaged."""
    if isinstance(error, OSError) and error.errno in DENIED:
        return f"{error.filename}: {UNREAD} ({error.strerror})"
    return str(error)


def _plain(facts: Facts) -> tuple[object, ...]:
    return (
        facts.file,
        facts.size,
        facts.file_digest,
        facts.rest_digest,
        facts.records,
        facts.rows,
        facts.columns,
    )


def _check_folders(directory: Directory, shards: int, used: set[str]) -> Iterator[str]:
    """Files that no promise accounts for."""
    for name in directory.names():
        if name not in (HEADER, QUARANTINE, *repair.FOLDERS) and not repair.let_be(name):
            yield from _stray(directory, name, "not a file of this cache")
    for name in directory.names("data"):
        if name not in used and not repair.let_be(name, "data"):
            yield from _stray(directory, f"data/{name}", "no commit record names this file")
    for folder in ("commit", "manifest"):
        for name in directory.names(folder):
            match = repair.NUMBERED.fullmatch(name)
            if repair.let_be(name, folder):
                continue
            if not match or (folder == "commit" and int(match[1]) >= shards):
                yield from _stray(directory, f"{folder}/{name}", "not a file of this cache")


def _stray(directory: Directory, name: str, why: str) -> Iterator[str]:
    path = directory.full(name)
    if not name.split("/")[-1].startswith(TEMPORARY) or (
        os.path.lexists(path) and not is_plain(path)
    ):
        yield f"{printable(path)}: {why}"


def notes(directory: Directory) -> list[str]:
    """What is in the folder and is no damage."""
    found = [
        f"{printable(directory.full(f'{QUARANTINE}/{name}'))}: put aside by an earlier repair; may "
        "be deleted"
        for name in directory.names(QUARANTINE)
    ]
    for folder in ("", *repair.FOLDERS):
        found += [
            f"{printable(str(directory.path / folder / name))}: no file of the cache; let be"
            for name in directory.names(folder)
            if repair.let_be(name, folder)
        ]
        found += [
            f"{printable(str(directory.path / folder / name))}: temporary file of a running or "
            "killed dump"
            for name in directory.names(folder)
            if name.startswith(TEMPORARY)
        ]
    return found
