"""The kernels of `kd_loss`: one program per row of logits, and the scaling of a gradient that is
there already.
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.kd_values import given_teacher, values_and_slopes
from kdcache.kernels.sweeps import (
    FLOOR,
    capped,
    dense_gradient,
    edge_columns,
    fill_zeros,
    power,
    row_start,
    share_of,
    span,
    span_beside,
    sum_pair,
    sweep_gradient,
    sweep_sums,
    tile_offsets,
)


@triton.jit
def known_labels(
    LABELS,
    LABEL_WEIGHT,
    n,
    label_stride,
    label_weight_stride,
    num_labels,
    num_classes,
    BJ: tl.constexpr,
):
    """Ids [BJ] (-1: none) and weights [BJ] (0: none) of a row's labels; without weights they weigh
    alike, 1 in all.
    """
    j = tl.arange(0, BJ)
    if LABELS is None:
        return j - BJ, tl.zeros([BJ], tl.float32)
    else:
        label = tl.load(LABELS + n * label_stride + j, mask=j < num_labels, other=-1)
        known = (label >= 0) & (label < num_classes)
        weight = tl.full([BJ], 1.0, tl.float32)
        if LABEL_WEIGHT is None and BJ > 1:
            weight /= tl.maximum(tl.sum(known.to(tl.float32), axis=0), 1.0)
        if LABEL_WEIGHT is not None:
            weight = tl.load(
                LABEL_WEIGHT + n * label_weight_stride + j, mask=j < num_labels, other=0.0
            ).to(tl.float32)
        return tl.where(known, label, -1).to(tl.int32), tl.where(known, weight, 0.0)


@triton.jit
def known_ids(IDS, ROW_WEIGHT, n, id_stride, kept, num_classes, BK: tl.constexpr):
    """Ids [BK] (below 0: none), which are classes [BK], and the weight of a row's divergence (0: no
    teacher, and no id). Neither load waits for the other."""
    k = tl.arange(0, BK)
    if IDS is None:
        return k - BK, k < 0, 0.0
    else:
        row_weight = 1.0
        if ROW_WEIGHT is not None:
            row_weight = tl.load(ROW_WEIGHT + n).to(tl.float32)
        entry = tl.load(IDS + n * id_stride + k, mask=k < kept, other=-1)
        valid = (entry >= 0) & (entry < num_classes) & (k < tl.where(row_weight != 0, kept, 0))
        return tl.where(valid, entry, -1).to(tl.int32), valid, row_weight


@triton.jit
def gather_row(row, id_K, own_K, label_J, own_J):
    """The logits of the kept ids [BK], as they are stored, and of the labels [BJ] in float32; 0
    where they are not this program's own."""
    raw_K = tl.load(row + id_K, mask=own_K, other=0.0)
    x_J = tl.load(row + label_J, mask=own_J, other=0.0).to(tl.float32)
    return raw_K, x_J


@triton.jit
def sums_of_part(
    row,
    begin,
    count,
    id_K,
    own_K,
    c,
    c2,
    rate,
    taught,
    IDS,
    POWERS: tl.constexpr,
    WALK: tl.constexpr,
    EVICT: tl.constexpr,
    SCORES: tl.constexpr,
    BK: tl.constexpr,
):
    """Sweep 1 over `count` columns from `begin` on, the kept ids knocked out: (ref, ref2, one,
    soft, scores, classes of the tail), the last two 0 but with SCORES."""
    if IDS is not None:
        tl.debug_barrier()  # every warp has its copy of the kept logits
        tl.store(
            row + id_K,
            tl.full([BK], -float("inf"), tl.float32).to(row.dtype.element_ty),
            mask=own_K,
        )
        tl.debug_barrier()
    theirs = None if taught is None else taught - begin
    sums = sweep_sums(row + begin, count, c, c2, POWERS, WALK, EVICT, rate, SCORES, theirs)
    scores = 0.0
    size = 0
    # the kept ids read -inf; any other -inf is a logit of the tail
    if SCORES:
        size = count if taught is None else tl.minimum(tl.maximum(theirs, 0), count)
        size -= tl.sum(own_K.to(tl.int32), axis=0)
        scores = tl.where(sums[5] < size, -float("inf"), sums[4])
    return sums[0], sums[1], sums[2], sums[3], scores, size


