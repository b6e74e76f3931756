"""The command line as a door: help, frozen options, exit codes, errors of one line, JSON alone on
standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from faults import forked

import kdcache
from kdcache import cli, errors

# Frozen: a new option is added here together with a test of what it does.
OPTIONS = {
    "dump-teacher": [
        "teacher",
        "teacher-arg",
        "teacher-weights",
        "data",
        "data-arg",
        "out",
        "kind",
        "k",
        "classes",
        "tier",
        "temperature",
        "values",
        "feature",
        "rows",
        "tokens",
        "labels",
        "moments",
        "views",
        "format",
        "shard-size",
        "records-per-shard",
        "batch-size",
        "dtype",
        "engine",
        "device",
        "workers",
        "seed",
        "accept",
        "dry-run",
        "config",
        "json",
    ],
    "train-student": [
        "cache",
        "student",
        "student-arg",
        "student-weights",
        "out",
        "data",
        "data-arg",
        "eval-data",
        "eval-data-arg",
        "rows",
        "temperature",
        "k",
        "classes",
        "alpha",
        "ce-weight",
        "kd-weight",
        "divergence",
        "beta",
        "tail",
        "match",
        "engine",
        "logits-memory",
        "epochs",
        "max-steps",
        "batch-size",
        "micro-batch-size",
        "optimizer",
        "lr",
        "weight-decay",
        "warmup",
        "clip",
        "precision",
        "compile",
        "device",
        "workers",
        "seed",
        "deterministic",
        "shuffle",
        "eval-every",
        "save-every",
        "best-by",
        "report-to",
        "accept",
        "dry-run",
        "config",
        "json",
    ],
    "inspect": ["record", "tokenizer", "data", "data-arg", "config", "json"],
    "verify": [
        "quick",
        "teacher",
        "teacher-arg",
        "teacher-weights",
        "data",
        "data-arg",
        "samples",
        "dtype",
        "device",
        "config",
        "json",
    ],
    "convert": ["format", "config", "json"],
    "evaluate": [
        "student",
        "student-arg",
        "student-weights",
        "data",
        "data-arg",
        "classes",
        "batch-size",
        "student-code",
        "precision",
        "rows",
        "accept",
        "device",
        "workers",
        "config",
        "json",
    ],
    "report": ["by", "sort", "plot", "config", "json"],
    "demo": ["out", "seeds", "config", "json"],
    "env": ["config", "json"],
    "bench shard-io": ["quick", "rounds", "results", "json", "folder"],
    "bench end-to-end": ["quick", "rounds", "results", "json", "device"],
    "bench loss": ["quick", "rounds", "results", "json", "device", "plot"],
    "bench kd-linear": ["quick", "rounds", "results", "json", "device"],
    "bench topk-lse": ["quick", "rounds", "results", "json", "device"],
}
REPEATABLE = {
    "teacher-arg",
    "student-arg",
    "data-arg",
    "eval-data-arg",
    "tier",
    "feature",
    "accept",
    "match",
    "by",
}


def run(*args: Any) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in args])


def commands() -> dict[str, click.Command]:
    """Every command by the words that call it."""
    found: dict[str, click.Command] = {}
    for name, command in cli.main.commands.items():
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": c for inner, c in command.commands.items()}
        else:
            found[name] = command
    return found


def options(command: click.Command) -> dict[str, click.Option]:
    return {p.opts[0].removeprefix("--"): p for p in command.params if isinstance(p, click.Option)}


def test_the_commands_are_frozen() -> None:
    assert sorted(commands()) == sorted(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_are_frozen(name: str) -> None:
    assert list(options(commands()[name])) == OPTIONS[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_repeatable_options_are_the_known_ones(name: str) -> None:
    repeatable = {flag for flag, option in options(commands()[name]).items() if option.multiple}
    more = {"dump-teacher": {"temperature"}, "train-student": {"cache", "report-to"}}.get(
        name, set()
    )
    assert repeatable == set(OPTIONS[name]) & (REPEATABLE | more)


@pytest.mark.parametrize("name", OPTIONS)
def test_help(name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    for flag in OPTIONS[name]:
        assert f"--{flag}" in result.stdout


def test_every_command_refuses_an_option_given_twice() -> None:
    from kdcache.console import Once

    assert all(isinstance(command, Once) for command in commands().values())


def test_version() -> None:
    assert run("--version").stdout == f"kdcache, version {kdcache.__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["dump-teecher"], "No such command 'dump-teecher'"),
        (["dump-teacher", "--data", "digits", "--out", "x"], "Missing option '--teacher'"),
        (["dump-teacher", "--teacher", "t", "--data", "digits", "--out", "x", "--k", "0"], "--k"),
        (
            [
                "dump-teacher",
                "--teacher",
                "t",
                "--data",
                "digits",
                "--out",
                "x",
                "--shard-size",
                "64 miles",
            ],
            "64 miles",
        ),
        (["train-student", "--student", "s", "--out", "x", "--alpha", "1.5"], "--alpha"),
        (["inspect"], "Missing argument 'CACHE'"),
        (["report"], "Missing argument"),
        (["estimate", "--teacher", "x"], "No such command 'estimate'"),
        (
            ["train-student", "--student", "s", "--out", "x", "--lr", "1", "--lr", "2"],
            "--lr is given 2 times",
        ),
        (
            ["train-student", "--student", "s", "--out", "x", "--shuffle", "--no-shuffle"],
            "--shuffle/--no-shuffle is given",
        ),
        (
            ["dump-teacher", "--teacher", "t", "--data", "a", "--data", "b", "--out", "x"],
            "--data is given 2 times",
        ),
        (["bench", "loss", "--rounds", "1", "--rounds", "2"], "--rounds is given 2 times"),
        (["verify", "c", "--samples", "3"], "--samples is about asking the teacher again"),
        (["verify", "c", "--data-arg", "a=3"], "--data-arg is about asking the teacher again"),
        (["bench", "loss", "--quick", "--device", "tpu"], "device"),
    ],
)
def test_wrong_use_ends_in_exit_code_2(args: list[str], said: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.KDCacheError("say it"), 1),
        (errors.CacheCorrupt("say it"), 1),
        (errors.DataError("say it"), 1),
        (errors.UsageError("say it"), 2),
        (errors.NotBuilt("say it"), 2),
        (OSError(28, "say it", "file"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("kdcache.env.env", fail)
    result = run("env")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("Error: ")
    assert "say it" in result.stderr or code == 130


def test_an_error_carries_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    error = errors.KDCacheError("terminated")
    error.exit_code = 143
    monkeypatch.setattr("kdcache.env.env", lambda: (_ for _ in ()).throw(error))
    assert run("env").exit_code == 143


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.env.env", lambda: 1 / 0)
    assert isinstance(run("env").exception, ZeroDivisionError)


def test_what_is_printed_on_the_way_stays_off_standard_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kdcache import report

    def noisy(runs: tuple[Path, ...]) -> dict[str, Any]:
        print("a print in user code")
        return {"worst": float("nan"), "path": tmp_path, "rows": [1, (2, 3)]}

    monkeypatch.setattr(report, "report", noisy)
    result = run("report", tmp_path, "--json")
    assert json.loads(result.stdout) == {"worst": None, "path": str(tmp_path), "rows": [1, [2, 3]]}
    assert "a print in user code" in result.stderr


def test_only_rank_0_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("env", "--json").stdout == ""
    monkeypatch.setenv("RANK", "0")
    assert json.loads(run("env", "--json").stdout)["kdcache"] == kdcache.__version__


def test_env_says_what_is_installed() -> None:
    import numpy
    import torch

    found = json.loads(run("env", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == numpy.__version__
    assert found["engine"] == "torch"
    assert found["cpus"] == len(os.sched_getaffinity(0))
    text = run("env").stdout
    assert torch.__version__ in text and "engine          torch" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("64MB", 64_000_000),
        ("64 MiB", 2**26),
        ("1.5GB", 1_500_000_000),
        ("1000000", 10**6),
        ("12b", 12),
    ],
)
def test_sizes(given: str, expected: int) -> None:
    from kdcache.console import size

    assert size(given) == expected


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "kdcache", "report", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr
        == "Error: none is no run: it has no run.toml; expected the --out folder of train-student\n"
    )


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)  # as of `| head` that is gone
    done = subprocess.run(
        [sys.executable, "-m", "kdcache", "env"], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert done.stderr == b"" and done.returncode == 0


USER = """
import torch
class Data:
    name = "rows"
    def __len__(self): return 20
    def __getitem__(self, i):
        print("from the user")
        return torch.arange(3.0) + i, i % 2
