"""The kernel of `topk_lse`: one program per row, one sweep over it, and a second look at the lanes that matter.

A row is cut into L lanes: lane l holds the columns t C + l B .. + B - 1 of every t, C = L B. Order is total: logit
descending, then id ascending; a key is an int32 that sorts as the logit, and the id where keys are equal.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code: its arguments are pointers and blocks, which have no types of their own; its tuples
# grow by addition alone.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.rows import edge_columns, power, row_start, span
from kdcache.kernels.topk_sweep import LEAST, add_tile, sweep

NEVER = tl.constexpr(-(2**31))          # below the key of every float, NaN included
LAST = tl.constexpr(2**31 - 1)
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
def unpacked(bound):
    return (bound >> 31).to(tl.int32), (bound & LAST).to(tl.int32) ^ LAST


@triton.jit
def pieces_of(LANES, i, lanes, body, L: tl.constexpr, B: tl.constexpr):
    """First columns [L] of the i-th L pieces of the chosen lanes, `body` where there is none."""
    item = i * L + tl.arange(0, L)
    lane = tl.load(LANES + item % lanes, mask=item < lanes * ((body + L * B - 1) // (L * B)), other=L)
    return tl.where(lane < L, tl.minimum(item // lanes * (L * B) + lane * B, body), body)


@triton.jit
def load_pieces(start, first, body, B: tl.constexpr):
    """[M, B] logits, -inf where there is no piece."""
    column = first[:, None] + tl.arange(0, B)[None, :]
    inside = tl.broadcast_to((first < body)[:, None], column.shape)
    return tl.load(start + column, mask=inside, other=-float("inf")).to(tl.float32), column, inside


@triton.jit
def choose_lanes(start, lead, body, best, tile, k, A: tl.constexpr, L: tl.constexpr, B: tl.constexpr,
                 SHIFT: tl.constexpr):
    """The k lanes whose greatest elements are greatest [L], and the bound (key, id): nothing else reaches it.

    Each of the k has an element at or above the bound, so the bound is at or below the k-th of the row. With at most k
    lanes in use all are taken, and the bound is below everything.
    """
    lane = tl.arange(0, L)
    used = lane * B < body
    key_L = tl.where(used, key_of(best, SHIFT), NEVER)
    chosen = used
    bound_key = key_of(tl.full([], -float("inf"), tl.float32), SHIFT)
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
        bound_key = low
        chosen = key_L >= low
        if found > k:               # low is the k-th maximum, and several lanes have it: those that have it first
            tied = key_L == low
            wanted = k - tl.sum((key_L > low).to(tl.int32), axis=0)
            first = tl.full([L], LAST, tl.int32)
            for a in tl.static_range(A):        # a product, so that the compiler sees a multiple of 16 bytes
                piece = tile // (A * L * B) * (A * L * B) + a * L * B + lane * B
                x, column, inside = load_pieces(start, tl.where(tied, tl.minimum(piece, body), body), body, B)
                hit = inside & (key_of(x, SHIFT) == low)
                first = tl.minimum(first, tl.min(tl.where(hit, column, LAST), axis=1))
            below = -1
            last = body - 1
            mid = middle(below, last)
            while mid > below:
                enough = tl.sum((tied & (first <= mid)).to(tl.int32), axis=0) >= wanted
                last = tl.where(enough, mid, last)
                below = tl.where(enough, below, mid)
                mid = middle(below, last)
            bound_id = lead + last
            chosen = (key_L > low) | (tied & (first <= last))
    return chosen, bound_key, bound_id


@triton.jit
def reaches(x, id, bound, bound_id):
    return (x > bound) | ((x == bound) & (id <= bound_id))


@triton.jit
def label_at(LABELS, num_classes, j: tl.constexpr):
    """Label j of the row as int32, -1 for none; and whether it is no class at all."""
    label = tl.load(LABELS + j).to(tl.int64)
    return tl.where((label >= 0) & (label < num_classes), label, -1).to(tl.int32), label >= num_classes


@triton.jit
def sweep_again(start, lead, body, LANES, PIECES, lanes, bound, bound_id, best, sums, LABELS, num_classes,
                J: tl.constexpr, POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr, L: tl.constexpr,
                B: tl.constexpr, CAP: tl.constexpr):
    """Adds the chosen lanes to the tail, but for pieces that may reach the bound or hold a label: those to PIECES."""
    number = 0
    for i in tl.range(0, tl.cdiv(lanes * ((body + L * B - 1) // (L * B)), L)):
        first = pieces_of(LANES, i, lanes, body, L, B)
        x = load_pieces(start, first, body, B)[0]
        top = tl.max(x, axis=1)
        apart = (top > bound) | ((top == bound) & (lead + first <= bound_id))
        for j in tl.static_range(J):
            from_first = label_at(LABELS, num_classes, j)[0] - lead - first
            apart = apart | ((from_first >= 0) & (from_first < B))
        apart = apart & (first < body)
        place = number + tl.cumsum(apart.to(tl.int32), axis=0) - 1
        tl.store(PIECES + place, first, mask=apart & (place < CAP))
        number += tl.sum(apart.to(tl.int32), axis=0)
        x = tl.where(apart[:, None], -float("inf"), x)
        best, sums = add_tile(tl.reshape(x, [1, L, B]), best, sums, POWERS, GROUPS, BASES)
    return number, best, sums


@triton.jit
def split(x, id, inside, FOUND, n, bound, bound_id, LABELS, num_classes, J: tl.constexpr, CAP: tl.constexpr):
    """Of x [M]: what reaches the bound goes to FOUND from n on. Returns the tail's, else -inf, and the next n."""
    over = inside & reaches(x, id, bound, bound_id)
    one = over.to(tl.int32)
    place = n + tl.cumsum(one, axis=0) - 1
    entry = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | id.to(tl.int64)
    tl.store(FOUND + place, entry, mask=over & (place < CAP))
    left = inside & (over == 0)
    for j in tl.static_range(J):
        left = left & (id != label_at(LABELS, num_classes, j)[0])
    return tl.where(left, x, -float("inf")), n + tl.sum(one, axis=0)


