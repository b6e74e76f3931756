"""What a loss is asked, checked: names, weights, counts, and that student, labels and teacher have
the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError, near
from kdcache.loss.arguments import (
    check_integer,
    check_number,
    check_tensor,
    check_type,
    plain_temperature,
)
from kdcache.loss.divergences import DIVERGENCES
from kdcache.loss.engines import check_name
from kdcache.loss.targets import SoftTargets, readable
from kdcache.loss.torch_engine import RowLoss, wide

TAILS = ("bucket", "renormalise", "conditional", "uniform", "sampled")
FORWARD_ONLY = {
    "uniform": "the others are not built for an even tail; use tail 'bucket'",
    "sampled": "weights of any sum estimate what is linear in the teacher, and are no distribution",
}
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


class Options(TypedDict):
    """What `kd_loss` and `kd_linear_loss` take alike."""

    alpha: float
    ce_weight: float | None
    kd_weight: float | None
    label_weight: Tensor | None
    temperature: float | None
    divergence: str
    beta: float | None
    tail: str
    ignore_index: int
    reduction: str
    normalizer: tuple[Count, Count] | None
    engine: str
    classes: int | None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that fits. `rows` has the scales of the whole loss: weight, T^2 and, for a mean, 1
    / count.

    scales: of CE and D, also of a part that is not in the loss. counts: what a mean divides by,
    where it is needed.
    """

    rows: RowLoss
    scales: tuple[Tensor, Tensor]
    counts: tuple[Count, Count]
    reduction: str

    def parts(self, loss: Tensor, ce_N: Tensor, kd_N: Tensor) -> LossParts:
        """The parts as they are reported."""
        ce_count, kd_count = (_number(count, ce_N.dtype, ce_N) for count in self.counts)
        ce, kd = (ce_N, kd_N) if self.reduction == "none" else (ce_N.sum(), kd_N.sum())
        if self.reduction == "mean":
            ce, kd = over(ce, ce_count), over(kd, kd_count)
        return LossParts(loss, ce, kd, ce_count, kd_count)


def ask(
    like: Tensor,
    width: int,
    labels: Tensor | None,
    targets: SoftTargets | None,
    options: Options,
    *,
    report: bool,
) -> Asked:
    """The request of a student's rows `like` [N, ...] with `width` classes each; UsageError for
    what does not fit.

    report: both parts are wanted, also one of weight 0; without it such a part is not computed.
    """
    divergence, tail = options["divergence"], options["tail"]
    _check_types(labels, targets, options)
    check_name(options["engine"])
    beta = check_loss_names(divergence, tail, options["beta"])
    _check_reduction(options["reduction"], options["normalizer"])
    ce_weight, kd_weight = _weights(options["alpha"], options["ce_weight"], options["kd_weight"])
    num_classes = _num_classes(width, options["classes"], targets)
    _check_rows(len(like), num_classes, labels, targets, options)
    working = wide(like.dtype)
    labels_NJ, label_weight_NJ = _labels(
        labels, options["label_weight"], options["ignore_index"], num_classes, like.device
    )
    # A part of weight 0 is never multiplied into the loss (0 * inf).
    labels_NJ = labels_NJ if ce_weight or report else None
    targets = (
        _teacher(targets, num_classes, divergence, tail, like.device)
        if kd_weight or report
        else None
    )
    mean, counts = options["reduction"] == "mean", options["normalizer"]
    if counts is None:
        counts = _own_counts(labels_NJ, targets) if mean or report else (1.0, 1.0)
    ce_count, kd_count = (_number(n, working, like) if isinstance(n, Tensor) else n for n in counts)
    kd_weight_T2 = kd_weight * (1.0 if targets is None else targets.temperature**2)
    ce_scale = _scale(ce_weight, ce_count if mean else 1.0, working, like)
    kd_scale = _scale(kd_weight_T2, kd_count if mean else 1.0, working, like)
    rows = RowLoss(
        num_classes,
        labels_NJ,
        label_weight_NJ,
        targets,
        divergence,
        tail,
        ce_scale if ce_weight else None,
        kd_scale if kd_weight else None,
        False,
        beta,
    )
    return Asked(rows, (ce_scale, kd_scale), (ce_count, kd_count), options["reduction"])


