"""User code by name: `file.py:name` and `package.module:name`, `key=value` arguments, calls with
clear refusals.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from kdcache.errors import KDCacheError, UsageError, did_you_mean
from kdcache.user.arguments import is_unicode
from kdcache.user.code_errors import describe, is_the_users, reraise_interrupt, users_code
from kdcache.user.paths import local_path

FILES = "kdcache_user_"  # how the names of modules begin that are files of users


def parse_args(items: Iterable[str], option: str = "--data-arg") -> dict[str, Any]:
    """`["a=1", "b=text"]` -> `{"a": 1, "b": "text"}`: each value as JSON where it is JSON, else as
    the string it is.
    """
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
        except RecursionError:
            raise UsageError(f"{option} {key}: its JSON is nested too deep to be read") from None
        if not is_unicode(str(args[key])):  # JSON can spell half a surrogate pair
            raise UsageError(
                f"{option} {key}: its text is no Unicode, it has half a surrogate pair"
            )
    return args


def is_code(spec: str) -> bool:
    """Whether `spec` has the form of `file.py:name` or `package.module:name`."""
    left, colon, name = spec.rpartition(":")
    return (
        bool(colon)
        and name.isidentifier()
        and (left.endswith(".py") or all(part.isidentifier() for part in left.split(".")))
    )


def resolve(spec: str) -> Any:
    """The object that `file.py:name` or `package.module:name` names. UsageError says what could not
    be found or run.
    """
    left, _, name = spec.rpartition(":")
    if not is_code(spec):
        raise UsageError(f"{spec!r} names no code; expected file.py:name or package.module:name")
    module = _file_module(left) if left.endswith(".py") else _named_module(left)
    with users_code(f"{left}: its {name}", UsageError):
        if hasattr(module, name):
            return getattr(module, name)
    public = [known for known in vars(module) if not known.startswith("_")]
    raise UsageError(f"{left} has no {name!r}{did_you_mean(name, public)}")


def resolve_spec(spec: str, prefixes: Iterable[str], known: Iterable[str], kind: str) -> Any:
    """`resolve` for a SPEC with none of the `prefixes`; UsageError says which SPECs are `known`
    where none is meant.
    """
    hint = did_you_mean(spec.partition(":")[0], prefixes)
    hint = (hint if "did you mean" in hint else "") + f"; expected one of {', '.join(known)}"
    if not is_code(spec):
        raise UsageError(f"{kind} {spec}: no such {kind} SPEC{hint}")
    try:
        return resolve(spec)
    except UsageError as e:
        raise UsageError(f"{kind} {spec}: {e}" + ("" if ".py:" in spec else hint)) from e


def call(
    function: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    where: str,
    offered: Mapping[str, Any] | None = None,
) -> Any:
    """Call `function` with keyword arguments `args`, and with those of `offered` that it has a
    parameter for.

    UsageError names arguments that it does not take (with near names) or that are missing, and, for
    an error raised inside, its type, message and line.
    """
    named, anything = _parameters(function, where)
    given = dict(args)
    for key, value in (offered or {}).items():
        if key in named:
            given.setdefault(key, value)
    foreign = [] if anything else [key for key in given if key not in named]
    if foreign:
        raise UsageError(
            f"{where} takes no argument {foreign[0]!r}"
            + (did_you_mean(foreign[0], named) or " (it takes none)")
        )
    missing = [key for key, required in named.items() if required and key not in given]
    if missing:
        raise UsageError(f"{where} needs {', '.join(missing)}: give {missing[0]}=...")
    with users_code(where, UsageError):
        return function(**given)


@contextmanager
def no_foreign_code(where: str, instead: str) -> Iterator[None]:
    """What transformers loads with trust_remote_code=False: UsageError with `instead` where it
    would run code that comes with the files (auto_map in a config), and nobody is asked."""
    try:
        yield
    except ValueError as e:
        if isinstance(e, KDCacheError) or "trust_remote_code" not in str(e):
            raise
        raise UsageError(
            f"{where} brings code of its own (auto_map in a config), which is never run; {instead}"
        ) from e


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` has a parameter `name`, or takes any keyword."""
    named, anything = _parameters(function, getattr(function, "__qualname__", repr(function)))
    return anything or name in named


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` has a parameter `name` of its own; any keyword is not enough, as it may go
    anywhere.
    """
    return name in _parameters(function, getattr(function, "__qualname__", repr(function)))[0]


def _parameters(function: Callable[..., Any], where: str) -> tuple[dict[str, bool], bool]:
    """Parameter -> whether it must be given, of those that can be given by name; and whether there
    is a `**kwargs`.
    """
    try:
        with users_code(f"{where}: its signature"):  # which may be a property
            parameters = inspect.signature(function).parameters.values()
    except KDCacheError as e:
        if not isinstance(e.__cause__, TypeError | ValueError):
            raise
        # some builtins have no signature; the call itself will judge
        return {}, True
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UsageError(
                f"{where} takes {parameter.name!r} by position only; arguments are given by name"
            )
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default is p.empty for p in by_name}, any(
        p.kind is p.VAR_KEYWORD for p in parameters
    )


def _file_module(text: str) -> ModuleType:
    try:
        path = local_path(text, "file").resolve()
    except (OSError, RuntimeError, ValueError) as e:  # no such user, a circle of links, a NUL
        if isinstance(e, KDCacheError):
            raise
        raise UsageError(f"{text}: {describe(e)}") from e
    if not path.is_file():
        raise UsageError(f"{text}: no such file")
    name = f"{FILES}{path.stem}_{xxhash.xxh3_64_hexdigest(str(path).encode())}"
    # teacher, student and data may come from one file: it runs once
    if name in sys.modules:
        return sys.modules[name]
    FINDER.know({name: str(path)})
    if str(path.parent) not in sys.path:
        # so that it can import its neighbours; last, so that it hides nothing
        sys.path.append(str(path.parent))
    with users_code(f"{text} could not be run", UsageError):
        return importlib.import_module(name)


class _Finder(MetaPathFinder):
    """Imports the files of users under the names that `_file_module` gives them.

    What a worker process is sent names the module of its class, and a process that did not come of
    a fork has to import it: `UserFiles`, sent along, tells its finder where the file is.
    """

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}

    def know(self, paths: Mapping[str, str]) -> None:
        """Files by the names of their modules."""
        self.paths.update(paths)
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.paths:
            return None
        file = self.paths[fullname]
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_UserFile(fullname, file)
        )


class _UserFile(SourceFileLoader):
    """Runs a file with seeded generators: what it makes as it runs is then the same in every
    process.
    """

    def exec_module(self, module: ModuleType) -> None:
        from kdcache.data.views import seeded_generators

        with seeded_generators(0, 0, 0):
            super().exec_module(module)


FINDER = _Finder()


class UserFiles:
    """The files of users that were run here. Unpickled elsewhere, it lets what comes after it be
    unpickled too.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _told, (dict(FINDER.paths),)


def _told(paths: dict[str, str]) -> UserFiles:
    FINDER.know(paths)
    return UserFiles()


def _named_module(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        # a console script, unlike python -m, does not look where it is run
        sys.path.append(here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as e:
        reraise_interrupt(e)
        if e.name is not None and (name == e.name or name.startswith(e.name + ".")):
            raise UsageError(
                f"there is no module {e.name!r} to import (install it, or use file.py:name)"
            ) from e
        raise UsageError(f"module {name} could not be imported: {describe(e)}") from e
    except BaseException:
        with users_code(f"module {name} could not be imported", UsageError):
            raise
    is_the_users(name.partition(".")[0])
    return module