@triton.jit
def merge_parts(STATE, parts, POWERS: tl.constexpr, SLOTS: tl.constexpr):
    """The sums of a row from those of its parts, at most 64: (ref, ref2, one, soft, scores)."""
    P: tl.constexpr = POWERS[0]
    Q: tl.constexpr = POWERS[1]
    TWO: tl.constexpr = POWERS[2]
    slot = tl.arange(0, 64)
    held = slot < parts
    ref_S = tl.load(STATE + slot * SLOTS, mask=held, other=FLOOR)
    ref2_S = tl.load(STATE + slot * SLOTS + 1, mask=held, other=FLOOR)
    one_S = tl.load(STATE + slot * SLOTS + 2, mask=held, other=0.0)
    soft_S = tl.load(STATE + slot * SLOTS + 3, mask=held, other=0.0)
    ref = tl.max(ref_S, axis=0)
    ref2 = tl.max(ref2_S, axis=0)
    scores = 0.0
    if SLOTS > 4:
        scores_S = tl.load(STATE + slot * SLOTS + 4, mask=held, other=0.0)
        number_S = tl.load(STATE + slot * SLOTS + 5, mask=held, other=0.0)
        scores_S = tl.fma(number_S, (ref2_S - ref2) if TWO else (ref_S - ref), scores_S)
        scores = tl.sum(scores_S, axis=0)
    if P > 0:
        one_S *= power(tl.exp2(ref_S - ref), P)
    if TWO:
        soft_S *= tl.exp2(ref2_S - ref2)
    elif Q > 0:
        soft_S *= power(tl.exp2(ref_S - ref), Q)
    one, soft = sum_pair(one_S, soft_S)
    return ref, ref2, one, soft, scores


@triton.jit
def finish_row(
    row,
    out,
    begin,
    count,
    raw_K,
    x_J,
    id_K,
    valid_K,
    own_K,
    label_J,
    weight_J,
    own_J,
    row_weight,
    sums,
    tail_size,
    log_q_K,
    log_q_tail,
    ce_scale,
    kd_scale,
    c,
    c2,
    temperature,
    divergence,
    gain,
    rate,
    taught,
    IDS,
    POWERS: tl.constexpr,
    WALK: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    GRADIENT: tl.constexpr,
    INPLACE: tl.constexpr,
    REVERSE: tl.constexpr,
    EVICT: tl.constexpr,
    SCORES: tl.constexpr,
):
    """(loss, CE, D) of a row from its sums; sweep 2 over `count` columns from `begin` on writes
    their gradient, then the exact entries of kept ids and labels. What was knocked out is put back
    where the gradient does not take its place."""
    ref, ref2, one, soft, scores = sums
    P: tl.constexpr = POWERS[0]
    Q: tl.constexpr = POWERS[1]
    x_K = tl.where(valid_K, raw_K.to(tl.float32), -float("inf"))
    if rate is not None:
        x_K, steep_K = capped(x_K, rate)
        x_J, steep_J = capped(x_J, rate)
    loss, ce, kd, a_one, a_soft, even, g_K = values_and_slopes(
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
        POWERS,
        BK,
        TAIL,
    )
    if gain is not None:
        a_one *= gain
        a_soft *= gain
        even *= gain
        g_K *= gain
    if GRADIENT:
        if P + Q > 0:
            sweep_gradient(
                row + begin,
                out + begin,
                count,
                ref,
                ref2,
                a_one,
                a_soft,
                c,
                c2,
                POWERS,
                WALK,
                REVERSE,
                even if SCORES else None,
                rate,
                EVICT,
                None if taught is None else taught - begin,
            )
        else:
            tl.debug_barrier()  # every warp has read the kept logits
            fill_zeros(out + begin, count, WALK)
        tl.debug_barrier()  # the entries below were written by other warps
        if rate is not None:
            g_K *= steep_K
        tl.store(out + id_K, g_K.to(out.dtype.element_ty), mask=own_K)
        if ce_scale is not None:
            kept_J = tl.max((label_J[:, None] == id_K[None, :]).to(tl.int32), axis=1)
            taken_J = tl.sum(
                tl.where(label_J[:, None] == label_J[None, :], weight_J[None, :], 0.0),
                axis=1,
            )
            g_J = dense_gradient(
                x_J,
                ref,
                ref2,
                a_one,
                a_soft,
                c,
                c2,
                POWERS,
                share_of(even if SCORES else None, label_J, taught),
            )
            g_J -= (ce_scale if gain is None else ce_scale * gain) * taken_J
            if rate is not None:
                g_J *= steep_J
            tl.store(out + label_J, g_J.to(out.dtype.element_ty), mask=own_J & (kept_J == 0))
    else:
        tl.debug_barrier()
    if IDS is not None and not (GRADIENT and INPLACE):
        if P + Q > 0:
            tl.store(row + id_K, raw_K, mask=own_K)
    return loss, ce, kd


