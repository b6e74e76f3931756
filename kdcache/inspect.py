"""What is in a cache, whose it is, how large, how much of the teacher it keeps; one record of it;
how two differ. `inspect` finds it, `render` makes text of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.catalog import HEADER
from kdcache.cache.codec import DecodedRows, decode_rows
from kdcache.cache.columns import ROOT, Array
from kdcache.cache.identity import difference
from kdcache.cache.measure import FULL_TEMPERATURES, log_sum_exp
from kdcache.cache.repair import FOLDERS
from kdcache.cache.spec import CacheSpec, spec_difference
from kdcache.errors import FieldDifference, IdentityMismatch, UsageError
from kdcache.user.code_errors import entrance, printable, users_code

if TYPE_CHECKING:
    from kdcache.cache.reader import Batch, Cache

# rows from which covered mass and truncation KL are computed; a smaller cache: all
SAMPLE_ROWS = 2**16
# they come from so many, if these hold enough: the first touch of one reads it whole
SAMPLE_SHARDS = 16
CHUNK_ELEMENTS = 2**22  # values decoded at a time
SHOWN_ENTRIES = 10  # of a row of `--record`
SHOWN_ROWS = 8  # of a record of a token cache
Namer = Callable[[int], str]


@entrance
def inspect(
    cache: Cache | Path | str,
    record: int | None = None,
    tokenizer: str | Path | None = None,
    other: Cache | Path | str | None = None,
    data: Any = None,
    data_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts of a cache (a folder, or an open Cache) as one JSON object; `render` makes them
    text.

    record: one record instead, its entries named by class names, or by `tokenizer` (a file or
    folder), which must be the one of the cache (IdentityMismatch). data: a dataset or SPEC, of
    which the record's key must be the cached one (DataError). other: how `other` differs from
    `cache` instead. UsageError for a record that is not there.
    """
    if other is not None and record is not None:
        raise UsageError(
            "a record of one cache or two caches: --record and a second cache do not go together"
        )
    if record is None and (tokenizer is not None or data is not None):
        raise UsageError(
            "--tokenizer and --data say how to show a record: name one with --record N"
        )
    if data is None and data_args:
        raise UsageError(
            f"--data-arg {next(iter(data_args))}: no dataset is given; name one with --data"
        )
    opened = _open(cache)
    if other is not None:
        return compare(opened, _open(other))
    if record is not None:
        return show_record(opened, record, tokenizer=tokenizer, data=data, data_args=data_args)
    return facts(opened)


def _open(cache: Cache | Path | str) -> Cache:
    if not isinstance(cache, str | Path):
        return cache
    from kdcache.cache.reader import open as open_cache

    return open_cache(Path(cache))


def facts(cache: Cache) -> dict[str, Any]:
    """What is in it, whose it is, how large it is, and what it lost."""
    spec, rows = cache.spec, num_rows(cache)
    own = [
        Path(cache.path) / HEADER,
        *(path for folder in FOLDERS for path in (Path(cache.path) / folder).rglob("*")),
    ]
    total = sum(file.stat().st_size for file in own if file.is_file())
    identity = cache.identity.to_json()
    identity["data"] = {
        **identity["data"],
        "probe": f"{len(identity['data'].get('probe', []))} keys",
    }
    return {
        "cache": str(cache.path),
        "content_id": cache.content_id,
        "container": cache.container,
        "generation": cache.generation,
        **spec.to_json(),
        "k": spec.k,
        "num_records": cache.num_records,
        "num_rows": rows,
        "num_shards": spec.num_shards,
        "identity": identity,
        "recorded": dict(cache.recorded),
        "bytes": total,
        "bytes_per_record": total / cache.num_records,
        "bytes_per_row": total / rows if rows else None,
        "column_bytes": cache.column_bytes(),
        "coverage": coverage(cache),
        "quantisation_kl": quantisation(cache.measured, spec),
    }


def num_rows(cache: Cache) -> int:
    """Rows of the whole cache: one per record, or what the shards' commits say; 0 for kind none."""
    if not cache.spec.has_rows:
        return 0
    return (
        cache.num_records
        if cache.spec.rows == "one"
        else sum(int(s.rows["row"]) for s in cache.shards)
    )


