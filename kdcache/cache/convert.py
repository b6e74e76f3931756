"""The same cache in the other container: every column byte for byte, the same content id."""

from __future__ import annotations

import os

from kdcache.cache import reader
from kdcache.cache.catalog import SUFFIXES
from kdcache.cache.writer import create
from kdcache.errors import CacheCorrupt, UsageError, near


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], container: str | None = None) -> str:
    """Write the sealed cache `src` to `dst` in `container` (None: the one it is not in), and return the content id.

    Continues an interrupted conversion. UsageError for an unknown container, and the errors of `open` and `create`.
    """
    with reader.open(src) as cache:
        target = container or next(name for name in SUFFIXES if name != cache.container)
        if target not in SUFFIXES:
            raise UsageError(f"container {target!r} is unknown{near(target, SUFFIXES)}")
        if os.path.realpath(src) == os.path.realpath(dst):
            raise UsageError(f"{dst}: a cache cannot be converted into itself")
        with create(dst, cache.spec, cache.identity, container=target, recorded=cache.recorded) as writer:
            for shard in writer.missing():
                writer.write(shard, cache.shard_columns(shard), cache.shard_measured(shard))
            content_id = writer.seal()
        if content_id != cache.content_id:
            raise CacheCorrupt(f"{dst}: content id is {content_id}, {src} has {cache.content_id}; "
                               f"the target held shards of other content: remove it and convert again")
        return content_id
