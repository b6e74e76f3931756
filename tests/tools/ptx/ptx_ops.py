"""What the arithmetic instructions of PTX compute, over all threads of a program at once, in numpy.

Each entry of `SCALAR` takes the operands as arrays of the instruction's type and gives the result.
Approximate instructions give the true value, moved within the bound that the PTX manual states for
them where a `Slack` is set: a result that holds for every device that keeps to the manual, not for
one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
NUMPY = {
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "bf16": np.uint16,
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "bf16x2": np.uint32,
    "f16x2": np.uint32,
    "s16x2": np.uint32,
    "u16x2": np.uint32,
    "f32x2": np.uint64,
}
TINY = np.float32(2.0**-126)


class Slack:
    """How far results of approximate instructions are moved: up to `part` of the bound, by a hash
    of the result, so that equal operands give equal results, as they do on a device."""

    def __init__(self, part: float = 0.0) -> None:
        self.part = part

    def __call__(self, exact: Array, bound: float, least: float = 0.0) -> Array:
        """`exact` in float64, moved by at most `bound` times its size (or `least`, where that is
        smaller).
        """
        if self.part:
            size = np.maximum(np.abs(exact), least)
            noise = (
                exact.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
            ) / 2.0**23 - 1
            moved = exact + self.part * bound * noise * size
            exact = np.where(np.isfinite(exact) & (exact != 0), moved, exact)
        return exact.astype(np.float32)


def flush(x: Array) -> Array:
    """.ftz: subnormal numbers are zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """One rounding: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def from_bf16(bits: Array) -> Array:
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """Nearest, ties to even; NaN is 0x7fff, as the manual has it."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def single(x: Array, kind: str) -> Array:
    """Of 16 bits in float32."""
    return from_bf16(x) if kind == "bf16" else x.astype(np.float32)


def to_integer(x: Array, kind: type[Any]) -> Array:
    """cvt.rzi: towards zero, saturating, NaN to 0."""
    info = np.iinfo(kind)
    whole = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=info.max, neginf=info.min))
    return np.clip(whole, info.min, info.max).astype(kind)


def convert(op: tuple[str, ...]) -> Callable[..., Array]:
    """cvt of one source: `cvt[.rounding][.ftz].to.from`."""
    to, source = op[-2:]
    kind: Any = NUMPY[to]
    if source == "bf16":
        return from_bf16
    if to == "bf16":
        return to_bf16
    if to.startswith("f"):
        return lambda x: x.astype(kind)
    if source.startswith("f"):
        assert "rzi" in op, op
        return lambda x: to_integer(x, kind)
    return lambda x: x.astype(kind)


def pack(op: tuple[str, ...]) -> Callable[[Array, Array], Array]:
    """cvt of two sources to a pair of 16 bits: the first is the upper half."""
    half = to_bf16 if op[-2] == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
    return lambda a, b: (half(a).astype(np.uint32) << np.uint32(16)) | half(b).astype(np.uint32)


