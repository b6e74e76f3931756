"""The distillation loss behind an LM head: the student's hidden states and its head in, logits
never whole.

    L = w_ce * CE(z, y) + w_kd * T^2 * D(q || p)          of logits z = hidden @ weight.T + bias

On request z is scaled and capped before all else, as models do that cap what their head gives.
`kernels/kd_linear.py` has the chunks and the products; the rows of a chunk go through an engine of
`kd_loss`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Unpack

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.kernels import kd_linear
from kdcache.kernels.kd_chunks import chunk_rows
from kdcache.loss.divergences import check_ruled_out
from kdcache.loss.engines import check_fits
from kdcache.loss.kd_loss import LossOptions, LossParts, LossRequest, build_row_loss, check_names
from kdcache.loss.targets import SoftTargets
from kdcache.loss.tensor_arguments import check_tensor
from kdcache.loss.torch_engine import torch_engine
from kdcache.user.arguments import bytes_of, check_number


def kd_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    targets: SoftTargets | None = None,
    *,
    bias: Tensor | None = None,
    memory: int | str = "512 MB",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **options: Unpack[LossOptions],
) -> Tensor:
    """`kd_loss(hidden @ weight.T + bias, ...)`, whose logits are made, used and overwritten a chunk
    of rows at a time.

    hidden [N, H], weight [V', H], bias [V'], of one floating dtype; under autocast all are taken in
    its dtype. Their gradients are complete when this returns; that of the head is summed over the
    chunks in float32. A frozen head or trunk gets no gradient, and its products are not made.

    labels to classes as of `kd_loss`; reduction is mean or sum, as the gradient of the head is a
                      sum over the rows. With `normalizer`, DistributedDataParallel averages here
                      too: times the world size
    memory            bytes, or text as "512 MB" or "0.5 GiB", for the logits of a chunk. What holds
                      fewer than about 1000 rows is slow: the gradient of the head is then read and
                      written for little work
    softcap           and logit_scale, above 0: all is of softcap * tanh(logit_scale * z / softcap),
                      or logit_scale * z, in float32 (float64) from the logits z. A logit of -inf
                      stays -inf: its class stays out

    Nothing waits for the device; a row without label and teacher is computed for nothing, and its
    hidden states must be finite: leave such rows out. torch.compile captures engine "triton" alone.
    First derivatives only, by autograd: no create_graph, no torch.func.grad. UsageError (a
    ValueError) for what does not fit.
    """
    head = (hidden, weight, bias)
    return _run(*head, labels, targets, memory, softcap, logit_scale, options, report=False)[1]


def kd_linear_loss_parts(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    targets: SoftTargets | None = None,
    *,
    bias: Tensor | None = None,
    memory: int | str = "512 MB",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **options: Unpack[LossOptions],
) -> LossParts:
    """`kd_linear_loss` with its parts: the loss, which carries the gradients, and CE and D, which
    do not.

    Arguments and errors are those of `kd_linear_loss`. A part of weight 0 is computed too.
    """
    head = (hidden, weight, bias)
    request, *values = _run(
        *head, labels, targets, memory, softcap, logit_scale, options, report=True
    )
    return request.parts(*values)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    targets: SoftTargets | None,
    memory: int | str,
    softcap: float | None,
    logit_scale: float,
    options: LossOptions,
    *,
    report: bool,
) -> tuple[LossRequest, Tensor, Tensor, Tensor]:
    """What was asked, and (loss, CE_N, D_N) of it."""
    check_names("kd_linear_loss", options)
    _check(hidden, weight, bias, options.get("reduction", "mean"))
    check_number("logit_scale", logit_scale)
    check_number("softcap", softcap, optional=True)
    if not 0 < logit_scale < math.inf or not (softcap is None or 0 < softcap < math.inf):
        raise UsageError(
            f"logit_scale is {logit_scale}, softcap {softcap}; expected finite numbers above 0"
        )
    request = build_row_loss(hidden, len(weight), labels, targets, report=report, **options)
    check_ruled_out(request.rows, None if bias is None else bias.detach()[None])
    rows = dataclasses.replace(
        request.rows,
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
    )
    if request.engine == "triton":
        check_fits(hidden, rows)
    elif torch.compiler.is_compiling():  # with fullgraph=True an error, else a graph break
        raise UsageError(
            "engine 'torch' behind a head is nothing that torch.compile captures: call it outside "
            "of the compiled function, or use engine 'triton', which is one operator"
        )
    engine = None if request.engine == "triton" else torch_engine
    try:
        return request, *kd_linear.kd_linear_loss(
            hidden, weight, bias, rows, memory=memory_size(memory), engine=engine
        )
    # of memory, or of shapes: it says what it found and what it expected
    except ValueError as e:
        raise UsageError(str(e)) from e


def memory_size(memory: int | str) -> int:
    """Bytes of "512 MB", or the number itself; UsageError for what is no size."""
    if isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
        return memory
    if (found := bytes_of(str(memory))) is None:
        raise UsageError(
            f'memory is {str(memory)!r}; expected bytes, as 536870912, "512 MB" or "0.5 GiB"'
        )
    return found


def rows_in(memory: int | str, rows: int, classes: int, dtype: torch.dtype) -> int:
    """How many of these rows of logits go into one chunk; UsageError where not even one does."""
    try:
        return chunk_rows(rows, classes, dtype.itemsize, memory_size(memory))
    except ValueError as e:
        raise UsageError(str(e)) from None


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, reduction: str) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        check_tensor(name, tensor, "a floating tensor", optional=name == "bias")
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise UsageError(
            f"hidden is {list(hidden.shape)} of {hidden.dtype}; expected floating [N, H]: select "
            "the rows of a sequence first (the loss never shifts labels)"
        )
    if weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UsageError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; expected [N, H] and "
            "[V, H]"
        )
    if reduction == "none":
        raise UsageError(
            "reduction 'none' is not there behind a head, whose gradient is a sum over the rows; "
            "use 'mean' or 'sum', and kd_linear_loss_parts for what is reported"
        )
