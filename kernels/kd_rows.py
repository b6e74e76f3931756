"""The kernels of `kd_loss`: one program per row of logits, and the scaling of a gradient that is there already."""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.kd_parts import await_parts, take_part
from kdcache.kernels.rows import (
    FLOOR,
    LN2,
    dense_gradient,
    edge_columns,
    fill_zeros,
    outcome,
    power,
    row_start,
    span,
    span_beside,
    sum_pair,
    sweep_gradient,
    sweep_sums,
    tile_offsets,
)


@triton.jit
def known_labels(LABELS, LABEL_WEIGHT, n, label_stride, label_weight_stride, num_labels, num_classes, BJ: tl.constexpr):
    """Ids [BJ] (-1: none) and weights [BJ] (0: none) of a row's labels."""
    j = tl.arange(0, BJ)
    if LABELS is None:
        return j - BJ, tl.zeros([BJ], tl.float32)
    else:
        label = tl.load(LABELS + n * label_stride + j, mask=j < num_labels, other=-1)
        known = (label >= 0) & (label < num_classes)
        weight = tl.full([BJ], 1.0, tl.float32)
        if LABEL_WEIGHT is not None:
            weight = tl.load(LABEL_WEIGHT + n * label_weight_stride + j, mask=known, other=0.0).to(tl.float32)
        return tl.where(known, label, -1).to(tl.int32), tl.where(known, weight, 0.0)


@triton.jit
def teacher(LOG_Q, LOG_TAIL, n, q_stride, valid_K, TAIL: tl.constexpr, BK: tl.constexpr):
    """log q of the kept ids [BK], log q of the tail (-inf: no such outcome)."""
    k = tl.arange(0, BK)
    log_q_K = tl.load(LOG_Q + n * q_stride + k, mask=valid_K, other=-float("inf")).to(tl.float32)
    log_q_tail = -float("inf")
    if TAIL == "bucket":
        log_q_tail = tl.load(LOG_TAIL + n).to(tl.float32)
    elif TAIL != "sampled":
        top = tl.maximum(tl.max(log_q_K, axis=0), FLOOR)
        log_q_K -= top + tl.log(tl.sum(tl.exp(log_q_K - top), axis=0))
    return log_q_K, log_q_tail


@triton.jit
def merge_parts(STATE, parts, P: tl.constexpr, Q: tl.constexpr, TWO: tl.constexpr):
    """The sums of a row from those of its parts, at most 64."""
    slot = tl.arange(0, 64)
    held = slot < parts
    ref_S = tl.load(STATE + slot * 4, mask=held, other=FLOOR)
    ref2_S = tl.load(STATE + slot * 4 + 1, mask=held, other=FLOOR)
    one_S = tl.load(STATE + slot * 4 + 2, mask=held, other=0.0)
    soft_S = tl.load(STATE + slot * 4 + 3, mask=held, other=0.0)
    ref = tl.max(ref_S, axis=0)
    ref2 = tl.max(ref2_S, axis=0)
    if P > 0:
        one_S *= power(tl.exp2(ref_S - ref), P)
    if TWO:
        soft_S *= tl.exp2(ref2_S - ref2)
    elif Q > 0:
        soft_S *= power(tl.exp2(ref_S - ref), Q)
    one, soft = sum_pair(one_S, soft_S)
    return ref, ref2, one, soft


