"""The JSON files of a cache: header, commit records and manifests, as bytes and back, nothing
believed unchecked.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from kdcache.cache.canonical import MAX_CONTAINERS, MAX_VALUES, digest, dumps, seal, unseal
from kdcache.cache.columns import level_json
from kdcache.cache.identity import Identity
from kdcache.cache.rawmap import Extent, Facts, check_extents, facts_records
from kdcache.cache.spec import FEATURE_DTYPES, KINDS, LEVELS, PREDICTS, RECIPES, CacheSpec
from kdcache.cache.store import MAX_JSON
from kdcache.cache.values import CODECS
from kdcache.errors import CacheCorrupt, NotBuilt, UsageError, did_you_mean
from kdcache.user.code_errors import printable

FORMAT = 1
HEADER = "header.json"
SUFFIXES = {"arrow": "arrow", "hdf5": "h5"}
MAX_SHARDS = 10**8  # file names have eight digits
MAX_MANIFEST = 2**28  # bytes: about 300,000 shards of ten columns
HEX32 = re.compile(r"[0-9a-f]{32}")
HEX64 = re.compile(r"[0-9a-f]{64}")
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?|-?inf|nan")
# What this version reads, by the names that stand in `requires`: all that a spec may have, and
# nothing else. The tables themselves, so that an entry in one of them is known here too.
KNOWN: dict[str, Iterable[str]] = {
    "kind": KINDS,
    "values": CODECS,
    "level": LEVELS,
    "recipe": RECIPES,
    "feature": FEATURE_DTYPES,
    "predicts": PREDICTS,
    "tokens": ("vocabulary",),
}
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Header:
    """What a cache promises for good. `digest` names it in every other file."""

    spec: CacheSpec
    identity: Identity
    container: str
    recorded: dict[str, str]
    digest: str


def sealed_digest(data: bytes) -> str:
    """The digest that a sealed document ends in."""
    return data[-35:-3].decode("ascii")


def requires(spec: CacheSpec) -> list[str]:
    """What a reader must know to read this cache, by name: how the format grows without a format 2."""
    names = {f"kind:{spec.kind}", *(f"level:{level.name}" for level in spec.levels())}
    if spec.has_rows:
        names.add(f"values:{spec.values}")
    if spec.predicts:
        names.add(f"predicts:{spec.predicts}")
    if spec.vocabulary:
        names.add("tokens:vocabulary")
    for feature in spec.features:
        names |= {f"recipe:{feature.recipe}", f"feature:{feature.dtype}"}
    return sorted(names)


# ---- header
# ---------------------------------------------------------------------------------------------------


def header_bytes(
    spec: CacheSpec, identity: Identity, container: str, recorded: dict[str, str]
) -> bytes:
    """The bytes of header.json. UsageError for a container or a number of shards that cannot be."""
    if container not in SUFFIXES:
        raise UsageError(f"container {container!r} is unknown{did_you_mean(container, SUFFIXES)}")
    check_shards(spec)
    data = seal(_header_document(spec, identity, container, recorded))
    if (
        len(data) > MAX_JSON
        or data.count(b",") > MAX_VALUES
        or data.count(b"{") + data.count(b"[") > MAX_CONTAINERS
    ):
        raise UsageError(
            f"a header of {len(data)} bytes with about {data.count(b',')} values is more than a "
            f"reader takes ({MAX_JSON} and {MAX_VALUES}): fewer class names or features"
        )
    return data


def shard_line(spec: CacheSpec) -> int:
    """Bytes of one shard in a manifest, at most: digests, names and numbers of the shard and of
    each column.
    """
    return 60 + 60 * len(spec.layout.names) + 300


def check_shards(spec: CacheSpec) -> None:
    """UsageError for more shards than a manifest and the names of files can hold."""
    most = min(MAX_MANIFEST // shard_line(spec), MAX_SHARDS)
    if spec.num_shards > most:
        raise UsageError(
            f"{spec.num_views} views of {spec.num_samples} samples in shards of "
            f"{spec.records_per_shard} are {spec.num_shards} shards; a manifest holds {most}: take "
            "larger shards or fewer views"
        )


def _header_document(
    spec: CacheSpec, identity: Identity, container: str, recorded: dict[str, str]
) -> Document:
    return {
        "format": FORMAT,
        "requires": requires(spec),
        "container": container,
        "spec": spec.to_json(),
        "identity": identity.to_json(),
        "levels": [level_json(level) for level in spec.levels()],
        "columns": [c.to_json() for c in spec.columns()],
        "recorded": recorded,
    }


def parse_header(data: bytes, where: str) -> Header:
    """The header in the bytes of a file; NotBuilt for what this version cannot read, CacheCorrupt
    for nonsense.
    """
    doc = unseal(data, where)
    if type(doc.get("format")) is not int or doc["format"] != FORMAT:
        raise NotBuilt(
            f"{where}: format {printable(str(doc.get('format'))[:40])}; this version reads format "
            f"{FORMAT}"
        )
    needed = doc.get("requires")
    _require(
        isinstance(needed, list) and all(isinstance(n, str) for n in needed),
        where,
        "requires",
        "a list of names",
    )
    known = {f"{what}:{name}" for what, names in KNOWN.items() for name in names}
    foreign = [n for n in doc["requires"] if n not in known]
    if foreign:
        names = ", ".join(map(printable, foreign))[:200]
        raise NotBuilt(f"{where}: the cache needs {names}, which this version does not have")
    try:
        spec = CacheSpec.from_json(doc.get("spec"))
        identity = Identity.from_json(doc.get("identity"))
    except NotBuilt as e:
        raise NotBuilt(f"{where}: {e}") from e
    except UsageError as e:
        raise CacheCorrupt(f"{where}: {e}") from e
    container, recorded = doc.get("container"), doc.get("recorded")
    if not isinstance(container, str) or container not in SUFFIXES:
        raise NotBuilt(
            f"{where}: container {str(container)[:40]!r}; this version reads {', '.join(SUFFIXES)}"
        )
    strings = isinstance(recorded, dict) and all(isinstance(v, str) for v in recorded.values())
    _require(strings, where, "recorded", "an object of strings")
    expected = _header_document(spec, identity, container, doc["recorded"])
    for key in sorted({*doc, *expected}):
        _require(
            key in doc and key in expected and dumps(doc[key]) == dumps(expected[key]),
            where,
            key,
            "what the spec gives" if key in expected else "no such key",
        )
    _require(spec.num_shards <= MAX_SHARDS, where, "spec", f"at most {MAX_SHARDS} shards")
    return Header(spec, identity, container, doc["recorded"], sealed_digest(data))


# ---- commit records
# -------------------------------------------------------------------------------------------


def data_name(header: Header, shard: int, file_digest: str) -> str:
    """The name of a shard file below data/."""
    return f"{shard:08d}-{file_digest}.{SUFFIXES[header.container]}"


def commit_name(shard: int) -> str:
    return f"commit/{shard:08d}.json"


def commit_bytes(header: Header, facts: Facts) -> bytes:
    """The bytes of the commit record of a shard file."""
    return seal(
        {
            "format": FORMAT,
            "header": header.digest,
            "shard": facts.shard,
            "file": facts.file,
            "size": facts.size,
            "file_digest": facts.file_digest,
            "rest_digest": facts.rest_digest,
            "records": facts.records,
            "rows": facts.rows,
            "measured": facts.measured,
            "columns": {
                name: {"offset": e.offset, "length": e.length, "digest": e.digest}
                for name, e in facts.columns.items()
            },
        }
    )


COMMIT: dict[str, Callable[[Any], bool]] = {}  # filled below: key -> check of its value


def parse_commit(data: bytes, where: str, header: Header, shard: int) -> Facts:
    """The facts in a commit record; CacheCorrupt unless they can be true of shard `shard` of this
    cache.
    """
    names = len(header.spec.layout.names)
    doc = unseal(data, where, containers=64 + names, values=2**12 + 4 * names)
    _keys(doc, COMMIT, where)
    _ours(doc, header, where)
    columns = doc["columns"]
    _keys(columns, dict.fromkeys(header.spec.layout.names, _is_extent), f"{where}: columns")
    _keys(doc["rows"], dict.fromkeys(header.spec.layout.levels, _is_count), f"{where}: rows")
    _require(doc["shard"] == shard, where, "shard", f"{shard}, by the name of the file")
    facts = Facts(
        shard=shard,
        file=doc["file"],
        size=doc["size"],
        file_digest=doc["file_digest"],
        rest_digest=doc["rest_digest"],
        records=doc["records"],
        rows=doc["rows"],
        measured=doc["measured"],
        columns={n: Extent(c["offset"], c["length"], c["digest"]) for n, c in columns.items()},
        commit=sealed_digest(data),
    )
    _check_facts(header, facts, where)
    return facts


def _check_facts(header: Header, facts: Facts, where: str) -> None:
    name = data_name(header, facts.shard, facts.file_digest)
    _require(facts.file == name, where, "file", f"{name}, by its shard and digest")
    check_extents(header.spec, facts, where)


# ---- manifests
# ------------------------------------------------------------------------------------------------


def manifest_name(generation: int) -> str:
    return f"manifest/{generation:08d}.json"


def content_id(header: Header, columns: dict[str, list[str]]) -> str:
    """SHA-256 over spec, identity and the digests of every column by shard: the same for both
    containers.
    """
    return hashlib.sha256(
        dumps(
            {
                "format": FORMAT,
                "spec": header.spec.to_json(),
                "identity": header.identity.to_json(),
                "columns": columns,
            }
        )
    ).hexdigest()


def keys_digest(sample_key_digests: Iterable[str]) -> str:
    """XXH3-128 over the digests (32 hex digits each) of the sample_key column of every shard, in
    order.
    """
    return digest("".join(sample_key_digests).encode("ascii"))


def manifest_body(header: Header, shards: Sequence[Facts]) -> Document:
    """Everything in a manifest but its place in the chain: a pure function of the commit records."""
    names, levels = header.spec.layout.names, header.spec.layout.levels
    columns: dict[str, dict[str, Any]] = {
        name: {
            "offset": [f.columns[name].offset for f in shards],
            "length": [f.columns[name].length for f in shards],
            "digest": [f.columns[name].digest for f in shards],
        }
        for name in names
    }
    return {
        "format": FORMAT,
        "header": header.digest,
        "content_id": content_id(header, {name: c["digest"] for name, c in columns.items()}),
        "keys_digest": keys_digest(columns["sample_key"]["digest"]),
        "shards": {
            "file": [f.file for f in shards],
            "size": [f.size for f in shards],
            "file_digest": [f.file_digest for f in shards],
            "rest_digest": [f.rest_digest for f in shards],
            "commit": [f.commit for f in shards],
            "records": [f.records for f in shards],
            "rows": {level: [f.rows[level] for f in shards] for level in levels},
        },
        "columns": columns,
        "measured": sum_measured(f.measured for f in shards),
    }


def sum_measured(parts: Iterable[dict[str, str]]) -> dict[str, str]:
    """Sums by name, rounded once, so that they depend on no order."""
    values: dict[str, list[float]] = {}
    for part in parts:
        for name, text in part.items():
            values.setdefault(name, []).append(float(text))
    return {name: number_text(_sum(v)) for name, v in values.items()}


def _sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond float64, or infinities of both signs
        return sum(values)


def number_text(value: float) -> str:
    """A measured float as the shortest decimal that reads back as itself."""
    return repr(float(value))


@dataclass(frozen=True, slots=True)
class Manifest:
    """A sealed list of shards; `facts` gives one of them, checked."""

    header: Header
    generation: int
    digest: str
    body: Document
    where: str

    @property
    def content_id(self) -> str:
        return str(self.body["content_id"])

    def facts(self, shard: int) -> Facts:
        """CacheCorrupt unless what the manifest says of this shard can be true."""
        shards = self.body["shards"]
        facts = Facts(
            shard=shard,
            **{
                k: shards[k][shard]
                for k in ("file", "size", "file_digest", "rest_digest", "records")
            },
            rows={level: counts[shard] for level, counts in shards["rows"].items()},
            commit=shards["commit"][shard],
            columns={
                name: Extent(c["offset"][shard], c["length"][shard], c["digest"][shard])
                for name, c in self.body["columns"].items()
            },
        )
        _check_facts(self.header, facts, f"{self.where}: shard {shard}")
        return facts


def manifest_bytes(body: Document, generation: int, parent: str | None) -> bytes:
    return seal({**body, "generation": generation, "parent": parent})


def commit_limit(spec: CacheSpec) -> int:
    """More bytes than the commit record of a shard of this spec can have."""
    return 2**16 + 512 * len(spec.layout.names)


def manifest_limit(spec: CacheSpec) -> int:
    """More bytes than a manifest of this spec can have."""
    return min(MAX_MANIFEST, 2**20 + 2 * spec.num_shards * shard_line(spec))


def parse_manifest(
    data: bytes, where: str, header: Header, generation: int, parent: str | None
) -> Manifest:
    """The manifest in the bytes of a file; CacheCorrupt unless whole, of this header, and in its
    place in the chain.
    """
    count, known = header.spec.num_shards, header.spec.layout
    names, levels = len(known.names), len(known.levels)
    doc = unseal(
        data,
        where,
        containers=64 + 4 * names + levels,
        values=2**12 + (count + 1) * (6 + levels + 3 * names),
    )
    lists = {
        "file": _list(str, count),
        "size": _list(int, count),
        "records": _list(int, count),
        "file_digest": _list(HEX32, count),
        "rest_digest": _list(HEX32, count),
        "commit": _list(HEX32, count),
    }
    _keys(doc, MANIFEST, where)
    _ours(doc, header, where)
    _keys(doc["shards"], {**lists, "rows": _is_object}, f"{where}: shards")
    _keys(
        doc["shards"]["rows"],
        dict.fromkeys(header.spec.layout.levels, _list(int, count)),
        f"{where}: rows",
    )
    _keys(doc["columns"], dict.fromkeys(header.spec.layout.names, _is_object), f"{where}: columns")
    extent = {
        "offset": _list(int, count),
        "length": _list(int, count),
        "digest": _list(HEX32, count),
    }
    for name, column in doc["columns"].items():
        _keys(column, extent, f"{where}: column {name}")
    view = [facts_records(header.spec, i) for i in range(header.spec.shards_per_view)]
    _require(
        doc["shards"]["records"] == view * header.spec.num_views,
        where,
        "records",
        "what the header gives",
    )
    _require(
        doc["generation"] == generation,
        where,
        "generation",
        f"{generation}, by the name of the file",
    )
    _require(
        doc["parent"] == parent, where, "parent", f"{parent}, the digest of the manifest before it"
    )
    del doc["generation"], doc["parent"]
    digests = {name: column["digest"] for name, column in doc["columns"].items()}
    _require(
        doc["content_id"] == content_id(header, digests),
        where,
        "content_id",
        "what its columns give",
    )
    _require(
        doc["keys_digest"] == keys_digest(digests["sample_key"]),
        where,
        "keys_digest",
        "what its columns give",
    )
    return Manifest(header, generation, sealed_digest(data), doc, where)


# ---- checks of values
# -----------------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and HEX32.fullmatch(value) is not None


def _is_extent(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"offset", "length", "digest"}
        and _is_count(value["offset"])
        and _is_count(value["length"])
        and _is_hex(value["digest"])
    )


def _is_measured(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(v, str) and NUMBER.fullmatch(v) for v in value.values()
    )


def _list(item: type | re.Pattern[str], count: int) -> Callable[[Any], bool]:
    """A check for lists of `count` strings, digests or counts."""
    if isinstance(item, re.Pattern):
        return lambda v: _of(v, str, count) and all(map(item.fullmatch, v))
    if item is int:
        return lambda v: _of(v, int, count) and min(v) >= 0
    return lambda v: _of(v, item, count)


def _of(value: Any, item: type, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and set(map(type, value)) == {item}


COMMIT |= {
    "format": _is_count,
    "header": _is_hex,
    "shard": _is_count,
    "file": lambda v: isinstance(v, str),
    "size": _is_count,
    "file_digest": _is_hex,
    "rest_digest": _is_hex,
    "records": _is_count,
    "rows": _is_object,
    "columns": _is_object,
    "measured": _is_measured,
}
MANIFEST: dict[str, Callable[[Any], bool]] = {
    "format": _is_count,
    "header": _is_hex,
    "parent": lambda v: v is None or _is_hex(v),
    "generation": _is_count,
    "content_id": lambda v: isinstance(v, str) and HEX64.fullmatch(v) is not None,
    "keys_digest": _is_hex,
    "shards": _is_object,
    "columns": _is_object,
    "measured": _is_measured,
}


def _keys(doc: Document, checks: dict[str, Callable[[Any], bool]], where: str) -> None:
    """CacheCorrupt unless `doc` has exactly these keys with values of the right form."""
    if set(doc) != set(checks):
        odd = sorted(set(doc) ^ set(checks))[0]
        _fail(where, odd, "no such key" if odd in doc else "this key to be there")
    for key, good in checks.items():
        _require(good(doc[key]), where, key, "a value of another form")


def _ours(doc: Document, header: Header, where: str) -> None:
    _require(doc["format"] == FORMAT, where, "format", str(FORMAT))
    _require(
        doc["header"] == header.digest,
        where,
        "header",
        f"{header.digest}, the digest of header.json; the file is of another cache",
    )


def _require(good: Any, where: str, key: str, expected: str) -> None:
    if not good:
        _fail(where, key, expected)


def _fail(where: str, key: str, expected: str) -> NoReturn:
    raise CacheCorrupt(f"{where}: {key[:80]!r} is wrong; expected {expected}")
