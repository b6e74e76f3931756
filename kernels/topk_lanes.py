"""The lanes of `topk_lse`: which lanes of a row hold its head, and the second look at them.

A row is cut into L lanes: lane l holds the columns t C + l B .. + B - 1 of every t, C = L B. Order
is total: logit descending, then id ascending; a key is an int32 that sorts as the logit, and the id
where keys are equal.

The second look is at the lanes that hold the head, those of labels, and what may be kept of them.
Warps meet in memory, each place written before a barrier and read after it: LANES, the lanes looked
at again; PIECES, the pieces of them that may hold what is kept or a label; FOUND, the elements that
may be kept; SUMS, the greatest logit and the sums of both rounds. A second round writes PIECES and
FOUND again, behind a barrier after their last reading.

SHAPE is (L, B, CAP, PART, EDGES, SHIFT): lanes, columns of a piece, places of what is collected,
how many pieces are read at a time, edges beside the vectors, and low bits that a logit's dtype
never uses.
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.topk_sweep import LEAST, add_tile, exp_of, zeros_each

NEVER = tl.constexpr(-(2**31))  # below the key of every float, NaN included
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """int32 that sort as the float32 x do, -0.0 and +0.0 alike. SHIFT: low bits that this dtype
    never uses.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The float32 whose key this is; a key that no float has gives one in between, -0.0 just below
    0.
    """
    order = (key << SHIFT) | ((key >> 31) & ((1 << SHIFT) - 1))
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def middle(low, high):
    """Floor of the mean of two integers, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def packed(key, id):
    """int64 that sorts as (key, -id)."""
    return (key.to(tl.int64) << 31) | (id ^ LAST).to(tl.int64)


@triton.jit
def reaches(x, id, bound, bound_id):
    return (x > bound) | ((x == bound) & (id <= bound_id))


@triton.jit
def load_pieces(start, first, body, B: tl.constexpr):
    """[M, B] logits, -inf where there is no piece."""
    column = first[:, None] + tl.arange(0, B)[None, :]
    inside = tl.broadcast_to((first < body)[:, None], column.shape)
    return tl.load(start + column, mask=inside, other=-float("inf")).to(tl.float32), column, inside


