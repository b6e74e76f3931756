"""The kernels of `kd_shards`: the sums over a shard's columns of a row, and their gradient from
those of whole rows.

One program per row in both. The eight sums of a row, as `shard_sums` leaves them and
`shard_gradient` takes them, are listed in `kd_shards`. They are relative to `top`, a logit as large
as the largest, to a rounding: exponentials of x - top, at temperature 1 and at T, neither overflow
nor lose the digits of a large common offset.
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.kd_rows import ROW_POINTERS, known_ids, known_labels
from kdcache.kernels.kd_values import given_teacher, teacher
from kdcache.kernels.rows import (
    FLOOR,
    LN2,
    dense_gradient,
    fill_zeros,
    power,
    row_start,
    sweep_gradient,
    sweep_sums,
)

# of a tail's sum; a smaller one is given as its logarithm, which is below 0
LEAST = tl.constexpr(1e-20)


@triton.jit
def own_logits(row, id_E, wanted_E, first, count, other: tl.constexpr):
    """Which of the ids [E] are this shard's, where in the row they stand, and their logits, `other`
    elsewhere.
    """
    own_E = wanted_E & (id_E >= first) & (id_E < first + count)
    at_E = row + (id_E - first)
    return own_E, at_E, tl.load(at_E, mask=own_E, other=other)


@triton.jit
def in_two(top, c):
    """top c as an integer and what is left, rounded as a number below 1 and not as one of the size
    of top c.
    """
    whole = tl.floor(top * c)
    return whole, tl.fma(top, c, -whole)


@triton.jit
def power_of_two(ref, top, c):
    """2^(ref - top c) for a sum relative to ref, 0 where ref stands for no finite logit, whose sum
    is 0.
    """
    whole, left = in_two(top, c)
    own = tl.floor(ref)
    return tl.where(ref > FLOOR, tl.exp2(own - whole) * tl.exp2((ref - own) - left), 0.0)


@triton.jit(
    do_not_specialize=[
        "label_stride",
        "label_weight_stride",
        "id_stride",
        "q_stride",
        "kept",
        "num_labels",
        "first",
    ],
    do_not_specialize_on_alignment=[*ROW_POINTERS, "SUMS"],
)
def shard_sums(
    X,
    SUMS,
    LABELS,
    LABEL_WEIGHT,
    IDS,
    LOG_Q,
    LOG_TAIL,
    ROW_WEIGHT,
    x_stride,
    label_stride,
    label_weight_stride,
    id_stride,
    q_stride,
    first,
    count,
    num_classes,
    kept,
    num_labels,
    c,
    c2,
    temperature,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    TWO: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The eight sums over columns [first, first + count) of a row, which is left as it was found."""
    n = tl.program_id(0).to(tl.int64)
    row = row_start(X, n, x_stride, VEC, ALIGNED)
    label_J, weight_J = known_labels(
        LABELS, LABEL_WEIGHT, n, label_stride, label_weight_stride, num_labels, num_classes, BJ
    )
    id_K, valid_K, row_weight = known_ids(IDS, ROW_WEIGHT, n, id_stride, kept, num_classes, BK)
    top = FLOOR
    one = 0.0
    tail = FLOOR if TAIL == "conditional" else -float("inf")
    kept_sum = 0.0
    cross = 0.0
    mass = 0.0
    scored = 0.0
    weight = 0.0
    if tl.max(tl.abs(weight_J), axis=0) + tl.abs(row_weight) != 0:
        if LOG_Q is not None:
            log_q_K, _ = given_teacher(LOG_Q, LOG_TAIL, n, q_stride, valid_K, TAIL, BK)
        own_J, _, x_J = own_logits(row, label_J, weight_J != 0, first, count, 0.0)
        own_K, at_K, raw_K = own_logits(row, id_K, valid_K, first, count, 0.0)
        x_K = tl.where(own_K, raw_K.to(tl.float32), -float("inf"))
        ref = FLOOR
        ref2 = FLOOR
        soft = 0.0
        if P + Q > 0:
            if IDS is not None:
                tl.debug_barrier()  # every warp has its copy of the kept logits
                tl.store(
                    at_K,
                    tl.full([BK], -float("inf"), tl.float32).to(X.dtype.element_ty),
                    mask=own_K,
                )
                tl.debug_barrier()
            ref, ref2, one, soft = sweep_sums(
                row, count, c, c2, P, Q, TWO, R, C, VEC, ALIGNED, "evict_first"
            )
            if IDS is not None:
                tl.debug_barrier()  # every warp has swept past them
                tl.store(at_K, raw_K, mask=own_K)
        top_K = tl.max(x_K, axis=0)
        top = tl.maximum(tl.where(ref > FLOOR, ref / c, FLOOR), top_K)
        if P > 0:
            one = one * power(power_of_two(ref, top, c), P) + tl.sum(tl.exp(x_K - top), axis=0)
            scored = tl.sum(tl.where(own_J, weight_J * (x_J.to(tl.float32) - top), 0.0), axis=0)
            weight = tl.sum(tl.where(own_J, weight_J, 0.0), axis=0)
        if IDS is not None:
            log_q_K = teacher(log_q_K, TAIL)
            base = top
            if TAIL == "conditional":
                tail = tl.maximum(top_K, FLOOR)
                base = tail
            else:
                if TWO:
                    above = tl.fma(-top, c2, ref2)
                    soft_tail = soft * power_of_two(ref2, top, c2)
                else:
                    above = Q * tl.fma(-top, c, ref)
                    soft_tail = soft * power(power_of_two(ref, top, c), Q)
                tail = tl.where(soft_tail > LEAST, soft_tail, tl.log(soft) + LN2 * above)
                tail = tl.where(soft == 0, -float("inf"), tail)
            score_K = tl.div_rn(x_K - base, temperature)
            u_K = tl.exp(score_K)
            q_K = tl.where(own_K, tl.exp(log_q_K), 0.0)
            if DIVERGENCE == "forward_kl":
                cross_K = tl.where(q_K != 0, q_K * score_K, 0.0)
            else:
                cross_K = tl.where(u_K != 0, u_K * (score_K - log_q_K), 0.0)
            kept_sum = tl.sum(tl.where(own_K, u_K, 0.0), axis=0)
            cross = tl.sum(tl.where(own_K, cross_K, 0.0), axis=0)
            mass = tl.sum(q_K, axis=0)
    at = SUMS + n * 8
    tl.store(at, top)
    tl.store(at + 1, one)
    tl.store(at + 2, tail)
    tl.store(at + 3, kept_sum)
    tl.store(at + 4, cross)
    tl.store(at + 5, mass)
    tl.store(at + 6, scored)
    tl.store(at + 7, weight)


