"""What is asked of rows of logits: one value that both engines and all kernels take as it is.

    loss_N = ce_scale * CE_N + kd_scale * D_N

CE is at temperature 1, D(q || p) at T, in nats, without T^2. `RowLoss` says of which labels and
which teacher, by which divergence, with which factors. It is sliced by rows, and it has one way to
the arguments of a torch operator and back: a new field is declared here and is then everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tv"]
TAILS = ("bucket", "renormalise", "conditional", "uniform", "sampled")
FORWARD_ONLY = {
    "uniform": "the others are not built for an even tail; use tail 'bucket'",
    "sampled": "weights of any sum estimate what is linear in the teacher, and are no distribution",
}


@dataclass(frozen=True)
class Divergence:
    """D(q || p) of the teacher's q and the student's p, checked when it is made.

    name           forward_kl, reverse_kl, tv (1/2 sum |p - q|), or jsd: beta KL(q || m) + (1 -
                   beta) KL(p || m), m = beta q + (1 - beta) p
    beta           of jsd alone, between 0 and 1; None is 1/2
    tail           what becomes of the classes that the teacher's row does not keep. bucket: they
                   are one outcome. renormalise: the teacher is renormalised over the kept.
                   conditional: both are. sampled: the kept are draws with weights of any sum s,
                   whose slope is s p - w. uniform: the teacher's tail is spread evenly over the ids
                   not kept; one of them with a logit of -inf makes D inf, unless that mass is 0

    ValueError for unknown names, for a pair that is infinite or not built, and for a beta that is
    out of range or of another divergence.
    """

    name: str = "forward_kl"
    beta: float | None = None
    tail: str = "bucket"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("divergence", self.name, DIVERGENCES),
            ("tail", self.tail, TAILS),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r} is unknown (known: {', '.join(known)})")
        if self.tail in FORWARD_ONLY and self.name != "forward_kl":
            raise ValueError(
                f"tail {self.tail!r} goes with divergence 'forward_kl' alone, found {self.name!r}: "
                f"{FORWARD_ONLY[self.tail]}"
            )
        if (self.name, self.tail) == ("reverse_kl", "renormalise"):
            raise ValueError(
                "divergence 'reverse_kl' with tail 'renormalise' is infinite: the teacher gives "
                "the tail nothing, the student something; use tail 'bucket' or 'conditional'"
            )
        if self.beta is not None and self.name != "jsd":
            raise ValueError(
                f"beta is {self.beta}, but divergence {self.name!r} has none; it belongs to 'jsd'"
            )
        if self.beta is not None and not 0 < self.beta < 1:
            raise ValueError(
                f"beta is {self.beta}; expected between 0 and 1, where jsd is not 0 for every "
                "student"
            )

    @property
    def teacher_share(self) -> float:
        """The teacher's part of the mixture that jsd compares with: beta, or 1/2."""
        return 0.5 if self.beta is None else self.beta


@dataclass(frozen=True, slots=True)
class RowLoss:
    """What an engine is asked of logits [N, V']: the loss of each row, and its gradient.

    num_classes    V of the student, at most V': logits from there on are padding, which is not
                   read and has a zero gradient
    labels_NJ      integers; below 0 or above V - 1 is no label. label_weight_NJ, floating, weighs
                   them: CE = sum of weight * -log p. Without it those of a row weigh alike, 1 in
                   all
    ids_NK         int32 or int64, distinct within a row; below 0 or above V - 1 is padding, to the
                   kernels alone. None: the teacher gives its classes in id order
    log_probs_NK   the teacher's, at `temperature`; None without a teacher. log_tail_N: of all ids
                   not kept, for tail "bucket" and "uniform"
    row_weight_N   factor of D; 0 is a row without a teacher, whose ids and probabilities may hold
                   anything
    teacher_classes    of the teacher, where they are fewer than V: those below it. The others have
                   probability 0. They are in the tail, "uniform" gives them no part of it, and
                   where all classes are kept "conditional" alone leaves them out
    *_scale        factor of a part in the loss: a float tensor of no dimension on the logits'
                   device, read there; None: the part is reported and is not in the loss. T^2 and
                   1 / N belong here
    logit_scale, softcap    all is of y = softcap * tanh(logit_scale * x / softcap), or of
                   logit_scale * x, computed in float32 (float64) from the logits x; the gradient is
                   over x. A logit of -inf stays -inf: a class that is masked stays out
    inplace        when a gradient is wanted it is written over the logits; the loss can be
                   differentiated once then

    A row without label and teacher gives 0 and a zero gradient, whatever it holds.
    """

    num_classes: int
    labels_NJ: Tensor | None = None
    label_weight_NJ: Tensor | None = None
    ids_NK: Tensor | None = None
    log_probs_NK: Tensor | None = None
    log_tail_N: Tensor | None = None
    row_weight_N: Tensor | None = None
    teacher_classes: int | None = None
    temperature: float = 1.0
    divergence: Divergence = Divergence()
    ce_scale: Tensor | None = None
    kd_scale: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    inplace: bool = False

    @property
    def taught(self) -> int:
        """The teacher's classes: those below it."""
        return self.num_classes if self.teacher_classes is None else self.teacher_classes

    def rows(self, index: slice | Tensor) -> RowLoss:
        """What is asked of some of the rows: a slice, or an index [M]."""
        return self.each(lambda tensor: tensor[index], PER_ROW)

    def each(self, change: Callable[[Tensor], Tensor], names: Sequence[str]) -> RowLoss:
        """The same with these tensors changed, those of them that there are."""
        changed: dict[str, Any] = {
            name: change(tensor) for name in names if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **changed)

    def arguments(self) -> list[Any]:
        """What an operator is given after `SCHEMA`. `inplace` is not among it: an operator has a
        buffer of its own."""
        named = [getattr(self, name) for name, _ in PLAIN]
        return [*named, *(getattr(self.divergence, name) for name, _ in DIVERGENCE)]

    @classmethod
    def of_arguments(cls, arguments: Sequence[Any]) -> RowLoss:
        """The value whose `arguments` these are."""
        named = dict(zip((name for name, _ in PLAIN), arguments, strict=False))
        return cls(**named, divergence=Divergence(*arguments[len(PLAIN) :]))


