"""The chunks of `kd_linear`: rows go through one buffer of logits, whose size is a budget of bytes.

For each chunk of R rows one product writes its logits into the buffer, an engine turns them into
the gradient in place, and two products read that. Under about 800 rows the float32 gradient of the
head (8 V H bytes read and written a chunk) takes longer than the products of a chunk at H = 4096,
hence the default budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.kernels.row_loss import Engine, RowLoss

# rows of a chunk come in multiples of it, where that many fit: a tile of the products
WHOLE = 128
# float32 copies of a chunk's gradient, on a CPU, have a quarter of its columns
BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Job:
    """One call, checked: all but hidden states and head."""

    rows: RowLoss
    engine: Engine | None  # None: the fused kernels
    memory: int  # bytes of the logits of a chunk
    dtype: torch.dtype  # of logits and products
    wants: tuple[bool, ...]  # gradients of hidden, weight, bias


# loss, CE_N, D_N, and gradients of hidden [N, H] in the job's dtype, of weight and bias in float32;
# None: not wanted
Done = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Done:
    """The chunks: values and the gradients that are wanted."""
    h_NH, w_VH = hidden.detach().to(job.dtype), weight.detach().to(job.dtype)
    b_V = None if bias is None else bias.detach().to(job.dtype)
    total, width = len(h_NH), len(w_VH)
    step = chunk_rows(total, width, h_NH.element_size(), job.memory)
    # cuBLASLt adds a bias within the product where the result is contiguous; else torch writes the
    # bias into the chunk first, and the product reads it: 4 V bytes a row. Rows of whole vectors of
    # 16 bytes need no more between them.
    dense = b_V is not None and width * h_NH.element_size() % 16 == 0
    buffer = h_NH.new_empty((min(step, total), width if dense else row_stride(width)))
    dh_NH, dw_VH, db_V = _gradients(h_NH, w_VH, job)
    parts = []
    # without rows one chunk of none: all is checked and written
    for at in range(0, max(total, 1), step):
        chunk = slice(at, min(at + step, total))
        h_RH = h_NH[chunk]
        x_RV = buffer[: len(h_RH), :width]
        torch.mm(h_RH, w_VH.t(), out=x_RV) if b_V is None else torch.addmm(
            b_V, h_RH, w_VH.t(), out=x_RV
        )
        out, slope_RV = _chunk(x_RV, job.rows.rows(chunk), job)
        parts.append(out)
        if dh_NH is not None:
            torch.mm(slope_RV, w_VH, out=dh_NH[chunk])
        _add(dw_VH, db_V, slope_RV, h_RH, first=at == 0)
    loss_N, ce_N, kd_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return loss_N.sum(), ce_N, kd_N, dh_NH, dw_VH, db_V


def _gradients(
    h_NH: Tensor, w_VH: Tensor, job: Job
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Buffers of those that are wanted; the chunks fill them."""
    wide = torch.promote_types(job.dtype, torch.float32)
    return (
        torch.empty_like(h_NH, memory_format=torch.contiguous_format) if job.wants[0] else None,
        w_VH.new_empty(w_VH.shape, dtype=wide) if job.wants[1] else None,
        w_VH.new_zeros(len(w_VH), dtype=wide) if job.wants[2] else None,
    )


def _chunk(x_RV: Tensor, rows: RowLoss, job: Job) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(loss, CE, D) of these rows, and the gradient of their loss in place of the logits, if one is
    wanted.
    """
    wants = any(job.wants)
    # Hooks on saved tensors are the caller's: activation checkpointing would run all of its
    # function again for a chunk.
    with torch.set_grad_enabled(wants), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        leaf_RV = x_RV.detach().requires_grad_(wants)
        out = (job.engine or _fused())(leaf_RV, replace(rows, inplace=wants))
        slope_RV = (
            torch.autograd.grad(out[0], leaf_RV, torch.ones_like(out[0]))[0] if wants else x_RV
        )
    return (out[0].detach(), out[1].detach(), out[2].detach()), slope_RV


def _same(saved: Tensor) -> Tensor:
    return saved


def _fused() -> Engine:
    """Imported where it is called: another engine does without triton."""
    from kdcache.kernels.kd_loss_rows import kd_loss_rows

    return kd_loss_rows


def _add(
    dw_VH: Tensor | None, db_V: Tensor | None, slope_RV: Tensor, h_RH: Tensor, first: bool
) -> None:
    """Adds a chunk to the gradients of weight and bias; the first of the weight's is written, not
    added to zeros.
    """
    wide = torch.promote_types(slope_RV.dtype, torch.float32)
    # no product of a CPU has a dtype of its own for the sum
    if wide != slope_RV.dtype and not slope_RV.is_cuda:
        width, h_RH = max(-(-slope_RV.shape[1] // BLOCKS), 1), h_RH.to(wide)
        for at in range(0, slope_RV.shape[1], width):
            block = slice(at, at + width)
            _add(
                None if dw_VH is None else dw_VH[block],
                None if db_V is None else db_V[block],
                slope_RV[:, block].to(wide),
                h_RH,
                first,
            )
        return
    if dw_VH is not None:
        if not len(h_RH):
            dw_VH.zero_()
        elif wide == slope_RV.dtype:
            dw_VH.addmm_(slope_RV.t(), h_RH, beta=0 if first else 1)
        elif first:
            torch.mm(slope_RV.t(), h_RH, out_dtype=wide, out=dw_VH)
        else:
            torch.addmm(dw_VH, slope_RV.t(), h_RH, out_dtype=wide, out=dw_VH)
    if db_V is not None:
        db_V += slope_RV.sum(0, dtype=wide)


def row_stride(width: int) -> int:
    """Elements from row to row of the buffer: every row starts at 128 bytes, whatever the number of
    classes.
    """
    return -(-width // 64) * 64


def chunk_rows(rows: int, width: int, itemsize: int, memory: int) -> int:
    """Rows of a chunk, all chunks but the last alike; at least 1."""
    row = row_stride(width) * itemsize
    most = memory // row
    if most < 1:
        raise ValueError(
            f"memory is {memory} bytes, but the logits of a single row take {row}; give at least "
            f"{WHOLE} rows, {WHOLE * row} bytes (fast from about 1000 rows on)"
        )
    if most >= rows:
        return max(rows, 1)
    most = most // WHOLE * WHOLE or most
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // WHOLE) * WHOLE) if most >= WHOLE else even