def net(): return torch.nn.Linear(3, 2)
"""


def with_streams(out: Path, gone: dict[int, str], *args: Any) -> None:
    """In a process of its own: the command as Python would start it with these descriptors closed,
    or full.
    """
    kept = os.open(out, os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(
            os.open("/dev/full", os.O_WRONLY) if gone.get(descriptor) == "full" else kept,
            descriptor,
        )
    for descriptor in gone:
        if gone[descriptor] == "closed":
            os.close(descriptor)
    sys.stdout, sys.stderr = (
        None if gone.get(d) == "closed" else open(d, "w", closefd=False) for d in (1, 2)
    )
    try:
        cli.main([str(a) for a in args], prog_name="kdcache")
    except SystemExit as e:
        os._exit(int(e.code or 0))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_streams_that_are_closed_or_full_lose_their_text_and_no_work(tmp_path: Path) -> None:
    """A dump with each: the bytes of the cache are the same, also where a file of it would get the
    number of a stream, into which libraries print."""
    importlib.import_module("kdcache.teacher.dump")  # once, and not in every child
    (tmp_path / "user.py").write_text(USER)
    cases: dict[str, dict[int, str]] = {
        "whole": {},
        "stderr closed": {2: "closed"},
        "stderr full": {2: "full"},
        "stdout closed": {1: "closed"},
        "all closed": {0: "closed", 1: "closed", 2: "closed"},
        "stdout full": {1: "full"},
    }
    codes, caches = {}, {}
    for name, gone in cases.items():
        cache = tmp_path / name / "cache"
        cache.parent.mkdir()
        args = (
            "dump-teacher",
            "--teacher",
            f"{tmp_path}/user.py:net",
            "--data",
            f"{tmp_path}/user.py:Data",
            "--device",
            "cpu",
            "--out",
            cache,
        )
        codes[name] = os.waitstatus_to_exitcode(
            forked(partial(with_streams, tmp_path / name / "said", gone, *args))[0]
        )
        caches[name] = {
            p.relative_to(cache): p.read_bytes() for p in cache.rglob("*") if p.is_file()
        }
    assert codes == {**dict.fromkeys(cases, 0), "stdout full": 1}
    assert all(files == caches["whole"] for files in caches.values()) and len(caches["whole"]) == 4
    assert (tmp_path / "stdout full" / "said").read_text().splitlines()[-1] == (
        "Error: the command did its work, but standard output took not all of it: [Errno 28] No "
        "space left on device"
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command(signum: signal.Signals) -> None:
    # A shell without job control starts its background jobs with SIGINT ignored, and children
    # inherit that.
    code = (
        "import kdcache.env, time, os, signal\nsignal.signal(signal.SIGINT, "
        "signal.default_int_handler)\nkdcache.env.env = lambda: (os.kill(os.getpid(), "
        f"{int(signum)}), time.sleep(20))\nfrom kdcache.cli import main\nmain(['env'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode in (128 + signum, -signum)  # a shell shows both as 128 + signal
    assert "Traceback" not in done.stderr
