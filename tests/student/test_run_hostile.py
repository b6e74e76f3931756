"""A run's folder from somebody else: each file of it damaged or made to harm, and every command
that reads it.

Whatever stands there, a command succeeds or ends in one line that is ours; nothing waits, is run,
or writes elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tomli_w
from cli_world import run as cli
from student_world import Net, Points

from kdcache import report
from kdcache.cache.canonical import digest
from kdcache.errors import CacheCorrupt, KDCacheError, SpecMismatch, UsageError
from kdcache.models import runs
from kdcache.process.signals import Interrupted
from kdcache.student import checkpoint, metrics
from kdcache.student.evaluate import evaluate
from kdcache.student.train import train_student
from kdcache.student.trainer import StepInfo

MODELS = "import sys\nsys.path.insert(0, {tests!r})\nfrom student_world import Net as net\n"
DEEP = b"[" * 100_000 + b"]" * 100_000
GIVEN: dict[str, Any] = {"alpha": 0.0, "batch_size": 8, "max_steps": 2}
READ_BY = {
    "last": ("evaluate last", "train"),
    "best": ("evaluate", "train"),
    "summary.json": ("report", "train"),
    "metrics.jsonl": ("train",),
    ".lock": ("train",),
    "run.toml": ("report", "evaluate", "train"),
}
STATE = "last/state.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a student by SPEC."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "models.py").write_text(MODELS.format(tests=str(Path(__file__).parents[1] / "tools")))
    train(place / "run")
    return place / "run"


def train(run: Path) -> object:
    return train_student(
        student=f"{run.parent / 'models.py'}:net",
        student_args={"hidden": 6},
        out=run,
        data=Points(32),
        eval_data=Points(9, seed=5),
        **GIVEN,
    )


def readers(case: str) -> tuple[str, ...]:
    """The commands that read the file whose name a case begins with."""
    return next(names for file, names in READ_BY.items() if case.startswith(file))


def commands(run: Path) -> dict[str, Callable[[], object]]:
    code = f"{run.parent / 'models.py'}:net"
    """The commands, by name, and what each is in Python."""
    return {
        "report": lambda: report.render(report.report([run])),
        "evaluate": lambda: evaluate(run, Points(9, seed=5), student_code=code),
        "evaluate last": lambda: evaluate(run / "last", Points(9, seed=5), student_code=code),
        "train": lambda: train(run),
    }


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Nothing takes a minute: a pipe or a socket that is opened as a file would wait for ever."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise AssertionError("still waiting")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def unfinished(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: ((run / "summary.json").unlink(), change(run))


def put(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(data)


def resealed(name: str = STATE, **changes: Any) -> Callable[[Path], object]:
    """A state.json whose digest is right and whose values are not."""

    def change(run: Path) -> None:
        values = json.loads((run / name).read_text())
        del values["xxh3_128"]
        for key, value in changes.items():
            values[key] = value(values[key]) if callable(value) else value
        text = json.dumps(values)
        (run / name).write_text(json.dumps({**values, "xxh3_128": digest(text.encode())}))

    return unfinished(change)


def toml(table: str, **changes: Any) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        document = runs.read_options(run)
        document[table] |= {key.replace("_", "-"): value for key, value in changes.items()}
        (run / "run.toml").write_text(tomli_w.dumps(document))

    return change


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Another kind of file under this name; make it unfinished where the summary is not what is
    meant.
    """

    def change(run: Path) -> None:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        make(path)

    return change if name in ("run.toml", "summary.json") else unfinished(change)


def a_socket(path: Path) -> None:
    here = os.getcwd()  # the address of a socket has 108 bytes
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


