"""Does a teacher still say what stands in a cache: some records asked again, and compared with what
is kept of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kdcache.cache.reader import Cache
from kdcache.data.identify import check_same_key
from kdcache.data.samples import Samples, evenly_spaced
from kdcache.errors import DataError
from kdcache.teacher.compare import Saying, cached_saying, gaps, live_sayings, most_noise, noise

ANSWERS = "answers"  # --accept it: no field of an identity; and the code of the warning
ASKED_AGAIN = 4  # committed records that a dump which goes on asks about
# room above what running the teacher in two groupings of the same records differs by
NOISE_FACTOR = 4.0
# records per forward pass of the two live runs, where the cache does not say
GROUPS = (32, 1)
# the unit among subnormal numbers, where a unit of their size is too little
LEAST_FLOAT32 = 2.0**-149
BATCH_SIZE = re.compile(r"[1-9][0-9]{0,3}")


@dataclass(frozen=True, slots=True)
class Agreement:
    """What asking again found: `problems` are sentences, [] where the answers are the same but for
    rounding.

    worst: the record that is furthest from the cache; beyond: by how much, beyond the codec's
    rounding; tolerance: what was allowed; live: what two live runs differ by. They are None where
    no answer could be compared.
    """

    problems: list[str]
    worst: int | None = None
    beyond: float | None = None
    tolerance: float | None = None
    live: float | None = None


def agreement(
    cache: Cache, module: nn.Module, samples: Samples, records: Iterable[int], device: torch.device
) -> Agreement:
    """Ask the teacher, in eval mode and on `device`, about some records of a cache, in two
    groupings.

    A difference counts when it exceeds the codec's own rounding by more than 4 times what the two
    runs differ by, which may be rounding alone; and so does every answer that is not finite.
    DataError for data or a teacher that cannot be asked, or whose rows, keys or shapes are not
    those of the cache.
    """
    said = {
        int(record): cached_saying(cache.spec, cache.read(np.array([record]))) for record in records
    }
    for record in said:
        _check_key(cache, samples, record)
    size = cache.recorded.get("batch_size", "")
    groups = (
        int(size) if BATCH_SIZE.fullmatch(size) and 1 < int(size) <= 1024 else GROUPS[0],
        GROUPS[1],
    )
    first, second = (
        live_sayings(module, samples, cache.spec, said, group, device) for group in groups
    )
    bad = {record: live.bad for run in (second, first) for record, live in run.items() if live.bad}
    problems = [
        f"{_name(cache, record)}: the teacher's answer {bad[record]}; a cache holds finite ones"
        for record in list(bad)[:1]
    ]
    if len(bad) > 1:
        problems[0] += f" ({len(bad)} of the {len(said)} records asked about have such answers)"
    good = [record for record in said if record not in bad]
    if not good:
        return Agreement(problems)
    said, first, second = (
        {record: run[record] for record in good} for run in (said, first, second)
    )
    found, most = noise(first, second), most_noise(first)
    live = max(found.values(), default=0.0)
    problems += _unsteady(found, most)
    worst, beyond, tolerance = _worst(
        said, first, {part: min(apart, most[part]) for part, apart in found.items()}
    )
    if not beyond <= tolerance:
        made = (
            f"{cache.recorded.get('device', '?')}, in batches of "
            f"{cache.recorded.get('batch_size', '?')}"
        )
        problems.append(
            f"{_name(cache, worst)}: the teacher's answer differs from the cache by {beyond:.3g} "
            "beyond rounding; "
            f"expected at most {tolerance:.3g}, as two live runs differ by {live:.3g} (cached on "
            f"{made})"
        )
    return Agreement(problems, worst, beyond, tolerance, live)


def committed_records(cache: Cache, missing: Iterable[int], count: int = ASKED_AGAIN) -> list[int]:
    """Up to `count` records of a cache that is being written, evenly chosen among the shards that
    are not `missing`.
    """
    absent = set(missing)
    there = [shard for shard in range(cache.spec.num_shards) if shard not in absent]
    shards = [there[i] for i in evenly_spaced(len(there), count)]
    out = []
    for i, shard in enumerate(shards):
        at = cache.spec.shard(shard)
        of_this = -(-count // len(shards))  # a single shard gives them all
        size = at.stop - at.start
        # Elsewhere in each shard, so that not all are the first of a batch.
        places = (
            evenly_spaced(size, of_this)
            if len(shards) == 1
            else [i * (size - 1) // max(len(shards) - 1, 1)]
        )
        out += [cache.spec.record(at.view, at.start + place) for place in places]
    return out


def _name(cache: Cache, record: int) -> str:
    shard, index = (int(x[0]) for x in cache.spec.locate(np.array([record])))
    at = cache.spec.shard(shard)
    return f"record {record} (sample {at.start + index}, view {at.view})"


def _unsteady(found: Mapping[str, float], most: Mapping[str, float]) -> list[str]:
    """A problem where two live runs differ by more than rounding: nothing could then be told from
    the cache.
    """
    apart = [name for name in found if not found[name] <= most[name]]
    if not apart:
        return []
    part = max(apart, key=lambda name: found[name] - most[name])
    return [
        "the teacher answers differently each time, or by what shares its batch: its "
        f"{part} of the same records in two groupings differ by {found[part]:.3g}, rounding "
        "explains "
        f"{most[part]:.3g}; is something random on in eval mode (dropout), or does it normalise "
        "over the batch?"
    ]


def _check_key(cache: Cache, samples: Samples, record: int) -> None:
    shard, index = (int(x[0]) for x in cache.spec.locate(np.array([record])))
    where = cache.spec.shard(shard)
    sample = where.start + index
    if sample >= len(samples):
        raise DataError(
            f"record {record} is of sample {sample}; the data has {len(samples)} samples"
        )
    stored = cache.read(np.array([record]), ["sample_key"]).columns["sample_key"]
    check_same_key(
        stored, np.array([samples.sample_key(sample, where.view)], np.uint64), np.array([sample])
    )
    if cache.spec.view_keys and (view_key := samples.item(sample, where.view).view_key) is not None:
        stored = cache.read(np.array([record]), ["view_key"]).columns["view_key"]
        check_same_key(stored, np.array([view_key], np.uint64), np.array([sample]), what="view_key")


def _worst(
    said: Mapping[int, Saying], live: Mapping[int, Saying], allowed: Mapping[str, float]
) -> tuple[int, float, float]:
    """(record, difference beyond rounding, tolerance) of the largest excess over all records and
    parts.
    """
    found: list[tuple[float, int, float, float]] = []
    for record, saying in said.items():
        for part, (beyond, size) in gaps(saying, live[record]).items():
            # 16 units in the last place: what float32 sums of a deep net differ by at least, should
            # two runs agree.
            floor = (
                16 * float(torch.finfo(torch.float32).eps) * size
                + 2 * live[record].eps * live[record].size
            )
            tolerance = NOISE_FACTOR * allowed[part] + floor + 16 * LEAST_FLOAT32
            excess = beyond - tolerance
            found.append((math.inf if math.isnan(excess) else excess, record, beyond, tolerance))
    return max(found)[1:]
