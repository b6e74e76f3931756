"""A run's folder: what was asked (run.toml), how it went (metrics.jsonl), where it is (last/,
best/, summary.json).

A process that trains holds a lock on `.lock`; it goes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from os.path import samestat
from pathlib import Path
from typing import Any

import tomli_w

from kdcache.cache.repair import outside_caches
from kdcache.cache.store import NO_LOCKS, TEMPORARY, Directory, as_cache_errors
from kdcache.data.classes import CLASS_NAMES
from kdcache.errors import (
    CacheCorrupt,
    CacheExists,
    DataError,
    KDCacheError,
    SpecMismatch,
    UsageError,
    did_you_mean,
)
from kdcache.models.runs import (
    ARGUMENTS,
    BEST,
    CHANGES,
    LAST,
    LOCK,
    OPTIONS,
    RECORDED,
    SUMMARY,
    TABLE,
    arguments_for_toml,
    is_finished,
    read_options,
    read_summary,
    same_arguments,
)
from kdcache.student import checkpoint
from kdcache.user.code_errors import printable
from kdcache.user.paths import local_path

# Options that change no number of the run, only where things are found, how fast they come, or what
# is overlooked.
FREE = ("cache", "workers", "report-to", "accept")
# options whose default depends on the run: left out, they are what the run has
INHERITED = ("best-by",)
BITS = "the same mathematics to other bits"
MAY_CHANGE = {  # options that another call may change, and what that comes to
    "eval-every": "the same training",
    "save-every": "the same training",
    "engine": BITS,
    "logits-memory": BITS,
    "compile": BITS,
    "deterministic": BITS,
    "micro-batch-size": f"{BITS}: other orders of summation, other draws of dropout",
}
COMPARED = ("cache-content-id", "student", "live-teacher")  # of what is recorded
# recorded under -> named by --accept as
DATA = {"data": "data", "eval-data": "eval_data"}
DATA_FIELDS = {
    "name": "name",
    "revision": "revision",
    "num-samples": "num_samples",
    "probe": "probe",
}
_held: set[int] = set()


def _release_in_child() -> None:
    """A lock belongs to all who share the open file: a worker that outlives its killed parent must
    not keep it.
    """
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_in_child)


class RunFolder:
    """The folder at `--out`: new, to be continued, or finished. Nothing is written before `hold`
    and `create`.

    changes: option -> what became of it, of the options that differ from the run's and may.
    accepted: fields of the data that differ and were accepted. notes: other sentences to say. A
    `with` block gives the lock back.
    """

    def __init__(
        self,
        path: str | Path,
        options: Mapping[str, Any],
        recorded: Mapping[str, Any],
        *,
        accept: Sequence[str] = (),
        resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        """CacheExists if something else stands there, SpecMismatch listing the options that differ
        from its own after
        `resolve`, DataError listing the fields of the data that do."""
        self.path, self.accept, self.resolve = local_path(path, "--out"), accept, resolve
        self.options = {
            key: value if key in ARGUMENTS else plain(value) for key, value in options.items()
        }
        self.recorded = plain(recorded)
        self.changes: dict[str, str] = {}
        self.accepted: list[str] = []
        self.notes: list[str] = []
        self.summary: dict[str, Any] | None = None
        self._lock: int | None = None
        outside_caches(self.path)
        self.files = Directory(self.path)
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
        """Keep other processes out of a run that is there and not finished. KDCacheError if one
        trains in it.
        """
        if self.exists and self.summary is None:
            self._take_lock()
            self._look()  # another process may have finished it meanwhile

    def create(self, more: Mapping[str, Any]) -> None:
        """Make the folder and run.toml, with `more` among what is recorded, unless they are there."""
        if self.exists:
            return
        with as_cache_errors(self.path, "creating the run"):
            self.files.make()
            self._take_lock()
            if os.path.lexists(self.path / OPTIONS):
                raise KDCacheError(
                    f"{self.path}: another process has begun a run here meanwhile; give the same "
                    "command again"
                )
            self._write_options({TABLE: self.options, RECORDED: {**self.recorded, **plain(more)}})
        there = read_options(self.path)[TABLE]
        if lost := [
            name
            for name in ARGUMENTS
            if not same_arguments(there.get(name, {}), self.options.get(name, {}))
        ]:
            raise UsageError(
                f"{self.path / OPTIONS} does not give --{lost[0]} back as it was given: the run "
                "could not be continued or evaluated; give the student or the data as an object"
            )
        self.exists = True

    def amend(self, step: int) -> None:
        """Write into run.toml what differs from it, as of `step`."""
        said = [*self.changes.values(), *(f"accepted: {field} differs" for field in self.accepted)]
        if said:
            self.check()
            document = read_options(self.path)
            before = document[RECORDED].get(CHANGES, [])
            document[RECORDED][CHANGES] = [
                *before,
                *(f"after step {step}: {line}" for line in said),
            ]
            with as_cache_errors(self.path / OPTIONS, "writing it"):
                self._write_options({**document, TABLE: self.options})

    def check(self) -> None:
        """KDCacheError unless this is still the folder in which the run began, known by the file it
        holds locked.

        A folder that was moved, emptied or replaced takes nothing more: what was written would
        stand elsewhere, or without its run.toml.
        """
        try:
            named = os.stat(self.path / LOCK, follow_symlinks=False)
            ours = self._lock is not None and (
                samestat(named, os.fstat(self._lock)) or self._answers()
            )
            found = None if ours else f"its {LOCK} is another file"
            if found is None and not (self.path / OPTIONS).is_file():
                found = f"its {OPTIONS} is gone"
        except OSError as e:
            found = f"its {LOCK} is gone ({e.strerror})"
        if found is not None:
            raise KDCacheError(
                f"{self.path} is no longer the folder that this run began in: {found}. It was "
                "moved, emptied or replaced while the run trained, which ends here; nothing more "
                "was written. Put the folder back and give the same command again to go on from "
                "its last checkpoint, or name another --out"
            )

    def _answers(self) -> bool:
        """Whether what is written into the locked file is read under its name: inodes of some FUSE
        systems change.
        """
        assert self._lock is not None
        text = self._sign(secrets.token_hex(8))
        os.fsync(self._lock)
        fd = os.open(self.path / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.pread(fd, len(text) + 1, 0) == text
        finally:
            os.close(fd)

    def _sign(self, mark: str = "") -> bytes:
        """Write into the locked file who holds it."""
        assert self._lock is not None
        text = f"pid {os.getpid()} on {platform.node()}{mark and ' ' + mark}\n".encode()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, text, 0)
        return text

    def last(self) -> Path | None:
        """The checkpoint to continue from. What an interrupted swap left is put in order by the
        holder of the lock.
        """
        where = self.path / LAST
        if (
            not self.exists
            or (checkpoint.look if self._lock is None else checkpoint.find)(where) is None
        ):
            return None
        return where

    def what_is_saved(self) -> str:
        """What checkpoints there are, to end an error with."""
        steps = [
            f"{name}/ of step {step}"
            for name in (LAST, BEST)
            for step in [checkpoint.step_of(self.path / name)]
            if step is not None
        ]
        return f"; kept: {' and '.join(steps)}" if steps else "; there is no checkpoint yet"

    def last_of_finished(self) -> Path:
        """The checkpoint that a finished run ended with; CacheCorrupt if it is gone."""
        last = self.last()
        if last is None:
            raise CacheCorrupt(
                f"{self.path} is finished, but its {LAST}/ is gone: there are no weights to load; "
                f"move {SUMMARY} away to train again"
            )
        return last

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: the run is finished."""
        self.check()
        with as_cache_errors(self.path / SUMMARY, "writing it"):
            self.files.replace(SUMMARY, (json.dumps(plain(summary), indent=1) + "\n").encode())
        self.check()

    def _check(self) -> bool:
        """Whether a run with these options stands at the path."""
        if not os.path.lexists(self.path):
            return False
        if not os.path.lexists(self.path / OPTIONS):
            if self.path.is_dir() and all(
                name.startswith(TEMPORARY) or name == LOCK for name in self.files.names()
            ):
                return False
            raise CacheExists(
                f"{self.path} exists and is no run (it has no {OPTIONS}); name another --out"
            )
        there = read_options(self.path)
        refused = []
        a, b = (
            {
                **self.resolve(options),
                **{key: recorded.get(key) for key in COMPARED if key in recorded},
            }
            for options, recorded in (
                (there[TABLE], there[RECORDED]),
                (self.options, self.recorded),
            )
        )
        for key in sorted({*a, *b} - set(FREE)):
            was, now = a.get(key), b.get(key)
            if key in INHERITED and now is None and was is not None:
                self.options[key] = was
                continue
            same = same_arguments(was or {}, now or {}) if key in ARGUMENTS else was == now
            if not same and key in MAY_CHANGE:
                self.changes[key] = f"{key} {_said(now)}, was {_said(was)}: {MAY_CHANGE[key]}"
            elif not same:
                refused.append(f"{key}: the run has {_said(was)}, given is {_said(now)}")
        if refused:
            lines = "".join(f"\n  {line:.240}" for line in refused)
            raise SpecMismatch(
                f"{self.path} is a run with other options:{lines}\n  give the same options to "
                "continue it, or name another --out"
            )
        self._check_data(there[RECORDED])
        return True

    def _check_data(self, there: Mapping[str, Any]) -> None:
        found = {
            f"{DATA[part]}.{name}": _different(name, a.get(key), b.get(key))
            for part in DATA
            for a, b in [(there.get(part, {}), self.recorded.get(part, {}))]
            for key, name in DATA_FIELDS.items()
            if a.get(key) != b.get(key)
        }
        refused = [
            field
            for field in found
            if field not in self.accept and field.split(".")[0] not in self.accept
        ]
        if refused:
            lines = "".join(f"\n  {field}: {found[field]}" for field in refused)
            raise DataError(
                f"{self.path} is a run on other data:{lines}\n  give the same data to continue it, "
                f"or name another --out; a difference known to be harmless: --accept {refused[0]}"
            )
        self.accepted = list(found)

    def _look(self) -> None:
        if self.exists and is_finished(self.path):
            self.summary = read_summary(self.path)

    def _take_lock(self) -> None:
        """Hold the lock until the `with` block ends; the open file also says later whether the
        folder is still ours.
        """
        with as_cache_errors(self.path / LOCK, "locking the run"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            try:
                fd = os.open(self.path / LOCK, flags, 0o666)
                found = os.fstat(fd)
            except OSError as e:
                if e.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK):
                    raise
                found = None
            if found is None or not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                if found is not None:
                    os.close(fd)
                raise KDCacheError(
                    f"{self.path / LOCK} is no plain file of its own (a link, a folder, a pipe?); "
                    "nothing was written: move it away and give the same command again"
                )
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                who = printable(os.read(fd, 200).decode(errors="replace").strip()) or "pid unknown"
                if e.errno not in NO_LOCKS:
                    os.close(fd)
                if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise KDCacheError(
                        f"{self.path}: another process trains here ({who}); wait for it or stop "
                        "it, or name another --out"
                    ) from None
                if e.errno not in NO_LOCKS:
                    raise
                self.notes.append(
                    f"{self.path} is on a file system without locks: nothing keeps a second "
                    "process from training here"
                )
            self._lock = fd
            _held.add(fd)
            self._sign()
            with contextlib.suppress(OSError):  # what cannot be swept is in nobody's way
                self.files.drop_dead_temporaries("")
            checkpoint.clear_trial(self.path)

    def _write_options(self, document: Mapping[str, Any]) -> None:
        options = {
            key: arguments_for_toml(value) if key in ARGUMENTS else value
            for key, value in document[TABLE].items()
        }
        self.files.replace(
            OPTIONS, tomli_w.dumps({**document, TABLE: options}, multiline_strings=False).encode()
        )


