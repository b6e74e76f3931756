"""Device function of logits that are capped before the loss: y = cap * tanh(x * scale / cap).

What follows works on tanh alone: the cap is part of the factor that every logit meets there
(`rows.py`, c and c2).

By 2^x, as triton's interpreter has no tanh. With a = exp(-2 |z|), tanh |z| = (1 - a) / (1 + a), and
its slope is 4 a / (1 + a)^2, which loses nothing as tanh nears 1. Where |z| < 1/2 and 1 - a would
lose digits, tanh is z times an even polynomial (of least greatest relative error, 2^-26). 2 / (1 +
a) is rsqrt squared and one step of Newton's: five instructions, where triton's division, which
takes any divisor, is nine. Relative error in units of 2^-24: of tanh 3.6, of the slope 5 + 1.5 |z|,
over a million |z| up to 200 in the interpreter; at most 8 and 11 + 4 |z| where 2^x is exact to
2^-22, as PTX promises of the instruction (torch.tanh: 1).
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

C1 = tl.constexpr(-0.333331435918808)
C2 = tl.constexpr(0.13325878977775574)
C3 = tl.constexpr(-0.05304548144340515)
C4 = tl.constexpr(0.017241468653082848)
MINUS_2_LOG2E = tl.constexpr(-2.8853900817779268)


@triton.jit
def capped(x, rate, MASKED: tl.constexpr = True):
    """(tanh(rate * x), 1 - its square). With MASKED a logit of -inf stays -inf: a class that is
    masked stays out. Its slope is 0 in any case, which is all that a gradient needs of it."""
    z = x * rate
    a = tl.exp2(tl.abs(z) * MINUS_2_LOG2E)
    half = 0.5 + 0.5 * a
    r = tl.rsqrt(half)
    r *= r
    r = tl.fma(r, tl.fma(-half, r, 1.0), r)
    w = z * z
    polynomial = tl.fma(tl.fma(tl.fma(w, C4, C3), w, C2), w, C1)
    size = tl.where(tl.abs(z) < 0.5, tl.fma(tl.abs(z) * w, polynomial, tl.abs(z)), 1.0 - a * r)
    sign = z.to(tl.int32, bitcast=True) & -(2**31)
    t = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    if MASKED:
        t = tl.where(x == -float("inf"), x, t)
    return t, a * r * r
