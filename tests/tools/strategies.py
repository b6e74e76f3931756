"""Hypothesis strategies for specs, random valid storage columns for any spec, and small caches made
of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kdcache.cache.columns import Array, Columns
from kdcache.cache.identity import Identity
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.cache.values import pack_high
from kdcache.cache.writer import create

IDENTITY = Identity(
    data={"name": "numbers", "revision": "1", "num_samples": 7, "probe": ["00000000000000ff"]},
    teacher={"weights": "sha256-state-dict:00", "dtype": "float32", "num_classes": 9},
)
CONTAINERS = ("arrow", "hdf5")
CLASSES = (
    1,
    2,
    5,
    255,
    256,
    257,
    65536,
    65537,
    2**17,
    2**17 + 1,
    2**18 + 5,
    2**20 + 1,
    2**24 + 1,
    2**31 + 1,
    2**32,
)


@st.composite
def features(draw: st.DrawFn, name: str, rows: str) -> FeatureSpec:
    dtype = draw(st.sampled_from(("float32", "float16", "bfloat16", "int8")))
    shape = draw(st.lists(st.integers(1, 4), min_size=1 if dtype == "int8" else 0, max_size=3))
    level = draw(st.sampled_from(("record", "row"))) if rows == "ragged" else "record"
    recipe = draw(st.sampled_from(("raw", "map", "pool", "cls", "last", "energy")))
    return FeatureSpec(
        name=name, module="body.0", recipe=recipe, dtype=dtype, shape=tuple(shape), level=level
    )


@st.composite
def specs(draw: st.DrawFn, kinds: tuple[str, ...] = ("full", "topk", "none")) -> CacheSpec:
    """Valid specs of few records, every kind, codec, level and dtype among them."""
    kind = draw(st.sampled_from(kinds))
    rows = draw(st.sampled_from(("one", "ragged")))
    start, view = draw(st.integers(0, 2**40)), draw(st.integers(0, 9))
    fields: dict[str, Any] = {
        "kind": kind,
        "rows": rows,
        "samples": (start, start + draw(st.integers(1, 9))),
        "views": (view, view + draw(st.integers(1, 2))),
        "records_per_shard": draw(st.integers(1, 10)),
        "num_classes": 0,
        "seed": draw(st.integers(0, 2**53 - 1)),
        "view_keys": draw(st.booleans()),
        "tokens": rows == "ragged" and draw(st.booleans()),
        "values": draw(st.sampled_from(("float32", "bfloat16", "float16", "uint8"))),
        "features": tuple(
            draw(features(f"f{i}", rows))
            for i in range(draw(st.integers(1 if kind == "none" else 0, 2)))
        ),
    }
    if kind != "none":
        fields |= {
            "num_classes": draw(st.integers(1, 9) if kind == "full" else st.sampled_from(CLASSES)),
            "labels": draw(st.integers(0, 2)),
            "moments": draw(st.booleans()),
            "row_weights": draw(st.booleans()),
        }
        fields["label_weights"] = fields["labels"] > 0 and draw(st.booleans())
    if kind == "topk":
        most = min(fields["num_classes"], 20)
        fields["tiers"] = tuple(sorted(draw(st.sets(st.integers(1, most), min_size=1, max_size=3))))
        fields["temperatures"] = draw(st.sampled_from((("1",), ("1", "2"), ("0.5", "1", "2.25"))))
    return CacheSpec(**fields)


def make_columns(spec: CacheSpec, shard: int, seed: int = 0, most_rows: int = 4) -> Columns:
    """Valid storage columns of one shard: random bit patterns wherever the format allows them. A
    function of its arguments, so that two writers of one shard write the same."""
    rng = np.random.default_rng([seed, shard])
    at = spec.shard(shard)
    counts = {"record": at.stop - at.start}
    out: Columns = {}
    for level in spec.levels():
        if level.count is None:
            # or no row at all
            lengths = rng.integers(0, most_rows, counts["record"]) * int(rng.random() < 0.8)
            out[level.offsets] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            counts[level.name] = int(out[level.offsets][-1])
        else:
            counts[level.name] = counts[level.parent] * level.count
    for column in spec.columns():
        shape = (counts[column.level], *column.shape)
        if column.dtype in ("float16", "float32", "bfloat16"):
            out[column.name] = _floats(rng, column.name, column.dtype, shape)
        else:
            info = np.iinfo(column.storage)
            low = -127 if column.dtype == "int8" else info.min
            out[column.name] = rng.integers(low, info.max, shape, column.storage, endpoint=True)
    return out | _bounded(spec, rng, out)


def _floats(rng: np.random.Generator, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
    bits = rng.integers(0, 2**32, shape, np.uint64).astype(np.uint32)
    if dtype == "float32":
        values: Array = bits.view(np.float32)
    elif dtype == "float16":
        values = bits.astype(np.uint16).view(np.float16)
    else:  # as float32 with the lower half cut off
        values = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    values = np.where(np.isfinite(values), values, 0).astype(values.dtype)
    if name in ("step", "std", "weight", "label_weight") or name.endswith("_scale"):
        values = np.abs(values)
    if name.endswith(("weight", "_scale")):
        values = np.minimum(values, np.float32(2.0**64))
    if (name.startswith("values") or name in ("tail_lse", "label_logit")) and values.size:
        values = np.where(rng.random(shape) < 0.1, -np.inf, values).astype(values.dtype)
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.ascontiguousarray(values)


def _bounded(spec: CacheSpec, rng: np.random.Generator, columns: Columns) -> Columns:
    """Columns whose numbers mean something: ids, labels, tokens, positions."""
    out: Columns = {}
    if spec.tiers:
        rows = len(columns[f"ids_{spec.tiers[0]}"])
        ids = np.empty((rows, spec.k), np.int64)
        for row in ids:
            pool = rng.permutation(
                np.unique(
                    np.concatenate(
                        [
                            rng.integers(0, spec.num_classes, 3 * spec.k),
                            np.arange(min(spec.num_classes, spec.k)),
                            np.arange(max(0, spec.num_classes - spec.k), spec.num_classes),
                        ]
                    )
                )
            )
            row[:] = pool[: spec.k]
        for k in spec.tiers:
            start, stop = spec.tier_range(k)
            out[f"ids_{k}"] = (ids[:, start:stop] & 0xFFFF).astype(columns[f"ids_{k}"].dtype)
            if spec.high_bits:
                out[f"ids_{k}_high"] = pack_high(ids[:, start:stop], spec.high_bits)
    if spec.kind != "none":
        out |= _falling(spec, columns)
    if "label_logit" in columns:  # and no label is above it
        most = columns["max"][:, None] if "max" in columns else np.float32(0)
        out["label_logit"] = np.minimum(columns["label_logit"], most)
    for name in ("label", "token", "pos"):
        if name in columns:
            high = {
                "label": spec.num_classes - 1,
                "token": (spec.num_classes or 2**32) - 1,
                "pos": 2**31 - 1,
            }[name]
            low = -1 if name == "label" else 0
            values = rng.integers(low, high, columns[name].shape, np.int64, endpoint=True)
            out[name] = values.astype(columns[name].dtype)
    return out


def _falling(spec: CacheSpec, columns: Columns) -> Columns:
    """The value columns so that a head never rises: none above 0, which is the first. As unsigned
    integers, negative numbers ascend as they fall, and so do the codes of uint8."""
    names = [f"values_{k}" for k in spec.tiers] or ["values"]
    dtype = columns[names[0]].dtype
    bits = np.concatenate([columns[name] for name in names], axis=1).view(f"<u{dtype.itemsize}")
    if spec.values != "uint8":
        bits |= np.array(1 << (8 * dtype.itemsize - 1), bits.dtype)
    if spec.tiers:
        bits.sort(axis=1)
    bits[:, 0] = 0
    ranges = [spec.tier_range(k) for k in spec.tiers] or [(0, spec.num_classes)]
    return {
        name: np.ascontiguousarray(bits[:, start:stop]).view(dtype)
        for name, (start, stop) in zip(names, ranges, strict=True)
    }


def full_seed(spec: CacheSpec) -> int:
    """The least seed with rows in every level of every shard."""
    return next(
        seed
        for seed in range(1000)
        if all(a.size for i in range(spec.num_shards) for a in make_columns(spec, i, seed).values())
    )


def make_measured(spec: CacheSpec, shard: int) -> dict[str, float]:
    return {"rows": float(shard + 1), "kl:1": 0.1 * (shard + 1), "odd": 1e-300}


def write_cache(
    path: Path,
    spec: CacheSpec,
    container: str = "arrow",
    identity: Identity = IDENTITY,
    seed: int = 0,
) -> str:
    """A sealed cache of `make_columns`; its content id."""
    with create(path, spec, identity, container=container, recorded={"numpy": "0"}) as writer:
        for shard in writer.missing():
            writer.write(shard, make_columns(spec, shard, seed), make_measured(spec, shard))
    return writer.seal()


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def token_spec(**changes: Any) -> CacheSpec:
    """Ragged rows, tokens, two tiers, id planes, a row feature: three shards of 3, 3 and 1 records."""
    fields: dict[str, Any] = {
        "kind": "topk",
        "num_classes": 100_000,
        "samples": (5, 12),
        "records_per_shard": 3,
        "rows": "ragged",
        "tiers": (2, 5),
        "temperatures": ("1", "2"),
        "values": "uint8",
        "labels": 1,
        "tokens": True,
        "features": (
            FeatureSpec(
                name="h", module="body", recipe="last", dtype="bfloat16", shape=(3,), level="row"
            ),
        ),
    }
    return CacheSpec(**fields | changes)


def image_spec(**changes: Any) -> CacheSpec:
    """One row per record, full float16 logits, two views: four shards."""
    fields: dict[str, Any] = {
        "kind": "full",
        "num_classes": 5,
        "samples": (0, 5),
        "views": (0, 2),
        "records_per_shard": 3,
        "labels": 1,
    }
    return CacheSpec(**fields | changes)
