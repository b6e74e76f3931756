"""Reading a cache: any records in any order, gathered from mapped shards into arrays of the
caller's own.

Bytes are proven once per shard and column, when they are first asked for; after that a read is one
gather.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from kdcache.cache import audit, catalog, mapping, repair
from kdcache.cache.catalog import HEADER, Header, Manifest
from kdcache.cache.columns import ROOT, Array, Columns
from kdcache.cache.gather import gather, groups, ragged_rows
from kdcache.cache.identity import Identity, require_same
from kdcache.cache.rawmap import Facts
from kdcache.cache.shard import Proof, Shard
from kdcache.cache.spec import CacheSpec
from kdcache.cache.store import Directory, as_cache_errors
from kdcache.errors import CacheCorrupt, CacheIncomplete, UsageError, did_you_mean
from kdcache.user.arguments import checked


@dataclass(frozen=True, slots=True)
class Batch:
    """What the teacher said about B records.

    records int64 [B]. columns: record level [B, *shape]; a level of one row per record [B, *shape];
    a ragged level [rows of the batch, *shape], where the rows of record b are offsets[level][b] to
    offsets[level][b + 1]. offsets: int64 [B + 1] of each ragged level read, starting at 0. Arrays
    are the caller's to keep and change.
    """

    spec: CacheSpec
    records: Array
    columns: Columns
    offsets: Columns = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)


@checked
def open(
    path: str | os.PathLike[str],
    *,
    expect: Identity | None = None,
    accept: Sequence[str] = (),
    allow_partial: bool = False,
) -> Cache:
    """Open a sealed cache, or with `allow_partial` one that is still being written.

    `expect` is compared field by field; `accept` names fields or parts whose difference is
    harmless. IdentityMismatch lists the others. CacheIncomplete if there is no manifest,
    CacheCorrupt for damaged files, NotBuilt for a cache that needs what this version does not have,
    KDCacheError if there is no cache.
    """
    directory = Directory(path)
    with as_cache_errors(path, "opening the cache"):
        data = directory.read(HEADER)
        if data is None:
            if any(directory.names(folder) for folder in repair.FOLDERS):
                raise CacheCorrupt(
                    f"{directory.full(HEADER)}: missing, and the folder has other files of a "
                    "cache; nothing else says what they are: put back a copy of it, or dump to "
                    "another place"
                )
            raise CacheIncomplete(
                f"{directory.path}: no cache here (no {HEADER}); dump-teacher makes one"
            )
        header = catalog.parse_header(data, directory.full(HEADER))
        accepted = (
            []
            if expect is None
            else require_same(header.identity, expect, accept=accept, where=str(path))
        )
        with repair.mendable():
            chain = repair.read_manifests(directory, header)
        if not chain and not allow_partial:
            present = len([n for n in directory.names("commit") if repair.NUMBERED.fullmatch(n)])
            raise CacheIncomplete(
                f"{directory.path}: not finished: {present} of {header.spec.num_shards} shards are "
                "committed and it is not sealed; run its dump-teacher command again, which writes "
                "what is missing alone"
            )
        return Cache(directory, header, chain[-1] if chain else None, accepted)


class Cache:
    """An open cache. Reads from many threads at once are fine, and so are forked processes.

    content_id is '' and generation 0 while the cache is not sealed. `accepted`: identity fields
    overlooked by `accept`.
    """

    def __init__(
        self, directory: Directory, header: Header, manifest: Manifest | None, accepted: list[str]
    ) -> None:
        self.path: Path = directory.path
        self.spec: CacheSpec = header.spec
        self.identity: Identity = header.identity
        self.container: str = header.container
        self.recorded: dict[str, str] = header.recorded
        self.content_id: str = manifest.content_id if manifest else ""
        self.generation: int = manifest.generation if manifest else 0
        self.num_records: int = header.spec.num_records
        self.accepted = accepted
        self._directory, self._header, self._manifest = directory, header, manifest
        self._layout = header.spec.layout
        self._columns = self._layout.columns
        self._shards: dict[int, Shard] | None = {}
        self._proofs: dict[int, Proof] = {}  # of shards that are not mapped any more
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.num_records

    def __reduce__(self) -> tuple[Callable[..., Cache], tuple[str, str]]:
        return _reopen, (str(self.path.absolute()), self.content_id)

    def close(self) -> None:
        """Let go of the mapped files; batches already read stay valid."""
        self._shards = None

    # ---- facts
    # ------------------------------------------------------------------------------------------------

    def facts(self, shard: int) -> Facts:
        """What is promised about one shard; CacheIncomplete if it is not committed."""
        if not 0 <= shard < self.spec.num_shards:
            raise UsageError(f"shard {shard}: the cache has 0 to {self.spec.num_shards - 1}")
        if self._manifest is not None:
            return self._manifest.facts(shard)
        with as_cache_errors(self.path, "reading a commit record"), repair.mendable():
            found = repair.read_commit(self._directory, self._header, shard)
        if found is None:
            raise CacheIncomplete(f"{self.path}: shard {shard} is not committed yet")
        return found

    def missing(self) -> list[int]:
        """Shards that cannot be read yet; [] of a sealed cache."""
        if self._manifest is not None:
            return []
        names = set(self._directory.names("commit"))
        return [
            i
            for i in range(self.spec.num_shards)
            if catalog.commit_name(i)[len("commit/") :] not in names
        ]

    @property
    def shards(self) -> list[Facts]:
        """Facts (file, size, records, rows, columns, ...) of every committed shard, in order."""
        absent = set(self.missing())
        return [self.facts(i) for i in range(self.spec.num_shards) if i not in absent]

    @property
    def measured(self) -> dict[str, float]:
        """Sums over all shards of what the writer measured."""
        if self._manifest is not None:
            return {name: float(text) for name, text in self._manifest.body["measured"].items()}
        return {
            name: float(text)
            for name, text in catalog.sum_measured(f.measured for f in self.shards).items()
        }

    def column_bytes(self) -> dict[str, int]:
        """Bytes of each column, and of the offsets of each ragged level, over all shards."""
        if self._manifest is not None:
            return {name: sum(c["length"]) for name, c in self._manifest.body["columns"].items()}
        out: dict[str, int] = {}
        for facts in self.shards:
            for name, extent in facts.columns.items():
                out[name] = out.get(name, 0) + extent.length
        return out

    # ---- reading
    # ----------------------------------------------------------------------------------------------

    def read(self, records: Array, columns: Sequence[str] | None = None) -> Batch:
        """The named columns (None: all) of record numbers int64 [B], in the order asked, repeats
        allowed.

        UsageError for an unknown column or record; CacheCorrupt naming file and column on the first
        touch of bytes that are not what was promised; CacheIncomplete for a shard not committed
        yet.
        """
        names = list(self._columns) if columns is None else list(dict.fromkeys(columns))
        for name in names:
            if name not in self._columns:
                raise UsageError(
                    f"{self.path}: no column {name!r}{did_you_mean(name, self._columns)}"
                )
        wanted = np.asarray(records)
        if wanted.ndim != 1 or (wanted.dtype.kind not in "iu" and wanted.size):
            raise UsageError(
                f"records: {wanted.dtype} {list(wanted.shape)} given, expected int64 [B]"
            )
        wanted = wanted.astype(np.int64)
        try:
            shard_B, index_B = self.spec.locate(wanted)
        except IndexError as e:
            raise UsageError(f"{self.path}: {e}") from e
        parts, back = groups(shard_B, index_B)
        if len(parts) > mapping.MOST:
            raise UsageError(
                f"{self.path}: the {len(wanted)} records lie in {len(parts)} shards; at most "
                f"{mapping.MOST} can be mapped at once: read fewer at a time"
            )
        levels = self._layout.levels
        with as_cache_errors(self.path, "reading"), repair.mendable():
            used = {self._columns[name].level for name in names}
            offsets = [key for key, level in self._layout.offsets.items() if level.name in used]
            shards = [self._shard(part.shard) for part in parts]
            found = [shard.get([*offsets, *names]) for shard in shards]
        out: Columns = {}
        starts: Columns = {}
        for level in (ROOT, *levels):
            members = [self._columns[name] for name in names if self._columns[name].level == level]
            if not members:
                continue
            count = 1 if level == ROOT else levels[level].count
            rows, plan, way = len(wanted), parts, back
            if count is None:
                given = [columns[levels[level].offsets] for columns in found]
                plan, way, starts[level] = ragged_rows(parts, given, back, len(wanted))
                rows = int(starts[level][-1])
            for column in members:
                inner = column.shape if count in (None, 1) else (count, *column.shape)
                given = [columns[column.name].reshape(-1, *inner) for columns in found]
                out[column.name] = gather(
                    given, plan, np.empty((rows, *inner), column.storage), way
                )
        with repair.mendable():
            for shard in shards:
                shard.require_whole()
        return Batch(self.spec, wanted, {name: out[name] for name in names}, starts)

    def prove(self, records: Array) -> None:
        """Read again every byte of the shards of some record numbers int64 [B], whatever was proven
        of them before.

        For who finds that what was read of them cannot be. CacheCorrupt naming file and column.
        """
        with as_cache_errors(self.path, "proving"), repair.mendable():
            for number in np.unique(self.spec.locate(records)[0]).tolist():
                shard = self._shard(number)
                shard.forget()
                shard.get(self._layout.names)

    def shard_columns(self, shard: int) -> Columns:
        """Every column of one shard as read-only views of the mapped file, and the offsets of its
        ragged levels.
        """
        with as_cache_errors(self.path, "reading"), repair.mendable():
            return self._shard(shard).get(self._layout.names)

    def shard_measured(self, shard: int) -> dict[str, float]:
        """What the writer measured of one shard."""
        with as_cache_errors(self.path, "reading"), repair.mendable():
            return {name: float(text) for name, text in self._shard(shard).measured().items()}

    def _shard(self, shard: int) -> Shard:
        # a fork: locks may have been held by threads that are not here
        if self._pid != os.getpid():
            self._shards, self._proofs = None if self._shards is None else {}, dict(self._proofs)
            self._lock, self._pid = threading.Lock(), os.getpid()
        shards = self._shards
        if shards is None:
            raise UsageError(f"{self.path}: the cache is closed")
        found = shards.get(shard)
        if found is None:
            with self._lock:
                found = shards.get(shard)
                if found is None:
                    if mapping.count() >= mapping.MOST:
                        self._make_room(shards)
                    found = Shard(
                        self._directory, self._header, self.facts(shard), self._proofs.get(shard)
                    )
                    shards[shard] = found
        return found

    def _make_room(self, shards: dict[int, Shard]) -> None:
        """Let go of the older half of the shards; what was proven of them is kept."""
        for number in list(shards)[: len(shards) // 2 + 1]:
            proof = shards.pop(number).proof
            if proof is not None:
                self._proofs[number] = proof

    def check_all(
        self, progress: Callable[[int, int], None] | None = None, *, quick: bool = False
    ) -> list[str]:
        """Every digest, every meaning, every file in the folder: what is wrong, a line each, naming
        file and column.

        `quick` reads no shard file: only names, sizes and the JSON files. `progress(done, total)`
        after each shard.
        """
        return audit.check_all(self._directory, self._header, self._manifest, progress, quick=quick)

    def notes(self) -> list[str]:
        """What stands in the folder and is no damage: temporaries of a running dump, files in
        quarantine.
        """
        return audit.notes(self._directory)


def _reopen(path: str, content_id: str) -> Cache:
    cache = open(path, allow_partial=not content_id)
    if content_id and cache.content_id != content_id:
        raise CacheCorrupt(
            f"{path}: content id is {cache.content_id}, expected {content_id}; the cache was "
            "replaced"
        )
    return cache
