"""Before step 1: a student that cannot be trained or saved is refused then, and what was tried
leaves no trace.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import CLASSES, WIDTH, Net, Points, equal_weights
from torch import Tensor, nn

from kdcache.cache import store
from kdcache.errors import CacheCorrupt, KDCacheError, UsageError
from kdcache.models.model import Model
from kdcache.student import checkpoint, metrics, run_folder, trainer
from kdcache.student.evaluate import evaluate
from kdcache.student.step import TrainStep
from kdcache.student.train import train_student
from kdcache.student.trainer import StepInfo

PLAIN: dict[str, Any] = {"alpha": 0.0, "batch_size": 8, "lr": 0.05}


class Killed(BaseException):
    """Stands for a kill."""


def train(student: Any, out: Path, stop: int | None = None, **options: Any) -> list[int]:
    """The steps that were done; `stop` kills after that one."""
    steps: list[int] = []

    def on_step(info: StepInfo) -> None:
        steps.append(info.step)
        if info.step == stop:
            raise Killed

    given = {"data": Points(32), "max_steps": 4, **PLAIN, **options}
    try:
        train_student(student=student, out=out, on_step=on_step, **given)
    except Killed:
        assert stop is not None
    return steps


# ---- a pass in training mode
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 1},
        {"epochs": 2, "batch_size": 13},
        {"batch_size": 16, "micro_batch_size": 5, "epochs": 2},
        {"batch_size": 13, "micro_batch_size": 4, "max_steps": 3},
    ],
)
def test_a_batch_norm_that_would_meet_one_record_is_refused_at_once(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """33 records: the last batch, or a micro-batch of it, has one."""
    given = {"data": Points(33), **({"max_steps": None} if "epochs" in options else {}), **options}
    for dry_run in (True, False):
        with pytest.raises(
            KDCacheError,
            match=r"student \(Net\) cannot be trained on 1 record, the smallest micro-batc"
            r"h of the run: ValueError: Expected more than 1 value.*--batch-size",
        ):
            train(Net(8, norm=True), tmp_path / "run", dry_run=dry_run, **given)
        assert not (tmp_path / "run").exists()
    assert train(
        Net(8, norm=True),
        tmp_path / "fits",
        **{**given, "data": Points(36), "batch_size": 12, "micro_batch_size": 4},
    )
    assert train(Net(8), tmp_path / "none", **given)


class Quirky(nn.Module):
    """Whatever a forward pass in training mode may change: statistics, saved and unsaved, replaced
    and written to, attributes of several kinds, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(8, dropout=0.3, norm=True)
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("seen", torch.zeros(()))
        self.noise, self.scale = torch.Generator().manual_seed(3), torch.ones(WIDTH)
        self.calls, self.history, self.by_size = 0, list[int](), dict[int, int]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.seen.add_(len(x))
            self.scale.mul_(1 + 1e-3 * len(x))
            self.calls += 1
            self.history.append(len(x))
            self.by_size[len(x)] = self.calls
            self.last = x
            x = (
                x
                + 0.1 * torch.randn(x.shape, generator=self.noise)
                + 1e-3 * len(self.history) * self.calls
            )
        return self.net((x - self.mean) * self.scale) * (1 + 1e-4 * sum(self.by_size.values()))


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch_size": 3}, {"data": Points(30), "max_steps": 9}]
)
def test_what_was_tried_changes_no_number_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    train(tried := Quirky(), tmp_path / "tried", **options)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "rehearse", lambda self: None)
        train(plain := Quirky(), tmp_path / "plain", **options)
    assert (
        equal_weights(tried, plain)
        and tried.history == plain.history
        and tried.by_size == plain.by_size
    )
    assert torch.equal(tried.mean, plain.mean) and torch.equal(tried.scale, plain.scale)
    a, b = (
        [line["loss"] for line in metrics.read(tmp_path / name / "metrics.jsonl")]
        for name in ("tried", "plain")
    )
    assert a == b


