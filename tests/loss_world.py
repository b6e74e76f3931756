"""Problems for the tests of the loss: random logits, labels and teachers of every kind, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcache.student.definitions import cross_entropy, divergence_rows
from kdcache.student.targets import SoftTargets

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv")
# Every pair that `kd_loss` takes.
PAIRS = (*((d, t) for d in DIVERGENCES for t in ("bucket", "renormalise", "conditional") if (d, t) != (
    "reverse_kl", "renormalise")), ("forward_kl", "uniform"), ("forward_kl", "sampled"))


def double_targets(teacher_NV: Tensor, temperature: float, k: int | None = None) -> SoftTargets:
    """Targets in float64, from the definition of softmax."""
    log_q_NV = torch.log_softmax(teacher_NV.double() / temperature, -1)
    if k is None:
        return SoftTargets(temperature, teacher_NV.shape[1], None, log_q_NV, None)
    head_NK, ids_NK = log_q_NV.topk(k, -1)
    tail_N = torch.logsumexp(log_q_NV.scatter(1, ids_NK, -torch.inf), -1)
    return SoftTargets(temperature, teacher_NV.shape[1], ids_NK, head_NK, tail_N)


def problem(seed: int, rows: int, classes: int, temperature: float, k: int | None, scale: float = 3.0,
            tail: str = "bucket", beyond: int = 0) -> tuple[Tensor, Tensor, SoftTargets]:
    """(student logits float64 [N, V + beyond], labels [N], targets float64 of V, for tail "sampled" of draws)"""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale
    teacher = torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale
    labels = torch.randint(0, classes, (rows,), generator=g)
    targets = double_targets(teacher, temperature, k)
    if tail == "sampled":
        targets = drawn(targets, g)
    if beyond:
        logits = torch.cat([logits, torch.randn(rows, beyond, generator=g, dtype=torch.float64) * scale], 1)
        labels = torch.randint(0, classes + beyond, (rows,), generator=g)
    return logits, labels, targets


def drawn(targets: SoftTargets, g: torch.Generator) -> SoftTargets:
    """Draws with weights of any sum, some of them filled up with nothing."""
    assert targets.ids_NK is not None
    shift_N1 = torch.randn(len(targets), 1, generator=g, dtype=torch.float64) * 0.3
    empty_NK = torch.rand(targets.ids_NK.shape, generator=g) < 0.2
    return replace(targets, log_probs_NK=(targets.log_probs_NK + shift_N1).masked_fill(empty_NK, -torch.inf),
                   log_tail_N=None)


def single(targets: SoftTargets) -> SoftTargets:
    """The same in float32."""
    return replace(targets, log_probs_NK=targets.log_probs_NK.float(),
                   log_tail_N=None if targets.log_tail_N is None else targets.log_tail_N.float())


def double(targets: SoftTargets) -> SoftTargets:
    """The same numbers in float64."""
    return replace(targets, log_probs_NK=targets.log_probs_NK.double(),
                   log_tail_N=None if targets.log_tail_N is None else targets.log_tail_N.double())


def rows_by_definition(logits: Tensor, labels: Tensor, targets: SoftTargets, *, alpha: float = 0.5,
                       divergence: str = "forward_kl", tail: str = "bucket", beta: float = 0.5) -> Tensor:
    """The loss of each row, in the dtype of the logits."""
    ce_N = cross_entropy(logits, labels[:, None])
    kd_N = divergence_rows(logits, targets, divergence, tail, beta)
    return (1 - alpha) * ce_N + alpha * targets.temperature**2 * kd_N


def value_and_gradient(loss_of: Any, logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = loss_of(leaf, *args, **options)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad
