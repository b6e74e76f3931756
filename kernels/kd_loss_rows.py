"""Fused distillation loss: cross-entropy and divergence from a sparse teacher, value and gradient,
from rows of logits.

    loss_N = ce_scale * CE_N + kd_scale * D_N

CE is at temperature 1, D(q || p) at T, in nats, without T^2.

One program per row, two sweeps. The K kept logits and those of the labels are gathered, and the
kept ones knocked out of the row with -inf; sweep 1 then sums both exponentials over the tail
itself, so no tail comes from a subtraction; the kept are added from registers. Sweep 2 writes the
dense gradient, two numbers per row times two powers of one exponential, over the logits (or beside
them); the K + J other entries are computed in float32 and rounded once. Where the gradient does not
take their place, the row's own bits are put back at the knocked-out ids: while the kernel runs, and
only then, those K entries of the logits read -inf.

Where there are fewer rows than multiprocessors, or just more, several programs share a row in two
launches: the sums of each part, then the gradient of each part; what the second launch reads fits
in L2. A teacher over all classes (no ids) has its own kernel, `kd_full`: one read, one write. The
scales are in the gradient that forward leaves, so that a backward of factor 1 moves nothing: each
program reads its row's factor on the device and stops.

Bytes moved, at least (bf16, V classes, N rows): 2 N V read, 2 N V written, and N (K (size of an id
+ 4) + 24) of the rest. Sweep 2 reads the row again, from L2 while (rows in flight) * 2 V bytes stay
there; else 6 N V in all. Exponentials per element: 1 + 1 / (8 R) in sweep 1 (bf16), 1 in sweep 2;
twice that for a T that is not on the list of `powers`; a softcap takes one more, and an rsqrt, in
each sweep. The uniform tail adds sums to sweep 1; a logit scale is in numbers of the row and costs
no instruction per element. Compiled for sm_90 (bf16, K = 64, one label; triton 3.7.1), instructions
per element of sweep 1 + sweep 2:

    V = 128256, R = 8, 16 warps, 128 registers    T = 1: 6.0 + 5.5    T = 2: 7.1 + 6.6    T = 1.37:
        9.0 + 8.6
    V = 128256, R = 4, 16 warps, 128 registers    T = 2 and uniform: 12.3 + 7.0
    V = 128256, R = 2, 16 warps, 128 registers    T = 2 and softcap: 27.9 + 28.5
    V = 50257,  R = 4,  8 warps, 128 registers                        T = 2: 7.5 + 6.8
    V = 32000,  R = 4,  8 warps,  80 registers                        T = 2: 7.5 + 6.9

128-bit loads and stores alone, no spills, 22 barriers a row (31 uniform);
tests/kernels/test_aot.py holds the budgets. No time has been measured.

In a graph that torch.compile captures, the kernels are torch operators: opaque, functional, with
shapes of their own. Compiled code cannot write over the inputs of a differentiable operator: there
the gradient always has a buffer of its own, and backward multiplies it into another.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kdcache.kernels.kd_autograd import (
    Gradients,
    first_derivatives_only,
    link,
    register_gradient,
    split_over_devices,
)
from kdcache.kernels.kd_launch import (
    addressable,
    gradient_like,
    gradient_stride,
    launch,
    scale_gradient,
    scaled_gradient,
)
from kdcache.kernels.row_loss import (
    PER_ROW,
    SCHEMA,
    RowLoss,
    wrong_numbers,
    wrong_parts,
    wrong_shapes,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)  # settled when triton was imported
MOST_FULL = 16384  # classes of a teacher without ids: its rows are held in registers
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LIBRARY = "kdcache_kernels"


def kd_loss_rows(
    logits: Tensor, rows: RowLoss, *, parts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, CE, D) of each row, float32 [N]; only the loss carries a gradient. First derivatives
    only: to differentiate the gradient is a RuntimeError.

    logits        [N, V' >= V], float16, bfloat16 or float32; rows may be strided (a slice of a
                  padded vocabulary)
    rows          what is asked of them, see `RowLoss`. Without ids V is at most 16,384. In a graph
                  that torch.compile captures `inplace` is allowed and not done
    parts         programs that share a row, 1 to 64; None: several only where there are fewer rows
                  than multiprocessors

    Nothing waits for the device. ValueError for shapes, dtypes and options that do not fit.
    """
    _check(logits, rows, parts)
    rows = rows.each(_last_axis_contiguous, PER_ROW)
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    if torch.compiler.is_compiling():
        loss_N, ce_N, kd_N, _ = kd_rows_op(logits, *rows.arguments(), parts, wants_gradient)
        return loss_N, ce_N.detach(), kd_N.detach()
    out: tuple[Tensor, Tensor, Tensor] = _Rows.apply(logits, rows, parts, wants_gradient)  # type: ignore[no-untyped-call]
    return out


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: RowLoss, parts: int | None, wants_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_NV = addressable(logits.detach())
        gradient = None
        if wants_gradient:
            gradient = x_NV if rows.inplace else gradient_like(x_NV)
            link(ctx, logits)
        loss_N, ce_N, kd_N = torch.empty(
            (3, len(logits)), dtype=torch.float32, device=logits.device
        ).unbind()
        launch(x_NV, gradient, (loss_N, ce_N, kd_N), rows, parts)
        # an operation that kept these logits for its own backward must notice
        if gradient is x_NV:
            torch.autograd.graph.increment_version(x_NV)
        ctx.inplace, ctx.used = rows.inplace, False
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(ce_N, kd_N)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return loss_N, ce_N, kd_N

    @staticmethod
    @first_derivatives_only("kd_loss_rows")
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
        factor_N = grad_outputs[0]
        return None if factor_N is None else scaled_gradient(ctx, factor_N), None, None, None


