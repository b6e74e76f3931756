"""Whose cache it is: the data, the tokenizer and the teacher, compared field by field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.cache.canonical import dumps
from kdcache.errors import FieldDifference, IdentityMismatch, UsageError, did_you_mean


class _Absent:
    """A field that is not there, which null is not."""

    def __repr__(self) -> str:
        return "none"


ABSENT = _Absent()
# Of later versions, and known of some models only: compared where both sides have them.
WHERE_KNOWN = ("teacher.class_names", "teacher.tokenizer", "data.preprocessing")
# Of later versions: where the cache has none, there is nothing to compare.
LATER = ("data.inputs", "teacher.config", "teacher.modules")
# what --accept NAME stands for
ALIASES = {"class_names": ("data.class_names", "teacher.class_names")}
SHOWN = 12  # differences that are listed
PARTS = ("data", "tokenizer", "teacher", "activation")
Document = dict[str, Any]
# What is read somewhere has these types wherever it stands; other fields are free.
TYPES: dict[str, type | list[type]] = {
    "data.name": str,
    "data.revision": str,
    "data.num_samples": int,
    "data.class_names": [str],
    "data.window": int,
    "data.probe": [str],
    "tokenizer.fingerprint": str,
    "teacher.weights": str,
    "teacher.dtype": str,
    "teacher.adapters": str,
    "teacher.preprocessing": str,
    "teacher.num_classes": int,
    "teacher.config": dict,
    "teacher.modules": dict,
    "teacher.class_names": [str],
    "teacher.tokenizer": str,
    "data.preprocessing": str,
    "teacher.cut_from": int,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The document that says whose answers a cache holds; plain JSON values only (no floats).

    data: name, revision, num_samples, class_names, window, probe (keys of evenly spaced samples, 16
    hex digits each). tokenizer: None, or fingerprint, template, packing. teacher: weights, dtype,
    adapters, preprocessing, num_classes, class_names where it has some, config and modules (what
    turns the same weights into other answers), and cut_from, its logits, where some of them are no
    classes. UsageError for a field of another type.
    """

    data: Document
    teacher: Document
    tokenizer: Document | None = None
    activation: str = "softmax"

    def __post_init__(self) -> None:
        for part in ("data", "teacher"):
            if not isinstance(getattr(self, part), dict):
                raise UsageError(
                    f"identity.{part}: expected an object, found {getattr(self, part)!r:.80}"
                )
        if self.tokenizer is not None and not isinstance(self.tokenizer, dict):
            raise UsageError(
                f"identity.tokenizer: expected an object or null, found {self.tokenizer!r:.80}"
            )
        for name, kind in TYPES.items():
            part, _, key = name.partition(".")
            value = (getattr(self, part) or {}).get(key, ABSENT)
            good = value is ABSENT or (
                type(value) is kind
                if isinstance(kind, type)
                else isinstance(value, list) and set(map(type, value)) <= set(kind)
            )
            if not good:
                expected = kind.__name__ if isinstance(kind, type) else "list of str"
                raise UsageError(f"identity.{name}: expected {expected}, found {value!r:.80}")
        if self.activation not in ("softmax", "sigmoid"):
            raise UsageError(
                f"identity.activation is {self.activation!r}; expected 'softmax' or 'sigmoid'"
            )
        try:
            dumps(self.to_json())
        except ValueError as e:
            raise UsageError(f"identity: {e}") from e

    def to_json(self) -> Document:
        return {part: getattr(self, part) for part in PARTS}

    @classmethod
    def from_json(cls, doc: Any, where: str = "identity") -> Identity:
        """The identity in a JSON value; UsageError for anything else."""
        if not isinstance(doc, dict) or set(doc) != set(PARTS):
            raise UsageError(f"{where}: expected an object with the keys {sorted(PARTS)}")
        return cls(**doc)


def untold(cached: Identity, given: Identity) -> list[str]:
    """Fields that are not compared, because the cache was made before they were kept."""
    parts = [(name, *name.split(".")) for name in LATER]
    return [
        name
        for name, part, key in parts
        if key in getattr(given, part) and key not in getattr(cached, part)
    ]


