"""What is kept of a teacher's logits: top-k in one exact order, tail, labels, moments; one read of
a row.

    order         logit descending, then id ascending, of the float32 upcast; -0.0 equals +0.0. The
                  same bits every run
    tail_lse_NT   log of the sum over ids neither in the head nor among the labels of exp((z - max)
                  / T), summed over those ids themselves, relative to their own maximum: it neither
                  cancels nor underflows

Algorithm. One program per row; lane l of L holds every L-th piece of B neighbouring columns (the
registers of one thread). The one sweep keeps of each lane its maximum and its sums of exponentials
relative to it. The k lanes of greatest maximum hold the whole head, since each has an element that
precedes all of every other lane (all lanes tied at the k-th are taken; where they are many, those
that have it first). So the sums of the other lanes are tail and nothing else. The k lanes, and
those of the labels, are read again: what reaches the bound that the k maxima set is collected (k
and a few more), the rest joins the tail. The place of a collected element is the number of those
before it. No atomics; nothing is subtracted from a sum. Where the greatest logits crowd into few
lanes, or all are equal, the bound is raised by bisection and the lanes are read once more: slower,
and as exact.

Moments come from sums of differences from each lane's first logit, which the same sweep adds; rows
with -inf, or whose squares no float32 holds, are read twice more, scaled.

Bytes, at least (s of a logit, V classes, N rows): N V s read, N (12 k + 4 T + 4 J + 4) written. The
second look reads a 32-byte sector for each piece, about N k V / (L B) of them: for V = 128256,
bf16, k = 64 a quarter of the row, for k = 256 as much as the row, from L2 while the rows in flight
stay there. Finding a threshold and sweeping again would read all of it a second time. Phases meet
in 4 (4 CAP + 2 J + 2 T + 3) bytes of memory a row, CAP the power of two at or above 2 k: 2.1 KB for
k = 64.

Exponentials per element: 1 + 1 / (A B) where the temperatures are one of them divided by 1 to 4,
else that for each group of them. Compiled for sm_90 (bf16, one label; triton 3.7.1), instructions
per element of the sweep, and of the second look, which k in L elements take:

    V = 128256, k = 64     T = 1, 2       16 warps, L = 512    50 registers     8.8, 14.6
    V = 128256, k = 64     the same and moments                52 registers    11.8, 14.6
    V = 128256, k = 256    T = 1, 2       16 warps, L = 512    56 registers     8.7, 14.6
    V = 50257,  k = 64     T = 1, 2, 4    16 warps, L = 512    53 registers    10.8, 16.9
    V = 32000,  k = 64     T = 1, 2, 4     8 warps, L = 256    66 registers    10.8, 16.8

128-bit loads alone, no barrier in either loop, no spill and no stack: tests/kernels/test_topk_aot.py
holds it for three architectures. The code at T = 1, 2 has 87 barriers, all outside them, those of
rare branches counted; a step of a bisection over the lanes takes 3. No time has been measured.

Why 16 warps of at most 64 registers: two programs to a multiprocessor, so that one sweeps while the
other looks again, and 512 lanes of 16 bytes, which halves the sectors of the second look against 8
warps of 128. 264 rows of 257 KB are 68 MB; in a 50 MB L2 about a quarter of a row has gone when it
is looked at again. With fewer registers and more programs more of it would have; with one program
nothing overlaps the second look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kdcache.kernels.kd_launch import addressable, aligned, device_of
from kdcache.kernels.topk_rows import topk_rows

INTERPRETED = bool(triton.knobs.runtime.interpret)  # settled when triton was imported
# low bits of the float32 upcast that are unused
DTYPES = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
MOST_K = 256
MOST_LABELS = 8
NOT_A_NUMBER, INFINITE, EMPTY, BAD_LABEL = 1, 2, 4, 8  # what flag_N is made of


@dataclass(frozen=True, slots=True)
class TopK:
    """What is kept of N rows, on their device. T temperatures, J labels.

    ids_NK int64, values_NK float32 (the logits themselves); tail_lse_NT float32, -inf where none is
    left; label_logit_NJ float32, -inf for no label, None without labels; mean_N,
    std_N float32 over the finite logits (population), None unless asked for.

    flag_N int32, 0 for a good row: NOT_A_NUMBER, INFINITE (+inf), EMPTY (no finite logit): its ids
    are -1 and the rest NaN; BAD_LABEL: a label beyond the classes, taken as none. Nothing has
    waited for it: look once a batch.
    """

    ids_NK: Tensor
    values_NK: Tensor
    tail_lse_NT: Tensor
    flag_N: Tensor
    label_logit_NJ: Tensor | None = None
    mean_N: Tensor | None = None
    std_N: Tensor | None = None


def topk_lse(
    logits: Tensor,
    k: int,
    temperatures: Sequence[float],
    labels: Tensor | None = None,
    moments: bool = False,
) -> TopK:
    """What is kept of each row of logits [N, V], float16, bfloat16 or float32, strided rows
    welcome.

    1 <= k <= min(V, MOST_K); temperatures above 0; labels integer [N] or [N, J], J <= MOST_LABELS,
    negative for unknown, the same class twice allowed. On a CUDA device, or on the CPU where triton
    interprets. Nothing waits for the device. ValueError for what does not fit.
    """
    labels_NJ = labels[:, None] if labels is not None and labels.dim() == 1 else labels
    _check(logits, k, temperatures, labels_NJ)
    x_NV = addressable(logits.detach())
    if labels_NJ is not None and labels_NJ.stride(1) != 1:
        labels_NJ = labels_NJ.contiguous()
    rows, many = len(x_NV), 0 if labels_NJ is None else labels_NJ.shape[1]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((rows, *shape), dtype=dtype, device=x_NV.device)

    out = TopK(
        new(k, dtype=torch.int64),
        new(k),
        new(len(temperatures)),
        new(dtype=torch.int32),
        None if labels_NJ is None else new(many),
        *((new(), new()) if moments else ()),
    )
    if rows == 0:
        return out
    constants, warps, registers = build(
        x_NV.shape[1], x_NV.dtype, k, temperatures, many, moments, aligned(x_NV, x_NV.shape[1])
    )
    scratch = new(4 * constants["CAP"] + 2 * many + 2 * len(temperatures) + 3, dtype=torch.int32)
    with device_of(x_NV):
        topk_rows[(rows,)](
            x_NV,
            out.ids_NK,
            out.values_NK,
            out.tail_lse_NT,
            out.label_logit_NJ,
            out.mean_N,
            out.std_N,
            out.flag_N,
            labels_NJ,
            scratch,
            x_NV.stride(0),
            0 if labels_NJ is None else labels_NJ.stride(0),
            x_NV.shape[1],
            (x_NV.shape[1] - 1).bit_length(),
            k,
            **constants,
            num_warps=warps,
            num_stages=1,
            maxnreg=registers,
        )
    return out


def tier_tails(
    topk: TopK, tiers: Sequence[int], temperatures: Sequence[float], labels: Tensor | None = None
) -> Tensor:
    """Tails [N, len(tiers), T] float32 of heads of fewer entries, on the device, without another
    look at the logits.

    Of a tier k': log of the sum over ids neither among the first k' nor among the labels of exp((z
    - max) / T); its part beyond entry k is `tail_lse_NT` as it stands. `temperatures` and `labels`
      are those that `topk` was made with,
    1 <= k' <= k. NaN for a flagged row. ValueError for what does not fit.
    """
    most = topk.ids_NK.shape[1]
    if not tiers or not all(1 <= tier <= most for tier in tiers):
        raise ValueError(f"tiers are {list(tiers)}; expected at least one, each 1 to {most}")
    rows, many = topk.tail_lse_NT.shape
    if len(temperatures) != many or not all(0 < t < math.inf for t in temperatures):
        raise ValueError(
            f"temperatures are {list(temperatures)}; expected the {many} that the tails are for"
        )
    rest_NK = topk.values_NK - topk.values_NK[:, :1]
    if labels is not None:
        labels_NJ = labels[:, None] if labels.dim() == 1 else labels
        if labels_NJ.dim() != 2 or len(labels_NJ) != rows:
            raise ValueError(f"labels are {list(labels.shape)}; expected [{rows}] or [{rows}, J]")
        rest_NK = rest_NK.masked_fill(
            (topk.ids_NK[:, :, None] == labels_NJ[:, None, :]).any(-1), -torch.inf
        )
    rest_NTK = torch.stack([rest_NK / t for t in temperatures], 1)
    tail_NT = topk.tail_lse_NT
    return torch.stack(
        [
            tail_NT
            if tier == most
            else _log_sum_exp(torch.cat([rest_NTK[..., tier:], tail_NT[..., None]], -1))
            for tier in tiers
        ],
        1,
    )


def _log_sum_exp(x: Tensor) -> Tensor:
    """Over the last dimension, -inf of nothing but -inf; read off log_softmax, since the bits of a
    row must be its own.

    `torch.logaddexp` on a CPU rounds by where in a vector a number stands.
    """
    top = x.amax(-1)
    return torch.where(top == -torch.inf, top, top - torch.log_softmax(x, -1).amax(-1))


def build(
    num_classes: int,
    dtype: torch.dtype,
    k: int,
    temperatures: Sequence[float],
    labels: int,
    moments: bool,
    aligned: bool,
) -> tuple[dict[str, Any], int, int]:
    """(compile-time constants, warps, most registers a thread); neither the number of rows nor a
    stride is in them.
    """
    vec = 16 // dtype.itemsize
    size = num_classes * dtype.itemsize
    # places of 2 k in registers
    warps = 4 if size <= 16_384 and k <= 128 else 8 if size <= 80_000 else 16
    piece = vec
    # of two lanes per kept entry, half are looked at again
    while warps * 32 * vec // piece < 2 * k and piece > 1:
        piece //= 2
    cap = max(32, triton.next_power_of_2(2 * k))
    constants = {
        "TEMPS": (*plan(temperatures), tuple(map(float, temperatures))),
        "J": labels,
        "CAP": cap,
        "A": 1 if size <= 4096 else 2,
        "L": warps * 32 * vec // piece,
        "B": piece,
        "PART": min(cap, 128),
        "VEC": vec,
        "ALIGNED": aligned,
        "SHIFT": DTYPES[dtype],
        "MOMENTS": moments,
    }
    return constants, warps, 64 if warps == 16 else 128


def plan(
    temperatures: Sequence[float],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """(power, group) of each temperature and log2(e) / T of each group's base: u = exp(x / base),
    exp(x / T) = u^power.

    A base serves the temperatures that are it divided by 1, 2, 3 or 4: one exponential for all of
    them.
    """
    bases: list[float] = []
    for t in sorted(set(map(float, temperatures)), reverse=True):
        if not any(base / t in (1, 2, 3, 4) for base in bases):
            bases.append(t)
    group = [
        next(g for g, base in enumerate(bases) if base / t in (1, 2, 3, 4))
        for t in map(float, temperatures)
    ]
    power = tuple(int(bases[g] / t) for g, t in zip(group, temperatures, strict=True))
    return power, tuple(group), tuple(1 / (math.log(2) * base) for base in bases)


def _check(logits: Tensor, k: int, temperatures: Sequence[float], labels_NJ: Tensor | None) -> None:
    """ValueError for what does not fit together; only shapes and dtypes are looked at, never a
    value.
    """
    if logits.dim() != 2 or logits.dtype not in DTYPES or not 1 <= logits.shape[1] < 2**30:
        raise ValueError(
            f"logits are {list(logits.shape)} of {logits.dtype}; expected [N, V] of float16, "
            "bfloat16 or float32, V from 1 to 2^30 - 1"
        )
    wrong = []
    if not logits.is_cuda and not (INTERPRETED and logits.device.type == "cpu"):
        wrong.append(
            f"logits are on {logits.device}; the kernel needs a CUDA device, or TRITON_INTERPRET=1 "
            "set before triton is imported"
        )
    if not 1 <= k <= min(logits.shape[1], MOST_K):
        wrong.append(f"k is {k}; expected 1 to {min(logits.shape[1], MOST_K)}")
    if not temperatures or not all(0.02 <= t < math.inf for t in temperatures):
        wrong.append(
            f"temperatures are {list(temperatures)}; expected at least one, each 0.02 or above"
        )
    if labels_NJ is not None and (
        labels_NJ.dim() != 2
        or len(labels_NJ) != len(logits)
        or labels_NJ.is_complex()
        or labels_NJ.is_floating_point()
        or labels_NJ.dtype == torch.bool
        or labels_NJ.device != logits.device
        or not 1 <= labels_NJ.shape[1] <= MOST_LABELS
    ):
        wrong.append(
            f"labels are {list(labels_NJ.shape)} of {labels_NJ.dtype} on {labels_NJ.device}; "
            f"expected integers [{len(logits)}] or [{len(logits)}, 1 to {MOST_LABELS}] on "
            f"{logits.device}"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