@torch.library.custom_op(
    f"{LIBRARY}::kd_rows",
    mutates_args=(),
    schema=f"(Tensor logits, {SCHEMA}, int? parts, bool wants_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def kd_rows_op(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_N, CE_N, D_N, gradient [N, V'], or [0] where none is wanted)."""
    *asked, parts, wants_gradient = others
    x_NV = addressable(logits)
    # rows as the fake says: its strides are known before any address is
    if x_NV.data_ptr() % 16:
        x_NV = x_NV.new_empty_strided(x_NV.shape, (gradient_stride(x_NV), 1)).copy_(x_NV)
    gradient = gradient_like(x_NV) if wants_gradient else None
    values = _values(logits)
    launch(x_NV, gradient, values, RowLoss.of_arguments(asked), parts)
    return *values, logits.new_empty(0) if gradient is None else gradient


def _values(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten (loss, CE, D): no views of one buffer, which an operator must not return, and no
    len(), which would be a number that a graph is made for."""
    rows = logits.shape[0]
    loss_N, ce_N, kd_N = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return loss_N, ce_N, kd_N


@kd_rows_op.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not others[-1]:
        return *_values(logits), logits.new_empty(0)
    stride = gradient_stride(addressable(logits))
    return *_values(logits), logits.new_empty_strided(logits.shape, (stride, 1))


@torch.library.custom_op(
    f"{LIBRARY}::scale_rows", mutates_args=(), schema="(Tensor gradient, Tensor factor) -> Tensor"
)
def scale_rows_op(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient [N, V'] times factor [N], in the layout of the gradient."""
    out = gradient_like(gradient)
    scale_gradient(gradient, factor, out)
    return out


@scale_rows_op.register_fake
def _(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient.new_empty_strided(gradient.shape, (gradient_stride(gradient), 1))


register_gradient(kd_rows_op, scale_rows_op, "kd_loss_rows")


def _check(logits: Tensor, rows: RowLoss, parts: int | None) -> None:
    """ValueError for what does not fit together; only shapes and dtypes are looked at, never a
    value.
    """
    if split := split_over_devices(logits=logits):
        raise ValueError(split[0])
    if logits.dim() != 2 or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits are {list(logits.shape)} of {logits.dtype}; expected [N, V] of "
            f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
        )
    wrong = [*wrong_numbers(rows), *wrong_parts(rows), *wrong_shapes(logits, rows)]
    if not logits.is_cuda and not INTERPRETED:
        wrong.append(
            f"logits are on {logits.device}; the kernels need a CUDA device, or TRITON_INTERPRET=1 "
            "set before triton is imported"
        )
    if logits.shape[1] >= 2**31 - 2**16:
        wrong.append(f"the logits have {logits.shape[1]} columns; expected fewer than 2^31 - 2^16")
    if rows.log_probs_NK is not None and rows.ids_NK is None and rows.num_classes > MOST_FULL:
        wrong.append(
            f"log_probs are without ids, of {rows.num_classes} classes; expected at most "
            f"{MOST_FULL} classes in all"
        )
    if parts is not None and not 1 <= parts <= 64:
        wrong.append(f"parts is {parts}; expected 1 to 64")
    if wrong:
        raise ValueError("; ".join(wrong))


def _last_axis_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
