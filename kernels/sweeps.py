"""Device functions of the row kernels: sums and gradients of one row of logits at two temperatures.

Units. With T = P / Q in small integers and c = log2(e) / P, the base of a logit x is u = 2^(x c -
ref), where `ref` is a running maximum of x c. Then exp(x - m) = u^P and exp((x - m) / T) = u^Q: one
exponential serves both temperatures. P is 0 where temperature 1 is not wanted, Q is 0 where T is
not, and TWO says that T is not on the list, so that c2 = log2(e) / T has an exponential of its own.
x c - ref is one fused multiply-add: a large common offset of the logits costs no digits. Compilers
fuse a b - d into one operation: where d is the same product rounded, its rounding is left (of
FLOOR, 1e22) and not 0. So no such difference is written here, or a maximum keeps its product apart.

`ref` starts at FLOOR, which stands for "nothing yet": -inf would give NaN on -inf - -inf. Scores
below it count as
-inf; it is far enough from the largest float that ref c2 / c is one too.

What belongs together goes together: POWERS is (P, Q, TWO); WALK is (R, C, VEC, ALIGNED), how a row
is read: in tiles of R times C, with vectors of VEC.

For a teacher's tail that is spread evenly sweep 1 keeps two more sums (SCORES): of the score s =
x c - ref (of s c2 / c with TWO) over the finite logits, and their number. They follow `ref` when it
rises, as the exponentials do. Where `taught` is given, SCORES are of the columns below it alone,
and only these get a share of the even tail: the others are the student's own.

Caps. A logit that is capped before the loss is y = cap * tanh(x * scale / cap). What follows works
on tanh alone: the cap is part of the factor that every logit meets there (c and c2). By 2^x, as
triton's interpreter has no tanh. With a = exp(-2 |z|), tanh |z| = (1 - a) / (1 + a), and its slope
is 4 a / (1 + a)^2, which loses nothing as tanh nears 1. Where |z| < 1/2 and 1 - a would lose
digits, tanh is z times an even polynomial (of least greatest relative error, 2^-26). 2 / (1 + a) is
rsqrt squared and one step of Newton's: five instructions, where triton's division, which takes any
divisor, is nine. Relative error in units of 2^-24: of tanh 3.6, of the slope 5 + 1.5 |z|, over a
million |z| up to 200 in the interpreter; at most 8 and 11 + 4 |z| where 2^x is exact to 2^-22, as
PTX promises of the instruction (torch.tanh: 1).
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)
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


@triton.jit
def power(u, N: tl.constexpr):
    """u ** N, N in 1..4."""
    if N == 1:
        return u
    elif N == 2:
        return u * u
    elif N == 3:
        return u * u * u
    else:
        square = u * u
        return square * square


@triton.jit
def total(x):
    """Sums [L] over the elements of each lane of x [R, L, VEC]."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def add_tile(x, first, sums, c, ratio, taught, POWERS: tl.constexpr, SCORES: tl.constexpr):
    """Adds a tile x [R, L, VEC] to the running sums [L] of its lanes; all elements of a lane lie
    in one thread.
    `first`: where its first element stands."""
    ref, one, soft, scores, finite = sums
    P: tl.constexpr = POWERS[0]
    Q: tl.constexpr = POWERS[1]
    TWO: tl.constexpr = POWERS[2]
    top = tl.max(tl.max(x, axis=2), axis=0)
    new = tl.maximum(ref, top * c)
    keep = tl.exp2(ref - new)
    s = tl.fma(x, c, -new[None, :, None])
    u = tl.exp2(s)
    rise = ref - new
    if P > 0:
        one = tl.fma(one, power(keep, P), total(power(u, P)))
    if TWO:
        s *= ratio
        rise *= ratio
        soft = tl.fma(soft, tl.exp2(rise), total(tl.exp2(s)))
    elif Q > 0 and Q != P:
        soft = tl.fma(soft, power(keep, Q), total(power(u, Q)))
    if SCORES:
        held = x > -float("inf")
        if taught is not None:
            held = held & (first + places(x) < taught)
        scores = tl.fma(finite, rise, scores) + total(tl.where(held, s, 0.0))
        finite += total(held.to(tl.float32))
    return new, one, soft, scores, finite


@triton.jit
def places(x):
    """Where in their tile the elements of x [R, L, VEC] stand: computed in x's own layout, not
    moved into it.
    """
    L: tl.constexpr = x.shape[1]
    VEC: tl.constexpr = x.shape[2]
    vector = tl.arange(0, x.shape[0])[:, None] * L + tl.arange(0, L)[None, :]
    return vector[:, :, None] * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def sum_pair(a, b):
    """Both sums by one reduction across the program: what costs there is the barriers."""
    return tl.split(tl.sum(tl.join(a, b), axis=0))


