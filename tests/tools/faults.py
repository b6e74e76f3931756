"""Stopping a dump: helpers that kill, fail and fork around the file operations of a small one."""

from __future__ import annotations

import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from strategies import IDENTITY, make_columns, make_measured, token_spec

from kdcache.cache.store import TEMPORARY, Directory
from kdcache.cache.writer import create

SPEC = token_spec(samples=(0, 5))  # shards of 3 and 2 records


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory: the tests that sync thousands of times."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def forked(*work: Callable[[], object]) -> list[int]:
    """Run each callable in a child of its own, at once; their wait statuses. Threads of libraries
    are idle by then.
    """
    children = []
    for run in work:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            status = 1
            try:
                run()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def dump(path: Path, container: str, backwards: bool = False) -> None:
    with create(path, SPEC, IDENTITY, container=container, recorded={"numpy": "0"}) as writer:
        for shard in sorted(writer.missing(), reverse=backwards):
            writer.write(shard, make_columns(SPEC, shard), make_measured(SPEC, shard))


def stop_at(step: int, stop: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Call `stop` before the file operation number `step`; the list of all operations so far."""
    seen: list[str] = []

    def hook(name: str) -> None:
        seen.append(name)
        if len(seen) > step:
            stop(name)

    monkeypatch.setattr(Directory, "step", staticmethod(hook))
    return seen


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def never(name: str) -> None:
    pass


def temporaries(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.name.startswith(TEMPORARY)]
