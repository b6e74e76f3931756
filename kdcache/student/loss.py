"""The distillation loss: hard labels and soft targets of N rows, in nats, one call.

    L = w_ce * CE(z, y) + w_kd * T^2 * D(q || p)          w_kd = alpha, w_ce = 1 - alpha, unless both are given

CE is at temperature 1, D at the targets' temperature T; T^2 is in the value and in the gradient. CE is averaged over
rows that have a label, D over rows that have a teacher, each by its own count. `definitions.py` has the plain forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from kdcache.engines import check_name
from kdcache.errors import NotBuilt, UsageError, near
from kdcache.student.engine import DIVERGENCES, RowLoss, torch_engine
from kdcache.student.fused import check_fits, fused_engine
from kdcache.student.targets import SoftTargets

TAILS = ("bucket", "renormalise", "conditional")
TAILS_LATER = ("uniform", "sampled")
DIVERGENCES_LATER = ("reverse_kl", "jsd", "tv")
REDUCTIONS = ("mean", "sum", "none")
Count = float | Tensor


@dataclass(frozen=True, slots=True)
class LossParts:
    """`loss` carries the gradient; `ce` (T = 1) and `kd` (D, without T^2) do not: loss = w_ce ce + w_kd T^2 kd.

    Each is a scalar, or [N] for reduction "none". The counts are what the means were divided by.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    ce_count: Tensor
    kd_count: Tensor


@overload
def kd_loss(logits: Tensor, labels: Tensor | None = ..., targets: SoftTargets | None = ..., *, alpha: float = ...,
            ce_weight: float | None = ..., kd_weight: float | None = ..., label_weight: Tensor | None = ...,
            temperature: float | None = ..., divergence: str = ..., tail: str = ..., ignore_index: int = ...,
            reduction: str = ..., normalizer: tuple[Count, Count] | None = ..., engine: str = ..., inplace: bool = ...,
            return_parts: Literal[False] = ...) -> Tensor: ...
@overload
def kd_loss(logits: Tensor, labels: Tensor | None = ..., targets: SoftTargets | None = ..., *, alpha: float = ...,
            ce_weight: float | None = ..., kd_weight: float | None = ..., label_weight: Tensor | None = ...,
            temperature: float | None = ..., divergence: str = ..., tail: str = ..., ignore_index: int = ...,
            reduction: str = ..., normalizer: tuple[Count, Count] | None = ..., engine: str = ..., inplace: bool = ...,
            return_parts: Literal[True]) -> LossParts: ...


