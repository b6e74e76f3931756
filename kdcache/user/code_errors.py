"""The one door to code of users: what goes wrong in it is one line, which says what was called and
where it broke.

Datasets, models, collate functions and callbacks are other people's code, and so is every attribute
of theirs: a property may raise, an `eval()` may call `sys.exit`, a `str()` of an exception may
raise again. Every touch that we know of stands in a `users_code` block. `entrance`, around each
function of the package that is given such objects, looks at what still came through: an error on
whose way lies a line of the user's becomes one line too, and what arose in this package alone stays
as it is, for it is a bug of ours.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

from kdcache.errors import DataError, KDCacheError
from kdcache.process.signals import Interrupted
from kdcache.user.arguments import checked

P = ParamSpec("P")
R = TypeVar("R")
SHOWN = 300  # characters of a message
# Control characters, what turns the direction of text or begins a line, and halves of surrogates.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# the folder of the package, two above this file
OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
LIBRARIES = tuple(
    sorted(
        {
            os.path.abspath(path) + os.sep
            for path in (
                *(
                    sysconfig.get_paths()[name]
                    for name in ("stdlib", "platstdlib", "purelib", "platlib")
                ),
                *site.getsitepackages(),
                site.getusersitepackages(),
            )
        }
    )
)
NOT_THE_USERS = ("kdcache", "numpy", "torch")  # a SPEC may name them too, as torch.nn:Identity
# modules of BaseExceptions that are errors; SystemExit among them
PANICS = ("builtins", "pyo3_runtime")
WAY_OUT = "_kdcache_way_out"  # marks what a callback raised to end the call that it was given to
# folders of installed packages that a SPEC named: the user's, wherever they lie
_packages: set[str] = set()


class users_code:
    """A block that runs code of the user's: what it raises becomes one line, `what` and the error,
    of type `error`.

    Errors of this package pass, and so does an Interrupted, in whatever a library wrapped it, and
    the KeyboardInterrupt of a Ctrl-C. What is no Exception (a `sys.exit`, the panic of a library in
    Rust) is a plain KDCacheError: no misuse of ours. `but` names what else passes. `what` may be a
    function, called only when there is something to say. No `yield` belongs into the block: it
    would meet the GeneratorExit of a generator that is closed.
    """

    __slots__ = ("but", "error", "what")

    def __init__(
        self,
        what: str | Callable[[], str],
        error: type[KDCacheError] = DataError,
        *,
        but: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.what, self.error, self.but = what, error, but

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or passes(error) or isinstance(error, self.but):
            return
        what = self.what if isinstance(self.what, str) else self.what()
        raise (self.error if isinstance(error, Exception) else KDCacheError)(
            f"{what}: {describe(error)}"
        ) from error


def callback(name: str, function: Callable[P, R] | None) -> Callable[P, R] | None:
    """`function`, which a caller gave under that name, as a function whose errors are one line;
    None for None.

    A BaseException that is no `sys.exit` passes as it is: it is the caller's own way out.
    """
    if function is None:
        return None

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as e:
            if isinstance(e, Exception | SystemExit) and not passes(e):
                raise KDCacheError(f"{name}: {describe(e)}") from e
            setattr(e, WAY_OUT, True)
            raise

    return guarded


def entrance(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator of functions that are given objects of users: see the head of this file. Plain
    arguments are checked against their annotations (kdcache/user/arguments.py)."""
    # `__wrapped__` is the function itself
    return functools.wraps(function)(in_one_line(checked(function)))


