"""The divergences of a student from its teacher: the value that names one, and one small function
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
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import UsageError, did_you_mean
from kdcache.kernels import row_loss
from kdcache.kernels.row_loss import RowLoss
from kdcache.loss.targets import SoftTargets, readable
from kdcache.user.arguments import check_number, check_type


@dataclass(frozen=True)
class Divergence(row_loss.Divergence):
    """D(q || p) of the teacher's q and the student's p, checked when it is made.

    name           forward_kl, reverse_kl, jsd or tv
    beta           of jsd alone, between 0 and 1; None is 1/2
    tail           what the classes are that the teacher's targets leave out: bucket, renormalise,
                   conditional, uniform or sampled (see `kd_loss`)

    UsageError for unknown names, for a pair that is infinite or not built, and for a beta that is
    out of range or of another divergence.
    """

    def __post_init__(self) -> None:
        check_number("beta", self.beta, optional=True)
        for what, value, known in (
            ("divergence", self.name, row_loss.DIVERGENCES),
            ("tail", self.tail, row_loss.TAILS),
        ):
            check_type(what, value, str, "a name")
            if value not in known:
                raise UsageError(f"{what} {value!r} is unknown{did_you_mean(value, known)}")
        try:
            row_loss.Divergence.__post_init__(self)
        except ValueError as e:
            raise UsageError(str(e)) from None


# (log q, log p, divergence, gradient wanted), logs [R, M] -> (D_R, gradient [R, M] or None)
DivergenceFunction = Callable[
    [Tensor, Tensor, row_loss.Divergence, bool], tuple[Tensor, Tensor | None]
]


def forward_kl(
    log_q: Tensor, log_p: Tensor, divergence: row_loss.Divergence, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """sum q (log q - log p), where 0 log 0 = 0."""
    q = log_q.exp()
    value_R = row_sum(torch.where(q != 0, q * (log_q - log_p), 0))
    return value_R, log_p.exp().sub_(q) if wants else None


def reverse_kl(
    log_q: Tensor, log_p: Tensor, divergence: row_loss.Divergence, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """sum p (log p - log q); infinite where the teacher rules out what the student does not."""
    p = log_p.exp()
    value_R, slope = _centred(p, torch.where(p != 0, log_p - log_q, 0))
    return value_R, slope if wants else None


def jsd(
    log_q: Tensor, log_p: Tensor, divergence: row_loss.Divergence, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    beta = divergence.teacher_share
    # of -inf makes log m NaN, where neither term looks at it
    top = torch.maximum(log_q, log_p)
    log_m = (
        (log_q - top).exp_().mul_(beta).add_((log_p - top).exp_().mul_(1 - beta)).log_().add_(top)
    )
    q, p = log_q.exp(), log_p.exp()
    from_q_R = row_sum(torch.where(q != 0, q * (log_q - log_m), 0))
    from_p_R, slope = _centred(p, torch.where(p != 0, log_p - log_m, 0).mul_(1 - beta))
    return beta * from_q_R + from_p_R, slope if wants else None


def tv(
    log_q: Tensor, log_p: Tensor, divergence: row_loss.Divergence, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """1/2 sum |p - q|; where p = q the gradient is taken to be 0."""
    p = log_p.exp()
    more = p - log_q.exp()
    half = more.sign().mul_(0.5)
    value_R = row_sum(more.mul_(half))
    return value_R, _centred(p, half)[1] if wants else None


def sampled_kl(
    log_w: Tensor, log_p: Tensor, divergence: row_loss.Divergence, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """Forward KL of weights w of any sum s, not renormalised: sum w (log w - log p), gradient s p -
    w.
    """
    w = log_w.exp()
    value_R = row_sum(torch.where(w != 0, w * (log_w - log_p), 0))
    return value_R, log_p.exp().mul_(row_sum(w)[:, None]).sub_(w) if wants else None


DIVERGENCES: dict[str, DivergenceFunction] = {
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


def check_reverse_kl(num_classes: int, taught: int, divergence: Divergence) -> None:
    """UsageError for reverse KL of a teacher that keeps all of its `taught` classes and a student
    that has more.
    """
    if (divergence.name, divergence.tail) == ("reverse_kl", "bucket") and num_classes > taught:
        raise UsageError(
            f"divergence 'reverse_kl' is infinite: the student has {num_classes} classes, and the "
            f"teacher gives those from its {taught} on nothing; cut them (classes {taught}), or "
            "use tail 'conditional' or another divergence"
        )


def check_tails(targets: SoftTargets) -> None:
    """UsageError for a row whose teacher gives its tail nothing, where the student gives every
    class something.
    """
    tail_N = targets.log_tail_N
    if (
        tail_N is None
        or targets.log_probs_NK.shape[1] == targets.num_classes
        or not readable(tail_N)
    ):
        return
    empty_N = tail_N == -torch.inf
    if targets.weight_N is not None:
        empty_N &= targets.weight_N != 0
    if bool(empty_N.any()):
        raise UsageError(
            f"divergence 'reverse_kl' is infinite for row {int(empty_N.nonzero()[0])}: the teacher "
            "gives its tail nothing; use tail 'conditional', or another divergence"
        )


def check_ruled_out(rows: RowLoss, logits_NV: Tensor | None) -> None:
    """UsageError for reverse KL of a row whose teacher rules out a kept class (-inf) that the
    student does not.

    logits_NV: the student's, or [1, V] where those of all rows are -inf; None where none is.
    """
    teacher, ids_NK = rows.log_probs_NK, rows.ids_NK
    if teacher is None or rows.divergence.name != "reverse_kl" or not readable(teacher):
        return
    out_NK = teacher == -torch.inf
    if rows.row_weight_N is not None:
        out_NK &= rows.row_weight_N[:, None] != 0
    if not bool(out_NK.any()):
        return
    if logits_NV is not None:
        too_NV = (logits_NV == -torch.inf).expand(len(out_NK), -1)
        out_NK &= ~(too_NV[:, : out_NK.shape[1]] if ids_NK is None else too_NV.gather(1, ids_NK))
    if bool(out_NK.any()):
        row, place = out_NK.nonzero()[0].tolist()
        which = place if ids_NK is None else int(ids_NK[row, place])
        raise UsageError(
            f"divergence 'reverse_kl' is infinite for row {row}: the teacher gives class {which} "
            "nothing, and the student something; use another divergence"
        )
