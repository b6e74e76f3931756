"""The torch engine as torch operators, for graphs that torch.compile captures: opaque, functional,
shapes of their own.

Captured as it is, its loop over chunks of rows would be unrolled: a graph for every number of rows,
and its temporaries fused into one for all of them. As an operator it keeps its chunks and its bits,
and one graph serves all batch sizes. Compiled code cannot write over its inputs: the gradient has a
buffer of its own, whatever `inplace` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.kernels.kd_autograd import Gradients, first_derivatives_only
from kdcache.loss.divergences import Divergence
from kdcache.loss.targets import SoftTargets
from kdcache.loss.torch_engine import RowLoss, gradient_like, loss_rows, scale_rows, wide

ROWS = (
    "(Tensor logits, Tensor? labels, Tensor? label_weight, Tensor? ids, Tensor? log_probs, Tensor? "
    "log_tail, "
    "Tensor? row_weight, Tensor? ce_scale, Tensor? kd_scale, int num_classes, int teacher_classes, "
    "float temperature, str divergence, str tail, float? beta, bool wants_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("kdcache::loss_rows", mutates_args=(), schema=ROWS)
def loss_rows_op(
    logits: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    ids: Tensor | None,
    log_probs: Tensor | None,
    log_tail: Tensor | None,
    row_weight: Tensor | None,
    ce_scale: Tensor | None,
    kd_scale: Tensor | None,
    num_classes: int,
    teacher_classes: int,
    temperature: float,
    divergence: str,
    tail: str,
    beta: float | None,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_N, CE_N, D_N, gradient [N, V'], or [0] where none is wanted)."""
    targets = (
        None
        if log_probs is None
        else SoftTargets(
            temperature, teacher_classes, ids, log_probs, log_tail, row_weight, ids_checked=True
        )
    )
    rows = RowLoss(
        num_classes,
        labels,
        label_weight,
        targets,
        Divergence(divergence, beta, tail),
        ce_scale,
        kd_scale,
        False,
    )
    gradient = gradient_like(logits) if wants_gradient else None
    return *loss_rows(logits, rows, gradient), logits.new_empty(0) if gradient is None else gradient


@loss_rows_op.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    working = wide(logits.dtype)
    # len() is a constant
    loss_N, ce_N, kd_N = (logits.new_empty(logits.shape[0], dtype=working) for _ in range(3))
    return loss_N, ce_N, kd_N, gradient_like(logits) if others[-1] else logits.new_empty(0)


@torch.library.custom_op(
    "kdcache::scale_rows", mutates_args=(), schema="(Tensor gradient, Tensor factor) -> Tensor"
)
def scale_rows_op(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient [N, V'] times factor [N]."""
    return scale_rows(gradient, factor, torch.empty_like(gradient))


@scale_rows_op.register_fake
def _(gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.inputs = len(inputs)


@first_derivatives_only("kd_loss")
def _backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
    (gradient,) = ctx.saved_tensors
    return scale_rows_op(gradient, grad_outputs[0]), *(None for _ in range(ctx.inputs - 1))


loss_rows_op.register_autograd(_backward, setup_context=_setup)


def compiled_engine(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
    """An `Engine`: the torch engine inside a graph that is being captured."""
    t = rows.targets
    teacher = (None,) * 4 if t is None else (t.ids_NK, t.log_probs_NK, t.log_tail_N, t.weight_N)
    loss_N, ce_N, kd_N, _ = loss_rows_op(
        logits,
        rows.labels_NJ,
        rows.label_weight_NJ,
        *teacher,
        rows.ce_scale,
        rows.kd_scale,
        rows.num_classes,
        rows.num_classes if t is None else t.num_classes,
        1.0 if t is None else t.temperature,
        rows.divergence.name,
        rows.divergence.tail,
        rows.divergence.beta,
        torch.is_grad_enabled() and logits.requires_grad,
    )
    return loss_N, ce_N.detach(), kd_N.detach()
