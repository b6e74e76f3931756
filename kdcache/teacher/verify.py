"""Is a cache whole, and does its teacher still say what is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache.identity import Identity, difference
from kdcache.cache.reader import Cache
from kdcache.cache.reader import open as open_cache
from kdcache.cache.repair import MEND
from kdcache.data.identify import check_same_key, identify
from kdcache.data.samples import Samples
from kdcache.errors import CacheCorrupt, DataError, FieldDifference, UsageError
from kdcache.models import DTYPES, Model, pick_device
from kdcache.teacher.compare import Saying, cached_saying, gaps, live_sayings, most_noise, noise
from kdcache.teacher.run import evaluating
from kdcache.teacher.sources import pick_samples, pick_teacher, this_rank

NOISE_FACTOR = 4.0              # room above what running the teacher in two groupings of the same records differs by
SAMPLES = 32                    # records that the teacher sees again
GROUPS = (32, 1)                # records per forward pass of the two live runs, where the cache does not say


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What a check found. `problems` is empty exactly if `ok`; `notes` are no damage.

    advice: what mends it, None where nothing is damaged. With a teacher: `records` it saw again, the record that is
    worst, by how much its logits (or features) differ beyond what the codec rounds, the most that was allowed, and what
    two live runs differ by.
    """

    cache: str
    ok: bool
    quick: bool
    problems: tuple[str, ...]
    content_id: str | None
    shards: int
    notes: tuple[str, ...] = ()
    advice: str | None = None
    records: int | None = None
    worst_record: int | None = None
    worst_difference: float | None = None
    tolerance: float | None = None
    live_difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return {**asdict(self), "problems": list(self.problems), "notes": list(self.notes)}


