"""The distillation loss: hard labels and soft targets of N rows, in nats, one call.

    L = w_ce * CE(z, y) + w_kd * T^2 * D(q || p)          w_kd = alpha, w_ce = 1 - alpha, unless
        both are given

CE is at temperature 1, D at the targets' temperature T; T^2 is in the value and in the gradient. CE
is averaged over rows that have a label, D over rows that have a teacher, each by its own count.
`definitions.py` has the plain forms.

A call checks its arguments, makes one `RowLoss` of them (`build_row_loss`), and gives that to an
engine, which computes value and gradient of each row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError, did_you_mean
from kdcache.kernels.row_loss import RowLoss
from kdcache.loss.divergences import (
    Divergence,
    check_reverse_kl,
    check_ruled_out,
    check_tails,
)
from kdcache.loss.engines import check_fits, check_name, fused_engine, resolve_engine
from kdcache.loss.targets import SoftTargets, readable
from kdcache.loss.tensor_arguments import check_tensor, plain_temperature
from kdcache.loss.torch_engine import torch_engine, wide
from kdcache.user.arguments import check_integer, check_number, check_type

REDUCTIONS = ("mean", "sum", "none")
MOST_LABELS = 16  # of a row, as of a cache's (docs/format.md 3.1)
Count = float | Tensor


@dataclass(frozen=True, slots=True)
class LossParts:
    """`loss` carries the gradient; `ce` (T = 1) and `kd` (D, without T^2) do not: loss = w_ce ce +
    w_kd T^2 kd.

    Each is a scalar, or [N] for reduction "none". The counts are what the means were divided by.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    ce_count: Tensor
    kd_count: Tensor


class LossOptions(TypedDict, total=False):
    """The options that all calls of the loss take alike; `kd_loss` says what each means.

    `build_row_loss` has their defaults.
    """

    alpha: float
    ce_weight: float | None
    kd_weight: float | None
    label_weight: Tensor | None
    temperature: float | None
    divergence: str | Divergence
    beta: float | None
    tail: str | None
    ignore_index: int
    reduction: str
    normalizer: tuple[Count, Count] | None
    engine: str
    classes: int | None


def check_names(call: str, options: Mapping[str, Any]) -> None:
    """TypeError, as Python raises it, for an option that there is not."""
    for name in options:
        if name not in LossOptions.__annotations__:
            raise TypeError(
                f"{call}() got an unexpected keyword argument {name!r}"
                f"{did_you_mean(name, LossOptions.__annotations__)}"
            )


