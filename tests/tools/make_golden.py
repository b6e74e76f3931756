"""The golden caches of tests/data: tiny, and made of integers, so that no library's rounding is in
them.

python tests/tools/make_golden.py tests/data        # only for a new cache: those that are there never
    change
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kdcache.cache.codec import encode_rows
from kdcache.cache.features import encode_feature
from kdcache.cache.identity import Identity
from kdcache.cache.rows import Rows, row_shapes
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.cache.writer import create

CONTAINERS = ("arrow", "hdf5")
MADE_WITH = {"arrow": "pyarrow 26.0.1", "hdf5": "h5py 3.16.0, HDF5 2.0.0"}
IDENTITY = Identity(
    data={
        "name": "golden",
        "revision": "1",
        "num_samples": 7,
        "class_names": ["zero", "ëin"],
        "window": 0,
        "probe": ["00000000000003e8"],
    },
    teacher={
        "weights": "sha256-state-dict:00",
        "dtype": "float32",
        "adapters": "",
        "preprocessing": "",
        "num_classes": 5,
    },
    tokenizer={"fingerprint": "ab", "template": "", "packing": "none"},
)


def integers(seed, shape):
    """int64 in 0..2^32-1, a plain function of the position: Knuth's multiplicative hash, twice."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 1_000_003 + 1)
    for _ in range(2):
        x = (x * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
        x ^= x >> np.uint64(15)
    return x.astype(np.int64).reshape(shape)


def dyadic(seed, shape, low, high, denominator):
    """float32 multiples of 1 / denominator in [low, high)."""
    span = int((high - low) * denominator)
    return ((integers(seed, shape) % span) / denominator + low).astype(np.float32)


@dataclass(frozen=True)
class Golden:
    """A spec, the rows of each record (ragged), and the dense logits they come from."""

    spec: CacheSpec
    rows_of_record: tuple[int, ...] = ()
    denominator: int = 16  # of the logits
    deepest: int = 24


FEATURES = tuple(
    FeatureSpec(name=f"{dtype}_{i}", module=f"body.{i}", recipe=recipe, dtype=dtype, shape=shape)
    for i, (dtype, recipe, shape) in enumerate(
        [
            ("float32", "pool", (3,)),
            ("float16", "map", (2, 2, 3)),
            ("bfloat16", "cls", (4,)),
            ("int8", "raw", (2, 5)),
            ("int8", "last", (3,)),
            ("float32", "raw", ()),
        ]
    )
)
BASE = CacheSpec(kind="full", num_classes=5, samples=(0, 7), records_per_shard=4, values="float32")
GOLDEN = {
    "full_float32": Golden(replace(BASE, labels=1, moments=True)),
    "full_float16": Golden(
        replace(BASE, values="float16", samples=(10, 13)), denominator=32, deepest=200_000
    ),
    "topk_uint8": Golden(
        replace(
            BASE,
            kind="topk",
            num_classes=70_000,
            samples=(3, 6),
            views=(1, 3),
            records_per_shard=3,
            values="uint8",
            tiers=(4, 9),
            temperatures=("1", "2", "4"),
            labels=2,
            label_weights=True,
            row_weights=True,
            view_keys=True,
            seed=7,
        ),
        denominator=64,
        deepest=200,
    ),
    "topk_bfloat16": Golden(
        replace(
            BASE,
            kind="topk",
            num_classes=200,
            values="bfloat16",
            tiers=(5,),
            temperatures=("0.5", "1"),
            labels=1,
        ),
        denominator=1024,
    ),
    "tokens_float16": Golden(
        replace(
            BASE,
            kind="topk",
            num_classes=300,
            values="float16",
            tiers=(3,),
            temperatures=("1", "2"),
            labels=1,
            rows="ragged",
            tokens=True,
            samples=(0, 5),
            records_per_shard=3,
            features=(
                FeatureSpec(
                    name="hidden",
                    module="model.norm",
                    recipe="raw",
                    dtype="float16",
                    shape=(4,),
                    level="row",
                ),
            ),
        ),
        rows_of_record=(3, 0, 2, 4, 1),
    ),
    # A tagger: a row for each token, of fewer classes than there are words.
    "positions_uint8": Golden(
        replace(
            BASE,
            kind="topk",
            num_classes=40,
            values="uint8",
            tiers=(3,),
            temperatures=("1",),
            labels=1,
            rows="ragged",
            tokens=True,
            predicts="position",
            vocabulary=70_000,
            samples=(0, 4),
            records_per_shard=2,
        ),
        rows_of_record=(3, 1, 2, 4),
        deepest=100,
    ),
    # Next tokens of records whose tokens are not all that the teacher was given.
    "next_float32": Golden(
        replace(
            BASE,
            num_classes=6,
            rows="ragged",
            predicts="next-token",
            samples=(0, 4),
            records_per_shard=4,
        ),
        rows_of_record=(2, 0, 3, 1),
    ),
    "features": Golden(replace(BASE, kind="none", num_classes=0, features=FEATURES)),
}


def dense_logits(golden, first_row, count):
    """float32 [count, V] of rows from `first_row` on: exact multiples of 1 / denominator, one -inf
    in some rows.
    """
    z = np.concatenate(
        [
            dyadic(row, (1, golden.spec.num_classes), -golden.deepest, 8, golden.denominator)
            for row in range(first_row, first_row + count)
        ]
        or [np.zeros((0, golden.spec.num_classes))]
    )
    z[(np.arange(count) + first_row) % 3 == 1, 1] = -np.inf
    # six ids stand out, one above 65535, two tie; uint8 drops what else a head of nine has
    if z.shape[1] > 1000:
        z[:, np.arange(z.shape[1]) % 11_000 != 10_999] -= 150
        z[:, 10_999] = z[:, 21_999]
    return z.astype(np.float32)


def tails(spec, z, ids, label):
    """float32 [N, tiers, T], to 1/1024: what libm does in its last bits does not reach the files."""
    out = np.empty((len(z), len(spec.tiers), len(spec.temperatures)))
    for n in range(len(z)):
        for i, k in enumerate(spec.tiers):
            left = z[n].astype(np.float64) - z[n].max()
            left[ids[n, :k]] = -np.inf
            left[label[n][label[n] >= 0]] = -np.inf
            for t, temperature in enumerate(map(float, spec.temperatures)):
                out[n, i, t] = np.round(1024 * np.log(np.exp(left / temperature).sum())) / 1024
    return out.astype(np.float32)


def make_rows(golden, first_row, count, pos):
    spec, keep = golden.spec, row_shapes(golden.spec)
    z = dense_logits(golden, first_row, count)
    fields = {
        "pos": pos,
        "weight": dyadic(71, count, 0, 2, 8),
        "mean": dyadic(72, count, -1, 1, 8),
        "std": dyadic(73, count, 0, 2, 8),
        "logits": z,
    }
    if spec.kind == "topk":
        order = np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z), axis=1)
        fields["ids"] = order[:, : spec.k]
        fields["logits"] = np.take_along_axis(z, fields["ids"], 1)
    # Labels by turns: anywhere, in the first tier, in the last entry, unknown; the second one equal
    # to the first in every third row.
    label = integers(first_row + 80, (count, spec.labels)) % max(1, spec.num_classes)
    for n in range(count if spec.labels else 0):
        turn = first_row + n
        if spec.kind == "topk" and turn % 4 in (1, 2):
            label[n, 0] = fields["ids"][n, 0 if turn % 4 == 1 else -1]
        label[n, -1] = -1 if turn % 4 == 3 else label[n, 0] if turn % 3 == 0 else label[n, -1]
    fields["label"] = label
    fields["label_weight"] = dyadic(74, label.shape, 0, 1, 4)
    if spec.kind == "topk":
        fields["tail_lse"] = tails(spec, z, fields["ids"], label)
        known = np.take_along_axis(z, np.maximum(label, 0), 1)
        fields["label_logit"] = np.where(label >= 0, known, -np.inf).astype(np.float32)
    return Rows(**{name: fields[name] for name in keep})


