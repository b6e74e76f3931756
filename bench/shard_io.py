"""Writing and reading shards, both containers, in turns with a bare file write and a bare gather
from memory.

The floor is bytes. A record of R bytes (the sum of its columns; V = 32,000 and k = 64 with float16
values, two stored temperatures and a label: 300 bytes) must be read once and written once: 2 R
bytes of memory traffic for a record read, R bytes to the disk for a record written, and one hash
over R bytes. The roof of reading is therefore `np.take` of the same columns out of arrays in memory
(it moves the same 2 R bytes and does nothing else); the roof of writing is one
`write` and `fsync` of the same bytes. A cache is read through the page cache, with every shard's
digests checked before the first round; what that check costs is reported by itself as
`first_touch_seconds`.

    kdcache bench shard-io [--quick] [--rounds N] [--folder FOLDER]
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.bench.race import command, finish, machine, median_ratio, race, spread, table
from kdcache.cache.codec import encode_rows
from kdcache.cache.columns import Array, Columns
from kdcache.cache.identity import Identity
from kdcache.cache.reader import Cache
from kdcache.cache.reader import open as open_cache
from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec
from kdcache.cache.writer import create
from kdcache.user.paths import local_path

CONTAINERS = ("arrow", "hdf5")
IDENTITY = Identity(data={"name": "bench"}, teacher={"weights": "none"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is written and read."""

    records: int = 2**18
    records_per_shard: int = 2**15
    num_classes: int = 32_000
    k: int = 64
    batch: int = 1024
    batches: int = 100
    rounds: int = 7


QUICK = Sizes(
    records=512, records_per_shard=128, num_classes=1000, k=8, batch=32, batches=4, rounds=2
)