def quantisation(measured: Mapping[str, float], spec: CacheSpec) -> dict[str, float] | None:
    """Mean KL(teacher || decoded) in nats per temperature, from the sums taken during the dump;
    None without them.
    """
    rows = measured.get("rows", 0)
    names = spec.temperatures if spec.is_sparse else FULL_TEMPERATURES
    found = {t: measured[f"kl:{t}"] / rows for t in names if rows and f"kl:{t}" in measured}
    return found or None


# ---- how much of the teacher is kept
# --------------------------------------------------------------------------------


def coverage(cache: Cache, sample_rows: int = SAMPLE_ROWS) -> dict[str, Any] | None:
    """Mean covered mass and truncation KL (-log covered mass, nats) per tier and temperature, from
    the cache itself.

    Over all rows, or, where there are more than `sample_rows`, over the rows of evenly spread
    records. None for caches that leave nothing out (kind full) or have no rows (kind none).
    """
    spec = cache.spec
    if not spec.is_sparse:
        return None
    sums = np.zeros((2, len(spec.tiers), len(spec.temperatures)))
    rows = 0
    for records in sampled_records(spec, num_rows(cache), sample_rows):
        batch = cache.read(records, columns=[c.name for c in spec.columns() if c.level == "row"])
        for tier, k in enumerate(spec.tiers):
            truncation = truncation_kl(spec, decode_rows(spec, row_columns(batch), k))
            sums[:, tier] += np.exp(-truncation).sum(0), truncation.sum(0)
        rows += len(truncation)
    mass, kl = sums / max(rows, 1)
    return {
        "rows": rows,
        "of_rows": num_rows(cache),
        "tiers": [
            {
                "k": k,
                "temperature": t,
                "covered_mass": float(mass[i, j]),
                "truncation_kl": float(kl[i, j]),
            }
            for i, k in enumerate(spec.tiers)
            for j, t in enumerate(spec.temperatures)
        ],
    }


