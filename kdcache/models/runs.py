"""What stands in a run's folder, as every command reads it: plain files of bounded size, their
types checked.

A run's folder travels with its weights, so whoever opens one may have it from somebody else: a
damaged or hostile file is one line that names it, and nothing in it is ever imported or run. numpy
and torch are not needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.cache.canonical import load_object
from kdcache.cache.store import as_cache_errors, read_plain
from kdcache.data.code_specs import parse_args
from kdcache.errors import CacheCorrupt, UsageError, short
from kdcache.user.arguments import is_unicode
from kdcache.user.code_errors import printable

OPTIONS, SUMMARY, METRICS, LOCK = "run.toml", "summary.json", "metrics.jsonl", ".lock"
LAST, BEST = "last", "best"
TABLE, RECORDED, CHANGES = "train-student", "recorded", "changes"
# tables of what a SPEC's function is called with
ARGUMENTS = ("student-arg", "data-arg", "eval-data-arg")
MAX_BYTES = 2**20  # of run.toml and summary.json: a probe of 256 keys takes 4 KiB
MAX_DEPTH = 64  # of tables in tables
MAX_INT = 2**63 - 1  # the largest integer that TOML holds


def is_run(path: str | Path) -> bool:
    """Whether a run's folder stands at `path`."""
    return os.path.lexists(Path(path) / OPTIONS)


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes | None:
    """All bytes of a plain file, None if there is none; CacheCorrupt for what is no plain file or
    too large, KDCacheError for what cannot be read."""
    with as_cache_errors(path, "reading it"):
        try:
            return read_plain(str(path), limit)
        except NotADirectoryError:
            return None


def read_options(path: Path) -> dict[str, Any]:
    """The tables of a run's run.toml, arguments as mappings; CacheCorrupt if it is none, or of
    other types.
    """
    where = path / OPTIONS
    data = read_file(where)
    if data is None:
        raise CacheCorrupt(
            f"{where} is missing: {path} is no run, or lost its options; put the file back"
        )
    # tomllib takes its square in time
    if any(key.count(b".") > MAX_DEPTH for key in _keys(data)):
        raise CacheCorrupt(f"{where}: a key of more than {MAX_DEPTH} parts")
    try:
        document = tomllib.loads(data.decode())
    # also UnicodeDecodeError, and numbers beyond all bounds
    except (ValueError, RecursionError) as e:
        raise CacheCorrupt(f"{where}: not readable as TOML ({_brief(e)})") from e
    if _deeper_than(document, MAX_DEPTH):  # dotted keys nest without a parser's recursion
        raise CacheCorrupt(f"{where}: nested deeper than {MAX_DEPTH}")
    if not all(isinstance(document.get(name), dict) for name in (TABLE, RECORDED)):
        raise CacheCorrupt(f"{where}: expected the tables [{TABLE}] and [{RECORDED}]")
    options, recorded = document[TABLE], document[RECORDED]
    for name in ARGUMENTS:
        if name in options:
            options[name] = arguments_of(options[name], f"{where}: {name}")
    for table, name, right, wanted in CHECKED:
        if name in document[table] and not right(document[table][name]):
            raise CacheCorrupt(
                f"{where}: [{table}] {name} is {_short(document[table][name])}; expected {wanted}"
            )
    for part in ("data", "eval-data"):
        for name, value in recorded.get(part, {}).items():
            if type(value) not in (str, int):
                raise CacheCorrupt(
                    f"{where}: [{RECORDED}.{part}] {name} is {_short(value)}; expected text or a "
                    "number"
                )
    return document


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a finished run; CacheCorrupt if it is damaged or missing."""
    where = path / SUMMARY
    data = read_file(where)
    if data is None:
        raise CacheCorrupt(f"{where} is missing")
    return load_object(data, str(where), f"move it away to train on from {LAST}/")


def is_finished(path: Path) -> bool:
    """Whether the run has a summary, be it a damaged one."""
    return os.path.lexists(path / SUMMARY)


def arguments_of(value: Any, where: str) -> dict[str, Any]:
    """The arguments that a table of run.toml holds, or a list of `key=JSON` texts; CacheCorrupt for
    anything else.
    """
    try:
        if isinstance(value, dict):
            return plain_arguments(value, where)
        if is_texts(value):
            return parse_args(value, where)
    except (UsageError, RecursionError) as e:
        raise CacheCorrupt(f"{where}: {_brief(e)}") from e
    raise CacheCorrupt(f"{where} is {_short(value)}; expected a table, or a list of key=JSON")


def arguments_for_toml(args: Mapping[str, Any]) -> dict[str, Any] | list[str]:
    """`args` as run.toml keeps them: a table, or where TOML cannot hold a value, such as null,
    `key=JSON` texts.
    """
    if all(_toml_holds(value) for value in args.values()):
        return dict(args)
    return [f"{key}={json.dumps(value)}" for key, value in args.items()]


def plain_arguments(args: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`args` as JSON has them: paths as text, tuples as lists. UsageError naming a value that no
    file could give back, or a name that is none."""
    out = {}
    for key, value in args.items():
        if not (isinstance(key, str) and key.isidentifier()):
            raise UsageError(f"{what} {key!r} is no name of an argument")
        out[key] = _plain(value, f"{what} {key}")
    return out


