"""Canonical JSON: one document has one byte form, and its last key is the digest of everything
before it.

    {"a":1,...,"xxh3_128":"<32 hex digits>"}\\n

Keys sorted, no spaces, ASCII only, no floats, integers below 2^53 in size; the digest is XXH3-128
(seed 0) over the canonical bytes of the document without that key, without the final newline. Any
other byte form is refused.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import xxhash

from kdcache.errors import CacheCorrupt

DIGEST_KEY = "xxh3_128"  # sorts after every other top-level key of the format
# beyond it JSON readers disagree; larger values are written as hex strings
MAX_INT = 2**53
MAX_DEPTH = 16
MAX_CONTAINERS = 2**18  # of a header: a few for each of its columns and features
MAX_VALUES = 2**21  # of a header: it may name the classes; 250 MB as Python objects


def digest(data: bytes | memoryview) -> str:
    """XXH3-128 (seed 0) of `data`, 32 lower-case hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def dumps(value: Any) -> bytes:
    """Canonical bytes of a JSON value, without digest or newline. ValueError for floats and other
    foreign types.
    """
    _check(value, 0)
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def seal(document: dict[str, Any]) -> bytes:
    """The bytes of a file that holds `document`, ending in its digest and a newline."""
    if any(key >= DIGEST_KEY for key in document):
        raise ValueError(
            f"top-level keys must sort before {DIGEST_KEY!r}: {sorted(document)[-1]!r}"
        )
    return dumps({**document, DIGEST_KEY: digest(dumps(document))}) + b"\n"


def unseal(
    data: bytes, where: str, *, containers: int = MAX_CONTAINERS, values: int = MAX_VALUES
) -> dict[str, Any]:
    """The document in the bytes of a file; CacheCorrupt naming `where` unless they are exactly
    canonical and intact.

    `containers` and `values` bound the objects and lists, and the values in them, before any of
    them takes memory: as Python objects three bytes of `{},` become a hundred.
    """

    def bad(why: str) -> NoReturn:
        raise CacheCorrupt(f"{where}: {why}; the file is damaged or was edited by hand")

    # What stands in strings is counted too: the bounds are wide.
    for found, most, what in (
        (data.count(b"{") + data.count(b"["), containers, "objects and lists"),
        (data.count(b","), values, "values"),
    ):
        if found > most:
            bad(f"about {found} {what}, the most allowed is {most}")
    try:
        document = json.loads(data, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as e:  # also UnicodeDecodeError and over-long integers
        bad(f"not a JSON document ({str(e)[:80]})")
    if not isinstance(document, dict):
        bad("not a JSON object")
    found = document.pop(DIGEST_KEY, None)
    try:
        body = dumps(document)
    except (ValueError, RecursionError) as e:
        bad(str(e)[:80])
    expected = digest(body)
    if found != expected:
        bad(f"its digest is {str(found)[:40]!r}, its content gives {expected}")
    # The digest is the last key, so the bytes before it are those it was taken of.
    if (
        data
        != body[:-1] + (b"," if document else b"") + f'"{DIGEST_KEY}":"{expected}"}}\n'.encode()
    ):
        bad("not in canonical form")
    return document


def load_object(data: bytes, where: str, advice: str) -> dict[str, Any]:
    """The JSON object in the bytes of a file, in any form; CacheCorrupt with `where` and `advice`
    if it is none.
    """
    try:
        document = json.loads(data, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as e:  # also UnicodeDecodeError and over-long integers
        raise CacheCorrupt(
            f"{where}: not readable as JSON ({type(e).__name__}: {str(e)[:80]}); {advice}"
        ) from e
    if not isinstance(document, dict):
        raise CacheCorrupt(
            f"{where}: a JSON {type(document).__name__}, expected an object; {advice}"
        )
    return document


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} is not a string")
            _check(item, depth + 1)
    elif isinstance(value, list | tuple):
        kinds = set(map(type, value))  # the long lists of a manifest hold one plain type
        small = kinds == {int} and -MAX_INT < min(value) <= max(value) < MAX_INT
        if (small or kinds == {str}) and depth < MAX_DEPTH:
            return
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, int):  # bool is an int, and fine
        if abs(value) >= MAX_INT:
            raise ValueError(f"integer {value} is not below 2^53 in size")
    elif value is not None and not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} {value!r} has no canonical form")
