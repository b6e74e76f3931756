"""The kernel of `topk_lse`: one program per row, one sweep over it, and a second look at the lanes that matter.

A row is cut into L lanes: lane l holds the columns t C + l B .. + B - 1 of every t, C = L B. Order is total: logit
descending, then id ascending; a key is an int32 that sorts as the logit, and the id where keys are equal.

Warps meet in memory at three places, each written before a barrier and read after it: LANES, the lanes looked at
again; PIECES, the pieces of them that may hold what is kept or a label; FOUND, the elements that may be kept. A second
round of the loop writes the last two again, behind the barrier that ends the first.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code: its arguments are pointers and blocks, which have no types of their own; its tuples
# grow by addition alone.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.rows import row_start, span
from kdcache.kernels.topk_sweep import LEAST, add_tile, exp_of, moments, sweep, zeros_each

NEVER = tl.constexpr(-(2**31))          # below the key of every float, NaN included
LAST = tl.constexpr(2**31 - 1)
CHUNK = tl.constexpr(8)                 # elements that all others are compared with at a time
NOT_A_NUMBER, INFINITE, EMPTY, BAD_LABEL = (tl.constexpr(flag) for flag in (1, 2, 4, 8))


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """int32 that sort as the float32 x do, -0.0 and +0.0 alike. SHIFT: low bits that this dtype never uses."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The float32 whose key this is; a key that no float has gives one in between, -0.0 just below 0."""
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
def first_pieces(lanes, at, L: tl.constexpr):
    """(tile, which of the chosen lanes) of the L pieces from number `at` on: lane by lane of the first tile, and on."""
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
def load_pieces(start, first, body, B: tl.constexpr):
    """[M, B] logits, -inf where there is no piece."""
    column = first[:, None] + tl.arange(0, B)[None, :]
    inside = tl.broadcast_to((first < body)[:, None], column.shape)
    return tl.load(start + column, mask=inside, other=-float("inf")).to(tl.float32), column, inside


@triton.jit
def choose_lanes(start, lead, body, best, k, L: tl.constexpr, B: tl.constexpr, CAP: tl.constexpr, SHIFT: tl.constexpr):
    """The lanes [L] to look at again, k or more, and a bound (logit, id) that nothing of the other lanes reaches.

    Each of the k has an element at or above the bound, so the bound is at or below the k-th of the row. Lanes whose
    maximum is the k-th are all taken, unless they are more than 3/4 of CAP with the others: what reaches the bound then
    mostly fits into CAP. With at most k lanes in use all are taken, and the bound is below everything.
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
def first_of_tied(start, body, key_L, low, k, L: tl.constexpr, B: tl.constexpr, SHIFT: tl.constexpr):
    """k lanes [L]: of those whose maximum is the k-th, the ones that have it first; and the last such column.

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
def sweep_again(start, lead, body, LANES, PIECES, lanes, seen, seen_id, bound, bound_id, best, sums, LABELS,
                J: tl.constexpr, POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr, L: tl.constexpr,
                B: tl.constexpr, CAP: tl.constexpr, EDGES: tl.constexpr, ROUND: tl.constexpr):
    """Adds pieces of the chosen lanes to the tail, but for those that may reach the bound or hold a label.

    Those go to PIECES, behind EDGES others. In round 2 a piece that could not reach (seen, seen_id) is in the sums
    already. What is set apart is noted in one bit a step and numbered afterwards: the loop has no barrier.
    """
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
            best, sums = add_tile(tl.reshape(x, [1, L, B]), best, sums, POWERS, GROUPS, BASES)
            tile, which = next_pieces(tile, which, lanes, L)
        number = note_pieces(LANES, PIECES, number, noted, lanes, begin, end - begin, body, L, B, CAP)
    return number, best, sums


@triton.jit
def note_pieces(LANES, PIECES, number, noted, lanes, begin, steps, body, L: tl.constexpr, B: tl.constexpr,
                CAP: tl.constexpr):
    """Pieces whose bit is set, to PIECES from `number` on, as far as CAP; the next number, beyond it too."""
    count = tl.zeros([L], tl.int32)
    for step in tl.range(0, steps):
        count += (noted >> step) & 1
    place = number + tl.cumsum(count, axis=0) - count
    tile, which = first_pieces(lanes, begin * L, L)
    for step in tl.range(0, steps):
        one = (noted >> step) & 1
        tl.store(PIECES + place, columns_of(tile, which, LANES, body, L, B), mask=(one > 0) & (place < CAP))
        place += one
        tile, which = next_pieces(tile, which, lanes, L)
    return tl.max(place, axis=0)


