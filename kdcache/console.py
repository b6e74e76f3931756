"""What the commands share: how an error ends one, option types, `--config FILE` and `--json`, and how a
result is printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import click
from click.core import ParameterSource

from kdcache.errors import KDCacheError, UsageError, did_you_mean
from kdcache.process.early import at_once, put_back
from kdcache.process.ranks import this_rank
from kdcache.process.signals import Signals
from kdcache.process.streams import hold, lost
from kdcache.user.arguments import bytes_of, is_unicode
from kdcache.user.code_errors import interrupted, printable
from kdcache.user.paths import local_path

F = TypeVar("F", bound=Callable[..., Any])
CONFIG = "kdcache.config"  # where a context keeps the file that it was given
# RUN/run.toml keeps versions and content ids there; as a config it is passed over
RECORDED = "recorded"
TYPE_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}
MOST = 2**64  # of a number: more is no number of anything here


def size(value: str | int) -> int:
    """A number of bytes from 64MB, 1.5GiB or 1000000: an option type."""
    if not (found := bytes_of(str(value))):
        raise click.BadParameter(
            f"{str(value)[:40]!r} is no size; expected a number of bytes such as 64MB, 1.5GiB or "
            "1000000"
        )
    return found


class LocalPath(click.Path):
    """A path of this machine's file systems; see kdcache/user/paths.py."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click's; UsageError naming the option for what is no such path."""
        what = (
            "path"
            if param is None
            else param.human_readable_name
            if param.param_type_name == "argument"
            else param.opts[0]
        )
        return super().convert(local_path(value, what), param, ctx)


FOLDER = LocalPath(path_type=Path, file_okay=False)
PATH = LocalPath(path_type=Path)


class Once(click.Command):
    """A command that refuses an option which takes one value and is given several times: the last
    would win. And values that no function of the package can use, whichever option they are of."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's; UsageError naming the option."""
        rest = self._parsed(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name or "")
            for one in value if isinstance(value, tuple) else (value,):
                if (fault := unusable(one)) is not None:
                    raise click.UsageError(
                        f"{param.get_error_hint(ctx)}: {printable(str(one)[:40])!r} {fault}", ctx
                    )
        return rest

    def _parsed(self, ctx: click.Context, args: list[str]) -> list[str]:
        order = self.make_parser(ctx).parse_args(args=list(args))[2]
        for param in order:
            if (
                isinstance(param, click.Option)
                and not param.multiple
                and not param.count
                and order.count(param) > 1
            ):
                name = "/".join([*param.opts, *param.secondary_opts])
                raise click.UsageError(
                    f"{name} is given {order.count(param)} times; it takes one value", ctx
                )
        return super().parse_args(ctx, args)


def unusable(value: Any) -> str | None:
    """Why a value is of use to no option, None if it may be: numbers that are none, text that no
    file can hold.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "is not finite; expected a number"
    if isinstance(value, int | float) and not abs(value) < MOST:
        return f"is too large; expected at most {MOST - 1}"
    if not isinstance(value, str | Path):
        return None
    text = str(value)
    if not is_unicode(text):
        return "is not UTF-8, and is to be written into files that are; rename it"
    if "\0" in text:
        return "has a NUL character, which no name of a file can have"
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            return "begins with the name of a user that is not here"
    return None


class StderrLog(logging.Handler):
    """What the package logs, on the standard error of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(shown(self.format(record)), err=True)


class Door(click.Group):
    """A group whose commands end in one line and an exit code when they meet an error that is not a
    bug.
    """

    command_class = Once

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click's, of a program whose streams may go away."""
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        handlers = at_once()
        hold()
        try:
            super().main(*args, **kwargs)
        except SystemExit as e:
            sys.stdout.flush()
            error = lost(sys.stdout)
            if e.code not in (0, None) or error is None or isinstance(error, BrokenPipeError):
                raise  # a broken pipe: `| head` has seen enough
            click.echo(
                f"Error: the command did its work, but standard output took not all of it: {error}",
                err=True,
            )
            sys.exit(1)
        finally:
            put_back(handlers)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            # whether or not the command asks for it: who else would answer?
            this_rank()
            return super().invoke(ctx)
        except KDCacheError as e:
            refuse(ctx, str(e), e.exit_code)
        # a full disk, a folder that may not be read: no bug of ours
        except OSError as e:
            refuse(ctx, str(e), 1)
        except KeyboardInterrupt:
            refuse(ctx, "interrupted", 130)
        except BaseException as e:
            if (signal := interrupted(e)) is None:
                raise
            refuse(ctx, str(signal), signal.exit_code)  # which a library wrapped


