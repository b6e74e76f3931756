"""What the cache says of a record beside what the teacher says of it now: the same numbers from
both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdcache.cache.codec import decode_rows
from kdcache.cache.columns import Array
from kdcache.cache.features import decode_feature
from kdcache.cache.reader import Batch
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.data.collate import to_device
from kdcache.data.samples import Samples
from kdcache.errors import DataError
from kdcache.loss.topk import tail_lse
from kdcache.models.checks import explained, unit
from kdcache.models.model import forward, trying
from kdcache.teacher.batches import cached_rows_of, read
from kdcache.teacher.features import Taps, requests_of

# of a value's size, when rounded to nearest
HALF_UNIT = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LEAST_FLOAT16 = 2.0**-25  # half the smallest float16
LEAST_BFLOAT16 = 2.0**-134  # half the smallest bfloat16
# 254 codes of a step that float32 can only hold to half of its smallest, 2^-149
LEAST_UINT8 = 2.0**-141


@dataclass(frozen=True, slots=True)
class Saying:
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


def cached_saying(spec: CacheSpec, batch: Batch) -> Saying:
    """What a cache says of the one record of `batch`."""
    parts, rounding, ids, kept = {}, {}, None, None
    if spec.kind != "none":
        rows = decode_rows(spec, batch.columns)
        ids, kept = rows.ids, rows.relative > -np.inf
        parts["logits"] = rows.relative.astype(np.float64)
        size = np.abs(rows.logits.astype(np.float64))
        rounding["logits"] = _rounding(spec, parts["logits"], size, batch.columns)
        if rows.tail_lse is not None:
            parts["tails"] = rows.tail_lse.astype(np.float64)
            moved = np.zeros((len(size), 1))
            if spec.values == "bfloat16":
                moved = size[:, :1] * HALF_UNIT["bfloat16"] + LEAST_BFLOAT16
            rounding["tails"] = np.broadcast_to(moved, parts["tails"].shape)
    for feature in spec.features:
        value = decode_feature(feature, batch.columns).astype(np.float64)
        parts[feature.name] = value
        rounding[feature.name] = _feature_rounding(feature, value, batch.columns)
    return Saying(parts, rounding, ids, kept)


def _rounding(spec: CacheSpec, relative: Array, size: Array, columns: Mapping[str, Array]) -> Array:
    depth = np.where(np.isfinite(relative), np.abs(relative), 0)
    if spec.values == "uint8":
        # half a step, and what float32 rounds of code * step
        half: Array = (
            np.asarray(columns["step"], np.float64)[:, None] / 2 + depth * 2.0**-23 + LEAST_UINT8
        )
        return half
    finite = np.where(np.isfinite(size), size, 0)
    moved: Array = (finite + finite.max(axis=1, keepdims=True)) * HALF_UNIT[spec.values]
    if spec.values == "bfloat16":
        moved = moved + 2 * LEAST_BFLOAT16
    if spec.values == "float16":
        moved = depth * HALF_UNIT["float16"] + LEAST_FLOAT16
    return moved


def _feature_rounding(feature: FeatureSpec, value: Array, columns: Mapping[str, Array]) -> Array:
    if feature.dtype == "int8":
        scale = np.asarray(columns[f"{feature.column}_scale"], np.float64)[..., None]
        half: Array = np.broadcast_to(scale / 2 * (1 + 2.0**-20) + LEAST_UINT8, value.shape)
        return half
    least = {"float16": LEAST_FLOAT16, "bfloat16": LEAST_BFLOAT16}.get(feature.dtype, 0.0)
    moved: Array = np.abs(value) * HALF_UNIT[feature.dtype] + least
    return moved


@torch.inference_mode()
def live_sayings(
    module: torch.nn.Module,
    samples: Samples,
    spec: CacheSpec,
    said: Mapping[int, Saying],
    group: int,
    device: torch.device,
) -> dict[int, Saying]:
    """What the teacher says now of the records of `said`, in forward passes of up to `group`
    records of one view.
    """
    out = {}
    with Taps(module, requests_of(spec.features), by_row=spec.rows == "ragged") as taps:
        for view, records in _groups(spec, said, group):
            ids = [spec.samples[0] + record % spec.num_samples for record in records]
            batch = read(samples, view, ids)
            inputs = to_device(batch.inputs, device)
            taps.start(batch.real)
            with trying("teacher", module, inputs):
                output = forward(module, inputs)
            rows = cached_rows_of(batch, tuple(output.logits.shape), output.row_mask, spec)
            features = taps.take(rows.mask_BL)
            logits = (
                output.logits if rows.mask_BL is None else output.logits[rows.mask_BL.to(device)]
            )
            for b, record in enumerate(records):
                at = slice(int(rows.offsets[b]), int(rows.offsets[b + 1]))
                own = {
                    f.name: features[f.name][at]
                    if f.level == "row"
                    else features[f.name][b : b + 1]
                    for f in spec.features
                }
                out[record] = replace(
                    _live(spec, said[record], logits[at], own, record),
                    unit=unit(module, logits.dtype, device),
                )
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
    said: Saying,
    logits_NV: torch.Tensor,
    features: dict[str, torch.Tensor],
    record: int,
) -> Saying:
    parts: dict[str, Array] = {name: x.double().cpu().numpy() for name, x in features.items()}
    bad = [
        f"has a NaN or an infinity in feature {name}"
        for name, x in parts.items()
        if not np.isfinite(x).all()
    ]
    size = max((float(np.abs(x).max(initial=0)) for x in parts.values()), default=0.0)
    if spec.kind != "none":
        rows = len(said.parts["logits"])
        if len(logits_NV) != rows or logits_NV.shape[1] < spec.num_classes:
            raise DataError(
                f"record {record}: the teacher gives {list(logits_NV.shape)} rows and logits; the "
                "cache "
                f"has {rows} rows of {spec.num_classes} classes"
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
    return Saying(
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


def gaps(said: Saying, live: Saying) -> dict[str, tuple[float, float]]:
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


def _size(name: str, values: Array, live: Saying) -> float:
    """How large the numbers are that a part was computed from. Tails are about log V where the
    logits are near 0, and rounded as numbers of that size."""
    own = float(np.abs(values[np.isfinite(values)]).max(initial=0)) if name == "tails" else 0.0
    return max(live.size, own)


def _apart(a: Array, b: Array, rounding: Any = 0.0) -> Array:
    with np.errstate(invalid="ignore"):
        out: Array = np.where(a == b, 0, np.maximum(np.abs(a - b) - rounding, 0))
    return np.where(np.isnan(out), np.inf, out)


def noise(first: Mapping[int, Saying], second: Mapping[int, Saying]) -> dict[str, float]:
    """Part -> the largest difference between two live runs, over all records."""
    out: dict[str, float] = {}
    for record, saying in first.items():
        for name, values in saying.parts.items():
            apart = float(_apart(values, second[record].parts[name]).max(initial=0))
            out[name] = max(out.get(name, 0.0), apart)
    return out


def most_noise(live: Mapping[int, Saying]) -> dict[str, float]:
    """Part -> the most that two live runs may differ by and still differ by rounding alone."""
    out: dict[str, float] = {}
    for saying in live.values():
        for name, values in saying.parts.items():
            out[name] = max(out.get(name, 0.0), explained(_size(name, values, saying), saying.unit))
    return out
