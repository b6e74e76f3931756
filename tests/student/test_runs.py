"""A run's folder: continuing bit for bit, surviving a kill at any moment, refusing what is not the
same run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from student_world import Net, Points, TinyLM, Windows, equal_weights, write_cache
from torch import nn

import kdcache.models.model
from kdcache.cache.spec import FeatureSpec
from kdcache.errors import CacheCorrupt, CacheExists, DataError, KDCacheError, SpecMismatch
from kdcache.models.weights import load_weights
from kdcache.process.signals import Interrupted
from kdcache.student import checkpoint, metrics
from kdcache.student.evaluate import evaluate
from kdcache.student.settings import BEST_BY
from kdcache.student.train import train_student
from kdcache.student.trainer import StepInfo

TIMES = ("samples_per_second",)


class Killed(BaseException):
    """Stands for a kill: nothing in the package handles it."""


class World:
    """One kind of run: a cache and the options to train from it."""

    def __init__(self, tmp_path: Path, make: Callable[[], nn.Module], **options: Any) -> None:
        self.path, self.make, self.options = tmp_path, make, options

    def train(self, name: str, stop_after: int | None = None, **options: Any) -> nn.Module:
        """The student after a call; `stop_after` kills it after that step."""
        student = self.make()

        def on_step(info: StepInfo) -> None:
            if info.step == stop_after:
                raise Killed

        try:
            report = train_student(
                student=student,
                out=self.path / name,
                on_step=on_step,
                **{**self.options, **options},
            )
            assert report.finished and stop_after is None
        except Killed:
            pass
        return student

    def lines(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl without what the clock decides."""
        found = metrics.read(self.path / name / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def points_world(tmp_path: Path, **options: Any) -> World:
    """8 steps in 2.5 epochs; checkpoints after steps 3, 6 and 8; dropout and running statistics."""
    data, teacher = Points(48), Net(32, seed=7)
    cache = write_cache(
        tmp_path / "cache",
        data,
        teacher,
        features=[
            FeatureSpec(name="body", module="body", recipe="raw", dtype="float32", shape=(32,))
        ],
    )
    evaluated = (
        {"eval_data": Points(20, seed=5), "eval_every": 4} if "eval_data" not in options else {}
    )
    return World(
        tmp_path,
        lambda: Net(8, dropout=0.4, norm=True),
        **{
            "cache": cache,
            "data": data,
            **evaluated,
            "epochs": 2.5,
            "batch_size": 16,
            "lr": 0.01,
            "save_every": 3,
            "warmup": 2,
            **options,
        },
    )


def language_world(tmp_path: Path) -> World:
    cache = write_cache(
        tmp_path / "cache", Windows(24), TinyLM(16, seed=3), tokens=True, kind="topk", tiers=(4,)
    )
    return World(
        tmp_path,
        lambda: TinyLM(dropout=0.3),
        cache=cache,
        epochs=2,
        batch_size=7,
        micro_batch_size=3,
        save_every=3,
        eval_data=Windows(9, seed=4),
        clip=0.5,
    )


def match_world(tmp_path: Path) -> World:
    return points_world(tmp_path, match=["body=body:mse:0.5"], optimizer="sgd", alpha=1.0)


@pytest.mark.parametrize("world", [points_world, language_world, match_world])
def test_continued_runs_are_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, world: Callable[..., World]
) -> None:
    here = world(tmp_path)
    whole = here.train("whole")
    # In the first epoch; after the last checkpoint; twice, the second time before any new
    # checkpoint.
    for name, stops in {"early": [2], "twice": [4, 5], "thrice": [3, 6, 7]}.items():
        for stop in stops:
            here.train(name, stop_after=stop)
            assert not (tmp_path / name / "summary.json").exists()
        assert equal_weights(here.train(name), whole)
        assert here.lines(name) == here.lines("whole")
        a, b = (load_file(tmp_path / n / "last" / "state.safetensors") for n in (name, "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(line.get("eval_loss") for line in here.lines("whole"))


def test_the_projections_of_hint_losses_are_part_of_the_state(tmp_path: Path) -> None:
    here = match_world(tmp_path)
    said: list[str] = []
    here.train(
        "whole",
        epochs=60,
        lr=0.05,
        save_every=1000,
        eval_data=None,
        eval_every=None,
        say=said.append,
    )
    state = load_file(tmp_path / "whole" / "last" / "state.safetensors")
    assert state["projections/0.weight"].shape == (32, 8)
    assert "optimizer/momentum_buffer/match:projections.0.weight" in state
    learned = (
        "match body=body:mse:0.5: through a learned projection from 8 to 32, kept in "
        "state.safetensors"
    )
    assert any(line.startswith(learned) for line in said)
    losses = [line["match body=body:mse:0.5"] for line in here.lines("whole") if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


OPERATIONS = (
    (checkpoint.os, "rename"),
    (checkpoint, "sync"),
    (checkpoint, "sync_folder"),
    (checkpoint, "clear"),
    (checkpoint.shutil, "rmtree"),
    (checkpoint, "save_file"),
    (kdcache.models.model.Model, "save"),
    (Path, "write_text"),
    (Path, "mkdir"),
)


def test_a_kill_at_any_file_operation_of_a_checkpoint_leaves_one_to_continue_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = points_world(tmp_path, eval_data=None)
    whole = here.train("whole")
    # one checkpoint is there, at step 3; the next is at step 6
    here.train("begun", stop_after=5)
    survived, at = [], 0
    while True:
        shutil.copytree(tmp_path / "begun", run := tmp_path / f"killed{at}")
        with monkeypatch.context() as patch:
            count = fail_at(patch, at)
            here.train(run.name, stop_after=6)
        if count[0] <= at:  # the whole of step 6 ran through
            break
        survived.append(
            json.loads((checkpoint.find(run / "last") / "state.json").read_text())["step"]
        )
        assert equal_weights(here.train(run.name), whole)
        assert here.lines(run.name) == here.lines("whole")
        assert sorted(p.name for p in run.iterdir()) == [
            ".lock",
            "last",
            "metrics.jsonl",
            "run.toml",
            "summary.json",
        ]
        at += 1
    # the old one, then the new one, never none
    assert survived == sorted(survived) and set(survived) == {3, 6}
    assert at >= 12


def fail_at(patch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Make the `at`-th of OPERATIONS, counted from now, kill instead of running; how many were
    asked for.
    """
    count = [0]

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == at + 1:
                raise Killed
            return original(*args, **kwargs)

        return call

    for owner, name in OPERATIONS:
        patch.setattr(owner, name, dying(getattr(owner, name)))
    return count


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from student_world import Net, Points
from kdcache.student.train import train_student
import torch
torch.set_num_threads(1)
train_student(student=Net(8, dropout=0.4, norm=True), out={out!r}, cache={cache!r}, data=Points(48),
              epochs=2.5, batch_size=16, lr=0.01, save_every=3, warmup=2,
              on_step=lambda info: os.kill(os.getpid(), signal.SIGKILL) if info.step == 5 else None)
"""


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    here = points_world(tmp_path, eval_data=None)
    code = CHILD.format(
        tests=str(Path(__file__).parents[1] / "tools"),
        out=str(tmp_path / "killed"),
        cache=str(tmp_path / "cache"),
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert equal_weights(here.train("killed"), here.train("whole"))
    assert here.lines("killed") == here.lines("whole")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_it_came_in_and_says_how_to_go_on(
    tmp_path: Path, signum: int, code: int
) -> None:
    here, before = points_world(tmp_path), signal.getsignal(signum)
    whole = here.train("whole")
    options = {**here.options, "student": here.make(), "out": tmp_path / "run"}
    with pytest.raises(
        Interrupted, match=r"step 5 of 8 is saved in .*last; give the same command again"
    ) as caught:
        train_student(
            **options, on_step=lambda info: os.kill(os.getpid(), signum) if info.step == 4 else None
        )
    assert caught.value.exit_code == code and signal.getsignal(signum) == before
    assert json.loads((tmp_path / "run" / "last" / "state.json").read_text())["step"] == 5
    assert equal_weights(here.train("run"), whole)
    assert here.lines("run") == here.lines("whole")


def test_a_second_signal_ends_a_run_at_once_and_one_in_the_last_step_is_too_late(
    tmp_path: Path,
) -> None:
    here = points_world(tmp_path)

    def twice(info: StepInfo) -> None:
        if info.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        Interrupted,
        match=r"since the last checkpoint in .*run are lost; give the same command again",
    ):
        train_student(**here.options, student=here.make(), out=tmp_path / "run", on_step=twice)
    assert json.loads((tmp_path / "run" / "last" / "state.json").read_text())["step"] == 3
    report = train_student(
        **here.options,
        student=here.make(),
        out=tmp_path / "run",
        on_step=lambda info: os.kill(os.getpid(), signal.SIGTERM) if info.step == 7 else None,
    )
    assert report.finished and report.steps == 8


def test_a_finished_run_says_so_and_trains_no_more(tmp_path: Path) -> None:
    here, said = points_world(tmp_path), []
    first = train_student(student=here.make(), out=tmp_path / "run", **here.options)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    student = here.make()
    again = train_student(student=student, out=tmp_path / "run", say=said.append, **here.options)
    assert (
        again.already_finished and not first.already_finished and "is finished already" in said[0]
    )
    assert (again.evaluation, again.best, again.steps, again.training) == (
        first.evaluation,
        first.best,
        first.steps,
        first.training,
    )
    assert not equal_weights(student, here.make())
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == files
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock",
        "best",
        "last",
        "metrics.jsonl",
        "run.toml",
        "summary.json",
    ]


def test_other_options_are_refused_with_the_fields(tmp_path: Path) -> None:
    here = points_world(tmp_path)
    here.train("run", stop_after=4)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(SpecMismatch) as caught:
        here.train("run", lr=0.02, seed=1, clip=1.0)
    for line in (
        "lr: the run has 0.01, given is 0.02",
        "seed: the run has 0, given is 1",
        "clip: the run has 0.0",
    ):
        assert line in str(caught.value)
    other = write_cache(tmp_path / "other", Points(48), Net(32, seed=9))
    with pytest.raises(
        SpecMismatch, match=r"cache-content-id: the run has '[0-9a-f]{64}', given is '[0-9a-f]{64}'"
    ):
        here.train("run", cache=other)
    with pytest.raises(SpecMismatch, match="student: the run has 'Net', given is 'TinyLM'"):
        World(tmp_path, TinyLM, **here.options).train("run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    # the content counts, not the place
    moved = shutil.move(tmp_path / "cache", tmp_path / "moved")
    here.train("run", cache=moved, workers=0, report_to=())


def test_other_data_is_refused_with_the_fields_and_what_is_accepted_is_that_alone(
    tmp_path: Path,
) -> None:
    """The same length and names, other bytes: the keys of samples differ, and nothing else tells."""
    # no cache, whose own comparison would come first
    here = points_world(tmp_path, cache=None, alpha=0.0)
    here.train("run", stop_after=4)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other, newer = Points(48, seed=1), Points(48)
    newer.revision = "2"
    for part, given, line in (
        (
            "data",
            other,
            r"data.probe: 48 of 48 sample keys, evenly spaced, differ; the first is \S+ in the run",
        ),
        ("data", newer, "data.revision: the run has '1', given is '2'"),
        ("data", Points(47), "data.num_samples: the run has 48, given is 47"),
        (
            "eval_data",
            Points(20, seed=6),
            "eval_data.probe: 20 of 20 sample keys, evenly spaced, differ",
        ),
    ):
        for accept in ((), ("eval_data.name",)):
            with pytest.raises(DataError, match=f"is a run on other data:(?s:.)*  {line}"):
                here.train("run", **{part: given}, accept=accept)
    assert {path: path.read_bytes() for path in before} == before
    here.train("run", data=newer, accept=["data.revision"])


def test_another_micro_batch_size_is_refused_where_batch_norms_see_it(tmp_path: Path) -> None:
    here = points_world(tmp_path)
    here.train("norm", stop_after=4)
    with pytest.raises(
        SpecMismatch, match=r"another micro-batch size .*batch norms, such as the student's 'norm'"
    ):
        here.train("norm", micro_batch_size=8)
    here.make = lambda: Net(8)
    here.train("none", stop_after=4)
    here.train("none", micro_batch_size=8)


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    here = points_world(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for place in ("notes", "cache"):
        with pytest.raises(CacheExists, match="is no run"):
            here.train(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheExists):
        here.train("file")
    (tmp_path / "empty").mkdir()
    here.train("empty")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.toml").write_text("[train-stu")
    with pytest.raises(CacheCorrupt, match="not readable as TOML"):
        here.train("half")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    here = points_world(tmp_path)
    here.train("run", stop_after=4)
    whole, last = here.train("whole"), tmp_path / "run" / "last"
    for name in ("model.safetensors", "state.safetensors", "state.json"):
        good = (last / name).read_bytes()
        flipped = bytearray(good)
        # in a weight, in a state; a digit of the digest
        flipped[-40] ^= 1
        for bad in (bytes(flipped), good[:200], None):
            (last / name).unlink() if bad is None else (last / name).write_bytes(bad)
            with pytest.raises(
                CacheCorrupt, match=rf"last/{name}.*move .*last away to go on without"
            ):
                here.train("run")
            (last / name).write_bytes(good)
    assert equal_weights(here.train("run"), whole)


def test_run_toml_says_what_was_asked_and_with_what(tmp_path: Path) -> None:
    here = points_world(tmp_path, epochs=1)
    here.train("run")
    document = tomllib.loads((tmp_path / "run" / "run.toml").read_text())
    options, recorded = document["train-student"], document["recorded"]
    assert options["lr"] == 0.01 and options["batch-size"] == 16 and options["shuffle"] is True
    assert recorded["cache-content-id"] == here.options["cache"].content_id
    assert {**recorded["data"], "probe": ""} == {
        "name": "points",
        "revision": "1",
        "num-samples": 48,
        "probe": "",
    }
    assert recorded["data"]["probe"].split() == here.options["cache"].identity.data["probe"]
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["temperature-used"] == 2.0 and recorded["num-classes"] == 7
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"]["step"] in {line["step"] for line in here.lines("run")}


@pytest.mark.parametrize("by", BEST_BY)
def test_best_is_the_best_and_last_the_last(tmp_path: Path, by: str) -> None:
    here = language_world(tmp_path) if by == "eval_perplexity" else points_world(tmp_path)
    student = here.train("run", epochs=9, lr=0.3, best_by=by, eval_every=2, save_every=50)
    evaluations = [line for line in here.lines("run") if by in line]
    best = (max if "accuracy" in by else min)(evaluations, key=lambda line: line[by])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # the first of equals
    assert summary["best"] == {key: best[key] for key in summary["best"]}
    assert len({line[by] for line in evaluations}) > 2
    for name, expected in (("best", best[by]), ("last", summary[by])):
        loaded = here.make()
        load_weights(loaded, tmp_path / "run" / name)
        found = evaluate(loaded, here.options["eval_data"])[by.removeprefix("eval_")]
        assert found == pytest.approx(expected, rel=1e-6)
    assert equal_weights(loaded, student)


def test_diverged_training_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    here = points_world(tmp_path, eval_data=None, lr=1e30, optimizer="sgd", epochs=10)
    with pytest.raises(
        KDCacheError, match=r"step [2-9] \(position \d+\): the loss is (nan|inf).* or a clip"
    ) as caught:
        here.train("run", save_every=1)
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] is None
    state = json.loads((tmp_path / "run" / "last" / "state.json").read_text())
    assert state["step"] == lines[-1]["step"] - 1
    assert str(caught.value).endswith(
        "a longer warmup or a clip, under another --out; the last checkpoint is of step "
        f"{state['step']}"
    )
    with pytest.raises(
        KDCacheError,
        match=r"a warmup or a smaller clip, under another --out; no checkpoint was save",
    ):
        here.train("unsaved", save_every=1000, warmup=0.0, clip=1e30)


def test_torn_metrics_lose_only_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1}\n{"step": 2}\nnot json\n{"step": 3}\n{"step": 2, "eval_loss": 1}\n{"step": 1'
    )
    metrics.truncate(path, 2)
    assert metrics.read(path) == [{"step": 1}, {"step": 2}, {"step": 2, "eval_loss": 1}]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_by_default_an_epoch_is_evaluated_once_wherever_its_steps_end(tmp_path: Path) -> None:
    """50 records in steps of 16: epochs end within steps 4, 7, 10 and 13."""
    lines: list[dict[str, Any]] = []
    train_student(
        student=Net(8),
        out=tmp_path / "run",
        data=Points(50),
        eval_data=Points(8),
        alpha=0.0,
        epochs=4,
        batch_size=16,
        on_metrics=lines.append,
    )
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 7, 10, 13]