def test_statistics_that_no_state_dict_has_are_continued_from(tmp_path: Path) -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(8)
            self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
            self.register_buffer("table", torch.zeros(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return self.net(x - self.mean)

    train(Running(), tmp_path / "run", stop=3, save_every=1)
    train(continued := Running(), tmp_path / "run", save_every=1)
    train(whole := Running(), tmp_path / "whole", save_every=1)
    assert equal_weights(continued, whole) and torch.equal(continued.mean, whole.mean)
    with checkpoint.opened(tmp_path / "run" / "last") as one:
        from safetensors import safe_open

        with safe_open(one.paths["state.safetensors"], framework="pt") as file:
            # no table: as it was
            assert [name for name in file.keys() if "buffers" in name] == ["buffers/mean"]


def test_what_a_student_raises_in_training_is_one_line(tmp_path: Path) -> None:
    class Raising(Net):
        calls = 0

        def __init__(self, where: str) -> None:
            super().__init__(8)
            self.where = where

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self.training and len(x) == 8:
                Raising.calls += 1  # of the class: no rehearsal takes it back
                # the rehearsal, two steps, the third
                if Raising.calls == 4 and self.where == "forward":
                    raise RuntimeError("broken\nin two lines")
                if Raising.calls == 4 and self.where == "memory":
                    raise torch.OutOfMemoryError("too much")
                if Raising.calls == 4:
                    out.register_hook(lambda gradient: 1 / 0)
            return out

    for where, said in (
        ("forward", r"RuntimeError: broken \(test_rehearsal.py, line \d+\)"),
        ("memory", "OutOfMemoryError: too much .*give a smaller --micro-batch-size"),
        ("backward", "ZeroDivisionError"),
    ):
        Raising.calls = 0
        with pytest.raises(
            KDCacheError,
            match=rf"^step 3: training the student \(Raising\) failed: {said}.*; kept: "
            r"last/ of step 2$",
        ):
            train(Raising(where), tmp_path / where, save_every=1)


def test_sparse_gradients_are_refused_by_name(tmp_path: Path) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, CLASSES, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.table((x.abs() * 2).long().clamp(max=8)).mean(1)

    for clip in (0.0, 1.0):
        with pytest.raises(
            UsageError, match=r"gradient of the student's 'table.weight' is sparse.*sparse=False"
        ):
            train(Sparse(), tmp_path / "run", clip=clip, optimizer="sgd")
    assert not (tmp_path / "run").exists()


def test_a_run_that_learns_nothing_is_stopped_by_name(tmp_path: Path) -> None:
    unlabelled, partly = Points(32), Points(32)
    unlabelled.y = torch.full((32,), -1)
    partly.y[:24] = -1  # the first three batches, in order, have no label

    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            first = nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), CLASSES)
            return 1e30 * first + 0 * super().forward(x)

    same = Points(32)
    same.y = torch.zeros(32, dtype=torch.int64)
    for name, student, data, said in (
        (
            "no rows",
            Net(8),
            unlabelled,
            r"step [1-4]: nothing is learned: no record so far has a row or a label",
        ),
        (
            "no gradient",
            Cut(8),
            same,
            "step 1: nothing is learned: the loss and its gradient are exactly 0; has",
        ),
    ):
        with pytest.raises(KDCacheError, match=said):
            train(student, tmp_path / name, data=data)
        assert not (tmp_path / name / "last").exists()
    for save_every in (1, 100):
        assert train(
            Net(8),
            tmp_path / f"partly {save_every}",
            data=partly,
            shuffle=False,
            save_every=save_every,
        ) == [1, 2, 3, 4]


# ---- a trial save
# -------------------------------------------------------------------------------------------------


class Extra(Net):
    def get_extra_state(self) -> dict[str, float]:
        return {"scale": 1.0}

    def set_extra_state(self, state: object) -> None: ...


class Sealed(Net):
    def save_pretrained(self, folder: Path) -> None:
        raise NotImplementedError("not today")