@triton.jit
def merge(ref, one, soft, edge, c, c2, ratio, POWERS: tl.constexpr, EDGES: tl.constexpr):
    """The state of all lanes and of the edge elements as scalars, by the only reductions across the
    program: the references at 1 and at T, what the latter's rounding left out, and both sums."""
    P: tl.constexpr = POWERS[0]
    Q: tl.constexpr = POWERS[1]
    TWO: tl.constexpr = POWERS[2]
    at = tl.max(ref, axis=0)
    if EDGES:
        at = tl.maximum(at, tl.max(edge, axis=0) * c)
    at2 = at
    left = 0.0
    # the logit at the reference, and what rounding it at T leaves out; see above for the maximum
    if TWO:
        logit = at / c
        at2 = tl.maximum(logit * c2, FLOOR)
        left = tl.where(at > FLOOR, tl.fma(logit, c2, -at2) - ratio * tl.fma(logit, c, -at), 0.0)
    scale = tl.exp2(ref - at)
    sum_one = 0.0
    sum_soft = 0.0
    if TWO:
        sum_one, sum_soft = sum_pair(one * power(scale, P), soft * tl.exp2((ref - at) * ratio))
    elif P > 0 and Q > 0 and P != Q:
        sum_one, sum_soft = sum_pair(one * power(scale, P), soft * power(scale, Q))
    elif P > 0:
        sum_one = tl.sum(one * power(scale, P), axis=0)
    else:
        sum_soft = tl.sum(soft * power(scale, Q), axis=0)
    if EDGES:
        s = tl.fma(edge, c, -at)
        u = tl.exp2(s)
        if P > 0:
            sum_one += tl.sum(power(u, P), axis=0)
        if TWO:
            sum_soft += tl.sum(tl.exp2(s * ratio), axis=0)
        elif Q > 0 and Q != P:
            sum_soft += tl.sum(power(u, Q), axis=0)
    if TWO:
        sum_soft *= tl.exp2(left)
    elif Q == P:
        sum_soft = sum_one
    return at, at2, left, sum_one, sum_soft


@triton.jit
def merge_scores(
    ref, at, left, scores, finite, edge, column, c, ratio, taught, EDGES: tl.constexpr
):
    """(scores, number of finite logits) of all lanes and of the edge elements, relative to the
    references of `merge`; `ratio` is 1 but with TWO."""
    sum_scores = tl.sum(tl.fma(finite, (ref - at) * ratio, scores), axis=0)
    number = tl.sum(finite.to(tl.int32), axis=0)
    if EDGES:
        held = edge > -float("inf")
        if taught is not None:
            held = held & (column < taught)
        sum_scores += tl.sum(tl.where(held, tl.fma(edge, c, -at) * ratio, 0.0), axis=0)
        number += tl.sum(held.to(tl.int32), axis=0)
    sum_scores = tl.fma(number.to(tl.float32), left, sum_scores)
    return sum_scores, number


@triton.jit
def dense_gradient(x, ref, ref2, a_one, a_soft, c, c2, POWERS: tl.constexpr, even=None, rate=None):
    """a_one u^P + a_soft u^Q (+ even): the gradient of every class that is neither kept nor a
    label.

    With `rate`, of a logit before its softcap: times the slope there.
    """
    if rate is not None:
        x, slope = capped(x, rate, False)
        return slope * dense_gradient(x, ref, ref2, a_one, a_soft, c, c2, POWERS, even)
    elif even is not None:
        return dense_gradient(x, ref, ref2, a_one, a_soft, c, c2, POWERS) + even
    else:
        return two_powers(x, ref, ref2, a_one, a_soft, c, c2, POWERS)


@triton.jit
def share_of(even, column, taught):
    """What each of these columns gets of a teacher's even tail: `even`, or nothing from `taught`
    on.
    """
    if even is None:
        return None
    elif taught is None:
        return even
    else:
        return tl.where(column < taught, even, 0.0)


@triton.jit
def two_powers(x, ref, ref2, a_one, a_soft, c, c2, POWERS: tl.constexpr):
    """a_one u^P + a_soft u^Q."""
    P: tl.constexpr = POWERS[0]
    Q: tl.constexpr = POWERS[1]
    TWO: tl.constexpr = POWERS[2]
    u = tl.exp2(tl.fma(x, c, -ref))
    if TWO:
        return tl.fma(a_one, u, a_soft * tl.exp2(tl.fma(x, c2, -ref2)))
    elif Q == 0:
        return a_one * power(u, P)
    elif P == 0:
        return a_soft * power(u, Q)
    elif P == Q:
        return (a_one + a_soft) * power(u, P)
    elif P > Q:
        return power(u, Q) * tl.fma(a_one, power(u, P - Q), a_soft)
    else:
        return power(u, P) * tl.fma(a_soft, power(u, Q - P), a_one)


