"""Logits on the device -> what is kept of each row, on the host: nothing of size V leaves the
device for topk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.spec import CacheSpec
from kdcache.errors import DataError
from kdcache.teacher.batches import check_labels
from kdcache.teacher.engine import Reduced, torch_rows
from kdcache.teacher.fused import fused_rows
from kdcache.teacher.transfer import fetch, send, wait

# what is wrong with a row, numbered as kernels/topk_lse.py does
NOT_A_NUMBER, INFINITE, EMPTY = 1, 2, 4
FOUND = {NOT_A_NUMBER: "NaN", INFINITE: "+inf", EMPTY: "no finite logit"}


def reduce_rows(
    logits_MV: Tensor,
    labels_NJ: Tensor | None,
    spec: CacheSpec,
    *,
    index_N: Tensor | None = None,
    name_row: Callable[[int], str] = "row {}".format,
    engine: str = "torch",
    chunk_rows: int | None = None,
) -> Reduced:
    """What `spec` (kind full or topk) keeps of rows of logits, on the CPU: K of V entries of each
    leave the device.

    logits_MV [M, >= V], any float dtype, on any device, cut to V and upcast to float32; DataError
    for a row in which one that is cut is among the K largest (of kind full: is the largest). On the
    CPU: labels_NJ int64 [N, J], -1 unknown, None when the spec stores none; index_N int64 [N] picks
    rows of the M, each once, without it N = M. engine "triton" is the fused kernel for kind topk
    (see `fused.check_fits`); a full row is kept as it is, by torch, whose temporaries `chunk_rows`
    bounds. DataError with `name_row(n)` for a row with NaN or +inf, or without any finite logit, or
    with a label that is no class.

    The host waits for the device once, when all is done; for topk by torch also to know that there
    is no NaN, for which its exact order has no place.
    """
    device, cut_ME, logits_MV = (
        logits_MV.device,
        logits_MV[:, spec.num_classes :],
        logits_MV[:, : spec.num_classes],
    )
    if labels_NJ is not None:
        check_labels(labels_NJ, spec.num_classes, name_row)
    if engine == "triton" and spec.kind == "topk":
        kept, flag_N = fused_rows(logits_MV, labels_NJ, spec, index_N)
    else:
        labels_NJ, index_N = (None if x is None else send(x, device) for x in (labels_NJ, index_N))
        flag_N = _flags(logits_MV, index_N)
        if spec.kind == "topk":
            flag_N = flag_N.cpu()
            _refuse_bad(flag_N, logits_MV.dtype, name_row)
        kept = torch_rows(logits_MV, labels_NJ, spec, index_N, chunk_rows)
    beyond_N = fetch(_beyond(cut_ME, kept, index_N)) if cut_ME.shape[1] else None
    flag_N = fetch(flag_N)
    moved: list[Any] = [
        x if (x := getattr(kept, f.name)) is None else fetch(x) for f in fields(Reduced)
    ]
    wait(device)
    _refuse_bad(flag_N, logits_MV.dtype, name_row)
    if beyond_N is not None and bool(beyond_N.any()):
        where = (
            f"among the teacher's {spec.k} largest"
            if spec.kind == "topk"
            else "the teacher's largest"
        )
        raise DataError(
            f"{name_row(int(beyond_N.nonzero()[0]))}: a logit beyond the {spec.num_classes} of "
            "--classes "
            f"is {where} ({int(beyond_N.sum())} such rows in this batch): it is no padding; give "
            "more "
            "classes, or none"
        )
    return Reduced(*moved)


def _beyond(cut_ME: Tensor, kept: Reduced, index_N: Tensor | None) -> Tensor:
    """bool [N]: rows in which a logit that is cut would be kept; of equal ones the lower id is, so
    these stay out.
    """
    largest_N = cut_ME.amax(1).float()
    if index_N is not None:
        largest_N = largest_N[index_N.to(largest_N.device)]
    return largest_N > (kept.logits[:, -1] if kept.ids is not None else kept.logits.amax(1))


def _flags(logits_MV: Tensor, index_N: Tensor | None) -> Tensor:
    """What is wrong with rows, 0 for nothing: int32 [N]. A maximum keeps NaN and +inf: one read and
    no copy of rows.
    """
    max_N = logits_MV.amax(-1).float()
    if index_N is not None:
        max_N = max_N[index_N]
    flag_N: Tensor = (
        NOT_A_NUMBER * max_N.isnan()
        + INFINITE * (max_N == torch.inf)
        + EMPTY * (max_N == -torch.inf)
    )
    return flag_N.to(torch.int32)


def _refuse_bad(flag_N: Tensor, dtype: torch.dtype, name_row: Callable[[int], str]) -> None:
    """DataError naming the first row that is no distribution; flag_N is on the CPU."""
    bad = flag_N.nonzero()[:, 0]
    if not len(bad):
        return
    row = int(bad[0])
    advice = (
        "float16 overflows above 65504: try --dtype float32"
        if dtype == torch.float16
        else "look at this sample and at the teacher's weights"
    )
    raise DataError(
        f"{name_row(row)}: the teacher returned {FOUND[int(flag_N[row])]} ({len(bad)} such rows in "
        "this "
        f"batch); {advice}. Nothing of its shard was kept; the same command goes on from there"
    )