NO_TEXT = (
    b"",
    b"\xff\xfe",
    b"null",
    b"5",
    b"[1]",
    b'"abc"',
    b'[["a", 1]]',
    DEEP,
    b'{"a": 1, "a": 2}',
    b'{"step": ' + b"9" * 400 + b"}",
    b'{"eval_loss": ' + b"9" * 5000 + b"}",
)
CASES: dict[str, Callable[[Path], object]] = {
    **{f"last {i}": unfinished(put(STATE, data)) for i, data in enumerate(NO_TEXT)},
    **{f"best {i}": put("best/state.json", data) for i, data in enumerate(NO_TEXT[::3])},
    **{f"summary.json {i}": put("summary.json", data) for i, data in enumerate(NO_TEXT)},
    **{
        f"metrics.jsonl {i}": unfinished(put("metrics.jsonl", data + b"\n"))
        for i, data in enumerate(NO_TEXT)
    },
    **{f"run.toml {i}": put("run.toml", data) for i, data in enumerate(NO_TEXT[:5])},
    "run.toml deep": put("run.toml", b"[train-student]\nx = " + DEEP),
    "run.toml dots": put(
        "run.toml", b"[recorded]\n[train-student]\n" + b"a." * 30_000 + b"b = 1\n"
    ),
    "run.toml deep by parts": put(
        "run.toml",
        b"[recorded]\n[train-student]\nx = "
        + (b"{" + b"a." * 60 + b"b = ") * 60
        + b"1"
        + b"}" * 60,
    ),
    "last large": unfinished(lambda run: os.truncate(run / STATE, 2**33)),
    "summary.json large": lambda run: os.truncate(run / "summary.json", 2**33),
    "metrics.jsonl of one line": unfinished(lambda run: os.truncate(run / "metrics.jsonl", 2**24)),
    **{
        f"last {key} {value!r:.20}": resealed(**{key: value})
        for key, values in {
            "step": ("x", -5, float("nan"), 10**30, None, 3, True),
            "position": (3, 32.5, 10**400),
            "best": ([1], {"step": 2, "eval_loss": "x"}, {"step": 2}),
            "evaluation": ([], {"loss": "x"}),
            "training": (5, None),
            "seconds": ("x", float("inf"), -1),
            "scaler": ({"a": 1}, 5),
            "generators": (
                {},
                {"numpy": ["x", 1, 2], "python": [3, [1], None]},
                {"numpy": [1, 2, 3.0], "python": [3, [-1], None]},
            ),
            "files": ([1], {}, {"model.safetensors": [1]}),
        }.items()
        for value in values
    },
    "best of no metric": resealed("best/state.json", best={"step": 2}),
    **{
        f"last files {name!r:.20}": resealed(
            files=lambda files, name=name: {**files, name: "0" * 32}
        )
        for name in (
            "../../../../etc/passwd",
            "/etc/passwd",
            "a\0b.safetensors",
            "a" * 5000,
            "\x1b[31m.safetensors",
            "../run.safetensors",
        )
    },
    **{
        f"run.toml option {key} {value!r:.20}": toml("train-student", **{key: value})
        for key, values in {
            "student": (5, [1], "os:system", "hf:/etc", "\x1b]0;x\x07"),
            "student_arg": ([1], 5, ["no equals"], ["a=[1"]),
            "seed": ("x", [1]),
            "lr": (float("nan"), "x"),
            "precision": (5, "x"),
            "best_by": (5,),
            "optimizer": ("\x1b[31m\x1b]0;x\x07", [1], {"a": 1}),
            "engine": ([1],),
            "divergence": ([1],),
            "match": ([[1]],),
        }.items()
        for value in values
    },
    **{
        f"run.toml recorded {key} {value!r:.20}": toml("recorded", **{key: value})
        for key, values in {
            "num_classes": ("x", -5, 2**40, True),
            "data": (5, {"probe": [1], "name": 2}),
            "changes": (5, [5]),
            "tokenizer": (5,),
            "cache_content_id": (5,),
            "versions": (5,),
        }.items()
        for value in values
    },
    "summary.json types": lambda run: (run / "summary.json").write_text(
        json.dumps(
            {
                **json.loads((run / "summary.json").read_text()),
                "steps": "x",
                "accepted": 5,
                "defaults": None,
            }
        )
    ),
    **{
        f"{name} {kind}": instead(name, make)
        for kind, make in {
            "a folder": os.mkdir,
            "a pipe": os.mkfifo,
            "a socket": a_socket,
            "a loop": lambda path: path.symlink_to(path),
            "a link to nothing": lambda path: path.symlink_to("nowhere/at/all"),
            "an endless device": lambda path: path.symlink_to("/dev/zero"),
        }.items()
        for name in (
            "run.toml",
            "summary.json",
            "metrics.jsonl",
            ".lock",
            "last",
            "last/state.json",
            "last/model.safetensors",
            "last/state.safetensors",
        )
    },
    "last is a file": instead("last", lambda path: path.write_text("x")),
    "last has no tensors": unfinished(put("last/model.safetensors", b"x" * 100)),
    "best with auto_map": put(
        "best/config.json", b'{"model_type": "x", "auto_map": {"AutoConfig": "evil.E"}}'
    ),
}


