"""A run's folder: what was asked (run.toml), how it went (metrics.jsonl), where it is (last/, best/, summary.json)."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from kdcache.errors import CacheCorrupt, CacheExists, SpecMismatch
from kdcache.student import checkpoint

OPTIONS, SUMMARY, LAST, BEST = "run.toml", "summary.json", "last", "best"
TABLE, RECORDED = "train-student", "recorded"
# Options that change no number of the run, only where things are found or how fast they come.
FREE = ("cache", "workers", "report-to")
COMPARED = ("cache-content-id", "data", "student", "live-teacher")     # of what is recorded


class RunFolder:
    """The folder at `--out`: new, to be continued, or finished. Nothing is written before `create`."""

    def __init__(self, path: str | Path, options: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
        """CacheExists if something else stands there, SpecMismatch listing the options that differ from its own."""
        self.path = Path(path)
        self.options, self.recorded = plain(options), plain(recorded)
        self.exists = self._check()
        self.summary: dict[str, Any] | None = None
        if self.exists and (self.path / SUMMARY).exists():
            self.summary = read_summary(self.path)

    def create(self, more: Mapping[str, Any]) -> None:
        """Make the folder and run.toml, with `more` among what is recorded, unless they are there."""
        if not self.exists:
            self.path.mkdir(parents=True, exist_ok=True)
            document = {TABLE: self.options, RECORDED: {**self.recorded, **plain(more)}}
            write_whole(self.path / OPTIONS, tomli_w.dumps(document, multiline_strings=False))
            self.exists = True

    def last(self) -> Path | None:
        """The checkpoint to continue from."""
        return checkpoint.find(self.path / LAST) if self.exists else None

    def last_of_finished(self) -> Path:
        """The checkpoint that a finished run ended with; CacheCorrupt if it is gone."""
        last = self.last()
        if last is None:
            raise CacheCorrupt(f"{self.path} is finished, but its {LAST}/ is gone: there are no weights to load; "
                               f"delete {SUMMARY} to train again")
        return last

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: the run is finished."""
        write_whole(self.path / SUMMARY, json.dumps(plain(summary), indent=1, sort_keys=True) + "\n")

    def _check(self) -> bool:
        """Whether a run with these options stands at the path."""
        if not self.path.exists():
            return False
        if not (self.path / OPTIONS).is_file():
            if self.path.is_dir() and all(p.name == f"{OPTIONS}.partial" for p in self.path.iterdir()):
                return False
            raise CacheExists(f"{self.path} exists and is no run (it has no {OPTIONS}); name another --out")
        there = read_options(self.path)
        different = [f"{key}: the run has {a.get(key, 'nothing')!r}, given is {b.get(key, 'nothing')!r}"
                     for a, b in ((there[TABLE], self.options), (_compared(there[RECORDED]), _compared(self.recorded)))
                     for key in sorted({*a, *b}) if key not in FREE and a.get(key) != b.get(key)]
        if different:
            lines = "".join(f"\n  {line:.240}" for line in different)
            raise SpecMismatch(f"{self.path} is a run with other options:{lines}\n  give the same options to continue "
                               "it, or name another --out")
        return True


def read_options(path: Path) -> dict[str, Any]:
    """The tables of a run's run.toml; CacheCorrupt if it is none."""
    try:
        document = tomllib.loads((path / OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CacheCorrupt(f"{path / OPTIONS}: not readable as TOML ({e})") from e
    if not all(isinstance(document.get(name), dict) for name in (TABLE, RECORDED)):
        raise CacheCorrupt(f"{path / OPTIONS}: expected the tables [{TABLE}] and [{RECORDED}]")
    return document


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a finished run; CacheCorrupt if it is damaged."""
    try:
        return dict(json.loads((path / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise CacheCorrupt(f"{path / SUMMARY}: not readable as JSON ({e}); delete it to train on from last/") from e


def is_run(path: str | Path) -> bool:
    """Whether a run's folder stands at `path`."""
    return (Path(path) / OPTIONS).is_file()


def weights_folder(path: Path) -> Path:
    """best/ if the run has one, else last/; CacheExists never, CacheCorrupt if there is neither."""
    for name in (BEST, LAST):
        found = checkpoint.find(path / name)
        if found is not None:
            return found
    raise CacheCorrupt(f"{path} has no checkpoint yet; train it first")


def write_whole(path: Path, text: str) -> None:
    """A file appears with all of `text`, or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    checkpoint.sync(path.parent)


def plain(value: Any) -> Any:
    """`value` as TOML and JSON hold it: no None; paths, other objects and what is not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value if item is not None]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    return value if isinstance(value, bool | int | str) else str(value)


def _compared(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recorded.items() if key in COMPARED}