def shard_columns(golden, shard):
    """(columns, measured) of one shard."""
    spec, at = golden.spec, golden.spec.shard(shard)
    records = range(spec.record(at.view, at.start), spec.record(at.view, at.stop - 1) + 1)
    counts = [golden.rows_of_record[r] if golden.rows_of_record else 1 for r in records]
    offsets = np.cumsum([0, *counts]).astype(np.int64)
    first_row = sum(golden.rows_of_record[: records[0]]) if golden.rows_of_record else records[0]
    columns = {"sample_key": (np.arange(at.start, at.stop) + 1000).astype(np.uint64)}
    if spec.view_keys:
        columns["view_key"] = np.arange(at.start, at.stop).astype(np.uint64) + np.uint64(
            2**63 + at.view
        )
    measured = {}
    if row_shapes(spec):
        pos = np.concatenate([np.arange(c) for c in counts])
        encoded = encode_rows(spec, make_rows(golden, first_row, int(offsets[-1]), pos))
        columns, measured = columns | encoded.columns, encoded.measured
    if spec.rows == "ragged":
        columns["row.offsets"] = offsets
    if spec.tokens:
        after = 1 if spec.convention == "next-token" else 0
        lengths = np.array([c + after if c else 0 for c in counts])
        columns["token.offsets"] = np.cumsum([0, *lengths]).astype(np.int64)
        total = int(lengths.sum())
        dtype = np.uint16 if spec.num_tokens <= 2**16 else np.uint32
        columns["token"] = (integers(shard + 90, total) % spec.num_tokens).astype(dtype)
        columns["document_start"] = np.zeros(total, np.uint8)
        columns["document_start"][columns["token.offsets"][:-1][lengths > 0]] = 1
    for i, feature in enumerate(spec.features):
        n = len(records) if feature.level == "record" else int(offsets[-1])
        columns |= encode_feature(feature, dyadic(shard * 10 + i, (n, *feature.shape), -4, 4, 128))
    return columns, measured


def write(folder, name, container):
    """Write one golden cache."""
    golden = GOLDEN[name]
    with create(
        folder, golden.spec, IDENTITY, container=container, recorded={"note": "golden"}
    ) as writer:
        for shard in writer.missing():
            writer.write(shard, *shard_columns(golden, shard))


if __name__ == "__main__":
    for name in GOLDEN:
        for container in CONTAINERS:
            folder = Path(sys.argv[1]) / f"{name}.{container}"
            if not folder.exists():
                write(folder, name, container)
                print(
                    folder, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), "bytes"
                )
