"""The losses as they are defined, in plain torch and about ten lines each; every fast path is
tested against these.

A divergence D(q || p) compares outcomes, in nats, without the factor T^2; a tail treatment says
what the outcomes of a row of student logits and teacher log-probabilities at temperature T are.
They hold several [N, V] tensors at once, are exact in float64, and are differentiable by autograd.

A student may have more classes than the teacher (a padded or resized vocabulary). To the teacher
these have probability 0: they are outcomes where all classes are, and belong to the tail, the
classes that are not kept, where it has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdcache.loss.targets import SoftTargets

RowDivergence = Callable[
    [Tensor, Tensor], Tensor
]  # (log q, log p) over the last axis -> D of each row


def times(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0 whatever x is, in value and gradient."""
    return p * torch.where(p > 0, x, 0)


def kl_rows(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum q (log q - log p) over the last axis, where 0 log 0 = 0."""
    return times(log_q.exp(), log_q - log_p).sum(-1)


def reverse_kl_rows(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum p (log p - log q): infinite where the teacher rules out what the student does not."""
    return times(log_p.exp(), log_p - log_q).sum(-1)


def jsd_rows(log_q: Tensor, log_p: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (Agarwal et al., arXiv
    2306.13649).
    """
    q, p = log_q.exp(), log_p.exp()
    m = beta * q + (1 - beta) * p
    log_m = torch.where(m > 0, m, 1).log()
    return beta * times(q, log_q - log_m).sum(-1) + (1 - beta) * times(p, log_p - log_m).sum(-1)


def tv_rows(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Total variation, 1/2 sum |p - q|."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def full(
    logits_NV: Tensor, log_q_NV: Tensor, temperature: float, of_rows: RowDivergence = kl_rows
) -> Tensor:
    """All classes are outcomes; those of the student alone have teacher probability 0."""
    beyond = logits_NV.shape[1] - log_q_NV.shape[1]
    return of_rows(
        torch.nn.functional.pad(log_q_NV, (0, beyond), value=-torch.inf),
        torch.log_softmax(logits_NV / temperature, -1),
    )


def bucket(
    logits_NV: Tensor,
    ids_NK: Tensor,
    log_q_NK: Tensor,
    log_tail_N: Tensor,
    temperature: float,
    of_rows: RowDivergence = kl_rows,
) -> Tensor:
    """The K kept classes are outcomes, and all others together are one more."""
    log_p_NV = torch.log_softmax(logits_NV / temperature, -1)
    log_p_NK = log_p_NV.gather(1, ids_NK)
    if ids_NK.shape[1] == logits_NV.shape[1]:
        return of_rows(log_q_NK, log_p_NK)
    rest_NV = torch.ones_like(log_p_NV, dtype=torch.bool).scatter(1, ids_NK, False)
    log_p_tail_N1 = torch.logsumexp(torch.where(rest_NV, log_p_NV, -torch.inf), -1, keepdim=True)
    return of_rows(
        torch.cat([log_q_NK, log_tail_N[:, None]], 1), torch.cat([log_p_NK, log_p_tail_N1], 1)
    )


def renormalise(
    logits_NV: Tensor,
    ids_NK: Tensor,
    log_q_NK: Tensor,
    temperature: float,
    of_rows: RowDivergence = kl_rows,
) -> Tensor:
    """The teacher is renormalised over the K kept classes, its tail has nothing; the student keeps
    all V.
    """
    log_q_NK = torch.log_softmax(log_q_NK, -1)
    return bucket(
        logits_NV,
        ids_NK,
        log_q_NK,
        torch.full_like(log_q_NK[:, 0], -torch.inf),
        temperature,
        of_rows,
    )


def conditional(
    logits_NV: Tensor,
    ids_NK: Tensor,
    log_q_NK: Tensor,
    temperature: float,
    of_rows: RowDivergence = kl_rows,
) -> Tensor:
    """Both are renormalised over the K kept classes; no gradient reaches the others."""
    log_p_NK = torch.log_softmax(logits_NV.gather(1, ids_NK) / temperature, -1)
    return of_rows(torch.log_softmax(log_q_NK, -1), log_p_NK)


def uniform(
    logits_NV: Tensor,
    ids_NK: Tensor,
    log_q_NK: Tensor,
    log_tail_N: Tensor,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """Forward KL over all classes; the teacher's tail is spread evenly over those of its classes
    that are not kept.
    """
    log_p_NV = torch.log_softmax(logits_NV / temperature, -1)
    kept_N, others = kl_rows(log_q_NK, log_p_NV.gather(1, ids_NK)), num_classes - ids_NK.shape[1]
    if not others:
        return kept_N
    # of log p over these
    mean_N = log_p_NV.scatter(1, ids_NK, 0)[:, :num_classes].sum(-1) / others
    return kept_N + times(log_tail_N.exp(), log_tail_N - math.log(others) - mean_N)


def sampled(logits_NV: Tensor, ids_NK: Tensor, log_w_NK: Tensor, temperature: float) -> Tensor:
    """Draws with weights w of any sum s, not renormalised: sum w (log w - log p), whose gradient is
    (s p - w) / T.

    Where w estimates q without bias, so does this gradient that of forward KL (arXiv 2503.16870).
    """
    return kl_rows(log_w_NK, torch.log_softmax(logits_NV / temperature, -1).gather(1, ids_NK))


def cross_entropy(logits_NV: Tensor, labels_NJ: Tensor, weight_NJ: Tensor | None = None) -> Tensor:
    """-sum_j w_j log p(y_j) at temperature 1; a negative label counts for nothing.

    Without weights the labels of a row weigh alike and 1 in all: a mean over those that are known.
    """
    if weight_NJ is None:
        known_NJ = (labels_NJ >= 0).to(logits_NV.dtype)
        weight_NJ = known_NJ / known_NJ.sum(-1, keepdim=True).clamp(min=1)
    log_p_NJ = torch.log_softmax(logits_NV, -1).gather(1, labels_NJ.clamp(min=0))
    return -(torch.where(labels_NJ >= 0, weight_NJ, 0) * log_p_NJ).sum(-1)


def divergence_rows(
    logits_NV: Tensor,
    targets: SoftTargets,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    beta: float = 0.5,
) -> Tensor:
    """D of each row by the names of `kd_loss`, in the dtype of the logits."""
    of_rows: RowDivergence = {
        "forward_kl": kl_rows,
        "reverse_kl": reverse_kl_rows,
        "tv": tv_rows,
        "jsd": lambda log_q, log_p: jsd_rows(log_q, log_p, beta),
    }[divergence]
    temperature, ids_NK, log_q = (
        targets.temperature,
        targets.ids_NK,
        targets.log_probs_NK.to(logits_NV.dtype),
    )
    if ids_NK is None:
        kept = targets.num_classes if tail == "conditional" else logits_NV.shape[1]
        return full(logits_NV[:, :kept], log_q, temperature, of_rows)
    if targets.log_tail_N is None:
        return sampled(logits_NV, ids_NK, log_q, temperature)
    log_tail_N = targets.log_tail_N.to(logits_NV.dtype)
    if tail == "bucket":
        return bucket(logits_NV, ids_NK, log_q, log_tail_N, temperature, of_rows)
    if tail == "uniform":
        return uniform(logits_NV, ids_NK, log_q, log_tail_N, temperature, targets.num_classes)
    return {"renormalise": renormalise, "conditional": conditional}[tail](
        logits_NV, ids_NK, log_q, temperature, of_rows
    )


def kd_loss_reference(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: SoftTargets,
    *,
    alpha: float,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    beta: float = 0.5,
) -> Tensor:
    """(1 - alpha) * mean CE over labelled rows + alpha * T^2 * mean D over teacher rows, in nats."""
    kd_N = divergence_rows(logits_NV, targets, divergence, tail, beta)
    weight_N = (
        torch.ones_like(kd_N) if targets.weight_N is None else targets.weight_N.to(kd_N.dtype)
    )
    ce_N = cross_entropy(logits_NV, labels_N[:, None])
    ce = ce_N.sum() / (labels_N >= 0).sum().clamp(min=1)
    kd = times(weight_N, kd_N).sum() / weight_N.sum()
    return (1 - alpha) * ce + alpha * targets.temperature**2 * kd