def test_no_file_of_a_run_is_a_traceback_a_wait_or_a_way_out(whole: Path, no_waiting: None) -> None:
    bad, refusals = [], 0
    for name, change in CASES.items():
        run = whole.parent / "forged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        change(run)
        outside = {path for path in whole.parent.rglob("*") if run not in path.parents}
        for command in readers(name):
            try:
                commands(run)[command]()
            except KDCacheError as e:
                refusals += 1
                if "\x1b" in str(e) or len(str(e)) > 4000 or "root:" in str(e):
                    bad.append((name, command, str(e)[:300]))
            except BaseException as e:
                bad.append((name, command, f"{type(e).__name__}: {e}"[:300]))
        assert outside == {path for path in whole.parent.rglob("*") if run not in path.parents}, (
            name
        )
    assert bad == []
    assert refusals > len(CASES)  # most of them are refused by several commands


def test_text_of_a_run_reaches_no_terminal_as_it_is(whole: Path, tmp_path: Path) -> None:
    for seed, text in enumerate(("\x1b[31m", "\x9b2J\x07\u202e")):
        shutil.copytree(whole, tmp_path / str(seed))
        toml("train-student", optimizer=text, **{f"x{text}": text}, seed=seed)(tmp_path / str(seed))
    table = report.render(report.report([tmp_path / "0", tmp_path / "1"]))
    assert "\\x1b[31m" in table and all(c.isprintable() or c == "\n" for c in table)
    assert runs.printable("Größe 1\t") == "Größe 1\\t"


@pytest.mark.parametrize(
    "spec", ["os:system", "{place}/evil.py:make", "evil_module:make", "kdcache.demo:demo"]
)
def test_a_folder_runs_no_code(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, run := tmp_path / "run")
    for name in ("evil.py", "evil_module.py"):
        (tmp_path / name).write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(**args): pass\n"
        )
    spec = spec.format(place=tmp_path)
    toml(
        "train-student",
        student=spec,
        student_arg={"command": f"touch {tmp_path / 'ran'}", "out": "ran"},
    )(run)
    for student in (run, run / "best", run / "last", f"{run}/last/"):
        with pytest.raises(
            UsageError, match=rf"trained the student {spec}, .* add --student-code {spec}$"
        ):
            evaluate(student, Points(9))
    report.report([run])
    assert not (tmp_path / "ran").exists()


