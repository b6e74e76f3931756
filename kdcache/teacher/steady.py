"""Does a teacher give one answer to one question: asked again, and whatever shares its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.cache.columns import Array
from kdcache.data.collate import Collated, to_device
from kdcache.data.samples import Samples
from kdcache.errors import DataError
from kdcache.models import forward, trying, weights_dtype
from kdcache.teacher.batches import Span, read, rows_of

UNSTEADY = "unsteady"           # --accept it: no field of an identity; and the code of the warning
MOST_ROWS = 256                 # that are compared of a batch: with 256,000 classes 250 MiB as float32
TENSOR_FLOAT = 2.0**-10         # unit of TensorFloat-32, in which GPUs convolve float32 unless told otherwise
CHANCE = "Is something random on in eval mode, such as dropout without training=self.training?"
SHARED = "Does it normalise over the batch (BatchNorm without running statistics), or attend to padding?"


@dataclass(frozen=True, slots=True)
class Steadiness:
    """The most that logits of some rows differed by when asked again, and when their record was asked alone (None: of a
    batch of one record); what rounding can explain; `problem` says what it cannot, in a sentence."""

    again: float
    alone: float | None
    rounding: float
    problem: str | None = None


def unit(module: nn.Module, logits: torch.dtype, device: torch.device) -> float:
    """The coarsest unit of rounding on the way from weights to what is compared, which is float32: 2^-23 for that."""
    eps = max(torch.finfo(dtype).eps for dtype in (torch.float32, logits, weights_dtype(module) or logits))
    return max(float(eps), TENSOR_FLOAT) if device.type == "cuda" else float(eps)


def explained(size: float, eps: float) -> float:
    """The most that rounding is believed to move values of up to `size`: half of their digits, sqrt(eps) size.

    n roundings in a row that do not conspire move a value by sqrt(n) eps of its size: sqrt(eps) are 8 million of them
    in float32 and 128 in bfloat16, whose sums are kept in float32. What dropout or the statistics of a batch change
    lies in the first digit or two.
    """
    return math.sqrt(eps) * size


@torch.inference_mode()
def steadiness(module: nn.Module, samples: Samples, span: Span, device: torch.device) -> Steadiness | None:
    """Ask the teacher twice about the batch of `span`, and once about its shortest record alone; None without rows.

    It costs two forward passes of a batch and one of a record. The teacher is in eval mode and on `device`.
    """
    name, batch = type(module).__name__, read(samples, span.view, range(span.start, span.stop))
    logits_NV, offsets = _rows(module, batch, device)
    if not len(logits_NV):
        return None
    picked, counts_B = _evenly(len(logits_NV)), np.diff(offsets)
    one = int(np.where(counts_B > 0, counts_B, counts_B.max() + 1).argmin())
    own = _evenly(int(counts_B[one]))
    first, mine = logits_NV[picked].float(), logits_NV[offsets[one] + own].float()
    eps = unit(module, logits_NV.dtype, device)
    del logits_NV                       # before the next ones: rows of a large vocabulary are gigabytes
    again = _apart(first, _rows(module, batch, device)[0][picked].float())
    size = float(torch.cat([first, mine]).nan_to_num(0, 0, 0).abs().amax())
    rounding = explained(size, eps)
    known = f"; rounding explains {rounding:.3g} in values of up to {size:.3g}"
    if again > rounding:
        return Steadiness(again, None, rounding, f"the teacher ({name}) answers differently each time: asked twice "
                          f"about samples {span.start} to {span.stop - 1}, its logits differ by up to {again:.3g}"
                          f"{known}. {CHANCE}")
    if len(batch) == 1:
        return Steadiness(again, None, rounding)
    sample = span.start + one
    single = read(samples, span.view, [sample])
    try:
        alone_NV, _ = _rows(module, single, device)
    except DataError as e:
        return Steadiness(again, math.inf, rounding, f"{e}, which is sample {sample} alone. {SHARED}")
    alone = _apart(mine, alone_NV[own].float()) if len(alone_NV) == counts_B[one] else math.inf
    problem = None
    if alone > rounding:
        problem = (f"the teacher ({name}) answers by what shares its batch: the logits of sample {sample} differ by up "
                   f"to {alone:.3g} between a batch of {len(batch)} and alone{known}. {SHARED}")
    return Steadiness(again, alone, rounding, problem)


def _rows(module: nn.Module, batch: Collated, device: torch.device) -> tuple[Tensor, Array]:
    """The logits [N, V] of the rows of a batch that count, and the offsets [B + 1] of each record's."""
    inputs = to_device(batch.inputs, device)
    with trying("teacher", module, inputs):
        output = forward(module, inputs)
    rows = rows_of(batch, tuple(output.logits.shape), output.row_mask)
    logits_MV = output.logits.flatten(0, -2)
    return logits_MV if rows.mask_BL is None else logits_MV[rows.mask_BL.flatten().to(device)], rows.offsets


def _evenly(count: int) -> Array:
    """Up to MOST_ROWS of `count` rows, evenly spaced."""
    out: Array = np.unique(np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(np.int64))
    return out


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where one is and the other is not. Two NaNs are alike: the dump names them."""
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs()).nan_to_num(math.inf, math.inf)
    return float(apart.amax()) if apart.numel() else 0.0