@triton.jit
def edge_at(slot, body, M: tl.constexpr):
    """Column, counted from the vectors' first, of the slot-th of M before and M after the vectors."""
    return tl.where(slot < M, slot - M, body + slot - M)


@triton.jit
def load_edges(start, lead, body, num_classes, VEC: tl.constexpr):
    """Logits, -inf where there is none, ids, and where there is one [2 VEC] of the columns beside the vectors."""
    column = edge_at(tl.arange(0, 2 * VEC), body, VEC)
    id = lead + column
    inside = (id >= 0) & (id < num_classes)
    return tl.load(start + column, mask=inside, other=-float("inf")).to(tl.float32), id, inside


@triton.jit
def load_apart(start, lead, PIECES, at, number, num_classes, B: tl.constexpr, PART: tl.constexpr, EDGES: tl.constexpr):
    """Of the elements [PART, B] of PIECES from `at` on: logits, -inf where is none, ids, and where there is one."""
    slot = at + tl.arange(0, PART)
    column = tl.load(PIECES + slot, mask=slot < number, other=0)[:, None] + tl.arange(0, B)[None, :]
    inside = tl.broadcast_to((slot < number)[:, None], column.shape)
    id = lead + column
    if EDGES > 0:
        inside = inside & (id >= 0) & (id < num_classes)
    return tl.load(start + column, mask=inside, other=-float("inf")).to(tl.float32), id, inside


@triton.jit
def collect(start, lead, PIECES, FOUND, number, bound, bound_id, num_classes, B: tl.constexpr, CAP: tl.constexpr,
            PART: tl.constexpr, EDGES: tl.constexpr):
    """What reaches the bound, to FOUND; how many do, CAP + 1 where PIECES did not hold all that may."""
    found = 0
    for at in tl.range(0, tl.minimum(number, CAP), PART):
        x, id, inside = load_apart(start, lead, PIECES, at, tl.minimum(number, CAP), num_classes, B, PART, EDGES)
        over = tl.reshape(inside & reaches(x, id, bound, bound_id), [PART * B]).to(tl.int32)
        place = found + tl.cumsum(over, axis=0) - 1
        kept = (over > 0) & (place < CAP)
        tl.store(FOUND + place, tl.reshape(x, [PART * B]).to(tl.int32, bitcast=True), mask=kept)
        tl.store(FOUND + CAP + place, tl.reshape(id, [PART * B]), mask=kept)
        found += tl.sum(over, axis=0)
    return tl.where(number > CAP, CAP + 1, found)