def row_counts(
    labels: Tensor | None, targets: SoftTargets | None, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """What a mean of the loss divides by: rows with a label ([N] or [N, J]); rows with a teacher,
    or their weights.

    Two tensors of no dimension on the device of the targets, without targets of the labels; of
    float64, which adds counts exactly; 0 of what is None. Sum them over micro-batches, and by
    `dist.all_reduce` over ranks, for
    `normalizer`. DistributedDataParallel averages gradients over the ranks: multiply the loss by
    the world size then.
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


def check_loss_names(divergence: str, tail: str, beta: float | None = None) -> float:
    """The beta of a divergence. UsageError for names that `kd_loss` refuses, before anything is
    trained or written.
    """
    for what, value, known in (
        ("divergence", divergence, tuple(DIVERGENCES)),
        ("tail", tail, TAILS),
    ):
        if value not in known:
            raise UsageError(f"{what} {value!r} is unknown{near(value, known)}")
    if tail in FORWARD_ONLY and divergence != "forward_kl":
        raise UsageError(
            f"tail {tail!r} goes with divergence 'forward_kl' alone, found {divergence!r}: "
            f"{FORWARD_ONLY[tail]}"
        )
    if (divergence, tail) == ("reverse_kl", "renormalise"):
        raise UsageError(
            "divergence 'reverse_kl' with tail 'renormalise' is infinite: the teacher gives the "
            "tail "
            "nothing, the student something; use tail 'bucket' or 'conditional'"
        )
    if beta is not None and divergence != "jsd":
        raise UsageError(
            f"beta is {beta}, but divergence {divergence!r} has none; it belongs to 'jsd'"
        )
    if beta is not None and not 0 < beta < 1:
        raise UsageError(
            f"beta is {beta}; expected between 0 and 1, where jsd is not 0 for every student"
        )
    return 0.5 if beta is None else beta


def _check_given(labels: Tensor | None, targets: SoftTargets | None) -> None:
    check_tensor("labels", labels, "integers [N] or [N, J]", optional=True)
    if isinstance(targets, Tensor):
        raise UsageError(
            f"targets is a tensor {list(targets.shape)}; expected SoftTargets: of a teacher's "
            "logits by "
            "targets_from_logits(logits, temperature=...)"
        )
    check_type(
        "targets",
        targets,
        (SoftTargets, NoneType),
        "SoftTargets, of soft_targets or targets_from_logits",
    )
    if labels is None and targets is None:
        raise UsageError("neither labels nor targets are given; the loss needs at least one")


def _check_types(labels: Tensor | None, targets: SoftTargets | None, options: Options) -> None:
    """UsageError for an argument of another type than the call says."""
    _check_given(labels, targets)
    check_tensor(
        "label_weight", options["label_weight"], "floating, of the shape of labels", optional=True
    )
    check_number("alpha", options["alpha"])
    given: Mapping[str, object] = options
    for name in ("ce_weight", "kd_weight", "temperature", "beta"):
        check_number(name, given[name], optional=True)
    check_integer("ignore_index", options["ignore_index"])
    check_integer("classes", options["classes"], optional=True)
    for name in ("divergence", "tail", "reduction", "engine"):
        check_type(name, given[name], str, "a name")


def _check_reduction(reduction: str, normalizer: tuple[Count, Count] | None) -> None:
    if reduction not in REDUCTIONS:
        raise UsageError(f"reduction {reduction!r} is unknown{near(reduction, REDUCTIONS)}")
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
    """Whether it is a number of at least 0; a tensor's value may be on a device, and is not asked
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
            "are "
            f"padding that nothing uses, cut its logits to the student's {width} first "
            "(dump-teacher "
            f"--classes {width})"
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
            "and "
            "gradient would be 0. It is a sigmoid or a regression head, which this loss is not "
            "for; a "
            "sigmoid of z is the softmax of the two logits (0, z)"
        )


def _check_rows(
    count: int, width: int, labels: Tensor | None, targets: SoftTargets | None, options: Options
) -> None:
    """UsageError where the student's rows of `width` classes, labels and targets are not about the
    same rows.
    """
    temperature = options["temperature"]
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
            options["label_weight"],
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
            "out, "
            f"or take targets at temperature {temperature}"
        )


def _check_columns(labels_NJ: Tensor, classes: set[int], weight: Tensor | None) -> None:
    """UsageError for one number per class where labels were expected; decided by the shape, no
    value is looked at.
    """
    count = labels_NJ.shape[1]
    if 1 < count and count in classes and weight is None:
        raise UsageError(
            f"labels are {list(labels_NJ.shape)}, one for each of {count} classes, which looks "
            "one-hot; "
            "expected the class of each row: labels.argmax(1). Where they are classes, give "
            "label_weight"
        )
    if count > MOST_LABELS:
        raise UsageError(
            f"labels are {list(labels_NJ.shape)}; expected at most {MOST_LABELS} labels a row: of "
            "one-hot "
            "rows give the class, labels.argmax(1)"
        )