def verify(cache: str | Path, *, quick: bool = False, teacher: Any = None, data: Any = None, samples: int | None = None,
           teacher_args: Mapping[str, Any] | None = None, teacher_weights: str | Path | None = None,
           data_args: Mapping[str, Any] | None = None, dtype: str | None = None, device: str | None = None,
           progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check every digest of the cache at `cache` and that no file is foreign; `quick` stays with names, sizes, proofs.

    With `teacher` and `data` (SPECs or objects): compare their identity, and run the teacher again on up to `samples`
    (32) evenly spaced records, in the dtype of the cache's teacher unless `dtype` is given. What is cached is looked up
    in its logits by plain torch, whichever engine wrote it. A difference is a problem when it exceeds the codec's own
    rounding by more than 4 times what two live runs in other batches differ by. These may differ by rounding alone:
    more is a problem of its own.
    UsageError for a teacher without data, CacheIncomplete if the dump has not ended; damage is listed, not raised.
    """
    if (teacher is None) != (data is None):
        raise UsageError("verify runs the teacher on the data: give --teacher and --data, or neither")
    if samples is not None and samples < 1:
        raise UsageError(f"--samples is {samples}; expected at least 1")
    if teacher is None:
        _refuse_idle({"--samples": samples, "--dtype": dtype, "--device": device, "--teacher-arg": teacher_args,
                      "--teacher-weights": teacher_weights, "--data-arg": data_args})
    try:
        with open_cache(cache) as opened:
            problems = opened.check_all(progress, quick=quick)
            report = VerifyReport(cache=str(cache), ok=not problems, quick=quick, problems=tuple(problems),
                                  notes=tuple(opened.notes()), content_id=opened.content_id,
                                  shards=opened.spec.num_shards, advice=MEND if problems else None)
            if teacher is None or problems:
                return report
            return _ask_teacher(opened, report, teacher, data, samples or SAMPLES, dtype, device or "auto",
                                dict(args=teacher_args, weights=teacher_weights), data_args)
    except CacheCorrupt as e:
        return VerifyReport(cache=str(cache), ok=False, quick=quick, problems=(str(e),), content_id=None, shards=0)


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """UsageError for an option that nothing reads when no teacher is asked."""
    for flag, value in options.items():
        if value is not None:
            raise UsageError(f"{flag} is about asking the teacher again: give --teacher and --data, or leave it out")


def _ask_teacher(cache: Cache, report: VerifyReport, teacher: Any, data: Any, count: int, dtype: str | None,
                 device: str, teacher_from: dict[str, Any], data_args: Mapping[str, Any] | None) -> VerifyReport:
    found = pick_device(device, this_rank().local)
    recorded = cache.identity.teacher.get("dtype")
    if dtype is None and recorded in DTYPES:
        dtype = recorded
    model = pick_teacher(teacher, seed=cache.spec.seed, dtype=dtype, **teacher_from)
    samples = pick_samples(data, data_args, cache.spec.seed, labels=bool(cache.spec.labels))
    model.module.to(found)
    problems = [f"identity: {d}" for d in _identity_differences(cache, model, samples)]
    records = np.unique(np.linspace(0, cache.num_records - 1, min(count, cache.num_records)).astype(np.int64))
    try:
        with evaluating(model.module):
            said, first, second = _sayings(cache, model, samples, records, found)
    except DataError as e:
        return _with(report, [*problems, str(e)], records=len(records))
    found_noise, most = noise(first, second), most_noise(first)
    live = max(found_noise.values())
    problems += _unsteady(found_noise, most)
    allowed = {part: min(apart, most[part]) for part, apart in found_noise.items()}
    worst, beyond, tolerance = _worst(said, first, allowed)
    if beyond > tolerance:
        _, view, start, _ = cache.spec.shard(int(cache.spec.locate(np.array([worst]))[0][0]))
        sample = start + int(cache.spec.locate(np.array([worst]))[1][0])
        made = f"{cache.recorded.get('device', '?')}, in batches of {cache.recorded.get('batch_size', '?')}"
        problems.append(
            f"record {worst} (sample {sample}, view {view}): the teacher's answer differs from the cache by "
            f"{beyond:.3g} beyond rounding; expected at most {tolerance:.3g}, as two live runs differ by {live:.3g} "
            f"(cached on {made})")
    return _with(report, problems, records=len(records), worst_record=worst, worst_difference=beyond,
                 tolerance=tolerance, live_difference=live)


def _unsteady(found: Mapping[str, float], most: Mapping[str, float]) -> list[str]:
    """A problem where two live runs differ by more than rounding: nothing could then be told from the cache."""
    part = max(found, key=lambda name: found[name] - most[name])
    if found[part] <= most[part]:
        return []
    return ["the teacher answers differently each time, or by what shares its batch: its "
            f"{part} of the same records in two groupings differ by {found[part]:.3g}, rounding explains "
            f"{most[part]:.3g}; is something random on in eval mode (dropout), or does it normalise over the batch?"]


def _with(report: VerifyReport, problems: Sequence[str], **found: Any) -> VerifyReport:
    return VerifyReport(**{**asdict(report), "problems": tuple(problems), "ok": not problems, **found})


def _identity_differences(cache: Cache, model: Model, samples: Samples) -> list[FieldDifference]:
    document, tokenizer = identify(samples)
    given = Identity(data=document, tokenizer=tokenizer, activation=cache.identity.activation,
                     teacher={**model.identity, "num_classes": cache.identity.teacher.get("num_classes", 0)})
    return difference(cache.identity, given)


def _sayings(cache: Cache, model: Model, samples: Samples, records: np.ndarray[Any, Any],
             device: torch.device) -> tuple[dict[int, Saying], dict[int, Saying], dict[int, Saying]]:
    """What the cache, and two live runs in other groupings, say of some records."""
    said = {int(record): cached_saying(cache.spec, cache.read(np.array([record]))) for record in records}
    for record in said:
        _check_key(cache, samples, record)
    size = cache.recorded.get("batch_size", "")
    groups = (int(size) if size.isdigit() and 1 < int(size) <= 1024 else GROUPS[0], GROUPS[1])
    first, second = (live_sayings(model.module, samples, cache.spec, said, group, device) for group in groups)
    return said, first, second


def _check_key(cache: Cache, samples: Samples, record: int) -> None:
    shard, index = (int(x[0]) for x in cache.spec.locate(np.array([record])))
    where = cache.spec.shard(shard)
    sample = where.start + index
    if sample >= len(samples):
        raise DataError(f"record {record} is of sample {sample}; the data has {len(samples)} samples")
    stored = cache.read(np.array([record]), ["sample_key"]).columns["sample_key"]
    check_same_key(stored, np.array([samples.sample_key(sample, where.view)], np.uint64), np.array([sample]))
    if cache.spec.view_keys and (view_key := samples.item(sample, where.view).view_key) is not None:
        stored = cache.read(np.array([record]), ["view_key"]).columns["view_key"]
        check_same_key(stored, np.array([view_key], np.uint64), np.array([sample]), what="view_key")


def _worst(said: dict[int, Saying], live: dict[int, Saying], allowed: dict[str, float]) -> tuple[int, float, float]:
    """(record, difference beyond rounding, tolerance) of the largest excess over all records and parts."""
    found = []
    for record, saying in said.items():
        for part, (beyond, size) in gaps(saying, live[record]).items():
            # 16 units in the last place: what float32 sums of a deep net differ by at least, should two runs agree.
            floor = 16 * float(torch.finfo(torch.float32).eps) * size + 2 * live[record].eps * live[record].size
            tolerance = NOISE_FACTOR * allowed[part] + floor
            found.append((beyond - tolerance, record, beyond, tolerance))
    return max(found)[1:]
