"""What a run does: options as they were given, checked, and the settings that they come to.

`check_options` looks at the values alone, before anything is opened. `resolve` fills in what was
left out, once the cache is known; run.toml, loader, loss, training and evaluation read the same
`Settings`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache.cache.spec import CacheSpec
from kdcache.errors import NotBuilt, UsageError, did_you_mean
from kdcache.loss.divergences import Divergence
from kdcache.loss.engines import check_engine, resolve_engine
from kdcache.loss.kd_linear_loss import memory_size
from kdcache.models.checks import check_convention
from kdcache.student.loader import check_sizes, default_temperature
from kdcache.student.match import Match, parse_match
from kdcache.student.optim import OPTIMIZERS

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALPHA = 0.5  # the weight of the soft loss where there are labels beside it
# sign of better
BEST_BY = {"eval_loss": -1, "eval_perplexity": -1, "eval_accuracy": 1, "eval_accuracy_top5": 1}
SOFT = ("temperature", "k", "divergence", "beta", "tail")  # options of the soft loss alone

# the arguments of `train_student` that are plain values, in the order of run.toml
OPTIONS = (
    "temperature k classes alpha ce_weight kd_weight divergence beta tail match engine "
    "logits_memory epochs max_steps batch_size micro_batch_size optimizer lr weight_decay warmup "
    "clip precision compile device seed shuffle deterministic eval_every save_every best_by accept "
    "rows"
).split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Every choice of a run. A None is a choice too:

    temperature     no soft loss; k then too, and where all classes of a live teacher are taken
    classes         all logits are classes
    logits_memory   logits are made whole; else bytes of a chunk of them
    epochs          as long as max_steps says, and the other way round
    eval_every      once an epoch, and save_every
    best_by         accuracy where the evaluation has one, else the loss
    rows            as cache, student or labels show

    options: what was given, as run.toml holds it. defaults: sentences about what was not given.
    """

    ce_weight: float
    kd_weight: float
    temperature: float | None
    k: int | None
    classes: int | None
    divergence: Divergence
    matches: tuple[Match, ...]
    engine: str
    logits_memory: int | None
    epochs: float | None
    max_steps: int | None
    batch_size: int
    micro_batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    warmup: float
    clip: float
    precision: str
    compile: bool
    device: torch.device
    seed: int
    shuffle: bool
    deterministic: bool
    eval_every: int | None
    save_every: int | None
    best_by: str | None
    accept: tuple[str, ...]
    rows: str | None
    options: Mapping[str, Any]
    defaults: tuple[str, ...]


def texts(values: Sequence[Any]) -> tuple[str, ...]:
    """A repeatable option as text; a lone string is one value."""
    return (values,) if isinstance(values, str) else tuple(str(value) for value in values)


