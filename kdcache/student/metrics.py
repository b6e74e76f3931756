"""A run's metrics: one JSON object a line, always; TensorBoard and Weights & Biases where asked
for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from os.path import samestat
from pathlib import Path
from typing import Any

from kdcache.cache.store import Directory, as_cache_errors
from kdcache.errors import CacheCorrupt, KDCacheError, UsageError, did_you_mean
from kdcache.models.runs import METRICS as FILE

LONGEST = 2**20  # bytes of a line
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
OnMetrics = Callable[[dict[str, Any]], object]
Report = Callable[[int, Mapping[str, float]], None]


def check_reporters(names: Sequence[str]) -> None:
    """UsageError for an unknown name, or with the pip line for a package that is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"--report-to {name!r} is unknown{did_you_mean(name, PACKAGES)}")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as e:
            raise UsageError(f"--report-to {name}: {e}; pip install {PACKAGES[name]}") from e


class Metrics:
    """Where the lines of a run go. Lines of steps after `step` are dropped first: they will be
    written again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        report_to: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        on_metrics: OnMetrics | None = None,
        what_is_saved: Callable[[], str] = str,
    ) -> None:
        self.path, self._standing = folder / FILE, what_is_saved
        for name in report_to:
            _check_folder(folder / name)
        with as_cache_errors(self.path, "writing metrics", what_is_saved):
            truncate(self.path, step)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._file = open(handle, "a", encoding="utf-8")
        self._on_metrics = on_metrics
        self._reports: list[tuple[str, Report, Callable[[], None]]] = []
        for name in report_to:
            with self._explained(name):
                self._reports.append((name, *REPORTERS[name](folder, step, options or {})))

    def write(self, line: dict[str, Any]) -> None:
        """One line: `step` and numbers. What is not finite stands as null in the file."""
        plain = {
            key: None if isinstance(v, float) and not abs(v) < float("inf") else v
            for key, v in line.items()
        }
        with as_cache_errors(self.path, "writing metrics", self._standing):
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        numbers = {
            key: v for key, v in line.items() if isinstance(v, int | float) and key != "step"
        }
        for name, report, _ in self._reports:
            with self._explained(name):
                report(int(line["step"]), numbers)
        if self._on_metrics is not None:
            self._on_metrics(line)

    def sync(self) -> None:
        """Flush the lines to disk: before a checkpoint that counts on them."""
        with as_cache_errors(self.path, "writing metrics", self._standing):
            self._file.flush()
            os.fsync(self._file.fileno())
            try:
                a, b = os.fstat(self._file.fileno()), os.stat(self.path, follow_symlinks=False)
                # Inodes of some FUSE systems change; a copy is older than the line that was just
                # written.
                ours = samestat(a, b) or (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)
            except FileNotFoundError:
                ours = False
        if not ours:
            raise KDCacheError(
                f"{self.path} was moved, deleted or replaced while the run trained: its lines go "
                "to the file that was there; put that back and give the same command again, or "
                f"name another --out{self._standing()}"
            )

    def close(self) -> None:
        # what a checkpoint counts on is on disk; the rest will be written again
        with contextlib.suppress(OSError):
            self._file.close()
        for name, _, close in self._reports:
            with self._explained(name):
                close()

    def _explained(self, name: str) -> AbstractContextManager[None]:
        """A block of a reporter, whose errors of the operating system need not name its folder."""
        return as_cache_errors(self.path.parent / name, f"reporting to {name}", self._standing)


def truncate(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and what is no line: one that a crash cut short, or a
    torn block.

    The file is a new one afterwards, be it empty, so that what is added to it stands nowhere else.
    """
    folder = Directory(path.parent)
    with folder.temporary("") as temporary:
        for line in _lines(path):
            if _step(line) <= step:
                temporary.write(line)
        temporary.sync()
        folder.put_over(temporary, path.name)


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a plain file, of those that are not too long; none if it is not there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CacheCorrupt(f"{path}: not a plain file; move it away")
    with open(handle, "rb") as file:
        whole = True
        while line := file.readline(LONGEST):
            before, whole = whole, line.endswith(b"\n")
            if before and whole:
                yield line


def _check_folder(path: Path) -> None:
    """CacheCorrupt where a reporter would write through a link."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        raise CacheCorrupt(
            f"{path} is a link or no folder: what is reported would be written elsewhere; move it "
            "away"
        )


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step(line: bytes) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return step if type(step) is int else float("inf")


def _tensorboard(
    folder: Path, step: int, options: Mapping[str, Any]
) -> tuple[Report, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    before = threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        """A thread of the writer fails over a full disk: `report` raises what it met, its traceback
        says no more.
        """
        if not (
            isinstance(args.exc_value, OSError)
            and type(args.thread).__module__.startswith("tensorboard")
        ):
            before(args)

    def report(at: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, at)

    def close() -> None:
        try:
            writer.close()
        finally:
            threading.excepthook = before

    # the thread of the writer writes as soon as it is there
    threading.excepthook = quiet
    try:
        writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
    except BaseException:
        threading.excepthook = before
        raise
    return report, close


def _wandb(
    folder: Path, step: int, options: Mapping[str, Any]
) -> tuple[Report, Callable[[], None]]:
    wandb = importlib.import_module("wandb")
    run = wandb.init(project="kdcache", name=folder.name, dir=str(folder), config=dict(options))
    return lambda at, values: run.log(dict(values), step=at), run.finish


REPORTERS: dict[
    str, Callable[[Path, int, Mapping[str, Any]], tuple[Report, Callable[[], None]]]
] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
