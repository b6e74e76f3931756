"""The numbers and names that decide a training run, checked at the door and written to run.toml."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import torch

from kdcache.errors import NotBuilt, UsageError, near
from kdcache.loss.arguments import check_integer, check_number, check_type
from kdcache.loss.divergences import Divergence
from kdcache.loss.engines import check_engine
from kdcache.loss.kd_linear_loss import memory_size
from kdcache.models.checks import check_convention
from kdcache.student.match import Match, parse_match

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALPHA = 0.5  # the weight of the soft loss where there are labels beside it
# sign of better
BEST_BY = {"eval_loss": -1, "eval_perplexity": -1, "eval_accuracy": 1, "eval_accuracy_top5": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Options of `train_student` that are plain values; UsageError for one that cannot be."""

    temperature: float | None
    k: int | None
    classes: int | None
    alpha: float | None  # None: as `default_weights` says
    ce_weight: float | None
    kd_weight: float | None
    divergence: str
    beta: float | None
    tail: str
    match: tuple[str, ...]
    engine: str
    logits_memory: str | None
    epochs: float | None
    max_steps: int | None
    batch_size: int
    micro_batch_size: int | None
    optimizer: str
    lr: float
    weight_decay: float | None
    warmup: float
    clip: float
    precision: str
    compile: bool
    device: str
    seed: int
    shuffle: bool
    deterministic: bool
    eval_every: int | None
    save_every: int | None
    best_by: str | None
    accept: tuple[str, ...]
    rows: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        # numpy's scalars, which have arithmetic of their own
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), np.generic):
                object.__setattr__(self, field.name, value.item())
        if (self.epochs is None) == (self.max_steps is None):
            raise UsageError("give either epochs or max_steps: how long to train")
        check_convention(self.rows)
        _named("precision", self.precision, PRECISIONS)
        if self.best_by is not None:
            _named("best_by", self.best_by, BEST_BY)
        Divergence(self.divergence, self.beta, self.tail)
        if self.tail == "sampled":
            raise NotBuilt(
                "tail 'sampled' needs draws of the teacher, and caches of kind 'sampled' are not "
                "built yet; "
                "use tail 'bucket'"
            )
        check_engine(self.engine, torch.device(self.device))
        if self.logits_memory is not None:
            memory_size(self.logits_memory)
        if self.precision == "float16" and torch.device(self.device).type == "cpu":
            raise UsageError(
                "precision float16 is not available on the CPU; use bfloat16 or float32"
            )
        for name in ("lr", "weight_decay", "warmup", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} is {value}; expected a number of at least 0")
        for name in ("eval_every", "save_every", "k", "classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; expected 0 <= seed < 2^63")
        if (self.ce_weight is None) != (self.kd_weight is None):
            raise UsageError(
                f"ce_weight is {self.ce_weight} and kd_weight is {self.kd_weight}; give both, or "
                "neither "
                "and alpha"
            )
        weights = self.weight_ce, self.weight_kd
        if not (self.alpha is None or 0 <= self.alpha <= 1) or not all(
            0 <= weight < math.inf for weight in weights
        ):
            raise UsageError(
                f"alpha is {self.alpha}, ce_weight {self.ce_weight}, kd_weight {self.kd_weight}; "
                "expected "
                "alpha from 0 to 1 and weights of at least 0"
            )
        if not (self.weight_ce or self.weight_kd or self.match):
            raise UsageError("every weight of the loss is 0; there is nothing to learn from")

    def _check_types(self) -> None:
        for name in ("lr", "warmup", "clip"):
            check_number(name, getattr(self, name))
        for name in (
            "alpha",
            "temperature",
            "ce_weight",
            "kd_weight",
            "beta",
            "epochs",
            "weight_decay",
        ):
            check_number(name, getattr(self, name), optional=True)
        for name in ("batch_size", "seed"):
            check_integer(name, getattr(self, name))
        for name in ("k", "classes", "max_steps", "micro_batch_size", "eval_every", "save_every"):
            check_integer(name, getattr(self, name), optional=True)
        for name in ("divergence", "tail", "engine", "optimizer", "precision"):
            check_type(name, getattr(self, name), str, "a name")
        check_type("best_by", self.best_by, (str, NoneType), "a name")
        for name in ("compile", "shuffle", "deterministic"):
            check_type(name, getattr(self, name), bool, "True or False")

    @property
    def weight_ce(self) -> float:
        return (
            1 - (ALPHA if self.alpha is None else self.alpha)
            if self.ce_weight is None
            else self.ce_weight
        )

    @property
    def weight_kd(self) -> float:
        return (
            (ALPHA if self.alpha is None else self.alpha)
            if self.kd_weight is None
            else self.kd_weight
        )

    @property
    def matches(self) -> list[Match]:
        return [parse_match(text) for text in self.match]

    def table(self) -> dict[str, Any]:
        """Flag name -> value, without what is left at None: the options as run.toml holds them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }


def texts(values: Sequence[Any]) -> tuple[str, ...]:
    """A repeatable option as text; a lone string is one value."""
    return (values,) if isinstance(values, str) else tuple(str(value) for value in values)


def _named(what: str, value: str, known: dict[str, Any]) -> None:
    if value not in known:
        raise UsageError(f"{what} {value!r} is unknown{near(value, known)}")
