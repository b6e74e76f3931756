"""A dump that is stopped, shared or repeated ends as one that was not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_world import Noisy, Points, Sentences, Speaker, files, mlp

import kdcache
from kdcache.cache.writer import Writer
from kdcache.errors import DataError, KDCacheError
from kdcache.process.ranks import Rank
from kdcache.process.signals import Interrupted, Signals
from kdcache.teacher.dump import DumpReport, dump_teacher

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tools")]


def dump(out: Path, **changes: Any) -> DumpReport:
    options: dict[str, Any] = {
        "teacher": mlp(),
        "data": Points(),
        "k": 4,
        "device": "cpu",
        "records_per_shard": 10,
        "batch_size": 4,
        "features": ["0:raw:int8"],
    }
    return dump_teacher(out=out, **{**options, **changes})


@pytest.mark.parametrize("container", ["arrow", "hdf5"])
@pytest.mark.parametrize("fail_at", [0, 9, 10, 23, 49])
def test_an_exception_in_the_dataset_loses_its_shard_only(
    tmp_path: Path, container: str, fail_at: int
) -> None:
    whole = dump(tmp_path / "whole", container=container)
    data = Points()
    # The probe and the first question read every sample of so small a dataset: it must fail only
    # after them.
    probed = threading.Event()
    read = Points.__getitem__

    class Failing(Points):
        def __getitem__(self, i: int) -> Any:
            if i == fail_at and probed.is_set():
                raise RuntimeError("the disk ate it")
            return read(self, i)

    def started(text: str) -> None:
        if text.startswith("the first batch asked twice"):
            probed.set()

    with pytest.raises(
        DataError, match=f"sample {fail_at} cannot be read: RuntimeError: the disk ate it"
    ):
        dump(tmp_path / "c", data=Failing(), container=container, say=started)
    with kdcache.open(tmp_path / "c", allow_partial=True) as cache:
        assert cache.missing() == list(range(fail_at // 10, 5))
    report = dump(tmp_path / "c", data=data, container=container)
    assert report.shards_written == 5 - fail_at // 10 and report.content_id == whole.content_id
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_a_finished_cache_says_so_and_is_left_alone(tmp_path: Path) -> None:
    first = dump(tmp_path / "c")
    before, said = files(tmp_path / "c"), list[str]()
    again = dump(tmp_path / "c", say=said.append)
    assert (
        again.already_complete and again.complete and again.shards_written == again.shards_left == 0
    )
    assert again.content_id == first.content_id and files(tmp_path / "c") == before
    assert any("nothing to do" in line for line in said)


MEANS = ("bytes", "covered_mass", "truncation_kl", "quantisation_kl", "accuracy")


@pytest.mark.parametrize(
    "data",
    [{}, {"teacher": Speaker(), "data": Sentences(40), "features": ()}],
    ids=["rows", "tokens"],
)
def test_a_report_is_of_the_whole_whoever_wrote_it(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call, continued, already complete, and by the rank that ends last: one and the same."""
    whole = dump(tmp_path / "whole", **data).to_json()
    with kdcache.open(tmp_path / "whole") as cache:
        assert whole["bytes"] == sum(cache.column_bytes().values())
        assert whole["accuracy"] == cache.measured["correct"] / cache.measured["labelled"]
    victim = sorted((tmp_path / "whole/data").iterdir())[1]
    victim.unlink()
    mended = dump(tmp_path / "whole", **data).to_json()
    assert mended["shards_written"] == 1 and mended["records_written"] == 10
    again = dump(tmp_path / "whole", **data).to_json()
    assert again["already_complete"] and again["shards_written"] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        last = dump(tmp_path / "shared", **data).to_json()
    for report in (mended, again, last):
        assert report["complete"] and {name: report[name] for name in MEANS} == {
            name: whole[name] for name in MEANS
        }


