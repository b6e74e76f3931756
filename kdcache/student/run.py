"""A run's folder: what was asked (run.toml), how it went (metrics.jsonl), where it is (last/, best/, summary.json).

A process that trains holds a lock on `.lock`; it goes with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from kdcache.cache.store import NO_LOCKS, explain
from kdcache.errors import CacheCorrupt, CacheExists, DataError, KDCacheError, SpecMismatch, UsageError, near
from kdcache.student import checkpoint

OPTIONS, SUMMARY, LAST, BEST, LOCK = "run.toml", "summary.json", "last", "best", ".lock"
TABLE, RECORDED, CHANGES = "train-student", "recorded", "changes"
# Options that change no number of the run, only where things are found, how fast they come, or what is overlooked.
FREE = ("cache", "workers", "report-to", "accept")
BITS = "the same mathematics to other bits"
MAY_CHANGE = {                  # options that another call may change, and what that comes to
    "eval-every": "the same training", "save-every": "the same training", "engine": BITS, "logits-memory": BITS,
    "compile": BITS, "deterministic": BITS,
    "micro-batch-size": f"{BITS}: other orders of summation, other draws of dropout",
}
COMPARED = ("cache-content-id", "student", "live-teacher")              # of what is recorded
DATA = {"data": "data", "eval-data": "eval_data"}                       # recorded under -> named by --accept as
DATA_FIELDS = {"name": "name", "revision": "revision", "num-samples": "num_samples", "probe": "probe"}
_held: set[int] = set()


def _release_in_child() -> None:
    """A lock belongs to all who share the open file: a worker that outlives its killed parent must not keep it."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_in_child)