def _teacher(
    targets: SoftTargets | None, num_classes: int, divergence: str, tail: str, device: torch.device
) -> SoftTargets | None:
    """The targets on a device; UsageError where they are not what divergence and tail are for."""
    if targets is None:
        return None
    if targets.drawn and tail != "sampled":
        raise UsageError(
            "the targets are draws with weights (ids without log_tail_N); expected tail "
            "'sampled', found "
            f"{tail!r}"
        )
    if tail == "sampled" and not targets.drawn:
        kept = "all classes" if targets.ids_NK is None else "the largest classes and a tail"
        raise UsageError(
            f"tail 'sampled' is for targets that are draws, these are {kept}; use tail 'bucket'"
        )
    if targets.weight_N is not None:
        _check_weights("the weight of soft targets", targets.weight_N)
    if (divergence, tail) == ("reverse_kl", "bucket"):
        if targets.log_probs_NK.shape[1] == targets.num_classes:
            check_reverse_kl(num_classes, targets.num_classes, divergence, tail)
        _check_tails(targets)
    return targets.to(device)


def check_reverse_kl(num_classes: int, taught: int, divergence: str, tail: str) -> None:
    """UsageError for reverse KL of a teacher that keeps all of its `taught` classes and a student
    that has more.
    """
    if (divergence, tail) == ("reverse_kl", "bucket") and num_classes > taught:
        raise UsageError(
            f"divergence 'reverse_kl' is infinite: the student has {num_classes} classes, and the "
            "teacher "
            f"gives those from its {taught} on nothing; cut them (classes {taught}), or use tail "
            "'conditional' or another divergence"
        )


def _check_tails(targets: SoftTargets) -> None:
    """UsageError for a row whose teacher gives its tail nothing, where the student gives every
    class something.
    """
    tail_N = targets.log_tail_N
    if (
        tail_N is None
        or targets.log_probs_NK.shape[1] == targets.num_classes
        or not readable(tail_N)
    ):
        return
    empty_N = tail_N == -torch.inf
    if targets.weight_N is not None:
        empty_N &= targets.weight_N != 0
    if bool(empty_N.any()):
        raise UsageError(
            f"divergence 'reverse_kl' is infinite for row {int(empty_N.nonzero()[0])}: the teacher "
            "gives "
            "its tail nothing; use tail 'conditional', or another divergence"
        )


def check_ruled_out(rows: RowLoss, logits_NV: Tensor | None) -> None:
    """UsageError for reverse KL of a row whose teacher rules out a kept class (-inf) that the
    student does not.

    logits_NV: the student's, or [1, V] where those of all rows are -inf; None where none is.
    """
    targets = rows.targets
    if targets is None or rows.divergence != "reverse_kl" or not readable(targets.log_probs_NK):
        return
    out_NK = targets.log_probs_NK == -torch.inf
    if targets.weight_N is not None:
        out_NK &= targets.weight_N[:, None] != 0
    if not bool(out_NK.any()):
        return
    if logits_NV is not None:
        too_NV = (logits_NV == -torch.inf).expand(len(out_NK), -1)
        out_NK &= ~(
            too_NV[:, : out_NK.shape[1]]
            if targets.ids_NK is None
            else too_NV.gather(1, targets.ids_NK)
        )
    if bool(out_NK.any()):
        row, place = out_NK.nonzero()[0].tolist()
        which = place if targets.ids_NK is None else int(targets.ids_NK[row, place])
        raise UsageError(
            f"divergence 'reverse_kl' is infinite for row {row}: the teacher gives class {which} "
            "nothing, "
            "and the student something; use another divergence"
        )


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
    """`over` of two numbers, on a device; divided on the host if both are there, to the bits of a
    division in `dtype`.

    That is one operation of the device in place of five. A quotient of two float32 rounded from
    float64 is that of float32: 53 bits are more than 2 * 24 + 1 (Figueroa 1995).
    """
    # what a graph captures has no numbers of rows
    if isinstance(count, Tensor) or torch.compiler.is_compiling():
        return over(_number(weight, dtype, like), _number(count, dtype, like))
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
                f"{num_classes - 1}, "
                f"or {ignore_index} or -1 for no label"
            )
    if weight is None:
        return labels_NJ, None
    weight_NJ = _columns(weight).to(device)
    if weight_NJ.shape != labels_NJ.shape or not weight.is_floating_point():
        raise UsageError(
            f"label_weight is {list(weight.shape)} of {weight.dtype}, labels are "
            f"{list(labels.shape)}; "
            "expected one shape, and a floating dtype"
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


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: nothing was counted."""
    return (a / b).masked_fill_(b <= 0, 0)
