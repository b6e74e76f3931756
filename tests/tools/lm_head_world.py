"""An LM head, its hidden states and targets for the tests of the public loss behind one."""

from __future__ import annotations

from typing import Any

import torch
from loss_world import problem
from torch import Tensor

import kdcache
from kdcache.loss.targets import SoftTargets

ROWS, WIDTH, CLASSES, KEPT = 9, 16, 61, 5
Leaves = tuple[Tensor, ...]
# bytes of three rows of float64 logits, each a multiple of 64 elements
THREE_ROWS = 3 * 64 * 8


def given(tail: str = "bucket") -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, SoftTargets]:
    """(hidden, weight, bias) in float64, labels, targets."""
    _, labels, targets = problem(3, ROWS, CLASSES, 2.0, KEPT, tail=tail)
    g = torch.Generator().manual_seed(1)
    return (
        (
            torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64),
            torch.randn(CLASSES, WIDTH, generator=g, dtype=torch.float64) * 0.7,
            torch.randn(CLASSES, generator=g, dtype=torch.float64),
        ),
        labels,
        targets,
    )


def differentiated(loss_of: Any, leaves: Leaves) -> list[Tensor]:
    """The loss and its gradients over hidden, weight and bias."""
    leaves = tuple(t.detach().clone().requires_grad_() for t in leaves)
    loss = loss_of(*leaves)
    loss.backward()
    return [loss.detach(), *(t.grad for t in leaves if t.grad is not None)]


def linear(
    leaves: Leaves, labels: Tensor | None, targets: SoftTargets | None, **options: Any
) -> list[Tensor]:
    return differentiated(
        lambda h, w, b: kdcache.kd_linear_loss(h, w, labels, targets, bias=b, **options), leaves
    )


def whole(
    leaves: Leaves, labels: Tensor | None, targets: SoftTargets | None, **options: Any
) -> list[Tensor]:
    return differentiated(
        lambda h, w, b: kdcache.kd_loss(h @ w.t() + b, labels, targets, **options), leaves
    )


def error(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip(found, truth, strict=True)
    ]
