"""What decides the next step beside the student's weights, and how a checkpoint holds it: optimizer,
projections, generators, buffers that no state_dict has, and how far the run is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdcache.errors import CacheCorrupt
from kdcache.models.model import Model
from kdcache.models.runs import is_number
from kdcache.student import checkpoint
from kdcache.student.optim import optimizer_tensors, restore_optimizer
from kdcache.user.code_errors import describe

if TYPE_CHECKING:
    from kdcache.student.step import TrainStep

OPTIMIZER, PROJECTIONS = "optimizer/", "projections/"  # in state.safetensors


@dataclass(slots=True)
class Progress:
    """How far a run is, and what it came to: values of state.json.

    position: records consumed. best, evaluation: of best/ and of the last weights. training: the
    numbers of the last step. seconds: spent training.
    """

    step: int = 0
    position: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class RunState:
    """The state of a run, for its checkpoints: of the student, and of what trains it."""

    def __init__(self, model: Model, train_step: TrainStep) -> None:
        self.model, self.train_step = model, train_step
        self._buffers: dict[str, tuple[int, int]] = {}

    def watch_buffers(self) -> None:
        """From here on the buffers that no state_dict has are saved once they change."""
        unsaved = unsaved_buffers(self.model.module)
        self._buffers = {name: mark(value) for name, value in unsaved.items()}

    def save(self, folder: Path, progress: Progress, *, what_is_saved: Callable[[], str]) -> None:
        """Put a checkpoint at `folder` (see `checkpoint.save`)."""
        train_step = self.train_step
        tensors, values = generators()
        state = optimizer_tensors(train_step.optimizer, train_step.named)
        tensors |= {OPTIMIZER + key: value for key, value in state.items()}
        if train_step.matches is not None:
            learned = train_step.matches.projections.state_dict()
            tensors |= {PROJECTIONS + key: value for key, value in learned.items()}
        # without the buffers that training changed a continued run would be another
        tensors |= {
            checkpoint.BUFFERS + name: value
            for name, value in unsaved_buffers(self.model.module).items()
            if self._buffers.get(name) != mark(value)
        }
        scaler = train_step.scaler
        plain = {
            **dataclasses.asdict(progress),
            "scaler": None if scaler is None else scaler.state_dict(),
            "generators": values,
        }
        checkpoint.save(folder, self.model, tensors, plain, what_is_saved=what_is_saved)

    def restore(self, folder: Path, batch_size: int, total: int) -> Progress:
        """Go on from a checkpoint of a run of `total` records; CacheCorrupt if it is no state of it."""
        tensors, values = checkpoint.load(folder, self.model.module)
        checked_state(values, folder)
        step, steps = values["step"], -(-total // batch_size)
        if not 0 < step <= steps or values["position"] != min(step * batch_size, total):
            raise CacheCorrupt(
                f"{folder / checkpoint.VALUES}: step {step} at position {values['position']} is "
                f"none of this run, which has {steps} of {batch_size}"
            )
        try:
            self._put_back(tensors, values)
        except (
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
            AttributeError,
            ArithmeticError,
        ) as e:
            raise CacheCorrupt(
                f"{folder} holds no state of this run ({describe(e)}); move {folder} away to begin "
                "again"
            ) from e
        return Progress(**{name.name: values[name.name] for name in dataclasses.fields(Progress)})

    def _put_back(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        train_step = self.train_step
        restore_optimizer(train_step.optimizer, train_step.named, _under(OPTIMIZER, tensors))
        if train_step.matches is not None:
            train_step.matches.projections.load_state_dict(_under(PROJECTIONS, tensors))
        if train_step.scaler is not None and values["scaler"]:
            train_step.scaler.load_state_dict(values["scaler"])
        restore_generators(tensors, values["generators"])


def unsaved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of `module` that its state_dict leaves out."""
    saved = module.state_dict()
    return {
        name: value
        for name, value in module.named_buffers()
        if name not in saved and not is_lazy(value)
    }


def mark(value: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to, or another takes its place."""
    return value.data_ptr(), -1 if value.is_inference() else value._version


# ---- generators


def generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the generators of torch (CPU, every GPU), numpy and Python: tensors and plain
    values.
    """
    tensors = {"rng/torch": torch.get_rng_state()}
    for index, state in enumerate(
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    ):
        tensors[f"rng/cuda{index}"] = state
    legacy: Any = np.random.get_state()
    tensors["rng/numpy"] = torch.from_numpy(legacy[1].astype(np.int64))
    return tensors, {
        "numpy": [int(legacy[2]), int(legacy[3]), float(legacy[4])],
        "python": random.getstate(),
    }


def restore_generators(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put the states of `generators` back."""
    torch.set_rng_state(tensors["rng/torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"rng/cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng/cuda{index}"], index)
    position, has_gauss, gauss = values["numpy"]
    np.random.set_state(
        ("MT19937", tensors["rng/numpy"].numpy().astype(np.uint32), position, has_gauss, gauss)
    )
    version, words, gauss_next = values["python"]
    random.setstate((version, tuple(words), gauss_next))


def seed_generators(seed: int) -> None:
    """Let torch, numpy and Python draw from their beginning."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def own_generators() -> Iterator[None]:
    """Whatever is drawn inside, the caller's generators are left as they were."""
    before = generators()
    try:
        yield
    finally:
        restore_generators(*before)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Refuse operations whose result varies from run to run; what was set before is put back."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # cuBLAS reads it when it first starts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


# ---- the values of state.json


def checked_state(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a checkpoint, of the types that a run reads; CacheCorrupt naming the first that
    is not.
    """
    for name, right in STATE.items():
        if name not in values or not right(values[name]):
            raise CacheCorrupt(
                f"{folder / checkpoint.VALUES}: its {name!r} is not what a run saves; move "
                f"{folder} away to go on without this checkpoint"
            )
    return values


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_number(item) or item != item for item in value.values()
    )


def _best(value: Any) -> bool:
    return value == {} or (_numbers(value) and type(value.get("step")) is int)


def _random(value: Any) -> bool:
    """As `checkpoint.generators` gives it: of numpy three numbers, of Python a version, 625 words,
    a number or None.
    """
    return (
        isinstance(value, dict)
        and isinstance(value.get("numpy"), list)
        and len(value["numpy"]) == 3
        and all(map(is_number, value["numpy"]))
        and isinstance(value.get("python"), list)
        and len(value["python"]) == 3
        and isinstance(value["python"][1], list)
        and all(type(word) is int and 0 <= word < 2**32 for word in value["python"][1])
    )


# What state.json holds -> whether a value may stand there.
STATE: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: type(value) is int,
    "position": lambda value: type(value) is int,
    "seconds": lambda value: is_number(value, 0) and value < math.inf,
    "best": _best,
    "evaluation": _numbers,
    "training": _numbers,
    "scaler": lambda value: value is None or _numbers(value),
    "generators": _random,
}


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
