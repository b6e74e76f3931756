"""Data SPECs: a name on the command line -> a dataset object, and what was given as the samples of
both stages.

A new SPEC is a function and an entry in SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from kdcache.data.arrays import digits, npz
from kdcache.data.code_specs import call, resolve_spec
from kdcache.data.images import image_folder
from kdcache.data.samples import Samples
from kdcache.data.text import text_windows
from kdcache.data.views import seeded_generators
from kdcache.errors import NotBuilt, UsageError

# SPEC prefix -> what stands after its colon ("" nothing), and the function that gets that and the
# --data-arg's.
SOURCES: dict[str, tuple[str, Callable[..., Any]]] = {
    "digits": ("", digits),
    "imagefolder": ("PATH", image_folder),
    "npz": ("PATH", npz),
    "text": ("GLOB", text_windows),
}
# arguments of imagefolder:, any of which says all
PREPARING = ("size", "mean", "std", "preprocessing")
NOT_BUILT = ("jsonl", "parquet", "dataset")
CODE_SPECS = ("file.py:name", "package.module:name")


def known_specs() -> list[str]:
    """How every data SPEC is written."""
    return [
        *(f"{prefix}:{rest}" if rest else prefix for prefix, (rest, _) in SOURCES.items()),
        *CODE_SPECS,
    ]


def load_data(
    spec: str, args: Mapping[str, Any] | None = None, prepared: Callable[[], str] | None = None
) -> Any:
    """The dataset that `spec` names, made with `args` (the parsed --data-arg's).

    prepared: gives, for pictures whose `args` do not say it, how they are to be prepared (see
    data/preprocessing.py; "" unknown). `file.py:name` and `package.module:name` are a dataset, or a
    class or function that is called with `args`. UsageError for an unknown SPEC or argument,
    NotBuilt for a SPEC that is planned and not there yet.
    """
    prefix, _, rest = spec.partition(":")
    if prefix in SOURCES:
        placeholder, function = SOURCES[prefix]
        if bool(rest) != bool(placeholder):
            raise UsageError(f"data {spec}: expected {prefix}:{placeholder}".removesuffix(":"))
        if prefix == "imagefolder" and prepared is not None and not {*PREPARING} & {*(args or ())}:
            args = {**(args or {}), **({"preprocessing": text} if (text := prepared()) else {})}
        return call(
            partial(function, rest) if placeholder else function, args or {}, where=f"data {prefix}"
        )
    if prefix in NOT_BUILT:
        raise NotBuilt(f"data {prefix}: is not built yet; there are {', '.join(known_specs())}")
    # what a file makes as it runs is then the same in every process
    with seeded_generators(0, 0, 0):
        found = resolve_spec(spec, SOURCES, known_specs(), "data")
    if isinstance(found, type) or (callable(found) and not hasattr(found, "__getitem__")):
        found = call(found, args or {}, where=f"data {spec}")
    elif args:
        raise UsageError(
            f"data {spec} is a {type(found).__name__}, not a function; it takes no --data-arg"
        )
    if not hasattr(found, "__getitem__"):
        raise UsageError(
            f"data {spec} gave a {type(found).__name__}; expected a dataset (__len__, __getitem__)"
        )
    return found


def as_samples(
    data: Any,
    args: Mapping[str, Any] | None = None,
    *,
    seed: int | None = 0,
    labels: bool = True,
    prepared: Callable[[], str] | None = None,
) -> Samples | None:
    """The samples of a SPEC with its `args`, of a dataset, or `Samples` as they are; None for None.

    seed: decides the views; None takes any. labels: False leaves the labels unread. prepared: as
    `load_data` takes it. UsageError for `args` without a SPEC, and for `Samples` of another seed.
    """
    if isinstance(data, str):
        data = load_data(data, args, prepared)
    elif args:
        raise UsageError(
            "data arguments are given, but the data is an object, or there is none; they belong to "
            "a SPEC"
        )
    if not isinstance(data, Samples):
        return None if data is None else Samples(data, seed=seed or 0, labels=labels)
    if seed is not None and data.seed != seed:
        raise UsageError(
            f"the Samples make their views with seed {data.seed}; the seed here is {seed}: give "
            f"Samples(dataset, seed={seed}), or the dataset itself"
        )
    return (
        data if labels or not data.labels else Samples(data.dataset, seed=data.seed, labels=False)
    )
