"""Problems for the tests of the loss: random logits, labels and teachers of every kind, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcache.loss.definitions import cross_entropy, divergence_rows
from kdcache.loss.targets import SoftTargets

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv")
# Every pair that `kd_loss` takes.
PAIRS = (
    *(
        (d, t)
        for d in DIVERGENCES
        for t in ("bucket", "renormalise", "conditional")
        if (d, t) != ("reverse_kl", "renormalise")
    ),
    ("forward_kl", "uniform"),
    ("forward_kl", "sampled"),
)


def double_targets(teacher_NV: Tensor, temperature: float, k: int | None = None) -> SoftTargets:
    """Targets in float64, from the definition of softmax."""
    log_q_NV = torch.log_softmax(teacher_NV.double() / temperature, -1)
    if k is None:
        return SoftTargets(temperature, teacher_NV.shape[1], None, log_q_NV, None)
    head_NK, ids_NK = log_q_NV.topk(k, -1)
    tail_N = torch.logsumexp(log_q_NV.scatter(1, ids_NK, -torch.inf), -1)
    return SoftTargets(temperature, teacher_NV.shape[1], ids_NK, head_NK, tail_N)


def problem(
    seed: int,
    rows: int,
    classes: int,
    temperature: float,
    k: int | None,
    scale: float = 3.0,
    tail: str = "bucket",
    beyond: int = 0,
) -> tuple[Tensor, Tensor, SoftTargets]:
    """(student logits float64 [N, V + beyond], labels [N], targets float64 of V, for tail "sampled"
    of draws)
    """
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale
    teacher = torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale
    labels = torch.randint(0, classes, (rows,), generator=g)
    targets = double_targets(teacher, temperature, k)
    if tail == "sampled":
        targets = drawn(targets, g)
    if beyond:
        logits = torch.cat(
            [logits, torch.randn(rows, beyond, generator=g, dtype=torch.float64) * scale], 1
        )
        labels = torch.randint(0, classes + beyond, (rows,), generator=g)
    return logits, labels, targets


def drawn(targets: SoftTargets, g: torch.Generator) -> SoftTargets:
    """Draws with weights of any sum, some of them filled up with nothing."""
    assert targets.ids_NK is not None
    shift_N1 = torch.randn(len(targets), 1, generator=g, dtype=torch.float64) * 0.3
    empty_NK = torch.rand(targets.ids_NK.shape, generator=g) < 0.2
    return replace(
        targets,
        log_probs_NK=(targets.log_probs_NK + shift_N1).masked_fill(empty_NK, -torch.inf),
        log_tail_N=None,
    )


def single(targets: SoftTargets) -> SoftTargets:
    """The same in float32."""
    return replace(
        targets,
        log_probs_NK=targets.log_probs_NK.float(),
        log_tail_N=None if targets.log_tail_N is None else targets.log_tail_N.float(),
    )


def double(targets: SoftTargets) -> SoftTargets:
    """The same numbers in float64."""
    return replace(
        targets,
        log_probs_NK=targets.log_probs_NK.double(),
        log_tail_N=None if targets.log_tail_N is None else targets.log_tail_N.double(),
    )


def rows_by_definition(
    logits: Tensor,
    labels: Tensor,
    targets: SoftTargets,
    *,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    beta: float = 0.5,
) -> Tensor:
    """The loss of each row, in the dtype of the logits."""
    ce_N = cross_entropy(logits, labels[:, None])
    kd_N = divergence_rows(logits, targets, divergence, tail, beta)
    return (1 - alpha) * ce_N + alpha * targets.temperature**2 * kd_N


def value_and_gradient(
    loss_of: Any, logits: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = loss_of(leaf, *args, **options)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def by_hand(
    z_NM: Tensor,
    q_NV: Tensor,
    ids_NK: Tensor | None,
    temperature: float,
    divergence: str,
    tail: str = "bucket",
    beta: float = 0.5,
) -> Tensor:
    """D of each row in probabilities, outcome by outcome: no logarithm is carried, and nothing of
    the product is used.

    z_NM: the student's logits, at least as many as the teacher's classes. q_NV: dense, of the
    teacher at `temperature`. ids_NK: the classes that are kept, None for all.
    """
    rows, classes = q_NV.shape
    p, beyond = torch.softmax(z_NM / temperature, -1), z_NM.shape[1] - classes
    ids = torch.arange(classes).expand(rows, -1) if ids_NK is None else ids_NK
    dense = torch.nn.functional.pad(q_NV, (0, beyond))
    kept = dense.gather(1, ids)
    if tail == "conditional":
        q, p = (
            kept / kept.sum(-1, keepdim=True),
            p.gather(1, ids) / p.gather(1, ids).sum(-1, keepdim=True),
        )
    elif ids_NK is None:
        q = dense
    elif tail == "uniform":
        even = (q_NV.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)) / (classes - ids.shape[1])
        q = torch.cat([even.expand(rows, classes), torch.zeros(rows, beyond).to(q_NV)], 1).scatter(
            1, ids, kept
        )
    else:
        others = torch.ones_like(p).scatter(1, ids, 0)
        q_tail = (dense * others).sum(-1, keepdim=True)
        q = torch.cat(
            [kept, q_tail]
            if tail == "bucket"
            else [kept / kept.sum(-1, keepdim=True), torch.zeros_like(q_tail)],
            1,
        )
        p = torch.cat([p.gather(1, ids), (p * others).sum(-1, keepdim=True)], 1)
    m = beta * q + (1 - beta) * p
    some = q.clamp(min=1e-300)
    parts = {
        "forward_kl": torch.where(q > 0, q * (some / p).log(), 0),
        "reverse_kl": p * (p / some).log(),
        "tv": (p - q).abs() / 2,
        "jsd": torch.where(q > 0, beta * q * (some / m).log(), 0) + (1 - beta) * p * (p / m).log(),
    }
    return parts[divergence].sum(-1)
