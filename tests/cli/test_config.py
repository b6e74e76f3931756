"""`--config`: options from a file, under the command line, over the defaults, and as strict as the
command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kdcache.cli import main
from kdcache.console import given_options

BASE = '[dump-teacher]\nteacher = "t.py:net"\ndata = "digits"\nout = "c"\n'


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `dump-teacher` would call its function with."""
    options: dict[str, Any] = {}
    command = main.commands["dump-teacher"]

    def record(as_json: bool, **values: Any) -> None:
        options.update(given_options(values, temperature="temperatures"))

    monkeypatch.setattr(command, "callback", record)
    return options


def dump(tmp_path: Path, text: str, *args: str) -> Any:
    file = tmp_path / "run.toml"
    file.write_text(text)
    return CliRunner().invoke(main, ["dump-teacher", "--config", str(file), *args])


def test_the_file_gives_every_kind_of_option(tmp_path: Path, seen: dict[str, Any]) -> None:
    result = dump(
        tmp_path,
        BASE + "k = 5\ntemperature = [1, 2.5]\nlabels = false\nmoments = true\n"
        'accept = "data.name"\nshard-size = "1MB"\nteacher-arg = {width = 3, name = "a"}\ndata-arg '
        '= ["n=4"]\n',
    )
    assert result.exit_code == 0, result.stderr
    assert seen == {
        "teacher": "t.py:net",
        "data": "digits",
        "out": Path("c"),
        "k": 5,
        "temperatures": [1.0, 2.5],
        "labels": False,
        "moments": True,
        "accept": ["data.name"],
        "shard_size": 10**6,
        "teacher_args": {"width": 3, "name": "a"},
        "data_args": {"n": 4},
    }


def test_the_command_line_wins_over_the_file(tmp_path: Path, seen: dict[str, Any]) -> None:
    result = dump(
        tmp_path,
        BASE + "k = 5\ntemperature = [1, 2]\nlabels = false\n",
        "--k",
        "9",
        "--temperature",
        "4",
        "--labels",
    )
    assert result.exit_code == 0, result.stderr
    assert (seen["k"], seen["temperatures"], seen["labels"]) == (9, [4.0], True)


def test_what_nobody_gave_is_left_to_the_function(tmp_path: Path, seen: dict[str, Any]) -> None:
    assert dump(tmp_path, BASE).exit_code == 0
    assert set(seen) == {"teacher", "data", "out"}


def test_other_tables_are_passed_over(tmp_path: Path, seen: dict[str, Any]) -> None:
    assert (
        dump(tmp_path, BASE + "[train-student]\nlr = 0.1\n[recorded]\ntorch = '2'\n").exit_code == 0
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            BASE + "temprature = [1]\n",
            "[dump-teacher] temprature: unknown key (did you mean 'temperature' or 'feature'?)",
        ),
        (
            BASE + "batch_size = 3\n",
            "[dump-teacher] batch_size: unknown key (did you mean 'batch-size'?)",
        ),
        (BASE + "lr = 3\n", "[dump-teacher] lr: unknown key"),
        (BASE + "config = 'x'\n", "[dump-teacher] config: unknown key"),
        (
            BASE + "[train-studnet]\nlr = 1\n",
            "table [train-studnet] is no command (did you mean 'train-student'?)",
        ),
        ("k = 5\n" + BASE, "'k' stands outside a table; put it under [dump-teacher]"),
        ("[train-student]\nlr = 1\n", "there is no table [dump-teacher]; it has train-student"),
        (BASE + "k = '5'\n", "[dump-teacher] k: found a string '5', expected an integer"),
        (BASE + "k = 5.5\n", "[dump-teacher] k: found a number 5.5, expected an integer"),
        (BASE + "k = true\n", "[dump-teacher] k: found true or false True, expected an integer"),
        (BASE + "k = 0\n", "[dump-teacher] k: 0 is not in the range x>=1"),
        (
            BASE + "moments = 1\n",
            "[dump-teacher] moments: found an integer 1, expected true or false",
        ),
        (
            BASE + "temperature = ['a']\n",
            "[dump-teacher] temperature: found a string 'a', expected a number",
        ),
        (BASE + "format = 'zip'\n", "[dump-teacher] format: 'zip' is not one of"),
        (BASE + "shard-size = 'big'\n", "[dump-teacher] shard-size: 'big' is no size"),
        (BASE + "seed = {a = 1}\n", "[dump-teacher] seed: found a table"),
        ("[dump-teacher\n", "not a TOML file"),
    ],
)
def test_a_wrong_file_is_one_clear_line(
    tmp_path: Path, seen: dict[str, Any], text: str, said: str
) -> None:
    result = dump(tmp_path, text)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("Error: ")
    assert "run.toml" in result.stderr and said in result.stderr
    assert not seen


def test_a_missing_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["dump-teacher", "--config", str(tmp_path / "no.toml")])
    assert result.exit_code == 2 and "no.toml: No such file" in result.stderr


def test_config_options_have_a_type_that_toml_has() -> None:
    from kdcache.console import TYPE_NAMES, _toml_types, flags

    for command in main.commands.values():
        if not isinstance(command, click.Group):
            for option in flags(command).values():
                assert set(_toml_types(option)) <= set(TYPE_NAMES)


def test_a_clash_says_which_side_the_file_gave(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[train-student]\nepochs = 3\nstudent = "kdcache.demo:convnet"\nalpha = 0.0\ndata = '
        '"digits"\n'
    )
    result = CliRunner().invoke(
        main,
        [
            "train-student",
            "--config",
            str(file),
            "--max-steps",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "run"),
        ],
    )
    assert result.exit_code == 2
    assert "epochs" in result.stderr and "max_steps" in result.stderr
    assert result.stderr.rstrip().endswith(f"(--epochs of {file})")
