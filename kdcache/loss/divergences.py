"""Divergences over outcomes with their gradients: what the torch engine runs, one small function
each.

An outcome is a kept class, or all others together, or each of V classes. Each function is given log
q and log p of rows of outcomes and gives D(q || p) and, where it is wanted, the gradient with
respect to the scores whose softmax is p: p_i (c_i - sum p c) for c = dD/dp, which for forward KL is
p - q. `definitions.py` has the plain forms.

A row's bits depend on that row alone, so `torch.logaddexp` and plain sums of one row are not used
(see `loss/topk.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (log q, log p, beta, gradient wanted), logs [R, M] -> (D_R, gradient [R, M] or None)
Divergence = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]


def forward_kl(
    log_q: Tensor, log_p: Tensor, beta: float, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """sum q (log q - log p), where 0 log 0 = 0."""
    q = log_q.exp()
    value_R = row_sum(torch.where(q != 0, q * (log_q - log_p), 0))
    return value_R, log_p.exp().sub_(q) if wants else None


def reverse_kl(
    log_q: Tensor, log_p: Tensor, beta: float, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """sum p (log p - log q); infinite where the teacher rules out what the student does not."""
    p = log_p.exp()
    value_R, slope = _centred(p, torch.where(p != 0, log_p - log_q, 0))
    return value_R, slope if wants else None


def jsd(log_q: Tensor, log_p: Tensor, beta: float, wants: bool) -> tuple[Tensor, Tensor | None]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    # of -inf makes log m NaN, where neither term looks at it
    top = torch.maximum(log_q, log_p)
    log_m = (
        (log_q - top).exp_().mul_(beta).add_((log_p - top).exp_().mul_(1 - beta)).log_().add_(top)
    )
    q, p = log_q.exp(), log_p.exp()
    from_q_R = row_sum(torch.where(q != 0, q * (log_q - log_m), 0))
    from_p_R, slope = _centred(p, torch.where(p != 0, log_p - log_m, 0).mul_(1 - beta))
    return beta * from_q_R + from_p_R, slope if wants else None


def tv(log_q: Tensor, log_p: Tensor, beta: float, wants: bool) -> tuple[Tensor, Tensor | None]:
    """1/2 sum |p - q|; where p = q the gradient is taken to be 0."""
    p = log_p.exp()
    more = p - log_q.exp()
    half = more.sign().mul_(0.5)
    value_R = row_sum(more.mul_(half))
    return value_R, _centred(p, half)[1] if wants else None


def sampled_kl(
    log_w: Tensor, log_p: Tensor, beta: float, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """Forward KL of weights w of any sum s, not renormalised: sum w (log w - log p), gradient s p -
    w.
    """
    w = log_w.exp()
    value_R = row_sum(torch.where(w != 0, w * (log_w - log_p), 0))
    return value_R, log_p.exp().mul_(row_sum(w)[:, None]).sub_(w) if wants else None


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tv": tv,
}


def _centred(p: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(sum p c, p (c - sum p c)); both tensors are used up."""
    mean_R = row_sum(p * c)
    return mean_R, p.mul_(c.sub_(mean_R[:, None]))


def row_sum(x_RM: Tensor) -> Tensor:
    """Sum over the last axis; a row that stands alone is not split over threads, which would change
    its bits.
    """
    return x_RM.expand(2, -1).sum(-1)[:1] if len(x_RM) == 1 else x_RM.sum(-1)