@triton.jit
def row_start(pointer, n, stride, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Where row n starts; with ALIGNED in a form in which the compiler sees a multiple of 16 bytes."""
    if ALIGNED:
        return pointer + n * (stride // VEC * VEC)
    else:
        return pointer + n * stride


@triton.jit
def span(row, num_classes, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the 16-byte vectors of a row start and how many elements they hold; at most VEC - 1 lie
    at either end.

    The hint lets the compiler use 128-bit accesses on rows of odd length, which start anywhere. It
    has to stand on an operation of its own: on an argument it is lost.
    """
    if ALIGNED:
        return row, 0, num_classes // VEC * VEC
    else:
        width: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
        past = ((row.to(tl.int64) // width) % VEC).to(tl.int32)
        lead = tl.minimum((VEC - past) % VEC, num_classes)
        return tl.multiple_of(row + lead, 16), lead, (num_classes - lead) // VEC * VEC


@triton.jit
def span_beside(row, lead, ALIGNED: tl.constexpr):
    """The vectors of another row that starts at the same place within 16 bytes."""
    if ALIGNED:
        return row
    else:
        return tl.multiple_of(row + lead, 16)


@triton.jit
def edge_columns(lead, body, num_classes, VEC: tl.constexpr):
    """Columns before and after the vectors, and which of the 2 VEC slots hold one."""
    slot = tl.arange(0, 2 * VEC)
    first = slot < VEC
    column = tl.where(first, slot, lead + body + slot - VEC)
    return column, tl.where(first, slot < lead, column < num_classes)


@triton.jit
def tile_offsets(R: tl.constexpr, C: tl.constexpr):
    return tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def logits_at(pointer, mask, other, rate, EVICT: tl.constexpr):
    """Logits in float32, after their softcap where there is one."""
    x = tl.load(pointer, mask=mask, other=other, eviction_policy=EVICT).to(tl.float32)
    if rate is not None:
        x = capped(x, rate)[0]
    return x


@triton.jit
def sweep_sums(
    row,
    num_classes,
    c,
    c2,
    POWERS: tl.constexpr,
    WALK: tl.constexpr,
    EVICT: tl.constexpr,
    rate=None,
    SCORES: tl.constexpr = False,
    taught=None,
):
    """Both sums of exponentials of a row, relative to its maximum: (ref, ref2, sum_one, sum_soft).

    With SCORES also (scores, number of finite logits); `taught`: these are of the columns below it.
    """
    TWO: tl.constexpr = POWERS[2]
    R: tl.constexpr = WALK[0]
    C: tl.constexpr = WALK[1]
    VEC: tl.constexpr = WALK[2]
    ALIGNED: tl.constexpr = WALK[3]
    start, lead, body = span(row, num_classes, VEC, ALIGNED)
    L: tl.constexpr = C // VEC
    ref = tl.full([L], FLOOR, tl.float32)
    one = tl.zeros([L], tl.float32)
    soft = tl.zeros([L], tl.float32)
    scores = tl.zeros([L], tl.float32)
    finite = tl.zeros([L], tl.float32)
    ratio = c2 / c if TWO else 1.0
    offsets = tile_offsets(R, C)
    whole = body // (R * C) * (R * C)
    for at in tl.range(0, whole, R * C):
        x = tl.reshape(logits_at(start + at + offsets, None, None, rate, EVICT), [R, L, VEC])
        ref, one, soft, scores, finite = add_tile(
            x, lead + at, (ref, one, soft, scores, finite), c, ratio, taught, POWERS, SCORES
        )
    if whole < body:
        x = tl.reshape(
            logits_at(start + whole + offsets, whole + offsets < body, -float("inf"), rate, EVICT),
            [R, L, VEC],
        )
        ref, one, soft, scores, finite = add_tile(
            x, lead + whole, (ref, one, soft, scores, finite), c, ratio, taught, POWERS, SCORES
        )
    edge = tl.full([2 * VEC], -float("inf"), tl.float32)
    column = tl.arange(0, 2 * VEC)
    if not ALIGNED:
        column, held = edge_columns(lead, body, num_classes, VEC)
        edge = logits_at(row + column, held, -float("inf"), rate, "")
    at, at2, left, sum_one, sum_soft = merge(
        ref, one, soft, edge, c, c2, ratio, POWERS, not ALIGNED
    )
    if SCORES:
        sum_scores, number = merge_scores(
            ref, at, left, scores, finite, edge, column, c, ratio, taught, not ALIGNED
        )
        return at, at2, sum_one, sum_soft, sum_scores, number
    else:
        return at, at2, sum_one, sum_soft


@triton.jit
def sweep_gradient(
    row,
    out,
    num_classes,
    ref,
    ref2,
    a_one,
    a_soft,
    c,
    c2,
    POWERS: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
    even=None,
    rate=None,
    EVICT: tl.constexpr = "evict_first",
    taught=None,
):
    """Writes the dense gradient of a row to `out`, which may be the row itself. `taught`: `even` is
    for the columns below it."""
    R: tl.constexpr = WALK[0]
    C: tl.constexpr = WALK[1]
    VEC: tl.constexpr = WALK[2]
    ALIGNED: tl.constexpr = WALK[3]
    start, lead, body = span(row, num_classes, VEC, ALIGNED)
    to = span_beside(out, lead, ALIGNED)
    offsets = tile_offsets(R, C)
    tiles = body // (R * C)
    for i in tl.range(0, tiles):
        at = (tiles - 1 - i if REVERSE else i) * (R * C)
        x = tl.load(start + at + offsets, eviction_policy=EVICT).to(tl.float32)
        share = share_of(even, lead + at + offsets, taught)
        g = dense_gradient(x, ref, ref2, a_one, a_soft, c, c2, POWERS, share, rate)
        tl.store(to + at + offsets, g.to(out.dtype.element_ty), eviction_policy=EVICT)
    whole = tiles * (R * C)
    if whole < body:
        inside = whole + offsets < body
        x = tl.load(start + whole + offsets, mask=inside, other=0.0, eviction_policy=EVICT).to(
            tl.float32
        )
        share = share_of(even, lead + whole + offsets, taught)
        g = dense_gradient(x, ref, ref2, a_one, a_soft, c, c2, POWERS, share, rate)
        tl.store(
            to + whole + offsets, g.to(out.dtype.element_ty), mask=inside, eviction_policy=EVICT
        )
    if not ALIGNED:
        column, held = edge_columns(lead, body, num_classes, VEC)
        x = tl.load(row + column, mask=held, other=0.0).to(tl.float32)
        share = share_of(even, column, taught)
        g = dense_gradient(x, ref, ref2, a_one, a_soft, c, c2, POWERS, share, rate)
        tl.store(out + column, g.to(out.dtype.element_ty), mask=held)


@triton.jit
def fill_zeros(out, num_classes, WALK: tl.constexpr):
    """Zeros over a row of `out`."""
    R: tl.constexpr = WALK[0]
    C: tl.constexpr = WALK[1]
    VEC: tl.constexpr = WALK[2]
    ALIGNED: tl.constexpr = WALK[3]
    start, lead, body = span(out, num_classes, VEC, ALIGNED)
    offsets = tile_offsets(R, C)
    zeros = tl.zeros([R, C], out.dtype.element_ty)
    for at in tl.range(0, body, R * C):
        tl.store(
            start + at + offsets, zeros, mask=at + offsets < body, eviction_policy="evict_first"
        )
    if not ALIGNED:
        column, held = edge_columns(lead, body, num_classes, VEC)
        tl.store(out + column, tl.zeros([2 * VEC], out.dtype.element_ty), mask=held)


@triton.jit
def log_sum_exp2(a, b):
    """log(e^a + e^b), -inf where both are."""
    top = tl.maximum(a, b)
    return tl.where(top == -float("inf"), top, top + tl.log(tl.exp(a - top) + tl.exp(b - top)))


@triton.jit
def outcome(log_q, log_p, p, total_q, divergence):
    """Of each outcome: its part of D(q || p), and dD/dp as far as it is not common to all (forward
    KL: its slope). `divergence` = (its name, beta).

    The slope over scores whose softmax is p is p_i (c_i - sum p c); for forward KL that is (sum q)
    p_i - q_i.
    """
    DIVERGENCE: tl.constexpr = divergence[0]
    beta = divergence[1]
    q = tl.exp(log_q)
    if DIVERGENCE == "forward_kl":
        return tl.where(q != 0, q * (log_q - log_p), 0.0), total_q * p - q
    elif DIVERGENCE == "reverse_kl":
        c = tl.where(p != 0, log_p - log_q, 0.0)
        return p * c, c
    elif DIVERGENCE == "jsd":
        log_m = log_sum_exp2(log_q + tl.log(beta), log_p + tl.log(1.0 - beta))
        c = tl.where(p != 0, log_p - log_m, 0.0)
        from_q = tl.where(q != 0, q * (log_q - log_m), 0.0)
        return beta * from_q + (1.0 - beta) * p * c, (1.0 - beta) * c
    else:
        tl.static_assert(DIVERGENCE == "tv")
        c = tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
        return c * (p - q), c