def difference(
    cached: Identity, given: Identity, parts: Iterable[str] = PARTS
) -> list[FieldDifference]:
    """The fields of the named parts in which two identities differ, as `part.field`, or
    `part.field.inner ...`.

    What a cache does not say because it was made before (`LATER`) does not differ.
    """
    out: list[FieldDifference] = []
    for part in parts:
        a, b = getattr(cached, part), getattr(given, part)
        if not (isinstance(a, dict) and isinstance(b, dict)):
            out += [FieldDifference(part, a, b)] if a != b else []
            continue
        for key in sorted({*a, *b}):
            field = f"{part}.{key}"
            if (key in a or field not in LATER) and not (
                field in WHERE_KNOWN and None in (a.get(key), b.get(key))
            ):
                out += _apart(field, a.get(key), b.get(key))
    return out


def _apart(field: str, cached: Any, given: Any) -> list[FieldDifference]:
    """Where two JSON values differ: the innermost fields of objects."""
    if cached == given and type(cached) is type(given):
        return []
    if isinstance(cached, dict) and isinstance(given, dict):
        keys = sorted({*cached, *given})
        return [
            d
            for key in keys
            for d in _apart(f"{field}.{key}", cached.get(key, ABSENT), given.get(key, ABSENT))
        ]
    if isinstance(cached, list) and isinstance(given, list):
        return [_lists(field, cached, given)]
    return [FieldDifference(field, cached, given)]


def require_same(
    cached: Identity,
    given: Identity,
    *,
    accept: Sequence[str] = (),
    parts: Iterable[str] = PARTS,
    where: str = "cache",
) -> list[str]:
    """The differing fields that `accept` names; IdentityMismatch listing the others, UsageError for
    a foreign name.
    """
    parts = tuple(parts)
    accept = [field for name in accept for field in ALIASES.get(name, (name,))]
    found = difference(cached, given, parts)
    known = (
        {
            f"{part}.{key}"
            for part in PARTS
            for doc in (getattr(cached, part), getattr(given, part))
            if isinstance(doc, dict)
            for key in doc
        }
        | {*PARTS, *WHERE_KNOWN}
        | {d.field for d in found}
    )
    for name in accept:
        if name not in known:
            raise UsageError(
                f"--accept {name}: no such field of an identity{did_you_mean(name, known)}"
            )
    refused = [
        d
        for d in found
        if not any(d.field == name or d.field.startswith(f"{name}.") for name in accept)
    ]
    if refused:
        lines = "".join(f"\n  {line}" for line in first_lines(refused))
        # Several at once are another dataset or teacher; other keys are other samples, which no
        # name makes harmless.
        if len(refused) == 1 and refused[0].field != "data.probe":
            lines += f"\n  a difference known to be harmless: --accept {refused[0].field}"
        raise IdentityMismatch(
            f"{where}: not of this data, tokenizer or teacher; fields that differ:{lines}", refused
        )
    return [d.field for d in found]


def first_lines(found: Sequence[FieldDifference]) -> list[str]:
    """Differences in a line each, and how many more there are: another model differs in every
    module.
    """
    more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return [*map(str, found[:SHOWN]), *more]


def _lists(field: str, cached: list[Any], given: list[Any]) -> FieldDifference:
    """Two long lists said by their first difference."""
    if len(cached) != len(given):
        # a number says little where a name is missing
        named = field.endswith("class_names")
        only = [
            [x for x in a if x not in b][:4] if named else []
            for a, b in ((cached, given), (given, cached))
        ]
        return FieldDifference(
            field,
            *(
                f"{len(entries)} entries" + (f", of them alone {few}" if few else "")
                for entries, few in zip((cached, given), only, strict=True)
            ),
        )
    at = [i for i, (x, y) in enumerate(zip(cached, given, strict=True)) if x != y]
    first = at[0]
    return FieldDifference(
        field,
        f"{cached[first]!r} at {first}",
        f"{given[first]!r} there; {len(at)} of {len(cached)} differ",
    )
