"""The sweep of `topk_lse`: maximum, sums of exponentials and moments of each lane of a row, from
one read.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code: its arguments are pointers and blocks, which have no types of their own; its tuples
# grow by addition alone.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.sweeps import power, tile_offsets

LEAST = tl.constexpr(-3.4028234663852886e38)
# of a variance whose squares, down to 2^-149 each, were all counted
SMALLEST = tl.constexpr(2.0**-100)


@triton.jit
def exp_of(x, i: tl.constexpr, TEMPS: tl.constexpr):
    """exp(x / T) of the i-th temperature; TEMPS: powers, groups, bases of `plan`, and each T."""
    return power(tl.exp2(x * TEMPS[2][TEMPS[1][i]]), TEMPS[0][i])


@triton.jit
def add_tile(x, best, sums, TEMPS: tl.constexpr):
    """Adds x [A, L, B] to the lanes: maximum [L], and sums [L] of exp((x - maximum) / T), one for
    each temperature.
    """
    new = tl.maximum(best, tl.max(tl.max(x, axis=2), axis=0))
    to = tl.maximum(new, LEAST)  # -inf - -inf would be NaN
    away = x - to[None, :, None]
    fall = tl.maximum(best, LEAST) - to
    out = ()
    for i in tl.static_range(len(TEMPS[0])):  # the compiler merges the exponentials of a group
        keep = exp_of(fall, i, TEMPS)
        fresh = tl.sum(tl.sum(exp_of(away, i, TEMPS), axis=2), axis=0)
        out = out + (tl.fma(sums[i], keep, fresh),)
    return new, out


@triton.jit
def zeros_each(SHAPE: tl.constexpr, T: tl.constexpr):
    out = ()
    for _ in tl.static_range(T):
        out = out + (tl.zeros(SHAPE, tl.float32),)
    return out


@triton.jit
def sweep(
    start,
    body,
    TEMPS: tl.constexpr,
    A: tl.constexpr,
    L: tl.constexpr,
    B: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """The one read of the row. Of each lane [L]: its maximum, its sums for each temperature, and
    with MOMENTS a base, the first logit, with the sums of differences from it and of their squares.
    """
    C: tl.constexpr = L * B
    best = tl.full([L], -float("inf"), tl.float32)
    sums = zeros_each([L], len(TEMPS[0]))
    base = tl.zeros([L], tl.float32)
    shift = tl.zeros([L], tl.float32)
    square = tl.zeros([L], tl.float32)
    if MOMENTS:
        first = tl.arange(0, L) * B
        base = tl.load(start + first, mask=first < body, other=0.0).to(tl.float32)
    whole = body // (A * C) * (A * C)
    for at in tl.range(0, whole, A * C):
        x = tl.reshape(tl.load(start + at + tile_offsets(A, C)).to(tl.float32), [A, L, B])
        best, sums = add_tile(x, best, sums, TEMPS)
        if MOMENTS:
            shift, square = add_squares(x - base[None, :, None], shift, square)
    # row by row: a masked tile of A rows takes more registers than the loop
    for at in tl.range(whole, body, C):
        inside = at + tile_offsets(1, C) < body
        x = tl.load(start + at + tile_offsets(1, C), mask=inside, other=-float("inf")).to(
            tl.float32
        )
        x = tl.reshape(x, [1, L, B])
        best, sums = add_tile(x, best, sums, TEMPS)
        if MOMENTS:
            off = tl.where(tl.reshape(inside, [1, L, B]), x - base[None, :, None], 0.0)
            shift, square = add_squares(off, shift, square)
    return best, sums, base, shift, square


@triton.jit
def add_squares(off, shift, square):
    return shift + tl.sum(tl.sum(off, axis=2), axis=0), square + tl.sum(
        tl.sum(off * off, axis=2), axis=0
    )


@triton.jit
def add_moments(x, count, mean, spread):
    """Adds the finite x [A, L, B] to count, mean and sum of squared differences of each lane."""
    finite = x > -float("inf")
    n = tl.sum(tl.sum(finite.to(tl.float32), axis=2), axis=0)
    m = tl.sum(tl.sum(tl.where(finite, x, 0.0), axis=2), axis=0) / tl.maximum(n, 1.0)
    off = tl.where(finite, x - m[None, :, None], 0.0)
    share = n / tl.maximum(count + n, 1.0)
    spread += tl.sum(tl.sum(off * off, axis=2), axis=0) + (m - mean) * (m - mean) * count * share
    return count + n, mean + (m - mean) * share, spread


@triton.jit
def merge_moments(count, mean, spread, edge):
    """(mean, variance) of all lanes and the edge elements; no sum of logits, which could be too
    large where no mean is.

    `spread` is the sum of squared differences from the lane's own mean.
    """
    finite = edge > -float("inf")
    total = tl.sum(count, axis=0) + tl.sum(finite.to(tl.float32), axis=0)
    m = tl.sum(count * (mean / total), axis=0) + tl.sum(tl.where(finite, edge, 0.0) / total, axis=0)
    off = tl.where(finite, edge - m, 0.0)
    lanes = tl.where(count > 0, mean - m, 0.0)
    return m, (tl.sum(spread + count * lanes * lanes, axis=0) + tl.sum(off * off, axis=0)) / total


@triton.jit
def moments(start, body, edge, base, shift, square, L: tl.constexpr, B: tl.constexpr):
    """Mean and standard deviation of a row's finite logits, from its lanes' sums of x - base and of
    their squares.

    Those serve unless a logit is -inf, squares are too large for float32 or too small, or some base
    lies so far out that its lane's digits are lost.
    """
    count = (
        body // (L * B) * B + tl.minimum(tl.maximum(body % (L * B) - tl.arange(0, L) * B, 0), B)
    ).to(tl.float32)
    mean_shift = shift / tl.maximum(count, 1.0)
    m, variance = merge_moments(count, base + mean_shift, square - shift * mean_shift, edge)
    std = tl.sqrt(variance)
    lost = tl.sum(square, axis=0) / tl.sum(count, axis=0) > 16.0 * variance
    # the last is true of NaN too
    if lost | (variance < SMALLEST) | ((variance < float("inf")) == 0):
        m, std = moments_again(start, body, edge, L, B)
    return m, std


@triton.jit
def moments_again(start, body, edge, L: tl.constexpr, B: tl.constexpr):
    """The same from two more looks at the row: of logits over a power of two near the greatest.

    The power stays within 2^-126 .. 2^126, so that one over it is a float too, and the
    greatest logit over it below 4. Neither result is beyond the greatest: rounding must not carry
    it to infinity.
    """
    offsets = tile_offsets(1, L * B)
    most = tl.max(tl.where(edge > -float("inf"), tl.abs(edge), 0.0), axis=0)
    for at in tl.range(0, body, L * B):
        x = tl.load(start + at + offsets, mask=at + offsets < body, other=0.0).to(tl.float32)
        most = tl.maximum(
            most, tl.max(tl.max(tl.where(x > -float("inf"), tl.abs(x), 0.0), axis=1), axis=0)
        )
    bits = tl.minimum(tl.maximum(most.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
    unit = bits.to(tl.float32, bitcast=True)
    one_over = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    count = tl.zeros([L], tl.float32)
    mean = tl.zeros([L], tl.float32)
    spread = tl.zeros([L], tl.float32)
    for at in tl.range(0, body, L * B):
        x = tl.load(start + at + offsets, mask=at + offsets < body, other=-float("inf")).to(
            tl.float32
        )
        count, mean, spread = add_moments(tl.reshape(x * one_over, [1, L, B]), count, mean, spread)
    m, variance = merge_moments(count, mean, spread, edge * one_over)
    most = most * one_over
    return tl.minimum(tl.maximum(m, -most), most) * unit, tl.minimum(tl.sqrt(variance), most) * unit
