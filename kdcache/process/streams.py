"""Standard streams that may go away: a closed pipe, a full disk. What is said then is lost, and the
work goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class Forgiving:
    """A text stream like `stream`, but that what it cannot write is lost. lost: the first error of
    that, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """All of `text`, or nothing once something was lost."""
        if self.lost is None:
            try:
                return self._stream.write(text)
            # the encoding of the stream: what it cannot hold is escaped
            except UnicodeError:
                encoding = self._stream.encoding or "utf-8"
                return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as e:  # ValueError: of a closed file
                self.lost = e
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as e:
                self.lost = e

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hold() -> None:
    """Make the standard streams of a program such that nothing said on them can end it.

    A descriptor that is closed is opened on nothing: else the next file, a shard say, would get its
    number, and what a library in C prints on standard error would go into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when Python started
            stream = open(os.devnull, "w", encoding="utf-8")
        if not isinstance(stream, Forgiving):
            setattr(sys, name, Forgiving(stream))


def lost(stream: Any) -> OSError | ValueError | None:
    """What a stream lost text by, if it did."""
    return stream.lost if isinstance(stream, Forgiving) else None