@triton.jit
def raise_bound(start, lead, body, LANES, PIECES, lanes, bound, bound_id, top, num_classes, id_bits, k, L: tl.constexpr,
                B: tl.constexpr, MOST: tl.constexpr, EDGES: tl.constexpr, SHIFT: tl.constexpr):
    """A bound that at least k and at most MOST elements reach: by bisection, each step one look at the chosen lanes.

    Over (key, id) as one integer, of `id_bits` for the id: `low` is reached by k or more, `high` by fewer, and each
    step halves what is between. Neighbours differ by at most one element, so at the latest `low` next to `high` is
    reached by k: it ends.
    """
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
        if EDGES > 0:                           # the first of PIECES
            edge, edge_id, held = load_apart(start, lead, PIECES, 0, EDGES, num_classes, B, EDGES, EDGES)
            count += tl.sum(tl.sum((held & reaches(edge, edge_id, value, id)).to(tl.int32), axis=1), axis=0)
        over = tl.zeros([L], tl.int32)
        tile, which = first_pieces(lanes, 0, L)
        for _ in tl.range(0, tl.cdiv(lanes * ((body + L * B - 1) // (L * B)), L)):
            x, column, inside = load_pieces(start, columns_of(tile, which, LANES, body, L, B), body, B)
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
def entries(FOUND, slot, found, CAP: tl.constexpr, SHIFT: tl.constexpr):
    """Value, id and order of what was collected at some slots; beyond it an order below all."""
    value = tl.load(FOUND + slot, mask=slot < found, other=0).to(tl.float32, bitcast=True)
    id = tl.load(FOUND + CAP + slot, mask=slot < found, other=0)
    return value, id, tl.where(slot < found, packed(key_of(value, SHIFT), id), tl.full(slot.shape, -(2**62), tl.int64))


@triton.jit
def store_head(FOUND, found, IDS, VALUES, n, k, CAP: tl.constexpr, SHIFT: tl.constexpr):
    """Writes the k first of what was collected; returns the order of the k-th.

    The place of an element is the number of those before it: orders differ, so no place is taken twice.
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
    """exp(x / T) of one x <= 0. It scales a whole sum: what rounding takes from the exponent is put back."""
    x = tl.maximum(x, -200.0 * T)               # 0 from there on; -inf would give NaN
    c = tl.full([], 1.4426950408889634 / T, tl.float32)
    product = x * c
    return tl.exp2(product) * (1.0 + tl.fma(x, c, -product) * 0.6931471805599453)


@triton.jit
def store_sums(start, lead, PIECES, number, last, SUMS, LSE, TAIL, n, LABELS, num_classes, J: tl.constexpr,
               POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr, TEMPERATURES: tl.constexpr,
               B: tl.constexpr, PART: tl.constexpr, EDGES: tl.constexpr, SHIFT: tl.constexpr):
    """Log-sum-exps of both rounds' sums and the elements of PIECES.

    Of those the head, at or before `last`, and labels are no tail.
    """
    T: tl.constexpr = len(POWERS)
    top = tl.load(SUMS)
    best = tl.full([PART, B], -float("inf"), tl.float32)
    tails = zeros_each([PART, B], T)
    heads = zeros_each([PART, B], T)
    for at in tl.range(0, number, PART):        # mostly once; each place of the tile has sums of its own: no reduction
        x, id, inside = load_apart(start, lead, PIECES, at, number, num_classes, B, PART, EDGES)
        kept = packed(key_of(x, SHIFT), id) >= last
        for j in tl.static_range(J):
            kept = kept | (id == tl.load(LABELS + j))
        new = tl.maximum(best, tl.where(kept, -float("inf"), x))
        to = tl.maximum(new, LEAST)
        old_tails = tails
        old_heads = heads
        tails = ()
        heads = ()
        for i in tl.static_range(T):
            tails = tails + (old_tails[i] * exp_of(tl.maximum(best, LEAST) - to, i, POWERS, GROUPS, BASES) +
                             exp_of(tl.where(kept, -float("inf"), x) - to, i, POWERS, GROUPS, BASES),)
            heads = heads + (old_heads[i] + exp_of(tl.where(kept & inside, x, -float("inf")) - top, i, POWERS, GROUPS,
                                                   BASES),)
        best = new
    best = tl.reshape(best, [PART * B], can_reorder=True)
    first = tl.load(SUMS + 1)
    second = tl.load(SUMS + 2 + T)
    ref = tl.maximum(tl.max(best, axis=0), tl.maximum(first, second))
    fall = tl.maximum(best, LEAST) - ref
    for i in tl.static_range(T):
        pairs = tl.join(tl.reshape(tails[i], [PART * B], can_reorder=True) * exp_of(fall, i, POWERS, GROUPS, BASES),
                        tl.reshape(heads[i], [PART * B], can_reorder=True))
        of_tail, of_head = tl.split(tl.sum(pairs, axis=0))
        of_tail += tl.load(SUMS + 2 + i) * factor(first - ref, TEMPERATURES[i])
        of_tail += tl.load(SUMS + 3 + T + i) * factor(second - ref, TEMPERATURES[i])
        total = of_tail * factor(ref - top, TEMPERATURES[i]) + of_head
        tl.store(LSE + n * T + i, top / TEMPERATURES[i] + tl.log(total))
        tl.store(TAIL + n * T + i,
                 tl.where(of_tail > 0, tl.log(of_tail) + (ref - top) / TEMPERATURES[i], -float("inf")))


@triton.jit
def what_is_wrong(start, body, sums, edge, top, L: tl.constexpr, B: tl.constexpr):
    """NOT_A_NUMBER, INFINITE, EMPTY or 0. The sums of a lane with NaN are NaN, and so are those of one with +inf."""
    wrong = tl.max((sums != sums).to(tl.int32), axis=0) | tl.max((edge != edge).to(tl.int32), axis=0)
    if top == float("inf"):
        wrong = tl.max((edge != edge).to(tl.int32), axis=0)
        for at in tl.range(0, body, L * B):
            inside = at + tl.arange(0, L * B) < body
            x = tl.load(start + at + tl.arange(0, L * B), mask=inside, other=0.0).to(tl.float32)
            wrong = wrong | tl.max((x != x).to(tl.int32), axis=0)
    return tl.where(wrong != 0, NOT_A_NUMBER, tl.where(top == float("inf"), INFINITE,
                                                       tl.where(top == -float("inf"), EMPTY, 0)))


@triton.jit
def store_nothing(IDS, VALUES, LSE, TAIL, MEAN, STD, n, k, T: tl.constexpr, CAP: tl.constexpr, MOMENTS: tl.constexpr):
    """What a row without an answer gets: ids -1, the rest NaN."""
    slot = tl.arange(0, CAP)
    tl.store(IDS + n * k + slot, tl.full([CAP], -1, tl.int64), mask=slot < k)
    tl.store(VALUES + n * k + slot, tl.full([CAP], float("nan"), tl.float32), mask=slot < k)
    for i in tl.static_range(T):
        tl.store(LSE + n * T + i, float("nan"))
        tl.store(TAIL + n * T + i, float("nan"))
    if MOMENTS:
        tl.store(MEAN + n, float("nan"))
        tl.store(STD + n, float("nan"))


@triton.jit
def one_round(start, lead, body, LANES, FOUND, SUMS, lanes, seen, seen_id, bound, bound_id, best, sums, LABELS,
              num_classes, J: tl.constexpr, POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr,
              L: tl.constexpr, B: tl.constexpr, CAP: tl.constexpr, PART: tl.constexpr,
              EDGES: tl.constexpr, ROUND: tl.constexpr):
    """Collects what reaches the bound, and joins the rest of the chosen lanes in SUMS; counts of PIECES and FOUND."""
    PIECES = FOUND + 2 * CAP
    number, best, sums = sweep_again(start, lead, body, LANES, PIECES, lanes, seen, seen_id, bound, bound_id, best,
                                     sums, LABELS, J, POWERS, GROUPS, BASES, L, B, CAP, EDGES, ROUND)
    ref = tl.maximum(tl.max(best, axis=0), LEAST)
    fall = tl.maximum(best, LEAST) - ref
    tl.store(SUMS, ref)
    for i in tl.static_range(len(POWERS)):
        tl.store(SUMS + 1 + i, tl.sum(sums[i] * exp_of(fall, i, POWERS, GROUPS, BASES), axis=0))
    tl.debug_barrier()
    return number, collect(start, lead, PIECES, FOUND, number, bound, bound_id, num_classes, B, CAP, PART, EDGES)


@triton.jit
def look_again(start, lead, body, LANES, FOUND, SUMS, lanes, bound, bound_id, best, sums, LABELS, num_classes,
               id_bits, k, J: tl.constexpr, POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr,
               L: tl.constexpr, B: tl.constexpr, CAP: tl.constexpr, PART: tl.constexpr,
               EDGES: tl.constexpr, SHIFT: tl.constexpr):
    """One round, and where more than CAP reach the bound, a second.

    At most CAP - EDGES - J - 1 reach its bound: their pieces, the edges', those of labels, and one in which the bound's
    id lies fit into PIECES, so it is the last. Not a loop, in which each reduction would hold a register through all.
    """
    number, found = one_round(start, lead, body, LANES, FOUND, SUMS + 1, lanes, None, None, bound, bound_id, best, sums,
                              LABELS, num_classes, J, POWERS, GROUPS, BASES, L, B, CAP, PART, EDGES, 1)
    if found > CAP:
        higher, higher_id = raise_bound(start, lead, body, LANES, FOUND + 2 * CAP, lanes, bound, bound_id,
                                        tl.load(SUMS), num_classes, id_bits, k, L, B, CAP - EDGES - J - 1, EDGES, SHIFT)
        tl.debug_barrier()
        number, found = one_round(start, lead, body, LANES, FOUND, SUMS + 2 + len(POWERS), lanes, bound, bound_id,
                                  higher, higher_id, tl.full([L], -float("inf"), tl.float32),
                                  zeros_each([L], len(POWERS)), LABELS, num_classes, J, POWERS, GROUPS, BASES, L, B,
                                  CAP, PART, EDGES, 2)
    tl.debug_barrier()
    return number, found


@triton.jit
def keep_row(start, lead, body, best, sums, SCRATCH, IDS, VALUES, LSE, TAIL, n, num_classes, id_bits, k,
             POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr, TEMPERATURES: tl.constexpr,
             J: tl.constexpr, CAP: tl.constexpr, L: tl.constexpr, B: tl.constexpr, PART: tl.constexpr,
             VEC: tl.constexpr, EDGES: tl.constexpr, SHIFT: tl.constexpr):
    """Head, log-sum-exps and tails of a good row, from the maxima and sums of its lanes."""
    SUMS = SCRATCH.to(tl.pointer_type(tl.float32), bitcast=True)
    LABELS = SCRATCH + 3 + 2 * len(POWERS)
    LANES = LABELS + J
    FOUND = LANES + J + CAP
    chosen, bound, bound_id = choose_lanes(start, lead, body, best, k, L, B, CAP, SHIFT)
    tl.debug_barrier()                          # labels were stored by one thread
    for j in tl.static_range(J):                # a lane with a label is looked at again too, to leave the label out
        place = tl.load(LABELS + j) - lead
        chosen = chosen | ((place >= 0) & (place < body) & (tl.arange(0, L) == place % (L * B) // B))
    number = tl.cumsum(chosen.to(tl.int32), axis=0)
    lanes = tl.maximum(tl.max(number, axis=0), 1)       # none where all columns are edges: a step count of 0
    tl.store(LANES + number - 1, tl.arange(0, L), mask=chosen)
    if EDGES > 0:
        edge = tl.arange(0, EDGES)
        tl.store(FOUND + 2 * CAP + edge, edge_at(edge * B, body, VEC))
    rest = ()
    for i in tl.static_range(len(POWERS)):
        rest = rest + (tl.where(chosen, 0.0, sums[i]),)
    best = tl.where(chosen, -float("inf"), best)
    tl.debug_barrier()
    number, found = look_again(start, lead, body, LANES, FOUND, SUMS, lanes, bound, bound_id, best, rest, LABELS,
                               num_classes, id_bits, k, J, POWERS, GROUPS, BASES, L, B, CAP, PART, EDGES, SHIFT)
    last = store_head(FOUND, found, IDS, VALUES, n, k, CAP, SHIFT)
    store_sums(start, lead, FOUND + 2 * CAP, number, last, SUMS, LSE, TAIL, n, LABELS, num_classes, J, POWERS, GROUPS,
               BASES, TEMPERATURES, B, PART, EDGES, SHIFT)


@triton.jit(do_not_specialize=["label_stride", "id_bits", "k"])
def topk_rows(X, IDS, VALUES, LSE, TAIL, LABEL_LOGIT, MEAN, STD, FLAG, LABELS, SCRATCH, x_stride, label_stride,
              num_classes, id_bits, k, POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr,
              TEMPERATURES: tl.constexpr, J: tl.constexpr, CAP: tl.constexpr, A: tl.constexpr, L: tl.constexpr,
              B: tl.constexpr, PART: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
              SHIFT: tl.constexpr, MOMENTS: tl.constexpr):
    """One row. Every output is written; those of a row with NaN, +inf or no finite logit are NaN, its ids -1."""
    T: tl.constexpr = len(POWERS)
    n = tl.program_id(0).to(tl.int64)
    row = row_start(X, n, x_stride, VEC, ALIGNED)
    start, lead, body = span(row, num_classes, VEC, ALIGNED)
    best, sums, base, shift, square = sweep(start, body, POWERS, GROUPS, BASES, A, L, B, MOMENTS)
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
    for i in tl.static_range(1 + T):            # a second round of looking again, which there mostly is none
        tl.store(SCRATCH + 2 + T + i, tl.full([], LEAST if i == 0 else 0.0, tl.float32).to(tl.int32, bitcast=True))
    tl.store(FLAG + n, tl.where(flag == 0, bad, flag))
    if flag != 0:
        store_nothing(IDS, VALUES, LSE, TAIL, MEAN, STD, n, k, T, CAP, MOMENTS)
    else:
        if MOMENTS:
            m, std = moments(start, body, edge, base, shift, square, L, B)
            tl.store(MEAN + n, m)
            tl.store(STD + n, std)
        keep_row(start, lead, body, best, sums, SCRATCH, IDS, VALUES, LSE, TAIL, n, num_classes, id_bits, k, POWERS,
                 GROUPS, BASES, TEMPERATURES, J, CAP, L, B, PART, VEC, 0 if ALIGNED else 2 * VEC // B, SHIFT)
