"""One mapped shard of a cache, proven column by column as each is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from kdcache.cache import check, mapping, repair
from kdcache.cache.catalog import Header, commit_name
from kdcache.cache.columns import Array, Columns
from kdcache.cache.mapping import Signature, map_signed
from kdcache.cache.rawmap import Facts, digest, level_rows, rest_digest, view
from kdcache.cache.store import Directory
from kdcache.errors import CacheCorrupt


class Proof(NamedTuple):
    """What was proven of a shard, as long as its file has this signature."""

    signature: Signature
    columns: frozenset[str]


class Shard:
    """The columns of one shard as read-only arrays over its mapped file. Thread-safe.

    Before the first column is handed out, the commit record, the size of the file and its bytes
    outside the columns are proven; before each column, its digest and its meaning
    (`check.problem`). CacheCorrupt names file and column. A file whose size or times have changed
    since is mapped and proven again. `known` was proven by another `Shard`.
    """

    def __init__(
        self, directory: Directory, header: Header, facts: Facts, known: Proof | None = None
    ) -> None:
        self.facts = facts
        self.path = directory.full(f"data/{facts.file}")
        self._directory, self._header = directory, header
        self._lock = threading.Lock()
        self._intact: Columns = {}  # digest proven
        self._good: Columns = {}  # and meaning checked
        self._data: Array | None = None
        self._signature: Signature | None = None
        self._known = known

    @cached_property
    def rows(self) -> dict[str, int]:
        return level_rows(self._header.spec, self.facts.records, self.facts.rows)

    def get(self, names: Sequence[str]) -> Columns:
        """Columns by name, [rows of the level, *shape], and int64 offsets."""
        if self._signature is not None and mapping.signature(self.path) not in (
            self._signature,
            None,
        ):
            # a file that is gone or has moved is still what is mapped
            self.forget()
        good = self._good
        if all(name in good for name in names):  # the usual case takes no lock
            return {name: good[name] for name in names}
        with self._lock:
            # the largest tier first: its check covers the smaller ones
            for name in reversed(names):
                if name not in self._good:
                    self._prove(name)
            return {name: self._good[name] for name in names}

    def forget(self) -> None:
        """Prove everything again, of the file that is there now."""
        with self._lock:
            self._good, self._intact, self._data, self._signature, self._known = (
                {},
                {},
                None,
                None,
                None,
            )

    @property
    def proof(self) -> Proof | None:
        """What another `Shard` need not prove again."""
        known = self._known.columns if self._known is not None else frozenset()
        return (
            None
            if self._signature is None
            else Proof(self._signature, known | frozenset(self._good))
        )

    def require_whole(self) -> None:
        """CacheCorrupt if the file was cut while it was read: then zeros were."""
        if self._data is not None and mapping.lost(self._data):
            raise CacheCorrupt(
                f"{self.path}: its bytes were cut off while they were read; expected "
                f"{self.facts.size} bytes"
            )

    def _prove(self, name: str) -> None:
        self._open()
        if self._known is not None and name in self._known.columns:
            self._good[name] = self._bytes_of(name)
            return
        wrong = check.problem(
            self._header.spec, self.facts.records, self.facts.rows, name, self._bytes_of
        )
        if wrong is not None:
            raise CacheCorrupt(f"{self.path}: {wrong}")
        for each in check.judged_with(self._header.spec, name):
            self._good[each] = self._bytes_of(each)

    def _bytes_of(self, name: str) -> Array:
        """The column, its digest proven."""
        if name not in self._intact:
            data = self._open()
            extent = self.facts.columns[name]
            column = self._header.spec.layout.columns.get(name)
            known = self._known is not None and name in self._known.columns
            found = (
                extent.digest
                if known
                else digest(data[extent.offset : extent.offset + extent.length])
            )
            if found != extent.digest:
                raise CacheCorrupt(
                    f"{self.path}: column {name}: its digest is {found}, expected {extent.digest}"
                )
            if column is None:
                self._intact[name] = view(data, extent, np.dtype("<i8"), (extent.length // 8,))
            else:
                shape = (self.rows[column.level], *column.shape)
                self._intact[name] = view(data, extent, column.storage, shape)
        return self._intact[name]

    def _open(self) -> Array:
        if self._data is None:
            if self._known is None:
                self._prove_commit()
            try:
                data, signature = map_signed(self.path, self.facts.size)
            except FileNotFoundError as e:
                raise CacheCorrupt(
                    f"{self.path}: the file of shard {self.facts.shard} is missing"
                ) from e
            if self._known is not None and self._known.signature != signature:
                self._known = None
                self._prove_commit()
            if self._known is None:
                found = rest_digest(data, self.facts.columns.values())
                if found != self.facts.rest_digest:
                    raise CacheCorrupt(
                        f"{self.path}: the digest of its bytes outside the columns is {found}, "
                        f"expected {self.facts.rest_digest}"
                    )
            # A file system that gives another time each time it is asked cannot tell what changed.
            steady = mapping.signature(self.path) == signature
            self._data, self._signature = data, signature if steady else None
        return self._data

    def _prove_commit(self) -> None:
        where = self._directory.full(commit_name(self.facts.shard))
        found = repair.read_commit(self._directory, self._header, self.facts.shard)
        if found is None:
            raise CacheCorrupt(f"{where}: the commit record of shard {self.facts.shard} is missing")
        if found.commit != self.facts.commit:
            raise CacheCorrupt(
                f"{where}: its digest is {found.commit}, the manifest says {self.facts.commit}"
            )

    def measured(self) -> dict[str, str]:
        """The sums in the commit record."""
        if self.facts.measured:
            return self.facts.measured
        found = repair.read_commit(self._directory, self._header, self.facts.shard)
        return {} if found is None else found.measured