def kd_loss(
    logits: Tensor,
    labels: Tensor | None = None,
    targets: SoftTargets | None = None,
    *,
    inplace: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The loss of N rows of student logits; float32, or float64 for float64 logits.

    logits [N, V'], any floating dtype. Both softmaxes are over all V' classes. Where the targets
    have fewer, V, the teacher gives the others probability 0: they are part of the tail, and have a
    gradient (`classes` cuts them). labels integer [N] or [N, J], J up to 16, classes of the student
    (0 to V' - 1), never shifted; `ignore_index` and -1 mean no label. label_weight, floating and at
    least 0, of their shape, weighs the labels of a row; without it they weigh alike, 1 in all:
    several labels are a mean, not a sum. A part without rows, or not given, is 0; the weight of the
    other stays.

    alpha          weight of D, 0.5 by default; that of CE is 1 - alpha. Or ce_weight and kd_weight,
                   both of at least 0
    temperature    if given, must be the targets' own
    divergence     D(q || p): forward_kl (default), reverse_kl, tv (1/2 sum |p - q|), or jsd: beta
                   KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, beta 0.5 if not
                   given (arXiv 2306.13649). Or a `Divergence`, which has its beta and tail in it
    tail           bucket (default): all classes not kept are one outcome. renormalise: the teacher
                   is renormalised over the kept. conditional: both are. uniform: the teacher's tail
                   is even. All the same where nothing is left out. sampled: of targets that are
                   draws, whose weights stay as they are (arXiv 2503.16870)
    classes        cuts the logits to the first so many, at least V: the rest are no classes, and
                   have a zero gradient
    engine         auto (default), torch or triton
    reduction      mean (default) | sum | none (per row, [N]). With targets' weights, D is averaged
                   by them
    normalizer     (CE count, KD count), numbers or tensors, that the sums are divided by instead of
                   this call's own: the counts over all ranks and micro-batches, see `row_counts`.
                   DistributedDataParallel averages gradients over the ranks: multiply the loss by
                   the world size then
    inplace        when a gradient is wanted, write it over the logits: their values are gone after
                   the call, and the loss can be differentiated once. Under activation checkpointing
                   it is for logits that the checkpointed function computes itself; compiled graphs
                   leave it out

    Nothing waits for the device where all tensors are on the logits' own; what is elsewhere is
    copied there, and that waits. Values are checked on the CPU alone, and not in compiled graphs:
    labels, weights, ids of draws, and for reverse_kl that a teacher gives its tail, and each class
    it keeps, something where the student does (else it is infinite). First derivatives only, by
    autograd: no create_graph, no torch.func.grad. UsageError (a ValueError) for what does not fit.
    """
    return _run(logits, labels, targets, inplace, options, report=False)[1]


def kd_loss_parts(
    logits: Tensor,
    labels: Tensor | None = None,
    targets: SoftTargets | None = None,
    *,
    inplace: bool = False,
    **options: Unpack[LossOptions],
) -> LossParts:
    """`kd_loss` with its parts: the loss, which carries the gradient, and CE and D, which do not.

    Arguments and errors are those of `kd_loss`. A part of weight 0 is computed too.
    """
    request, *values = _run(logits, labels, targets, inplace, options, report=True)
    return request.parts(*values)


def _run(
    logits: Tensor,
    labels: Tensor | None,
    targets: SoftTargets | None,
    inplace: bool,
    options: LossOptions,
    *,
    report: bool,
) -> tuple[LossRequest, Tensor, Tensor, Tensor]:
    """What was asked, and (loss, CE_N, D_N) of it."""
    check_names("kd_loss", options)
    check_tensor("logits", logits, "floating [N, V]")
    check_type("inplace", inplace, bool, "True or False")
    if logits.dim() != 2 or not logits.is_floating_point():
        raise UsageError(
            f"logits are {list(logits.shape)} of {logits.dtype}; expected floating [N, V]: select "
            "the rows of a sequence first (the loss never shifts labels)"
        )
    request = build_row_loss(logits, logits.shape[1], labels, targets, report=report, **options)
    check_ruled_out(request.rows, logits)
    if request.engine == "triton":
        check_fits(logits, request.rows)
    run = fused_engine if request.engine == "triton" else torch_engine
    rows, factor = dataclasses.replace(request.rows, inplace=inplace), None
    # The kernels have a wider dtype's scales in the gradient, and skip a backward of factor 1.
    if run is not fused_engine or logits.dtype == torch.float16:
        rows, factor = _of_order_1(rows, request.scales)
    loss_N, ce_N, kd_N = run(logits, rows)
    loss = loss_N if request.reduction == "none" else loss_N.sum()
    return request, loss if factor is None else factor * loss, ce_N, kd_N


def _of_order_1(rows: RowLoss, scales: tuple[Tensor, Tensor]) -> tuple[RowLoss, Tensor]:
    """The larger scale as a factor of the whole: a gradient kept in float16 stays of order 1 until
    backward multiplies, where 1 / N would sink it below the smallest float16."""
    scale_2 = torch.stack(scales)
    factor = scale_2.max()
    ce_scale, kd_scale = safe_divide(scale_2, factor).unbind()
    return dataclasses.replace(
        rows,
        ce_scale=None if rows.ce_scale is None else ce_scale,
        kd_scale=None if rows.kd_scale is None else kd_scale,
    ), factor


@dataclass(frozen=True, slots=True)
class LossRequest:
    """Arguments of a call that fit together, as one `RowLoss` and what is done with its results.

    rows: what an engine is asked. Its scales are those of the whole loss: weight, T^2 and, for a
    mean, 1 / count. scales: of CE and D, also of a part that is not in the loss. counts: what a
    mean divides by, where it is needed. engine: the one that runs, never "auto".
    """

    rows: RowLoss
    scales: tuple[Tensor, Tensor]
    counts: tuple[Count, Count]
    reduction: str
    engine: str

    def parts(self, loss: Tensor, ce_N: Tensor, kd_N: Tensor) -> LossParts:
        """The parts as they are reported."""
        ce_count, kd_count = (_number(count, ce_N.dtype, ce_N) for count in self.counts)
        ce, kd = (ce_N, kd_N) if self.reduction == "none" else (ce_N.sum(), kd_N.sum())
        if self.reduction == "mean":
            ce, kd = safe_divide(ce, ce_count), safe_divide(kd, kd_count)
        return LossParts(loss, ce, kd, ce_count, kd_count)


def build_row_loss(
    like: Tensor,
    width: int,
    labels: Tensor | None,
    targets: SoftTargets | None,
    *,
    report: bool,
    alpha: float = 0.5,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    label_weight: Tensor | None = None,
    temperature: float | None = None,
    divergence: str | Divergence = "forward_kl",
    beta: float | None = None,
    tail: str | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: tuple[Count, Count] | None = None,
    engine: str = "auto",
    classes: int | None = None,
) -> LossRequest:
    """The arguments of a call, checked, for a student's rows `like` [N, ...] of `width` classes.

    report: both parts are wanted, also one of weight 0; without it such a part is not computed.
    UsageError for what does not fit.
    """
    # First what is weighed, and how.
    _check_given(labels, targets)
    check_tensor("label_weight", label_weight, "floating, of the shape of labels", optional=True)
    check_number("alpha", alpha)
    for name, number in (
        ("ce_weight", ce_weight),
        ("kd_weight", kd_weight),
        ("temperature", temperature),
    ):
        check_number(name, number, optional=True)
    check_integer("ignore_index", ignore_index)
    check_integer("classes", classes, optional=True)
    for name, value in (("reduction", reduction), ("engine", engine)):
        check_type(name, value, str, "a name")
    check_name(engine)
    if not isinstance(divergence, Divergence):
        divergence = Divergence(divergence, beta, "bucket" if tail is None else tail)
    elif beta is not None or tail is not None:
        raise UsageError(
            f"beta is {beta} and tail {tail!r} beside {divergence}, which has its own; give them "
            "to Divergence"
        )
    _check_reduction(reduction, normalizer)
    ce_weight, kd_weight = _weights(alpha, ce_weight, kd_weight)
    num_classes = _num_classes(width, classes, targets)
    _check_rows(len(like), num_classes, labels, label_weight, targets, temperature)
    labels_NJ, label_weight_NJ = _labels(
        labels, label_weight, ignore_index, num_classes, like.device
    )
    # A part of weight 0 is never multiplied into the loss (0 * inf).
    if not (ce_weight or report):
        labels_NJ = label_weight_NJ = None
    targets = (
        _teacher(targets, num_classes, divergence, like.device) if kd_weight or report else None
    )
    # Then what the means divide by.
    working, mean = wide(like.dtype), reduction == "mean"
    counts = (1.0, 1.0) if normalizer is None else normalizer
    if normalizer is None and (mean or report):
        counts = _own_counts(labels_NJ, targets)
    ce_count, kd_count = (_number(n, working, like) if isinstance(n, Tensor) else n for n in counts)
    # Then the loss of a row.
    kd_weight_T2 = kd_weight * (1.0 if targets is None else targets.temperature**2)
    ce_scale = _scale(ce_weight, ce_count if mean else 1.0, working, like)
    kd_scale = _scale(kd_weight_T2, kd_count if mean else 1.0, working, like)
    teacher = {} if targets is None else _of_teacher(targets)
    rows = RowLoss(
        num_classes,
        labels_NJ,
        label_weight_NJ,
        divergence=divergence,
        ce_scale=ce_scale if ce_weight else None,
        kd_scale=kd_scale if kd_weight else None,
        **teacher,
    )
    return LossRequest(
        rows, (ce_scale, kd_scale), (ce_count, kd_count), reduction, resolve_engine(engine)
    )


def _of_teacher(targets: SoftTargets) -> dict[str, Any]:
    """The fields of a `RowLoss` that say what the teacher said."""
    return {
        "ids_NK": targets.ids_NK,
        "log_probs_NK": targets.log_probs_NK,
        "log_tail_N": targets.log_tail_N,
        "row_weight_N": targets.weight_N,
        "teacher_classes": targets.num_classes,
        "temperature": float(targets.temperature),
    }


def row_counts(
    labels: Tensor | None, targets: SoftTargets | None, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """What a mean of the loss divides by: rows with a label ([N] or [N, J]); rows with a teacher,
    or their weights.

    Two tensors of no dimension on the device of the targets, without targets of the labels; of
    float64, which adds counts exactly; 0 of what is None. Sum them over micro-batches, and by
    `dist.all_reduce` over ranks, for `normalizer`. DistributedDataParallel averages gradients over
    the ranks: multiply the loss by the world size then.
    """
    _check_given(labels, targets)
    check_integer("ignore_index", ignore_index)
    ce_count: Count = 0.0
    kd_count: Count = 0.0 if targets is None else float(len(targets))
    if labels is not None:
        ce_count = _columns((labels >= 0) & (labels != ignore_index)).any(1).sum()
    if targets is not None and targets.weight_N is not None:
        kd_count = targets.weight_N.sum(dtype=torch.float64)
    like = labels if targets is None else targets.log_probs_NK
    assert like is not None  # _check_given
    return _number(ce_count, torch.float64, like), _number(kd_count, torch.float64, like)


def _check_given(labels: Tensor | None, targets: SoftTargets | None) -> None:
    check_tensor("labels", labels, "integers [N] or [N, J]", optional=True)
    if isinstance(targets, Tensor):
        raise UsageError(
            f"targets is a tensor {list(targets.shape)}; expected SoftTargets: of a teacher's "
            "logits by targets_from_logits(logits, temperature=...)"
        )
    check_type(
        "targets",
        targets,
        (SoftTargets, NoneType),
        "SoftTargets, of soft_targets or targets_from_logits",
    )
    if labels is None and targets is None:
        raise UsageError("neither labels nor targets are given; the loss needs at least one")


def _check_reduction(reduction: str, normalizer: tuple[Count, Count] | None) -> None:
    if reduction not in REDUCTIONS:
        raise UsageError(f"reduction {reduction!r} is unknown{did_you_mean(reduction, REDUCTIONS)}")
    if normalizer is not None and reduction != "mean":
        raise UsageError(
            f"normalizer is given, but reduction {reduction!r} divides by nothing; use reduction "
            "'mean'"
        )
    if normalizer is not None and not (
        isinstance(normalizer, tuple | list)
        and len(normalizer) == 2
        and all(map(_is_count, normalizer))
    ):
        raise UsageError(
            f"normalizer is {normalizer}; expected two counts of at least 0, numbers or scalar "
            "tensors"
        )


def _is_count(n: Any) -> bool:
    """Whether it is a number of at least 0; a tensor's value may be on a device, and is not request
    for.
    """
    if isinstance(n, Tensor):
        return n.dim() == 0
    return (isinstance(n, int | float) or hasattr(n, "__float__")) and 0 <= n < math.inf


def _weights(alpha: float, ce_weight: float | None, kd_weight: float | None) -> tuple[float, float]:
    if (ce_weight is None) != (kd_weight is None):
        raise UsageError(
            f"ce_weight is {ce_weight} and kd_weight is {kd_weight}; give both, or neither and "
            "alpha"
        )
    if ce_weight is None or kd_weight is None:
        if not 0 <= alpha <= 1:
            raise UsageError(
                f"alpha is {alpha}; expected 0 to 1 (ce_weight and kd_weight take other weights)"
            )
        return 1 - alpha, alpha
    if not (0 <= ce_weight < math.inf and 0 <= kd_weight < math.inf):
        raise UsageError(
            f"ce_weight is {ce_weight} and kd_weight is {kd_weight}; expected numbers of at least 0"
        )
    return ce_weight, kd_weight


def _num_classes(width: int, classes: int | None, targets: SoftTargets | None) -> int:
    """V' of a student with `width` logits, cut to `classes`; UsageError where it or the targets' V
    cannot be.
    """
    taught = 1 if targets is None else targets.num_classes
    if width < taught:
        raise UsageError(
            f"the student has {width} classes, the teacher {taught}; where the teacher's last ones "
            f"are padding that nothing uses, cut its logits to the student's {width} first "
            f"(dump-teacher --classes {width})"
        )
    if classes is not None and not taught <= classes <= width:
        raise UsageError(
            f"classes is {classes}; expected at least the {taught} of the teacher, and at most the "
            f"{width} logits of the student"
            if targets is not None
            else f"classes is {classes}; expected 1 to the {width} logits of the student"
        )
    num_classes = width if classes is None else classes
    check_num_classes(num_classes, "the student")
    if targets is not None:
        check_num_classes(taught, "the teacher of the targets")
    return num_classes


def check_num_classes(num_classes: int, whose: str) -> None:
    """UsageError for a single class, whose softmax is 1 whatever the logit is."""
    if num_classes == 1:
        raise UsageError(
            f"{whose} has one logit, and a softmax over one class is 1 whatever the logit is: loss "
            "and gradient would be 0. It is a sigmoid or a regression head, which this loss is not "
            "for; a sigmoid of z is the softmax of the two logits (0, z)"
        )


def _check_rows(
    count: int,
    width: int,
    labels: Tensor | None,
    label_weight: Tensor | None,
    targets: SoftTargets | None,
    temperature: float | None,
) -> None:
    """UsageError where the student's rows of `width` classes, labels and targets are not about the
    same rows.
    """
    if labels is not None and (
        labels.dim() not in (1, 2)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        raise UsageError(
            f"labels are {list(labels.shape)} of {labels.dtype}; expected integers [N] or [N, J]"
        )
    if labels is not None and len(labels) != count:
        raise UsageError(f"{count} rows of the student but {len(labels)} of labels")
    if labels is not None and labels.dim() == 2:
        _check_columns(
            labels,
            {width, width if targets is None else targets.num_classes},
            label_weight,
        )
    if targets is None:
        if temperature is not None:
            raise UsageError(
                "temperature is given without targets; cross-entropy is at temperature 1"
            )
        return
    if len(targets) != count:
        raise UsageError(f"{count} rows of the student but {len(targets)} of soft targets")
    if temperature is not None and targets.temperature not in (
        temperature,
        plain_temperature(temperature),
    ):
        raise UsageError(
            f"temperature is {temperature}, but the targets are at {targets.temperature}; leave it "
            f"out, or take targets at temperature {temperature}"
        )


def _check_columns(labels_NJ: Tensor, classes: set[int], weight: Tensor | None) -> None:
    """UsageError for one number per class where labels were expected; decided by the shape, no
    value is looked at.
    """
    count = labels_NJ.shape[1]
    if 1 < count and count in classes and weight is None:
        raise UsageError(
            f"labels are {list(labels_NJ.shape)}, one for each of {count} classes, which looks "
            "one-hot; expected the class of each row: labels.argmax(1). Where they are classes, "
            "give label_weight"
        )
    if count > MOST_LABELS:
        raise UsageError(
            f"labels are {list(labels_NJ.shape)}; expected at most {MOST_LABELS} labels a row: of "
            "one-hot rows give the class, labels.argmax(1)"
        )


def _teacher(
    targets: SoftTargets | None, num_classes: int, divergence: Divergence, device: torch.device
) -> SoftTargets | None:
    """The targets on a device; UsageError where they are not what divergence and tail are for."""
    if targets is None:
        return None
    if targets.drawn and divergence.tail != "sampled":
        raise UsageError(
            "the targets are draws with weights (ids without log_tail_N); expected tail 'sampled', "
            f"found {divergence.tail!r}"
        )
    if divergence.tail == "sampled" and not targets.drawn:
        kept = "all classes" if targets.ids_NK is None else "the largest classes and a tail"
        raise UsageError(
            f"tail 'sampled' is for targets that are draws, these are {kept}; use tail 'bucket'"
        )
    if targets.weight_N is not None:
        _check_weights("the weight of soft targets", targets.weight_N)
    if (divergence.name, divergence.tail) == ("reverse_kl", "bucket"):
        if targets.log_probs_NK.shape[1] == targets.num_classes:
            check_reverse_kl(num_classes, targets.num_classes, divergence)
        check_tails(targets)
    return targets.to(device)


def _own_counts(labels_NJ: Tensor | None, targets: SoftTargets | None) -> tuple[Count, Count]:
    """`row_counts` of one call: a number where nothing has to be counted."""
    ce_count: Count = 0.0
    if labels_NJ is not None:
        known_NJ = labels_NJ >= 0
        ce_count = (known_NJ[:, 0] if known_NJ.shape[1] == 1 else known_NJ.any(1)).sum()
    if targets is None:
        return ce_count, 0.0
    return ce_count, float(len(targets)) if targets.weight_N is None else targets.weight_N.sum()


def _number(n: Count, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A number on a device. One of the host is written there, not copied: a copy would wait."""
    return (
        n.to(like.device, dtype)
        if isinstance(n, Tensor)
        else torch.full((), n, dtype=dtype, device=like.device)
    )


def _scale(weight: float, count: Count, dtype: torch.dtype, like: Tensor) -> Tensor:
    """`safe_divide` of two numbers, on a device; divided on the host if both are there, to the bits of a
    division in `dtype`.

    That is one operation of the device in place of five. A quotient of two float32 rounded from
    float64 is that of float32: 53 bits are more than 2 * 24 + 1 (Figueroa 1995).
    """
    # what a graph captures has no numbers of rows
    if isinstance(count, Tensor) or torch.compiler.is_compiling():
        return safe_divide(_number(weight, dtype, like), _number(count, dtype, like))
    a, b = (float(np.float32(n)) if dtype == torch.float32 else float(n) for n in (weight, count))
    return _number(a / b if b > 0 else 0.0, dtype, like)


def _labels(
    labels: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    num_classes: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Labels as int64 [N, J], negative where there is none, and their weights [N, J] or None."""
    if labels is None:
        if weight is not None:
            raise UsageError("label_weight is given without labels")
        return None, None
    labels_NJ = _columns(labels).to(device, torch.int64)
    if ignore_index >= 0:  # to every engine a negative label is none
        labels_NJ = labels_NJ.masked_fill(labels_NJ == ignore_index, -1)
    if readable(labels_NJ):
        none_NJ = (labels_NJ == -1) | (labels_NJ == ignore_index)
        wrong_N = (~none_NJ & ((labels_NJ < 0) | (labels_NJ >= num_classes))).any(1)
        if bool(wrong_N.any()):
            row = int(wrong_N.nonzero()[0])
            raise UsageError(
                f"labels of row {row} are {labels_NJ[row].tolist()}; expected 0 to "
                f"{num_classes - 1}, or {ignore_index} or -1 for no label"
            )
    if weight is None:
        return labels_NJ, None
    weight_NJ = _columns(weight).to(device)
    if weight_NJ.shape != labels_NJ.shape or not weight.is_floating_point():
        raise UsageError(
            f"label_weight is {list(weight.shape)} of {weight.dtype}, labels are "
            f"{list(labels.shape)}; expected one shape, and a floating dtype"
        )
    _check_weights("label_weight", weight_NJ)
    return labels_NJ, weight_NJ


def _check_weights(name: str, weight: Tensor) -> None:
    """UsageError for a weight below 0, NaN or infinite, as docs/format.md 5.1 refuses it."""
    if readable(weight) and not bool(((weight >= 0) & (weight < math.inf)).all()):
        row = int((~((weight >= 0) & (weight < math.inf))).nonzero()[0, 0])
        raise UsageError(
            f"{name} of row {row} is {weight[row].tolist()}; expected finite weights of at least 0"
        )


def _columns(x: Tensor) -> Tensor:
    """[N] as [N, 1]."""
    return x[:, None] if x.dim() == 1 else x


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: nothing was counted."""
    return (a / b).masked_fill_(b <= 0, 0)