@triton.jit
def choose_lanes(
    start,
    lead,
    body,
    best,
    k,
    L: tl.constexpr,
    B: tl.constexpr,
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The lanes [L] to look at again, k or more, and a bound (logit, id) that nothing of the other
    lanes reaches.

    Each of the k has an element at or above the bound, so the bound is at or below the k-th of the
    row. Lanes whose maximum is the k-th are all taken, unless they are more than 3/4 of CAP with
    the others: what reaches the bound then mostly fits into CAP. With at most k lanes in use all
    are taken, and the bound is below everything.
    """
    used = tl.arange(0, L) * B < body
    key_L = tl.where(used, key_of(best, SHIFT), NEVER)
    chosen = used
    low = key_of(tl.full([], -float("inf"), tl.float32), SHIFT)
    bound_id = tl.full([], LAST, tl.int32)
    found = tl.minimum((body + B - 1) // B, L)
    if found > k:
        low = tl.min(tl.where(used, key_L, LAST), axis=0)
        high = tl.max(key_L, axis=0) + 1
        mid = middle(low, high)
        while (mid > low) & (found != k):
            count = tl.sum((key_L >= mid).to(tl.int32), axis=0)
            enough = count >= k
            low = tl.where(enough, mid, low)
            found = tl.where(enough, count, found)
            high = tl.where(enough, high, mid)
            mid = middle(low, high)
        chosen = key_L >= low
        if found > CAP // 4 * 3:
            chosen, last = first_of_tied(start, body, key_L, low, k, L, B, SHIFT)
            bound_id = lead + last
    return chosen, value_of(low, SHIFT), bound_id


@triton.jit
def first_of_tied(
    start, body, key_L, low, k, L: tl.constexpr, B: tl.constexpr, SHIFT: tl.constexpr
):
    """k lanes [L]: of those whose maximum is the k-th, the ones that have it first; and the last
    such column.

    Reads the row again: many lanes are tied where logits are all equal, masked, or of few values.
    """
    tied = key_L == low
    value = value_of(low, SHIFT)
    wanted = k - tl.sum((key_L > low).to(tl.int32), axis=0)
    first = tl.full([L], LAST, tl.int32)
    for at in tl.range(0, body, L * B):
        piece = tl.where(tied, tl.minimum(at + tl.arange(0, L) * B, body), body)
        x, column, inside = load_pieces(start, piece, body, B)
        first = tl.minimum(first, tl.min(tl.where(inside & (x == value), column, LAST), axis=1))
    below = -1
    last = body - 1
    mid = middle(below, last)
    while mid > below:
        enough = tl.sum((tied & (first <= mid)).to(tl.int32), axis=0) >= wanted
        last = tl.where(enough, mid, last)
        below = tl.where(enough, below, mid)
        mid = middle(below, last)
    return (key_L > low) | (tied & (first <= last)), last


@triton.jit
def first_pieces(lanes, at, L: tl.constexpr):
    """(tile, which of the chosen lanes) of the L pieces from number `at` on: lane by lane of the
    first tile, and on.
    """
    number = at + tl.arange(0, L)
    return number // lanes, number % lanes


@triton.jit
def next_pieces(tile, which, lanes, L: tl.constexpr):
    """The same L pieces further on, without a division."""
    which += L % lanes
    over = which >= lanes
    return tile + L // lanes + over.to(tl.int32), tl.where(over, which - lanes, which)


@triton.jit
def columns_of(tile, which, LANES, body, L: tl.constexpr, B: tl.constexpr):
    """First columns of pieces, `body` beyond the row."""
    return tl.minimum(tile * (L * B) + tl.load(LANES + which) * B, body)


@triton.jit
def sweep_again(
    start,
    lead,
    body,
    LANES,
    PIECES,
    lanes,
    seen,
    seen_id,
    bound,
    bound_id,
    best,
    sums,
    LABELS,
    J: tl.constexpr,
    TEMPS: tl.constexpr,
    SHAPE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Adds pieces of the chosen lanes to the tail, but for those that may reach the bound or hold a
    label.

    Those go to PIECES, behind EDGES others. In round 2 a piece that could not reach (seen, seen_id)
    is in the sums already. What is set apart is noted in one bit a step and numbered afterwards:
    the loop has no barrier.
    """
    L: tl.constexpr = SHAPE[0]
    B: tl.constexpr = SHAPE[1]
    CAP: tl.constexpr = SHAPE[2]
    EDGES: tl.constexpr = SHAPE[4]
    number = EDGES
    steps = tl.cdiv(lanes * ((body + L * B - 1) // (L * B)), L)
    for begin in tl.range(0, steps, 32):
        end = tl.minimum(begin + 32, steps)
        tile, which = first_pieces(lanes, begin * L, L)
        noted = tl.zeros([L], tl.int32)
        for step in tl.range(begin, end):
            first = columns_of(tile, which, LANES, body, L, B)
            x = load_pieces(start, first, body, B)[0]
            top = tl.max(x, axis=1)
            apart = reaches(top, lead + first, bound, bound_id)
            for j in tl.static_range(J):
                from_first = tl.load(LABELS + j) - lead - first
                apart = apart | ((from_first >= 0) & (from_first < B))
            apart = apart & (first < body)
            noted = noted | (apart.to(tl.int32) << (step - begin))
            if ROUND == 2:
                apart = apart | (reaches(top, lead + first, seen, seen_id) == 0)
            x = tl.where(apart[:, None], -float("inf"), x)
            best, sums = add_tile(tl.reshape(x, [1, L, B]), best, sums, TEMPS)
            tile, which = next_pieces(tile, which, lanes, L)
        number = note_pieces(
            LANES, PIECES, number, noted, lanes, begin, end - begin, body, L, B, CAP
        )
    return number, best, sums


@triton.jit
def note_pieces(
    LANES,
    PIECES,
    number,
    noted,
    lanes,
    begin,
    steps,
    body,
    L: tl.constexpr,
    B: tl.constexpr,
    CAP: tl.constexpr,
):
    """Pieces whose bit is set, to PIECES from `number` on, as far as CAP; the next number, beyond
    it too.
    """
    count = tl.zeros([L], tl.int32)
    for step in tl.range(0, steps):
        count += (noted >> step) & 1
    place = number + tl.cumsum(count, axis=0) - count
    tile, which = first_pieces(lanes, begin * L, L)
    for step in tl.range(0, steps):
        one = (noted >> step) & 1
        tl.store(
            PIECES + place,
            columns_of(tile, which, LANES, body, L, B),
            mask=(one > 0) & (place < CAP),
        )
        place += one
        tile, which = next_pieces(tile, which, lanes, L)
    return tl.max(place, axis=0)


@triton.jit
def load_apart(
    start,
    lead,
    PIECES,
    at,
    number,
    num_classes,
    B: tl.constexpr,
    PART: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Of the elements [PART, B] of PIECES from `at` on: logits, -inf where is none, ids, and where
    there is one.
    """
    slot = at + tl.arange(0, PART)
    column = tl.load(PIECES + slot, mask=slot < number, other=0)[:, None] + tl.arange(0, B)[None, :]
    inside = tl.broadcast_to((slot < number)[:, None], column.shape)
    id = lead + column
    if EDGES > 0:
        inside = inside & (id >= 0) & (id < num_classes)
    return tl.load(start + column, mask=inside, other=-float("inf")).to(tl.float32), id, inside


@triton.jit
def collect(
    start,
    lead,
    PIECES,
    FOUND,
    number,
    bound,
    bound_id,
    num_classes,
    SHAPE: tl.constexpr,
):
    """What reaches the bound, to FOUND; how many do, CAP + 1 where PIECES did not hold all that
    may.
    """
    B: tl.constexpr = SHAPE[1]
    CAP: tl.constexpr = SHAPE[2]
    PART: tl.constexpr = SHAPE[3]
    EDGES: tl.constexpr = SHAPE[4]
    found = 0
    for at in tl.range(0, tl.minimum(number, CAP), PART):
        x, id, inside = load_apart(
            start, lead, PIECES, at, tl.minimum(number, CAP), num_classes, B, PART, EDGES
        )
        over = tl.reshape(inside & reaches(x, id, bound, bound_id), [PART * B]).to(tl.int32)
        place = found + tl.cumsum(over, axis=0) - 1
        kept = (over > 0) & (place < CAP)
        tl.store(FOUND + place, tl.reshape(x, [PART * B]).to(tl.int32, bitcast=True), mask=kept)
        tl.store(FOUND + CAP + place, tl.reshape(id, [PART * B]), mask=kept)
        found += tl.sum(over, axis=0)
    return tl.where(number > CAP, CAP + 1, found)


@triton.jit
def raise_bound(
    start,
    lead,
    body,
    LANES,
    PIECES,
    lanes,
    bound,
    bound_id,
    top,
    num_classes,
    id_bits,
    k,
    MOST: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """A bound that at least k and at most MOST elements reach: by bisection, each step one look at
    the chosen lanes.

    Over (key, id) as one integer, of `id_bits` for the id: `low` is reached by k or more, `high` by
    fewer, and each step halves what is between. Neighbours differ by at most one element, so at the
    latest `low` next to `high` is reached by k: it ends.
    """
    L: tl.constexpr = SHAPE[0]
    B: tl.constexpr = SHAPE[1]
    EDGES: tl.constexpr = SHAPE[4]
    SHIFT: tl.constexpr = SHAPE[5]
    bottom = key_of(bound, SHIFT).to(tl.int64)
    ids = (tl.full([], 1, tl.int64) << id_bits) - 1
    low = ids - tl.minimum(bound_id, ids)
    high = (key_of(top, SHIFT) - bottom + 1) << id_bits
    n = MOST + 1
    while n > MOST:
        mid = middle(low, high)
        value = value_of((bottom + (mid >> id_bits)).to(tl.int32), SHIFT)
        id = (ids - (mid & ids)).to(tl.int32)
        count = 0
        if EDGES > 0:  # the first of PIECES
            edge, edge_id, held = load_apart(
                start, lead, PIECES, 0, EDGES, num_classes, B, EDGES, EDGES
            )
            count += tl.sum(
                tl.sum((held & reaches(edge, edge_id, value, id)).to(tl.int32), axis=1), axis=0
            )
        over = tl.zeros([L], tl.int32)
        tile, which = first_pieces(lanes, 0, L)
        for _ in tl.range(0, tl.cdiv(lanes * ((body + L * B - 1) // (L * B)), L)):
            x, column, inside = load_pieces(
                start, columns_of(tile, which, LANES, body, L, B), body, B
            )
            over += tl.sum((inside & reaches(x, lead + column, value, id)).to(tl.int32), axis=1)
            tile, which = next_pieces(tile, which, lanes, L)
        count += tl.sum(over, axis=0)
        enough = count >= k
        low = tl.where(enough, mid, low)
        high = tl.where(enough, high, mid)
        bound = tl.where(enough, value, bound)
        bound_id = tl.where(enough, id, bound_id)
        n = tl.where(enough, count, n)
    return bound, bound_id


@triton.jit
def one_round(
    start,
    lead,
    body,
    LANES,
    FOUND,
    SUMS,
    lanes,
    seen,
    seen_id,
    bound,
    bound_id,
    best,
    sums,
    LABELS,
    num_classes,
    J: tl.constexpr,
    TEMPS: tl.constexpr,
    SHAPE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Collects what reaches the bound, and joins the rest of the chosen lanes in SUMS; counts of
    PIECES and FOUND.
    """
    CAP: tl.constexpr = SHAPE[2]
    PIECES = FOUND + 2 * CAP
    number, best, sums = sweep_again(
        start,
        lead,
        body,
        LANES,
        PIECES,
        lanes,
        seen,
        seen_id,
        bound,
        bound_id,
        best,
        sums,
        LABELS,
        J,
        TEMPS,
        SHAPE,
        ROUND,
    )
    ref = tl.maximum(tl.max(best, axis=0), LEAST)
    fall = tl.maximum(best, LEAST) - ref
    tl.store(SUMS, ref)
    for i in tl.static_range(len(TEMPS[0])):
        tl.store(SUMS + 1 + i, tl.sum(sums[i] * exp_of(fall, i, TEMPS), axis=0))
    tl.debug_barrier()
    return number, collect(start, lead, PIECES, FOUND, number, bound, bound_id, num_classes, SHAPE)


@triton.jit
def look_again(
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
    sums,
    LABELS,
    num_classes,
    id_bits,
    k,
    J: tl.constexpr,
    TEMPS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One round, and where more than CAP reach the bound, a second.

    At most CAP - EDGES - J - 1 reach its bound: their pieces, the edges', those of labels, and one
    in which the bound's id lies fit into PIECES, so it is the last. Not a loop, in which each
    reduction would hold a register through all.
    """
    L: tl.constexpr = SHAPE[0]
    CAP: tl.constexpr = SHAPE[2]
    EDGES: tl.constexpr = SHAPE[4]
    number, found = one_round(
        start,
        lead,
        body,
        LANES,
        FOUND,
        SUMS + 1,
        lanes,
        None,
        None,
        bound,
        bound_id,
        best,
        sums,
        LABELS,
        num_classes,
        J,
        TEMPS,
        SHAPE,
        1,
    )
    if found > CAP:
        higher, higher_id = raise_bound(
            start,
            lead,
            body,
            LANES,
            FOUND + 2 * CAP,
            lanes,
            bound,
            bound_id,
            tl.load(SUMS),
            num_classes,
            id_bits,
            k,
            CAP - EDGES - J - 1,
            SHAPE,
        )
        tl.debug_barrier()
        number, found = one_round(
            start,
            lead,
            body,
            LANES,
            FOUND,
            SUMS + 2 + len(TEMPS[0]),
            lanes,
            bound,
            bound_id,
            higher,
            higher_id,
            tl.full([L], -float("inf"), tl.float32),
            zeros_each([L], len(TEMPS[0])),
            LABELS,
            num_classes,
            J,
            TEMPS,
            SHAPE,
            2,
        )
    tl.debug_barrier()
    return number, found
