"""Values that no option can use, given to every option; an environment that no command can use:
exit code 2.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from cli_world import refused, run

from kdcache.cli import main
from kdcache.console import size

COMMANDS = {
    name: command for name, command in main.commands.items() if not isinstance(command, click.Group)
}
GIVEN = {
    "--teacher": "t.py:net",
    "--student": "s.py:net",
    "--data": "digits",
    "--out": "out",
    "--samples": "3",
}
NUMBERS = ["nan", "inf", "-inf", "1e400", str(10**30), "9" * 400, "²", "0x1", ""]
TEXTS = ["a\0b", "\udcff", "~nosuchuser/x"]


def line(name: str, command: click.Command, option: click.Parameter, value: str) -> list[str]:
    """The command with what it needs, and with `value` for that parameter."""
    args = [name]
    for param in command.params:
        if isinstance(param, click.Argument):
            args.append(value if param is option else "cache")
        elif param is option:
            args += [param.opts[0], value]
        elif param.required:
            args += [param.opts[0], GIVEN[param.opts[0]]]
    return args


def parameters(numbers: bool) -> list[tuple[str, click.Command, click.Parameter]]:
    kinds = (click.types.IntParamType, click.types.FloatParamType)
    return [
        (name, command, param)
        for name, command in COMMANDS.items()
        for param in command.params
        if not getattr(param, "is_flag", False)
        and isinstance(param.type, kinds) is numbers
        and not isinstance(param.type, click.Choice)
    ]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: v[:6] or "empty")
def test_numbers_that_are_none(value: str) -> None:
    found = parameters(numbers=True)
    assert len(found) > 20
    for name, command, option in found:
        refused_usage(run(*line(name, command, option, value)))


@pytest.mark.parametrize("value", TEXTS, ids=ascii)
def test_text_that_no_file_can_hold(value: str) -> None:
    for name, command, option in parameters(numbers=False):
        if option.name in ("config", "runs") and value.startswith("~"):
            continue  # opened, or looked up, as they are: no such file
        given = f"key={value}" if (option.name or "").endswith("_arg") else value
        result = run(*line(name, command, option, given))
        assert result.exit_code == 2 and "Traceback" not in result.stderr, (
            name,
            option.name,
            result.stderr,
        )
        assert isinstance(result.exception, SystemExit) and result.stderr.isascii(), (
            name,
            option.name,
        )


def test_paths_that_are_empty_and_sizes_that_are_none() -> None:
    for name, command, option in parameters(numbers=False):
        if isinstance(option.type, click.Path):
            refused_usage(run(*line(name, command, option, "")))
    for value in ("9" * 400, "0.1B", "1e9", "", "-1", "٣", "1.5.5MB", "0"):
        with pytest.raises(click.BadParameter):
            size(value)
    assert size("1.5KiB") == 1536


def refused_usage(result: Any) -> None:
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (
        result.stderr,
        result.exception,
    )


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5000 + "]" * 5000,
        "[dump-teacher.data-arg]\nx = 1979-05-27",
        f"k = {'9' * 5000}",
        f"[train-student]\nepochs = {'9' * 400}",
        "[train-student]\nepochs = nan",
        'out = "a\\u0000b"',
        "[train-student.student-arg]\nx = {a = 1979-05-27T00:00:00Z}",
    ],
)
def test_configs_that_are_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text if text.startswith("[") else f"[dump-teacher]\n{text}\n")
    command = "train-student" if "train" in text else "dump-teacher"
    given = (
        ["--student", "s.py:n"] if "train" in text else ["--teacher", "t.py:n", "--data", "digits"]
    )
    out = [] if "out" in text else ["--out", "o"]
    refused_usage(run(command, *given, *out, "--config", file))


def test_arguments_of_specs_that_json_cannot_hold() -> None:
    for text in ("x=" + "[" * 50000 + "]" * 50000, 'x="\\ud800"', "=1", "1=2", "x"):
        refused(
            run(
                "dump-teacher",
                "--teacher",
                "t.py:n",
                "--data",
                "digits",
                "--out",
                "o",
                "--teacher-arg",
                text,
            ),
            2,
            "--teacher-arg",
        )


@pytest.mark.parametrize("device", ["meta", "hpu", "xla", "cpü", "warp9", "cpu:x", "cuda:99"])
def test_devices_that_are_none(device: str) -> None:
    refused(
        run(
            "evaluate", "--student", "kdcache.demo:convnet", "--data", "digits", "--device", device
        ),
        2,
        "--device",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "abc"),
        ("RANK", "²"),
        ("RANK", "-1"),
        ("RANK", "1"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "²"),
        ("LOCAL_RANK", "x"),
        ("RANK", "9" * 99),
    ],
)
def test_ranks_that_are_none_are_refused_by_every_command(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for command in (
        ["env"],
        ["inspect", "c"],
        ["verify", "c"],
        ["report", "r"],
        ["train-student", "--student", "s.py:n", "--out", "o"],
    ):
        refused(run(*command), 2, name)
    monkeypatch.setenv(name, "")  # as if it were not there
    assert run("env").exit_code == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_imports(signum: signal.Signals) -> None:
    """From the first line of the program on: here in the midst of an import that takes long."""
    code = (
        "import os, sys, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nclass "
        "Slow:\n    def find_spec(self, name, path, target=None):\n        if name == 'click':\n   "
        f"         os.kill(os.getpid(), {int(signum)})\nsys.meta_path.insert(0, Slow())\nimport "
        "kdcache.__main__\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signum and time.monotonic() - begun < 30
    assert done.stderr == f"Error: {signum.name}: interrupted before anything was begun\n"


def test_a_command_leaves_the_handlers_of_a_program_that_calls_it() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert run("env").exit_code == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