class RunFolder:
    """The folder at `--out`: new, to be continued, or finished. Nothing is written before `hold` and `create`.

    changes: option -> what became of it, of the options that differ from the run's and may. accepted: fields of the
    data that differ and were accepted. notes: other sentences to say. A `with` block gives the lock back.
    """

    def __init__(self, path: str | Path, options: Mapping[str, Any], recorded: Mapping[str, Any], *,
                 accept: Sequence[str] = (),
                 resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict) -> None:
        """CacheExists if something else stands there, SpecMismatch listing the options that differ from its own after
        `resolve`, DataError listing the fields of the data that do."""
        self.path, self.accept, self.resolve = Path(path), accept, resolve
        self.options, self.recorded = plain(options), plain(recorded)
        self.changes: dict[str, str] = {}
        self.accepted: list[str] = []
        self.notes: list[str] = []
        self.summary: dict[str, Any] | None = None
        self._lock: int | None = None
        self.exists = self._check()
        self._look()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            _held.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def hold(self) -> None:
        """Keep other processes out of a run that is there and not finished. KDCacheError if one trains in it."""
        if self.exists and self.summary is None:
            self._take_lock()
            self._look()                        # another process may have finished it meanwhile

    def create(self, more: Mapping[str, Any]) -> None:
        """Make the folder and run.toml, with `more` among what is recorded, unless they are there."""
        if self.exists:
            return
        with explain(self.path, "creating the run"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if (self.path / OPTIONS).exists():
                raise KDCacheError(f"{self.path}: another process has begun a run here meanwhile; give the same "
                                   "command again")
            self._write_options({TABLE: self.options, RECORDED: {**self.recorded, **plain(more)}})
        self.exists = True

    def amend(self, step: int) -> None:
        """Write into run.toml what differs from it, as of `step`."""
        said = [*self.changes.values(), *(f"accepted: {field} differs" for field in self.accepted)]
        if said:
            document = read_options(self.path)
            before = document[RECORDED].get(CHANGES, [])
            document[RECORDED][CHANGES] = [*before, *(f"after step {step}: {line}" for line in said)]
            with explain(self.path / OPTIONS, "writing it"):
                self._write_options({**document, TABLE: self.options})

    def last(self) -> Path | None:
        """The checkpoint to continue from."""
        return checkpoint.find(self.path / LAST) if self.exists else None

    def standing(self) -> str:
        """What checkpoints there are, to end an error with."""
        found = {name: checkpoint.find(self.path / name) for name in (LAST, BEST)}
        steps = [f"{name}/ of step {json.loads((path / checkpoint.VALUES).read_text(encoding='utf-8'))['step']}"
                 for name, path in found.items() if path is not None]
        return f"; kept: {' and '.join(steps)}" if steps else "; there is no checkpoint yet"

    def last_of_finished(self) -> Path:
        """The checkpoint that a finished run ended with; CacheCorrupt if it is gone."""
        last = self.last()
        if last is None:
            raise CacheCorrupt(f"{self.path} is finished, but its {LAST}/ is gone: there are no weights to load; "
                               f"delete {SUMMARY} to train again")
        return last

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: the run is finished."""
        with explain(self.path / SUMMARY, "writing it"):
            write_whole(self.path / SUMMARY, json.dumps(plain(summary), indent=1) + "\n")

    def _check(self) -> bool:
        """Whether a run with these options stands at the path."""
        if not self.path.exists():
            return False
        if not (self.path / OPTIONS).is_file():
            if self.path.is_dir() and all(p.name in (f"{OPTIONS}.partial", LOCK) for p in self.path.iterdir()):
                return False
            raise CacheExists(f"{self.path} exists and is no run (it has no {OPTIONS}); name another --out")
        there = read_options(self.path)
        refused = []
        a, b = ({**self.resolve(options), **{key: recorded.get(key) for key in COMPARED if key in recorded}}
                for options, recorded in ((there[TABLE], there[RECORDED]), (self.options, self.recorded)))
        for key in sorted({*a, *b} - set(FREE)):
            was, now = a.get(key), b.get(key)
            if was != now and key in MAY_CHANGE:
                self.changes[key] = f"{key} {_said(now)}, was {_said(was)}: {MAY_CHANGE[key]}"
            elif was != now:
                refused.append(f"{key}: the run has {_said(was)}, given is {_said(now)}")
        if refused:
            lines = "".join(f"\n  {line:.240}" for line in refused)
            raise SpecMismatch(f"{self.path} is a run with other options:{lines}\n  give the same options to continue "
                               "it, or name another --out")
        self._check_data(there[RECORDED])
        return True

    def _check_data(self, there: Mapping[str, Any]) -> None:
        found = {f"{DATA[part]}.{name}": _different(name, a.get(key), b.get(key)) for part in DATA
                 for a, b in [(there.get(part, {}), self.recorded.get(part, {}))]
                 for key, name in DATA_FIELDS.items() if a.get(key) != b.get(key)}
        refused = [field for field in found if field not in self.accept and field.split(".")[0] not in self.accept]
        if refused:
            lines = "".join(f"\n  {field}: {found[field]}" for field in refused)
            raise DataError(f"{self.path} is a run on other data:{lines}\n  give the same data to continue it, or name "
                            f"another --out; a difference known to be harmless: --accept {refused[0]}")
        self.accepted = list(found)

    def _look(self) -> None:
        if self.exists and (self.path / SUMMARY).exists():
            self.summary = read_summary(self.path)

    def _take_lock(self) -> None:
        with explain(self.path / LOCK, "locking the run"):
            fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                who = os.read(fd, 200).decode(errors="replace").strip() or "pid unknown"
                if e.errno in NO_LOCKS:
                    self.notes.append(f"{self.path} is on a file system without locks: nothing keeps a second process "
                                      "from training here")
                    os.close(fd)
                    return
                os.close(fd)
                if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise KDCacheError(f"{self.path}: another process trains here ({who}); wait for it or stop it, or "
                                       "name another --out") from None
                raise
            self._lock = fd
            _held.add(fd)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {platform.node()}\n".encode(), 0)

    def _write_options(self, document: Mapping[str, Any]) -> None:
        write_whole(self.path / OPTIONS, tomli_w.dumps(document, multiline_strings=False))


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


def weights_folder(path: Path, name: str | None = None) -> Path:
    """The checkpoint `name` of a run; None: best/ if the run has one, else last/. CacheCorrupt if there is none."""
    for one in (BEST, LAST) if name is None else (name,):
        found = checkpoint.look(path / one)
        if found is not None:
            return found
    raise CacheCorrupt(f"{path} has no checkpoint {name or 'yet'}; train it first")


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


def check_accept(accept: Sequence[str]) -> None:
    """UsageError for a name that is no field of a run's data."""
    known = {*DATA.values(), *(f"{part}.{name}" for part in DATA.values() for name in DATA_FIELDS.values())}
    for name in accept:
        if name not in known:
            raise UsageError(f"accept {name!r}: there is no cache whose identity could differ, and no such field of "
                             f"the data{near(name, known)}")


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _different(name: str, was: Any, now: Any) -> str:
    if name != "probe" or not (isinstance(was, str) and isinstance(now, str)):
        return f"the run has {_said(was)}, given is {_said(now)}"
    a, b = was.split(), now.split()
    if len(a) != len(b):
        return f"the run keeps {len(a)} sample keys, given are {len(b)}"
    at = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return (f"{len(at)} of {len(a)} sample keys, evenly spaced, differ; the first is {a[at[0]]} in the run, and "
            f"{b[at[0]]} in what is given")