@triton.jit
def divergence_slopes(log_q_K, log_q_tail, score_K, score_tail, soft, beta, valid_K, TAIL: tl.constexpr,
                      DIVERGENCE: tl.constexpr):
    """D, its slopes over the scores of the kept ids [BK], and of the tail over the sum `soft` of its exponentials."""
    # p is not formed as exp(log p): that would cost |log p| units in its last place.
    u_K = tl.exp2(score_K)
    u_tail = soft * tl.exp2(score_tail)
    z, total = sum_pair(u_K, tl.exp(log_q_K))
    z += u_tail
    total += tl.exp(log_q_tail)
    log_p_K = tl.where(valid_K, LN2 * score_K - tl.log(z), -float("inf"))
    p_K = tl.where(valid_K, u_K / z, 0.0)
    value_K, slope_K = outcome(log_q_K, log_p_K, p_K, total, beta, DIVERGENCE)
    value, mean = sum_pair(value_K, p_K * slope_K)
    slope_tail = 0.0
    if TAIL == "conditional":
        if DIVERGENCE != "forward_kl":
            slope_K = p_K * (slope_K - mean)
    else:
        log_p_tail = LN2 * score_tail + tl.log(soft) - tl.log(z)
        p_tail = u_tail / z
        value_tail, slope_tail = outcome(log_q_tail, log_p_tail, p_tail, total, beta, DIVERGENCE)
        value += value_tail
        if DIVERGENCE != "forward_kl":
            mean += p_tail * slope_tail
            slope_K = p_K * (slope_K - mean)
            slope_tail = p_tail * (slope_tail - mean)
        # A tail without a finite logit takes no part.
        slope_tail = tl.where(soft == 0, 0.0, slope_tail / soft)
    return value, slope_K, slope_tail


@triton.jit
def values_and_slopes(x_K, x_J, id_K, valid_K, label_J, weight_J, row_weight, ref, ref2, one, soft, LOG_Q, LOG_TAIL,
                      CE_SCALE, KD_SCALE, n, q_stride, c, c2, temperature, beta, BK: tl.constexpr, TAIL: tl.constexpr,
                      DIVERGENCE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, TWO: tl.constexpr):
    """(loss, CE, D) of a row, the two factors of its dense gradient, its gradient at the kept ids, and ce_scale."""
    loss = 0.0
    ce = 0.0
    kd = 0.0
    top = tl.maximum(ref, tl.max(x_K, axis=0) * c)
    u_K = tl.exp2(tl.fma(x_K, c, -top))
    lift = tl.exp2(ref - top)
    a_one = 0.0
    a_soft = 0.0
    g_K = tl.zeros([BK], tl.float32)
    ce_scale = 0.0
    if P > 0:
        z = one * power(lift, P) + tl.sum(power(u_K, P), axis=0)
        ce_J = weight_J * (tl.log(z) - P * LN2 * tl.fma(x_J, c, -top))
        ce = tl.sum(tl.where(weight_J != 0, ce_J, 0.0), axis=0)
        if CE_SCALE is not None:
            ce_scale = tl.load(CE_SCALE).to(tl.float32)
            loss += ce_scale * ce
            a_one = ce_scale * tl.sum(weight_J, axis=0) / z
            taken_K = tl.sum(tl.where(label_J[:, None] == id_K[None, :], weight_J[:, None], 0.0), axis=0)
            g_K += a_one * power(u_K, P) - ce_scale * taken_K
            a_one *= power(lift, P)
    if LOG_Q is not None:
        log_q_K, log_q_tail = teacher(LOG_Q, LOG_TAIL, n, q_stride, valid_K, TAIL, BK)
        if TAIL == "conditional":
            score_tail = 0.0
            score_K = tl.fma(x_K, c2, -tl.max(x_K, axis=0) * c2)
        elif TWO:
            top2 = tl.maximum(ref2, tl.max(x_K, axis=0) * c2)
            score_tail = ref2 - top2
            score_K = tl.fma(x_K, c2, -top2)
        else:
            score_tail = Q * (ref - top)
            score_K = Q * tl.fma(x_K, c, -top)
        value, slope_K, slope_tail = divergence_slopes(log_q_K, log_q_tail, score_K, score_tail, soft, beta,
                                                       valid_K, TAIL, DIVERGENCE)
        kd = tl.where(row_weight != 0, row_weight * value, 0.0)
        if KD_SCALE is not None:
            kd_scale = tl.load(KD_SCALE).to(tl.float32)
            loss += kd_scale * kd
            g_K += kd_scale * row_weight / temperature * slope_K
            a_soft = tl.where(row_weight != 0, kd_scale * row_weight / temperature * slope_tail, 0.0)
    return loss, ce, kd, a_one, a_soft, g_K, ce_scale


@triton.jit(do_not_specialize=["label_stride", "label_weight_stride", "id_stride", "q_stride", "kept", "num_labels",
                               "parts"])
