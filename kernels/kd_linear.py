"""The distillation loss behind an LM head: hidden states in, their gradient and the head's out,
logits never whole.

    loss = sum over rows of ce_scale * CE + kd_scale * D        of logits = hidden @ weight.T + bias

Rows go in chunks whose logits fit a budget, one buffer for all: a product fills it with logits in
the inputs' dtype, a row function (`kd_loss_rows`) turns them into the gradient of the chunk in
place, two products read it:

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
from kdcache.kernels.kd_chunks import Job, RowFunction, memory_bytes, run


def kd_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_classes: int | None = None,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    ids: Tensor | None = None,
    log_probs: Tensor | None = None,
    log_tail: Tensor | None = None,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    beta: float = 0.5,
    teacher_classes: int | None = None,
    ce_scale: Tensor | float | None = 1.0,
    kd_scale: Tensor | float | None = 1.0,
    z_scale: Tensor | float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    memory: int | str = "512 MB",
    skip_ignored: bool = False,
    counted_rows: int | None = None,
    rows: RowFunction | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, CE_N, D_N): their scaled sum, a scalar, and each row's parts, float32 [N]; only the
    loss has a gradient, and first derivatives only: to differentiate a gradient is a RuntimeError.

    hidden, weight, bias   [N, H], [V', H], [V'] of one dtype. Under autocast all three are taken in
                  its dtype, and a float32 weight gets its gradient from the float32 sums, unrounded
    labels to softcap    as of `kd_loss_rows`; T^2 and 1 / (count of rows), a tensor on the device,
                  belong into the scales. There is no unreduced form: the head's gradient is a sum
                  over rows
    memory        bytes, or text as "512 MB", for the logits of a chunk. What holds no single row is
                  a ValueError, what holds fewer than about 1000 is slow
    skip_ignored  rows without label and teacher cost nothing and may hold anything. Their number
                  must be known to the host: on CUDA this waits for the device, once a call
    counted_rows  at most so many rows count, known to the caller: skip_ignored without the wait.
                  Where rows would be lost that way the loss is NaN
    rows          the row function; None: the fused kernels, on CUDA or in triton's interpreter.
                  Inside torch.compile, where the whole is one operator, only those. It is given
                  teacher_classes, z_scale, logit_scale and softcap only where they are asked for

    Without skip_ignored, rows that do not count are computed, give 0, and their hidden states must
    be finite. All rows ignored, or none given: 0, and zero gradients. Nothing waits for the device
    but as said. ValueError for what does not fit.
    """
    given = {
        "labels": labels,
        "label_weight": label_weight,
        "ids": ids,
        "log_probs": log_probs,
        "log_tail": log_tail,
        "row_weight": row_weight,
    }
    _check(hidden, weight, bias, given, counted_rows)
    scales = {
        name: _scale(scale, hidden)
        for name, scale in (("ce_scale", ce_scale), ("kd_scale", kd_scale), ("z_scale", z_scale))
    }
    unit = _unit(list(scales.values()))
    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
    graph = torch.is_grad_enabled()
    scales = {name: None if scale is None else scale / unit for name, scale in scales.items()}
    job = Job(
        rows,
        given,
        scales,
        {
            "num_classes": len(weight) if num_classes is None else num_classes,
            "temperature": float(temperature),
            "divergence": divergence,
            "tail": tail,
            "beta": float(beta),
            "teacher_classes": teacher_classes,
            "logit_scale": float(logit_scale),
            "softcap": None if softcap is None else float(softcap),
        },
        memory_bytes(memory) if isinstance(memory, str) else memory,
        skip_ignored or counted_rows is not None,
        counted_rows,
        dtype,
        tuple(graph and t is not None and t.requires_grad for t in (hidden, weight, bias)),
    )
    if not torch.compiler.is_compiling():
        loss, ce_N, kd_N = _Linear.apply(hidden, weight, bias, job)  # type: ignore[no-untyped-call]
    elif rows is None:
        loss, ce_N, kd_N = _compiled(hidden, weight, bias, job)
    else:
        raise ValueError(
            "torch.compile captures no other row function: leave it out, or use "
            "torch.compiler.disable"
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


def _scale(scale: Tensor | float | None, hidden: Tensor) -> Tensor | None:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if scale is None:
        return None
    return (
        scale.detach().to(wide)
        if isinstance(scale, Tensor)
        else torch.full((), scale, dtype=wide, device=hidden.device)
    )


def _unit(scales: list[Tensor | None]) -> Tensor | float:
    """The larger scale, on the device; 1 where there is none above 0."""
    sizes = [scale.abs() for scale in scales if scale is not None]
    if not sizes:
        return 1.0
    unit = torch.stack(sizes).amax()
    return torch.where(unit > 0, unit, 1.0)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    given: dict[str, Tensor | None],
    counted: int | None,
) -> None:
    """ValueError for shapes and dtypes that do not go together; the row function checks the rest."""
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
            "dtype, or "
            f"autocast"
        )
    wrong += [
        f"{name} is {list(t.shape)} for hidden of {list(hidden.shape)}; expected {len(hidden)} rows"
        for name, t in given.items()
        if t is not None and (t.dim() < 1 or len(t) != len(hidden))
    ]
    if counted is not None and counted < 0:
        wrong.append(f"counted_rows is {counted}; expected 0 or more")
    if wrong:
        raise ValueError("; ".join(wrong))


SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, Tensor? label_weight, Tensor? "
    "ids, "
    "Tensor? log_probs, Tensor? log_tail, Tensor? row_weight, Tensor? ce_scale, Tensor? kd_scale, "
    "Tensor? z_scale, int num_classes, float temperature, str divergence, str tail, float beta, "
    "int? teacher_classes, float logit_scale, float? softcap, SymInt memory, bool skip, SymInt? "
    "counted, "
    "ScalarType dtype, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# the order of the schema
GIVEN = ("labels", "label_weight", "ids", "log_probs", "log_tail", "row_weight")
SCALES = ("ce_scale", "kd_scale", "z_scale")
SETTINGS = (
    "num_classes",
    "temperature",
    "divergence",
    "tail",
    "beta",
    "teacher_classes",
    "logit_scale",
    "softcap",
)


@torch.library.custom_op("kdcache_kernels::kd_linear", mutates_args=(), schema=SCHEMA)
def kd_linear_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    """`run` as one operator that torch.compile does not look into; [0] in place of a gradient that
    is not wanted.
    """
    *out, dh_NH, dw_VH, db_V = run(hidden, weight, bias, _unpack(*others))
    return *out, *(hidden.new_empty(0) if t is None else t for t in (dh_NH, dw_VH, db_V))


@kd_linear_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    job, wide = _unpack(*others), torch.promote_types(others[-2], torch.float32)
    shapes = (hidden.shape, job.dtype), (weight.shape, wide), (weight.shape[:1], wide)
    return (
        hidden.new_empty((), dtype=wide),
        *(hidden.new_empty(hidden.shape[:1], dtype=wide) for _ in range(2)),
        *(
            hidden.new_empty(shape, dtype=dtype) if wants else hidden.new_empty(0)
            for (shape, dtype), wants in zip(shapes, job.wants, strict=True)
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


def _compiled(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
) -> tuple[Tensor, Tensor, Tensor]:
    packed = [
        values[name]
        for values, names in ((job.given, GIVEN), (job.scales, SCALES), (job.settings, SETTINGS))
        for name in names
    ]
    loss, ce_N, kd_N, *_ = kd_linear_op(
        hidden, weight, bias, *packed, job.memory, job.skip, job.counted, job.dtype, list(job.wants)
    )
    return loss, ce_N.detach(), kd_N.detach()


def _unpack(*others: Any) -> Job:
    """The job that `_compiled` packed."""
    named = dict(zip(GIVEN + SCALES + SETTINGS, others, strict=False))
    memory, skip, counted, dtype, wants = others[len(named) :]
    given, scales, settings = (
        {name: named[name] for name in names} for names in (GIVEN, SCALES, SETTINGS)
    )
    return Job(None, given, scales, settings, memory, skip, counted, dtype, tuple(wants))