class Forgetful(Net):
    """Its file holds other numbers than it has."""

    def save_pretrained(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(
            {name: value * 2 for name, value in self.state_dict().items()},
            str(folder / "model.safetensors"),
        )


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (
            Extra,
            r"Extra cannot be saved: its state_dict has '_extra_state', a dict; a checkpoint holds "
            r"tensors",
        ),
        (Sealed, r"weights of Sealed cannot be saved: NotImplementedError: not today"),
        (Forgetful, r"\(Forgetful\) cannot be saved: its body.0.weight .* does not come back"),
    ],
)
def test_what_cannot_be_saved_is_found_before_the_first_step(
    tmp_path: Path, student: Any, said: str
) -> None:
    steps: list[int] = []
    with pytest.raises(KDCacheError, match=said):
        train_student(
            student=student(8),
            out=tmp_path / "run",
            data=Points(32),
            max_steps=4,
            **PLAIN,
            on_step=lambda info: steps.append(info.step),
        )
    assert steps == [] and sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "run.toml",
    ]


STUDENTS = """
import torch
from torch import nn

class Slices(nn.Module):
    "Parameters and buffers that are parts of one storage: some the same, a square, a tied pair."
    def __init__(self):
        super().__init__()
        whole = torch.randn(2 * 5 + 7, 5) * 0.3
        self.a, self.b = nn.Parameter(whole[:5]), nn.Parameter(whole[5:10])
        self.register_buffer("c", whole[10:])
        self.register_buffer("overlap", whole[3:12])
        square = torch.randn(5, 5) * 0.3
        self.d, self.e = nn.Parameter(square), nn.Parameter(square.t().clone().t())
        self.tied = self.d
    def forward(self, x):
        return (x @ self.a).tanh() @ self.b @ self.d @ self.e @ self.tied @ self.c.t()

def slices(): return Slices()
def lazy(): return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(7))
class Half(nn.Module):
    "float16 in part: training casts it to float32."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6).half(), nn.Linear(6, 7)
    def forward(self, x): return self.b(self.a(x.to(self.a.weight.dtype)).to(self.b.weight.dtype))
def half(): return Half()
"""


@pytest.mark.parametrize("name", ["slices", "lazy", "half"])
def test_students_that_are_hard_to_save_are_saved_continued_and_evaluated(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "students.py").write_text(STUDENTS)
    spec, test = f"{tmp_path / 'students.py'}:{name}", Points(40, seed=5)
    options: dict[str, Any] = {
        "data": Points(40),
        "eval_data": test,
        "max_steps": 6,
        "save_every": 1,
        **PLAIN,
    }
    whole = train_student(student=spec, out=tmp_path / "whole", **options)
    train(spec, tmp_path / "run", stop=4, **options)
    again = train_student(student=spec, out=tmp_path / "run", **options)
    assert again.continued_from == 4 and again.evaluation == whole.evaluation
    for run in ("whole", "run"):
        found = evaluate(tmp_path / run / "last", test, student_code=spec, batch_size=8)
        assert {key: found[key] for key in whole.evaluation} == whole.evaluation
    # a finished run, given back to an object without shapes
    if name == "lazy":
        made: dict[str, Any] = {}
        exec(STUDENTS, made)
        train_student(
            student=made["lazy"](), out=tmp_path / "object", **{**options, "max_steps": 2}
        )
        train_student(
            student=(back := made["lazy"]()), out=tmp_path / "object", **{**options, "max_steps": 2}
        )
        assert evaluate(back, test)["loss"] < 10


# ---- the run's file system
# ----------------------------------------------------------------------------------------


def failing(original: Callable[..., Any], code: int, folders: bool) -> Callable[..., Any]:
    """A call of `os` as some file systems answer it: for folders, or for everything."""

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        if not folders or os.path.isdir(
            f"/proc/self/fd/{target}" if isinstance(target, int) else target
        ):
            raise OSError(code, os.strerror(code))
        return original(target, *args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("name", "folders", "codes"),
    [
        ("fsync", True, (errno.EINVAL, errno.ENOTSUP)),
        ("chmod", False, (errno.EPERM, errno.ENOTSUP)),
    ],
)
def test_what_a_file_system_lacks_and_nothing_needs_is_forgiven(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    folders: bool,
    codes: tuple[int, ...],
) -> None:
    for code in codes:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(getattr(os, name), code, folders))
            assert train(Net(8), tmp_path / str(code), save_every=1) == [1, 2, 3, 4]
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(getattr(os, name), errno.EIO, folders))
        with pytest.raises((KDCacheError, OSError), match="Input/output error"):
            train(Net(8), tmp_path / "broken")


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EPERM, errno.EXDEV])
def test_a_file_system_that_renames_no_folder_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(os, "rename", failing(os.rename, code, True))
    with pytest.raises(
        KDCacheError, match=r"does not rename a folder .* give an --out on another file system"
    ):
        train_student(
            student=Net(8),
            out=tmp_path / "run",
            data=Points(32),
            max_steps=4,
            **PLAIN,
            on_step=lambda info: steps.append(info.step),
        )
    assert steps == []