@triton.jit
def value_and_slopes(
    x_K,
    valid_K,
    log_q_K,
    log_q_tail,
    top,
    tail,
    kept_sum,
    cross,
    temperature,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """D of the whole row, its slopes over the scores of own kept ids [BK], and over the share of
    the tail.
    """
    q_K = tl.where(valid_K, tl.exp(log_q_K), 0.0)
    q_tail = tl.exp(log_q_tail)
    kept_q = tl.sum(q_K, axis=0)
    base = top
    u_tail = 0.0
    log_tail = 0.0
    if TAIL == "conditional":
        base = tail
    else:
        u_tail = tl.where(tail < 0, tl.exp(tail), tail)
        log_tail = tl.where(tail < 0, tail, tl.log(tail))
    z = kept_sum + u_tail
    log_z = tl.log(z)
    score_K = tl.div_rn(x_K - base, temperature)
    p_K = tl.exp(score_K) / z
    p_tail = u_tail / z
    log_p_tail = tl.where(tail < 0, tail - log_z, tl.log(p_tail))
    if DIVERGENCE == "forward_kl":
        value = tl.sum(tl.where(q_K != 0, q_K * (log_q_K + log_z), 0.0), axis=0) - cross
        if TAIL == "bucket":
            value += tl.where(q_tail != 0, q_tail * (log_q_tail - log_p_tail), 0.0)
        slope_K = (kept_q + q_tail) * p_K - q_K
        # 1 - p_tail would lose digits where it is small
        slope_tail = kept_q * p_tail - q_tail * (kept_sum / z)
    else:
        tl.static_assert(DIVERGENCE == "reverse_kl")
        value = tl.fma(-kept_sum, log_z, cross) / z
        slope_tail = 0.0
        if TAIL == "bucket":
            # The slope is p_tail times what its log p - log q is above D, without the share it has
            # in D itself.
            above = (log_tail - log_q_tail) * kept_sum - cross
            slope_tail = tl.where(u_tail > 0, p_tail * (above / z), 0.0)
            value += tl.where(u_tail > 0, p_tail * (log_p_tail - log_q_tail), 0.0)
        slope_K = tl.where(p_K > 0, p_K * (score_K - log_q_K - log_z - value), 0.0)
    return value, slope_K, slope_tail


@triton.jit
def sweep_factors(top, tail, c, c2, P: tl.constexpr, Q: tl.constexpr, TWO: tl.constexpr):
    """References of the gradient's sweep, and what its powers have to be multiplied by to be exp(x
    - top) and exp((x - top) / T) / (sum over the tail), the share of a class in it.

    A reference lies an integer `down` below top c, near the tail: there exponentials are most
    exact, and shares are finite when the mass of the tail underflows.
    """
    down = 0.0
    if Q > 0:
        depth = tl.where(tail < 0, -tail / LN2, -tl.log2(tail))
        down = tl.where(tail > -float("inf"), tl.floor(tl.maximum(depth, 0.0) / Q), 0.0)
    whole, left = in_two(top, c)
    left = tl.exp2(-left)
    shared = 0.0 if TWO else down
    by_one = 0.0
    by_soft = 0.0
    ref2 = FLOOR
    if P > 0:
        by_one = power(left * tl.exp2(-shared), P)
    if Q > 0:
        by_soft = tl.where(
            tail < 0, tl.exp(-tl.fma(down, Q * LN2, tail)), tl.exp2(-Q * down) / tail
        )
        if TWO:
            whole2, left2 = in_two(top, c2)
            ref2 = whole2 - down
            by_soft *= tl.exp2(-left2)
        else:
            by_soft *= power(left, Q)
    return whole - shared, ref2, by_one, by_soft


@triton.jit(
    do_not_specialize=[
        "label_stride",
        "label_weight_stride",
        "id_stride",
        "q_stride",
        "kept",
        "num_labels",
        "first",
    ],
    do_not_specialize_on_alignment=[*ROW_POINTERS, "SUMS"],
)
def shard_gradient(
    X,
    G,
    SUMS,
    LOSS,
    CE,
    KD,
    LABELS,
    LABEL_WEIGHT,
    IDS,
    LOG_Q,
    LOG_TAIL,
    ROW_WEIGHT,
    CE_SCALE,
    KD_SCALE,
    x_stride,
    g_stride,
    label_stride,
    label_weight_stride,
    id_stride,
    q_stride,
    first,
    count,
    width,
    num_classes,
    kept,
    num_labels,
    c,
    c2,
    temperature,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    TWO: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(loss, CE, D) of a row from the sums over all its columns, and the gradient of this shard's."""
    n = tl.program_id(0).to(tl.int64)
    row = row_start(X, n, x_stride, VEC, ALIGNED)
    if G is not None:
        out = row_start(G, n, g_stride, VEC, ALIGNED)
    label_J, weight_J = known_labels(
        LABELS, LABEL_WEIGHT, n, label_stride, label_weight_stride, num_labels, num_classes, BJ
    )
    id_K, valid_K, row_weight = known_ids(IDS, ROW_WEIGHT, n, id_stride, kept, num_classes, BK)
    loss = 0.0
    ce = 0.0
    kd = 0.0
    if tl.max(tl.abs(weight_J), axis=0) + tl.abs(row_weight) != 0:
        at = SUMS + n * 8
        top = tl.load(at)
        one = tl.load(at + 1)
        tail = tl.load(at + 2)
        own_J, _, x_J = own_logits(row, label_J, weight_J != 0, first, count, 0.0)
        own_K, _, x_K = own_logits(row, id_K, valid_K, first, count, -float("inf"))
        x_J = x_J.to(tl.float32)
        x_K = x_K.to(tl.float32)
        ref, ref2, by_one, by_soft = sweep_factors(top, tail, c, c2, P, Q, TWO)
        a_one = 0.0
        a_soft = 0.0
        ce_scale = 0.0
        g_K = tl.zeros([BK], tl.float32)
        if P > 0:
            weight = tl.sum(weight_J, axis=0)
            ce = tl.where(
                tl.max(tl.abs(weight_J), axis=0) != 0, weight * tl.log(one) - tl.load(at + 6), 0.0
            )
            if CE_SCALE is not None:
                ce_scale = tl.load(CE_SCALE).to(tl.float32)
                loss += ce_scale * ce
                a_one = ce_scale * weight / one
                taken_K = tl.sum(
                    tl.where(label_J[:, None] == id_K[None, :], weight_J[:, None], 0.0), axis=0
                )
                g_K += a_one * tl.exp(x_K - top) - ce_scale * taken_K
                a_one *= by_one
        if IDS is not None:
            log_q_K, log_q_tail = given_teacher(LOG_Q, LOG_TAIL, n, q_stride, valid_K, TAIL, BK)
            log_q_K = teacher(log_q_K, TAIL)
            value, slope_K, slope_tail = value_and_slopes(
                x_K,
                valid_K,
                log_q_K,
                log_q_tail,
                top,
                tail,
                tl.load(at + 3),
                tl.load(at + 4),
                temperature,
                TAIL,
                DIVERGENCE,
            )
            kd = tl.where(row_weight != 0, row_weight * value, 0.0)
            if KD_SCALE is not None:
                factor = tl.load(KD_SCALE).to(tl.float32)
                loss += factor * kd
                factor *= row_weight / temperature
                g_K += factor * slope_K
                if Q > 0:  # a tail without a finite logit takes no part
                    a_soft = tl.where(
                        (row_weight != 0) & (tail > -float("inf")),
                        factor * slope_tail * by_soft,
                        0.0,
                    )
        if G is not None:
            # every warp has its copy of the kept logits and the labels'
            tl.debug_barrier()
            if P + Q > 0:
                sweep_gradient(
                    row,
                    out,
                    count,
                    ref,
                    ref2,
                    a_one,
                    a_soft,
                    c,
                    c2,
                    P,
                    Q,
                    TWO,
                    R,
                    C,
                    VEC,
                    ALIGNED,
                    False,
                )
            else:
                fill_zeros(out, count, R, C, VEC, ALIGNED)
            tl.debug_barrier()  # the entries below were written by other warps
            tl.store(out + (id_K - first), g_K.to(out.dtype.element_ty), mask=own_K)
            if CE_SCALE is not None:
                kept_J = tl.max((label_J[:, None] == id_K[None, :]).to(tl.int32), axis=1)
                taken_J = tl.sum(
                    tl.where(label_J[:, None] == label_J[None, :], weight_J[None, :], 0.0), axis=1
                )
                g_J = (
                    dense_gradient(x_J, ref, ref2, a_one, a_soft, c, c2, P, Q, TWO)
                    - ce_scale * taken_J
                )
                tl.store(
                    out + (label_J - first),
                    g_J.to(out.dtype.element_ty),
                    mask=own_J & (kept_J == 0),
                )
    elif G is not None:
        fill_zeros(out, count, R, C, VEC, ALIGNED)
    if G is not None:
        for start in tl.range(count, width, C):
            column = start + tl.arange(0, C)
            tl.store(out + column, tl.zeros([C], out.dtype.element_ty), mask=column < width)
    tl.store(LOSS + n, loss)
    tl.store(CE + n, ce)
    tl.store(KD + n, kd)
