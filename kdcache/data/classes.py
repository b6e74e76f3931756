"""Whose classes: the names that data and models have for them, and whether two lists of names are
of one order.

Which number a class has is a convention of whoever made the data or the model. Where both sides
name their classes the names are compared; where the two have not one name in common (WordNet ids
against English words) there is nothing to compare, which is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.errors import FieldDifference, IdentityMismatch, UsageError

CLASS_NAMES = "class_names"  # --accept it; and the code of the warning
SHOWN = 4  # names of a list in a message
DEFAULT = re.compile(r"LABEL_\d+")  # what transformers calls a class that nobody named


@dataclass(frozen=True, slots=True)
class Difference:
    """How two lists of class names differ, in a sentence; not `comparable` where they have no name
    in common.
    """

    text: str
    comparable: bool


def dataset_names(dataset: Any, where: str) -> list[str]:
    """The class names of a dataset, [] where it has none.

    In this order: its own `class_names` (a list, or a dict number -> name), the names of a
    ClassLabel feature (of Hugging Face's datasets), torchvision's `classes`, those of what a torch
    Subset is a part of. UsageError for `class_names` that are no list of names.
    """
    given = getattr(dataset, "class_names", None)
    if given is not None:
        found = _listed(given)
        if found is None:
            raise UsageError(
                f"dataset {where}: class_names is a {type(given).__name__} ({given!r:.60}); "
                "expected a list of names, the first that of class 0"
            )
        return found
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        for name in ("labels", "label"):
            feature = features.get(name)
            names = getattr(feature, "names", None) or getattr(
                getattr(feature, "feature", None), "names", None
            )
            if found := _listed(names):
                return found
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
        return list(classes)
    inner = getattr(dataset, "dataset", None)
    return dataset_names(inner, where) if inner is not None and hasattr(dataset, "indices") else []


def model_names(module: Any) -> list[str]:
    """The class names that a module carries, [] where it has none, or only transformers' LABEL_0,
    LABEL_1, ...

    Its own `class_names`, `id2label` of a Hugging Face config, `label_names` of timm's
    pretrained_cfg.
    """
    config, cfg = getattr(module, "config", None), getattr(module, "pretrained_cfg", None)
    for given in (
        getattr(module, "class_names", None),
        getattr(config, "id2label", None),
        cfg.get("label_names") if isinstance(cfg, Mapping) else None,
    ):
        found = _listed(given)
        if found and not all(DEFAULT.fullmatch(name) for name in found):
            return found
    return []


def compare(
    first: Sequence[str], second: Sequence[str], *, of: tuple[str, str]
) -> Difference | None:
    """How the class names of two, called as `of` says ("the teacher", "the data"), differ; None
    where they do not, or where one has none.

    Names are equal whatever their case and whatever stands between their words (`golden_retriever`,
    `Golden Retriever`), and where one of several, set apart by commas, is the same (`tench, Tinca
    tinca`, `tench`).
    """
    if not first or not second:
        return None
    a, b = _forms(first, second)
    if len(a) == len(b) and all(x & y for x, y in zip(a, b, strict=True)):
        return None
    known_a, known_b = set().union(*a), set().union(*b)
    if known_a & known_b or len(a) != len(b):
        return Difference(_difference(first, second, a, b, of, (known_a, known_b)), True)
    return Difference(
        f"the class names of {of[0]} ({_few(first)}) and {of[1]} ({_few(second)}) have not one in "
        f"common, so that nobody can tell whether they are in one order; class 0 is {first[0]!r} "
        f"and {second[0]!r}, is that one class?",
        False,
    )


def check(
    first: Sequence[str],
    second: Sequence[str],
    *,
    of: tuple[str, str],
    accept: Sequence[str] | None,
    strict: bool = False,
) -> tuple[list[str], list[str]]:
    """(accepted, warnings) of comparing the class names of two: [CLASS_NAMES] if they differ and
    `accept` names it.

    IdentityMismatch if they differ otherwise; names with nothing in common are a warning, unless
    `strict`. accept None: of a command that takes none.
    """
    found = compare(first, second, of=of)
    if found is None:
        return [], []
    if accept is not None and CLASS_NAMES in accept:
        return [CLASS_NAMES], [f"{found.text} Accepted."] if found.comparable else [found.text]
    if not found.comparable and not strict:
        return [], [found.text]
    raise IdentityMismatch(
        f"{found.text}; give both the same classes in the same order{_harmless(accept)}",
        [FieldDifference(CLASS_NAMES, list(first), list(second))],
    )


def check_number(
    names: Sequence[str], num_classes: int, *, of: tuple[str, str], accept: Sequence[str] | None
) -> list[str]:
    """[CLASS_NAMES] if data that names its classes names another number of them than a model has,
    and `accept` names it. IdentityMismatch if it does not."""
    if not names or len(names) == num_classes:
        return []
    if accept is not None and CLASS_NAMES in accept:
        return [CLASS_NAMES]
    cut = (
        f" Where the last ones are padding: --classes {len(names)}."
        if len(names) < num_classes
        else ""
    )
    raise IdentityMismatch(
        f"{of[1]} names {len(names)} classes ({_few(names)}), {of[0]} gives {num_classes} logits: "
        f"are the classes numbered alike?{cut}{_harmless(accept)}",
        [FieldDifference(CLASS_NAMES, num_classes, len(names))],
    )


def _harmless(accept: Sequence[str] | None) -> str:
    return "" if accept is None else f"; a difference known to be harmless: --accept {CLASS_NAMES}"


def _difference(
    first: Sequence[str],
    second: Sequence[str],
    a: Sequence[set[str]],
    b: Sequence[set[str]],
    of: tuple[str, str],
    known: tuple[set[str], set[str]],
) -> str:
    """The first class that differs, and which names only one of the two has."""
    wrong = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if not x & y]
    said = []
    if len(a) != len(b):
        said.append(f"{of[0]} has {len(a)} classes, {of[1]} {len(b)}")
    if wrong:
        said.append(
            f"class {wrong[0]} is {first[wrong[0]]!r} for {of[0]} and {second[wrong[0]]!r} for "
            f"{of[1]}"
            + (f" ({len(wrong)} of {min(len(a), len(b))} differ)" if len(wrong) > 1 else "")
        )
    for names, forms, who, other in ((first, a, of[0], known[1]), (second, b, of[1], known[0])):
        if only := [name for name, form in zip(names, forms, strict=True) if not form & other]:
            said.append(f"only {who} has {_few(only)}")
    return f"the classes are not the same: {'; '.join(said)}"


def _forms(*lists: Sequence[str]) -> list[list[set[str]]]:
    """For each name of each list what it is compared by: itself, and its words, whole and between
    commas, but for words that belong to several names of a list, as those of C and C++ do."""
    plain = [[_words(name) for name in names] for names in lists]
    shared: set[str] = set()
    for names, words in zip(lists, plain, strict=True):
        owners: dict[str, set[str]] = {}
        for name, forms in zip(names, words, strict=True):
            for form in forms:
                owners.setdefault(form, set()).add(name.casefold())
        shared |= {form for form, names_of in owners.items() if len(names_of) > 1}
    return [
        [
            {f"={name.casefold()}", *(forms - shared)}
            for name, forms in zip(names, words, strict=True)
        ]
        for names, words in zip(lists, plain, strict=True)
    ]


def _words(name: str) -> set[str]:
    parts = [name, *(name.split(",") if "," in name else ())]
    return {
        form for part in parts if (form := " ".join(re.split(r"[\W_]+", part.casefold())).strip())
    }


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (
        f", ... {len(names)} in all" if len(names) > SHOWN else ""
    )


def _listed(given: Any) -> list[str] | None:
    """A list of names, from one or from a dict number -> name; None for anything else."""
    if isinstance(given, Mapping):
        try:
            numbered = sorted((int(number), str(name)) for number, name in given.items())
        except (TypeError, ValueError):
            return None
        return (
            [name for _, name in numbered]
            if [n for n, _ in numbered] == list(range(len(numbered)))
            else None
        )
    if isinstance(given, str) or not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        return None
    return [str(given[i]) for i in range(len(given))]
