"""Caches that lie: documents and bytes changed, and every digest made right again."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kdcache.cache.canonical import dumps, seal

Document = dict[str, Any]


def load(path: Path) -> Document:
    document: Document = json.loads(path.read_bytes())
    del document["xxh3_128"]
    return document


class Forge:
    """The documents of a sealed cache of one manifest, free to change and to be written with valid
    digests.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = load(path / "header.json")
        self.commits = [load(p) for p in sorted((path / "commit").iterdir())]
        self.manifest = load(path / "manifest/00000001.json")
        self.data = [(path / "data" / c["file"]).read_bytes() for c in self.commits]

    def copy(self) -> Forge:
        return copy.deepcopy(self)

    def patch(
        self, shard: int, column: str, change: Callable[[np.ndarray], None], dtype: str
    ) -> None:
        """Change the bytes of a column, and all that follows from them: digests, name, manifest,
        content id.
        """
        commit, data = self.commits[shard], bytearray(self.data[shard])
        extent = commit["columns"][column]
        part = slice(extent["offset"], extent["offset"] + extent["length"])
        values = np.frombuffer(bytes(data[part]), dtype).copy()
        change(values)
        data[part] = values.tobytes()
        self.data[shard] = bytes(data)
        extent["digest"] = xxhash.xxh3_128_hexdigest(values.tobytes())
        commit["file_digest"] = xxhash.xxh3_128_hexdigest(self.data[shard])
        commit["file"] = f"{shard:08d}-{commit['file_digest']}.{commit['file'].rpartition('.')[2]}"
        self.manifest["columns"][column]["digest"][shard] = extent["digest"]
        for key in ("file", "file_digest"):
            self.manifest["shards"][key][shard] = commit[key]

    def write(self, path: Path, proofs: bool = True) -> Path:
        """The whole cache at `path`; with `proofs`, digests of header and commits, content id and
        keys made right.
        """
        shutil.rmtree(path, ignore_errors=True)
        for folder in ("data", "commit", "manifest"):
            (path / folder).mkdir(parents=True)
        (path / "header.json").write_bytes(header := seal(self.header))
        manifest = self.manifest
        for shard, (commit, data) in enumerate(zip(self.commits, self.data, strict=True)):
            name = commit.get("file")
            (
                path
                / "data"
                / (
                    name
                    if isinstance(name, str) and "/" not in name and 0 < len(name) < 99
                    else "x"
                )
            ).write_bytes(data)
            if proofs and "header" in commit:
                commit["header"] = digest_of(header)
            (path / f"commit/{shard:08d}.json").write_bytes(sealed := seal(commit))
            if proofs:
                manifest["shards"]["commit"][shard] = digest_of(sealed)
        if proofs:
            manifest["header"] = digest_of(header)
            columns = {name: column["digest"] for name, column in manifest["columns"].items()}
            manifest["content_id"] = hashlib.sha256(
                dumps(
                    {
                        "format": 1,
                        "spec": self.header["spec"],
                        "identity": self.header["identity"],
                        "columns": columns,
                    }
                )
            ).hexdigest()
            manifest["keys_digest"] = xxhash.xxh3_128_hexdigest(
                "".join(columns["sample_key"]).encode()
            )
        (path / "manifest/00000001.json").write_bytes(seal(manifest))
        return path


def digest_of(sealed: bytes) -> str:
    return sealed[-35:-3].decode()