# Rows of logits and what is asked of them -> (loss_N, CE_N, D_N); only the loss has a gradient.
Engine = Callable[[Tensor, RowLoss], tuple[Tensor, Tensor, Tensor]]

# Names and types of what an operator is given, in order: plain fields, then the divergence's.
PLAIN = [(f.name, f.type) for f in fields(RowLoss) if f.name not in ("divergence", "inplace")]
DIVERGENCE = [(f.name, f.type) for f in fields(Divergence)]
NUMBER = len(PLAIN) + len(DIVERGENCE)
PER_ROW = [name for name, _ in PLAIN if name.endswith(("_N", "_NJ", "_NK"))]
SCALES = ("ce_scale", "kd_scale")
SCHEMA = ", ".join(
    f"{kind.removesuffix(' | None')}{'?' if kind.endswith(' | None') else ''} {name}"
    for name, kind in [*PLAIN, *((f"divergence_{name}", kind) for name, kind in DIVERGENCE)]
)


def wrong_numbers(rows: RowLoss) -> Iterator[str]:
    """A line for each number that is out of range."""
    if not 0 < rows.temperature < math.inf:
        yield f"temperature is {rows.temperature}; expected above 0"
    if not 0 < rows.logit_scale < math.inf or not (
        rows.softcap is None or 0 < rows.softcap < math.inf
    ):
        yield (
            f"logit_scale is {rows.logit_scale}, softcap {rows.softcap}; expected finite numbers "
            "above 0"
        )
    if not 1 <= rows.taught <= rows.num_classes:
        yield f"teacher_classes is {rows.taught}; expected 1 to {rows.num_classes}, of the logits"


def wrong_parts(rows: RowLoss) -> Iterator[str]:
    """A line for each part that is given without what it belongs to."""
    teacher, tail = rows.log_probs_NK, rows.divergence.tail
    if rows.labels_NJ is None and teacher is None:
        yield "neither labels nor log_probs are given"
    if rows.labels_NJ is None and rows.label_weight_NJ is not None:
        yield "label_weight is of rows with labels, and no labels are given"
    if teacher is None and rows.row_weight_N is not None:
        yield "row_weight is of rows with a teacher, and no log_probs are given"
    if rows.ids_NK is not None:
        if teacher is None or (tail in ("bucket", "uniform") and rows.log_tail_N is None):
            yield "ids, log_probs and, for tail 'bucket' or 'uniform', log_tail belong together"
    elif teacher is not None:
        if teacher.shape[1:] != (rows.taught,):
            yield (
                f"log_probs without ids are {list(teacher.shape)}; expected [N, {rows.taught}], "
                "the classes of the teacher (teacher_classes)"
            )
        if (
            rows.taught != rows.num_classes
            and rows.divergence.name == "reverse_kl"
            and tail != "conditional"
        ):
            yield (
                "reverse_kl of a teacher over fewer classes than the logits is infinite; tail "
                "'conditional' is not"
            )


def wrong_shapes(logits: Tensor, rows: RowLoss) -> Iterator[str]:
    """A line for each tensor that does not go with the others, by shape, dtype and device alone."""
    if not 1 <= rows.num_classes <= logits.shape[1]:
        yield f"num_classes is {rows.num_classes}, the logits have {logits.shape[1]} columns"
    for name in PER_ROW:
        tensor: Tensor | None = getattr(rows, name)
        if tensor is None:
            continue
        floating, matrix = name not in ("labels_NJ", "ids_NK"), not name.endswith("_N")
        if tensor.dim() != 1 + matrix or tensor.is_floating_point() != floating:
            yield (
                f"{name} is {list(tensor.shape)} of {tensor.dtype}; expected "
                f"{'floating' if floating else 'integers'} with {1 + matrix} dimensions"
            )
        elif len(tensor) != len(logits) or tensor.device != logits.device:
            yield (
                f"{name} is {list(tensor.shape)} on {tensor.device}, which does not go with "
                f"{list(logits.shape)} on {logits.device}"
            )
    for a, b in ((rows.labels_NJ, rows.label_weight_NJ), (rows.ids_NK, rows.log_probs_NK)):
        if a is not None and b is not None and a.shape != b.shape:
            yield f"{list(a.shape)} and {list(b.shape)} must be alike"
        if a is not None and a.shape[1:] == (0,):
            yield f"labels or ids are {list(a.shape)}; expected at least one per row: -1 is none"
    for scale in (rows.ce_scale, rows.kd_scale):
        if scale is not None and (scale.dim() or scale.device != logits.device):
            yield (
                f"a scale is {list(scale.shape)} on {scale.device}; expected a tensor without a "
                f"dimension on {logits.device}: of rows, label_weight and row_weight are the "
                "factors"
            )