def kd_rows(X, G, LOSS, CE, KD, LABELS, LABEL_WEIGHT, IDS, LOG_Q, LOG_TAIL, ROW_WEIGHT, CE_SCALE, KD_SCALE,
            x_stride, g_stride, label_stride, label_weight_stride, id_stride, q_stride, num_classes, width, kept,
            num_labels, c, c2, temperature, beta, STATE, KEPT, LABELLED, COUNTERS, part, parts, BK: tl.constexpr,
            BJ: tl.constexpr, TAIL: tl.constexpr, DIVERGENCE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
            TWO: tl.constexpr, GRADIENT: tl.constexpr, INPLACE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
            VEC: tl.constexpr, ALIGNED: tl.constexpr, REVERSE: tl.constexpr, STAGE: tl.constexpr):
    """One row, or one part of one row. Every output is written, whatever the row is.

    STAGE 0: a program has the whole row. Where rows are few, `parts` programs share one, in two launches: stage 1
    leaves the sums of each part in STATE [N, parts, 4], and the logits of kept ids and of labels in KEPT and LABELLED;
    stage 2 merges the parts (each program for itself) and goes on with its own columns. STAGE 3 is both in one launch,
    with a wait between them: see `kd_parts`.
    """
    if STAGE == 3:
        n, s = take_part(COUNTERS, parts)
    else:
        n = tl.program_id(0).to(tl.int64)
        s = tl.program_id(1) if STAGE > 0 else 0
    begin = s * part
    count = tl.minimum(part, num_classes - begin) if STAGE > 0 else num_classes
    row = row_start(X, n, x_stride, VEC, ALIGNED)
    out = row_start(G, n, g_stride, VEC, ALIGNED)
    label_J, weight_J = known_labels(LABELS, LABEL_WEIGHT, n, label_stride, label_weight_stride, num_labels,
                                     num_classes, BJ)
    row_weight = 0.0
    if IDS is not None:
        row_weight = 1.0
        if ROW_WEIGHT is not None:
            row_weight = tl.load(ROW_WEIGHT + n).to(tl.float32)
    loss = 0.0
    ce = 0.0
    kd = 0.0
    if tl.max(tl.abs(weight_J), axis=0) + tl.abs(row_weight) != 0:
        k = tl.arange(0, BK)
        valid_K = k < 0
        id_K = k - BK - BJ
        if IDS is not None:
            entry_K = tl.load(IDS + n * id_stride + k, mask=k < tl.where(row_weight != 0, kept, 0), other=-1)
            valid_K = (entry_K >= 0) & (entry_K < num_classes)
            id_K = tl.where(valid_K, entry_K, -1).to(tl.int32)
        own_K = valid_K & (id_K // part == s) if STAGE > 0 else valid_K
        own_J = (weight_J != 0) & (label_J // part == s) if STAGE > 0 else weight_J != 0
        if STAGE == 2:
            raw_K = tl.load(KEPT + n * BK + k, mask=valid_K, other=0.0)
            x_J = tl.load(LABELLED + n * BJ + tl.arange(0, BJ), mask=weight_J != 0, other=0.0)
        else:
            raw_K = tl.load(row + id_K, mask=own_K, other=0.0)
            x_J = tl.load(row + label_J, mask=own_J, other=0.0).to(tl.float32)
        x_K = tl.where(valid_K, raw_K.to(tl.float32), -float("inf"))
        ref = FLOOR
        ref2 = FLOOR
        one = 0.0
        soft = 0.0
        if STAGE == 2:
            ref, ref2, one, soft = merge_parts(STATE + n * parts * 4, parts, P, Q, TWO)
        elif P + Q > 0:
            if IDS is not None:
                tl.debug_barrier()          # every warp has its copy of the kept logits
                tl.store(row + id_K, tl.full([BK], -float("inf"), tl.float32).to(X.dtype.element_ty), mask=own_K)
                tl.debug_barrier()
            ref, ref2, one, soft = sweep_sums(row + begin, count, c, c2, P, Q, TWO, R, C, VEC, ALIGNED,
                                              "evict_last" if GRADIENT else "evict_first")
        if STAGE == 1 or STAGE == 3:
            at = STATE + (n * parts + s) * 4
            tl.store(at, ref)
            tl.store(at + 1, ref2)
            tl.store(at + 2, one)
            tl.store(at + 3, soft)
            tl.store(KEPT + n * BK + k, raw_K, mask=own_K)
            tl.store(LABELLED + n * BJ + tl.arange(0, BJ), x_J, mask=own_J)
        if STAGE == 3:
            await_parts(COUNTERS + 1 + n, parts)
            raw_K = tl.load(KEPT + n * BK + k, mask=valid_K, other=0.0)
            x_J = tl.load(LABELLED + n * BJ + tl.arange(0, BJ), mask=weight_J != 0, other=0.0)
            x_K = tl.where(valid_K, raw_K.to(tl.float32), -float("inf"))
            ref, ref2, one, soft = merge_parts(STATE + n * parts * 4, parts, P, Q, TWO)
        if STAGE != 1:
            loss, ce, kd, a_one, a_soft, g_K, ce_scale = values_and_slopes(
                x_K, x_J, id_K, valid_K, label_J, weight_J, row_weight, ref, ref2, one, soft, LOG_Q, LOG_TAIL, CE_SCALE,
                KD_SCALE, n, q_stride, c, c2, temperature, beta, BK, TAIL, DIVERGENCE, P, Q, TWO)
            if GRADIENT:
                if P + Q > 0:
                    sweep_gradient(row + begin, out + begin, count, ref, ref2, a_one, a_soft, c, c2, P, Q, TWO, R, C,
                                   VEC, ALIGNED, REVERSE)
                else:
                    fill_zeros(out + begin, count, R, C, VEC, ALIGNED)
                tl.debug_barrier()              # the entries below were written by other warps
                tl.store(out + id_K, g_K.to(out.dtype.element_ty), mask=own_K)
                if CE_SCALE is not None:
                    kept_J = tl.max((label_J[:, None] == id_K[None, :]).to(tl.int32), axis=1)
                    taken_J = tl.sum(tl.where(label_J[:, None] == label_J[None, :], weight_J[None, :], 0.0), axis=1)
                    g_J = dense_gradient(x_J, ref, ref2, a_one, a_soft, c, c2, P, Q, TWO) - ce_scale * taken_J
                    tl.store(out + label_J, g_J.to(out.dtype.element_ty), mask=own_J & (kept_J == 0))
            else:
                tl.debug_barrier()
            if IDS is not None and not (GRADIENT and INPLACE):
                if P + Q > 0:
                    tl.store(row + id_K, raw_K, mask=own_K)
    elif GRADIENT and STAGE != 1:
        fill_zeros(out + begin, count, R, C, VEC, ALIGNED)
    if STAGE != 1 and s == 0:
        if GRADIENT:
            for at in tl.range(num_classes, width, C):
                column = at + tl.arange(0, C)
                tl.store(out + column, tl.zeros([C], out.dtype.element_ty), mask=column < width)
        tl.store(LOSS + n, loss)
        tl.store(CE + n, ce)
        tl.store(KD + n, kd)


@triton.jit
def scale_rows(G, OUT, FACTOR, g_stride, out_stride, factor_stride, width, R: tl.constexpr, C: tl.constexpr,
               VEC: tl.constexpr, ALIGNED: tl.constexpr, INPLACE: tl.constexpr):
    """OUT = G times one factor per row; in place a row of factor 1 is left unread. The test is made on the device."""
    n = tl.program_id(0).to(tl.int64)
    factor = tl.load(FACTOR + n * factor_stride).to(tl.float32)
    row = row_start(G, n, g_stride, VEC, ALIGNED)
    out = row_start(OUT, n, out_stride, VEC, ALIGNED)
    if INPLACE:
        width = tl.where(factor == 1.0, 0, width)
    start, lead, body = span(row, width, VEC, ALIGNED)
    to = span_beside(out, lead, ALIGNED)
    offsets = tile_offsets(R, C)
    for at in tl.range(0, body, R * C):
        inside = at + offsets < body
        g = tl.load(start + at + offsets, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(to + at + offsets, g.to(OUT.dtype.element_ty), mask=inside)
    if not ALIGNED:
        column, held = edge_columns(lead, body, width, VEC)
        g = tl.load(row + column, mask=held, other=0.0).to(tl.float32) * factor
        tl.store(out + column, g.to(OUT.dtype.element_ty), mask=held)
