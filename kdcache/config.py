"""`--config run.toml`: the options of a command from a file, checked as strictly as the command
line.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from kdcache.errors import UsageError, near

# RUN/run.toml keeps versions and content ids there; as a config it is passed over
RECORDED = "recorded"


def read_config(path: Path, command: click.Command, commands: Iterable[str]) -> dict[str, Any]:
    """Parameter name -> value, from the table of `command` in the TOML file `path`, ready to be a
    click default map.

    Keys are flag names without the dashes in front. UsageError for a file that is no TOML, a table
    that is no command, a key that is no flag of this command (with near names), and a value of
    another type or out of range.
    """
    document = _load(path)
    for name, table in document.items():
        if not isinstance(table, dict):
            raise UsageError(
                f"{path}: {name!r} stands outside a table; put it under [{command.name}]"
            )
        if name not in {*commands, RECORDED}:
            raise UsageError(f"{path}: table [{name}] is no command{near(name, commands)}")
    if command.name not in document:
        raise UsageError(
            f"{path}: there is no table [{command.name}]; it has "
            f"{', '.join(sorted(document)) or 'none'}"
        )
    options = flags(command)
    values = {}
    for key, value in document[command.name].items():
        where = f"{path} [{command.name}] {key}"
        if key not in options:
            raise UsageError(f"{where}: unknown key{near(key, options)}")
        values[str(options[key].name)] = _checked(options[key], value, where)
    return values


def flags(command: click.Command) -> dict[str, click.Option]:
    """Flag name without its dashes -> option, of the options a file may set."""
    options = (p for p in command.params if isinstance(p, click.Option))
    return {
        o.opts[0].removeprefix("--"): o
        for o in options
        if o.name not in ("config", "as_json", "help")
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"--config {path}: {e.strerror}") from e
    # TOMLDecodeError, UnicodeDecodeError, numbers of thousands of digits
    except ValueError as e:
        raise UsageError(f"--config {path}: not a TOML file: {e}") from e
    except RecursionError:
        raise UsageError(f"--config {path}: nested too deep to be read") from None


def _checked(option: click.Option, value: Any, where: str) -> Any:
    """`value` converted as the command line would convert it, after its TOML type was checked."""
    if option.multiple:
        if isinstance(value, Mapping) and str(option.name).endswith("_arg"):
            value = [f"{key}={_json(item, f'{where}.{key}')}" for key, item in value.items()]
        items = value if isinstance(value, list) else [value]
        return tuple(_one(option, item, where) for item in items)
    return _one(option, value, where)


def _one(option: click.Option, value: Any, where: str) -> Any:
    types = _toml_types(option)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join(TYPE_NAMES[t] for t in types)
        raise UsageError(
            f"{where}: found {TYPE_NAMES.get(type(value), type(value).__name__)} {value!r:.60}, "
            f"expected {expected}"
        )
    try:
        return option.type.convert(value, option, None)
    except click.BadParameter as e:
        raise UsageError(f"{where}: {e.message}") from e
    except OverflowError as e:
        raise UsageError(f"{where}: the number is too large") from e


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value)
    except TypeError as e:  # of the types of TOML, dates and times
        raise UsageError(
            f"{where}: found {value!r:.60}, a date or a time; expected what JSON can hold: give it "
            "as text"
        ) from e
    except RecursionError:
        raise UsageError(f"{where}: nested too deep") from None


TYPE_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def _toml_types(option: click.Option) -> tuple[type, ...]:
    if option.is_flag:
        return (bool,)
    if isinstance(option.type, click.types.IntParamType):  # IntRange too
        return (int,)
    if isinstance(option.type, click.types.FloatParamType):
        return (float, int)
    return (str,)
