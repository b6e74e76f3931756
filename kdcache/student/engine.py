"""The torch engine: loss and gradient of N rows in one pass over chunks of rows, keeping nothing but the gradient.

Every divergence is a function of a few outcomes: the K kept classes and the tail as one more, or all V classes. The
gradient with respect to an outcome's score reaches the classes of the tail through its log-sum-exp, so

    dD/dz_j = g_j / T                                  j kept
            = g_tail * softmax(z_tail / T)_j / T       j in the tail

which for forward KL is (p_j - q_t * softmax_tail_j) / T, off the head p_j (1 - q_t / p_t) / T: finite however small p_t
is, because the tail's softmax is taken relative to the tail's own maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcache.student.targets import SoftTargets
from kdcache.topk import row_chunk, row_logsumexp

# Elements of one temporary of a chunk; about six live at once.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


@dataclass(frozen=True, slots=True)
class RowLoss:
    """What an engine is asked: loss_N = ce_scale * CE_N + kd_scale * D_N, and its gradient.

    labels_NJ int64, negative where there is none; label_weight_NJ None for 1 everywhere. A scale is a tensor of no
    dimension on the logits' device, or None for a part that is reported and not in the loss. D_N has the targets'
    weights in it, and no T^2. `inplace`: the gradient takes the place of the logits.
    """

    num_classes: int
    labels_NJ: Tensor | None
    label_weight_NJ: Tensor | None
    targets: SoftTargets | None
    divergence: str
    tail: str
    ce_scale: Tensor | None
    kd_scale: Tensor | None
    inplace: bool


# logits [N, V' >= V] -> (loss_N, CE_N, D_N), of which only loss_N carries a gradient.
Engine = Callable[[Tensor, RowLoss], tuple[Tensor, Tensor, Tensor]]


def torch_engine(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Any device and floating dtype; arithmetic in float32, or float64 for float64 logits.

    A row's results depend on that row alone: on the CPU the same bits in every chunk and batch.
    """
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    out: tuple[Tensor, Tensor, Tensor] = _TorchRows.apply(logits, rows, wants_gradient)  # type: ignore[no-untyped-call]
    return out


class _TorchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: RowLoss, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        working = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss_N, ce_N, kd_N = torch.zeros((3, len(logits)), dtype=working, device=logits.device).unbind()
        # detach() shares the version counter: an operation that kept these logits for its own backward notices.
        gradient = None
        if wants_gradient:
            gradient = logits.detach()
            if not rows.inplace:
                gradient = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        step = row_chunk(rows.num_classes, CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS["cuda"]))
        for at in range(0, len(logits), step):
            chunk = slice(at, at + step)
            x_RV = logits.detach()[chunk, : rows.num_classes].to(working).contiguous()
            dense_RV = _chunk(x_RV, rows, chunk, (loss_N[chunk], ce_N[chunk], kd_N[chunk]), wants_gradient)
            if gradient is not None:
                gradient[chunk, : rows.num_classes] = 0 if dense_RV is None else dense_RV.to(gradient.dtype)
                gradient[chunk, rows.num_classes :] = 0
        ctx.inplace, ctx.used, ctx.step = rows.inplace, False, step
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(ce_N, kd_N)
        return loss_N, ce_N, kd_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        if ctx.used:
            raise RuntimeError("kd_loss(inplace=True) was differentiated twice, but its gradient took the place of the "
                               "logits and is used up; call it with inplace=False")
        (gradient,) = ctx.saved_tensors
        ctx.used = ctx.inplace
        out = gradient if ctx.inplace else torch.empty_like(gradient)
        for at in range(0, len(gradient), ctx.step):        # in chunks: a half-precision product is formed in float32
            chunk = slice(at, at + ctx.step)
            torch.mul(gradient[chunk], grad_outputs[0][chunk, None].to(_wide(gradient.dtype)), out=out[chunk])
        return out, None, None


def _chunk(x_RV: Tensor, rows: RowLoss, chunk: slice, out: tuple[Tensor, Tensor, Tensor], wants: bool) -> Tensor | None:
    """Fills (loss, CE, D) of a chunk of rows; returns the gradient of its loss, None if it is zero or not wanted."""
    loss_R, ce_R, kd_R = out
    dense_RV: Tensor | None = None
    if rows.labels_NJ is not None:
        weight_RJ = None if rows.label_weight_NJ is None else rows.label_weight_NJ[chunk]
        value_R, slope_RV = _cross_entropy(x_RV, rows.labels_NJ[chunk], weight_RJ, wants and rows.ce_scale is not None)
        ce_R.copy_(value_R)
        if rows.ce_scale is not None:
            loss_R += rows.ce_scale * value_R
            dense_RV = None if slope_RV is None else slope_RV.mul_(rows.ce_scale)
    if rows.targets is not None:
        value_R, slope_RV = _divergence(x_RV, rows.targets[chunk], rows, wants and rows.kd_scale is not None)
        kd_R.copy_(value_R)
        if rows.kd_scale is not None:
            loss_R += rows.kd_scale * value_R
            if slope_RV is not None:
                slope_RV.mul_(rows.kd_scale)
                dense_RV = slope_RV if dense_RV is None else dense_RV.add_(slope_RV)
    return dense_RV


