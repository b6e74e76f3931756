"""What a dataset of the user's says of itself, read once, each answer checked: a name, its length,
its classes.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.data.classes import dataset_names
from kdcache.errors import DataError, UsageError
from kdcache.user.code_errors import attribute, printable, users_code

MOST_SAMPLES = 2**48  # of a cache (docs/format.md)
LONGEST_NAME = 200  # characters: a name stands in errors and on the terminal


@dataclass(frozen=True, slots=True)
class Attributes:
    """length: of the dataset. name, revision: text, "" unknown. class_names: [] unknown.
    tokenizer_identity: plain JSON without floats, or None. window: 0 none. token_lengths: int64,
    one for each sample, or None. own_key, own_view, collates: whether it has `key(i)`, `view(i,
    view, rng)`, `collate_fn(items)`."""

    length: int
    name: str
    revision: str
    class_names: list[str]
    tokenizer_identity: dict[str, Any] | None
    window: int
    token_lengths: npt.NDArray[np.int64] | None
    own_key: bool
    own_view: bool
    collates: bool


def read_attributes(dataset: Any) -> Attributes:
    """UsageError for what is no map-style dataset; DataError, naming the attribute, for one that is
    of no use.
    """
    where = f"dataset {type(dataset).__name__}"
    name = _text(dataset, "name", where) or type(dataset).__name__
    missing = [
        method for method in ("__len__", "__getitem__") if not hasattr(type(dataset), method)
    ]
    if missing:
        raise UsageError(
            f"dataset {name} has no {' and no '.join(missing)}; expected a map-style dataset"
        )
    where = f"dataset {name}"
    length = _length(dataset, where)
    return Attributes(
        length,
        name,
        _text(dataset, "revision", where),
        _class_names(dataset, name, where),
        _tokenizer(dataset, where),
        _window(dataset, where),
        _token_lengths(dataset, where, length),
        *(callable(attribute(dataset, method, where)) for method in ("key", "view", "collate_fn")),
    )


def _length(dataset: Any, where: str) -> int:
    try:
        with users_code(f"{where}: its len() cannot be taken"):
            length = len(dataset)
    except DataError as e:
        if isinstance(e.__cause__, TypeError | NotImplementedError):
            raise UsageError(
                f"{where} has no length ({e.__cause__}); expected a map-style dataset"
            ) from e
        raise
    if length == 0:
        raise DataError(f"{where} has length 0; there is nothing to read")
    if length > MOST_SAMPLES:
        raise DataError(f"{where} has length {length}; expected at most 2^48")
    return length


def _text(dataset: Any, name: str, where: str) -> str:
    found = attribute(dataset, name, where)
    with users_code(f"{where}: its {name} is no text"):
        text = "" if found is None else str(found)
    if len(text) > LONGEST_NAME or printable(text) != text:
        raise DataError(
            f"{where}: its {name} is {printable(text[:40])!r}{'...' * (len(text) > 40)}, "
            f"{len(text)} characters; expected printable text of at most {LONGEST_NAME}"
        )
    return text


def _class_names(dataset: Any, name: str, where: str) -> list[str]:
    with users_code(f"{where}: its class names cannot be read"):
        return dataset_names(dataset, name)


def _tokenizer(dataset: Any, where: str) -> dict[str, Any] | None:
    found = attribute(dataset, "tokenizer_identity", where)
    if found is None:
        return None
    try:
        plain = isinstance(found, dict) and json.loads(json.dumps(found, allow_nan=False)) == found
    except (TypeError, ValueError, RecursionError):
        plain = False
    if not plain or _has_float(found):
        raise DataError(
            f"{where}: its tokenizer_identity is {_seen(found)}; expected a dict of text and "
            "integers, such as fingerprint, template and packing"
        )
    return dict(found)


def _has_float(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_float, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float)


def _window(dataset: Any, where: str) -> int:
    found = attribute(dataset, "window", where)
    try:
        window = 0 if found is None else operator.index(found)
    except TypeError:
        window = -1
    if window < 0 or isinstance(found, bool):
        raise DataError(
            f"{where}: its window is {_seen(found)}; expected the most tokens of a sample, or 0 "
            "for none"
        )
    return window


def _token_lengths(dataset: Any, where: str, length: int) -> npt.NDArray[np.int64] | None:
    found = attribute(dataset, "token_lengths", where)
    if found is None:
        return None
    try:
        array = np.asarray(found)
    # what numpy raises over a stranger's object is not foreseeable
    except Exception:
        array = np.zeros(0)
    if array.shape != (length,) or array.dtype.kind not in "iu" or int(array.min()) < 0:
        raise DataError(
            f"{where}: its token_lengths are {array.dtype} {list(array.shape)}; expected the "
            f"tokens of each of its {length} samples, as integers"
        )
    return array.astype(np.int64)


def _seen(value: Any) -> str:
    with users_code(f"the repr() of a {type(value).__name__}"):
        return printable(repr(value)[:80])
