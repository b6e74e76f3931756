"""The torch engine: loss and gradient of N rows in one pass over chunks of rows, keeping nothing
but the gradient.

Every divergence is a function of a few outcomes: the K kept classes and the tail as one more, or
all V classes. The gradient with respect to an outcome's score reaches the classes of the tail
through its log-sum-exp, so

    dD/dz_j = g_j / T                                  j kept
            = g_tail * softmax(z_tail / T)_j / T       j in the tail

which for forward KL is (p_j - q_t * softmax_tail_j) / T, off the head p_j (1 - q_t / p_t) / T:
finite however small p_t is, because the tail's softmax is taken relative to the tail's own maximum.
A teacher whose tail is even adds q_t times the divergence within the tail to that: p_j - q_t / (V -
K) off the head.

Classes that the student alone has, from the V of the targets on, have teacher probability 0: they
are in the tail, and outcomes where all classes are; of an even tail they have no part, so their
gradient is p_j / T.

Logits x that are scaled or capped give scores z = softcap * tanh(logit_scale * x / softcap); the
gradient is over x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.kernels.kd_autograd import (
    Gradients,
    first_derivatives_only,
    link,
    register_gradient,
    split_over_devices,
)
from kdcache.kernels.row_loss import SCHEMA, RowLoss
from kdcache.loss.divergences import DIVERGENCES, row_sum, sampled_kl
from kdcache.loss.topk import row_chunk

# Elements of one temporary of a chunk; about four live at once, twice that for jsd over all
# classes.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


def torch_engine(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Any device and floating dtype; arithmetic in float32, or float64 for float64 logits.

    A row's results depend on that row alone: on the CPU the same bits in every chunk and batch.
    First derivatives only.
    """
    if torch.compiler.is_compiling():
        return _captured(logits, rows)
    if split := split_over_devices(logits=logits):
        raise UsageError(split[0])
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    out: tuple[Tensor, Tensor, Tensor] = _TorchRows.apply(logits, rows, wants_gradient)  # type: ignore[no-untyped-call]
    return out


class _TorchRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: RowLoss, wants_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # detach() shares the version counter: an operation that kept these logits for its own
        # backward notices.
        gradient = None
        if wants_gradient:
            gradient = logits.detach() if rows.inplace else gradient_like(logits)
            link(ctx, logits)
        loss_N, ce_N, kd_N = loss_rows(logits, rows, gradient)
        ctx.inplace, ctx.used = rows.inplace, False
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(ce_N, kd_N)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return loss_N, ce_N, kd_N

    @staticmethod
    @first_derivatives_only("kd_loss")
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
        grad_output = grad_outputs[0]
        if grad_output is None:  # nothing asked of the loss: it adds nothing
            return None, None, None
        if ctx.used:
            raise RuntimeError(
                "kd_loss(inplace=True) was differentiated twice, but its gradient took the place "
                "of the logits and is used up; call it with inplace=False"
            )
        (gradient,) = ctx.saved_tensors
        ctx.used = ctx.inplace
        out = gradient if ctx.inplace else torch.empty_like(gradient)
        return scale_rows(gradient, grad_output, out), None, None


