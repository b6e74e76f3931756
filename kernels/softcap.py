"""Device function of logits that are capped before the loss: y = cap * tanh(x * scale / cap).

What follows works on tanh alone: the cap is part of the factor that every logit meets there (`rows.py`, c and c2).

By 2^x, as triton's interpreter has no tanh. With a = exp(-2 |z|), tanh |z| = (1 - a) / (1 + a), and its slope is 4 a /
(1 + a)^2, which loses nothing as tanh nears 1. Where |z| < 1/2 and 1 - a would lose digits, tanh is z times an even
polynomial (of least greatest relative error, 2^-26). Relative error in units of 2^-24: of tanh 4.1, of the slope 5 +
1.5 |z|, over a million |z| up to 200 in the interpreter; at most 11 and 16 + 4 |z| where 2^x is exact to 2^-22 and a
quotient to two units in the last place, as PTX promises of the instructions (torch.tanh: 1).
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
def capped(x, rate):
    """(tanh(rate * x), 1 - its square); a logit of -inf stays -inf: a class that is masked stays out."""
    z = x * rate
    a = tl.exp2(tl.abs(z) * MINUS_2_LOG2E)
    r = 2.0 / (1.0 + a)
    w = z * z
    near = tl.fma(z * w, tl.fma(tl.fma(tl.fma(w, C4, C3), w, C2), w, C1), z)
    far = (0.5 - 0.5 * a) * r
    t = tl.where(tl.abs(z) < 0.5, near, tl.where(z < 0, -far, far))
    return tl.where(x == -float("inf"), x, t), a * r * r