def test_code_is_named_where_it_is_needed_and_nowhere_else(whole: Path, tmp_path: Path) -> None:
    code = f"{whole.parent / 'models.py'}:net"
    shutil.copyfile(whole.parent / "models.py", tmp_path / "moved.py")
    found = evaluate(whole, Points(9), student_code=code)
    # as the caller says
    assert evaluate(whole, Points(9), student_code=f"{tmp_path / 'moved.py'}:net") == found
    for student, given, said in (
        (code, code, "the student is no run"),
        (whole, "hf:x", "expected file.py:name"),
        (whole, "timm:x", "expected file.py:name"),
        (whole, "net", "expected file.py:name"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate(student, Points(9), student_code=given)
    train_student(
        student="kdcache.demo:mlp",
        student_args={"hidden": 4},
        out=tmp_path / "own",
        data="digits",
        alpha=0.0,
        max_steps=1,
    )
    assert evaluate(tmp_path / "own", "digits")["step"] == 1
    with pytest.raises(UsageError, match="which needs none"):
        evaluate(tmp_path / "own", "digits", student_code="kdcache.demo:mlp")


@pytest.mark.parametrize(
    "args",
    [
        {"act": None},
        {"widths": [8, None, 8]},
        {"scale": float("inf")},
        {"scale": float("nan")},
        {"n": 2**70},
        {"table": {"a": [None, {"b": 1.0}]}},
        {"text": "null"},
        {"one": 1},
        {"one": 1.0},
        {"one": True},
        {"empty": []},
        {"empty": {}},
        {"lines": "a\r\nb\u2028\x00"},
    ],
)
def test_arguments_come_back_as_they_were_given(args: dict[str, Any]) -> None:
    document = {"train-student": {"student-arg": runs.arguments_for_toml(args)}}
    import tomllib

    found = runs.arguments_of(
        tomllib.loads(tomli_w.dumps(document))["train-student"]["student-arg"], "here"
    )
    assert repr(found) == repr(args)  # types too, and nan
    others = [{}, {"act": "None"}, {"one": 2}, {"one": "1"}]
    assert runs.same_arguments(found, args) and not any(
        runs.same_arguments(found, other) for other in others
    )


ACTIVE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, act="relu", scale=1):
        super().__init__()
        self.act, self.scale, self.a, self.b = act, scale, nn.Linear(5, 8), nn.Linear(8, 7)
    def forward(self, x):
        h = self.a(x) if self.act is None else getattr(torch, self.act)(self.a(x))
        return self.b(h) * (1 if self.scale is True else self.scale + 1)

def net(act="relu", scale=1): return Net(act, scale)
"""


@pytest.mark.parametrize(
    ("args", "others"),
    [
        ({"act": None}, ({}, {"act": "relu"})),
        ({"scale": 1}, ({"scale": True}, {"scale": 1.0})),
        ({"act": "sigmoid"}, ({"act": None},)),
    ],
)
def test_a_run_is_of_the_student_that_was_asked_for(
    tmp_path: Path, args: dict[str, Any], others: tuple[dict[str, Any], ...]
) -> None:
    (tmp_path / "models.py").write_text(ACTIVE)
    options: dict[str, Any] = {
        "student": f"{tmp_path / 'models.py'}:net",
        "out": tmp_path / "run",
        "alpha": 0.0,
        "data": Points(32),
        "eval_data": (test := Points(9, seed=5)),
        "batch_size": 8,
        "epochs": 9,
    }

    def stop(info: StepInfo) -> None:
        if info.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_student(student_args=args, on_step=stop, **options)
    for other in others:
        with pytest.raises(SpecMismatch, match=r"student-arg: the run has .*, given is"):
            train_student(student_args=other, **options)
    report = train_student(student_args=args, **options)
    assert report.continued_from == 5
    found = evaluate(tmp_path / "run" / "last", test, student_code=options["student"])
    assert {key: found[key] for key in report.evaluation} == report.evaluation
    assert evaluate(
        options["student"],
        test,
        student_args=others[0],
        student_weights=tmp_path / "run" / "last",
    ) != {key: found[key] for key in report.evaluation}


def test_the_run_toml_of_any_arguments_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        "from torch import nn\n\n\ndef net(act='x', n=0):\n    assert act is None\n    return "
        "nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    done = cli(
        "train-student",
        "--student",
        f"{tmp_path}/models.py:net",
        "--student-arg",
        "act=null",
        "--student-arg",
        f"n={2**70}",
        "--data",
        "digits",
        "--alpha",
        "0",
        "--max-steps",
        "1",
        "--out",
        tmp_path / "a",
    )
    assert done.exit_code == 0, done.stderr
    again = cli("train-student", "--config", tmp_path / "a" / "run.toml", "--out", tmp_path / "b")
    assert again.exit_code == 0, again.stderr
    a, b = (runs.read_options(tmp_path / name)["train-student"]["student-arg"] for name in "ab")
    assert a == b == {"act": None, "n": 2**70}


def test_arguments_that_no_file_gives_back_are_refused(tmp_path: Path) -> None:
    assert runs.plain_arguments({"a": (1, Path("x"))}, "--student-arg") == {"a": [1, "x"]}
    for value in (Net, {1: 2}, {2}, b"x", "\udcff", object()):
        with pytest.raises(
            UsageError, match=r"--student-arg act is .*, which run\.toml cannot keep"
        ):
            train_student(
                student="kdcache.demo:mlp",
                student_args={"act": value},
                out=tmp_path / "run",
                data="digits",
                alpha=0.0,
                max_steps=1,
            )
    assert not (tmp_path / "run").exists()


# ---- links
# --------------------------------------------------------------------------------------------------------


def test_links_of_a_run_have_nothing_outside_written(whole: Path, tmp_path: Path) -> None:
    """Of every name that a run writes: a link to a file, to a folder, and where a name of old was
    foreseeable.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis").write_text("years of work")
    (outside / "state.json").write_text("{}")
    names = (
        ".lock",
        "metrics.jsonl",
        "summary.json",
        "last",
        "last.new",
        "last.old",
        "best",
        "best.new",
        "best.old",
        ".trial",
        ".trial.new",
        "tensorboard",
        "run.toml.partial",
        "metrics.jsonl.partial",
        "summary.json.partial",
    )
    kept = {path: path.read_bytes() for path in outside.iterdir()}
    for name in names:
        for target in (outside / "thesis", outside, tmp_path / "absent"):
            run = whole.parent / "linked"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(whole, run)
            unfinished(lambda _: None)(run)
            shutil.rmtree(run / "last")  # every step is done again: everything is written
            if (run / name).is_dir():
                shutil.rmtree(run / name)
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(target)
            try:
                train_student(
                    student=f"{whole.parent / 'models.py'}:net",
                    student_args={"hidden": 6},
                    out=run,
                    data=Points(32),
                    eval_data=Points(9, seed=5),
                    **GIVEN,
                    report_to=["tensorboard"],
                )
            except KDCacheError as e:
                assert name in str(e)
            assert {path: path.read_bytes() for path in outside.iterdir()} == kept, name
            assert not (tmp_path / "absent").exists(), name
    os.link(outside / "thesis", tmp_path / "second")
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    for name in (".lock", "metrics.jsonl"):  # a second name of a file is a link, too
        unfinished(lambda _: None)(run) if (run / "summary.json").exists() else None
        (run / name).unlink()
        os.link(outside / "thesis", run / name)
        with (
            pytest.raises(KDCacheError, match="no plain file of its own")
            if name == ".lock"
            else _nothing()
        ):
            train(run)
        (run / ".lock").unlink(missing_ok=True)
    assert (outside / "thesis").read_text() == "years of work"


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_what_a_killed_writer_left_is_swept(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, run := whole.parent / "swept")
    unfinished(lambda _: None)(run)
    for name in (".tmp-0123", ".trial", ".trial.new", "last.new"):
        (run / name).mkdir() if name.startswith((".trial", "last")) else (run / name).write_text(
            "half"
        )
    train(run)
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "best",
        "last",
        "metrics.jsonl",
        "run.toml",
        "summary.json",
    ]


def test_metrics_keep_whole_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long = b'{"step": 1, "x": "' + b"y" * 2**20 + b'"}\n'
    path.write_bytes(
        b'{"step": 1}\n\xff\xfe\n'
        + DEEP
        + b"\n"
        + long
        + b'{"step": 1e999}\n{"step": true}\n{"step": 2}'
    )
    metrics.truncate(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n'
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CacheCorrupt, match="not a plain file"):
        metrics.truncate(path, 5)
    assert checkpoint.step_of(tmp_path / "none") is None
