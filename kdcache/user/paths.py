"""The one door for paths: a place on this machine's file systems, or an error that says why it is
none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kdcache.errors import NotBuilt, UsageError

# Two letters or more before the colon: one is a drive of Windows. `Path` makes one slash of two.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux and macOS (there 1,023)


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """`path`, which an error calls `what`, with its ~ spelt out.

    NotBuilt for an address with a scheme (s3://, hf://, http://, file:// ...): it would otherwise
    become a local folder of that name. UsageError for what can be no path: nothing at all, another
    type, a NUL, the home of nobody.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise UsageError(f"{what} is a {type(path).__name__}; expected a path")
    text = os.fspath(path)
    if not text:
        raise UsageError(f"{what} is empty; expected a path ('.' is the folder one is in)")
    if "\0" in text:
        raise UsageError(f"{what} {text!r} has a NUL in it; no path has")
    encoded = text.encode(errors="replace")
    if len(encoded) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in encoded.split(b"/")):
        raise UsageError(
            f"{what} {text[:40]}... has {len(text)} characters; a path has at most {LONGEST_PATH}, "
            f"a name in it {LONGEST_NAME}"
        )
    scheme = SCHEME.match(text)
    if scheme is not None:
        raise NotBuilt(
            f"{what} {text}: {scheme[1]}:// is no folder of this machine, and object stores and "
            "web addresses are not built yet; copy it to a disk, or mount it (to a folder really "
            "of that name: its absolute path)"
        )
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(path)
    except RuntimeError as e:
        raise UsageError(f"{what} {text}: {e}") from e