def same_arguments(a: Any, b: Any) -> bool:
    """Whether two mappings of arguments are the same in value and type: 1, 1.0 and true are three
    things, and a number that is none is itself."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a plain number that a float can hold, of at least `least`."""
    return (type(value) is float and not value < least) or (
        type(value) is int and least <= value <= MAX_INT
    )


def _plain(value: Any, what: str) -> Any:
    if (
        value is None
        or type(value) in (bool, int, float)
        or (type(value) is str and is_unicode(value))
    ):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(item, what) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, what) for key, item in value.items()}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy's
        return _plain(value.item(), what)
    raise UsageError(
        f"{what} is {_short(value)}, a {type(value).__name__}, which run.toml cannot keep: the run "
        "could not be made again; give null, true, numbers, text, and lists or tables of these, or "
        "the object that the SPEC would make"
    )


def _keys(data: bytes) -> Iterator[bytes]:
    """What may be a key in TOML, or the name of a table, and is short of that only in texts."""
    for line in data.split(b"\n"):
        *before, _ = line.split(b"=")
        yield from (re.split(rb"[{},]", part)[-1] for part in before)
        if line.lstrip().startswith(b"["):
            yield from line.split(b",")


def _deeper_than(document: Any, depth: int) -> bool:
    level = [document]
    for _ in range(depth):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def _toml_holds(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_toml_holds, value))
    if isinstance(value, dict):
        return all(_toml_holds(item) for pair in value.items() for item in pair)
    return isinstance(value, bool | float | str) or (type(value) is int and abs(value) <= MAX_INT)


def _short(value: Any) -> str:
    return "a table" if isinstance(value, dict) else short(value, 60)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {printable(str(error))[:120]}"


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_table(value: Any) -> bool:
    return type(value) is dict


def is_texts(value: Any) -> bool:
    """Whether it is a list of text."""
    return type(value) is list and all(type(item) is str for item in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**32


# (table, key, whether a value is right, what is expected), of what a command reads.
CHECKED: Sequence[tuple[str, str, Callable[[Any], bool], str]] = (
    *(
        (TABLE, name, _is_text, "text")
        for name in (
            "student",
            "precision",
            "best-by",
            "student-weights",
            "optimizer",
            "engine",
            "divergence",
            "tail",
            "device",
        )
    ),
    (TABLE, "seed", lambda value: type(value) is int, "a number"),
    *(
        (RECORDED, name, _is_text, "text")
        for name in ("student", "tokenizer", "cache-content-id", "best-by-used")
    ),
    *((RECORDED, name, _is_table, "a table") for name in ("data", "eval-data", "versions")),
    (RECORDED, "num-classes", _is_count, "a number of at least 1"),
    (RECORDED, CHANGES, is_texts, "a list of text"),
)