def kd_loss(logits: Tensor, labels: Tensor | None = None, targets: SoftTargets | None = None, *, alpha: float = 0.5,
            ce_weight: float | None = None, kd_weight: float | None = None, label_weight: Tensor | None = None,
            temperature: float | None = None, divergence: str = "forward_kl", tail: str = "bucket",
            ignore_index: int = -100, reduction: str = "mean", normalizer: tuple[Count, Count] | None = None,
            engine: str = "auto", inplace: bool = False, return_parts: bool = False) -> Tensor | LossParts:
    """The loss of N rows of student logits; float32, or float64 for float64 logits.

    logits [N, V' >= V], any floating dtype; classes from V (of the targets) on are padding: cut off, zero gradient.
    labels integer [N] or [N, J], never shifted; `ignore_index` and -1 mean no label. label_weight [N, J] weighs the
    labels of a row. A part without rows, or not given, is 0; the weight of the other stays.

    temperature    if given, must be the targets' own
    tail           bucket: all classes not kept are one outcome. renormalise: the teacher is renormalised over the kept.
                   conditional: both are. All the same where nothing is left out.
    reduction      mean | sum | none (per row, [N]). With targets' weights, D is averaged by them.
    normalizer     (CE count, KD count), numbers or tensors, that the sums are divided by instead of this call's own:
                   the counts over all ranks and micro-batches, see `row_counts`
    inplace        when a gradient is wanted, write it over the logits: their values are gone after the call, and the
                   loss can be differentiated once
    return_parts   LossParts instead of the loss

    UsageError (a ValueError) for shapes, labels (checked on the CPU) or options that do not fit; NotBuilt for a
    divergence, tail or engine that the design names and this version lacks.
    """
    check_name(engine)
    _check_names(divergence, tail, reduction, normalizer)
    ce_weight, kd_weight = _weights(alpha, ce_weight, kd_weight)
    num_classes = _check_rows(logits, labels, targets, temperature)
    working = torch.float64 if logits.dtype == torch.float64 else torch.float32
    labels_NJ, label_weight_NJ = _labels(logits, labels, label_weight, ignore_index, num_classes)
    # A part of weight 0 is computed only where it is reported; it is never multiplied into the loss (0 * inf).
    labels_NJ = labels_NJ if ce_weight or return_parts else None
    targets = targets.to(logits.device) if targets is not None and (kd_weight or return_parts) else None
    counts = row_counts(labels_NJ, targets) if normalizer is None else normalizer
    count_2 = torch.stack([torch.as_tensor(count, dtype=working, device=logits.device) for count in counts])
    square = 1.0 if targets is None else targets.temperature**2
    scale_2 = torch.tensor([ce_weight, kd_weight * square], dtype=working).to(logits.device)
    if reduction == "mean":
        scale_2 = _over(scale_2, count_2)
    run = torch_engine
    if engine == "triton":
        check_fits(logits, targets)
        run = fused_engine
    # The larger scale is a factor of the whole: a gradient kept in float16 stays of order 1 until backward multiplies,
    # where 1 / N would sink it below the smallest float16. The kernels have a wider dtype's scales in the gradient
    # already, and skip a backward of factor 1.
    factor = scale_2.max() if run is torch_engine or logits.dtype == torch.float16 else torch.ones_like(scale_2[0])
    ce_scale, kd_scale = _over(scale_2, factor).unbind()
    rows = RowLoss(num_classes, labels_NJ, label_weight_NJ, targets, divergence, tail, ce_scale if ce_weight else None,
                   kd_scale if kd_weight else None, inplace)
    loss, ce, kd = run(logits, rows)
    loss = factor * (loss if reduction == "none" else loss.sum())
    if not return_parts:
        return loss
    if reduction != "none":
        ce, kd = ce.sum(), kd.sum()
    if reduction == "mean":
        ce, kd = _over(torch.stack([ce, kd]), count_2).unbind()
    return LossParts(loss, ce, kd, *count_2.unbind())


def row_counts(labels: Tensor | None, targets: SoftTargets | None, *, ignore_index: int = -100) -> tuple[Count, Count]:
    """What a mean of `kd_loss` divides by: rows with a label ([N] or [N, J]); rows with a teacher, or their weights.

    Sum them over micro-batches and ranks for `normalizer`. Tensors on the inputs' device, or plain numbers.
    """
    ce_count: Count = 0.0
    if labels is not None:
        known = (labels >= 0) & (labels != ignore_index)
        ce_count = _columns(known).any(1).sum()
    if targets is None:
        return ce_count, 0.0
    return ce_count, float(len(targets)) if targets.weight_N is None else targets.weight_N.sum()


def check_loss_names(divergence: str, tail: str) -> None:
    """UsageError or NotBuilt for a name that `kd_loss` refuses, before anything is trained or written."""
    _check_names(divergence, tail, "mean", None)


def _check_names(divergence: str, tail: str, reduction: str, normalizer: tuple[Count, Count] | None) -> None:
    for what, value, known, later in (("divergence", divergence, tuple(DIVERGENCES), DIVERGENCES_LATER),
                                      ("tail", tail, TAILS, TAILS_LATER), ("reduction", reduction, REDUCTIONS, ())):
        if value in later:
            raise NotBuilt(f"{what} {value!r} is not built yet; this version has {', '.join(known)}")
        if value not in known:
            raise UsageError(f"{what} {value!r} is unknown{near(value, known)}")
    if normalizer is not None and reduction != "mean":
        raise UsageError(f"normalizer is given, but reduction {reduction!r} divides by nothing; use reduction 'mean'")
    if normalizer is not None and any(not isinstance(n, Tensor) and not 0 <= n < math.inf for n in normalizer):
        raise UsageError(f"normalizer is {normalizer}; expected two counts of at least 0")


