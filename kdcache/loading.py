"""User code by name: `file.py:name` and `package.module:name`, `key=value` arguments, calls with clear refusals."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from kdcache.errors import KDCacheError, UsageError, near
from kdcache.paths import local_path
from kdcache.signals import Interrupted


def parse_args(items: Iterable[str], option: str = "--data-arg") -> dict[str, Any]:
    """`["a=1", "b=text"]` -> `{"a": 1, "b": "text"}`: each value as JSON where it is JSON, else as the string it is."""
    args: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise UsageError(f"{option} {item!r}: expected key=value")
        if key in args:
            raise UsageError(f"{option} {key} is given twice")
        try:
            args[key] = json.loads(text)
        except ValueError:
            args[key] = text
    return args


def is_code(spec: str) -> bool:
    """Whether `spec` has the form of `file.py:name` or `package.module:name`."""
    left, colon, name = spec.rpartition(":")
    return bool(colon) and name.isidentifier() and (
        left.endswith(".py") or all(part.isidentifier() for part in left.split(".")))


def resolve(spec: str) -> Any:
    """The object that `file.py:name` or `package.module:name` names. UsageError says what could not be found or run."""
    left, _, name = spec.rpartition(":")
    if not is_code(spec):
        raise UsageError(f"{spec!r} names no code; expected file.py:name or package.module:name")
    module = _file_module(left) if left.endswith(".py") else _named_module(left)
    try:
        return getattr(module, name)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        raise UsageError(f"{left} has no {name!r}{near(name, public)}") from None


def resolve_spec(spec: str, prefixes: Iterable[str], known: Iterable[str], kind: str) -> Any:
    """`resolve` for a SPEC with none of the `prefixes`; UsageError says which SPECs are `known` where none is meant."""
    hint = near(spec.partition(":")[0], prefixes)
    hint = (hint if "did you mean" in hint else "") + f"; expected one of {', '.join(known)}"
    if not is_code(spec):
        raise UsageError(f"{kind} {spec}: no such {kind} SPEC{hint}")
    try:
        return resolve(spec)
    except UsageError as e:
        raise UsageError(f"{kind} {spec}: {e}" + ("" if ".py:" in spec else hint)) from e


def call(function: Callable[..., Any], args: Mapping[str, Any], *, where: str,
         offered: Mapping[str, Any] | None = None) -> Any:
    """Call `function` with keyword arguments `args`, and with those of `offered` that it has a parameter for.

    UsageError names arguments that it does not take (with near names) or that are missing, and, for an error raised
    inside, its type, message and line.
    """
    named, anything = _parameters(function, where)
    given = dict(args)
    for key, value in (offered or {}).items():
        if key in named:
            given.setdefault(key, value)
    foreign = [] if anything else [key for key in given if key not in named]
    if foreign:
        raise UsageError(f"{where} takes no argument {foreign[0]!r}" + (near(foreign[0], named) or " (it takes none)"))
    missing = [key for key, required in named.items() if required and key not in given]
    if missing:
        raise UsageError(f"{where} needs {', '.join(missing)}: give {missing[0]}=...")
    try:
        return function(**given)
    except KDCacheError:
        raise
    except Exception as e:
        let_through(e)
        raise UsageError(f"{where}: {describe(e)}") from e


@contextmanager
def no_foreign_code(where: str, instead: str) -> Iterator[None]:
    """What transformers loads with trust_remote_code=False: UsageError with `instead` where it would run code that
    comes with the files (auto_map in a config), and nobody is asked."""
    try:
        yield
    except ValueError as e:
        if isinstance(e, KDCacheError) or "trust_remote_code" not in str(e):
            raise
        raise UsageError(f"{where} brings code of its own (auto_map in a config), which is never run; {instead}") from e


def let_through(error: BaseException) -> None:
    """Raise the Interrupted that `error` is or came of: a signal is no fault of the code that it fell into.

    Libraries wrap what they catch, as transformers does around its imports.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Interrupted):
            raise cause
        cause = cause.__cause__ or cause.__context__


def describe(error: BaseException) -> str:
    """An exception in one line: type, first line of its message, and where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    lines = str(error).strip().splitlines() or [""]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0][:300]}{place}"


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` has a parameter `name`, or takes any keyword."""
    named, anything = _parameters(function, getattr(function, "__qualname__", repr(function)))
    return anything or name in named


def _parameters(function: Callable[..., Any], where: str) -> tuple[dict[str, bool], bool]:
    """Parameter -> whether it must be given, of those that can be given by name; and whether there is a `**kwargs`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):             # some builtins have no signature; the call itself will judge
        return {}, True
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UsageError(f"{where} takes {parameter.name!r} by position only; arguments are given by name")
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default is p.empty for p in by_name}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _file_module(text: str) -> ModuleType:
    path = local_path(text, "file").resolve()
    if not path.is_file():
        raise UsageError(f"{text}: no such file")
    name = f"kdcache_user_{path.stem}_{xxhash.xxh3_64_hexdigest(str(path).encode())}"
    if name in sys.modules:                     # teacher, student and data may come from one file: it runs once
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"{text}: not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))       # so that it can import its neighbours; last, so that it hides nothing
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module                  # dataclasses and pickle look a class's module up here
    try:
        found.loader.exec_module(module)
    except BaseException as e:
        del sys.modules[name]
        if not isinstance(e, Exception):
            raise
        let_through(e)
        raise UsageError(f"{text} could not be run: {describe(e)}") from e
    return module


def _named_module(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)                   # a console script, unlike python -m, does not look where it is run
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        let_through(e)
        if e.name is not None and (name == e.name or name.startswith(e.name + ".")):
            raise UsageError(f"there is no module {e.name!r} to import (install it, or use file.py:name)") from e
        raise UsageError(f"module {name} could not be imported: {describe(e)}") from e
    except Exception as e:
        let_through(e)
        raise UsageError(f"module {name} could not be imported: {describe(e)}") from e