# ---- the folder while it trains
# -----------------------------------------------------------------------------------


def emptied(run: Path) -> None:
    for path in run.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def replaced(run: Path) -> None:
    run.rename(run.with_name("moved"))
    shutil.copytree(run.with_name("moved"), run)


def made_a_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("x")


def linked(run: Path) -> None:
    run.rename(run.with_name("moved"))
    (run.with_name("other")).mkdir()
    run.symlink_to(run.with_name("other"))


CHANGES: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "moved": lambda run: run.rename(run.with_name("moved")),
    "emptied": emptied,
    "replaced": replaced,
    "made a file": made_a_file,
    "another linked": linked,
    "run.toml removed": lambda run: (run / "run.toml").unlink(),
    "lock removed": lambda run: (run / ".lock").unlink(),
    "metrics removed": lambda run: (run / "metrics.jsonl").unlink(),
    "metrics replaced": lambda run: store.Directory(run).replace("metrics.jsonl", b""),
}


@pytest.mark.parametrize("when", [2, 3, 4])
@pytest.mark.parametrize("how", CHANGES)
def test_a_folder_that_goes_away_ends_the_run(tmp_path: Path, how: str, when: int) -> None:
    """After step 2 of 4, at the last save and, in the last case, between that and the summary."""
    run = tmp_path / "run"

    def on_step(info: StepInfo) -> None:
        if info.step == when:
            CHANGES[how](run)

    def on_metrics(line: dict[str, Any]) -> None: ...

    if when == 4 and how.startswith("metrics"):
        return  # all its lines are on disk by then
    with pytest.raises(KDCacheError, match=r"was moved, (emptied|deleted) or replaced") as caught:
        train_student(
            student=Net(8),
            out=run,
            data=Points(32),
            max_steps=4,
            save_every=1,
            eval_data=Points(9),
            **PLAIN,
            on_step=on_step,
            on_metrics=on_metrics,
        )
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert not (run / "summary.json").exists() and not (tmp_path / "other" / "last").exists()
    if how == "moved":  # and nothing new stands under the old name
        assert not run.exists()
        assert train(Net(8), tmp_path / "moved", eval_data=Points(9), save_every=1)[-1:] == (
            [4] if when < 4 else []
        )