def _cross_entropy(x_RV: Tensor, labels_RJ: Tensor, weight_RJ: Tensor | None,
                   wants: bool) -> tuple[Tensor, Tensor | None]:
    """sum_j w_j * -log p(y_j) at temperature 1, and its gradient sum_j w_j (p - [y_j])."""
    log_p_RV = torch.log_softmax(x_RV, -1)
    known_RJ = labels_RJ >= 0
    weight_RJ = known_RJ.to(x_RV.dtype) if weight_RJ is None else torch.where(known_RJ, weight_RJ.to(x_RV.dtype), 0)
    at_RJ = labels_RJ.clamp(min=0)
    value_R = torch.where(weight_RJ == 0, 0, -weight_RJ * log_p_RV.gather(1, at_RJ)).sum(-1)
    if not wants:
        return value_R, None
    total_R1 = weight_RJ.sum(-1, keepdim=True)
    slope_RV = log_p_RV.exp_().mul_(total_R1)
    for j in range(labels_RJ.shape[1]):         # one label after the other: two may name the same class
        at_R1 = at_RJ[:, j : j + 1]
        slope_RV.scatter_(1, at_R1, slope_RV.gather(1, at_R1) - weight_RJ[:, j : j + 1])
    ignored_R1 = (weight_RJ == 0).all(-1, keepdim=True)         # such a row may hold anything, NaN too
    return value_R, slope_RV.masked_fill_(ignored_R1, 0)


def _divergence(x_RV: Tensor, targets: SoftTargets, rows: RowLoss, wants: bool) -> tuple[Tensor, Tensor | None]:
    """w * D(q || p) at the targets' temperature, and its gradient with respect to the logits."""
    log_q, working = targets.log_probs_NK.to(x_RV.dtype), x_RV.dtype
    divergence = DIVERGENCES[rows.divergence]
    if targets.ids_NK is None or targets.log_tail_N is None:
        value_R, slope_RV = divergence(log_q, torch.log_softmax(x_RV / targets.temperature, -1), wants)
    else:
        value_R, slope_RV = _over_support(x_RV, targets.ids_NK, log_q, targets.log_tail_N.to(working),
                                          targets.temperature, rows.tail, divergence, wants)
    if slope_RV is not None:
        slope_RV.div_(targets.temperature)
    if targets.weight_N is None:
        return value_R, slope_RV
    weight_R = targets.weight_N.to(working)
    absent_R = weight_R == 0
    if slope_RV is not None:
        slope_RV.mul_(weight_R[:, None]).masked_fill_(absent_R[:, None], 0)
    return torch.where(absent_R, 0, weight_R * value_R), slope_RV


def _over_support(x_RV: Tensor, ids_RK: Tensor, log_q_RK: Tensor, log_tail_R: Tensor, temperature: float, tail: str,
                  divergence: Divergence, wants: bool) -> tuple[Tensor, Tensor | None]:
    """The divergence over the kept classes, and over the tail where its treatment has one; gradient in x / T."""
    # Relative to the row's maximum before the division: a large common offset costs no digits.
    score_RV = (x_RV - x_RV.amax(-1, keepdim=True)) / temperature
    score_RK = score_RV.gather(1, ids_RK)
    if tail == "conditional":
        value_R, slope_RK = divergence(torch.log_softmax(log_q_RK, -1), torch.log_softmax(score_RK, -1), wants)
        return value_R, None if slope_RK is None else torch.zeros_like(score_RV).scatter_(1, ids_RK, slope_RK)
    if tail == "renormalise":
        log_q_RK, log_tail_R = torch.log_softmax(log_q_RK, -1), torch.full_like(log_tail_R, -torch.inf)
    rest_RV = score_RV.scatter_(1, ids_RK, -torch.inf)
    outcome = torch.cat([score_RK, row_logsumexp(rest_RV)[:, None]], 1)
    value_R, slope = divergence(torch.cat([log_q_RK, log_tail_R[:, None]], 1), torch.log_softmax(outcome, -1), wants)
    if slope is None:
        return value_R, None
    # A tail without a finite score takes no part: its softmax is 0, not NaN.
    within_tail_RV = torch.softmax(rest_RV, -1).masked_fill_(outcome[:, -1:] == -torch.inf, 0)
    return value_R, within_tail_RV.mul_(slope[:, -1:]).scatter_(1, ids_RK, slope[:, :-1])


# (log q, log p, gradient wanted) over outcomes [R, M] -> (D_R, gradient with respect to the scores whose softmax is p)
Divergence = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def forward_kl(log_q: Tensor, log_p: Tensor, wants: bool) -> tuple[Tensor, Tensor | None]:
    """sum q (log q - log p), where 0 log 0 = 0; its gradient is p - q."""
    q = log_q.exp()
    value_R = _row_sum(torch.where(q > 0, q * (log_q - log_p), 0))
    return value_R, log_p.exp().sub_(q) if wants else None


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl}


def _row_sum(x_RM: Tensor) -> Tensor:
    """Sum over the last axis; a row that stands alone is not split over threads, which would change its bits."""
    return x_RM.expand(2, -1).sum(-1)[:1] if len(x_RM) == 1 else x_RM.sum(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
