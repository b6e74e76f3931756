"""Optimizers by name, and a learning rate that is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from kdcache.errors import UsageError

Named = list[tuple[str, nn.Parameter]]

# name -> (how it is made, its weight decay where none is asked for)
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "adamw": (AdamW, 0.01),
    "adam": (Adam, 0.0),
    "sgd": (partial(SGD, momentum=0.9), 0.0),
}


def trainable(*modules: tuple[str, nn.Module]) -> Named:
    """The parameters that take part in training, each once, as `prefix` + name."""
    seen: set[int] = set()
    out: Named = []
    for prefix, module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                out.append((prefix + name, parameter))
    if not out:
        raise UsageError(
            "the student has no parameter that requires a gradient; there is nothing to train"
        )
    return out


def make_optimizer(
    name: str, parameters: Named, *, lr: float, weight_decay: float, fused: bool = False
) -> Optimizer:
    """adamw, adam (decay is part of the gradient) or sgd (momentum 0.9).

    Parameters of one axis or none (biases, the scales of norms) are not decayed. fused: one kernel
    that can be told on the device to leave a step out, where all parameters are floating.
    """
    fused = fused and all(p.is_floating_point() for _, p in parameters)
    groups = [
        {"params": [p for _, p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    make, _ = OPTIMIZERS[name]
    return make([g for g in groups if g["params"]], lr=lr, **({"fused": True} if fused else {}))


def is_fused(optimizer: Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up over `warmup` steps (a part of all steps if below 1), then half a cosine down
    to 0 at the end.
    """

    lr: float
    total_steps: int
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise UsageError(
                f"warmup is {self.warmup}; expected 0 to {self.total_steps}, the steps of the run, "
                "or a part of them below 1"
            )

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.total_steps) if self.warmup < 1 else round(self.warmup)

    def at(self, step: int) -> float:
        """The learning rate of step 0, 1, ...; never 0 before the end."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: Optimizer, parameters: Named) -> dict[str, torch.Tensor]:
    """The state of an optimizer as tensors named `key/parameter`; all three keep nothing else."""
    return {
        f"{key}/{name}": value
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(
    optimizer: Optimizer, parameters: Named, tensors: dict[str, torch.Tensor]
) -> None:
    """Put the tensors of `optimizer_tensors` back, each on its parameter's device; Adam's count
    stays on the CPU, but of a fused one.
    """
    fused = is_fused(optimizer)
    by_name: dict[str, dict[str, Any]] = {}
    for full, value in tensors.items():
        key, _, name = full.partition("/")
        by_name.setdefault(name, {})[key] = value
    for name, parameter in parameters:
        for key, value in by_name.pop(name, {}).items():
            dtype = None if key == "step" else parameter.dtype
            there = fused or key != "step"
            optimizer.state[parameter][key] = value.to(parameter.device, dtype) if there else value
    if by_name:
        raise UsageError(
            f"the checkpoint has optimizer state for {_some(by_name)}, which the student does not "
            "train"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