def in_one_line(function: Callable[P, R]) -> Callable[P, R]:
    """`entrance` without a look at the arguments, for what is called at every batch."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as e:
            found = translated(e)
            if found is None:
                raise
            raise found from e

    return guarded


def translated(error: BaseException) -> KDCacheError | None:
    """The one line for an error on whose way lies a line of the user's; None for any other.
    Interrupted is raised.

    None too for a BaseException of a class of the user's own: nobody makes one but to get out of
    everything.
    """
    if passes(error) or not (isinstance(error, Exception) or type(error).__module__ in PANICS):
        return None
    called = next((frame.f_code for frame, _ in _frames(error) if is_users(frame.f_code)), None)
    if called is None:
        return None
    return KDCacheError(
        f"your {called.co_qualname.removesuffix('.__call__').replace('.<locals>', '')} raised "
        f"{describe(error)}"
    )


def passes(error: BaseException) -> bool:
    """Whether an error is none of the user's code: ours, or a Ctrl-C. Raises the Interrupted that
    it came of.
    """
    reraise_interrupt(error)
    if hasattr(error, WAY_OUT):
        return True
    if isinstance(error, KeyboardInterrupt):  # Python raises it under its own handler alone
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, KDCacheError)


def reraise_interrupt(error: BaseException) -> None:
    """Raise the Interrupted that `error` is or came of: a signal is no fault of the code that it
    fell into.

    Libraries wrap what they catch, as transformers does around its imports.
    """
    found = interrupted(error)
    if found is not None:
        raise found


def interrupted(error: BaseException) -> Interrupted | None:
    """The Interrupted that an error is or came of."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, Interrupted):
            return cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return None


def describe(error: BaseException) -> str:
    """An exception in one line: type, first line of its message, and the innermost line of the
    user's, or of a library, that it came through."""
    return f"{type(error).__name__}: {message(error)}{_place(error)}"


def message(error: BaseException) -> str:
    """The first line of what an exception says, whatever its `str()` does."""
    if isinstance(error, SystemExit):
        return (
            f"it ended the program, by sys.exit({error.code!r:.40}); what a file is to do when it "
            "is run as a script belongs under if __name__ == '__main__'"
        )
    try:
        text = str(error)
    except BaseException as e:
        text = f"(its message cannot be read: str() of it raised {type(e).__name__})"
    if not text and isinstance(error, MemoryError):
        text = "out of memory"
    return printable((text.strip().splitlines() or [""])[0][:SHOWN])


def printable(text: str) -> str:
    """`text` with its control characters, and what is no Unicode, escaped: a terminal obeys some of
    them.
    """
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def is_users(code: CodeType) -> bool:
    """Whether code is neither of this package nor of an installed library."""
    name = code.co_filename
    # <string>, <frozen importlib>; but what is typed in is the user's
    if name.startswith("<"):
        return name.startswith(("<stdin", "<ipython"))
    path = os.path.abspath(name)
    if any(path.startswith(folder) for folder in _packages):
        return True
    return not path.startswith((OURS, *LIBRARIES))


def is_the_users(package: str) -> None:
    """Code of this top-level package, which a SPEC named, is the user's although it may be
    installed.
    """
    module = sys.modules.get(package)
    if package in sys.stdlib_module_names or package in NOT_THE_USERS or module is None:
        return
    folders = list(getattr(module, "__path__", [])) or [getattr(module, "__file__", None) or ""]
    _packages.update(os.path.abspath(folder) for folder in folders if folder)


def _place(error: BaseException) -> str:
    """Where it was raised: in the innermost line of the user's; without one, in a library; nowhere
    if in ours.
    """
    frames = _frames(error)
    users = [found for found in frames if is_users(found[0].f_code)]
    for frame, line in (users or frames)[-1:]:
        path = frame.f_code.co_filename
        if users or not os.path.abspath(path).startswith(OURS):
            return f" ({printable(Path(path).name)}, line {line})"
    return ""


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith("<frozen")
    ]


def attribute(owner: Any, name: str, what: str, default: Any = None) -> Any:
    """`getattr(owner, name, default)` of an object of the user's, by that `what` in the error of a
    property.
    """
    with users_code(lambda: f"{what}: its {name} cannot be read"):
        return getattr(owner, name, default)
