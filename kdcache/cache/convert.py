"""The same cache in the other container: every column byte for byte, the same content id."""

from __future__ import annotations

import os

from kdcache.cache import reader
from kdcache.cache.catalog import SUFFIXES
from kdcache.cache.writer import create
from kdcache.errors import CacheCorrupt, CacheExists, UsageError, did_you_mean
from kdcache.user.paths import local_path


def convert(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], container: str | None = None
) -> str:
    """Write the sealed cache `src` to `dst` in `container` (None: the one it is not in), and return
    the content id.

    Continues an interrupted conversion. UsageError for an unknown container, CacheExists before
    anything is written if
    `dst` holds shards of other content, and the errors of `open` and `create`.
    """
    with reader.open(src) as cache:
        target = container or next(name for name in SUFFIXES if name != cache.container)
        if target not in SUFFIXES:
            raise UsageError(f"container {target!r} is unknown{did_you_mean(target, SUFFIXES)}")
        if os.path.realpath(cache.path) == os.path.realpath(local_path(dst, "OUT")):
            raise UsageError(f"{dst}: a cache cannot be converted into itself")
        with create(
            dst, cache.spec, cache.identity, container=target, recorded=cache.recorded
        ) as writer:
            _refuse_other_content(cache, dst)
            for shard in writer.missing():
                writer.write(shard, cache.shard_columns(shard), cache.shard_measured(shard))
            made = writer.seal()
    if made != cache.content_id:
        raise CacheCorrupt(
            f"{dst}: its content id is {made}, that of {src} was {cache.content_id}: the cache "
            "changed while it was read; remove the copy and convert again"
        )
    return made


def _refuse_other_content(cache: reader.Cache, dst: str | os.PathLike[str]) -> None:
    """CacheExists unless every shard that stands at `dst` has the columns that it has in `cache`."""
    with reader.open(dst, allow_partial=True) as there:
        for facts in there.shards:
            wanted = cache.facts(facts.shard).columns
            other = [
                name
                for name, extent in facts.columns.items()
                if extent.digest != wanted[name].digest
            ]
            if other:
                raise CacheExists(
                    f"{dst}: its shard {facts.shard} has another column {other[0]} than that of "
                    f"{cache.path}; remove the folder, or choose another place"
                )
