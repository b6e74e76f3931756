"""The distillation loss of logits whose columns are split over devices (vocabulary-parallel), value
and gradient.

Each of R ranks holds columns [first, first + V_r) of every row, and all labels and teachers. A rank
sums its columns, the ranks exchange eight float32 a row, and each writes the gradient of its own
columns:

    shard = VocabShard(first_class=rank * width, num_classes=V, labels=..., ids=..., log_probs=...,
    log_tail=...)
    sums_N8 = shard_sums(logits, shard)             # of own columns
    whole_N8 = merge_sums(gathered_RN8, shard)      # one all_gather before it
    loss_N, ce_N, kd_N = sharded_loss(logits, whole_N8, shard)

`vocab_parallel_loss` is the three with the all_gather. With m a logit as large as the largest of a
shard (to a rounding), S the kept ids that are its own, q the teacher's probabilities, w the weights
of labels y, the sums are

    0  m                                    4  sum_S q (x - m) / T; of reverse KL sum_S e ((x - m) /
       T - log q)
    1  sum exp(x - m)                       5  sum_S q
    2  sum_(not S) exp((x - m) / T)         6  sum w (x_y - m), of own labels
    3  sum_S e, e = exp((x - m) / T)        7  sum w, of own labels

and the same of the whole row after merging. The tail is summed over itself; a sum below 1e-20 is
given as its logarithm, which is below 0, so that a tail has its value and gradient when its mass
underflows. Every number is relative to the m beside it: a large common offset costs no digits. For
tail "conditional", [2] is the largest kept logit instead, and [3] and [4] are relative to that.
With Z = [2] + [3] and p_t = [2] / Z,

    forward KL = sum q (log q + log Z) - [4] + q_t (log q_t - log p_t)
    reverse KL = ([4] - [3] log Z) / Z + p_t (log p_t - log q_t)                CE = [7] log [1] -
        [6]

Jensen-Shannon divergence and total variation are not functions of few sums over shards, and are
refused.

Bytes of a rank (bf16): V_r columns are read for the sums and again for the gradient, and written
once, 6 N V_r: between the reads lies the exchange, all rows long, and what was read first is out of
L2 by then unless 2 N V_r bytes fit it. Exchanged: 32 N sent, 32 N R received. No time has been
measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdcache.kernels import kd_shard_rows
from kdcache.kernels.kd_autograd import Gradients, first_derivatives_only, link, split_over_devices
from kdcache.kernels.kd_launch import (
    Call,
    Tiles,
    addressable,
    exponents,
    gradient_like,
    kernel_constants,
    scaled_gradient,
)
from kdcache.kernels.kd_loss import DTYPES, INTERPRETED

TAILS = {
    "forward_kl": ("bucket", "renormalise", "conditional", "sampled"),
    "reverse_kl": ("bucket", "conditional"),
}
SUMS = 8
LEAST: float = kd_shard_rows.LEAST.value


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabShard:
    """What one rank knows besides its columns of the logits; all but `first_class` is the same on
    every rank.

    first_class   the class of the shard's first column. The shards of all ranks, of any widths,
                  hold each class once
    num_classes   V, the classes of all shards. Columns of a shard beyond are padding: unread, zero
                  gradient
    labels        integer [N] or [N, J]; below 0 or above V - 1 is no label; label_weight [N, J]
                  weighs them
    ids           int32 or int64 [N, K], distinct within a row; below 0 or above V - 1 is padding
    log_probs     [N, K] teacher at `temperature`; log_tail [N] of all ids not kept, for tail
                  "bucket" only
    row_weight    [N] factor of the divergence; 0 is a row without a teacher
    divergence    "forward_kl", or "reverse_kl" with tail "bucket" or "conditional"; tail and
                  *_scale as of
                  `kd_loss_rows`
    """

    first_class: int
    num_classes: int
    labels: Tensor | None = None
    label_weight: Tensor | None = None
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    log_tail: Tensor | None = None
    row_weight: Tensor | None = None
    temperature: float = 1.0
    divergence: str = "forward_kl"
    tail: str = "bucket"
    ce_scale: Tensor | float | None = 1.0
    kd_scale: Tensor | float | None = 1.0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def shard_sums(logits: Tensor, shard: VocabShard) -> Tensor:
    """The eight sums of each row over a shard's columns, float32 [N, 8], without a gradient.

    logits [N, V_r] float16, bfloat16 or float32, rows may be strided: a slice of columns is taken
    where it stands. The kept logits read -inf while the kernel runs, and only then. ValueError for
    what does not fit.
    """
    call = _checked(logits, shard)
    x_NV = addressable(logits.detach())
    sums_N8 = torch.empty((len(logits), SUMS), dtype=torch.float32, device=logits.device)
    if len(logits):
        _launch(kd_shard_rows.shard_sums, call, shard, X=x_NV, SUMS=sums_N8)
    return sums_N8


def merge_sums(sums_RN8: Tensor | Sequence[Tensor], shard: VocabShard) -> Tensor:
    """The sums of whole rows, [N, 8], from those of shards that hold every class once, in any
    order.
    """
    sums_RN8 = sums_RN8 if isinstance(sums_RN8, Tensor) else torch.stack(list(sums_RN8))
    if sums_RN8.dim() != 3 or sums_RN8.shape[-1] != SUMS or not len(sums_RN8):
        raise ValueError(
            f"sums are {list(sums_RN8.shape)}; expected [R, N, {SUMS}], those of R >= 1 shards"
        )
    # In float64: sums relative to an m far below that of the whole row keep their digits.
    top, one, tail, kept, cross, mass, scored, weight = sums_RN8.double().unbind(-1)
    whole = top.amax(0)
    fall = top - whole
    if shard.tail == "conditional":
        joined = tail.amax(0)
        soft_fall = (tail - joined) / shard.temperature
    else:
        soft_fall = fall / shard.temperature
        joined = _merged_tail(tail, soft_fall)
    share = soft_fall.exp()
    crossed = (
        cross + soft_fall * mass
        if shard.divergence == "forward_kl"
        else share * (cross + soft_fall * kept)
    )
    return torch.stack(
        [
            whole,
            (one * fall.exp()).sum(0),
            joined,
            (kept * share).sum(0),
            crossed.sum(0),
            mass.sum(0),
            (scored + fall * weight).sum(0),
            weight.sum(0),
        ],
        -1,
    ).float()


def _merged_tail(tail_RN: Tensor, fall_RN: Tensor) -> Tensor:
    """Sums over tails, or their logarithms where those are below 0, as one of either."""
    sums = torch.where(tail_RN < 0, (tail_RN + fall_RN).exp(), tail_RN * fall_RN.exp()).sum(0)
    logs = torch.logsumexp(torch.where(tail_RN < 0, tail_RN, tail_RN.log()) + fall_RN, 0)
    return torch.where(sums > LEAST, sums, logs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sharded_loss(
    logits: Tensor, sums_N8: Tensor, shard: VocabShard, *, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, CE, D) of whole rows, float32 [N], from their merged sums and the logits that those
    are of.

    Only the loss carries a gradient, first derivatives only. Every rank gets the same values (to
    the bit where shards are equally wide), and by its own backward the gradient of its own columns:
    nothing is exchanged there. With
    `inplace` it takes the place of the logits. A row without label and teacher gives 0 and a zero
    gradient. ValueError for what does not fit.
    """
    call = _checked(logits, shard)
    if (
        sums_N8.shape != (len(logits), SUMS)
        or sums_N8.dtype != torch.float32
        or sums_N8.device != logits.device
    ):
        raise ValueError(
            f"sums are {list(sums_N8.shape)} of {sums_N8.dtype} on {sums_N8.device}; expected "
            f"[{len(logits)}, {SUMS}] of float32 on {logits.device}, as merge_sums returns them"
        )
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    out: tuple[Tensor, Tensor, Tensor] = _Shard.apply(  # type: ignore[no-untyped-call]
        logits, sums_N8.detach().contiguous(), call, shard, inplace, wants_gradient
    )
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def vocab_parallel_loss(
    logits: Tensor,
    shard: VocabShard,
    *,
    group: dist.ProcessGroup | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sharded_loss` with the sums of all ranks of a process group, by one all_gather of 8 float32
    a row.
    """
    sums_N8 = shard_sums(logits, shard)
    gathered = [torch.empty_like(sums_N8) for _ in range(dist.get_world_size(group))]
    if len(logits):
        dist.all_gather(gathered, sums_N8, group=group)
    out: tuple[Tensor, Tensor, Tensor] = sharded_loss(
        logits, merge_sums(gathered, shard), shard, inplace=inplace
    )
    return out


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        sums_N8: Tensor,
        call: Call,
        shard: VocabShard,
        inplace: bool,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_NV = addressable(logits.detach())
        gradient = None
        if wants_gradient:
            gradient = x_NV if inplace else gradient_like(x_NV)
            link(ctx, logits)
        out = torch.empty((3, len(logits)), dtype=torch.float32, device=logits.device).unbind()
        if len(logits):
            _launch(
                kd_shard_rows.shard_gradient,
                call,
                shard,
                X=x_NV,
                G=gradient,
                SUMS=sums_N8,
                LOSS=out[0],
                CE=out[1],
                KD=out[2],
            )
        # an operation that kept these logits for its own backward must notice
        if gradient is x_NV:
            torch.autograd.graph.increment_version(x_NV)
        ctx.inplace, ctx.used = inplace, False
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return out[0], out[1], out[2]

    @staticmethod
    @first_derivatives_only("sharded_loss")
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
        gradient = None if grad_outputs[0] is None else scaled_gradient(ctx, grad_outputs[0])
        return gradient, None, None, None, None, None


def _launch(kernel: Any, call: Call, shard: VocabShard, **buffers: Tensor | None) -> None:
    """One program per row. `buffers` and what a call and its shard say are given to a kernel by the
    names it has.
    """
    x_NV = buffers["X"]
    assert x_NV is not None
    tiles, vec = Tiles.of(call.num_classes, x_NV.element_size()), 16 // x_NV.element_size()
    aligned = (
        call.num_classes % vec == 0
        and x_NV.data_ptr() % 16 == 0
        and (len(x_NV) == 1 or x_NV.stride(0) % vec == 0)
    )
    targets = {
        "LABELS": call.labels_NJ,
        "LABEL_WEIGHT": call.label_weight_NJ,
        "IDS": call.ids_NK,
        "LOG_Q": call.log_probs_NK,
    }
    strides = zip(
        ("x_stride", "g_stride", "label_stride", "label_weight_stride", "id_stride", "q_stride"),
        (x_NV, buffers.get("G"), *targets.values()),
        strict=True,
    )
    c, c2 = exponents(call)
    given = (
        buffers
        | targets
        | {
            "LOG_TAIL": call.log_tail_N if call.tail == "bucket" else None,
            "ROW_WEIGHT": call.row_weight_N,
            "CE_SCALE": call.ce_scale,
            "KD_SCALE": call.kd_scale,
            "first": shard.first_class,
            "count": call.num_classes,
            "width": x_NV.shape[1],
            "num_classes": shard.num_classes,
            "kept": _width(call.ids_NK),
            "num_labels": _width(call.labels_NJ),
            "c": c,
            "c2": c2,
            "temperature": call.temperature,
            **{name: 0 if tensor is None else tensor.stride(0) for name, tensor in strides},
            **kernel_constants(
                call,
                x_NV.element_size(),
                buffers.get("G") is not None,
                False,
                aligned,
                call.num_classes,
            ),
        }
    )
    with torch.cuda.device_of(x_NV):  # type: ignore[no-untyped-call]
        kernel[(len(x_NV),)](
            **{name: given[name] for name in kernel.arg_names},
            num_warps=tiles.warps,
            num_stages=1,
            maxnreg=tiles.registers,
        )


def _width(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[1]


def _checked(logits: Tensor, shard: VocabShard) -> Call:
    """The call of one shard; ValueError for what does not go together. Only shapes and dtypes are
    looked at.
    """
    if split := split_over_devices(logits=logits):
        raise ValueError(split[0])
    if logits.dim() != 2 or logits.dtype not in DTYPES or not (logits.is_cuda or INTERPRETED):
        raise ValueError(
            f"logits are {list(logits.shape)} of {logits.dtype} on {logits.device}; expected [N, "
            "V_r] of "
            f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)} on a CUDA device, or "
            f"TRITON_INTERPRET=1 set before triton is imported"
        )
    wrong = []
    if shard.first_class < 0 or not 1 <= shard.num_classes < 2**31 - 2**16:
        wrong.append(
            f"first_class is {shard.first_class}, num_classes {shard.num_classes}; expected at "
            "least 0 and 1"
        )
    if shard.tail not in TAILS.get(shard.divergence, ()):
        wrong.append(
            f"divergence {shard.divergence!r} with tail {shard.tail!r}; over shards there are "
            f"{TAILS}"
        )
    if not 0 < shard.temperature < math.inf:
        wrong.append(f"temperature is {shard.temperature}; expected above 0")
    if shard.labels is None and shard.ids is None:
        wrong.append(
            "neither labels nor ids are given; a teacher over all classes is not taken over shards"
        )
    if shard.labels is None and shard.label_weight is not None:
        wrong.append("label_weight without labels")
    wanted = [shard.log_probs] + [shard.log_tail] * (shard.tail == "bucket")
    if any((t is None) != (shard.ids is None) for t in wanted):
        wrong.append("ids, log_probs and, for tail 'bucket', log_tail belong together")
    wrong += _misfits(logits, shard)
    if wrong:
        raise ValueError("; ".join(wrong))
    return Call(
        max(0, min(logits.shape[1], shard.num_classes - shard.first_class)),
        _matrix(shard.labels),
        _matrix(shard.label_weight),
        _matrix(shard.ids),
        _matrix(shard.log_probs),
        None if shard.log_tail is None else shard.log_tail.contiguous(),
        None if shard.row_weight is None else shard.row_weight.contiguous(),
        float(shard.temperature),
        shard.divergence,
        shard.tail,
        0.5,
        _scale(shard.ce_scale, logits),
        _scale(shard.kd_scale, logits),
        False,
    )


def _misfits(logits: Tensor, shard: VocabShard) -> list[str]:
    """The tensors of a shard that do not go with its logits."""
    rows, wrong = len(logits), []
    shapes: dict[str, tuple[int, ...]] = {
        "log_tail": (rows,),
        "row_weight": (rows,),
        "ce_scale": (),
        "kd_scale": (),
    }
    shapes |= {} if shard.labels is None else {"label_weight": tuple(shard.labels.shape)}
    shapes |= {} if shard.ids is None else {"log_probs": tuple(shard.ids.shape)}
    for name in (
        "labels",
        "label_weight",
        "ids",
        "log_probs",
        "log_tail",
        "row_weight",
        "ce_scale",
        "kd_scale",
    ):
        tensor, integer = getattr(shard, name), name in ("labels", "ids")
        if not isinstance(tensor, Tensor) or not (integer or name in shapes):
            continue
        fits = (
            tensor.dim() in (1, 2) and len(tensor) == rows
            if integer
            else tuple(tensor.shape) == shapes[name]
        )
        if not fits or tensor.device != logits.device or tensor.is_floating_point() == integer:
            wrong.append(
                f"{name} is {list(tensor.shape)} of {tensor.dtype} on {tensor.device}; expected "
                f"{f'integers [{rows}] or [{rows}, ...]' if integer else f'floats {list(shapes[name])}'} on "
                f"{logits.device}"
            )
    return wrong


def _matrix(tensor: Tensor | None) -> Tensor | None:
    """[N] as [N, 1]; the last axis contiguous."""
    if tensor is None:
        return None
    tensor = tensor[:, None] if tensor.dim() == 1 else tensor
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _scale(scale: Tensor | float | None, logits: Tensor) -> Tensor | None:
    if scale is None or isinstance(scale, Tensor):
        return scale
    return torch.full((), scale, dtype=torch.float32, device=logits.device)