def _weights(alpha: float, ce_weight: float | None, kd_weight: float | None) -> tuple[float, float]:
    if (ce_weight is None) != (kd_weight is None):
        raise UsageError(f"ce_weight is {ce_weight} and kd_weight is {kd_weight}; give both, or neither and alpha")
    if ce_weight is None or kd_weight is None:
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha is {alpha}; expected 0 to 1 (ce_weight and kd_weight take other weights)")
        return 1 - alpha, alpha
    if not (0 <= ce_weight < math.inf and 0 <= kd_weight < math.inf):
        raise UsageError(f"ce_weight is {ce_weight} and kd_weight is {kd_weight}; expected numbers of at least 0")
    return ce_weight, kd_weight


def _check_rows(logits: Tensor, labels: Tensor | None, targets: SoftTargets | None, temperature: float | None) -> int:
    """V; UsageError where logits, labels and targets are not about the same N rows."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise UsageError(f"logits are {list(logits.shape)} of {logits.dtype}; expected floating [N, V]: "
                         f"select the rows of a sequence first (the loss never shifts labels)")
    if labels is None and targets is None:
        raise UsageError("neither labels nor targets are given; kd_loss needs at least one")
    if labels is not None and len(labels) != len(logits):
        raise UsageError(f"{len(logits)} rows of logits but {len(labels)} of labels")
    if targets is None:
        if temperature is not None:
            raise UsageError("temperature is given without targets; cross-entropy is at temperature 1")
        return logits.shape[1]
    if len(targets) != len(logits):
        raise UsageError(f"{len(logits)} rows of student logits but {len(targets)} of soft targets")
    if temperature is not None and float(temperature) != targets.temperature:
        raise UsageError(f"temperature is {temperature}, but the targets are at {targets.temperature}; leave it out, "
                         f"or take targets at temperature {temperature}")
    if logits.shape[1] < targets.num_classes:
        raise UsageError(f"the student has {logits.shape[1]} classes, the teacher {targets.num_classes}")
    return targets.num_classes


def _labels(logits: Tensor, labels: Tensor | None, weight: Tensor | None, ignore_index: int,
            num_classes: int) -> tuple[Tensor | None, Tensor | None]:
    """Labels as int64 [N, J], -1 where there is none, and their weights [N, J] or None."""
    if labels is None:
        if weight is not None:
            raise UsageError("label_weight is given without labels")
        return None, None
    if labels.dim() not in (1, 2) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UsageError(f"labels are {list(labels.shape)} of {labels.dtype}; expected integers [N] or [N, J]")
    labels_NJ = _columns(labels).to(logits.device, torch.int64)
    labels_NJ = torch.where(labels_NJ == ignore_index, -1, labels_NJ)
    if labels_NJ.device.type == "cpu" and labels_NJ.numel():        # elsewhere a check would wait for the device
        low, high = int(labels_NJ.min()), int(labels_NJ.max())
        if low < -1 or high >= num_classes:
            row = int(((labels_NJ < -1) | (labels_NJ >= num_classes)).any(1).nonzero()[0])
            raise UsageError(f"labels of row {row} are {labels_NJ[row].tolist()}; expected 0 to {num_classes - 1}, "
                             f"or {ignore_index} or -1 for no label")
    if weight is None:
        return labels_NJ, None
    weight_NJ = _columns(weight).to(logits.device)
    if weight_NJ.shape != labels_NJ.shape:
        raise UsageError(f"label_weight is {list(weight.shape)}, labels are {list(labels.shape)}; expected one shape")
    return labels_NJ, weight_NJ


def _columns(x: Tensor) -> Tensor:
    """[N] as [N, 1]."""
    return x[:, None] if x.dim() == 1 else x


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: nothing was counted."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)
