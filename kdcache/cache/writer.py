"""Writing a cache: shards in any order, by any number of writers, each appearing whole or not at
all.

A shard counts when its commit record exists. The same command again continues: what is missing is
what has no record.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from kdcache.cache import catalog, repair
from kdcache.cache.catalog import HEADER, Header
from kdcache.cache.check import judged_with, prepare, problem
from kdcache.cache.columns import Array
from kdcache.cache.identity import Identity, difference, first_lines, require_same
from kdcache.cache.mapping import map_file
from kdcache.cache.rawmap import Facts, digest, facts_records, rest_digest, survey
from kdcache.cache.spec import CacheSpec, spec_difference
from kdcache.cache.store import QUARANTINE, TEMPORARY, Directory, Hold, as_cache_errors
from kdcache.errors import (
    CacheCorrupt,
    CacheExists,
    CacheIncomplete,
    DataError,
    KDCacheError,
    SpecMismatch,
    UsageError,
)
from kdcache.user.arguments import checked

# at a name whose file is bad, with others repairing it at the same time
ATTEMPTS = 5


@checked
def create(
    path: str | os.PathLike[str],
    spec: CacheSpec,
    identity: Identity,
    *,
    container: str = "arrow",
    recorded: dict[str, str] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Writer:
    """A writer of the cache at `path`: a new one, or one of the same spec, identity and container,
    continued.

    `recorded` (library versions and the like) is kept in a new cache's header and compared by
    nobody. A cache that is continued, finished ones too, is repaired: every byte that is committed
    is read, what is damaged goes to quarantine and is missing again. Of several processes each can
    do its part: with `share` = (rank, world) this one reads the shards whose number % world is
    rank, and of the others looks at the sizes; `missing` is then exact for its part. The header of
    another cache of which no shard was ever committed, and which no writer holds, is replaced.
    CacheExists if something else stands there, SpecMismatch or IdentityMismatch listing the fields
    that differ, UsageError for an unknown container or a place inside another cache, KDCacheError
    if the folder cannot be written.
    """
    recorded = {} if recorded is None else dict(recorded)
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in recorded.items()):
        raise UsageError("recorded: expected strings only")
    header_bytes = catalog.header_bytes(spec, identity, container, recorded)
    directory = Directory(path)
    with as_cache_errors(path, "creating the cache"):
        repair.outside_caches(directory.path)
        header, hold = _claim(directory, header_bytes, spec, identity, container)
        repair.sweep(directory, header, share)
        return Writer(directory, header, hold)


def existing_header(path: str | os.PathLike[str]) -> Header | None:
    """The header of the cache at `path` that `create` would continue, or refuse to replace:
    something is committed, or a writer is at work. None if there is none, or none that can be read.
    """
    directory = Directory(path)
    with as_cache_errors(path, "looking for a cache"):
        try:
            data = directory.read(HEADER)
            header = None if data is None else catalog.parse_header(data, directory.full(HEADER))
        except KDCacheError:
            return None  # `create` says what is wrong with it
        if header is not None and not repair.anything_committed(directory):
            with directory.unheld(HEADER) as free:
                return None if free else header
        return header


def _claim(
    directory: Directory, data: bytes, spec: CacheSpec, identity: Identity, container: str
) -> tuple[Header, Hold]:
    """The header of the cache, ours if there was none, and what tells others that it is in use."""
    replaced = False
    while True:
        found = _standing_header(directory, data, replaced)
        if found != data and _replace(directory, found):
            replaced = True
            continue
        header = _accepted(directory, found, spec, identity, container)
        # A writer killed while it published the header leaves a temporary that is the same file,
        # and would look alive.
        directory.drop_dead_temporaries("")
        hold = directory.hold(HEADER)
        if hold is not None and directory.read(HEADER) == found:
            for folder in repair.FOLDERS:
                directory.make(folder)
            return header, hold


def _standing_header(directory: Directory, data: bytes, replaced: bool) -> bytes:
    """The bytes of the header that stands there, after `data` was put there if there was none."""
    if directory.path.exists() and not directory.path.is_dir():
        raise CacheExists(f"{directory.path}: a file stands where the cache was to be created")
    where = directory.full(HEADER)
    found = directory.read(HEADER)
    foreign = _foreign(directory) if found is None and not replaced else ""
    # of a stranger, or of a writer that was just faster than us
    if foreign:
        found = directory.read(HEADER)
    if found is None:
        if foreign in repair.FOLDERS:
            raise CacheCorrupt(
                f"{where}: missing, but {foreign}/ holds files of a cache; put the header back or "
                "choose another place"
            )
        if foreign:
            raise CacheExists(
                f"{directory.path}: not a cache, and not empty (it holds {foreign!r}); choose "
                "another place"
            )
        for folder in ("", *repair.FOLDERS):
            directory.make(folder)
        directory.put(HEADER, data)  # if another writer was first, theirs counts
        found = directory.read(HEADER)
    return found if found is not None else _standing_header(directory, data, True)


def _replace(directory: Directory, found: bytes) -> bool:
    """Take away a header of which nothing was ever committed, which no writer holds: of a dump that
    failed before its first shard, or torn by a file system without links. False if it stays."""
    if repair.anything_committed(directory):
        return False
    try:
        catalog.parse_header(found, directory.full(HEADER))
    # not one of ours, as it stands: nothing of it is lost
    except CacheCorrupt:
        return directory.quarantine(HEADER, lambda: directory.read(HEADER) == found)
    with directory.unheld(HEADER) as free:
        if not free or repair.anything_committed(directory):
            return False
        directory.remove(HEADER)
        return True


def _accepted(
    directory: Directory, found: bytes, spec: CacheSpec, identity: Identity, container: str
) -> Header:
    """The header in bytes that stand there; SpecMismatch or IdentityMismatch unless it is of what
    is to be written.
    """
    header = catalog.parse_header(found, directory.full(HEADER))
    alive = ""
    if not repair.anything_committed(directory):
        alive = (
            "\n  nothing is committed there yet, but another dump into it seems to be alive: let "
            f"it end, or remove {directory.path} if it has"
        )
    different = spec_difference(header.spec, spec)
    if header.container != container or different:
        lines = [f"container: cache has {header.container!r}, given is {container!r}"]
        # Other data or another tokenizer often gives another number of samples: say what it comes
        # from, too.
        lines = (
            (lines if header.container != container else [])
            + [str(d) for d in different]
            + first_lines(difference(header.identity, identity))
        )
        raise SpecMismatch(
            f"{directory.path}: a cache of another spec stands there; fields that differ:\n  "
            + "\n  ".join(lines)
            + "\n  choose another place, or give the options it was made with"
            + alive
        )
    require_same(header.identity, identity, where=str(directory.path))
    return header


def _foreign(directory: Directory) -> str:
    """A name in the folder that no dump which has not got as far as its header can have made; '' if
    there is none.
    """
    for name in directory.names():
        if name in repair.FOLDERS:
            if any(not n.startswith(".") for n in directory.names(name)):
                return name
        elif name != QUARANTINE and not name.startswith(TEMPORARY):
            return name
    return ""


class Writer:
    """Writes shards of one cache. A clean exit of its `with` block seals the cache if no shard is
    missing.

    `write` may be called from another thread than the one that asks `missing`, and by many
    processes at once.
    """

    def __init__(self, directory: Directory, header: Header, hold: Hold) -> None:
        self.path = directory.path
        self.spec = header.spec
        self.identity = header.identity
        self.container = header.container
        self._directory = directory
        self._header = header
        self._hold = hold  # nobody replaces the header while we live
        self._closed = False
        self._sealed: str | None = None  # the content id, once this writer has sealed
        self._lock = threading.Lock()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and not self._closed and self._sealed is None and not self.missing():
            self.seal()
        self.close()

    def close(self) -> None:
        """Write no more; what is committed stays committed."""
        self._closed = True
        self._hold.release()

    def missing(self) -> list[int]:
        """The shards without a commit record, those of other writers counted, at this moment."""
        names = set(self._directory.names("commit"))
        return [
            i
            for i in range(self.spec.num_shards)
            if catalog.commit_name(i)[len("commit/") :] not in names
        ]

    def write(
        self, shard: int, columns: Mapping[str, Array], measured: dict[str, float] | None = None
    ) -> None:
        """Commit shard `shard`: every column of the spec, and the offsets of ragged levels, in
        storage dtype.

        Columns are [rows of their level, *shape]; offsets int64 [records + 1]. `measured` are sums
        over the rows. UsageError for a wrong column, dtype or shape, DataError for content that
        readers would refuse, KDCacheError if the disk is full or not writable; after each of them
        the cache can be continued. If another writer committed the shard first, theirs stays.
        """
        if self._closed:
            raise UsageError(f"{self.path}: the writer is closed")
        if not 0 <= shard < self.spec.num_shards:
            raise UsageError(f"shard {shard}: the cache has 0 to {self.spec.num_shards - 1}")
        records = facts_records(self.spec, shard)
        ready, rows = prepare(self.spec, records, columns)
        # the largest tier first: it clears the smaller ones
        unjudged = dict.fromkeys(reversed(ready))
        while unjudged:
            name = next(iter(unjudged))
            wrong = problem(self.spec, records, rows, name, ready.__getitem__)
            if wrong is not None:
                raise DataError(f"shard {shard}: {wrong}")
            for each in judged_with(self.spec, name):
                unjudged.pop(each, None)
        texts = {name: catalog.number_text(value) for name, value in (measured or {}).items()}
        with self._lock, as_cache_errors(self.path, f"writing shard {shard}", self._what_is_saved):
            facts, created = self._store(shard, records, rows, ready, texts)
            self._commit(facts, created)

    def seal(self) -> str:
        """Write the manifest, if it is not there yet; the content id. CacheIncomplete lists missing
        shards.
        """
        with self._lock, as_cache_errors(self.path, "sealing the cache", self._what_is_saved):
            shards = []
            absent = self.missing()
            if absent:
                raise CacheIncomplete(
                    f"{self.path}: {len(absent)} of {self.spec.num_shards} shards are missing: "
                    f"{_some(absent)}; run the same command again to write them"
                )
            for shard in range(self.spec.num_shards):
                facts = repair.read_commit(self._directory, self._header, shard)
                if facts is None:
                    raise CacheIncomplete(
                        f"{self.path}: shard {shard} is missing; run the same command again"
                    )
                if self._directory.size(f"data/{facts.file}") != facts.size:
                    raise CacheCorrupt(
                        f"{self._directory.full('data/' + facts.file)}: missing, or not of "
                        f"{facts.size} bytes; run the same command again to rewrite shard {shard}"
                    )
                shards.append(facts)
            content_id = self._publish(shards)
            self._quarantine_orphans({facts.file for facts in shards})
            self._sealed = content_id
            return content_id

    def _publish(self, shards: list[Facts]) -> str:
        body = catalog.manifest_body(self._header, shards)
        while True:
            chain = repair.read_manifests(self._directory, self._header)
            if chain and chain[-1].body == body:
                return chain[-1].content_id
            generation = len(chain) + 1
            data = catalog.manifest_bytes(body, generation, chain[-1].digest if chain else None)
            # if taken: look whether it is the same
            self._directory.put(catalog.manifest_name(generation), data)

    def _quarantine_orphans(self, used: set[str]) -> None:
        for name in self._directory.names("data"):
            if name not in used and not name.startswith("."):
                self._directory.quarantine(f"data/{name}", lambda: True)

    def _store(
        self,
        shard: int,
        records: int,
        rows: dict[str, int],
        columns: dict[str, Array],
        measured: dict[str, str],
    ) -> tuple[Facts, bool]:
        """The facts of a published shard file, and whether the file is of this call's making."""
        module = _container(self.container)
        with self._directory.temporary("data") as temporary:
            module.write(temporary, self.spec, columns, records)
            data = map_file(temporary.path, temporary.tell())
            try:
                extents = survey(
                    data, columns, module.locate(temporary.path, data, self.spec, records)
                )
            # whatever a library thinks of bytes that it did not write
            except Exception as e:
                raise KDCacheError(
                    f"{self.path}: shard {shard} read back is not what was written ({e}); the disk "
                    f"loses data, write to another{self._what_is_saved()}"
                ) from e
            file_digest = digest(data)
            facts = Facts(
                shard=shard,
                file=catalog.data_name(self._header, shard, file_digest),
                size=len(data),
                file_digest=file_digest,
                rest_digest=rest_digest(data, extents.values()),
                records=records,
                rows=rows,
                columns=extents,
                measured=measured,
            )
            temporary.sync()
            for _ in range(ATTEMPTS):
                if self._directory.publish(temporary, f"data/{facts.file}"):
                    return facts, True
                try:
                    repair.prove(self._directory, facts)
                    return facts, False
                except CacheCorrupt:
                    repair.remove_bad_file(self._directory, facts.file)
        raise KDCacheError(
            f"{self._directory.full('data/' + facts.file)}: a bad file keeps this name; remove it"
        )

    def _commit(self, facts: Facts, created: bool) -> None:
        """Put the commit record; if another writer's proven one stands there, drop our file."""
        data = catalog.commit_bytes(self._header, facts)
        name = catalog.commit_name(facts.shard)
        for _ in range(ATTEMPTS):
            if self._directory.put(name, data):
                return
            theirs = repair.proven(self._directory, self._header, facts.shard)
            if theirs is not None:
                if created and theirs.file != facts.file:
                    self._directory.remove(f"data/{facts.file}")
                return
            repair.remove_bad_commit(self._directory, self._header, facts.shard)
        raise KDCacheError(
            f"{self._directory.full(name)}: a bad commit record keeps this name; remove it"
        )

    def _what_is_saved(self) -> str:
        try:
            done = self.spec.num_shards - len(self.missing())
        except OSError:
            return ""
        return f"; {done} of {self.spec.num_shards} shards are committed"


def _container(name: str) -> Any:
    """The module that writes this container; pyarrow and h5py load when they are needed."""
    return importlib.import_module(f"kdcache.cache.{name}")


def _some(shards: list[int]) -> str:
    text = ", ".join(map(str, shards[:20]))
    return text + (", ..." if len(shards) > 20 else "")