def test_a_file_is_known_where_inodes_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of some FUSE file systems: what is written to the open file is then read under its name."""
    for module in (run_folder, metrics):
        monkeypatch.setattr(module, "samestat", lambda a, b: False)
    assert train(Net(8), tmp_path / "run", save_every=1) == [1, 2, 3, 4]
    with pytest.raises(KDCacheError, match=r"its \.lock is another file"):
        train_student(
            student=Net(8),
            out=tmp_path / "copied",
            data=Points(32),
            max_steps=4,
            save_every=1,
            **PLAIN,
            on_step=lambda info: replaced(tmp_path / "copied") if info.step == 2 else None,
        )


def test_a_folder_that_goes_away_while_it_is_saved_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save

    def save(folder: Path, *args: Any, **kwargs: Any) -> None:
        if folder.name == "last":
            (tmp_path / "run").rename(tmp_path / "moved")
        real(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(
        KDCacheError, match=r"is no longer the folder that this run began in: its \.lock is gone"
    ):
        train(Net(8), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "moved" / "last").exists()


def test_best_is_what_best_says_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """best/ of step 3 is saved, last/ is of step 2: whoever continues otherwise must not call
    another one best.
    """
    options: dict[str, Any] = {"eval_data": Points(40, seed=5), "save_every": 2, "max_steps": 8}
    accuracies = iter([0.1, 0.2, 0.5, 0.3, 0.3])  # of steps 1 to 3, and of step 8 twice
    monkeypatch.setattr(
        trainer,
        "evaluate_module",
        lambda *_, **more: {
            "loss": 1.0,
            "accuracy": 0.0 if more["first"] else next(accuracies),
            "n": 40,
        },
    )
    real = checkpoint.save

    def save(folder: Path, model: Model, tensors: Any, values: Any, **more: Any) -> None:
        real(folder, model, tensors, values, **more)
        if folder.name == "best" and values["step"] == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        train(Net(8), tmp_path / "run", stop=8, eval_every=1, **options)
    assert [checkpoint.step_of(tmp_path / "run" / name) for name in ("last", "best")] == [2, 3]
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    train(Net(8), tmp_path / "run", eval_every=100, **options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    held = json.loads((tmp_path / "run" / "best" / "state.json").read_text())
    assert summary["best"] == held["best"] and summary["best"]["step"] == held["step"]
    assert summary["last"]["step"] == 8 and summary["best_by"] == "eval_accuracy"
    assert [summary["best"][key] for key in ("step", "eval_accuracy")] == [3, 0.5]
    assert summary["last"]["eval_accuracy"] == 0.3
    shutil.rmtree(tmp_path / "damaged" / "best")  # gone: another is the best from here on
    train(Net(8), tmp_path / "damaged", eval_every=100, **options)
    assert checkpoint.step_of(tmp_path / "damaged" / "best") == 8


def test_a_checkpoint_is_whole_for_whoever_reads_it_while_it_is_saved(tmp_path: Path) -> None:
    folder, module, stop = tmp_path / "last", Net(8), threading.Event()
    checkpoint.save(
        folder, Model(module, "", "", None, "", None), {"x": torch.zeros(1)}, {"step": 0}
    )
    failed: list[BaseException] = []

    def saving() -> None:
        other, step = Net(8), 0
        try:
            while not stop.is_set():
                step += 1
                with torch.no_grad():
                    for parameter in other.parameters():
                        parameter.fill_(step)
                checkpoint.save(
                    folder,
                    Model(other, "", "", None, "", None),
                    {"x": torch.full((1,), float(step))},
                    {"step": step},
                )
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=saving)
    thread.start()
    steps = set()
    try:
        while len(steps) < 8:
            tensors, values = checkpoint.load(folder, module)
            steps.add(values["step"])
            if values["step"]:  # three files of one save
                assert tensors["x"].item() == values["step"] == module.head.bias[0].item()
            assert checkpoint.look(folder) is not None and checkpoint.step_of(folder) is not None
            assert checkpoint.beside_saves(folder, lambda found: (found / "state.json").exists())
    finally:
        stop.set()
        thread.join()
    assert failed == []


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_a_swap_between_two_files_of_a_checkpoint_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool, times: int
) -> None:
    """Before state.json is read, and between it and the weights."""
    folder, swaps, real = tmp_path / "last", iter(range(1, times + 1)), checkpoint.read_plain

    def save(step: int) -> None:
        module = Net(8)
        nn.init.constant_(module.head.bias, step)
        checkpoint.save(
            folder, Model(module, "", "", None, "", None), {"x": torch.zeros(1)}, {"step": step}
        )

    def read_plain(*args: Any, **kwargs: Any) -> Any:
        before = None if after else next(swaps, None)
        if before is not None:
            save(before)
        data = real(*args, **kwargs)
        if after and (step := next(swaps, None)) is not None:
            save(step)
        return data

    save(0)
    monkeypatch.setattr(checkpoint, "read_plain", read_plain)
    _, values = checkpoint.load(folder, module := Net(8))
    assert values["step"] == times == module.head.bias[0].item()


def test_a_damaged_checkpoint_is_never_to_be_deleted(tmp_path: Path) -> None:
    train(Net(8), tmp_path / "run")
    path = tmp_path / "run" / "last" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheCorrupt) as caught:
        train(Net(8), tmp_path / "run")
    assert "delete" not in str(caught.value) and "move" in str(caught.value)
