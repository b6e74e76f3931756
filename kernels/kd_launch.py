"""How the kernels of `kd_loss` are launched: tiles by the bytes of a row, compile-time constants,
gradient buffers.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import triton
from torch import Tensor

from kdcache.kernels.kd_full import kd_full
from kdcache.kernels.kd_rows import kd_rows, scale_rows
from kdcache.kernels.row_loss import RowLoss


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one program walks a row: tiles of `height` times one 16-byte vector per thread."""

    height: int
    warps: int
    registers: int = 128
    reverse: bool = False
    hints: bool = True  # whether reads and writes say what should stay in the cache

    @staticmethod
    def of(num_classes: int, itemsize: int, sums: bool = False, slow: bool = False) -> Tiles:
        """By the bytes of a row. `sums`: whether the sweeps do more than sum and write; `slow`:
        whether so much more that they wait for arithmetic.

        A multiprocessor's 65,536 registers hold 65,536 / (32 warps registers) programs, registers
        in steps of 8. Those have height * warps * 512 bytes each in flight; 4.8 TB/s, 132
        multiprocessors and a microsecond's latency ask for about 40 KB of them. Their rows should
        stay in an L2 of 50 MB until the second read: near 34 MB on all. So, by registers as
        compiled (tests/kernels/test_aot.py holds programs, bytes in flight and rows to it):

            row, bytes      height, warps    programs    KB in flight    MB of rows
            to 1,024        2, 1            25          25              to 3
            to 2,048        2, 2            16 to 21    32 to 42        to 6
            to 16,384       2, 4            8 to 10     32 to 40        to 22
            to 64,400       4, 8            3 to 4      48 to 64        to 34
            to 140,000      8, 8            2           64              to 37
            above           8, 16           1           64              34 of 257 KB

        A tile is computed whole, however little of a row is in it: where more than a tenth would be
        nothing, tiles are half as tall, with half in flight (V = 50,257: 2 programs of 4, 8 and 27
        MB; labels alone 3 and 40 MB). So they are with `sums`, and of height two where they
        are `slow`. Short rows finish too soon to be kept busy but by many programs, and have fewer
        barriers to wait at in few warps. Rows that do not fit are swept backwards the second time:
        what was read last is read first.
        """
        row = num_classes * itemsize
        if row <= 1024:
            return Tiles(2, 1)
        if row <= 16_384:
            return Tiles(2, 2 if row <= 2048 else 4, 80 if sums else 64)
        warps, tallest = (8, 4) if row <= 64_400 else (8, 8) if row <= 140_000 else (16, 8)
        tile = tallest * warps * 512
        filled = -(-row // tile) * tile <= 1.1 * row
        height = 2 if slow else tallest if filled and not sums else tallest // 2
        return Tiles(height, warps, 80 if tallest == 4 else 128, reverse=row > 320_000)


Values = tuple[Tensor, Tensor, Tensor]  # loss, CE, D [N]


def taught(rows: RowLoss) -> int | None:
    """The teacher's classes where they are fewer than the student's and the kernel has to know;
    None compiles to what it is without such classes: kept ids and a tail are given as they are.
    """
    known = rows.ids_NK is not None and rows.divergence.tail != "uniform"
    return None if known or rows.taught == rows.num_classes else rows.taught


def temperatures(rows: RowLoss) -> tuple[bool, bool]:
    """Whether the kernel for a sparse teacher sums exponentials of all classes at 1, and at T."""
    return (
        rows.labels_NJ is not None,
        rows.ids_NK is not None and rows.divergence.tail != "conditional",
    )


def tiles_of(rows: RowLoss, length: int, itemsize: int) -> Tiles:
    """How `length` classes of a row are walked."""
    # The sweeps wait for arithmetic: of a softcap, or of a test of each class whether it is the
    # teacher's.
    slow = rows.softcap is not None or (rows.ids_NK is not None and taught(rows) is not None)
    sums = rows.softcap is not None or rows.divergence.tail == "uniform"
    return Tiles.of(length, itemsize, sums, slow)


def unit(rows: RowLoss) -> float:
    """What a logit, or the tanh of a capped one, is multiplied with."""
    return rows.logit_scale if rows.softcap is None else rows.softcap


def gain(rows: RowLoss) -> float | None:
    """Factor of the gradient; None compiles to none."""
    return None if rows.logit_scale == 1 else rows.logit_scale


def rate(rows: RowLoss) -> float | None:
    """Factor of a logit within the tanh; None compiles to no tanh."""
    return None if rows.softcap is None else rows.logit_scale / rows.softcap


def powers(temperature: float) -> tuple[int, int] | None:
    """(P, Q) with T = P / Q, both at most 4, or None: then each temperature takes an exponential of
    its own.
    """
    ratio = Fraction(temperature).limit_denominator(4)
    return (
        (ratio.numerator, ratio.denominator)
        if float(ratio) == temperature and ratio.numerator <= 4
        else None
    )


def scale_gradient(gradient_NV: Tensor, factor_N: Tensor, out_NV: Tensor) -> None:
    """out = gradient times a factor per row; where out is the gradient, rows of factor 1 are not
    touched.
    """
    rows, width = gradient_NV.shape
    if rows == 0:
        return
    vec = 16 // gradient_NV.element_size()
    tiles = Tiles.of(width, gradient_NV.element_size())
    with device_of(gradient_NV):
        scale_rows[(rows,)](
            gradient_NV,
            out_NV,
            factor_N,
            gradient_NV.stride(0),
            out_NV.stride(0),
            factor_N.stride(0),
            width,
            tiles.height,
            vec * 32 * tiles.warps,
            vec,
            aligned(gradient_NV, width),
            out_NV is gradient_NV,
            num_warps=tiles.warps,
            num_stages=1,
            maxnreg=tiles.registers,
        )


def scaled_gradient(ctx: Any, factor_N: Tensor) -> Tensor:
    """The gradient that forward saved, times a factor per row. ctx has `inplace`, and `used`:
    whether it was taken.
    """
    if ctx.used:
        raise RuntimeError(
            "the loss was differentiated twice with inplace=True, but its gradient took the place "
            "of the logits and is used up; call it with inplace=False"
        )
    (gradient,) = ctx.saved_tensors
    ctx.used = ctx.inplace
    # A graph that is kept may be asked again, for another factor.
    keep = not ctx.inplace and torch._C._autograd._get_current_graph_task_keep_graph()
    out: Tensor = gradient_like(gradient) if keep else gradient
    scale_gradient(gradient, factor_N, out)
    return out


def launch(
    x_NV: Tensor,
    gradient: Tensor | None,
    out: Values,
    rows: RowLoss,
    parts: int | None = None,
) -> None:
    """Writes loss, CE and D of each row and, where there is a buffer, its gradient, which may be
    the logits. What is asked has been checked.

    parts: programs that share a row; None: more than one only where rows are few.
    """
    if len(x_NV) == 0:
        return
    if rows.ids_NK is None and rows.log_probs_NK is not None:
        return _launch_full(x_NV, gradient, out, rows, rows.log_probs_NK)
    itemsize = x_NV.element_size()
    part = (
        part_length(len(x_NV), rows.num_classes, itemsize)
        if parts is None
        else -(-rows.num_classes // parts // 64) * 64
    )
    parts = -(-rows.num_classes // part)
    constants = kernel_constants(
        rows,
        itemsize,
        gradient is not None,
        gradient is x_NV,
        aligned(x_NV, rows.num_classes),
        part,
    )
    split = parts > 1 and constants["P"] + constants["Q"] > 0
    scratch: tuple[Tensor | None, ...] = (None, None, None)
    if split:
        slots = 6 if rows.divergence.tail == "uniform" else 4
        scratch = (
            x_NV.new_empty((len(x_NV), parts, slots), dtype=torch.float32),
            x_NV.new_empty((len(x_NV), constants["BK"])),
            x_NV.new_empty((len(x_NV), constants["BJ"]), dtype=torch.float32),
        )
    tiles = tiles_of(rows, min(part, rows.num_classes), itemsize)
    to = x_NV if gradient is None else gradient
    with device_of(x_NV):
        for stage in (1, 2) if split else (0,):
            kd_rows[(len(x_NV), parts if split else 1)](
                x_NV,
                to,
                *out,
                rows.labels_NJ,
                rows.label_weight_NJ,
                rows.ids_NK,
                rows.log_probs_NK,
                rows.log_tail_N if rows.divergence.tail in ("bucket", "uniform") else None,
                rows.row_weight_N,
                rows.ce_scale,
                rows.kd_scale,
                x_NV.stride(0),
                to.stride(0),
                _stride(rows.labels_NJ),
                _stride(rows.label_weight_NJ),
                _stride(rows.ids_NK),
                _stride(rows.log_probs_NK),
                rows.num_classes,
                x_NV.shape[1],
                _width(rows.ids_NK),
                _width(rows.labels_NJ),
                taught(rows),
                *exponents(rows),
                rows.temperature,
                rows.divergence.teacher_share,
                gain(rows),
                rate(rows),
                *scratch,
                part,
                parts,
                **constants,
                STAGE=stage,
                num_warps=tiles.warps,
                num_stages=1,
                maxnreg=tiles.registers,
            )


def part_length(rows: int, num_classes: int, itemsize: int = 2) -> int:
    """Columns of a program: all of them, unless there are too few rows to occupy 132
    multiprocessors twice, or so few more than whole waves of them that parts end sooner.

    Of rows that have a multiprocessor each, the last wave takes as long as any; eighths fill it to
    a tenth or so. But all rows are read by one launch before the next reads them again: where L2
    does not keep them, a third move of their bytes beside the read and the write, which no wave
    saves.
    """
    parts, row = 1, num_classes * itemsize
    if rows < 132:
        parts = min(64, -(-264 // rows))
    elif row > 140_000 and rows * row <= 40_000_000 and 1.1 * rows / 132 < -(-rows // 132):
        parts = 8
    length = max(-(-num_classes // parts), 8192)
    return -(-length // 2048) * 2048


def _launch_full(
    x_NV: Tensor, gradient: Tensor | None, out: Values, rows: RowLoss, log_probs_NV: Tensor
) -> None:
    to = x_NV if gradient is None else gradient
    block = max(triton.next_power_of_2(rows.num_classes), 32)
    vectors = all(
        aligned(t, rows.num_classes, 16 // x_NV.element_size()) for t in (x_NV, to, log_probs_NV)
    )
    with device_of(x_NV):
        kd_full[(len(x_NV),)](
            x_NV,
            to,
            *out,
            rows.labels_NJ,
            rows.label_weight_NJ,
            log_probs_NV,
            rows.row_weight_N,
            rows.ce_scale,
            rows.kd_scale,
            x_NV.stride(0),
            to.stride(0),
            _stride(rows.labels_NJ),
            _stride(rows.label_weight_NJ),
            log_probs_NV.stride(0),
            rows.num_classes,
            x_NV.shape[1],
            _width(rows.labels_NJ),
            taught(rows),
            unit(rows) / (math.log(2) * rows.temperature),
            rows.temperature,
            rows.divergence.teacher_share,
            None if unit(rows) == 1 else unit(rows),
            gain(rows),
            rate(rows),
            **full_constants(rows, x_NV.element_size(), gradient is not None, vectors),
            num_warps=full_warps(block, rows.divergence.name),
            num_stages=1,
        )


def full_warps(block: int, divergence: str) -> int:
    """Warps that hold a row of `block` classes. Beyond 8192 all spill; what takes more registers
    per class spills less over twice as many threads, of half as many registers each."""
    return min(16 if divergence == "forward_kl" else 32, max(1, block // 512))


def full_constants(rows: RowLoss, itemsize: int, gradient: bool, aligned: bool) -> dict[str, Any]:
    """What the kernel for a teacher over all classes is made for."""
    return {
        "BJ": 1 if rows.labels_NJ is None else rows.labels_NJ.shape[1],
        "DIVERGENCE": rows.divergence.name,
        "CONDITIONAL": rows.divergence.tail == "conditional" and taught(rows) is not None,
        "GRADIENT": gradient,
        "BLOCK": max(triton.next_power_of_2(rows.num_classes), 32),
        "VEC": 16 // itemsize,
        "ALIGNED": aligned,
    }


def kernel_constants(
    rows: RowLoss, itemsize: int, gradient: bool, inplace: bool, aligned: bool, part: int
) -> dict[str, Any]:
    """What a compiled kernel is made for; neither the number of rows nor the strides are among it."""
    ratio = powers(rows.temperature)
    one, soft = temperatures(rows)
    two = one and soft and ratio is None
    p, q = ratio if one and soft and ratio is not None else (int(one), int(soft))
    tiles = tiles_of(rows, min(part, rows.num_classes), itemsize)
    vec = 16 // itemsize
    return {
        "BK": 1 if rows.ids_NK is None else triton.next_power_of_2(rows.ids_NK.shape[1]),
        "BJ": 1 if rows.labels_NJ is None else triton.next_power_of_2(rows.labels_NJ.shape[1]),
        "TAIL": rows.divergence.tail,
        "DIVERGENCE": rows.divergence.name,
        "P": p,
        "Q": q,
        "TWO": two,
        "GRADIENT": gradient,
        "INPLACE": inplace,
        "R": tiles.height,
        "C": vec * 32 * tiles.warps,
        "VEC": vec,
        "ALIGNED": aligned,
        "REVERSE": tiles.reverse,
        "HINTS": tiles.hints,
    }


def exponents(rows: RowLoss) -> tuple[float, float]:
    """What the kernel multiplies logits with: unit log2(e) / P, or over T where 1 is not wanted;
    and over T.
    """
    log2e = unit(rows) / math.log(2)
    soft = log2e / rows.temperature
    wanted = temperatures(rows)
    if not wanted[0]:
        return soft, soft
    ratio = powers(rows.temperature) if wanted[1] else None
    return log2e / (1 if ratio is None else ratio[0]), soft


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _width(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[1]


def addressable(logits_NV: Tensor) -> Tensor:
    """Rows that do not overlap, columns next to each other; a copy only where they are not so."""
    rows, width = logits_NV.shape
    fits = (width <= 1 or logits_NV.stride(1) == 1) and (rows <= 1 or logits_NV.stride(0) >= width)
    return logits_NV if fits else logits_NV.contiguous()


def gradient_stride(x_NV: Tensor) -> int:
    """The least row stride with which rows of a new buffer lie within 16 bytes as those of x do."""
    rows, width = x_NV.shape
    return width + (x_NV.stride(0) - width) % (16 // x_NV.element_size()) if rows > 1 else width


def gradient_like(x_NV: Tensor) -> Tensor:
    """Rows of the logits' length, each starting where its row of logits does within 16 bytes: both
    take vectors.
    """
    stride = gradient_stride(x_NV)
    phase = x_NV.data_ptr() // x_NV.element_size() % (16 // x_NV.element_size())
    return x_NV.new_empty(len(x_NV) * stride + phase).as_strided(x_NV.shape, (stride, 1), phase)


def aligned(x_NV: Tensor, num_classes: int, vec: int = 0) -> bool:
    """Every row starts at 16 bytes and is whole vectors long."""
    vec = vec or 16 // x_NV.element_size()
    return (
        num_classes % vec == 0
        and x_NV.data_ptr() % 16 == 0
        and (len(x_NV) == 1 or x_NV.stride(0) % vec == 0)
    )