def test_a_finished_cache_without_its_manifest_is_sealed_again(tmp_path: Path) -> None:
    dump(tmp_path / "c")
    before = files(tmp_path / "c")
    (tmp_path / "c/manifest/00000001.json").unlink()
    assert dump(tmp_path / "c").already_complete and files(tmp_path / "c") == before


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_shards_in_any_order(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    reports = []
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        reports.append(dump(tmp_path / "c"))
    assert sum(r.shards_written for r in reports) == 5
    assert [r.complete for r in reports] == [False] * (world - 1) + [True]
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_ranks_at_the_same_time_give_the_same_cache(tmp_path: Path) -> None:
    dump(tmp_path / "whole", records_per_shard=2)
    script = (
        "import sys, json; sys.path[:0] = sys.argv[2:]\nimport torch; "
        "torch.set_num_threads(1)\nfrom pathlib import Path\nfrom test_resume import "
        "dump\nprint(json.dumps(dump(Path(sys.argv[1]), records_per_shard=2).to_json()))\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "c"), *PATHS],
            stdout=subprocess.PIPE,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    reports = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert sorted(r["shards_written"] for r in reports) == [12, 13] and any(
        r["complete"] for r in reports
    )
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_shares_are_disjoint_and_whole_also_when_ranks_look_at_different_moments() -> None:
    # rank 0 wrote shards 0 and 1 before rank 1 looked
    early, late = list(range(10)), list(range(2, 10))
    shares = [Rank(0, 2, 0).share(early), Rank(1, 2, 0).share(late)]
    assert not set(shares[0]) & set(shares[1]) and {0, 1, *shares[0], *shares[1]} == {*early}


@pytest.mark.parametrize("data", [Points(), Noisy()], ids=["plain", "views"])
def test_worker_processes_change_nothing(tmp_path: Path, data: Points) -> None:
    dump(tmp_path / "alone", data=data, views=2)
    dump(tmp_path / "helped", data=data, views=2, workers=2)
    assert files(tmp_path / "helped") == files(tmp_path / "alone")


def test_worker_processes_with_sequences_and_their_errors(tmp_path: Path) -> None:
    for workers in (0, 2):
        dump(
            tmp_path / str(workers),
            teacher=Speaker(),
            data=Sentences(),
            features=(),
            workers=workers,
        )
    assert files(tmp_path / "0") == files(tmp_path / "2")

    class Bad(Points):
        def __getitem__(self, i: int) -> Any:
            return (
                (self.x[i], self.y[i])
                if i != 43 or torch.utils.data.get_worker_info() is None
                else None
            )

    with pytest.raises(
        DataError, match=r"^dataset points, sample 43: an item is a NoneType"
    ) as caught:
        dump(tmp_path / "bad", data=Bad(), workers=2)
    assert "\n" not in str(caught.value)


def test_another_batch_size_is_allowed_on_resume(tmp_path: Path) -> None:
    class Sudden(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.records > 24:
            raise Sudden

    with pytest.raises(KDCacheError, match=r"^progress: Sudden"):
        dump(tmp_path / "c", progress=stop)
    dump(tmp_path / "whole")
    said: list[str] = []
    assert dump(tmp_path / "c", batch_size=10, say=said.append).complete
    assert "begun with other compute: batch_size 4, now 10; allowed" in "\n".join(said)
    columns = [kdcache.open(tmp_path / name).read(np.arange(50)).columns for name in ("c", "whole")]
    np.testing.assert_array_equal(columns[0]["sample_key"], columns[1]["sample_key"])
    np.testing.assert_array_equal(columns[0]["ids_4"], columns[1]["ids_4"])


def test_a_full_disk_while_writing_is_one_line_and_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(tmp_path / "whole")
    write, fsync = Writer.write, os.fsync

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails_at_two(self: Writer, shard: int, *rest: Any) -> None:
        monkeypatch.setattr(os, "fsync", full if shard == 2 else fsync)
        write(self, shard, *rest)

    monkeypatch.setattr(Writer, "write", fails_at_two)
    with pytest.raises(KDCacheError, match="full") as caught:
        dump(tmp_path / "c")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    monkeypatch.undo()
    assert dump(tmp_path / "c").shards_written == 3
    assert files(tmp_path / "c") == files(tmp_path / "whole")


# ---- signals

SLOW = """
import sys; sys.path[:0] = sys.argv[2:]
import time, torch
from pathlib import Path
from test_resume import dump
from kdcache.errors import KDCacheError
torch.set_num_threads(1)
def slowly(progress):
    print(progress.records, flush=True)
    time.sleep(0.1)
try:
    dump(Path(sys.argv[1]), progress=slowly)
except KDCacheError as e:
    print(e, flush=True)
    sys.exit(e.exit_code)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_drops_the_open_shard_and_says_how_to_go_on(
    tmp_path: Path, signum: int, code: int
) -> None:
    command = [sys.executable, "-c", SLOW, str(tmp_path / "c"), *PATHS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 22:
            pass
        process.send_signal(signum)
        rest = process.stdout.read().splitlines()
    assert process.returncode == code
    assert f"{signal.Signals(signum).name}: the open shard was dropped" in rest[-1]
    assert "same command again" in rest[-1]
    with kdcache.open(tmp_path / "c", allow_partial=True) as cache:
        assert cache.missing() in ([2, 3, 4], [3, 4])
    dump(tmp_path / "c")
    dump(tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_signals_wait_for_a_safe_point_but_not_the_second_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals("go on") as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not signals.pending and time.monotonic() < deadline:
            time.sleep(0.001)
        with pytest.raises(Interrupted, match="SIGTERM: go on") as caught:
            signals.check()
        assert caught.value.exit_code == 143
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
    with Signals("go on"), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert caught.value.exit_code == 130


def test_a_dump_runs_in_a_thread_that_cannot_catch_signals(tmp_path: Path) -> None:
    done: list[DumpReport] = []
    thread = threading.Thread(target=lambda: done.append(dump(tmp_path / "c")))
    thread.start()
    thread.join()
    assert done[0].complete