def check_options(given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The plain options among the arguments of `train_student`, by name; UsageError for a value
    that cannot be, whatever cache and data are.

    Repeatable ones are tuples, numbers of numpy, which have arithmetic of their own, Python's.
    """
    memory = given["logits_memory"]
    as_text = {
        "match": texts(given["match"]),
        "accept": texts(given["accept"]),
        "logits_memory": None if memory is None else str(memory),
        "device": str(device),
    }
    options = {name: {**given, **as_text}[name] for name in OPTIONS}
    for name, value in options.items():
        if isinstance(value, np.generic):
            options[name] = value.item()
    if (options["epochs"] is None) == (options["max_steps"] is None):
        raise UsageError("give either epochs or max_steps: how long to train")
    check_convention(options["rows"])
    _one_of("precision", options["precision"], PRECISIONS)
    if options["best_by"] is not None:
        _one_of("best_by", options["best_by"], BEST_BY)
    if _divergence(options).tail == "sampled":
        raise NotBuilt(
            "tail 'sampled' needs draws of the teacher, and caches of kind 'sampled' are not built "
            "yet; use tail 'bucket'"
        )
    check_engine(options["engine"], device)
    _one_of("optimizer", options["optimizer"], OPTIMIZERS)
    if options["precision"] == "float16" and device.type == "cpu":
        raise UsageError("precision float16 is not available on the CPU; use bfloat16 or float32")
    for name in ("lr", "weight_decay", "warmup", "clip"):
        value = options[name]
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name} is {value}; expected a number of at least 0")
    for name in ("eval_every", "save_every", "k", "classes"):
        value = options[name]
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    check_sizes(options["batch_size"], options["micro_batch_size"])
    if not 0 <= options["seed"] < 2**63:
        raise UsageError(f"seed is {options['seed']}; expected 0 <= seed < 2^63")
    _check_weights(options)
    return options


def _divergence(options: Mapping[str, Any]) -> Divergence:
    return Divergence(
        options["divergence"] or "forward_kl", options["beta"], options["tail"] or "bucket"
    )


def _check_weights(options: Mapping[str, Any]) -> None:
    alpha, ce, kd = (options[name] for name in ("alpha", "ce_weight", "kd_weight"))
    if (ce is None) != (kd is None):
        raise UsageError(
            f"ce_weight is {ce} and kd_weight is {kd}; give both, or neither and alpha"
        )
    if (
        not (alpha is None or 0 <= alpha <= 1)
        or not (ce is None or 0 <= ce < math.inf)
        or not (kd is None or 0 <= kd < math.inf)
    ):
        raise UsageError(
            f"alpha is {alpha}, ce_weight {ce}, kd_weight {kd}; expected alpha from 0 to 1 and "
            "weights of at least 0"
        )
    if ce == kd == 0 and not options["match"]:
        raise UsageError("every weight of the loss is 0; there is nothing to learn from")


def check_used(given: Mapping[str, Any]) -> None:
    """UsageError for an argument of `train_student` that beside, or without, another one would have
    no effect.
    """
    alpha, ce, kd = (given[name] for name in ("alpha", "ce_weight", "kd_weight"))
    if alpha is not None and ce is not None and kd is not None:
        raise UsageError(
            f"alpha is {alpha}, beside ce_weight {ce} and kd_weight {kd}, which say all; give "
            "alpha, or the two weights"
        )
    for name in ("data", "eval_data"):
        source, args = given[name], given[f"{name}_args"]
        if args and not isinstance(source, str):
            found = "is not given" if source is None else f"is an object, the {name} is an object"
            raise UsageError(
                f"{name}_args {sorted(args)} (--{name.replace('_', '-')}-arg): {name} {found}; "
                "arguments belong to a SPEC"
            )
    for name in ("eval_every", "best_by"):
        if given[name] is not None and given["eval_data"] is None:
            raise UsageError(
                f"{name} is {given[name]}, but there is nothing to evaluate on; give eval_data, or "
                "leave it out"
            )


def resolve(
    options: Mapping[str, Any],
    spec: CacheSpec | None,
    *,
    live_teacher: nn.Module | None,
    evaluated: bool,
) -> Settings:
    """The settings of a run whose `options` have passed `check_options`, on a cache of that `spec`.

    evaluated: there is evaluation data. UsageError for a part of the loss that has nothing to learn
    from, and for options that would do nothing.
    """
    weights, defaults = _default_weights(options, spec, live_teacher)
    options, divergence = {**options, **weights}, _divergence(options)
    table = _by_flag({**options, "divergence": divergence.name, "tail": divergence.tail})
    full = {name.replace("-", "_"): value for name, value in filled(table, spec).items()}
    soft, memory = full["kd_weight"] > 0, options["logits_memory"]
    _check_teachers(full, soft, spec, live_teacher)
    if not soft:
        _check_idle(options, full, live_teacher, evaluated)
        full |= {"temperature": None, "k": None}
    elif live_teacher is not None:
        full["k"] = options["k"]
    unused = [*([] if soft else SOFT), *([] if evaluated else ["best-by"])]
    chosen = {field.name: full.get(field.name) for field in dataclasses.fields(Settings)}
    made: dict[str, Any] = {
        "divergence": divergence,
        "matches": tuple(map(parse_match, options["match"])),
        "logits_memory": None if memory is None else memory_size(memory),
        "device": torch.device(options["device"]),
        "accept": options["accept"],
        "options": {flag: value for flag, value in table.items() if flag not in unused},
        "defaults": (*defaults, *_defaults(options, full, spec)),
    }
    return Settings(**{**chosen, **made})


def _by_flag(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their flags, as run.toml holds them: no None, lists, and of alpha and the weights
    the one that was given.
    """
    table = {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value is not None
    }
    if "ce-weight" in table:
        table.pop("alpha", None)
    return table


def _defaults(
    options: Mapping[str, Any], full: Mapping[str, Any], spec: CacheSpec | None
) -> list[str]:
    """A sentence about each number that was not given, and is used."""
    said = []
    if full["temperature"] is not None and options["temperature"] is None:
        kind = "one row per record" if spec is None or spec.rows == "one" else "rows of tokens"
        said.append(f"temperature {full['temperature']:g}, the default for {kind}")
    if full["k"] is not None and options["k"] is None and spec is not None and spec.is_sparse:
        said.append(f"k {spec.k}, the largest tier of the cache")
    if options["weight_decay"] is None:
        said.append(f"weight decay {full['weight_decay']:g}, none on biases and norms")
    return said


def filled(table: Mapping[str, Any], spec: CacheSpec | None) -> dict[str, Any]:
    """The options of a run by their flags, as run.toml has them, with what they stand for. Another
    run's are compared as they come out here.
    """
    out = dict(table)
    if spec is not None and spec.has_rows:
        out.setdefault("k", spec.k)
    out.setdefault("temperature", default_temperature(spec))
    out.setdefault("weight-decay", OPTIMIZERS.get(out.get("optimizer", ""), (None, None))[1])
    out.setdefault("micro-batch-size", out.get("batch-size"))
    out["engine"] = resolve_engine(out.get("engine", "auto"))
    if out.get("divergence") == "jsd":
        out.setdefault("beta", 0.5)
    alpha = out.pop("alpha", None)
    if isinstance(alpha, int | float):
        out = {"ce-weight": 1 - alpha, "kd-weight": alpha, **out}
    return out


def _default_weights(
    options: Mapping[str, Any], spec: CacheSpec | None, live_teacher: nn.Module | None
) -> tuple[dict[str, float], list[str]]:
    """The weights of the loss where neither alpha nor weights are given, and a sentence if they are
    not alpha 0.5: that is where the cache keeps labels, or there is none.

    Of a cache without labels those of the data train only where they are asked for: alpha 1, and no
    loss of rows at all where it has none.
    """
    if any(options[name] is not None for name in ("alpha", "ce_weight", "kd_weight")):
        return {}, []
    if spec is None or spec.labels:
        return {"alpha": ALPHA}, []
    if spec.has_rows or live_teacher is not None:
        return {"alpha": 1.0}, [
            f"alpha 1: the cache keeps no labels; alpha {ALPHA:g} would train on the data's too"
        ]
    if not options["match"]:
        raise UsageError(
            "the cache is of kind 'none': it has features and no rows; give match, which trains on "
            "them, or alpha 0 for the data's labels alone"
        )
    return {"ce_weight": 0.0, "kd_weight": 0.0}, [
        "no loss of labels or rows: the cache keeps neither; alpha 0 trains on the data's labels "
        "too"
    ]


def _check_teachers(
    full: Mapping[str, Any], soft: bool, spec: CacheSpec | None, live_teacher: nn.Module | None
) -> None:
    """UsageError for a part of the loss that has nothing to learn from."""
    if soft and live_teacher is None:
        if spec is None:
            raise UsageError(
                "the soft loss has a weight but there is no teacher: give a cache, or alpha 0 for "
                "training on hard labels alone"
            )
        if not spec.has_rows:
            raise UsageError(
                f"the soft loss has the weight {full['kd_weight']:g}, but the cache is of kind "
                "'none': it has features and no rows; leave alpha and the weights out, for match "
                "alone"
            )
    classes = full.get("classes")
    if classes is not None and spec is not None and spec.num_classes > classes:
        raise UsageError(
            f"classes is {classes}, but the cache is of {spec.num_classes} classes: its answers "
            f"are shares of all of them; dump again with --classes {classes}"
        )
    if full["match"] and spec is None:
        raise UsageError("match needs a cache with features; no cache is given")


def _check_idle(
    options: Mapping[str, Any],
    full: Mapping[str, Any],
    live_teacher: nn.Module | None,
    evaluated: bool,
) -> None:
    """UsageError for classes of logits that nobody looks at, and for an option of the soft loss
    that is given where that has no weight.
    """
    classes = options["classes"]
    if classes is not None and not full["ce_weight"] and not evaluated:
        raise UsageError(
            f"classes is {classes}, but no loss and no evaluation looks at logits; leave it out"
        )
    given = {name: f"is {options[name]}" for name in SOFT if options[name] is not None}
    given |= {} if live_teacher is None else {"live_teacher": "is given"}
    for name, shown in given.items():
        raise UsageError(
            f"{name} {shown}, but the soft loss has no weight (alpha 0, kd_weight 0, or a cache "
            "without rows), so it would do nothing; leave it out"
        )


def _one_of(what: str, value: str, known: Mapping[str, Any]) -> None:
    if value not in known:
        raise UsageError(f"{what} {value!r} is unknown{did_you_mean(value, known)}")