def sampled_records(spec: CacheSpec, rows: int, limit: int) -> list[Array]:
    """Record numbers int64 in batches: all of them, or runs from evenly spread shards with about
    `limit` rows.
    """
    per_record = max(1.0, rows / spec.num_records)
    wanted = spec.num_records if rows <= limit else max(1, int(limit / per_record))
    shards: Sequence[int] = range(spec.num_shards)
    some = max(SAMPLE_SHARDS, -(-wanted // spec.records_per_shard))
    if some < spec.num_shards:
        shards = [i * (spec.num_shards - 1) // (some - 1) for i in range(some)]
    each = -(-wanted // len(shards))
    numbers = np.concatenate([_spread(spec, shard, each) for shard in shards])
    step = max(1, int(CHUNK_ELEMENTS / (per_record * spec.k)))
    return [numbers[at : at + step] for at in range(0, len(numbers), step)]


def _spread(spec: CacheSpec, shard: int, count: int) -> Array:
    """At most `count` record numbers of a shard, evenly spaced."""
    place = spec.shard(shard)
    size = place.stop - place.start
    inside = np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64))
    return spec.record(place.view, place.start) + inside


def row_columns(batch: Batch) -> dict[str, Array]:
    """The columns of a batch as the codec takes them: [rows, *shape] without record-level ones."""
    return {
        name: array
        for name, array in batch.columns.items()
        if not name.startswith(("sample_key", "view_key"))
    }


def truncation_kl(spec: CacheSpec, rows: DecodedRows) -> Array:
    """-log of the probability of the support, float64 [N, T], at each stored temperature."""
    assert rows.tail_lse is not None
    relative = rows.relative.astype(np.float64)
    supports = np.stack([log_sum_exp(relative / float(t)) for t in spec.temperatures], axis=1)
    out: Array = np.logaddexp(0, rows.tail_lse.astype(np.float64) - supports)
    return out


# ---- one record
# ------------------------------------------------------------------------------------------------------


def show_record(
    cache: Cache,
    record: int,
    *,
    tokenizer: str | Path | None = None,
    data: Any = None,
    data_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the teacher said about one record: entries with names and probabilities, tail mass,
    labels.
    """
    spec = cache.spec
    if not 0 <= record < cache.num_records:
        raise UsageError(
            f"record {record}: {cache.path} has the records 0 to {cache.num_records - 1}"
        )
    view, sample = divmod(record, spec.num_samples)
    batch = cache.read(np.array([record], np.int64))
    out: dict[str, Any] = {
        "cache": str(cache.path),
        "record": record,
        "sample_id": spec.samples[0] + sample,
        "view": spec.views[0] + view,
        "sample_key": f"{int(batch.columns['sample_key'][0]):016x}",
    }
    class_names = list(cache.identity.data.get("class_names", []))
    if data is not None:
        class_names = _check_data(cache, batch, out, data, data_args) or class_names
    name = namer(cache, class_names, tokenizer)
    if spec.tokens:
        out["tokens"] = [
            name(int(token)) for token in batch.columns["token"][: SHOWN_ENTRIES * SHOWN_ROWS]
        ]
    if spec.has_rows:
        decoded = decode_rows(spec, row_columns(batch))
        out["num_rows"] = len(decoded.max)
        out["rows"] = [
            _row(spec, decoded, n, name) for n in range(min(len(decoded.max), SHOWN_ROWS))
        ]
    for feature in spec.features:
        values = batch.columns[feature.column]
        shape = values.shape[1:] if feature.level == ROOT else values.shape
        out.setdefault("features", {})[feature.name] = {
            "shape": list(shape),
            "dtype": feature.dtype,
        }
    return out


def namer(cache: Cache, class_names: Sequence[str], tokenizer: str | Path | None) -> Namer:
    """id -> its class name or token, or the id itself where nothing names it."""
    if tokenizer is None:
        return lambda i: str(class_names[i]) if 0 <= i < len(class_names) else str(i)
    from kdcache.data.text import fingerprint, load_tokenizer

    try:
        made = load_tokenizer(str(tokenizer))
    except UsageError as e:  # that names the option of a dump
        raise UsageError(str(e).replace("--data-arg tokenizer=", "--tokenizer ")) from e
    cached = (cache.identity.tokenizer or {}).get("fingerprint")
    if fingerprint(made) != cached:
        found = FieldDifference("tokenizer.fingerprint", cached, fingerprint(made))
        raise IdentityMismatch(
            f"--tokenizer {tokenizer} is not the one of {cache.path}:\n  {found}", [found]
        )

    def decoded(i: int) -> str:
        with users_code(f"--tokenizer {tokenizer} cannot decode {i}"):
            return repr(made.decode([i], skip_special_tokens=False))

    return decoded


def _check_data(
    cache: Cache,
    batch: Batch,
    out: Mapping[str, Any],
    data: Any,
    data_args: Mapping[str, Any] | None,
) -> list[str]:
    """Class names of the dataset, after its key of this record was found to be the one in the
    cache.
    """
    from kdcache.data.classes import check
    from kdcache.data.keys import check_same_key
    from kdcache.data.samples import Samples
    from kdcache.data.sources import load_data

    samples = Samples(
        load_data(data, data_args or {}, lambda: str(cache.identity.data.get("preprocessing", "")))
        if isinstance(data, str)
        else data,
        seed=cache.spec.seed,
        labels=False,
    )
    key = np.array([samples.sample_key(out["sample_id"], out["view"])], np.uint64)
    check_same_key(batch.columns["sample_key"], key, np.array([out["sample_id"]]))
    kept = list(cache.identity.data.get("class_names", []))
    check(kept, samples.class_names, of=(f"the cache {cache.path}", "the data"), accept=None)
    return samples.class_names


def _row(spec: CacheSpec, rows: DecodedRows, n: int, name: Namer) -> dict[str, Any]:
    """One row: its likeliest entries, and the mass of what is not in its support, at each temperature."""
    temperatures = spec.temperatures or FULL_TEMPERATURES
    relative = rows.relative[n].astype(np.float64)
    ids = np.arange(len(relative)) if rows.ids is None else rows.ids[n]
    tails = (
        np.full(len(temperatures), -np.inf)
        if rows.tail_lse is None
        else rows.tail_lse[n].astype(np.float64)
    )
    # [K, T]
    scaled = np.stack([relative / float(t) for t in temperatures], axis=1)
    norm = np.logaddexp(log_sum_exp(scaled.T), tails)
    probabilities, tail = np.exp(scaled - norm), np.exp(tails - norm)
    top = np.argsort(-relative, kind="stable")[:SHOWN_ENTRIES]
    out: dict[str, Any] = {} if rows.pos is None else {"pos": int(rows.pos[n])}
    if rows.label is not None:
        out["labels"] = [name(int(i)) if i >= 0 else None for i in rows.label[n]]
    out["entries"] = [
        {
            "id": int(ids[j]),
            "name": name(int(ids[j])),
            "logit": float(rows.logits[n, j]),
            "probability": dict(zip(temperatures, probabilities[j].tolist(), strict=True)),
        }
        for j in top
    ]
    out["not_shown"] = dict(
        zip(temperatures, np.delete(probabilities, top, 0).sum(0).tolist(), strict=True)
    )
    return {**out, "tail": dict(zip(temperatures, tail.tolist(), strict=True))}


# ---- two caches
# ------------------------------------------------------------------------------------------------------


def compare(a: Cache, b: Cache) -> dict[str, Any]:
    """The fields of spec and identity in which two caches differ, and whether their content does."""
    fields = spec_difference(a.spec, b.spec) + difference(a.identity, b.identity)
    shared = sorted({*a.recorded, *b.recorded})
    recorded = [
        FieldDifference(f"recorded.{key}", a.recorded.get(key), b.recorded.get(key))
        for key in shared
        if a.recorded.get(key) != b.recorded.get(key)
    ]
    return {
        "cache": str(a.path),
        "other": str(b.path),
        "containers": [a.container, b.container],
        "same_content": a.content_id == b.content_id,
        "content_ids": [a.content_id, b.content_id],
        "shards": _other_shards(a, b) if a.spec == b.spec else None,
        "fields": [_field(d) for d in fields],
        "recorded": [_field(d) for d in recorded],
    }


def _other_shards(a: Cache, b: Cache) -> dict[str, Any]:
    """Shards of two caches of one spec in which a column differs, by their digests, and the columns
    that differ.
    """
    differ: list[int] = []
    columns: set[str] = set()
    for one, two in zip(a.shards, b.shards, strict=True):
        found = {
            name
            for name, extent in one.columns.items()
            if extent.digest != two.columns[name].digest
        }
        differ += [one.shard] if found else []
        columns |= found
    return {"of": len(a.shards), "differ": differ, "columns": sorted(columns)}


def _field(found: FieldDifference) -> dict[str, Any]:
    return {"field": found.field, "cache": found.cached, "other": found.given}


def render(found: Mapping[str, Any]) -> str:
    """The result of `inspect` for people. Names in a cache are of whoever wrote it: none of them
    steers a terminal, or makes a line of its own."""
    found = _printable(found)
    if "same_content" in found:
        return _comparison_text(found)
    return _record_text(found) if "record" in found else _facts_text(found)


def _printable(value: Any) -> Any:
    """`value` with every text in it printable."""
    if isinstance(value, Mapping):
        return {printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _facts_text(found: Mapping[str, Any]) -> str:
    data, teacher = found["identity"]["data"], found["identity"]["teacher"]
    tokenizer = found["identity"]["tokenizer"]
    rows = [
        ("cache", f"{found['cache']} ({found['container']}, manifest {found['generation']})"),
        ("content id", found["content_id"]),
        ("kind", _kind_text(found)),
        (
            "size",
            f"{_count(found['num_records'], 'record')}, {_count(found['num_rows'], 'row')}, "
            f"{_count(found['num_shards'], 'shard')}, samples {_span(found['samples'])}, views "
            f"{_span(found['views'])}",
        ),
        (
            "bytes",
            f"{found['bytes']:,} ({found['bytes_per_record']:.1f} per record"
            + (f", {found['bytes_per_row']:.1f} per row)" if found["bytes_per_row"] else ")"),
        ),
        (
            "data",
            f"{data.get('name')} {data.get('revision')}, {data.get('num_samples')} samples, "
            f"{len(data.get('class_names', []))} class names, window {data.get('window', 0)}",
        ),
        *([("tokenizer", tokenizer.get("fingerprint"))] if tokenizer else []),
        (
            "teacher",
            f"{teacher.get('weights')} {teacher.get('dtype')}"
            + (
                f", classes are the first of {teacher['cut_from']} logits"
                if "cut_from" in teacher
                else ""
            ),
        ),
        *(
            (
                f"feature {f['name']}",
                f"{f['module']}, {f['recipe']}, {f['dtype']} {f['shape']} per {f['level']}",
            )
            for f in found["features"]
        ),
    ]
    width = max(len(name) for name, _ in rows)
    out = [f"{name:<{width}}  {value}" for name, value in rows]
    out += ["", "bytes per column"] + [
        f"  {name:<24} {size:>14,}" for name, size in found["column_bytes"].items()
    ]
    return "\n".join(out + _losses_text(found))


def _kind_text(found: Mapping[str, Any]) -> str:
    if found["kind"] == "none":
        return "none (features only)"
    kept = (
        f"all {found['num_classes']} values"
        if found["kind"] == "full"
        else f"the {found['k']} largest"
    )
    tiers = (
        f", readable as k = {', '.join(map(str, found['tiers'][:-1]))} too"
        if len(found["tiers"]) > 1
        else ""
    )
    temperatures = ", ".join(found["temperatures"]) or "any"
    return (
        f"{found['kind']}: {kept} of {found['num_classes']} as {found['values']}{tiers}; "
        f"temperature{'s' * (len(found['temperatures']) != 1)} {temperatures}; "
        f"{_count(found['labels'], 'label')} per row"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _losses_text(found: Mapping[str, Any]) -> list[str]:
    out = []
    if (coverage := found["coverage"]) is not None:
        rows, of_rows = coverage["rows"], coverage["of_rows"]
        sampled = "" if rows == of_rows else f" (from {rows} of {of_rows} rows)"
        out += [
            "",
            f"kept of the teacher, mean over rows{sampled}",
            "       k      T  covered mass  truncation KL (nats)",
        ]
        out += [
            f"  {t['k']:>6} {t['temperature']:>6}  {t['covered_mass']:>12.6f}  "
            f"{t['truncation_kl']:>14.3e}"
            for t in coverage["tiers"]
        ]
    if found["quantisation_kl"] is not None:
        values = ", ".join(f"T = {t}: {kl:.3e}" for t, kl in found["quantisation_kl"].items())
        out += [
            "",
            f"KL of the original to {found['values']} values, nats, mean over rows: {values}",
        ]
    return out


def _record_text(found: Mapping[str, Any]) -> str:
    out = [
        f"record {found['record']} of {found['cache']}: sample {found['sample_id']}, view "
        f"{found['view']}, key {found['sample_key']}"
    ]
    if "tokens" in found:
        out.append("tokens " + " ".join(found["tokens"]))
    for row in found.get("rows", []):
        labels = (
            f", label {', '.join(str(label) for label in row['labels'])}" if "labels" in row else ""
        )
        out += ["", (f"row at position {row['pos']}" if "pos" in row else "row") + labels]
        heads = "".join(f"{'p at T=' + t:>12}" for t in row["tail"])
        out.append(f"  {'id':>8}  {'logit':>9}{heads}  name")
        out += [
            f"  {e['id']:>8}  {e['logit']:>9.3f}"
            + "".join(f"{p:>12.6f}" for p in e["probability"].values())
            + f"  {e['name']}"
            for e in row["entries"]
        ]
        for what, mass in (("other entries", row["not_shown"]), ("tail", row["tail"])):
            out.append(f"  {what:<19}" + "".join(f"{p:>12.6f}" for p in mass.values()))
    hidden = found.get("num_rows", 0) - len(found.get("rows", []))
    out += [f"({hidden} more rows)"] if hidden else []
    out += [
        f"feature {name}: {f['shape']} {f['dtype']}"
        for name, f in found.get("features", {}).items()
    ]
    return "\n".join(out)


def _comparison_text(found: Mapping[str, Any]) -> str:
    out = [
        f"{found['cache']} and {found['other']}: "
        + ("the same content" if found["same_content"] else "other content")
    ]
    out += [f"  {d['field']}: {d['cache']!r:.90} | {d['other']!r:.90}" for d in found["fields"]]
    if found["containers"][0] != found["containers"][1]:
        out.append(f"  container: {' | '.join(found['containers'])} (does not count)")
    out += [
        f"  {d['field']}: {d['cache']!r:.90} | {d['other']!r:.90} (does not count)"
        for d in found["recorded"]
    ]
    if (shards := found["shards"]) and shards["differ"]:
        first = ", ".join(map(str, shards["differ"][:10])) + (
            ", ..." if len(shards["differ"]) > 10 else ""
        )
        out.append(
            f"  {len(shards['differ'])} of {shards['of']} shards differ ({first}), in "
            f"{', '.join(shards['columns'])}"
        )
    return "\n".join(out)


def _span(span: Sequence[int]) -> str:
    return f"{span[0]} to {span[1] - 1}"
