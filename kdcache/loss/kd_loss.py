"""The distillation loss: hard labels and soft targets of N rows, in nats, one call.

    L = w_ce * CE(z, y) + w_kd * T^2 * D(q || p)          w_kd = alpha, w_ce = 1 - alpha, unless
        both are given

CE is at temperature 1, D at the targets' temperature T; T^2 is in the value and in the gradient. CE
is averaged over rows that have a label, D over rows that have a teacher, each by its own count.
`definitions.py` has the plain forms.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, overload

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.loss.arguments import check_tensor, check_type
from kdcache.loss.compiled import compiled_engine
from kdcache.loss.engines import meant
from kdcache.loss.fused import check_fits, fused_engine
from kdcache.loss.request import Count, LossParts, Options, ask, check_ruled_out, over
from kdcache.loss.targets import SoftTargets
from kdcache.loss.torch_engine import Engine, RowLoss, torch_engine


@overload
def kd_loss(
    logits: Tensor,
    labels: Tensor | None = ...,
    targets: SoftTargets | None = ...,
    *,
    alpha: float = ...,
    ce_weight: float | None = ...,
    kd_weight: float | None = ...,
    label_weight: Tensor | None = ...,
    temperature: float | None = ...,
    divergence: str = ...,
    beta: float | None = ...,
    tail: str = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    normalizer: tuple[Count, Count] | None = ...,
    engine: str = ...,
    classes: int | None = ...,
    inplace: bool = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...
@overload
def kd_loss(
    logits: Tensor,
    labels: Tensor | None = ...,
    targets: SoftTargets | None = ...,
    *,
    alpha: float = ...,
    ce_weight: float | None = ...,
    kd_weight: float | None = ...,
    label_weight: Tensor | None = ...,
    temperature: float | None = ...,
    divergence: str = ...,
    beta: float | None = ...,
    tail: str = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    normalizer: tuple[Count, Count] | None = ...,
    engine: str = ...,
    classes: int | None = ...,
    inplace: bool = ...,
    return_parts: Literal[True],
) -> LossParts: ...


def kd_loss(
    logits: Tensor,
    labels: Tensor | None = None,
    targets: SoftTargets | None = None,
    *,
    alpha: float = 0.5,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    label_weight: Tensor | None = None,
    temperature: float | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    tail: str = "bucket",
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: tuple[Count, Count] | None = None,
    engine: str = "auto",
    classes: int | None = None,
    inplace: bool = False,
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The loss of N rows of student logits; float32, or float64 for float64 logits.

    logits [N, V'], any floating dtype. Both softmaxes are over all V' classes. Where the targets
    have fewer, V, the teacher gives the others probability 0: they are part of the tail, and have a
    gradient (`classes` cuts them). labels integer [N] or [N, J], J up to 16, classes of the student
    (0 to V' - 1), never shifted; `ignore_index` and -1 mean no label. label_weight, floating and at
    least 0, of their shape, weighs the labels of a row; without it they weigh alike, 1 in all:
    several labels are a mean, not a sum. A part without rows, or not given, is 0; the weight of the
    other stays.

    temperature    if given, must be the targets' own
    divergence     D(q || p): forward_kl, reverse_kl, tv (1/2 sum |p - q|), or jsd: beta KL(q || m)
                   + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, beta 0.5 if not given (arXiv
                   2306.13649)
    tail           bucket: all classes not kept are one outcome. renormalise: the teacher is
                   renormalised over the kept. conditional: both are. uniform: the teacher's tail is
                   even. All the same where nothing is left out. sampled: of targets that are draws,
                   whose weights stay as they are (arXiv 2503.16870)
    classes        cuts the logits to the first so many, at least V: the rest are no classes, and
                   have a zero gradient
    reduction      mean | sum | none (per row, [N]). With targets' weights, D is averaged by them.
    normalizer     (CE count, KD count), numbers or tensors, that the sums are divided by instead of
                   this call's own:
                   the counts over all ranks and micro-batches, see `row_counts`.
                   DistributedDataParallel averages gradients over the ranks: multiply the loss by
                   the world size then
    inplace        when a gradient is wanted, write it over the logits: their values are gone after
                   the call, and the loss can be differentiated once. Under activation checkpointing
                   it is for logits that the checkpointed function computes itself; compiled graphs
                   leave it out
    return_parts   LossParts instead of the loss

    Nothing waits for the device where all tensors are on the logits' own; what is elsewhere is
    copied there, and that waits. Values are checked on the CPU alone, and not in compiled graphs:
    labels, weights, ids of draws, and for reverse_kl that a teacher gives its tail, and each class
    it keeps, something where the student does (else it is infinite). First derivatives only, by
    autograd: no create_graph, no torch.func.grad. UsageError (a ValueError) for what does not fit.
    """
    check_tensor("logits", logits, "floating [N, V]")
    for name, value in (("inplace", inplace), ("return_parts", return_parts)):
        check_type(name, value, bool, "True or False")
    if logits.dim() != 2 or not logits.is_floating_point():
        raise UsageError(
            f"logits are {list(logits.shape)} of {logits.dtype}; expected floating [N, V]: "
            f"select the rows of a sequence first (the loss never shifts labels)"
        )
    options = Options(
        alpha=alpha,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_weight=label_weight,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        tail=tail,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        engine=engine,
        classes=classes,
    )
    asked = ask(logits, logits.shape[1], labels, targets, options, report=return_parts)
    check_ruled_out(asked.rows, logits)
    run = _engine(meant(engine), logits, asked.rows)
    rows, factor = dataclasses.replace(asked.rows, inplace=inplace), None
    # The kernels have a wider dtype's scales in the gradient, and skip a backward of factor 1.
    if run is not fused_engine or logits.dtype == torch.float16:
        rows, factor = _of_order_1(rows, asked.scales)
    loss_N, ce_N, kd_N = run(logits, rows)
    loss = loss_N if reduction == "none" else loss_N.sum()
    loss = loss if factor is None else factor * loss
    return asked.parts(loss, ce_N, kd_N) if return_parts else loss


def _of_order_1(rows: RowLoss, scales: tuple[Tensor, Tensor]) -> tuple[RowLoss, Tensor]:
    """The larger scale as a factor of the whole: a gradient kept in float16 stays of order 1 until
    backward multiplies, where 1 / N would sink it below the smallest float16."""
    scale_2 = torch.stack(scales)
    factor = scale_2.max()
    ce_scale, kd_scale = over(scale_2, factor).unbind()
    return dataclasses.replace(
        rows,
        ce_scale=None if rows.ce_scale is None else ce_scale,
        kd_scale=None if rows.kd_scale is None else kd_scale,
    ), factor


def _engine(name: str, logits: Tensor, rows: RowLoss) -> Engine:
    if name == "triton":
        check_fits(logits, rows.num_classes, rows.targets)
        return fused_engine
    return compiled_engine if torch.compiler.is_compiling() else torch_engine