def weights_folder(path: Path, name: str | None = None) -> Path:
    """The checkpoint `name` of a run; None: best/ if the run has one, else last/. CacheCorrupt if
    there is none.
    """
    for one in (BEST, LAST) if name is None else (name,):
        if checkpoint.look(path / one) is not None:
            return path / one
    raise CacheCorrupt(f"{path} has no checkpoint {name or 'yet'}; train it first")


def plain(value: Any) -> Any:
    """`value` as TOML and JSON hold it: no None; paths, other objects and what is not finite as
    text.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value if item is not None]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    return value if isinstance(value, bool | int | str) else str(value)


def check_accept(accept: Sequence[str]) -> None:
    """UsageError for a name that is no field of a run's data."""
    known = {
        CLASS_NAMES,
        *DATA.values(),
        *(f"{part}.{name}" for part in DATA.values() for name in DATA_FIELDS.values()),
    }
    for name in accept:
        if name not in known:
            raise UsageError(
                f"accept {name!r}: there is no cache whose identity could differ, and no such "
                f"field of the data{did_you_mean(name, known)}"
            )


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _different(name: str, was: Any, now: Any) -> str:
    if name != "probe" or not (isinstance(was, str) and isinstance(now, str)):
        return f"the run has {_said(was)}, given is {_said(now)}"
    a, b = was.split(), now.split()
    if len(a) != len(b):
        return f"the run keeps {len(a)} sample keys, given are {len(b)}"
    at = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return (
        f"{len(at)} of {len(a)} sample keys, evenly spaced, differ; the first is {a[at[0]]} in the "
        f"run, and {b[at[0]]} in what is given"
    )
