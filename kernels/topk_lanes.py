"""Order and lanes of `topk_lse`: which lanes of a row hold its head.

A row is cut into L lanes: lane l holds the columns t C + l B .. + B - 1 of every t, C = L B. Order
is total: logit descending, then id ascending; a key is an int32 that sorts as the logit, and the id
where keys are equal.
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

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
