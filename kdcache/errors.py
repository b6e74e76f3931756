"""Every error a user can cause or meet has one base class; the command line prints its line and
exits with its code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class KDCacheError(Exception):
    """Base of all errors of this package; the message says where, what was found, what was
    expected, what to do.
    """

    exit_code = 1


class CacheCorrupt(KDCacheError):
    """Bytes of a cache are not what its header, manifest or commit record promise."""


class CacheIncomplete(KDCacheError):
    """A cache lacks shards or a manifest: its dump has not finished."""


class CacheExists(KDCacheError):
    """Something stands already at the place where a cache or run was to be created."""


class SpecMismatch(KDCacheError):
    """A cache with another spec stands at the place; the message lists the fields that differ."""


class DataError(KDCacheError):
    """A dataset, a label or a teacher output cannot be used; the message names the sample or
    record.
    """


class UsageError(KDCacheError, ValueError):
    """An option, SPEC or argument that cannot be used as given."""

    exit_code = 2


class NotBuilt(UsageError):
    """A name the design knows and this version refuses."""


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """One field in which two documents differ."""

    field: str
    cached: Any
    given: Any

    def __str__(self) -> str:
        return f"{self.field}: cache has {short(self.cached)}, given is {short(self.given)}"


class IdentityMismatch(KDCacheError):
    """The cache belongs to other data, another tokenizer or another teacher; `fields` says which
    fields differ.
    """

    def __init__(self, message: str, fields: list[FieldDifference]) -> None:
        super().__init__(message)
        self.fields = fields


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' (did you mean "x"?)'` for the closest of `known`, or the whole list when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f" (did you mean {' or '.join(repr(c) for c in close)}?)"
    return f" (known: {', '.join(names[:40])}{', ...' if len(names) > 40 else ''})" if names else ""


def short(value: Any, limit: int = 90) -> str:
    """A value as an error shows it, in at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
