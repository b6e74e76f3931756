"""The same kernels as torch operators, for torch.compile and CUDA graphs: opaque, functional, with
shapes of their own.

Compiled code cannot write over its inputs in the forward pass of a differentiable operator: the
gradient always has a buffer of its own here, and backward multiplies it into another. Eager calls
do not come this way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.kernels.kd_autograd import Gradients, first_derivatives_only
from kdcache.kernels.kd_launch import (
    Call,
    addressable,
    gradient_like,
    gradient_stride,
    launch,
    scale_gradient,
)

LIBRARY = "kdcache_kernels"
ROWS = (
    "(Tensor logits, Tensor? labels, Tensor? label_weight, Tensor? ids, Tensor? log_probs, Tensor? "
    "log_tail, "
    "Tensor? row_weight, Tensor? ce_scale, Tensor? kd_scale, Tensor? z_scale, int num_classes, "
    "float temperature, "
    "str divergence, str tail, float beta, int? teacher_classes, float logit_scale, float? "
    "softcap, int? parts, "
    "bool stats, bool wants_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(f"{LIBRARY}::kd_rows", mutates_args=(), schema=ROWS)
def kd_rows_op(
    logits: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    ids: Tensor | None,
    log_probs: Tensor | None,
    log_tail: Tensor | None,
    row_weight: Tensor | None,
    ce_scale: Tensor | None,
    kd_scale: Tensor | None,
    z_scale: Tensor | None,
    num_classes: int,
    temperature: float,
    divergence: str,
    tail: str,
    beta: float,
    teacher_classes: int | None,
    logit_scale: float,
    softcap: float | None,
    parts: int | None,
    stats: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss_N, CE_N, D_N, stats [N, 4], gradient [N, V']); [0] in place of one that is not wanted."""
    call = Call(
        num_classes,
        labels,
        label_weight,
        ids,
        log_probs,
        log_tail,
        row_weight,
        temperature,
        divergence,
        tail,
        beta,
        ce_scale,
        kd_scale,
        False,
        parts,
        logit_scale=logit_scale,
        softcap=softcap,
        z_scale=z_scale,
        stats=stats,
        teacher_classes=teacher_classes,
    )
    x_NV = addressable(logits)
    # rows as the fake says: its strides are known before any address is
    if x_NV.data_ptr() % 16:
        x_NV = x_NV.new_empty_strided(x_NV.shape, (gradient_stride(x_NV), 1)).copy_(x_NV)
    gradient = gradient_like(x_NV) if wants_gradient else None
    *values, stats_N4 = _values(logits, stats)
    launch(x_NV, gradient, (values[0], values[1], values[2], stats_N4 if stats else None), call)
    return (
        values[0],
        values[1],
        values[2],
        stats_N4,
        logits.new_empty(0) if gradient is None else gradient,
    )


def _values(logits: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten (loss, CE, D, stats): no views of one buffer, which an operator must not return,
    and no len(), which would be a number that a graph is made for."""
    rows = logits.shape[0]
    loss_N, ce_N, kd_N = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return loss_N, ce_N, kd_N, logits.new_empty((rows, 4) if stats else (0,), dtype=torch.float32)


@kd_rows_op.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = _values(logits, others[-2])
    if not others[-1]:
        return *values, logits.new_empty(0)
    stride = gradient_stride(addressable(logits))
    return *values, logits.new_empty_strided(logits.shape, (stride, 1))


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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[4])
    ctx.inputs = len(inputs)


@first_derivatives_only("kd_loss_rows")
def _backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
    (gradient,) = ctx.saved_tensors
    return scale_rows_op(gradient, grad_outputs[0]), *(None for _ in range(ctx.inputs - 1))


kd_rows_op.register_autograd(_backward, setup_context=_setup)


def compiled_rows(logits: Tensor, call: Call) -> tuple[Tensor, ...]:
    """(loss, CE, D) of a checked call, and its stats if it asks for them, inside a graph that is
    being captured.
    """
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    loss_N, ce_N, kd_N, stats_N4, _ = kd_rows_op(
        logits,
        call.labels_NJ,
        call.label_weight_NJ,
        call.ids_NK,
        call.log_probs_NK,
        call.log_tail_N,
        call.row_weight_N,
        call.ce_scale,
        call.kd_scale,
        call.z_scale,
        call.num_classes,
        call.temperature,
        call.divergence,
        call.tail,
        call.beta,
        call.teacher_classes,
        call.logit_scale,
        call.softcap,
        call.parts,
        call.stats,
        wants_gradient,
    )
    return loss_N, ce_N.detach(), kd_N.detach(), *((stats_N4.detach(),) if call.stats else ())
