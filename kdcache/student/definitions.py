"""The losses as they are defined, in plain torch and about ten lines each; every fast path is tested against these.

Each takes rows of student logits and teacher log-probabilities at temperature T and gives the divergence D(q || p) of
each row, in nats, without the factor T^2. They hold several [N, V] tensors at once, are exact in float64, and are
differentiable by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.student.targets import SoftTargets


def kl_rows(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum q (log q - log p) over the last axis, where 0 log 0 = 0."""
    return torch.where(log_q.exp() > 0, log_q.exp() * (log_q - log_p), 0).sum(-1)


def full(logits_NV: Tensor, log_q_NV: Tensor, temperature: float) -> Tensor:
    """All V classes are outcomes."""
    return kl_rows(log_q_NV, torch.log_softmax(logits_NV / temperature, -1))


def bucket(logits_NV: Tensor, ids_NK: Tensor, log_q_NK: Tensor, log_tail_N: Tensor, temperature: float) -> Tensor:
    """The K kept classes are outcomes, and all others together are one more."""
    log_p_NV = torch.log_softmax(logits_NV / temperature, -1)
    rest_NV = torch.ones_like(log_p_NV, dtype=torch.bool).scatter(1, ids_NK, False)
    tail_NV = torch.where(rest_NV, log_p_NV, -torch.inf)
    log_p_tail_N1 = torch.logsumexp(tail_NV, -1, keepdim=True)
    log_p = torch.cat([log_p_NV.gather(1, ids_NK), log_p_tail_N1], 1)
    return kl_rows(torch.cat([log_q_NK, log_tail_N[:, None]], 1), log_p)


def renormalise(logits_NV: Tensor, ids_NK: Tensor, log_q_NK: Tensor, temperature: float) -> Tensor:
    """The teacher is renormalised over the K kept classes; the student keeps all V."""
    log_p_NV = torch.log_softmax(logits_NV / temperature, -1)
    return kl_rows(torch.log_softmax(log_q_NK, -1), log_p_NV.gather(1, ids_NK))


def conditional(logits_NV: Tensor, ids_NK: Tensor, log_q_NK: Tensor, temperature: float) -> Tensor:
    """Both are renormalised over the K kept classes; no gradient reaches the others."""
    log_p_NK = torch.log_softmax(logits_NV.gather(1, ids_NK) / temperature, -1)
    return kl_rows(torch.log_softmax(log_q_NK, -1), log_p_NK)


def cross_entropy(logits_NV: Tensor, labels_NJ: Tensor, weight_NJ: Tensor) -> Tensor:
    """-sum_j w_j log p(y_j) at temperature 1; a negative label counts for nothing."""
    log_p_NJ = torch.log_softmax(logits_NV, -1).gather(1, labels_NJ.clamp(min=0))
    return -(torch.where(labels_NJ >= 0, weight_NJ, 0) * log_p_NJ).sum(-1)


def kd_loss_reference(logits_NV: Tensor, labels_N: Tensor, targets: SoftTargets, *, alpha: float,
                      tail: str = "bucket") -> Tensor:
    """(1 - alpha) * mean CE over labelled rows + alpha * T^2 * mean D over teacher rows, in nats."""
    temperature, ids_NK, log_q = targets.temperature, targets.ids_NK, targets.log_probs_NK.to(logits_NV.dtype)
    if ids_NK is None or targets.log_tail_N is None:
        kd_N = full(logits_NV, log_q, temperature)
    elif tail == "bucket":
        kd_N = bucket(logits_NV, ids_NK, log_q, targets.log_tail_N.to(log_q.dtype), temperature)
    else:
        kd_N = {"renormalise": renormalise, "conditional": conditional}[tail](logits_NV, ids_NK, log_q, temperature)
    weight_N = torch.ones_like(kd_N) if targets.weight_N is None else targets.weight_N.to(kd_N.dtype)
    ce_N = cross_entropy(logits_NV, labels_N[:, None], torch.ones_like(kd_N)[:, None])
    ce = ce_N.sum() / (labels_N >= 0).sum().clamp(min=1)
    kd = (weight_N * kd_N).sum() / weight_N.sum()
    return (1 - alpha) * ce + alpha * temperature**2 * kd
