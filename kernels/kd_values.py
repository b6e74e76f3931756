"""What one row's sums come to: the values of the loss, the slopes of its few exact entries, the
factors of the rest.

A score is a logit in units of log2: x c, or x c2 at T. The sums are relative to the maximum of the
row without its kept ids; here the kept join them.
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.sweeps import FLOOR, LN2, outcome, power, sum_pair


@triton.jit
def given_teacher(LOG_Q, LOG_TAIL, n, q_stride, valid_K, TAIL: tl.constexpr, BK: tl.constexpr):
    """log q of the kept ids [BK], log q of the tail (-inf: no such outcome), as they are given.
    Read before the row is swept: after it nothing else would be under way."""
    k = tl.arange(0, BK)
    log_q_K = tl.load(LOG_Q + n * q_stride + k, mask=valid_K, other=-float("inf")).to(tl.float32)
    log_q_tail = -float("inf")
    if TAIL == "bucket" or TAIL == "uniform":
        log_q_tail = tl.load(LOG_TAIL + n).to(tl.float32)
    return log_q_K, log_q_tail


@triton.jit
def teacher(log_q_K, TAIL: tl.constexpr):
    """log q of the kept ids: of these alone where there is no tail, but for ids that were drawn."""
    if TAIL == "renormalise" or TAIL == "conditional":
        top = tl.maximum(tl.max(log_q_K, axis=0), FLOOR)
        log_q_K -= top + tl.log(tl.sum(tl.exp(log_q_K - top), axis=0))
    return log_q_K


@triton.jit
def divergence_slopes(
    log_q_K,
    log_q_tail,
    score_K,
    score_tail,
    soft,
    scores,
    tail_size,
    valid_K,
    divergence,
    TAIL: tl.constexpr,
):
    """D, its slopes over the scores of the kept ids [BK], of the tail over the sum `soft` of its
    exponentials, and of each class of the tail besides (tail "uniform"; `scores` is the sum of the
    tail's scores, -inf where one is)."""
    DIVERGENCE: tl.constexpr = divergence[0]
    # p is not formed as exp(log p): that would cost |log p| units in its last place.
    u_K = tl.exp2(score_K)
    u_tail = soft * tl.exp2(score_tail)
    if TAIL == "uniform":
        log_q_tail = tl.where(tail_size == 0, -float("inf"), log_q_tail)
    z, total = sum_pair(u_K, tl.exp(log_q_K))
    z += u_tail
    total += tl.exp(log_q_tail)
    log_p_K = tl.where(valid_K, LN2 * score_K - tl.log(z), -float("inf"))
    p_K = tl.where(valid_K, u_K / z, 0.0)
    value_K, slope_K = outcome(log_q_K, log_p_K, p_K, total, divergence)
    value, mean = sum_pair(value_K, p_K * slope_K)
    slope_tail = 0.0
    even = 0.0
    if TAIL == "conditional":
        if DIVERGENCE != "forward_kl":
            slope_K = p_K * (slope_K - mean)
    elif TAIL == "uniform":
        tl.static_assert(DIVERGENCE == "forward_kl")
        q_tail = tl.exp(log_q_tail)
        size = tl.maximum(tail_size, 1).to(tl.float32)
        mean_log_p = LN2 * (score_tail + scores / size) - tl.log(z)
        value += tl.where(q_tail != 0, q_tail * (log_q_tail - tl.log(size) - mean_log_p), 0.0)
        slope_tail = total * tl.exp2(score_tail) / z
        even = -q_tail / size
    else:
        log_p_tail = LN2 * score_tail + tl.log(soft) - tl.log(z)
        p_tail = u_tail / z
        value_tail, slope_tail = outcome(log_q_tail, log_p_tail, p_tail, total, divergence)
        value += value_tail
        if DIVERGENCE != "forward_kl":
            mean += p_tail * slope_tail
            slope_K = p_K * (slope_K - mean)
            slope_tail = p_tail * (slope_tail - mean)
        # A tail without a finite logit takes no part.
        slope_tail = tl.where(soft == 0, 0.0, slope_tail / soft)
    return value, slope_K, slope_tail, even


@triton.jit
def values_and_slopes(
    x_K,
    x_J,
    id_K,
    valid_K,
    label_J,
    weight_J,
    row_weight,
    ref,
    ref2,
    one,
    soft,
    scores,
    tail_size,
    log_q_K,
    log_q_tail,
    ce_scale,
    kd_scale,
    c,
    c2,
    temperature,
    divergence,
    POWERS: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """(loss, CE, D) of a row, the two factors of its dense gradient, what every class of an even
    tail gets besides, and its gradient at the kept ids: all over the logits after scale and
    softcap. log_q_K, log_q_tail and the scales are None where they are not given."""
    P: tl.constexpr = POWERS[0]
    Q: tl.constexpr = POWERS[1]
    TWO: tl.constexpr = POWERS[2]
    loss = 0.0
    ce = 0.0
    kd = 0.0
    top = tl.maximum(ref, tl.max(x_K, axis=0) * c)
    u_K = tl.exp2(tl.fma(x_K, c, -top))
    lift = tl.exp2(ref - top)
    a_one = 0.0
    a_soft = 0.0
    even = 0.0
    g_K = tl.zeros([BK], tl.float32)
    if P > 0:
        z = one * power(lift, P) + tl.sum(power(u_K, P), axis=0)
        ce_J = weight_J * (tl.log(z) - P * LN2 * tl.fma(x_J, c, -top))
        ce = tl.sum(tl.where(weight_J != 0, ce_J, 0.0), axis=0)
        if ce_scale is not None:
            loss += ce_scale * ce
            a_one = ce_scale * tl.sum(weight_J, axis=0) / z
            g_K += a_one * power(u_K, P)
            a_one *= power(lift, P)
            g_K -= ce_scale * tl.sum(
                tl.where(label_J[:, None] == id_K[None, :], weight_J[:, None], 0.0), axis=0
            )
    if log_q_K is not None:
        if TAIL == "conditional":
            soft = 0.0
            score_tail = 0.0
            score_K = tl.fma(x_K, c2, -tl.max(x_K, axis=0) * c2)
        elif TWO:
            top2 = tl.maximum(ref2, tl.max(x_K, axis=0) * c2)
            score_tail = ref2 - top2
            score_K = tl.fma(x_K, c2, -top2)
        else:
            score_tail = Q * (ref - top)
            score_K = Q * tl.fma(x_K, c, -top)
            scores *= Q
        value, slope_K, slope_tail, slope_even = divergence_slopes(
            teacher(log_q_K, TAIL),
            log_q_tail,
            score_K,
            score_tail,
            soft,
            scores,
            tail_size,
            valid_K,
            divergence,
            TAIL,
        )
        kd = tl.where(row_weight != 0, row_weight * value, 0.0)
        if kd_scale is not None:
            loss += kd_scale * kd
            g_K += kd_scale * row_weight / temperature * slope_K
            a_soft = tl.where(
                row_weight != 0, kd_scale * row_weight / temperature * slope_tail, 0.0
            )
            even = tl.where(row_weight != 0, kd_scale * row_weight / temperature * slope_even, 0.0)
    return loss, ce, kd, a_one, a_soft, even, g_K
