"""What `inspect` found, as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.user.guard import printable


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
            f"{_count(found['num_shards'], 'shard')}, samples {_span(found['samples'])}, "
            f"views {_span(found['views'])}",
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
        f"{found['view']}, "
        f"key {found['sample_key']}"
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
            f"  {len(shards['differ'])} of {shards['of']} shards differ ({first}), "
            f"in {', '.join(shards['columns'])}"
        )
    return "\n".join(out)


def _span(span: Sequence[int]) -> str:
    return f"{span[0]} to {span[1] - 1}"
