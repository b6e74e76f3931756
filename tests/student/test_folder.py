"""One run, one process, one dataset: the lock of a run's folder, its data, and the options that may
change.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import Net, Points, TinyLM, Windows, equal_weights, write_cache
from torch import nn

from kdcache.errors import DataError, KDCacheError, SpecMismatch, UsageError
from kdcache.models.model import Model
from kdcache.student import checkpoint, metrics, run_folder
from kdcache.student.run_folder import RunFolder
from kdcache.student.train import train_student
from kdcache.student.trainer import StepInfo


class Killed(BaseException):
    """Stands for a kill."""


def begin(
    out: Path, student: nn.Module | None = None, stop: int = 2, **options: Any
) -> dict[str, Any]:
    """Train to a kill after step `stop` of 4, a checkpoint after each; the options, to go on with."""
    given = {
        "data": Points(32),
        "alpha": 0.0,
        "batch_size": 8,
        "epochs": 1,
        "save_every": 1,
        "lr": 0.01,
        **options,
    }

    def on_step(info: StepInfo) -> None:
        if info.step == stop:
            raise Killed

    with pytest.raises(Killed):
        train_student(student=student or Net(8), out=out, on_step=on_step, **given)
    return given


# ---- the lock
# -----------------------------------------------------------------------------------------------------


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from student_world import Net, Points
from kdcache.student.train import train_student

def on_step(info):
    if info.step == 2:
        print("training", flush=True)
        sys.stdin.read()

train_student(student=Net(8), out={out!r}, data=Points(32), alpha=0.0, batch_size=8, epochs=1,
              save_every=1, lr=0.01, workers={workers}, on_step=on_step)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(
    tmp_path: Path, workers: int
) -> None:
    code = CHILD.format(
        tests=str(Path(__file__).parents[1] / "tools"), out=str(tmp_path / "run"), workers=workers
    )
    given = {
        "data": Points(32),
        "alpha": 0.0,
        "batch_size": 8,
        "epochs": 1,
        "save_every": 1,
        "lr": 0.01,
    }
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "training\n"
        kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        with pytest.raises(
            KDCacheError, match=rf"another process trains here \(pid {child.pid} on "
        ) as caught:
            train_student(student=Net(8), out=tmp_path / "run", **given)
        assert caught.value.exit_code == 1
        assert {
            path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
        } == kept
        os.kill(child.pid, signal.SIGKILL)
    # at once
    report = train_student(student=(student := Net(8)), out=tmp_path / "run", **given)
    assert report.finished and report.continued_from == 2
    train_student(student=(whole := Net(8)), out=tmp_path / "whole", **given)
    assert equal_weights(student, whole)


def test_two_that_begin_together_are_one(tmp_path: Path) -> None:
    """Both find nothing at `out`; whoever comes second must neither write nor wait."""
    first, second = (RunFolder(tmp_path / "run", {"lr": 1.0}, {}) for _ in range(2))
    first.create({})
    with pytest.raises(KDCacheError, match="another process trains here"):
        second.create({})
    first.__exit__()
    with pytest.raises(KDCacheError, match="another process has begun a run here meanwhile"):
        second.create({})


def test_one_that_was_finished_meanwhile_is_seen(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", {"lr": 1.0}, {}) as first:
        first.create({})
        late = RunFolder(tmp_path / "run", {"lr": 1.0}, {})
        first.finish({"steps": 3})
    with late:
        assert late.summary is None
        late.hold()
        assert late.summary == {"steps": 3}


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, how: int) -> None:
        raise OSError(run_folder.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", none)
    said: list[str] = []
    train_student(
        student=Net(8),
        out=tmp_path / "run",
        data=Points(8),
        alpha=0.0,
        max_steps=1,
        say=said.append,
    )
    assert any("file system without locks" in line for line in said)


# ---- its data
# -----------------------------------------------------------------------------------------------------


def test_other_samples_of_the_same_class_and_length_are_refused(tmp_path: Path) -> None:
    given = begin(tmp_path / "run", eval_data=Points(9, seed=5))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    other = Points(32)
    other.x[1] += 1
    with pytest.raises(
        DataError, match=r"data.probe: 1 of 32 sample keys[\s\S]*--accept data.probe"
    ) as caught:
        train_student(student=Net(8), out=tmp_path / "run", **{**given, "data": other})
    probe = tomllib.loads((tmp_path / "run" / "run.toml").read_text())["recorded"]["data"][
        "probe"
    ].split()
    assert probe[1] in str(caught.value) and probe[0] not in str(caught.value)
    other.name = "elsewhere"
    with pytest.raises(
        DataError,
        match=r"data.name: the run has 'points', given is 'elsewhere'\n  data.probe: 1 of",
    ):
        train_student(
            student=Net(8),
            out=tmp_path / "run",
            **{**given, "data": other, "accept": ["data.revision"]},
        )
    with pytest.raises(DataError, match=r"eval_data.probe: 9 of 9"):
        train_student(
            student=Net(8), out=tmp_path / "run", **{**given, "eval_data": Points(9, seed=6)}
        )
    with pytest.raises(
        DataError,
        match=r"data.num_samples: the run has 32, given is 40\n.*keeps 32 .* given are 40",
    ):
        train_student(student=Net(8), out=tmp_path / "run", **{**given, "data": Points(40)})
    with pytest.raises(UsageError, match=r"accept 'data.prob': .*did you mean .*'data.probe'"):
        train_student(student=Net(8), out=tmp_path / "run", **{**given, "accept": ["data.prob"]})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    said: list[str] = []
    accepted = {
        **given,
        "data": other,
        "accept": ["data", "eval_data.probe"],
        "eval_data": Points(9, seed=6),
    }
    assert (
        train_student(
            student=Net(8), out=tmp_path / "run", say=said.append, **accepted
        ).continued_from
        == 2
    )
    assert {
        f"accepted: {field} differs" for field in ("data.name", "data.probe", "eval_data.probe")
    } <= {*said}
    document = tomllib.loads((tmp_path / "run" / "run.toml").read_text())
    assert "after step 2: accepted: data.probe differs" in document["recorded"]["changes"]
    # a finished one is that of its own data too
    with pytest.raises(DataError, match=r"data\.probe"):
        train_student(student=Net(8), out=tmp_path / "run", **{**given, "data": other})


# ---- options that may change
# --------------------------------------------------------------------------------------


def test_what_a_default_stands_for_is_the_default(tmp_path: Path) -> None:
    cache = write_cache(
        tmp_path / "cache", Windows(24), TinyLM(16, seed=3), tokens=True, kind="topk", tiers=(2, 4)
    )
    given = begin(
        tmp_path / "run", TinyLM(), cache=cache, data=None, alpha=0.5, divergence="jsd", epochs=1.25
    )
    spelt = {
        **given,
        "k": 4,
        "temperature": 1.0,
        "engine": "torch",
        "weight_decay": 0.01,
        "micro_batch_size": 8,
        "beta": 0.5,
    }
    said: list[str] = []
    report = train_student(student=TinyLM(), out=tmp_path / "run", say=said.append, **spelt)
    assert report.continued_from == 2 and not any("from here on" in line for line in said)
    for wrong, line in (
        ({"k": 2}, "k: the run has 4, given is 2"),
        ({"beta": 0.4}, "beta: the run has 0.5"),
        ({"temperature": 2.0}, "temperature: the run has 1.0"),
        ({"weight_decay": 0.0}, "weight-decay"),
        ({"alpha": 0.25}, "ce-weight: the run has 0.5, given is 0.75"),
    ):
        with pytest.raises(SpecMismatch, match=re.escape(line)):
            train_student(student=TinyLM(), out=tmp_path / "run", **{**spelt, **wrong})


def test_options_that_leave_the_mathematics_may_change_and_are_recorded(tmp_path: Path) -> None:
    given = begin(tmp_path / "run", Net(8).double())
    said: list[str] = []
    student = Net(8).double()
    train_student(
        student=student,
        out=tmp_path / "run",
        say=said.append,
        **{**given, "micro_batch_size": 3, "save_every": 2, "deterministic": True},
    )
    lines = [line for line in said if line.startswith("from here on: ")]
    assert [line.split(" ")[3] for line in lines] == [
        "deterministic",
        "micro-batch-size",
        "save-every",
    ]
    assert "from here on: micro-batch-size 3, was 8: the same mathematics to other bits" in lines[1]
    document = tomllib.loads((tmp_path / "run" / "run.toml").read_text())
    assert (
        document["train-student"]["micro-batch-size"] == 3
        and document["train-student"]["save-every"] == 2
    )
    assert document["recorded"]["changes"] == [
        line.replace("from here on", "after step 2") for line in lines
    ]
    train_student(student=(whole := Net(8).double()), out=tmp_path / "whole", **given)
    # In float64 another order of summation leaves 2^-53 of sums of some 10 terms of order 1, in
    # each of 2 steps.
    for a, b in zip(student.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_batch_norms_keep_their_micro_batches(tmp_path: Path) -> None:
    given = begin(tmp_path / "run", Net(8, norm=True))
    with pytest.raises(
        SpecMismatch,
        match=r"micro-batch-size 4, was 8\): batch norms, such as the student's 'norm'",
    ):
        train_student(
            student=Net(8, norm=True), out=tmp_path / "run", **{**given, "micro_batch_size": 4}
        )
    assert train_student(student=Net(8, norm=True), out=tmp_path / "run", **given).finished
    # as after one that was too large at once
    given = begin(tmp_path / "new", Net(8, norm=True), save_every=3)
    report = train_student(
        student=Net(8, norm=True), out=tmp_path / "new", **{**given, "micro_batch_size": 4}
    )
    assert report.finished and report.continued_from == 0


# ---- its files
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [False, True])
def test_a_full_disk_keeps_the_checkpoints_and_says_so(tmp_path: Path, best: bool) -> None:
    evaluated = {"eval_data": Points(9, seed=5), "eval_every": 1} if best else {}
    # its weights take 104 kB
    given = begin(tmp_path / "run", Net(2000), save_every=2, **evaluated)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(
            KDCacheError,
            match=r"disk full while saving a checkpoint \(File too large\); free "
            "space and run the same command again; kept: last/ of step 2",
        ) as caught:
            train_student(student=Net(2000), out=tmp_path / "run", **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ("best/ of step" in str(caught.value)) is best
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock",
        *(["best"] if best else []),
        "last",
        "metrics.jsonl",
        "run.toml",
    ]
    train_student(student=(student := Net(2000)), out=tmp_path / "run", **given)
    train_student(student=(whole := Net(2000)), out=tmp_path / "whole", **given)
    assert equal_weights(student, whole)


def test_a_full_disk_under_the_metrics_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = begin(tmp_path / "run")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "fsync", full)
        with pytest.raises(
            KDCacheError,
            match=r"metrics.jsonl: disk full while writing metrics .*; kept: last/ of st",
        ):
            train_student(student=Net(8), out=tmp_path / "run", **given)
    assert train_student(student=Net(8), out=tmp_path / "run", **given).finished


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_are_as_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        train_student(student=Net(8), out=tmp_path / "run", data=Points(8), alpha=0.0, max_steps=1)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) == 7 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_an_infinite_gradient_norm_is_kept_in_a_checkpoint(tmp_path: Path) -> None:
    """As in the first steps in float16, where the loss itself is finite."""
    with RunFolder(tmp_path / "run", {}, {}) as folder:
        folder.create({})
        model = Model(Net(8), "", "", None, "", None)
        checkpoint.save(
            tmp_path / "run" / "last",
            model,
            {},
            {"step": 1, "training": {"grad_norm": float("inf")}},
        )
    assert checkpoint.load(tmp_path / "run" / "last", Net(8, seed=3))[1]["training"] == {
        "grad_norm": float("inf")
    }
