"""The distillation loss behind an LM head: hidden states in, their gradient and the head's out,
logits never whole.

    loss = sum over rows of ce_scale * CE + kd_scale * D        of logits = hidden @ weight.T + bias

Rows go in chunks whose logits fit a budget, one buffer for all: a product fills it with logits in
the inputs' dtype, an engine (`kd_loss_rows`) turns them into the gradient of the chunk in place,
two products read it:

    d hidden = gradient @ weight            d weight += gradient.T @ hidden, float32 within the
        product

The gradients are complete when forward ends, and backward multiplies them by one number. They are
taken of the loss in units of the larger scale, and that unit is part of the number: 1 / N is never
in a float16.

Floors: 6 N V H operations, 4 of a frozen head or trunk, 2 without gradients. Bytes a chunk of R
rows, bf16: 6 V R of logits (written, read by both products) and 4 V R of the row function, 4 V H of
the head, and 8 V H of the float32 gradient; for a bias nothing, or 4 V R where V is no multiple of
8: torch then writes it into the chunk first. Held at most: the budget, 2 N H of one gradient, 4 V H
of the other, and while backward rounds that to 16 bits 2 V H more, when the budget is free again.
Under autocast a float32 head is copied to 16 bits at every call: 2 V H more in forward. So memory
is saved where 4 V H is less than the 2 N V of whole logits (N > 2 H), or the head is frozen, or its
gradient is float32 anyway. No time has been measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.kernels.kd_autograd import Gradients, first_derivatives_only, link, split_over_devices
from kdcache.kernels.kd_chunks import Job, run
from kdcache.kernels.row_loss import PER_ROW, SCALES, SCHEMA, Engine, RowLoss


def kd_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowLoss,
    *,
    memory: int = 512 * 10**6,
    engine: Engine | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, CE_N, D_N): their scaled sum, a scalar, and each row's parts, float32 [N]; only the
    loss has a gradient, and first derivatives only: to differentiate a gradient is a RuntimeError.

    hidden, weight, bias   [N, H], [V', H], [V'] of one dtype. Under autocast all three are taken in
                  its dtype, and a float32 weight gets its gradient from the float32 sums, unrounded
    rows          what is asked of the logits, see `RowLoss`; `inplace` counts for nothing. T^2 and
                  1 / (count of rows), a tensor on the device, belong into the scales. There is no
                  unreduced form: the head's gradient is a sum over rows
    memory        bytes for the logits of a chunk. What holds no single row is a ValueError, what
                  holds fewer than about 1000 is slow
    engine        what turns the logits of a chunk into its loss; None: the fused kernels, on CUDA
                  or in triton's interpreter. Inside torch.compile, where the whole is one operator,
                  only those

    Rows that do not count are computed, give 0, and their hidden states must be finite. All rows
    ignored, or none given: 0, and zero gradients. Nothing waits for the device. ValueError for what
    does not fit.
    """
    _check(hidden, weight, bias, rows)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = rows.each(lambda scale: scale.detach().to(wide), SCALES)
    unit = _unit(rows)
    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
    graph = torch.is_grad_enabled()
    job = Job(
        rows.each(lambda scale: scale / unit, SCALES),
        engine,
        memory,
        dtype,
        tuple(graph and t is not None and t.requires_grad for t in (hidden, weight, bias)),
    )
    if not torch.compiler.is_compiling():
        loss, ce_N, kd_N = _Linear.apply(hidden, weight, bias, job)  # type: ignore[no-untyped-call]
    elif engine is None:
        loss, ce_N, kd_N, *_ = kd_linear_op(
            hidden, weight, bias, *job.rows.arguments(), memory, dtype, list(job.wants)
        )
        ce_N, kd_N = ce_N.detach(), kd_N.detach()
    else:
        raise ValueError(
            "torch.compile captures no other engine: leave it out, or use torch.compiler.disable"
        )
    return loss * unit, ce_N, kd_N


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, ce_N, kd_N, *gradients = run(hidden, weight, bias, job)
        ctx.save_for_backward(*gradients)
        if any(job.wants):
            link(ctx, hidden, weight, bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(ce_N, kd_N)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return loss, ce_N, kd_N

    @staticmethod
    @first_derivatives_only("kd_linear_loss")
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
        factor = grad_outputs[0]
        if factor is None:
            return None, None, None, None
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # it may be asked again
        out = (
            None if gradient is None else _times(gradient, factor, dtype, keep)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *out, None


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    """gradient * factor in `dtype`, in its own place if it may. With a factor that has a dimension
    the arithmetic is float32: one without is first rounded to the gradient's dtype, and 2^16 of a
    loss scaler is no float16."""
    own = gradient.dtype == dtype and not keep
    out = gradient if own else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.reshape([1] * gradient.dim()), out=out)


def _unit(rows: RowLoss) -> Tensor | float:
    """The larger scale, on the device; 1 where there is none above 0."""
    sizes = [scale.abs() for scale in (rows.ce_scale, rows.kd_scale) if scale is not None]
    if not sizes:
        return 1.0
    unit = torch.stack(sizes).amax()
    return torch.where(unit > 0, unit, 1.0)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: RowLoss) -> None:
    """ValueError for shapes and dtypes that do not go together; the engine checks the rest."""
    if wrong := split_over_devices(hidden=hidden, weight=weight, bias=bias):
        raise ValueError("; ".join(wrong))
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1:] != weight.shape[1:]:
        wrong.append(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; expected [N, H] and "
            "[V, H]"
        )
    elif bias is not None and bias.shape != weight.shape[:1]:
        wrong.append(f"bias is {list(bias.shape)}; expected [{len(weight)}]")
    head = [weight] if bias is None else [weight, bias]
    if any(t.device != hidden.device for t in head):
        wrong.append(f"hidden is on {hidden.device}, the head on {[str(t.device) for t in head]}")
    if any(t.dtype != hidden.dtype for t in head) and not torch.is_autocast_enabled(
        hidden.device.type
    ):
        wrong.append(
            f"hidden is {hidden.dtype}, the head {[str(t.dtype) for t in head]}; expected one "
            "dtype, or autocast"
        )
    wrong += [
        f"{name} is {list(t.shape)} for hidden of {list(hidden.shape)}; expected {len(hidden)} rows"
        for name in PER_ROW
        if (t := getattr(rows, name)) is not None and (t.dim() < 1 or len(t) != len(hidden))
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


@torch.library.custom_op(
    "kdcache_kernels::kd_linear",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, {SCHEMA}, SymInt memory, "
    "ScalarType dtype, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def kd_linear_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    """`run` as one operator that torch.compile does not look into; [0] in place of a gradient that
    is not wanted.
    """
    *asked, memory, dtype, wants = others
    job = Job(RowLoss.of_arguments(asked), None, memory, dtype, tuple(wants))
    *out, dh_NH, dw_VH, db_V = run(hidden, weight, bias, job)
    return *out, *(hidden.new_empty(0) if t is None else t for t in (dh_NH, dw_VH, db_V))


@kd_linear_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    *_, dtype, wants = others
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (hidden.shape, dtype), (weight.shape, wide), (weight.shape[:1], wide)
    return (
        hidden.new_empty((), dtype=wide),
        *(hidden.new_empty(hidden.shape[:1], dtype=wide) for _ in range(2)),
        *(
            hidden.new_empty(shape, dtype=of) if wanted else hidden.new_empty(0)
            for (shape, of), wanted in zip(shapes, wants, strict=True)
        ),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.wants, ctx.inputs = inputs[-1], len(inputs)


@first_derivatives_only("kd_linear_loss")
def _backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
    out = (
        (gradient * grad_outputs[0].reshape([1] * gradient.dim())).to(dtype) if wanted else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
    )
    return *out, *(None for _ in range(ctx.inputs - 3))


kd_linear_op.register_autograd(_backward, setup_context=_setup)