def refuse(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    click.echo(f"Error: {shown(message)}", err=True)
    ctx.exit(exit_code)


def config_and_json(function: F) -> F:
    """Give a command `--config FILE` and `--json`, and its errors the file that an option they name
    is from.
    """
    function = _naming_the_file(function)
    function = click.option(
        "--json", "as_json", is_flag=True, help="One JSON object on standard output."
    )(function)
    return click.option(
        "--config",
        type=PATH,
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_use_config,
        help="Options from this TOML file's table of the command; the command line wins.",
    )(function)


def _naming_the_file(function: F) -> F:
    """A UsageError over an option of the command line and one of a `--config` file ends with which
    is the file's.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except UsageError as e:
            ctx = click.get_current_context()
            said = re.split(r"[^a-z0-9_]+", str(e).lower().replace("-", "_"))
            named = {name: ctx.get_parameter_source(name) for name in options if name in said}
            flags = " and ".join(
                f"--{name.replace('_', '-')}"
                for name, source in named.items()
                if source is ParameterSource.DEFAULT_MAP
            )
            if flags and ParameterSource.COMMANDLINE in named.values():
                e.args = (f"{e} ({flags} of {ctx.meta[CONFIG]})", *e.args[1:])
            raise

    return cast(F, run)


def _use_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is not None:
        ctx.meta[CONFIG] = path
        commands = (
            ctx.parent.command.commands
            if ctx.parent and isinstance(ctx.parent.command, click.Group)
            else ()
        )
        ctx.default_map = {**(ctx.default_map or {}), **read_config(path, ctx.command, commands)}


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
            raise UsageError(f"{path}: table [{name}] is no command{did_you_mean(name, commands)}")
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
            raise UsageError(f"{where}: unknown key{did_you_mean(key, options)}")
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


def _toml_types(option: click.Option) -> tuple[type, ...]:
    if option.is_flag:
        return (bool,)
    if isinstance(option.type, click.types.IntParamType):  # IntRange too
        return (int,)
    if isinstance(option.type, click.types.FloatParamType):
        return (float, int)
    return (str,)


def given_options(options: Mapping[str, Any], **renamed: str) -> dict[str, Any]:
    """Those of a command's `options` that were given, in a file or on the command line: the
    functions own the defaults.

    `--x-arg key=value` becomes the mapping `x_args`; repeatable options become lists. `renamed`:
    option -> parameter.
    """
    from kdcache.data.code_specs import parse_args

    ctx = click.get_current_context()
    out: dict[str, Any] = {}
    for name, value in options.items():
        if ctx.get_parameter_source(name) in (ParameterSource.DEFAULT, None):
            continue
        if name.endswith("_arg"):
            out[f"{name}s"] = parse_args(value, f"--{name.replace('_', '-')}")
        else:
            out[renamed.get(name, name)] = list(value) if isinstance(value, tuple) else value
    return out


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """A command's work, its imports done: SIGINT and SIGTERM are errors in it, raised where they
    come.

    Standard output carries the result and nothing else: what anything prints meanwhile goes to
    standard error.
    """
    with Signals("interrupted"), contextlib.redirect_stdout(sys.stderr):
        yield


def print_line(text: str) -> None:
    """A line of progress on standard error; rank 0 only."""
    if this_rank().rank == 0:
        click.echo(shown(text), err=True)


def print_result(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print a command's result, as one JSON object or as text for people; rank 0 only."""
    if this_rank().rank != 0:
        return
    click.echo(json.dumps(plain(result), allow_nan=False) if as_json else shown(text(result)))


def shown(text: str) -> str:
    """`text` as a terminal may be given it, line by line: nothing that it obeys."""
    return "\n".join(map(printable, text.split("\n")))


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: paths as text, numpy numbers as numbers, what is not finite as
    null.
    """
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, Iterable) and not hasattr(value, "item"):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def lines(result: Any, only: Sequence[str] = ()) -> str:
    """A result for people: one aligned line per value that is there, or of those in `only`, numbers
    to four digits.
    """
    shown = {
        key.replace("_", " "): brief(value)
        for key, value in plain(result).items()
        if value not in (None, [], {}) and (not only or key in only)
    }
    width = max((len(key) for key in shown), default=0)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in shown.items())


def brief(value: Any) -> str:
    """One value in a line: floats to four significant digits, lists and small objects with commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {brief(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(brief, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))
