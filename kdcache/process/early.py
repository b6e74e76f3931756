"""Signals before the first command runs: while Python imports, nothing is half done, and nothing
may be raised.

An exception in the midst of an import is wrapped by the library whose import it was, or ends the
process in C. So until a command has begun its work (kdcache/process/signals.py) SIGINT and SIGTERM
end the process here, in one line. Imports next to nothing: whatever is imported before `at_once` is
called has no such protection.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


def at_once() -> dict[int, Any]:
    """Let SIGINT and SIGTERM end this program; one that whoever started it ignores stays ignored.

    The handlers that they had, for `put_back`. Does nothing but in the main thread.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                before[signum] = signal.signal(signum, _end)
    return before


def put_back(handlers: dict[int, Any]) -> None:
    """Undo `at_once`."""
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def _end(signum: int, frame: FrameType | None) -> None:
    try:
        os.write(
            2,
            f"Error: {signal.Signals(signum).name}: interrupted before anything was begun\n".encode(),
        )
    except OSError:
        pass  # nobody listens
    os._exit(128 + signum)
