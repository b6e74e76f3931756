"""Worker processes: no signal, no death, no batch that cannot be handed over leaves anybody
waiting.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import get_worker_info

from kdcache.data import code_specs, workers
from kdcache.data.reading import Fetch
from kdcache.data.samples import Samples
from kdcache.data.sources import load_data
from kdcache.errors import KDCacheError
from kdcache.process.signals import Interrupted, Signals
from kdcache.student.evaluate import evaluate
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher


class Data:
    """`act` runs in the worker process that builds sample `at`."""

    name = "acting"

    def __init__(self, act: Callable[[], object] | None = None, at: int = 40, n: int = 64) -> None:
        self.act, self.at, self.n = act, at, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        if self.act is not None and i == self.at and get_worker_info() is not None:
            self.act()
        return torch.arange(4.0) + i, i % 3


def dump(out: Path, data: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return dump_teacher(
        teacher=nn.Linear(4, 3),
        data=data,
        out=out,
        device="cpu",
        batch_size=8,
        say=lambda _: None,
        records_per_shard=16,
        **more,
    )


def train(out: Path, data: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return train_student(
        student=nn.Linear(4, 3),
        data=data,
        alpha=0,
        epochs=1,
        batch_size=8,
        shuffle=False,
        out=out,
        device="cpu",
        **{"workers": 1, **more},
    )


def state(run: Path) -> int:
    found: int = json.loads((run / "last" / "state.json").read_text())["step"]
    return found


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_the_group(signum: int) -> None:
    """As a terminal or a batch system does: every process gets it."""
    for process in (os.getpid(), os.getppid()):
        os.kill(process, signum)
    time.sleep(0.2)


def test_a_worker_that_is_killed_is_one_line_and_what_was_done_is_kept(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    dead = (
        r"^worker process \d+, which builds batches, was killed by SIGKILL: out of memory\? [^\n]*"
    )
    with pytest.raises(
        KDCacheError, match=dead + "the written ones stay; give the same command again"
    ):
        dump(tmp_path / "c", Data(kill_myself), workers=1)
    # what the worker holds dies with it
    assert len(list((tmp_path / "c" / "commit").iterdir())) in (1, 2)
    with pytest.raises(
        KDCacheError, match=dead + r"kept: last/ of step \d; give the same command again"
    ):
        train(tmp_path / "run", Data(kill_myself))
    assert 2 <= state(tmp_path / "run") <= 5
    with pytest.raises(KDCacheError, match=dead):
        evaluate(nn.Linear(4, 3), Data(kill_myself), device="cpu", batch_size=8, workers=1)
    with pytest.raises(KDCacheError, match="has ended by itself, with exit code 3"):
        evaluate(nn.Linear(4, 3), Data(partial(os._exit, 3)), device="cpu", batch_size=8, workers=1)
    assert signal.getsignal(signal.SIGCHLD) == handler or handler == signal.SIG_DFL
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_group(tmp_path: Path, signum: signal.Signals) -> None:
    """The run is saved, and goes on to the weights of one that nobody stopped; the dump keeps its
    shards.
    """
    whole = train(tmp_path / "whole", Data(), workers=0)
    with pytest.raises(
        Interrupted, match=r"step \d of 8 is saved in .*last; give the same command again"
    ) as caught:
        train(tmp_path / "run", Data(partial(signal_the_group, signum)))
    assert caught.value.exit_code == 128 + signum and state(tmp_path / "run") >= 2
    assert train(tmp_path / "run", Data()).training["loss"] == whole.training["loss"]
    with pytest.raises(Interrupted, match="the open shard was dropped") as caught:
        dump(tmp_path / "c", Data(partial(signal_the_group, signum)), workers=1)
    assert caught.value.exit_code == 128 + signum
    assert dump(tmp_path / "c", Data()).complete and multiprocessing.active_children() == []


def test_a_first_signal_ends_the_wait_for_a_worker_that_is_stuck(tmp_path: Path) -> None:
    def stuck() -> None:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)

    begun = time.monotonic()
    with pytest.raises(Interrupted, match=r"step [2-5] of 8 is saved"):
        train(tmp_path / "run", Data(stuck))
    with pytest.raises(Interrupted, match="the open shard was dropped"):
        dump(tmp_path / "c", Data(stuck), workers=2)
    assert time.monotonic() - begun < 15 and multiprocessing.active_children() == []


def test_a_batch_that_cannot_be_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a full /dev/shm torch says so in a thread and drops the batch; here it is packed where
    that is an error.
    """
    said = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    for error, words in (
        (
            RuntimeError(said),
            r"\(unable to allocate .*: there is too little shared memory in "
            r"/dev/shm; take fewer --workers or a smaller batch, .*--shm-size\)$",
        ),
        (TypeError("cannot pickle that"), r": TypeError: cannot pickle that[^\n]*$"),
    ):

        def full(batch: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(workers, "ForkingPickler", SimpleNamespace(dumps=full))
        for call in (
            partial(dump, tmp_path / "c", Data(), workers=2),
            partial(train, tmp_path / "run", Data()),
        ):
            with pytest.raises(
                KDCacheError, match="^a worker process cannot hand over its batch.*" + words
            ):
                call()


def test_torchs_handler_of_dead_children_rests_while_ours_work() -> None:
    """It would raise anywhere: here in the midst of what is done between two batches."""
    made = workers.by_workers(lambda i: torch.full((2,), i), lambda: range(40), 2)  # type: ignore[arg-type]
    with Signals("never"):
        assert next(made).tolist() == [0, 0]
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            sum(range(100))
    with pytest.raises(workers.WorkerDied):
        list(made)


USER = """
import torch
from helper import SCALE

DRAWN = torch.rand(3)                   # what a file makes as it runs is the same in every process

class Rows:
    name = "rows"
    def __len__(self): return 12
    def __getitem__(self, i): return torch.cat([DRAWN, torch.tensor([i * SCALE])]), i % 3
"""


def test_a_file_of_the_users_is_imported_where_a_pickle_is_opened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "data.py"
    file.write_text(USER)
    (tmp_path / "helper.py").write_text("SCALE = 2.0\n")
    samples = Samples(load_data(f"{file}:Rows"))
    sent = bytes(ForkingPickler.dumps(samples))
    name = type(samples.dataset).__module__
    monkeypatch.setattr(code_specs.FINDER, "paths", {})
    monkeypatch.delitem(sys.modules, name)
    state = torch.random.get_rng_state()
    got = pickle.loads(sent)
    assert type(got.dataset).__module__ == name and type(got.dataset) is not type(samples.dataset)
    assert torch.equal(got.item(3).inputs, samples.item(3).inputs) and len(got) == 12
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_process_that_is_no_fork(tmp_path: Path) -> None:
    """The start method of macOS: a batch of a file's dataset, as this process makes it."""
    (tmp_path / "data.py").write_text(USER)
    (tmp_path / "helper.py").write_text("SCALE = 2.0\n")
    fetch = Fetch(Samples(load_data(f"{tmp_path}/data.py:Rows")))
    pairs = [[(0, 0), (5, 0)], [(11, 0)]]
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        got = list(workers.by_workers(fetch, lambda: pairs, 1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    for batch, wanted in zip(got, pairs, strict=True):
        assert torch.equal(batch.inputs, fetch(wanted).inputs)  # type: ignore[arg-type]
