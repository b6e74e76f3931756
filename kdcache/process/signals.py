"""SIGINT and SIGTERM as errors of ours, raised where nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from kdcache.errors import KDCacheError

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KDCacheError):
    """A signal ended the work; exits with 128 + its number, as a shell reports it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum, self.exit_code = signum, 128 + signum

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        # from a worker process to the one that waits for it
        return Interrupted, (str(self), self.signum)


class Signals:
    """While it is entered, SIGINT and SIGTERM raise Interrupted; after `defer()`, the first of them
    only at `check()`.

    A second signal (`again`) raises at once. Only the main thread can catch signals; elsewhere this
    does nothing.
    """

    def __init__(self, message: str) -> None:
        self.message, self.pending, self.again = message, 0, False
        self._deferred = False
        self._before: dict[int, Any] = {}

    def defer(self) -> None:
        self._deferred = True

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.pending:
            raise Interrupted(f"{signal.Signals(self.pending).name}: {self.message}", self.pending)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._caught) for signum in CAUGHT}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def _caught(self, signum: int, frame: FrameType | None) -> None:
        self.again, self.pending = bool(self.pending), signum
        if self.again or not self._deferred:
            self.check()
