"""The teacher, the data and the device of a command, given as SPECs or as objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.data.samples import Samples
from kdcache.data.sources import load_data
from kdcache.errors import UsageError, near
from kdcache.models.model import DTYPES, Model, load_model
from kdcache.user.guard import attribute, users_code


def pick_teacher(
    teacher: Any,
    *,
    args: Mapping[str, Any] | None,
    weights: str | Path | None,
    seed: int,
    dtype: str | None,
) -> Model:
    """The model of a SPEC, or around a module given; `dtype` casts the weights (of a copy, if a
    module was given).
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown{near(dtype, DTYPES)}")
    if isinstance(teacher, str):
        return load_model(teacher, args=args or {}, weights=weights, seed=seed, dtype=dtype)
    if args or weights:
        raise UsageError(
            "teacher_args and teacher_weights go with a teacher SPEC; a module was given"
        )
    if isinstance(teacher, Model):
        return dataclasses.replace(teacher, module=_cast(teacher.module, dtype))
    if not isinstance(teacher, nn.Module):
        raise UsageError(
            f"teacher is a {type(teacher).__name__}; expected a SPEC or a torch.nn.Module"
        )
    name = type(teacher).__name__
    classes = attribute(teacher, "num_classes", f"the teacher ({name})")
    return Model(
        _cast(teacher, dtype),
        name,
        f"the {name} given",
        classes if type(classes) is int else None,
        "",
        None,
    )


def _cast(module: nn.Module, dtype: str | None) -> nn.Module:
    if dtype is None or all(
        p.dtype == DTYPES[dtype] for p in module.parameters() if p.is_floating_point()
    ):
        return module
    with users_code(f"the teacher ({type(module).__name__}) cannot be copied and cast to {dtype}"):
        return copy.deepcopy(module).to(DTYPES[dtype])


def pick_samples(
    data: Any,
    args: Mapping[str, Any] | None,
    seed: int,
    labels: bool = True,
    prepared: Callable[[], str] | None = None,
) -> Samples:
    """The samples of a SPEC, or of a dataset given, whose labels are left unread if `labels` is
    False; `prepared` as
    `load_data` takes it. UsageError for `Samples` of another seed."""
    if isinstance(data, str):
        return Samples(load_data(data, args or {}, prepared), seed=seed, labels=labels)
    if args:
        raise UsageError("data_args go with a data SPEC; a dataset was given")
    if not isinstance(data, Samples):
        return Samples(data, seed=seed, labels=labels)
    if data.seed != seed:
        raise UsageError(
            f"the samples given make their views with seed {data.seed}; the seed here is {seed}"
        )
    return data if labels or not data.labels else Samples(data.dataset, seed=seed, labels=False)