def shard_io(
    quick: bool = False, rounds: int | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Race the containers against their roofs and return one JSON object: sizes, times, rates,
    ratios, machine.

    rounds: turns of each contender. folder: where the caches are written, a temporary folder by
    default; it is the disk that is measured. What is written there is deleted again.
    """
    sizes = QUICK if quick else Sizes()
    rounds = sizes.rounds if rounds is None else rounds
    spec = CacheSpec(
        kind="topk",
        num_classes=sizes.num_classes,
        samples=(0, sizes.records),
        tiers=(sizes.k,),
        records_per_shard=sizes.records_per_shard,
        temperatures=("1", "2"),
        labels=1,
    )
    if folder is not None:
        folder = local_path(folder, "--folder")
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-", dir=folder) as place:
        columns = shard_columns(spec)
        writes = race_writes(spec, columns, Path(place), rounds)
        caches, touch = {}, {}
        for container in CONTAINERS:
            path = Path(place) / f"kept-{container}"
            write_cache(spec, columns, path, container)
            start = time.perf_counter()
            caches[container] = open_cache(path)
            caches[container].read(np.arange(0, sizes.records, sizes.records_per_shard))
            touch[container] = time.perf_counter() - start
        reads = {
            kind: race_reads(spec, columns, caches, numbers, rounds)
            for kind, numbers in record_numbers(sizes).items()
        }
        return _result(spec, sizes, rounds, writes, reads, touch)


def shard_columns(spec: CacheSpec) -> Columns:
    """The columns of one full shard of made-up rows; every shard of the benchmark holds the same."""
    rng = np.random.default_rng(0)
    n = spec.records_per_shard
    logits = -np.sort(-rng.normal(0, 4, (n, spec.k)).astype(np.float32), axis=1)
    ids = (rng.integers(0, spec.num_classes, (n, 1)) + 7 * np.arange(spec.k)) % spec.num_classes
    # equal logits: the lower id first
    ids = ids[np.arange(n)[:, None], np.lexsort((ids, -logits))]
    tail = rng.normal(-2, 1, (n, 1, len(spec.temperatures))).astype(np.float32)
    rows = Rows(
        logits=logits,
        ids=ids,
        tail_lse=tail,
        label=ids[:, :1].copy(),
        label_logit=logits[:, :1].copy(),
    )
    return {
        "sample_key": rng.integers(0, 2**63, n).astype("<u8"),
        **encode_rows(spec, rows).columns,
    }


def write_cache(spec: CacheSpec, columns: Columns, path: Path, container: str) -> None:
    """A whole sealed cache."""
    with create(path, spec, IDENTITY, container=container) as writer:
        for shard in range(spec.num_shards):
            writer.write(shard, columns)


def bare_write(spec: CacheSpec, columns: Columns, path: Path) -> None:
    """The same bytes: a file for each shard, written and synced, and nothing else."""
    path.mkdir()
    for shard in range(spec.num_shards):
        with open(path / str(shard), "wb", buffering=0) as file:
            for array in columns.values():
                file.write(array.data.cast("B"))
            os.fsync(file.fileno())


def race_writes(
    spec: CacheSpec, columns: Columns, place: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds to write the whole cache, and to write as many bytes bare."""

    def fresh(name: str, write: Any) -> None:
        path = place / name
        shutil.rmtree(path, ignore_errors=True)
        write(path)

    contenders = {
        name: partial(fresh, name, partial(write_cache, spec, columns, container=name))
        for name in CONTAINERS
    }
    contenders["bare"] = partial(fresh, "bare", partial(bare_write, spec, columns))
    return race(contenders, rounds)


def record_numbers(sizes: Sizes) -> dict[str, list[Array]]:
    """The batches of a round: records drawn from everywhere, and runs of neighbours in a window."""
    rng = np.random.default_rng(1)
    starts = rng.integers(0, sizes.records - sizes.batch + 1, sizes.batches)
    return {
        "random": [rng.integers(0, sizes.records, sizes.batch) for _ in range(sizes.batches)],
        "window": [np.arange(start, start + sizes.batch) for start in starts],
    }


def race_reads(
    spec: CacheSpec, columns: Columns, caches: dict[str, Cache], numbers: list[Array], rounds: int
) -> dict[str, list[float]]:
    """Seconds to gather all batches of record numbers, from each container and from arrays in
    memory.
    """
    memory = {name: np.concatenate([array] * spec.num_shards) for name, array in columns.items()}

    def from_memory() -> None:
        for records in numbers:
            for array in memory.values():
                np.take(array, records, axis=0)

    def from_cache(cache: Cache) -> None:
        for records in numbers:
            cache.read(records)

    return race(
        {
            **{name: partial(from_cache, cache) for name, cache in caches.items()},
            "bare": from_memory,
        },
        rounds,
    )


def _result(
    spec: CacheSpec,
    sizes: Sizes,
    rounds: int,
    writes: dict[str, list[float]],
    reads: dict[str, dict[str, list[float]]],
    touch: dict[str, float],
) -> dict[str, Any]:
    record_bytes = sum(column.row_bytes for column in spec.columns())
    amounts = {
        "write": sizes.records,
        "random": sizes.batch * sizes.batches,
        "window": sizes.batch * sizes.batches,
    }
    out: dict[str, Any] = {
        "bench": "shard_io",
        "command": command(),
        "machine": machine(),
        "rounds": rounds,
        "records": sizes.records,
        "records_per_shard": sizes.records_per_shard,
        "num_classes": sizes.num_classes,
        "k": sizes.k,
        "batch": sizes.batch,
        "record_bytes": record_bytes,
        "first_touch_seconds": touch,
    }
    for kind, seconds in {"write": writes, **reads}.items():
        out[kind] = {
            name: {
                "seconds": spread(s),
                "rows_per_second": amounts[kind] / spread(s)["median"],
                "bytes_per_second": amounts[kind] * record_bytes / spread(s)["median"],
                "times_bare": median_ratio(s, seconds["bare"]),
            }
            for name, s in seconds.items()
        }
    return out


def render(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        [
            f"{kind} {name}",
            f"{one['rows_per_second']:,.0f}",
            one["bytes_per_second"] / 1e6,
            one["times_bare"],
        ]
        for kind in ("write", "random", "window")
        for name, one in result[kind].items()
    ]
    return table(["", "records/s", "MB/s", "x time of bare"], rows)


if __name__ == "__main__":
    finish(shard_io(quick="--quick" in sys.argv[1:]), render)
