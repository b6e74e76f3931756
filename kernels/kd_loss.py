"""Fused distillation loss: cross-entropy and divergence from a sparse teacher, value and gradient,
from rows of logits.

    loss_N = ce_scale * CE_N + kd_scale * D_N + z_scale * lse_N^2

CE and the log-sum-exp are at temperature 1, D(q || p) at T, in nats, without T^2.

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
twice that for a T that is not on the list of
`powers`; a softcap takes one more, and an rsqrt, in each sweep. Statistics and the uniform tail add
sums to sweep 1; logit scale and z-loss are in numbers of the row and cost no instruction per
element. Compiled for sm_90 (bf16, K = 64, one label; triton 3.7.1), instructions per element of
sweep 1 + sweep 2:

    V = 128256, R = 8, 16 warps, 128 registers    T = 1: 6.0 + 5.5    T = 2: 7.1 + 6.6    T = 1.37:
        9.0 + 8.6
    V = 128256, R = 4, 16 warps, 128 registers    T = 2 and stats: 10.5 + 7.0, uniform: 12.3 + 7.0
    V = 128256, R = 2, 16 warps, 128 registers    T = 2 and softcap: 27.9 + 28.5
    V = 50257,  R = 4,  8 warps, 128 registers                        T = 2: 7.5 + 6.8
    V = 32000,  R = 4,  8 warps,  80 registers                        T = 2: 7.5 + 6.9

128-bit loads and stores alone, no spills, 22 barriers a row (30 uniform, 37 stats);
tests/kernels/test_aot.py holds the budgets. No time has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import triton
from torch import Tensor

from kdcache.kernels.kd_autograd import Gradients, first_derivatives_only, link, split_over_devices
from kdcache.kernels.kd_launch import Call, addressable, gradient_like, launch, scaled_gradient
from kdcache.kernels.kd_ops import compiled_rows

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv")
TAILS = ("bucket", "renormalise", "conditional", "sampled", "uniform")
FORMS = ("two launches", "one launch")  # of programs that share a row
INTERPRETED = bool(triton.knobs.runtime.interpret)  # settled when triton was imported
MOST_FULL = 16384  # classes of a teacher without ids: its rows are held in registers
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Values = tuple[Tensor, Tensor, Tensor]
WithStats = tuple[Tensor, Tensor, Tensor, Tensor]


class Options(TypedDict, total=False):
    """What `kd_loss_rows` takes besides logits and `stats`."""

    num_classes: int | None
    labels: Tensor | None
    label_weight: Tensor | None
    ids: Tensor | None
    log_probs: Tensor | None
    log_tail: Tensor | None
    row_weight: Tensor | None
    temperature: float
    divergence: str
    tail: str
    beta: float
    teacher_classes: int | None
    ce_scale: Tensor | float | None
    kd_scale: Tensor | float | None
    z_scale: Tensor | float | None
    logit_scale: float
    softcap: float | None
    inplace: bool
    parts: int | None
    form: str


@overload
def kd_loss_rows(
    logits: Tensor, *, stats: Literal[False] = ..., **options: Unpack[Options]
) -> Values: ...
@overload
def kd_loss_rows(
    logits: Tensor, *, stats: Literal[True], **options: Unpack[Options]
) -> WithStats: ...
def kd_loss_rows(
    logits: Tensor,
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
    inplace: bool = False,
    parts: int | None = None,
    form: str = "two launches",
    stats: bool = False,
) -> tuple[Tensor, ...]:
    """(loss, CE, D) of each row, float32 [N]; only the loss carries a gradient. With `stats` a
    fourth, [N, 4]. First derivatives only: to differentiate the gradient is a RuntimeError.

    logits        [N, V' >= V], float16, bfloat16 or float32; rows may be strided (a slice of a
                  padded vocabulary). Columns from V = num_classes on are padding: unread, zero
                  gradient
    labels        integer [N] or [N, J]; below 0 or above V - 1 is no label; label_weight, of the
                  labels' shape, weighs them: CE = sum of weight * -log p. Without it those of a row
                  weigh alike, 1 in all
    ids           int32 or int64 [N, K], distinct within a row; below 0 or above V - 1 is padding
    log_probs     [N, K] teacher at `temperature`; log_tail [N] of all ids not kept, for tail
                  "bucket" and "uniform" only. Without ids: [N, V] in id order, V up to 16,384, and
                  nothing is left out; or of fewer classes than V, [N, teacher_classes]: the others
                  have teacher probability 0, and tail "conditional" alone leaves them out
    teacher_classes    of a teacher with ids: its classes are those below, V by default. The others
                  have probability 0:
                  they are in the tail, and "uniform" gives them no part of it
    row_weight    [N] factor of D; 0 is a row without a teacher, whose ids and probabilities may
                  hold anything
    tail          bucket: all ids not kept are one outcome. renormalise: the teacher is renormalised
                  over the kept. conditional: both are. sampled: exp(log_probs) are weights, of any
                  sum s: the slope is s p - w. uniform: exp(log_tail) is spread evenly over the ids
                  not kept, forward_kl only; one of them with a logit of -inf makes D inf, unless
                  that mass is 0
    beta          of jsd: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
    *_scale       factor of a part in the loss: a number, or a float tensor of no dimension on the
                  logits' device, read there; None: the part is reported and is not in the loss. T^2
                  and 1 / N belong here
    z_scale       as these: adds z_scale * (log-sum-exp at T = 1)^2 of each row with a label of
                  non-zero weight (PaLM's z-loss, arXiv 2204.02311 section 5) to the loss; it is in
                  no other output
    logit_scale, softcap    all is of y = softcap * tanh(logit_scale * x / softcap), or of
                  logit_scale * x, computed in float32 from the logits x; the gradient is over x. A
                  logit of -inf stays -inf: a class that is masked stays out, where plain torch
                  would make it -softcap
    inplace       write the gradient over the logits when one is wanted; the loss can be
                  differentiated once then. In a graph that torch.compile captures it is allowed and
                  not done
    parts         programs that share a row, 1 to 64; None: several only where there are fewer rows
                  than multiprocessors
    form          how those meet: "two launches", or "one launch" in which they wait for each other,
                  on a CUDA device
    stats         of each row, float32: log-sum-exp at T = 1; entropy at T = 1 in nats; mass of the
                  kept ids under the student at T; 1.0 where a kept id to which the teacher gives
                  most has the greatest y of the row (or one equal to it in float32), else 0.0.
                  Without a teacher, or where row_weight is 0, the last two are 0; without ids the
                  mass is of the teacher's classes

    A row without label and teacher gives 0 and a zero gradient, whatever it holds. Nothing waits
    for the device. ValueError for shapes, dtypes and options that do not fit.
    """
    labels_NJ = _matrix("labels", labels, logits)
    ids_NK = _matrix("ids", ids, logits)
    call = Call(
        logits.shape[-1] if num_classes is None else num_classes,
        labels_NJ,
        _matrix("label_weight", label_weight, logits),
        ids_NK,
        _matrix("log_probs", log_probs, logits),
        _column(log_tail),
        _column(row_weight),
        float(temperature),
        divergence,
        tail,
        float(beta),
        _scale(ce_scale, logits),
        _scale(kd_scale, logits),
        inplace,
        parts,
        form,
        float(logit_scale),
        None if softcap is None else float(softcap),
        _scale(z_scale, logits),
        stats,
        teacher_classes,
    )
    _check(logits, call)
    if torch.compiler.is_compiling():
        return compiled_rows(logits, call)
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    out: tuple[Tensor, ...] = _Rows.apply(logits, call, wants_gradient)  # type: ignore[no-untyped-call]
    return out


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Call, wants_gradient: bool) -> tuple[Tensor, ...]:
        x_NV = addressable(logits.detach())
        gradient = None
        if wants_gradient:
            gradient = x_NV if call.inplace else gradient_like(x_NV)
            link(ctx, logits)
        loss_N, ce_N, kd_N = torch.empty(
            (3, len(logits)), dtype=torch.float32, device=logits.device
        ).unbind()
        stats_N4 = loss_N.new_empty((len(logits), 4)) if call.stats else None
        launch(x_NV, gradient, (loss_N, ce_N, kd_N, stats_N4), call)
        # an operation that kept these logits for its own backward must notice
        if gradient is x_NV:
            torch.autograd.graph.increment_version(x_NV)
        ctx.inplace, ctx.used = call.inplace, False
        ctx.save_for_backward(gradient)
        others = (ce_N, kd_N) if stats_N4 is None else (ce_N, kd_N, stats_N4)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return loss_N, *others

    @staticmethod
    @first_derivatives_only("kd_loss_rows")
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
        return (
            None if grad_outputs[0] is None else scaled_gradient(ctx, grad_outputs[0]),
            None,
            None,
        )


def _check(logits: Tensor, call: Call) -> None:
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
    wrong = [*_wrong_options(call), *_wrong_targets(call), *_wrong_shapes(logits, call)]
    if not logits.is_cuda and not INTERPRETED:
        wrong.append(
            f"logits are on {logits.device}; the kernels need a CUDA device, or TRITON_INTERPRET=1 "
            "set before "
            f"triton is imported"
        )
    if not 1 <= call.num_classes <= logits.shape[1] or logits.shape[1] >= 2**31 - 2**16:
        wrong.append(
            f"num_classes is {call.num_classes}, the logits have {logits.shape[1]} columns"
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def _wrong_options(call: Call) -> Iterator[str]:
    if call.divergence not in DIVERGENCES or call.tail not in TAILS:
        yield (
            f"divergence {call.divergence!r}, tail {call.tail!r}; known: {DIVERGENCES} and {TAILS}"
        )
    if not (0 < call.temperature < math.inf and 0 < call.beta < 1):
        yield (
            f"temperature is {call.temperature}, beta {call.beta}; expected above 0, and between 0 "
            "and 1"
        )
    if not 0 < call.logit_scale < math.inf or not (
        call.softcap is None or 0 < call.softcap < math.inf
    ):
        yield (
            f"logit_scale is {call.logit_scale}, softcap {call.softcap}; expected finite numbers "
            "above 0"
        )
    if call.parts is not None and not 1 <= call.parts <= 64:
        yield f"parts is {call.parts}; expected 1 to 64"
    if call.form not in FORMS:
        yield f"form {call.form!r}; known: {FORMS}"
    if call.form == "one launch" and (INTERPRETED or torch.compiler.is_compiling()):
        yield (
            "form 'one launch' runs on a CUDA device, outside of torch.compile: in the interpreter "
            "a program begins "
            "when the one before has ended, and its wait for the others would not end; give "
            "form='two launches'"
        )
    if call.divergence == "reverse_kl" and call.tail in ("renormalise", "sampled"):
        yield f"reverse_kl with tail {call.tail!r} is infinite: the teacher gives the tail nothing"
    if call.divergence != "forward_kl" and call.tail == "uniform":
        yield f"{call.divergence} with tail 'uniform' is not built: give divergence='forward_kl'"


def _wrong_targets(call: Call) -> Iterator[str]:
    log_probs_NK = call.log_probs_NK
    if call.labels_NJ is None and log_probs_NK is None:
        yield "neither labels nor log_probs are given"
    if call.labels_NJ is None and (call.label_weight_NJ is not None or call.z_scale is not None):
        yield "label_weight and z_scale are of rows with labels, and no labels are given"
    if log_probs_NK is None and call.row_weight_N is not None:
        yield "row_weight is of rows with a teacher, and no log_probs are given"
    if call.ids_NK is not None and (
        log_probs_NK is None or (call.tail in ("bucket", "uniform") and call.log_tail_N is None)
    ):
        yield "ids, log_probs and, for tail 'bucket' or 'uniform', log_tail belong together"
    most = call.num_classes if call.teacher_classes is None else call.teacher_classes
    if not 1 <= most <= call.num_classes:
        yield f"teacher_classes is {most}; expected 1 to the {call.num_classes} of the logits"
    if (
        call.ids_NK is None
        and log_probs_NK is not None
        and (log_probs_NK.shape[1] != most or call.num_classes > MOST_FULL)
    ):
        yield (
            f"log_probs without ids are {list(log_probs_NK.shape)}; expected [N, {most}], the "
            "classes of the "
            f"teacher (teacher_classes), and at most {MOST_FULL} classes in all"
        )
    without_ids = call.ids_NK is None and call.taught is not None
    if without_ids and call.divergence == "reverse_kl" and call.tail != "conditional":
        yield (
            "reverse_kl of a teacher over fewer classes than the logits is infinite; tail "
            "'conditional' is not"
        )


def _wrong_shapes(logits: Tensor, call: Call) -> Iterator[str]:
    for a, b in ((call.labels_NJ, call.label_weight_NJ), (call.ids_NK, call.log_probs_NK)):
        if a is not None and b is not None and a.shape != b.shape:
            yield f"{list(a.shape)} and {list(b.shape)} must be alike"
        if a is not None and a.shape[1] == 0:
            yield f"labels or ids are {list(a.shape)}; expected at least one per row: -1 is none"
    for scale in (call.ce_scale, call.kd_scale, call.z_scale):
        if scale is not None and (scale.dim() or scale.device != logits.device):
            yield (
                f"a scale is {list(scale.shape)} on {scale.device}; expected a number, or a tensor "
                "without a "
                f"dimension on {logits.device}: of rows, label_weight and row_weight are the "
                "factors"
            )
    for tensor in (
        call.labels_NJ,
        call.label_weight_NJ,
        call.ids_NK,
        call.log_probs_NK,
        call.log_tail_N,
        call.row_weight_N,
    ):
        if tensor is not None and (tensor.device != logits.device or len(tensor) != len(logits)):
            yield (
                f"{list(tensor.shape)} on {tensor.device} does not go with {list(logits.shape)} on "
                f"{logits.device}"
            )


def _matrix(name: str, tensor: Tensor | None, logits: Tensor) -> Tensor | None:
    """[N] as [N, 1]; the last axis contiguous."""
    if tensor is None:
        return None
    if (
        tensor.dim() not in (1, 2)
        or len(tensor) != len(logits)
        or tensor.is_floating_point() != (name in ("label_weight", "log_probs"))
    ):
        raise ValueError(
            f"{name} is {list(tensor.shape)} of {tensor.dtype} for logits of {list(logits.shape)}"
        )
    tensor = tensor[:, None] if tensor.dim() == 1 else tensor
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _column(tensor_N: Tensor | None) -> Tensor | None:
    if tensor_N is not None and tensor_N.dim() != 1:
        raise ValueError(f"log_tail or row_weight is {list(tensor_N.shape)}; expected [N]")
    return None if tensor_N is None else tensor_N.contiguous()


def _scale(scale: Tensor | float | None, logits: Tensor) -> Tensor | None:
    if scale is None or isinstance(scale, Tensor):
        return scale
    return torch.full((), scale, dtype=torch.float32, device=logits.device)
