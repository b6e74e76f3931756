"""Both stages on real data that needs no download: scikit-learn's 1,797 handwritten digits, 8 x 8
pixels.

A convolutional teacher is trained, dumped once, and students of three sizes are trained from that
one cache and, for comparison, from the hard labels alone: the same path, batches and steps, several
seeds each. Whatever comes out is reported. The models are SPECs for the command line too:
`kdcache.demo:convnet`, `kdcache.demo:mlp`.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import CacheCorrupt, UsageError
from kdcache.process.signals import Interrupted, Signals
from kdcache.user.paths import local_path

if TYPE_CHECKING:
    from torch import nn

SIZE, CLASSES = 8, 10
TEMPERATURE, ALPHA = 2.0, 0.9
TEACHER: dict[str, Any] = {
    "student": "kdcache.demo:convnet",
    "student_args": {"width": 32},
    "epochs": 30,
    "lr": 3e-3,
}
NEVER = 10**6  # steps: the last weights alone are evaluated and kept
TRAINING: dict[str, Any] = {
    "batch_size": 64,
    "optimizer": "adamw",
    "weight_decay": 1e-2,
    "warmup": 0.05,
    "device": "cpu",
    "save_every": NEVER,
}
TRAIN_DATA: dict[str, Any] = {"data": "digits", "data_args": {"split": "train"}}
EVAL_DATA: dict[str, Any] = {
    "eval_data": "digits",
    "eval_data_args": {"split": "test"},
    "eval_every": NEVER,
}
MODES: dict[str, dict[str, Any]] = {
    "hard": {"alpha": 0.0},
    "distilled": {"alpha": ALPHA, "temperature": TEMPERATURE},
}
ROUNDS, EPOCHS = 5, 4  # of the timing
RESULT = "demo.json"


@dataclass(frozen=True, slots=True)
class Student:
    """One size of student, and how long it is trained."""

    name: str
    spec: str
    args: dict[str, int]
    epochs: int
    lr: float


STUDENTS = (
    Student("mlp-16", "kdcache.demo:mlp", {"hidden": 16}, 100, 1e-2),
    Student("conv-4", "kdcache.demo:convnet", {"width": 4}, 60, 1e-2),
    Student("conv-8", "kdcache.demo:convnet", {"width": 8}, 30, 1e-2),
)


def convnet(width: int = 8) -> nn.Module:
    """Convolutions of `width`, 2 width and 2 width channels, mean pooling, a linear head: (B, 1, 8,
    8) -> (B, 10).
    """
    from torch import nn

    def block(channels: int, out: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )

    return nn.Sequential(
        block(1, width, 1),
        block(width, 2 * width, 2),
        block(2 * width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


def mlp(hidden: int = 16) -> nn.Module:
    """One hidden layer: (B, 1, 8, 8) -> (B, 10)."""
    from torch import nn

    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIZE * SIZE, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


def demo(
    out: str | Path = "demo-out",
    seeds: int = 5,
    *,
    shorten: int = 1,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and dump a teacher, train every student with and without it, write OUT/demo.json and
    OUT/demo.png.

    seeds: students of each kind. shorten: divides the epochs (for tests; the accuracies then mean
    little). The same call again goes on with an interrupted demo, runs that are finished are not
    run again; a finished demo says so, and its plot is drawn anew. Returns what demo.json holds.
    Raises UsageError without scikit-learn or matplotlib, Interrupted on SIGINT or SIGTERM.
    """
    from kdcache.cache.store import Directory

    _require("sklearn", "matplotlib")
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}; expected at least 1")
    tell, start, folder = say or (lambda text: None), time.perf_counter(), local_path(out, "--out")
    continued = (folder / "teacher").exists()
    result = _finished(folder, seeds, shorten)
    if result is not None:
        tell(f"{folder} is finished already: this is its table; name another --out to run it again")
    else:
        message = f"the demo in {folder} is not finished; give the same command again to go on"
        try:
            with _one_thread(), Signals(message):
                result = {**_demo(folder, seeds, shorten, tell), "shorten": shorten}
        except Interrupted as e:  # that of a run says where the run is
            raise Interrupted(message, e.signum) from e
        result |= {"seconds": round(time.perf_counter() - start, 1), "continued": continued}
        Directory(folder).replace(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    _plot(result, folder / "demo.png")
    return {**result, "plot": str(folder / "demo.png")}


def _finished(folder: Path, seeds: int, shorten: int) -> dict[str, Any] | None:
    """What a finished demo of so many seeds found."""
    try:
        result = dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise CacheCorrupt(
            f"{folder / RESULT}: not readable as JSON ({e}); delete it, and the same command makes "
            "it again from the runs"
        ) from e
    return result if (result.get("seeds"), result.get("shorten")) == (seeds, shorten) else None


def _demo(folder: Path, seeds: int, shorten: int, tell: Callable[[str], None]) -> dict[str, Any]:
    from kdcache.teacher.dump import dump_teacher

    tell("1/4 training the teacher, a convnet of width 32, on 1,437 digits")
    teacher_accuracy = _train(
        out=folder / "teacher",
        alpha=0.0,
        **{**TEACHER, "epochs": max(1, TEACHER["epochs"] // shorten)},
    )
    tell("2/4 running it once over the data: dump-teacher")
    cache = folder / "cache"
    dumped = dump_teacher(
        teacher=TEACHER["student"],
        teacher_args=TEACHER["student_args"],
        **TRAIN_DATA,
        teacher_weights=folder / "teacher" / "best" / "model.safetensors",
        out=cache,
    )
    tell(
        f"3/4 training {len(STUDENTS)} sizes x {len(MODES)} ways x {seeds} seeds from that one "
        "cache"
    )
    students = _students(folder, seeds, shorten, tell)
    tell("4/4 timing an epoch without teacher, with the cache and with the live teacher, in turns")
    return {
        "teacher_accuracy": teacher_accuracy,
        "records": dumped.num_records,
        "cache_bytes": sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()),
        "seeds": seeds,
        "students": students,
        "epoch_seconds": epoch_seconds(folder),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """On models this small a second thread costs more than it gives, most of all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def epoch_seconds(folder: Path) -> dict[str, float]:
    """Median seconds of an epoch of the conv-4 student without a teacher, from the cache, and with
    the live teacher.

    In turns in one run; set-up is not counted; evaluation and checkpoints are outside the epoch
    that is timed.
    """
    from kdcache.models.model import load_model

    live = load_model(
        str(TEACHER["student"]),
        args=TEACHER["student_args"],
        weights=folder / "teacher" / "best" / "model.safetensors",
    ).module
    contenders: dict[str, dict[str, Any]] = {
        "no teacher": {"alpha": 0.0},
        "cached": MODES["distilled"],
        "live teacher": {**MODES["distilled"], "live_teacher": live},
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, options in contenders.items():
            seconds[name].append(_one_epoch(folder / "cache", options))
    return {name: statistics.median(values) for name, values in seconds.items()}


def render(result: dict[str, Any]) -> str:
    """The table of a demo, for people."""
    rows = [f"{'student':<10}{'trained on':<12}{'accuracy':>9}{'± std':>8}   accuracy of each seed"]
    for s in result["students"]:
        each = " ".join(f"{100 * a:.1f}" for a in s["accuracies"])
        rows.append(
            f"{s['student']:<10}{s['mode']:<12}{100 * s['mean']:>8.2f}%{100 * s['std']:>8.2f}   "
            f"{each}"
        )
    epoch = result["epoch_seconds"]
    cached, size = epoch["cached"], result["cache_bytes"]
    times = " · ".join(f"{name} {1000 * s:.0f} ms ({s / cached:.2f}x)" for name, s in epoch.items())
    return "\n".join(
        [
            *rows,
            "",
            f"teacher    {100 * result['teacher_accuracy']:.2f}% on 360 digits that no model was "
            "trained on",
            f"cache      {size:,} bytes, {size / result['records']:.0f} a record",
            f"epoch      {times}",
            f"plot       {result['plot']}",
            f"{'the rest ' if result['continued'] else 'all of it'}  {result['seconds']:.0f} s",
        ]
    )


def _students(
    folder: Path, seeds: int, shorten: int, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every student of every seed: one process a core, one thread each, all reading the same cache."""
    out = []
    with (
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _worker) as pool,
        _all_or_nothing(pool),
    ):

        def start(student: Student, mode: str, seed: int) -> Future[float]:
            return pool.submit(
                _train,
                cache=folder / "cache",
                out=folder / "runs" / f"{student.name}-{mode}-{seed}",
                seed=seed,
                student=student.spec,
                student_args=student.args,
                lr=student.lr,
                epochs=max(1, student.epochs // shorten),
                **MODES[mode],
            )

        runs = [
            (student, mode, [start(student, mode, seed) for seed in range(seeds)])
            for student in STUDENTS
            for mode in MODES
        ]
        for student, mode, trained in runs:
            accuracies = [run.result() for run in trained]
            mean, std = (
                statistics.mean(accuracies),
                statistics.stdev(accuracies) if seeds > 1 else 0.0,
            )
            tell(f"    {student.name:<7} {mode:<10} {100 * mean:6.2f} % ± {100 * std:.2f}")
            out.append(
                {
                    "student": student.name,
                    "mode": mode,
                    "mean": mean,
                    "std": std,
                    "accuracies": accuracies,
                }
            )
    return out


@contextmanager
def _all_or_nothing(pool: ProcessPoolExecutor) -> Iterator[None]:
    """After an error nothing new is begun; the `with` block of the pool waits for what is at work."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _worker() -> None:
    """One thread; Ctrl-C reaches every process, and between two runs only the first is to answer
    it.
    """
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train(**options: Any) -> float:
    """Train on the digits; the test accuracy of the last weights."""
    from kdcache.student.train import train_student

    report = train_student(**{**TRAINING, **TRAIN_DATA, **EVAL_DATA, **options})
    return float(report.evaluation["accuracy"])


def _one_epoch(cache: Path, options: dict[str, Any]) -> float:
    """Mean seconds of an epoch; the first of several is not timed, it warms up."""
    from kdcache.student.train import train_student

    ends: list[float] = []
    conv = STUDENTS[1]
    with tempfile.TemporaryDirectory() as scratch:
        train_student(
            cache=cache,
            student=conv.spec,
            student_args=conv.args,
            out=Path(scratch) / "run",
            **TRAIN_DATA,
            **TRAINING,
            epochs=EPOCHS,
            on_step=lambda *_: ends.append(time.perf_counter()),
            **options,
        )
    warm = len(ends) // EPOCHS
    return (ends[-1] - ends[warm - 1]) / (len(ends) - warm) * len(ends) / EPOCHS


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), width_ratios=[2, 1], layout="constrained"
    )
    colors = {"hard": "#9aa5b1", "distilled": "#2f6f9f"}
    names = [s.name for s in STUDENTS]
    for s in result["students"]:
        at = names.index(s["student"]) + (-0.2 if s["mode"] == "hard" else 0.2)
        label = {"hard": "hard labels", "distilled": "from the cache"}[s["mode"]]
        left.bar(
            at,
            100 * s["mean"],
            0.36,
            yerr=100 * s["std"],
            color=colors[s["mode"]],
            capsize=3,
            label=label if s["student"] == names[0] else None,
        )
        left.plot(
            [at] * len(s["accuracies"]),
            [100 * a for a in s["accuracies"]],
            ".",
            color="black",
            markersize=4,
        )
    left.axhline(
        100 * result["teacher_accuracy"],
        color="#b5523b",
        linestyle="--",
        linewidth=1,
        label="teacher",
    )
    low = min(100 * a for s in result["students"] for a in s["accuracies"])
    left.set(
        xticks=range(len(names)),
        xticklabels=names,
        ylabel="test accuracy, %",
        ylim=(max(0.0, low - 2), 100),
        title=f"digits: mean, std and each of {result['seeds']} seeds",
    )
    left.legend(loc="upper left", frameon=False)
    epoch = result["epoch_seconds"]
    right.bar(
        list(epoch),
        [1000 * s for s in epoch.values()],
        0.6,
        color=["#9aa5b1", "#2f6f9f", "#b5523b"],
    )
    right.set(ylabel="ms", title="an epoch of conv-4")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _require(*modules: str) -> None:
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {' and '.join(missing)}: pip install 'kdcache[demo]'")