# Of pointers that are read or written a few times a row, the compiler is not told whether they are
# multiples of 16 bytes: each slice of a batch would be another build, and no access of theirs would
# be wider.
ROW_POINTERS = (
    "LOSS",
    "CE",
    "KD",
    "LABELS",
    "LABEL_WEIGHT",
    "IDS",
    "LOG_Q",
    "LOG_TAIL",
    "ROW_WEIGHT",
    "CE_SCALE",
    "KD_SCALE",
)


@triton.jit(
    do_not_specialize=[
        "label_stride",
        "label_weight_stride",
        "id_stride",
        "q_stride",
        "kept",
        "num_labels",
        "taught",
        "parts",
    ],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def kd_rows(
    X,
    G,
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
    num_classes,
    width,
    kept,
    num_labels,
    taught,
    c,
    c2,
    temperature,
    beta,
    gain,
    rate,
    STATE,
    KEPT,
    LABELLED,
    part,
    parts,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    TWO: tl.constexpr,
    GRADIENT: tl.constexpr,
    INPLACE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    REVERSE: tl.constexpr,
    HINTS: tl.constexpr,
    STAGE: tl.constexpr,
):
    """One row, or one part of one row. Every output is written, whatever the row is.

    STAGE 0: a program has the whole row. Where rows are few, `parts` programs share one, in two
    launches: stage 1 leaves the sums of each part in STATE [N, parts, SLOTS], and the logits of
    kept ids and of labels in KEPT and LABELLED; stage 2 merges the parts (each program for itself)
    and goes on with its own columns.

    c and c2 have the scale of the logits in them, or the cap; `gain` is the scale where it is not
    1, as a factor of the gradient, and `rate` the scale over the cap where there is one. `taught`
    is given where the teacher's tail is even and the student has classes of its own: the teacher's
    are those below it.
    """
    LEAVE: tl.constexpr = "evict_first" if HINTS else ""
    STAY: tl.constexpr = "evict_last" if HINTS and GRADIENT else LEAVE
    SCORES: tl.constexpr = TAIL == "uniform" and IDS is not None
    SLOTS: tl.constexpr = 6 if SCORES else 4
    POWERS: tl.constexpr = (P, Q, TWO)
    WALK: tl.constexpr = (R, C, VEC, ALIGNED)
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) if STAGE > 0 else 0
    begin = s * part
    count = tl.minimum(part, num_classes - begin) if STAGE > 0 else num_classes
    row = row_start(X, n, x_stride, VEC, ALIGNED)
    # two registers less through both sweeps
    out = row if INPLACE else row_start(G, n, g_stride, VEC, ALIGNED)
    label_J, weight_J = known_labels(
        LABELS, LABEL_WEIGHT, n, label_stride, label_weight_stride, num_labels, num_classes, BJ
    )
    id_K, valid_K, row_weight = known_ids(IDS, ROW_WEIGHT, n, id_stride, kept, num_classes, BK)
    loss = 0.0
    ce = 0.0
    kd = 0.0
    if tl.max(tl.abs(weight_J), axis=0) + tl.abs(row_weight) != 0:
        k = tl.arange(0, BK)
        log_q_K = None
        log_q_tail = None
        if LOG_Q is not None:
            log_q_K, log_q_tail = given_teacher(LOG_Q, LOG_TAIL, n, q_stride, valid_K, TAIL, BK)
        ce_scale = tl.load(CE_SCALE).to(tl.float32) if CE_SCALE is not None else None
        kd_scale = tl.load(KD_SCALE).to(tl.float32) if KD_SCALE is not None else None
        own_K = valid_K & (id_K // part == s) if STAGE > 0 else valid_K
        own_J = (weight_J != 0) & (label_J // part == s) if STAGE > 0 else weight_J != 0
        ref = FLOOR
        ref2 = FLOOR
        one = 0.0
        soft = 0.0
        scores = 0.0
        size = 0
        if STAGE == 2:
            raw_K = tl.load(KEPT + n * BK + k, mask=valid_K, other=0.0)
            x_J = tl.load(LABELLED + n * BJ + tl.arange(0, BJ), mask=weight_J != 0, other=0.0)
            ref, ref2, one, soft, scores = merge_parts(
                STATE + n * parts * SLOTS, parts, POWERS, SLOTS
            )
        else:
            raw_K, x_J = gather_row(row, id_K, own_K, label_J, own_J)
            if P + Q > 0:
                ref, ref2, one, soft, scores, size = sums_of_part(
                    row,
                    begin,
                    count,
                    id_K,
                    own_K,
                    c,
                    c2,
                    rate,
                    taught,
                    IDS,
                    POWERS,
                    WALK,
                    STAY,
                    SCORES,
                    BK,
                )
        if STAGE == 1:
            at = STATE + (n * parts + s) * SLOTS
            tl.store(at, ref)
            tl.store(at + 1, ref2)
            tl.store(at + 2, one)
            tl.store(at + 3, soft)
            if SCORES:
                tl.store(at + 4, scores)
                tl.store(at + 5, size.to(tl.float32))
            tl.store(KEPT + n * BK + k, raw_K, mask=own_K)
            tl.store(LABELLED + n * BJ + tl.arange(0, BJ), x_J, mask=own_J)
        else:
            tail_size = 0
            if SCORES:
                tail_size = (num_classes if taught is None else taught) - tl.sum(
                    valid_K.to(tl.int32), axis=0
                )
            loss, ce, kd = finish_row(
                row,
                out,
                begin,
                count,
                raw_K,
                x_J,
                id_K,
                valid_K,
                own_K,
                label_J,
                weight_J,
                own_J,
                row_weight,
                (ref, ref2, one, soft, scores),
                tail_size,
                log_q_K,
                log_q_tail,
                ce_scale,
                kd_scale,
                c,
                c2,
                temperature,
                (DIVERGENCE, beta),
                gain,
                rate,
                taught,
                IDS,
                POWERS,
                WALK,
                BK,
                TAIL,
                GRADIENT,
                INPLACE,
                REVERSE,
                LEAVE,
                SCORES,
            )
    elif GRADIENT and STAGE != 1:
        fill_zeros(out + begin, count, WALK)
    if STAGE != 1 and s == 0:
        if GRADIENT:
            for at in tl.range(num_classes, width, C):
                column = at + tl.arange(0, C)
                tl.store(out + column, tl.zeros([C], out.dtype.element_ty), mask=column < width)
        tl.store(LOSS + n, loss)
        tl.store(CE + n, ce)
        tl.store(KD + n, kd)


@triton.jit(do_not_specialize=["factor_stride"], do_not_specialize_on_alignment=["FACTOR"])
def scale_rows(
    G,
    OUT,
    FACTOR,
    g_stride,
    out_stride,
    factor_stride,
    width,
    R: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    INPLACE: tl.constexpr,
):
    """OUT = G times one factor per row; in place a row of factor 1 is left unread. The test is made
    on the device.
    """
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
