"""A second reader of the cache format, from docs/format.md alone: numpy, json, hashlib, xxhash, and
none of kdcache.

Numbers in comments are the rules of that document. It is short, not fast; errors are assertions.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import xxhash

KNOWN = {
    *(f"kind:{k}" for k in ("full", "topk", "none")),
    "level:row",
    "level:token",
    "predicts:position",
    "predicts:next-token",
    "tokens:vocabulary",
    *(f"values:{v}" for v in ("float32", "bfloat16", "float16", "uint8")),
    *(f"feature:{d}" for d in ("float32", "float16", "bfloat16", "int8")),
    *(f"recipe:{r}" for r in ("raw", "map", "pool", "cls", "last", "energy")),
}
DTYPES = {
    "uint8": "<u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "int8": "<i1",
    "int32": "<i4",
    "int64": "<i8",
    "float16": "<f2",
    "float32": "<f4",
    "bfloat16": "<u2",
}


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def read_json(path):
    """(document, its digest); 2.1, 2.2."""
    data = path.read_bytes()
    document = json.loads(data)
    digest = document.pop("xxh3_128")
    assert digest == xxhash.xxh3_128_hexdigest(canonical(document)), path
    assert data == canonical({**document, "xxh3_128": digest}) + b"\n", path
    return document, digest


def bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Cache:
    """An open cache: every digest of every file has been checked."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.header, header_digest = read_json(self.folder / "header.json")
        # 12.1
        assert self.header["format"] == 1 and set(self.header["requires"]) <= KNOWN
        self.spec, parent = self.header["spec"], None
        # 12.2
        for generation, path in enumerate(sorted((self.folder / "manifest").glob("*.json")), 1):
            manifest, digest = read_json(path)
            assert manifest["generation"] == generation and path.name == f"{generation:08d}.json"
            assert manifest["parent"] == parent and manifest["header"] == header_digest
            self.manifest, parent = manifest, digest
        digests = {key: column["digest"] for key, column in self.manifest["columns"].items()}
        named = {
            "format": 1,
            "spec": self.spec,
            "identity": self.header["identity"],
            "columns": digests,
        }
        # 2.9
        self.content_id = hashlib.sha256(canonical(named)).hexdigest()
        assert self.content_id == self.manifest["content_id"]
        assert self.manifest["keys_digest"] == xxhash.xxh3_128_hexdigest(
            "".join(digests["sample_key"]).encode()
        )
        self.shards = [self._shard(i) for i in range(len(self.manifest["shards"]["file"]))]

    def _shard(self, i):
        """Columns and offsets of a shard by name, through the raw map."""
        facts, digest = read_json(self.folder / f"commit/{i:08d}.json")
        listed = self.manifest["shards"]
        assert (
            digest == listed["commit"][i]
            and facts["header"] == self.manifest["header"]
            and facts["shard"] == i
        )
        for key in ("file", "size", "file_digest", "rest_digest", "records"):
            assert facts[key] == listed[key][i]
        data = (self.folder / "data" / facts["file"]).read_bytes()
        assert (
            len(data) == facts["size"] and xxhash.xxh3_128_hexdigest(data) == facts["file_digest"]
        )
        assert facts["file"].startswith(f"{i:08d}-{facts['file_digest']}.")
        columns, rest, end = {}, b"", 0
        for key, extent in sorted(
            facts["columns"].items(), key=lambda c: (c[1]["offset"], c[1]["length"])
        ):
            assert extent == {what: self.manifest["columns"][key][what][i] for what in extent}
            at, length = extent["offset"], extent["length"]
            part = data[at : at + length]
            assert (
                xxhash.xxh3_128_hexdigest(part) == extent["digest"]
                and len(part) == length
                and at % 8 == 0
            )
            # 4.5
            if length:
                assert at >= end
                rest, end = rest + data[end:at], at + length
            columns[key] = part
        assert xxhash.xxh3_128_hexdigest(rest + data[end:]) == facts["rest_digest"]
        counts = {"record": facts["records"], **facts["rows"]}
        for c in self.header["columns"]:
            columns[c["name"]] = np.frombuffer(columns[c["name"]], DTYPES[c["dtype"]]).reshape(
                counts[c["level"]], *c["shape"]
            )
        # 4.3
        for level in self.header["levels"]:
            key = f"{level['name']}.offsets"
            columns[key] = (
                np.frombuffer(columns[key], "<i8")
                if level["count"] is None
                else np.arange(counts["record"] + 1) * level["count"]
            )
            assert columns[key][0] == 0 and columns[key][-1] == counts[level["name"]]
            assert len(columns[key]) == counts["record"] + 1 and (np.diff(columns[key]) >= 0).all()
        return columns

    def columns(self, record):
        """All columns of one record, by name: scalars and arrays of level record, arrays [rows,
        ...] of the others.
        """
        samples, per_shard = (
            self.spec["samples"][1] - self.spec["samples"][0],
            self.spec["records_per_shard"],
        )
        # 3.2
        view, sample = divmod(record, samples)
        shard = self.shards[view * -(-samples // per_shard) + sample // per_shard]
        at, out = sample % per_shard, {}
        for c in self.header["columns"]:
            offsets = shard.get(f"{c['level']}.offsets")
            rows = at if offsets is None else slice(offsets[at], offsets[at + 1])
            out[c["name"]] = shard[c["name"]][rows]
        return out

    def rows(self, record, k=None):
        """ids [N, K] or None, d float32 [N, K], D float32 [N], tails float32 [N, T] with labels, or
        None; 8, 9.
        """
        spec, columns = self.spec, self.columns(record)
        tiers = [t for t in spec["tiers"] if k is None or t <= k]
        stored = (
            np.concatenate([columns[f"values_{t}"] for t in tiers], 1)
            if tiers
            else columns["values"]
        )
        # 8.1
        if spec["values"] in ("float32", "bfloat16"):
            z = stored if spec["values"] == "float32" else bfloat16(stored)
            D = z.max(1, initial=-np.inf)
            d = z - D[:, None]
        elif spec["values"] == "float16":
            D, d = columns["max"], stored.astype(np.float32)
        else:
            # 8.2
            D, d = columns["max"], 0 - stored.astype(np.float32) * columns["step"][:, None]
            d[stored == 255] = -np.inf
        if not tiers:
            return None, d, D, None
        ids = np.concatenate([self._ids(columns, t) for t in tiers], 1)
        tails = columns["tail_lse"][:, len(tiers) - 1].astype(np.float64)
        # 9.4
        for n in range(len(ids) if spec["labels"] else 0):
            labels = dict(
                zip(columns["label"][n].tolist(), columns["label_logit"][n].tolist(), strict=True)
            )
            for label in dict.fromkeys(columns["label"][n].tolist()):
                if label >= 0 and label not in ids[n]:
                    for t, temperature in enumerate(map(float, spec["temperatures"])):
                        tails[n, t] = np.logaddexp(
                            tails[n, t], (labels[label] - float(D[n])) / temperature
                        )
        return ids, d, D, tails.astype(np.float32)

    def _ids(self, columns, tier):
        """7.2, by one big integer per row."""
        low, V = columns[f"ids_{tier}"].astype(np.int64), self.spec["num_classes"]
        if V <= 65536:
            return low
        h = min(b for b in (1, 2, 4, 8, 16) if b >= (V - 1).bit_length() - 16)
        planes = [int.from_bytes(row.tobytes(), "little") for row in columns[f"ids_{tier}_high"]]
        high = [
            [(plane >> (j * h)) & ((1 << h) - 1) for j in range(low.shape[1])] for plane in planes
        ]
        return low + 65536 * np.array(high, np.int64).reshape(low.shape)

    def probabilities(self, record, temperature, k=None):
        """ids [N, K] or None, p(head) float64 [N, K], p(tail) float64 [N]; 9.5."""
        ids, d, _, tails = self.rows(record, k)
        head, tail = np.exp(d.astype(np.float64) / float(temperature)), np.zeros(len(d))
        if tails is not None:
            tail = np.exp(tails[:, self.spec["temperatures"].index(temperature)].astype(np.float64))
        total = head.sum(1) + tail
        return ids, head / total[:, None], tail / total

    def feature(self, record, name):
        """float32; 11.2."""
        columns = self.columns(record)
        dtype = next(f["dtype"] for f in self.spec["features"] if f["name"] == name)
        stored = np.asarray(columns[f"feature_{name}"])
        if dtype == "int8":
            return (
                stored.astype(np.float32) * np.asarray(columns[f"feature_{name}_scale"])[..., None]
            )
        return bfloat16(stored) if dtype == "bfloat16" else stored.astype(np.float32)