def gradient_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def loss_rows(
    logits: Tensor, rows: RowLoss, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_N, CE_N, D_N), in chunks; the gradient of each row's loss goes to `gradient`, which may
    be the logits.
    """
    working = wide(logits.dtype)
    loss_N, ce_N, kd_N = (
        torch.zeros(len(logits), dtype=working, device=logits.device) for _ in range(3)
    )
    for chunk in row_chunks(logits, rows.num_classes):
        x_RV = logits.detach()[chunk, : rows.num_classes]
        z_RV = capped(x_RV.to(working).contiguous(), rows.logit_scale, rows.softcap)
        dense_RV = _chunk(
            z_RV, rows.rows(chunk), (loss_N[chunk], ce_N[chunk], kd_N[chunk]), gradient is not None
        )
        if gradient is not None:
            inside_RV = gradient[chunk, : rows.num_classes]
            inside_RV.zero_() if dense_RV is None else inside_RV.copy_(
                _over_logits(dense_RV, x_RV, rows)
            )
            gradient[chunk, rows.num_classes :].zero_()
    return loss_N, ce_N, kd_N


def capped(x: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """softcap * tanh(logit_scale * x / softcap), or logit_scale * x, in the dtype of x; x itself if
    that is the same.

    -inf stays -inf: a class that is masked stays out, where tanh alone would make it -softcap.
    """
    if softcap is None:
        return x if logit_scale == 1 else x * logit_scale
    return (
        (x * (logit_scale / softcap))
        .tanh_()
        .mul_(softcap)
        .masked_fill_(x == -torch.inf, -torch.inf)
    )


def _over_logits(dense_RV: Tensor, x_RV: Tensor, rows: RowLoss) -> Tensor:
    """The gradient over the logits from that over `capped` logits, which is used up: times scale *
    (1 - tanh^2).

    Of a = exp(-2 |u|) the slope of tanh u is 4 a / (1 + a)^2, which loses nothing where tanh nears
    1. A row that counts for nothing may hold NaN, and keeps its zeros.
    """
    if rows.softcap is None:
        return dense_RV if rows.logit_scale == 1 else dense_RV.mul_(rows.logit_scale)
    a_RV = (
        x_RV.to(dense_RV.dtype)
        .abs()
        .mul_(-2 * rows.logit_scale / rows.softcap)
        .exp_()
        .nan_to_num_(nan=0.0)
    )
    dense_RV.mul_(4 * rows.logit_scale).mul_(a_RV)
    return dense_RV.div_(a_RV.add_(1).square_())


def scale_rows(gradient: Tensor, factor_N: Tensor, out: Tensor) -> Tensor:
    """out = gradient times a factor per row, in chunks: a half-precision product is formed in
    float32.
    """
    for chunk in row_chunks(gradient, gradient.shape[1]):
        torch.mul(gradient[chunk], factor_N[chunk, None].to(wide(gradient.dtype)), out=out[chunk])
    return out


def row_chunks(x: Tensor, num_classes: int) -> Iterator[slice]:
    """Slices of rows that are worked on at a time."""
    step = row_chunk(num_classes, CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cuda"]))
    return (slice(at, at + step) for at in range(0, len(x), step))


# Softmax [R, V] at temperature 1, maximum [R, 1], log sum exp(x - maximum) [R, 1]
Softmax = tuple[Tensor, Tensor, Tensor]


def _chunk(
    x_RV: Tensor, rows: RowLoss, out: tuple[Tensor, Tensor, Tensor], wants: bool
) -> Tensor | None:
    """Fills (loss, CE, D) of a chunk of rows; returns the gradient of its loss, None if it is zero
    or not wanted.
    """
    loss_R, ce_R, kd_R = out
    slope: _Slope | None = None
    softmax: Softmax | None = None
    dense_RV: Tensor | None = None
    weight_R = None if rows.row_weight_N is None else rows.row_weight_N.to(x_RV.dtype)
    if rows.log_probs_NK is not None:
        wants_slope = wants and rows.kd_scale is not None
        if rows.ids_NK is None:
            value_R, slope = _over_all(x_RV, rows, rows.log_probs_NK, wants_slope)
        else:
            value_R, slope, softmax = _over_support(x_RV, rows, rows.ids_NK, wants_slope)
        kd_R.copy_(
            value_R if weight_R is None else torch.where(weight_R == 0, 0, weight_R * value_R)
        )
        if rows.kd_scale is not None:
            loss_R += rows.kd_scale * kd_R
    if rows.labels_NJ is not None:
        value_R, dense_RV = _cross_entropy(
            x_RV,
            softmax or _softmax(x_RV),
            rows.labels_NJ,
            rows.label_weight_NJ,
            rows.ce_scale if wants else None,
        )
        ce_R.copy_(value_R)
        if rows.ce_scale is not None:
            loss_R += rows.ce_scale * value_R
    if slope is None or rows.kd_scale is None:
        return dense_RV
    if dense_RV is None and slope.dense_RV is None:
        dense_RV = torch.zeros_like(x_RV)
    return slope.added_to(dense_RV, rows.kd_scale / rows.temperature, weight_R)


def _cross_entropy(
    x_RV: Tensor,
    softmax: Softmax,
    labels_RJ: Tensor,
    weight_RJ: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """sum_j w_j * -log p(y_j), and `scale` times its gradient sum_j w_j (p - [y_j]); the softmax is
    used up.
    """
    p_RV, max_R1, log_sum_R1 = softmax
    known_RJ = labels_RJ >= 0
    if weight_RJ is None:
        weight_RJ = known_RJ.to(x_RV.dtype)
        if labels_RJ.shape[1] > 1:
            weight_RJ = weight_RJ / weight_RJ.sum(-1, keepdim=True).clamp_(min=1)
    else:
        weight_RJ = torch.where(known_RJ, weight_RJ.to(x_RV.dtype), 0)
    at_RJ = labels_RJ.clamp(min=0)
    log_p_RJ = x_RV.gather(1, at_RJ) - max_R1 - log_sum_R1
    value_R = torch.where(weight_RJ == 0, 0, -weight_RJ * log_p_RJ).sum(-1)
    if scale is None:
        return value_R, None
    total_R1 = weight_RJ.sum(-1, keepdim=True)
    # p - 1 before the scale: the difference is exact
    slope_RJ = p_RV.gather(1, at_RJ).mul_(total_R1)
    for j in range(labels_RJ.shape[1]):  # two labels may name the same class
        slope_RJ.sub_(weight_RJ[:, j : j + 1] * (at_RJ == at_RJ[:, j : j + 1]))
    p_RV.mul_(total_R1 * scale).scatter_(1, at_RJ, slope_RJ.mul_(scale))
    # such a row may hold anything, NaN too
    return value_R, _zero_rows(p_RV, (weight_RJ == 0).all(-1))


@dataclass(frozen=True, slots=True)
class _Slope:
    """The gradient of D in x / T: factor_R1 * dense_RV, which is 0 at ids_RK, plus at_RK there;
    None for nothing.
    """

    dense_RV: Tensor | None
    factor_R1: Tensor | None = None
    ids_RK: Tensor | None = None
    at_RK: Tensor | None = None

    def added_to(
        self, sum_RV: Tensor | None, scale: Tensor, weight_R: Tensor | None
    ) -> Tensor | None:
        """sum + scale * weight * this; a row of weight 0 counts for nothing, whatever it holds.
        Tensors are used up.
        """
        scale_R1 = scale if weight_R is None else (scale * weight_R)[:, None]
        dense_RV, factor_R1, at_RK = (
            self.dense_RV,
            scale_R1,
            None if self.at_RK is None else self.at_RK * scale_R1,
        )
        if self.factor_R1 is not None:
            factor_R1 = self.factor_R1 * scale_R1
        if weight_R is not None:
            absent_R = weight_R == 0
            factor_R1 = factor_R1.masked_fill(absent_R[:, None], 0)
            dense_RV = None if dense_RV is None else _zero_rows(dense_RV, absent_R)
            at_RK = None if at_RK is None else at_RK.masked_fill_(absent_R[:, None], 0)
        if dense_RV is not None:
            sum_RV = (
                dense_RV.mul_(factor_R1) if sum_RV is None else sum_RV.addcmul_(dense_RV, factor_R1)
            )
        if self.ids_RK is None or at_RK is None or sum_RV is None:
            return sum_RV
        return sum_RV.scatter_(1, self.ids_RK, sum_RV.gather(1, self.ids_RK).add_(at_RK))


def _over_all(
    x_RV: Tensor, rows: RowLoss, log_q_RV: Tensor, wants: bool
) -> tuple[Tensor, _Slope | None]:
    """The divergence over all classes; for tail "conditional" over those of the teacher."""
    log_q_RV, beyond = log_q_RV.to(x_RV.dtype), x_RV.shape[1] - rows.taught
    if beyond and rows.divergence.tail == "conditional":
        x_RV = x_RV[:, : rows.taught].contiguous()
    elif beyond:
        log_q_RV = torch.nn.functional.pad(log_q_RV, (0, beyond), value=-torch.inf)
    score_RV = x_RV if rows.temperature == 1 else x_RV / rows.temperature
    value_R, slope_RV = DIVERGENCES[rows.divergence.name](
        log_q_RV, torch.log_softmax(score_RV, -1), rows.divergence, wants
    )
    if slope_RV is None:
        return value_R, None
    if beyond and rows.divergence.tail == "conditional":
        slope_RV = torch.nn.functional.pad(slope_RV, (0, beyond))
    return value_R, _Slope(slope_RV)


def _over_support(
    x_RV: Tensor, rows: RowLoss, ids_RK: Tensor, wants: bool
) -> tuple[Tensor, _Slope | None, Softmax | None]:
    """The divergence over the kept classes, and over the tail where its treatment has one.

    At T = 1 the softmax of the tail, times the probability of the tail, is that of the row: given
    for cross-entropy.

    Two buffers of the size of the chunk live here. `rest_RV` has the scores x / T relative to the
    maximum of the row. Its kept classes are set to 0, for the sum of an even tail, then to -inf,
    for the softmax of the tail; at T = 1 the softmax of the row is written over it at the end, and
    the caller uses that up. `tail_RV` has the softmax within the tail, and is the dense part of the
    slope: the caller scales it in place.
    """
    compare = sampled_kl if rows.divergence.tail == "sampled" else DIVERGENCES[rows.divergence.name]
    log_q = _teacher(rows, x_RV.dtype)
    # Relative to the maximum of what is compared before the division: a large common offset costs
    # no digits.
    score_RK = x_RV.gather(1, ids_RK)
    max_R1 = (score_RK if rows.divergence.tail == "conditional" else x_RV).amax(-1, keepdim=True)
    score_RK = score_RK.sub_(max_R1).div_(rows.temperature)
    if rows.divergence.tail == "conditional":
        value_R, slope_RK = compare(log_q, torch.log_softmax(score_RK, -1), rows.divergence, wants)
        return value_R, None if slope_RK is None else _Slope(None, None, ids_RK, slope_RK), None

    # The outcomes: the kept classes, and the tail as one more.
    rest_RV = x_RV - max_R1
    if rows.temperature != 1:
        rest_RV.div_(rows.temperature)
    others = rows.taught - ids_RK.shape[1] if rows.divergence.tail == "uniform" else 0
    sum_R = row_sum(rest_RV.scatter_(1, ids_RK, 0)[:, : rows.taught]) if others else None
    tail_RV, tail_max_R1, log_sum_R1 = _softmax(rest_RV.scatter_(1, ids_RK, -torch.inf))
    # a tail without a finite score takes no part: its softmax is 0, not NaN
    empty_R1 = tail_max_R1 == -torch.inf
    outcome = torch.cat([score_RK, torch.where(empty_R1, -torch.inf, tail_max_R1 + log_sum_R1)], 1)
    log_p = torch.log_softmax(outcome, -1)
    value_R, slope = compare(log_q, log_p, rows.divergence, wants)
    if sum_R is not None:
        value_R += _within_tail(log_q[:, -1].exp(), outcome[:, -1], sum_R, others)
    if slope is None:
        return value_R, None, None

    # The slopes: of the kept classes one by one, of the tail by its softmax.
    tail_RV, softmax, p = _zero_rows(tail_RV, empty_R1[:, 0]), None, log_p.exp()
    if rows.temperature == 1:
        p_RV = torch.mul(tail_RV, p[:, -1:], out=rest_RV).scatter_(1, ids_RK, p[:, :-1])
        softmax = p_RV, max_R1, outcome.amax(-1, keepdim=True) - log_p.amax(-1, keepdim=True)
    # p_j - q_t / (V - K), where the bucket has (p_t - q_t) softmax_tail_j
    if others:
        even_R1 = log_q[:, -1:].exp() / others
        tail_RV.mul_(p[:, -1:])[:, : rows.taught].sub_(even_R1)
        tail_RV.scatter_(1, ids_RK, 0)
    return (
        value_R,
        _Slope(tail_RV, None if others else slope[:, -1:], ids_RK, slope[:, :-1]),
        softmax,
    )


def _within_tail(q_tail_R: Tensor, lse_R: Tensor, sum_R: Tensor, others: int) -> Tensor:
    """q_t KL(even || student) over `others` classes, from the log-sum-exp and the sum of their
    scores.
    """
    gap_R = torch.where(lse_R == -torch.inf, torch.inf, lse_R - sum_R / others).sub_(
        math.log(others)
    )
    return torch.where(q_tail_R != 0, q_tail_R * gap_R, 0)


def _teacher(rows: RowLoss, working: torch.dtype) -> Tensor:
    """log q of the outcomes: of the kept classes and, but for tail "conditional", of the tail."""
    assert rows.log_probs_NK is not None
    log_q_RK, tail = rows.log_probs_NK.to(working), rows.divergence.tail
    if tail in ("renormalise", "conditional"):
        log_q_RK = torch.log_softmax(log_q_RK, -1)
    if tail == "conditional":
        return log_q_RK
    if tail in ("bucket", "uniform"):
        assert rows.log_tail_N is not None
        return torch.cat([log_q_RK, rows.log_tail_N.to(working)[:, None]], 1)
    return torch.nn.functional.pad(log_q_RK, (0, 1), value=-torch.inf)


def _softmax(x_RV: Tensor) -> Softmax:
    """The softmax at the maximum is one over the sum. On the CPU exp(log_softmax(x)) would take
    twice as long.
    """
    p_RV = torch.softmax(x_RV, -1)
    return p_RV, x_RV.amax(-1, keepdim=True), -p_RV.amax(-1, keepdim=True).log_()


def _zero_rows(x_RV: Tensor, rows_R: Tensor) -> Tensor:
    """x with 0 in these rows, in place. On the CPU, where it is known at once, nothing is written
    if there are none.
    """
    if x_RV.device.type == "cpu" and not bool(rows_R.any()):
        return x_RV
    return x_RV.masked_fill_(rows_R[:, None], 0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on a floating dtype is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- in graphs that torch.compile captures
# Captured as it is, the loop over chunks of rows would be unrolled: a graph for every number of
# rows, and its temporaries fused into one for all of them. As an operator, opaque and functional,
# it keeps its chunks and its bits, and one graph serves all batch sizes. Compiled code cannot write
# over its inputs: the gradient has a buffer of its own, whatever `inplace` says.


@torch.library.custom_op(
    "kdcache::loss_rows",
    mutates_args=(),
    schema=f"(Tensor logits, {SCHEMA}, bool wants_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
)
def loss_rows_op(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_N, CE_N, D_N, gradient [N, V'], or [0] where none is wanted)."""
    *asked, wants_gradient = others
    gradient = gradient_like(logits) if wants_gradient else None
    values = loss_rows(logits, RowLoss.of_arguments(asked), gradient)
    return *values, logits.new_empty(0) if gradient is None else gradient


@loss_rows_op.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    working = wide(logits.dtype)
    # len() is a constant
    loss_N, ce_N, kd_N = (logits.new_empty(logits.shape[0], dtype=working) for _ in range(3))
    return loss_N, ce_N, kd_N, gradient_like(logits) if others[-1] else logits.new_empty(0)


@torch.library.custom_op(
    "kdcache::scale_rows", mutates_args=(), schema="(Tensor gradient, Tensor factor) -> Tensor"
)
def scale_rows_op(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient [N, V'] times factor [N]."""
    return scale_rows(gradient, factor, torch.empty_like(gradient))


@scale_rows_op.register_fake
def _(gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(gradient)


register_gradient(loss_rows_op, scale_rows_op, "kd_loss")


def _captured(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
    """The engine inside a graph that is being captured."""
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    loss_N, ce_N, kd_N, _ = loss_rows_op(logits, *rows.arguments(), wants_gradient)
    return loss_N, ce_N.detach(), kd_N.detach()
