"""The kernel of `topk_lse`: one program per row, one sweep over it, and a second look at the lanes
that matter.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code: its arguments are pointers and blocks, which have no types of their own; its tuples
# grow by addition alone.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.sweeps import row_start, span
from kdcache.kernels.topk_lanes import choose_lanes, key_of, load_apart, look_again, packed
from kdcache.kernels.topk_sweep import LEAST, exp_of, moments, sweep, zeros_each

NOT_A_NUMBER, INFINITE, EMPTY, BAD_LABEL = (tl.constexpr(flag) for flag in (1, 2, 4, 8))
CHUNK = tl.constexpr(8)  # elements that all others are compared with at a time


@triton.jit
def edge_at(slot, body, M: tl.constexpr):
    """Column, counted from the vectors' first, of the slot-th of M before and M after the vectors."""
    return tl.where(slot < M, slot - M, body + slot - M)


@triton.jit
def load_edges(start, lead, body, num_classes, VEC: tl.constexpr):
    """Logits, -inf where there is none, ids, and where there is one [2 VEC] of the columns beside
    the vectors.
    """
    column = edge_at(tl.arange(0, 2 * VEC), body, VEC)
    id = lead + column
    inside = (id >= 0) & (id < num_classes)
    return tl.load(start + column, mask=inside, other=-float("inf")).to(tl.float32), id, inside


@triton.jit
def what_is_wrong(start, body, sums, edge, top, L: tl.constexpr, B: tl.constexpr):
    """NOT_A_NUMBER, INFINITE, EMPTY or 0. The sums of a lane with NaN are NaN, and so are those of
    one with +inf.
    """
    wrong = tl.max((sums != sums).to(tl.int32), axis=0) | tl.max(
        (edge != edge).to(tl.int32), axis=0
    )
    if top == float("inf"):
        wrong = tl.max((edge != edge).to(tl.int32), axis=0)
        for at in tl.range(0, body, L * B):
            inside = at + tl.arange(0, L * B) < body
            x = tl.load(start + at + tl.arange(0, L * B), mask=inside, other=0.0).to(tl.float32)
            wrong = wrong | tl.max((x != x).to(tl.int32), axis=0)
    return tl.where(
        wrong != 0,
        NOT_A_NUMBER,
        tl.where(top == float("inf"), INFINITE, tl.where(top == -float("inf"), EMPTY, 0)),
    )


@triton.jit
def entries(FOUND, slot, found, CAP: tl.constexpr, SHIFT: tl.constexpr):
    """Value, id and order of what was collected at some slots; beyond it an order below all."""
    value = tl.load(FOUND + slot, mask=slot < found, other=0).to(tl.float32, bitcast=True)
    id = tl.load(FOUND + CAP + slot, mask=slot < found, other=0)
    return (
        value,
        id,
        tl.where(
            slot < found, packed(key_of(value, SHIFT), id), tl.full(slot.shape, -(2**62), tl.int64)
        ),
    )


@triton.jit
def store_head(FOUND, found, IDS, VALUES, n, k, CAP: tl.constexpr, SHIFT: tl.constexpr):
    """Writes the k first of what was collected; returns the order of the k-th.

    The place of an element is the number of those before it: orders differ, so no place is taken
    twice.
    """
    slot = tl.arange(0, CAP)
    value, id, order = entries(FOUND, slot, found, CAP, SHIFT)
    before = tl.zeros([CAP, CHUNK], tl.int32)
    for begin in tl.range(0, found, CHUNK):
        other = entries(FOUND, begin + tl.arange(0, CHUNK), found, CAP, SHIFT)[2]
        before += (other[None, :] > order[:, None]).to(tl.int32)
    rank = tl.sum(before, axis=1)
    head = (slot < found) & (rank < k)
    tl.store(IDS + n * k + rank, id.to(tl.int64), mask=head)
    tl.store(VALUES + n * k + rank, value, mask=head)
    return tl.min(tl.where(head, order, tl.full([CAP], 2**62, tl.int64)), axis=0)


@triton.jit
def factor(x, T: tl.constexpr):
    """exp(x / T) of one x <= 0. It scales a whole sum: what rounding takes from the exponent is put
    back.
    """
    x = tl.maximum(x, -200.0 * T)  # 0 from there on; -inf would give NaN
    c = tl.full([], 1.4426950408889634 / T, tl.float32)
    product = x * c
    return tl.exp2(product) * (1.0 + tl.fma(x, c, -product) * 0.6931471805599453)


