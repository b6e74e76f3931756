"""Logits on the device -> what is kept of each row, on the host: nothing of size V leaves the device for topk.

Every result is a function of its row alone; the chunk it falls in bounds memory and changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.spec import CacheSpec
from kdcache.errors import DataError
from kdcache.teacher.batches import check_labels
from kdcache.teacher.transfer import fetch, send, wait
from kdcache.topk import exact_topk, row_chunk, tail_lse

CHUNK_ELEMENTS = 2**24          # logits worked on at a time: 64 MiB as float32, about 256 MiB with all temporaries


NOT_A_NUMBER, INFINITE, EMPTY = 1, 2, 4         # what is wrong with a row, numbered as kernels/topk_lse.py does
FOUND = {NOT_A_NUMBER: "NaN", INFINITE: "+inf", EMPTY: "no finite logit"}


@dataclass(slots=True)
class Reduced:
    """What is kept of N rows. ids int64 [N, K]; logits float32 [N, K], or [N, V] in id order for kind full;
    tail_lse float32 [N, tiers, T]; label_logit float32 [N, J]; mean, std float32 [N]; top int64 [N], the id of a
    largest logit. None for what the spec does not store.
    """

    logits: Tensor
    top: Tensor
    ids: Tensor | None = None
    tail_lse: Tensor | None = None
    label_logit: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None


def reduce_rows(logits_MV: Tensor, labels_NJ: Tensor | None, spec: CacheSpec, *, index_N: Tensor | None = None,
                name_row: Callable[[int], str] = "row {}".format, chunk_rows: int | None = None) -> Reduced:
    """What `spec` (kind full or topk) keeps of rows of logits, on the CPU: K of V entries of each leave the device.

    logits_MV [M, >= V], any float dtype, on any device, sliced to V and upcast to float32. On the CPU: labels_NJ int64
    [N, J], -1 unknown, None when the spec stores none; index_N int64 [N] picks rows of the M, without it N = M.
    `chunk_rows` bounds temporaries. DataError with `name_row(n)` for a row with NaN or +inf, or without any finite
    logit, or with a label that is no class.

    The host waits for the device once, when all is done; for kind topk also to know that there is no NaN, for which
    the exact order has no place.
    """
    device, logits_MV = logits_MV.device, logits_MV[:, : spec.num_classes]
    if labels_NJ is not None:
        check_labels(labels_NJ, spec.num_classes, name_row)
        labels_NJ = send(labels_NJ, device)
    if index_N is not None:
        index_N = send(index_N, device)
    flag_N = _flags(logits_MV, index_N)
    if spec.kind == "topk":
        flag_N = flag_N.cpu()
        _refuse_bad(flag_N, logits_MV.dtype, name_row)
    kept = _in_chunks(logits_MV, labels_NJ, spec, index_N, chunk_rows)
    flag_N = fetch(flag_N)
    moved: list[Any] = [x if (x := getattr(kept, f.name)) is None else fetch(x) for f in fields(Reduced)]
    wait(device)
    _refuse_bad(flag_N, logits_MV.dtype, name_row)
    return Reduced(*moved)


def _flags(logits_MV: Tensor, index_N: Tensor | None) -> Tensor:
    """What is wrong with rows, 0 for nothing: int32 [N]. A maximum keeps NaN and +inf: one read and no copy of rows."""
    max_N = logits_MV.amax(-1).float()
    if index_N is not None:
        max_N = max_N[index_N]
    flag_N: Tensor = (NOT_A_NUMBER * max_N.isnan() + INFINITE * (max_N == torch.inf) + EMPTY * (max_N == -torch.inf))
    return flag_N.to(torch.int32)


def _refuse_bad(flag_N: Tensor, dtype: torch.dtype, name_row: Callable[[int], str]) -> None:
    """DataError naming the first row that is no distribution; flag_N is on the CPU."""
    bad = flag_N.nonzero()[:, 0]
    if not len(bad):
        return
    row = int(bad[0])
    advice = "float16 overflows above 65504: try --dtype float32" if dtype == torch.float16 else \
        "look at this sample and at the teacher's weights"
    raise DataError(f"{name_row(row)}: the teacher returned {FOUND[int(flag_N[row])]} ({len(bad)} such rows in this "
                    f"batch); {advice}. Nothing of its shard was kept; the same command goes on from there")


def _in_chunks(logits_MV: Tensor, labels_NJ: Tensor | None, spec: CacheSpec, index_N: Tensor | None,
               chunk_rows: int | None) -> Reduced:
    total = len(logits_MV) if index_N is None else len(index_N)
    step = chunk_rows or row_chunk(spec.num_classes, CHUNK_ELEMENTS)
    parts = []
    for at in range(0, max(total, 1), step):
        chunk = slice(at, min(at + step, total))
        part_NV = logits_MV[chunk] if index_N is None else logits_MV[index_N[chunk]]
        parts.append(_reduce_chunk(part_NV, None if labels_NJ is None else labels_NJ[chunk], spec))
    if len(parts) == 1:
        return parts[0]
    columns: list[list[Any]] = [[getattr(part, f.name) for part in parts] for f in fields(Reduced)]
    joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
    return Reduced(*joined)


def _reduce_chunk(logits_NV: Tensor, labels_NJ: Tensor | None, spec: CacheSpec) -> Reduced:
    mean_N, std_N = _moments(logits_NV) if spec.moments else (None, None)
    if spec.kind == "full":
        kept_NV = logits_NV.float()
        return Reduced(kept_NV, kept_NV.argmax(-1), mean=mean_N, std=std_N)
    ids_NK, kept_NK = exact_topk(logits_NV, spec.k)
    max_N = kept_NK[:, 0]
    temperatures = [float(t) for t in spec.temperatures]
    label_logit_NJ = None
    if labels_NJ is not None:
        label_logit_NJ = logits_NV.gather(1, labels_NJ.clamp(min=0)).float().masked_fill(labels_NJ < 0, -torch.inf)
    tails = []
    for k in spec.tiers:
        excluded_NE = ids_NK[:, :k] if labels_NJ is None else torch.cat([ids_NK[:, :k], labels_NJ], 1)
        tails.append(tail_lse(logits_NV, excluded_NE, max_N, temperatures))
    return Reduced(kept_NK, ids_NK[:, 0], ids_NK, torch.stack(tails, 1), label_logit_NJ, mean_N, std_N)


def _moments(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Population mean and standard deviation of the finite logits of each row, summed in float64."""
    # A lone row's sum is split over threads, two rows' are not: the bits of a row must not depend on its chunk.
    x_NV = logits_NV.double() if len(logits_NV) != 1 else logits_NV.double().repeat(2, 1)
    finite_NV = x_NV.isfinite()
    count_N = finite_NV.sum(-1)
    mean_N = x_NV.masked_fill(~finite_NV, 0).sum(-1) / count_N
    spread_NV = (x_NV - mean_N[:, None]).square_().masked_fill_(~finite_NV, 0)
    std_N = (spread_NV.sum(-1) / count_N).sqrt()
    return mean_N[: len(logits_NV)].float(), std_N[: len(logits_NV)].float()