@triton.jit
def raise_bound(start, lead, body, edge, edge_id, held, LANES, lanes, bound_key, bound_id, top, k, L: tl.constexpr,
                B: tl.constexpr, MOST: tl.constexpr, SHIFT: tl.constexpr):
    """A bound that at least k and at most MOST elements reach: by bisection, each step one look at the chosen lanes."""
    low = packed(bound_key, bound_id)
    high = packed(key_of(top, SHIFT), tl.full([], 0, tl.int32)) + 1
    pieces = tl.cdiv(lanes * ((body + L * B - 1) // (L * B)), L)
    n = MOST + 1
    while n > MOST:
        mid = middle(low, high)
        key, id = unpacked(mid)
        value = value_of(key, SHIFT)
        count = tl.sum((held & reaches(edge, edge_id, value, id)).to(tl.int32), axis=0)
        for piece in tl.range(0, pieces):
            x, column, inside = load_pieces(start, pieces_of(LANES, piece, lanes, body, L, B), body, B)
            over = inside & reaches(x, lead + column, value, id)
            count += tl.sum(tl.sum(over.to(tl.int32), axis=1), axis=0)
        enough = count >= k
        low = tl.where(enough, mid, low)
        n = tl.where(enough, count, n)
        high = tl.where(enough, high, mid)
    return unpacked(low)


@triton.jit
def collected(FOUND, slot, found, SHIFT: tl.constexpr):
    """Value, id and key of what was collected at some slots; beyond it -inf, 0, and less than any key."""
    entry = tl.load(FOUND + slot, mask=slot < found, other=0)
    value = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    id = (entry & LAST).to(tl.int32)
    value = tl.where(slot < found, value, -float("inf"))
    return value, id, tl.where(slot < found, packed(key_of(value, SHIFT), id), tl.full(slot.shape, -(2**62), tl.int64))


@triton.jit
def sum_of(x, at, P: tl.constexpr, BASE: tl.constexpr):
    """Sum of exp((x - at) / T) over x [M]; -inf adds nothing."""
    return tl.sum(power(tl.exp2((x - at) * BASE), P), axis=0)


@triton.jit
def tail_and_head(fall, sums, edge, left, pieces, head, ref, top, P: tl.constexpr, BASE: tl.constexpr):
    """Sums of exponentials: of the tail relative to `ref`, of the tail and the head relative to `top`."""
    tail = tl.sum(sums * power(tl.exp2(fall * BASE), P), axis=0) + sum_of(edge, ref, P, BASE)
    tail += sum_of(left, ref, P, BASE) + sum_of(pieces, ref, P, BASE)
    return tail, tail * power(tl.exp2((ref - top) * BASE), P) + sum_of(head, top, P, BASE)


@triton.jit(do_not_specialize=["label_stride", "k"])
def topk_rows(X, IDS, VALUES, LSE, TAIL, LABEL_LOGIT, MEAN, STD, FLAG, LABELS, FOUND, LANES, x_stride, label_stride,
              num_classes, k, POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr,
              TEMPERATURES: tl.constexpr, J: tl.constexpr, CAP: tl.constexpr, A: tl.constexpr, L: tl.constexpr,
              B: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, SHIFT: tl.constexpr,
              MOMENTS: tl.constexpr):
    """One row. Every output is written; those of a row with NaN, +inf or no finite logit are NaN, its ids -1."""
    T: tl.constexpr = len(POWERS)
    n = tl.program_id(0).to(tl.int64)
    row = row_start(X, n, x_stride, VEC, ALIGNED)
    if J > 0:
        LABELS += n * label_stride
    FOUND += n * CAP
    LANES += n * (k + J + CAP)
    PIECES = LANES + k + J
    start, lead, body = span(row, num_classes, VEC, ALIGNED)
    best, tile, sums, count, mean, spread = sweep(start, body, POWERS, GROUPS, BASES, A, L, B, MOMENTS)
    column, held = edge_columns(lead, body, num_classes, VEC)
    if ALIGNED:
        held = held & (column < 0)
    edge = tl.load(row + column, mask=held, other=-float("inf")).to(tl.float32)
    top = tl.maximum(tl.max(best, axis=0), tl.max(edge, axis=0))
    wrong = tl.max((sums[0] != sums[0]).to(tl.int32), axis=0) | tl.max((edge != edge).to(tl.int32), axis=0)
    if top == float("inf"):                     # its lane's sums are NaN whatever the others are
        wrong = tl.max((edge != edge).to(tl.int32), axis=0)
        for at in tl.range(0, body, L * B):
            inside = at + tl.arange(0, L * B) < body
            x = tl.load(start + at + tl.arange(0, L * B), mask=inside, other=0.0).to(tl.float32)
            wrong = wrong | tl.max((x != x).to(tl.int32), axis=0)
    flag = tl.where(wrong != 0, NOT_A_NUMBER, tl.where(top == float("inf"), INFINITE,
                                                       tl.where(top == -float("inf"), EMPTY, 0)))
    slot = tl.arange(0, CAP)
    if flag != 0:
        tl.store(IDS + n * k + slot, tl.full([CAP], -1, tl.int64), mask=slot < k)
        tl.store(VALUES + n * k + slot, tl.full([CAP], float("nan"), tl.float32), mask=slot < k)
        for i in tl.static_range(T):
            tl.store(LSE + n * T + i, float("nan"))
            tl.store(TAIL + n * T + i, float("nan"))
        for j in tl.static_range(J):
            tl.store(LABEL_LOGIT + n * J + j, float("nan"))
        if MOMENTS:
            tl.store(MEAN + n, float("nan"))
            tl.store(STD + n, float("nan"))
    else:
        if MOMENTS:
            finite = edge > -float("inf")
            edges = tl.sum(finite.to(tl.float32), axis=0)
            total = tl.sum(count, axis=0) + edges
            m = tl.sum(count * (mean / total), axis=0) + tl.sum(tl.where(finite, edge, 0.0) / total, axis=0)
            off = tl.where(finite, edge - m, 0.0)
            around = tl.sum(spread + count * (mean - m) * (mean - m), axis=0) + tl.sum(off * off, axis=0)
            tl.store(MEAN + n, m)
            tl.store(STD + n, tl.sqrt(around / total))
        chosen, bound_key, bound_id = choose_lanes(start, lead, body, best, tile, k, A, L, B, SHIFT)
        for j in tl.static_range(J):            # a lane with a label is looked at again too, to leave the label out
            label, bad = label_at(LABELS, num_classes, j)
            flag = tl.where(bad, BAD_LABEL, flag)
            place = label - lead
            chosen = chosen | ((place >= 0) & (place < body) & (tl.arange(0, L) == place % (L * B) // B))
        number = tl.cumsum(chosen.to(tl.int32), axis=0)
        lanes = tl.max(number, axis=0)
        tl.store(LANES + number - 1, tl.arange(0, L), mask=chosen)
        tl.debug_barrier()
        best = tl.where(chosen, -float("inf"), best)
        rest = ()
        for i in tl.static_range(T):
            rest = rest + (tl.where(chosen, 0.0, sums[i]),)
        found = CAP + 1
        tail_best = best
        tail_sums = rest
        tail_edge = edge
        tail_piece = tl.full([CAP * B], -float("inf"), tl.float32)
        while found > CAP:                      # once, unless the greatest logits crowd into few lanes
            bound = value_of(bound_key, SHIFT)
            apart, tail_best, tail_sums = sweep_again(start, lead, body, LANES, PIECES, lanes, bound, bound_id, best,
                                                      rest, LABELS, num_classes, J, POWERS, GROUPS, BASES, L, B, CAP)
            tl.debug_barrier()
            tail_edge, found = split(edge, column, held, FOUND, 0, bound, bound_id, LABELS, num_classes, J, CAP)
            x, columns, inside = load_pieces(start, tl.load(PIECES + slot, mask=slot < apart, other=body), body, B)
            tail_piece, found = split(tl.reshape(x, [CAP * B]), lead + tl.reshape(columns, [CAP * B]),
                                      tl.reshape(inside, [CAP * B]), FOUND, found, bound, bound_id, LABELS,
                                      num_classes, J, CAP)
            found = tl.where(apart > CAP, CAP + 1, found)
            if found > CAP:
                bound_key, bound_id = raise_bound(start, lead, body, edge, column, held, LANES, lanes, bound_key,
                                                  bound_id, top, k, L, B, CAP - J, SHIFT)
            tl.debug_barrier()
        # The place of an element is the number of those before it: keys differ, so no place is taken twice.
        value, id, key = collected(FOUND, slot, found, SHIFT)
        rank = tl.zeros([CAP], tl.int32)
        for begin in tl.range(0, found, CHUNK):
            rank += tl.sum((collected(FOUND, begin + tl.arange(0, CHUNK), found, SHIFT)[2][None, :] >
                            key[:, None]).to(tl.int32), axis=1)
        head = (slot < found) & (rank < k)
        tl.store(IDS + n * k + rank, id.to(tl.int64), mask=head)
        tl.store(VALUES + n * k + rank, value, mask=head)
        last = tl.min(tl.where(head, key, tl.full([CAP], 2**62, tl.int64)), axis=0)
        left = (slot < found) & (rank >= k)
        for j in tl.static_range(J):
            left = left & (id != label_at(LABELS, num_classes, j)[0])
        left = tl.where(left, value, -float("inf"))
        value = tl.where(head, value, -float("inf"))
        ref = tl.maximum(tl.max(tail_best, axis=0), tl.maximum(tl.max(tail_edge, axis=0), tl.max(left, axis=0)))
        ref = tl.maximum(tl.maximum(ref, tl.max(tail_piece, axis=0)), LEAST)
        fall = tl.maximum(tail_best, LEAST) - ref
        for i in tl.static_range(T):
            tail, total = tail_and_head(fall, tail_sums[i], tail_edge, left, tail_piece, value, ref, top,
                                        POWERS[i], BASES[GROUPS[i]])
            for j in tl.static_range(J):        # labels outside the head, each class once
                label = label_at(LABELS, num_classes, j)[0]
                x = tl.load(row + label, mask=label >= 0, other=-float("inf")).to(tl.float32)
                tl.store(LABEL_LOGIT + n * J + j, x)
                counted = (label < 0) | (packed(key_of(x, SHIFT), label) >= last)
                for earlier in tl.static_range(j):
                    counted = counted | (label == label_at(LABELS, num_classes, earlier)[0])
                total += tl.where(counted, 0.0, power(tl.exp2((x - top) * BASES[GROUPS[i]]), POWERS[i]))
            tl.store(LSE + n * T + i, top / TEMPERATURES[i] + tl.log(total))
            tl.store(TAIL + n * T + i, tl.where(tail > 0, tl.log(tail) + (ref - top) / TEMPERATURES[i], -float("inf")))
    tl.store(FLAG + n, flag)