@triton.jit
def store_sums(
    start,
    lead,
    PIECES,
    number,
    last,
    SUMS,
    TAIL,
    n,
    LABELS,
    num_classes,
    J: tl.constexpr,
    TEMPS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Tails of both rounds' sums and the elements of PIECES, of which the head, at or before
    `last`, and labels are none.
    """
    B: tl.constexpr = SHAPE[1]
    PART: tl.constexpr = SHAPE[3]
    EDGES: tl.constexpr = SHAPE[4]
    SHIFT: tl.constexpr = SHAPE[5]
    T: tl.constexpr = len(TEMPS[0])
    top = tl.load(SUMS)
    best = tl.full([PART, B], -float("inf"), tl.float32)
    tails = zeros_each([PART, B], T)
    # mostly once; each place of the tile has sums of its own: no reduction
    for at in tl.range(0, number, PART):
        x, id, _ = load_apart(start, lead, PIECES, at, number, num_classes, B, PART, EDGES)
        kept = packed(key_of(x, SHIFT), id) >= last
        for j in tl.static_range(J):
            kept = kept | (id == tl.load(LABELS + j))
        x = tl.where(kept, -float("inf"), x)
        new = tl.maximum(best, x)
        to = tl.maximum(new, LEAST)
        old = tails
        tails = ()
        for i in tl.static_range(T):
            tails = tails + (
                old[i] * exp_of(tl.maximum(best, LEAST) - to, i, TEMPS) + exp_of(x - to, i, TEMPS),
            )
        best = new
    best = tl.reshape(best, [PART * B], can_reorder=True)
    first = tl.load(SUMS + 1)
    second = tl.load(SUMS + 2 + T)
    ref = tl.maximum(tl.max(best, axis=0), tl.maximum(first, second))
    fall = tl.maximum(best, LEAST) - ref
    for i in tl.static_range(T):
        own = tl.reshape(tails[i], [PART * B], can_reorder=True) * exp_of(fall, i, TEMPS)
        of_tail = tl.sum(own, axis=0)
        of_tail += tl.load(SUMS + 2 + i) * factor(first - ref, TEMPS[3][i])
        of_tail += tl.load(SUMS + 3 + T + i) * factor(second - ref, TEMPS[3][i])
        tl.store(
            TAIL + n * T + i,
            tl.where(of_tail > 0, tl.log(of_tail) + (ref - top) / TEMPS[3][i], -float("inf")),
        )


@triton.jit
def store_nothing(
    IDS,
    VALUES,
    TAIL,
    MEAN,
    STD,
    n,
    k,
    T: tl.constexpr,
    CAP: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """What a row without an answer gets: ids -1, the rest NaN."""
    slot = tl.arange(0, CAP)
    tl.store(IDS + n * k + slot, tl.full([CAP], -1, tl.int64), mask=slot < k)
    tl.store(VALUES + n * k + slot, tl.full([CAP], float("nan"), tl.float32), mask=slot < k)
    for i in tl.static_range(T):
        tl.store(TAIL + n * T + i, float("nan"))
    if MOMENTS:
        tl.store(MEAN + n, float("nan"))
        tl.store(STD + n, float("nan"))


@triton.jit
def keep_row(
    start,
    lead,
    body,
    best,
    sums,
    SCRATCH,
    IDS,
    VALUES,
    TAIL,
    n,
    num_classes,
    id_bits,
    k,
    TEMPS: tl.constexpr,
    J: tl.constexpr,
    VEC: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Head and tails of a good row, from the maxima and sums of its lanes."""
    L: tl.constexpr = SHAPE[0]
    B: tl.constexpr = SHAPE[1]
    CAP: tl.constexpr = SHAPE[2]
    EDGES: tl.constexpr = SHAPE[4]
    SHIFT: tl.constexpr = SHAPE[5]
    SUMS = SCRATCH.to(tl.pointer_type(tl.float32), bitcast=True)
    LABELS = SCRATCH + 3 + 2 * len(TEMPS[0])
    LANES = LABELS + J
    FOUND = LANES + J + CAP
    chosen, bound, bound_id = choose_lanes(start, lead, body, best, k, L, B, CAP, SHIFT)
    tl.debug_barrier()  # labels were stored by one thread
    # a lane with a label is looked at again too, to leave the label out
    for j in tl.static_range(J):
        place = tl.load(LABELS + j) - lead
        chosen = chosen | (
            (place >= 0) & (place < body) & (tl.arange(0, L) == place % (L * B) // B)
        )
    number = tl.cumsum(chosen.to(tl.int32), axis=0)
    # none where all columns are edges: a step count of 0
    lanes = tl.maximum(tl.max(number, axis=0), 1)
    tl.store(LANES + number - 1, tl.arange(0, L), mask=chosen)
    if EDGES > 0:
        edge = tl.arange(0, EDGES)
        tl.store(FOUND + 2 * CAP + edge, edge_at(edge * B, body, VEC))
    rest = ()
    for i in tl.static_range(len(TEMPS[0])):
        rest = rest + (tl.where(chosen, 0.0, sums[i]),)
    best = tl.where(chosen, -float("inf"), best)
    tl.debug_barrier()
    number, found = look_again(
        start,
        lead,
        body,
        LANES,
        FOUND,
        SUMS,
        lanes,
        bound,
        bound_id,
        best,
        rest,
        LABELS,
        num_classes,
        id_bits,
        k,
        J,
        TEMPS,
        SHAPE,
    )
    last = store_head(FOUND, found, IDS, VALUES, n, k, CAP, SHIFT)
    store_sums(
        start,
        lead,
        FOUND + 2 * CAP,
        number,
        last,
        SUMS,
        TAIL,
        n,
        LABELS,
        num_classes,
        J,
        TEMPS,
        SHAPE,
    )


@triton.jit(
    do_not_specialize=["label_stride", "id_bits", "k"], do_not_specialize_on_alignment=["LABELS"]
)
def topk_rows(
    X,
    IDS,
    VALUES,
    TAIL,
    LABEL_LOGIT,
    MEAN,
    STD,
    FLAG,
    LABELS,
    SCRATCH,
    x_stride,
    label_stride,
    num_classes,
    id_bits,
    k,
    TEMPS: tl.constexpr,
    J: tl.constexpr,
    CAP: tl.constexpr,
    A: tl.constexpr,
    L: tl.constexpr,
    B: tl.constexpr,
    PART: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHIFT: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """One row. Every output is written; those of a row with NaN, +inf or no finite logit are NaN,
    its ids -1.
    """
    T: tl.constexpr = len(TEMPS[0])
    n = tl.program_id(0).to(tl.int64)
    row = row_start(X, n, x_stride, VEC, ALIGNED)
    start, lead, body = span(row, num_classes, VEC, ALIGNED)
    best, sums, base, shift, square = sweep(start, body, TEMPS, A, L, B, MOMENTS)
    edge = tl.full([2 * VEC], -float("inf"), tl.float32)
    if not ALIGNED:
        edge = load_edges(start, lead, body, num_classes, VEC)[0]
    top = tl.maximum(tl.max(best, axis=0), tl.max(edge, axis=0))
    flag = what_is_wrong(start, body, sums[0], edge, top, L, B)
    SCRATCH += n * (4 * CAP + 2 * J + 3 + 2 * T)
    bad = 0
    for j in tl.static_range(J):
        label = tl.load(LABELS + n * label_stride + j).to(tl.int64)
        bad = tl.where(label >= num_classes, BAD_LABEL, bad)
        label = tl.where((label >= 0) & (label < num_classes), label, -1).to(tl.int32)
        x = tl.load(row + label, mask=label >= 0, other=-float("inf")).to(tl.float32)
        tl.store(LABEL_LOGIT + n * J + j, tl.where(flag == 0, x, float("nan")))
        tl.store(SCRATCH + 3 + 2 * T + j, label)
    tl.store(SCRATCH, top.to(tl.int32, bitcast=True))
    # a second round of looking again, which there mostly is none
    for i in tl.static_range(1 + T):
        tl.store(
            SCRATCH + 2 + T + i,
            tl.full([], LEAST if i == 0 else 0.0, tl.float32).to(tl.int32, bitcast=True),
        )
    tl.store(FLAG + n, tl.where(flag == 0, bad, flag))
    if flag != 0:
        store_nothing(IDS, VALUES, TAIL, MEAN, STD, n, k, T, CAP, MOMENTS)
    else:
        if MOMENTS:
            m, std = moments(start, body, edge, base, shift, square, L, B)
            tl.store(MEAN + n, m)
            tl.store(STD + n, std)
        keep_row(
            start,
            lead,
            body,
            best,
            sums,
            SCRATCH,
            IDS,
            VALUES,
            TAIL,
            n,
            num_classes,
            id_bits,
            k,
            TEMPS,
            J,
            VEC,
            (L, B, CAP, PART, 0 if ALIGNED else 2 * VEC // B, SHIFT),
        )
