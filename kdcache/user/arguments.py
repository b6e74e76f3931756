"""Arguments of the public functions: against their annotations by one rule for plain types, and by
checks of one value each. One error names what is wrong.
"""

from __future__ import annotations

import functools
import inspect
import os
import string
from collections.abc import Callable, Iterator, Mapping, Set
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from kdcache.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
SHOWN = 40  # characters of a value in an error
UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "True or False",
    "str": "text",
    "Path": "a path",
    "os.PathLike[str]": "a path",
    "Cache": "what kdcache.open gives",
    "Callable": "a function",
    "Mapping": "a dict",
    "dict": "a dict",
}


def bytes_of(text: str) -> int | None:
    """Bytes of "512", "512 MB" (10^6) or "0.5 GiB" (2^30), rounded; None for what is no size.

    By methods of str, which torch.compile follows: it does not follow `re`. At most 18 digits stand
    on either side of the point.
    """
    text = text.strip()
    number = text.rstrip(string.ascii_letters + string.whitespace)
    unit, (whole, point, part) = text[len(number) :].strip().upper(), number.partition(".")
    wrong = [d for d in (whole, part if point else "0") if not (d.isdecimal() and len(d) <= 18)]
    if wrong or unit not in UNITS or not number.isascii():
        return None
    return round(float(number) * UNITS[unit])


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: `check_arguments` before each call."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_arguments(function, args, kwargs)
        return function(*args, **kwargs)

    return call


def check_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """UsageError for the first argument that is of no type its parameter is annotated with.

    A bool is no number and a number no bool; numpy's scalars are numbers, tensors and arrays are
    none. Text must be such that a file can hold it. Names that are no plain types are compared with
    the classes they name, and a name of anything else (an alias) with nothing. A call that Python
    refuses is left to Python.
    """
    try:
        bound = _signature(function).bind(*args, **kwargs)
    except TypeError:
        return
    for name, value in bound.arguments.items():
        annotation = _signature(function).parameters[name].annotation
        if not isinstance(annotation, str) or name == "self":
            continue
        found = [_fits(value, one, function) for one in _union(annotation)]
        if not any(found):
            raise UsageError(f"{name} is {seen(value)}; expected {_expected(annotation)}")
        if isinstance(value, str) and ("\0" in value or not is_unicode(value)):
            raise UsageError(
                f"{name} is {seen(value)}, text that no file can hold (a NUL, or half a surrogate "
                "pair)"
            )


def _expected(annotation: str) -> str:
    """A union in words; text and a path are a path, and of None nothing is said."""
    kinds = [one for one in _union(annotation) if one not in ("None", "Sequence[Any]")]
    if "Path" in kinds or "os.PathLike[str]" in kinds:
        kinds = ["Path", *(one for one in kinds if one not in ("Path", "os.PathLike[str]", "str"))]
    words = [WORDS.get(one, WORDS.get(_head(one), _listed(one))) for one in kinds]
    return ", or ".join(dict.fromkeys(words))


def check_type(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """UsageError unless `value` is of a type (None too if it is among them)."""
    if not isinstance(value, kind):
        raise UsageError(f"{name} is {seen(value)}; expected {expected}")


def check_number(name: str, value: Any, *, optional: bool = False) -> None:
    """UsageError for what is no real number; a tensor is none, as its value may be on a device."""
    if not (isinstance(value, Real) or (optional and value is None)):
        raise UsageError(f"{name} is {seen(value)}; expected a number")


def check_integer(name: str, value: Any, *, optional: bool = False) -> None:
    """UsageError for what is no whole number by its type: 5.0 is none."""
    if isinstance(value, bool) or not (isinstance(value, Integral) or (optional and value is None)):
        raise UsageError(f"{name} is {seen(value)}; expected an integer")


def check_workers(workers: Any) -> None:
    """UsageError for a number of processes that is none."""
    check_integer("workers", workers)
    at_least("workers", workers, 0)


def at_least(name: str, value: int | None, least: int) -> None:
    """UsageError for a number that is given and too small."""
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}; expected at least {least}")


def seen(value: Any) -> str:
    """A value as an error shows it."""
    kind = type(value).__name__
    if (
        hasattr(type(value), "shape")
        and hasattr(type(value), "dtype")
        and not isinstance(value, Real | str | bytes)
    ):
        return (
            f"a {'numpy array' if kind == 'ndarray' else kind.lower()} {list(value.shape)} of "
            f"{value.dtype}"
        )
    if isinstance(value, Real | complex | str | bytes | list | tuple | dict | set | type(None)):
        text = repr(value)
        if len(text) <= SHOWN:
            return f"{text} ({kind})" if value is not None else text
    return f"a {kind}"


@functools.lru_cache(maxsize=64)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _fits(value: Any, one: str, function: Callable[..., Any]) -> bool:
    """Whether a value is of one type of a union, as it is written."""
    head = _head(one)
    if head == "int":
        return isinstance(value, Integral) and not isinstance(value, bool)
    if head == "float":
        return isinstance(value, Real) and not isinstance(value, bool)
    if head == "bool":
        return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
    if head == "str":
        return isinstance(value, str)
    if head in ("Path", "os.PathLike"):
        return isinstance(value, os.PathLike)
    if head == "None":
        return value is None
    if head == "Callable":
        return callable(value)
    if head in ("Mapping", "dict"):
        return isinstance(value, Mapping)
    if head in ("Sequence", "tuple"):
        return _is_list(value, one, function)
    return _is_of(value, head, function)


def _is_list(value: Any, one: str, function: Callable[..., Any]) -> bool:
    inner = list(_split(one[one.index("[") + 1 : -1], ","))
    # one value of a list of them, where they are text
    if isinstance(value, str):
        return _head(one) == "Sequence" and "str" in _union(inner[0])
    if not isinstance(value, list | tuple | Set | range):
        return False
    if _head(one) == "tuple":
        return len(value) == len(inner) and all(
            any(_fits(x, kind, function) for kind in _union(each))
            for x, each in zip(value, inner, strict=True)
        )
    return all(any(_fits(x, kind, function) for kind in _union(inner[0])) for x in value)


def _is_of(value: Any, name: str, function: Callable[..., Any]) -> bool:
    """Whether a value is of the class of that name; True where the name is of no class."""
    if name == "Any" or name == "object":
        return True
    found: Any = function.__globals__.get(name.partition(".")[0])
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    if isinstance(found, type):
        return isinstance(value, found)
    # A name for type checkers alone is not there; an alias is there and no class.
    return found is not None or name.rpartition(".")[2] in {
        kind.__name__ for kind in type(value).__mro__
    }


def is_unicode(text: str) -> bool:
    """Whether text can stand in a file: half of a surrogate pair, as JSON and names of files that
    are no UTF-8 give it, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@functools.lru_cache(maxsize=256)
def _union(annotation: str) -> tuple[str, ...]:
    return tuple(_split(annotation, "|"))


def _split(text: str, at: str) -> Iterator[str]:
    """The parts of an annotation between separators that stand in no bracket."""
    depth = start = 0
    for i, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == at and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()


def _head(one: str) -> str:
    return one.partition("[")[0]


def _listed(one: str) -> str:
    """A type in words: a list of ..., or its name."""
    if _head(one) not in ("Sequence", "tuple"):
        return f"a {one.rpartition('.')[2]}"
    inner = one[one.index("[") + 1 : -1]
    return (
        f"a list of {' or '.join(WORDS.get(kind, kind).split(' ')[-1] for kind in _union(inner))}"
    )
