"""Does a teacher still say what stands in a cache: some records asked again, and compared with what
is kept of them.

A cache and a teacher say the same numbers of a record, its parts: the kept logits, the tails, the
features. What the cache says is known up to the rounding of its codec, what the teacher says up to
what two runs of it differ by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache.cache.codec import decode_rows
from kdcache.cache.columns import Array
from kdcache.cache.features import decode_feature
from kdcache.cache.reader import Batch, Cache
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.cache.values import value_codec
from kdcache.data.keys import check_same_key
from kdcache.data.samples import Samples, evenly_spaced
from kdcache.errors import DataError
from kdcache.loss.topk import tail_lse
from kdcache.models.checks import explained, unit
from kdcache.teacher.answer import answer, convention_of, read
from kdcache.teacher.hooks import FeatureHooks, requests_of

ANSWERS = "answers"  # --accept it: no field of an identity; and the code of the warning
ASKED_AGAIN = 4  # committed records that a dump which goes on asks about
# room above what running the teacher in two groupings of the same records differs by
NOISE_FACTOR = 4.0
# records per forward pass of the two live runs, where the cache does not say
GROUPS = (32, 1)
# the unit among subnormal numbers, where a unit of their size is too little
LEAST_FLOAT32 = 2.0**-149
BATCH_SIZE = re.compile(r"[1-9][0-9]{0,3}")
# half a step of int8 codes, whose scale float32 can only hold to half of its smallest, 2^-149
LEAST_INT8 = 2.0**-141


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
        int(record): cached_answer(cache.spec, cache.read(np.array([record]))) for record in records
    }
    for record in said:
        _check_key(cache, samples, record)
    size = cache.recorded.get("batch_size", "")
    groups = (
        int(size) if BATCH_SIZE.fullmatch(size) and 1 < int(size) <= 1024 else GROUPS[0],
        GROUPS[1],
    )
    first, second = (
        live_answers(module, samples, cache.spec, said, group, device) for group in groups
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
            f"beyond rounding; expected at most {tolerance:.3g}, as two live runs differ by "
            f"{live:.3g} (cached on {made})"
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
        f"the teacher answers differently each time, or by what shares its batch: its {part} of "
        f"the same records in two groupings differ by {found[part]:.3g}, rounding explains "
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
    said: Mapping[int, RecordAnswer], live: Mapping[int, RecordAnswer], allowed: Mapping[str, float]
) -> tuple[int, float, float]:
    """(record, difference beyond rounding, tolerance) of the largest excess over all records and
    parts.
    """
    found: list[tuple[float, int, float, float]] = []
    for record, answered in said.items():
        for part, (beyond, size) in gaps(answered, live[record]).items():
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


# ---- what a cache says of a record, and what a teacher says of it now


@dataclass(frozen=True, slots=True)
class RecordAnswer:
    """What is said of one record: part -> float64 values, and for the cached one the most that
    rounding moved each.

    Parts: "logits" [N, K] relative to the row's maximum, "tails" [N, T], and one for each feature.
    `ids` int64 [N, K] or None (all). `size` is the largest |value| before it was taken relative,
    `eps` of the dtype of the logits, `unit` the coarsest on the way to them. `bad` says what is not
    finite in it; nothing can be told from its numbers then.
    """

    parts: dict[str, Array]
    rounding: dict[str, Array]
    ids: Array | None = None
    kept: Array | None = None
    size: float = 0.0
    eps: float = 0.0
    unit: float = 0.0
    bad: str = ""


def cached_answer(spec: CacheSpec, batch: Batch) -> RecordAnswer:
    """What a cache says of the one record of `batch`."""
    parts, rounding, ids, kept = {}, {}, None, None
    if spec.has_rows:
        rows = decode_rows(spec, batch.columns)
        ids, kept = rows.ids, rows.relative > -np.inf
        parts["logits"] = rows.relative.astype(np.float64)
        size = np.abs(rows.logits.astype(np.float64))
        codec = spec.codec
        step_N = batch.columns["step"] if codec.stepped else None
        rounding["logits"] = codec.rounding(parts["logits"], size, step_N)
        if rows.tail_lse is not None:
            parts["tails"] = rows.tail_lse.astype(np.float64)
            moved = np.zeros((len(size), 1))
            if not codec.relative:
                moved = size[:, :1] * codec.half_unit + codec.least
            rounding["tails"] = np.broadcast_to(moved, parts["tails"].shape)
    for feature in spec.features:
        value = decode_feature(feature, batch.columns).astype(np.float64)
        parts[feature.name] = value
        rounding[feature.name] = _feature_rounding(feature, value, batch.columns)
    return RecordAnswer(parts, rounding, ids, kept)


def _feature_rounding(feature: FeatureSpec, value: Array, columns: Mapping[str, Array]) -> Array:
    if feature.dtype == "int8":
        scale = np.asarray(columns[f"{feature.column}_scale"], np.float64)[..., None]
        half: Array = np.broadcast_to(scale / 2 * (1 + 2.0**-20) + LEAST_INT8, value.shape)
        return half
    codec = value_codec(feature.dtype)
    moved: Array = np.abs(value) * codec.half_unit + codec.least
    return moved


@torch.inference_mode()
def live_answers(
    module: nn.Module,
    samples: Samples,
    spec: CacheSpec,
    cached: Mapping[int, RecordAnswer],
    group: int,
    device: torch.device,
) -> dict[int, RecordAnswer]:
    """What the teacher says now of the records of `cached`, in forward passes of up to `group`
    records of one view.
    """
    out = {}
    with FeatureHooks(module, requests_of(spec.features)) as hooks:
        for view, records in _groups(spec, cached, group):
            ids = [spec.samples[0] + record % spec.num_samples for record in records]
            batch = read(samples, view, ids)
            said = answer(module, hooks, batch, convention_of(spec), device)
            rows, logits = said.rows, said.logits
            if rows.mask_BL is not None:
                logits = logits[rows.mask_BL.to(device)]
            for b, record in enumerate(records):
                at = slice(int(rows.offsets[b]), int(rows.offsets[b + 1]))
                own = {
                    f.name: said.features[f.name][at if f.level == "row" else slice(b, b + 1)]
                    for f in spec.features
                }
                live = _live(spec, cached[record], logits[at], own, record)
                out[record] = replace(live, unit=unit(module, logits.dtype, device))
    return out


def _groups(spec: CacheSpec, records: Iterable[int], group: int) -> Iterable[tuple[int, list[int]]]:
    by_view: dict[int, list[int]] = {}
    for record in records:
        by_view.setdefault(spec.views[0] + record // spec.num_samples, []).append(record)
    for view, members in by_view.items():
        for start in range(0, len(members), group):
            yield view, members[start : start + group]


def _live(
    spec: CacheSpec,
    said: RecordAnswer,
    logits_NV: torch.Tensor,
    features: dict[str, torch.Tensor],
    record: int,
) -> RecordAnswer:
    parts: dict[str, Array] = {name: x.double().cpu().numpy() for name, x in features.items()}
    bad = [
        f"has a NaN or an infinity in feature {name}"
        for name, x in parts.items()
        if not np.isfinite(x).all()
    ]
    size = max((float(np.abs(x).max(initial=0)) for x in parts.values()), default=0.0)
    if spec.has_rows:
        rows = len(said.parts["logits"])
        if len(logits_NV) != rows or logits_NV.shape[1] < spec.num_classes:
            raise DataError(
                f"record {record}: the teacher gives {list(logits_NV.shape)} rows and logits; the "
                f"cache has {rows} rows of {spec.num_classes} classes"
            )
        wide_NV = logits_NV[:, : spec.num_classes].float()
        bad += _not_finite(wide_NV)
        max_N = wide_NV.amax(-1)
        size = max(
            size, float(wide_NV.abs().masked_fill(wide_NV == -torch.inf, 0).amax()) if rows else 0.0
        )
        kept_NK = wide_NV
        if said.ids is not None and said.kept is not None:
            ids_NK = torch.from_numpy(said.ids).to(wide_NV.device)
            kept_NK = wide_NV.gather(1, ids_NK)
            excluded_NK = ids_NK.masked_fill(~torch.from_numpy(said.kept).to(ids_NK.device), -1)
            tails = tail_lse(wide_NV, excluded_NK, max_N, [float(t) for t in spec.temperatures])
            parts["tails"] = tails.double().cpu().numpy()
        parts["logits"] = (kept_NK - max_N[:, None]).double().cpu().numpy()
    for name, x in parts.items():
        if x.shape != said.parts[name].shape:
            raise DataError(
                f"record {record}: the teacher's {name} are {list(x.shape)}; the cache has "
                f"{list(said.parts[name].shape)}"
            )
    return RecordAnswer(
        parts, {}, size=size, eps=float(torch.finfo(logits_NV.dtype).eps), bad=" and ".join(bad)
    )


def _not_finite(logits_NV: torch.Tensor) -> list[str]:
    """What no row may have; -inf alone is a logit."""
    if not len(logits_NV):
        return []
    largest_N = logits_NV.amax(-1)
    found = {
        "a NaN logit": logits_NV.isnan(),
        "a logit of +inf": logits_NV == torch.inf,
        "a row of nothing but -inf": largest_N == -torch.inf,
    }
    return [f"has {what}" for what, where in found.items() if bool(where.any())]


def gaps(said: RecordAnswer, live: RecordAnswer) -> dict[str, tuple[float, float]]:
    """Part -> (largest difference beyond the codec's rounding, size of the values); inf where one
    is infinite.
    """
    out = {}
    for name, cached in said.parts.items():
        apart = _apart(cached, live.parts[name], said.rounding[name])
        if name == "logits" and said.kept is not None:
            apart = np.where(said.kept | (live.parts[name] < -100), apart, np.inf)
            apart = np.where(said.kept, apart, 0)
        out[name] = (float(apart.max(initial=0)), _size(name, cached, live))
    return out


def _size(name: str, values: Array, live: RecordAnswer) -> float:
    """How large the numbers are that a part was computed from. Tails are about log V where the
    logits are near 0, and rounded as numbers of that size."""
    own = float(np.abs(values[np.isfinite(values)]).max(initial=0)) if name == "tails" else 0.0
    return max(live.size, own)


def _apart(a: Array, b: Array, rounding: Any = 0.0) -> Array:
    with np.errstate(invalid="ignore"):
        out: Array = np.where(a == b, 0, np.maximum(np.abs(a - b) - rounding, 0))
    return np.where(np.isnan(out), np.inf, out)


def noise(
    first: Mapping[int, RecordAnswer], second: Mapping[int, RecordAnswer]
) -> dict[str, float]:
    """Part -> the largest difference between two live runs, over all records."""
    out: dict[str, float] = {}
    for record, answered in first.items():
        for name, values in answered.parts.items():
            apart = float(_apart(values, second[record].parts[name]).max(initial=0))
            out[name] = max(out.get(name, 0.0), apart)
    return out


def most_noise(live: Mapping[int, RecordAnswer]) -> dict[str, float]:
    """Part -> the most that two live runs may differ by and still differ by rounding alone."""
    out: dict[str, float] = {}
    for answered in live.values():
        for name, values in answered.parts.items():
            out[name] = max(
                out.get(name, 0.0), explained(_size(name, values, answered), answered.unit)
            )
    return out
