"""The kernel of `kd_loss` for a teacher that gives every class its probability, over rows that fit
in registers.

One program per row, one read of logits and teacher, one write: 2 N V + 4 N V bytes read, 2 N V
written (bf16). Caches of few classes hold such rows; for many classes a sparse teacher is the
point, and longer rows are refused. A student with more classes than the teacher has given them
probability 0; for the conditional divergence they are left out of its softmax at T.

Compiled for sm_90 nothing spills up to 8,192 classes (JSD with every term: up to 4,096). At 16,384
forward KL spills 56 bytes a thread, JSD 192.
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.kd_rows import ROW_POINTERS
from kdcache.kernels.sweeps import LN2, capped, outcome, row_start, sum_pair


@triton.jit
def labels_known(LABELS, LABEL_WEIGHT, n, label_stride, num_labels, num_classes, BJ: tl.constexpr):
    """How many labels of a row there are, where they have no weights and there may be several; else
    1.
    """
    count = 0.0
    if LABEL_WEIGHT is None and BJ > 1:
        for j in tl.static_range(BJ):
            y = tl.load(LABELS + n * label_stride + j, mask=j < num_labels, other=-1)
            count += tl.where((y >= 0) & (y < num_classes), 1.0, 0.0)
    return tl.maximum(count, 1.0)


@triton.jit
def label(
    LABELS, LABEL_WEIGHT, n, j, label_stride, label_weight_stride, num_labels, num_classes, alike
):
    """(id, weight) of the j-th label of a row, weight 0 where there is none and `alike` where none
    are given.
    """
    y = tl.load(LABELS + n * label_stride + j, mask=j < num_labels, other=-1)
    known = (y >= 0) & (y < num_classes)
    weight = tl.where(known, alike, 0.0)
    if LABEL_WEIGHT is not None:
        weight = tl.load(LABEL_WEIGHT + n * label_weight_stride + j, mask=known, other=0.0).to(
            tl.float32
        )
    return tl.where(known, y, 0).to(tl.int32), weight


# LOG_Q is read as vectors
@triton.jit(
    do_not_specialize=["label_stride", "label_weight_stride", "num_labels"],
    do_not_specialize_on_alignment=[
        name for name in ROW_POINTERS if name not in ("IDS", "LOG_Q", "LOG_TAIL")
    ],
)
def kd_full(
    X,
    G,
    LOSS,
    CE,
    KD,
    LABELS,
    LABEL_WEIGHT,
    LOG_Q,
    ROW_WEIGHT,
    CE_SCALE,
    KD_SCALE,
    x_stride,
    g_stride,
    label_stride,
    label_weight_stride,
    q_stride,
    num_classes,
    width,
    num_labels,
    taught,
    c,
    temperature,
    beta,
    unit,
    gain,
    rate,
    BJ: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One row in one block. Every output is written, whatever the row is.

    c = log2(e) / T, times `unit` where that is given: what a logit is multiplied with, its scale or
    its cap. gain and rate as in `kd_rows`. `taught` is given where the teacher's classes, those
    below it, are fewer than the student's; CONDITIONAL then takes the softmax at T over them alone.
    """
    n = tl.program_id(0).to(tl.int64)
    row = row_start(X, n, x_stride, VEC, ALIGNED)
    out = row_start(G, n, g_stride, VEC, ALIGNED)
    columns = tl.arange(0, BLOCK)
    inside = columns < (num_classes // VEC * VEC if ALIGNED else num_classes)
    theirs = inside if taught is None else columns < taught
    row_weight = 1.0
    if ROW_WEIGHT is not None:
        row_weight = tl.load(ROW_WEIGHT + n).to(tl.float32)
    x = tl.load(row + columns, mask=inside, other=-float("inf")).to(tl.float32)
    log_q = tl.load(
        row_start(LOG_Q, n, q_stride, VEC, ALIGNED) + columns, mask=theirs, other=-float("inf")
    ).to(tl.float32)
    if rate is not None:
        x, steep = capped(x, rate)
    top = tl.max(x, axis=0)
    below = x - top if unit is None else (x - top) * unit
    one = tl.exp2(below * (1.0 / LN2))
    compared = inside
    soft_top = top
    if CONDITIONAL:
        compared = theirs
        soft_top = tl.max(tl.where(theirs, x, -float("inf")), axis=0)
    soft = tl.exp2((x - soft_top) * c)
    if CONDITIONAL:
        soft = tl.where(theirs, soft, 0.0)
    z_one, z = sum_pair(one, soft)
    ce = 0.0
    alike = 1.0
    taken = tl.zeros([BLOCK], tl.float32)
    weights = 0.0
    labelled = False
    if LABELS is not None:
        if LABEL_WEIGHT is None and BJ > 1:
            alike /= labels_known(
                LABELS, LABEL_WEIGHT, n, label_stride, num_labels, num_classes, BJ
            )
        for j in tl.static_range(BJ):
            y, weight = label(
                LABELS,
                LABEL_WEIGHT,
                n,
                j,
                label_stride,
                label_weight_stride,
                num_labels,
                num_classes,
                alike,
            )
            x_y = tl.load(row + y).to(tl.float32)
            if rate is not None:
                x_y = capped(x_y, rate)[0]
            below_y = x_y - top if unit is None else (x_y - top) * unit
            ce += tl.where(weight != 0, weight * (tl.log(z_one) - below_y), 0.0)
            taken += tl.where(columns == y, weight, 0.0)
            weights += weight
            labelled = labelled | (weight != 0)
    p = soft / z
    log_p = tl.where(compared, LN2 * c * (x - soft_top) - tl.log(z), -float("inf"))
    q_sum = tl.sum(tl.exp(log_q), axis=0)
    value, slope = outcome(log_q, log_p, p, q_sum, (DIVERGENCE, beta))
    kd, mean = sum_pair(value, p * slope)
    if DIVERGENCE != "forward_kl":
        slope = p * (slope - mean)
    kd = tl.where(row_weight != 0, row_weight * kd, 0.0)
    loss = 0.0
    g = tl.zeros([BLOCK], tl.float32)
    if LABELS is not None and CE_SCALE is not None:
        ce_scale = tl.load(CE_SCALE).to(tl.float32)
        loss += ce_scale * ce
        g = tl.where(labelled, ce_scale * (weights * (one / z_one) - taken), 0.0)
    if KD_SCALE is not None:
        kd_scale = tl.load(KD_SCALE).to(tl.float32)
        loss += kd_scale * kd
        g += tl.where(row_weight != 0, kd_scale * row_weight / temperature * slope, 0.0)
    if gain is not None:
        g *= gain
    if rate is not None:
        g = tl.where(labelled | (row_weight != 0), g * steep, 0.0)
    if GRADIENT:
        tl.debug_barrier()  # every warp has read the logits of the labels
        tl.store(out + columns, g.to(out.dtype.element_ty), mask=inside)
        for at in tl.range(num_classes, width, BLOCK):
            tl.store(
                out + at + columns,
                tl.zeros([BLOCK], out.dtype.element_ty),
                mask=at + columns < width,
            )
    tl.store(LOSS + n, loss)
    tl.store(CE + n, ce)
    tl.store(KD + n, kd)
