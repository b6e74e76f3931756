"""The sweep of `topk_lse`: maximum, sums of exponentials and moments of each lane of a row, from one read."""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code: its arguments are pointers and blocks, which have no types of their own; its tuples
# grow by addition alone.
from __future__ import annotations

import triton
import triton.language as tl

from kdcache.kernels.rows import power, tile_offsets

LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def add_tile(x, best, sums, POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr):
    """Adds x [A, L, B] to the lanes: maximum [L], and sums [L] of exp((x - maximum) / T), one for each temperature."""
    new = tl.maximum(best, tl.max(tl.max(x, axis=2), axis=0))
    to = tl.maximum(new, LEAST)                 # -inf - -inf would be NaN
    away = x - to[None, :, None]
    fall = tl.maximum(best, LEAST) - to
    u = ()
    keep = ()
    for g in tl.static_range(len(BASES)):
        u = u + (tl.exp2(away * BASES[g]),)
        keep = keep + (tl.exp2(fall * BASES[g]),)
    out = ()
    for i in tl.static_range(len(POWERS)):
        fresh = tl.sum(tl.sum(power(u[GROUPS[i]], POWERS[i]), axis=2), axis=0)
        out = out + (tl.fma(sums[i], power(keep[GROUPS[i]], POWERS[i]), fresh),)
    return new, out


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
def zeros_each(L: tl.constexpr, T: tl.constexpr):
    out = ()
    for _ in tl.static_range(T):
        out = out + (tl.zeros([L], tl.float32),)
    return out


@triton.jit
def sweep(start, body, POWERS: tl.constexpr, GROUPS: tl.constexpr, BASES: tl.constexpr, A: tl.constexpr,
          L: tl.constexpr, B: tl.constexpr, MOMENTS: tl.constexpr):
    """The one read of the row: best [L], the tile each best came from first [L], sums, and moments of each lane."""
    C: tl.constexpr = L * B
    offsets = tile_offsets(A, C)
    best = tl.full([L], -float("inf"), tl.float32)
    tile = tl.zeros([L], tl.int32)
    sums = zeros_each(L, len(POWERS))
    count = tl.zeros([L], tl.float32)
    mean = tl.zeros([L], tl.float32)
    spread = tl.zeros([L], tl.float32)
    whole = body // (A * C) * (A * C)
    for at in tl.range(0, whole, A * C):
        x = tl.reshape(tl.load(start + at + offsets).to(tl.float32), [A, L, B])
        new, sums = add_tile(x, best, sums, POWERS, GROUPS, BASES)
        tile = tl.where(new > best, at, tile)
        best = new
        if MOMENTS:
            count, mean, spread = add_moments(x, count, mean, spread)
    x = tl.load(start + whole + offsets, mask=whole + offsets < body, other=-float("inf")).to(tl.float32)
    x = tl.reshape(x, [A, L, B])
    new, sums = add_tile(x, best, sums, POWERS, GROUPS, BASES)
    tile = tl.where(new > best, whole, tile)
    if MOMENTS:
        count, mean, spread = add_moments(x, count, mean, spread)
    return new, tile, sums, count, mean, spread