def shift(kind: type[Any], left: bool) -> Callable[[Array, Array], Array]:
    """Shifts clamp at the width; to the right, signed types keep their sign."""
    bits = np.iinfo(kind).bits

    def run(a: Array, by: Array) -> Array:
        far = by >= bits
        some = np.where(far, 0, by).astype(kind)
        if left:
            return np.where(far, kind(0), a << some)
        return np.where(
            far, np.where(a < 0, kind(-1), kind(0)) if kind(0) - 1 < 0 else kind(0), a >> some
        )

    return run


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits from `start` on, of signed types extended by the last of them."""
    bits = 8 * a.itemsize
    up = (bits - start - length).astype(a.dtype)
    return (a << up) >> (bits - length).astype(a.dtype)


def compare(op: tuple[str, ...]) -> Callable[[Array, Array], Array]:
    """setp: comparisons of floats are false with a NaN, but for the forms that end in u."""
    name, kind = op[1], op[-1]
    known = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "lo": np.less,
        "hi": np.greater,
        "ls": np.less_equal,
        "hs": np.greater_equal,
    }
    real = kind in ("f16", "f32", "f64", "bf16")
    unordered = real and name.endswith("u")
    run = known.get(name[:-1] if unordered else name)

    def test(a: Array, b: Array) -> Array:
        if kind == "bf16":
            a, b = from_bf16(a), from_bf16(b)
        nan = np.isnan(a) | np.isnan(b) if real else np.False_
        if run is None:
            return nan == (name == "nan")
        return (run(a, b) | nan) if unordered else (run(a, b) & ~nan)

    assert run is not None or name in ("nan", "num"), op
    return test


def approximate(slack: Slack) -> dict[str, Callable[..., Array]]:
    """Transcendental instructions, with the largest errors that the PTX manual gives them."""
    wide = np.float64
    return {
        "ex2": lambda x: np.where(x == 0, np.float32(1), slack(np.exp2(x.astype(wide)), 2.0**-22)),
        "lg2": lambda x: np.where(
            x == 1, np.float32(0), slack(np.log2(x.astype(wide)), 2.0**-22, 1.0)
        ),
        "rsqrt": lambda x: slack(1 / np.sqrt(x.astype(wide)), 2.0**-22.9),
        "sqrt": lambda x: slack(np.sqrt(x.astype(wide)), 2.0**-23),
        "rcp": lambda x: slack(1 / x.astype(wide), 2.0**-23),
        "div": lambda a, b: slack(a.astype(wide) / b, 2.0**-22),
    }


def whole_division(a: Array, b: Array) -> Array:
    """div of integers, towards zero."""
    return np.where(b == 0, 0, np.trunc(a / np.where(b == 0, 1, b).astype(np.float64))).astype(
        a.dtype
    )


def doubled(kind: str) -> str:
    """The type of twice the bits: of s32, s64."""
    return kind[0] + str(2 * int(kind[1:]))


def arithmetic(op: tuple[str, ...], slack: Slack) -> Callable[..., Array]:
    """The function of an arithmetic instruction over operands of its type; KeyError for one that is
    not known.
    """
    name, kind = op[0], op[-1]
    if kind.endswith("x2"):
        halves, pair = arithmetic((*op[:-1], kind[:-2]), slack), NUMPY[kind]
        return lambda *given: halves(
            *(np.ascontiguousarray(x).view(NUMPY[kind[:-2]]) for x in given)
        ).view(pair)
    # a sum, or the factors of a product, of 16 bits; exact in 32
    if op[-2] == "f32" and kind in ("bf16", "f16"):
        run, narrow = arithmetic(op[:-1], slack), 2 if op[0] == "fma" else 1
        return lambda *given: run(*(single(x, kind) for x in given[:narrow]), *given[narrow:])
    if kind == "bf16" and op[0] in ("abs", "neg", "max", "min"):  # exact: nothing is rounded
        exact = arithmetic((*op[:-1], "f32"), slack)
        return lambda *given: to_bf16(exact(*map(from_bf16, given)))
    np_kind: Any = NUMPY[kind]
    real = kind == "f32"
    if name == "fma" and ("plus" in op or "minus" in op):  # of ptx_code.fused
        product, addend = ((-1.0 if sign == "minus" else 1.0) for sign in op[1:3])
        return lambda a, b, c: fma(a, b * np.float32(product), c * np.float32(addend))
    if name in ("mul", "mad") and not real:
        return _integer_product(op)
    if name == "div" and not real:
        return whole_division
    if real and name in ("ex2", "lg2", "rsqrt", "sqrt", "rcp", "div"):
        run = approximate(slack if "approx" in op or "full" in op else Slack())[name]
        # float64 and one rounding is exact for the others
        assert "rn" not in op or name != "rsqrt", op
    elif name in ("shl", "shr"):
        run = shift(np_kind, name == "shl")
    elif name in ("max", "min"):
        of_two: Any = getattr(np, f"f{name}" if real else f"{name}imum")
        assert not (real and "NaN" in op), op
        run = lambda *given: reduce(of_two, given)  # noqa: E731    sm_100 has max of three
    else:
        run = {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "fma": fma,
            "neg": np.negative,
            "abs": np.abs,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "not": np.invert,
            "bfe": bit_field,
            "popc": lambda a: np.bitwise_count(a).astype(np_kind),
            "mov": lambda a: a,
            "cvta": lambda a: a,
        }[name]
        if kind == "bf16":
            raise KeyError(name)
    if "ftz" not in op:
        return run
    return lambda *given: flush(run(*map(flush, given)))


def _integer_product(op: tuple[str, ...]) -> Callable[..., Array]:
    """mul and mad of integers: .lo keeps the type, .wide gives the type of twice the bits."""
    name, form, kind = op[0], op[1], op[-1]
    assert form in ("lo", "wide"), op
    to = NUMPY[doubled(kind) if form == "wide" else kind]
    if name == "mul":
        return lambda a, b: a.astype(to) * b.astype(to)
    return lambda a, b, c: a.astype(to) * b.astype(to) + c
