"""Everything that can be checked about a cache without its teacher: every byte, every promise, every file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kdcache.cache import repair
from kdcache.cache.catalog import HEADER, Header, Manifest, commit_name
from kdcache.cache.rawmap import Facts, column_names
from kdcache.cache.shard import Shard
from kdcache.cache.store import QUARANTINE, TEMPORARY, Directory
from kdcache.errors import KDCacheError


def check_all(directory: Directory, header: Header, manifest: Manifest | None,
              progress: Callable[[int, int], None] | None = None) -> list[str]:
    """What is wrong, a line each; lines that start with `note:` are no damage."""
    found: list[str] = []
    used: set[str] = set()
    total = header.spec.num_shards
    for shard in range(total):
        found += _check_shard(directory, header, manifest, shard, used)
        if progress is not None:
            progress(shard + 1, total)
    try:
        chain = repair.read_manifests(directory, header)
        if manifest is not None and (len(chain) != manifest.generation or chain[-1].digest != manifest.digest):
            found.append(f"note: {directory.full('manifest')}: another manifest was sealed since the cache was opened")
        if manifest is None and not chain:
            found.append(f"{directory.path}: not sealed")
    except (KDCacheError, OSError) as e:
        found.append(str(e))
    return found + list(_check_folders(directory, used))


def _check_shard(directory: Directory, header: Header, manifest: Manifest | None, shard: int,
                 used: set[str]) -> Iterator[str]:
    where = directory.full(commit_name(shard))
    committed: Facts | None = None
    try:
        committed = repair.read_commit(directory, header, shard)
        if committed is None:
            yield f"{where}: shard {shard} is not committed"
    except (KDCacheError, OSError) as e:
        yield str(e)
    try:
        promised = manifest.facts(shard) if manifest else committed
    except KDCacheError as e:
        yield str(e)
        return
    if promised is None:
        return
    used.add(promised.file)
    if committed and manifest and (committed.commit != promised.commit or _plain(committed) != _plain(promised)):
        yield f"{where}: the commit record and the manifest disagree about shard {shard}"
    opened = Shard(directory, header, promised)
    bad = False
    for name in column_names(header.spec):
        try:
            opened.get([name])
        except (KDCacheError, OSError) as e:
            bad = True
            yield str(e)
            if f"column {name}" not in str(e):      # the file itself: every column would say the same
                break
    if not bad:
        try:
            repair.prove(directory, promised)
        except (KDCacheError, OSError) as e:
            yield str(e)


def _plain(facts: Facts) -> tuple[object, ...]:
    return (facts.file, facts.size, facts.file_digest, facts.rest_digest, facts.records, facts.rows, facts.columns)


def _check_folders(directory: Directory, used: set[str]) -> Iterator[str]:
    """Files that no promise accounts for."""
    for name in directory.names():
        if name not in (HEADER, QUARANTINE, *repair.FOLDERS):
            yield f"{directory.full(name)}: not a file of this cache"
    for name in directory.names("data"):
        if name not in used:
            yield from _stray(directory, f"data/{name}", "no commit record names this file")
    for folder in ("commit", "manifest"):
        for name in directory.names(folder):
            if not repair.NUMBERED.fullmatch(name):
                yield from _stray(directory, f"{folder}/{name}", "not a file of this cache")
    for name in directory.names(QUARANTINE):
        yield f"note: {directory.full(f'{QUARANTINE}/{name}')}: put aside by an earlier repair; may be deleted"


def _stray(directory: Directory, name: str, why: str) -> Iterator[str]:
    if name.split("/")[-1].startswith(TEMPORARY):
        yield f"note: {directory.full(name)}: temporary file of a dump that runs or was killed"
    else:
        yield f"{directory.full(name)}: {why}"
