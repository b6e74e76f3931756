"""The torch engine of the reduction: what is kept of rows of logits, in chunks that bound memory
and change no bit.

Every result is a function of its row alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.spec import CacheSpec
from kdcache.loss.topk import exact_topk, row_chunk, tail_lse

# logits worked on at a time: 64 MiB as float32, about 256 MiB with all temporaries
CHUNK_ELEMENTS = 2**24


@dataclass(slots=True)
class Reduced:
    """What is kept of N rows. ids int64 [N, K]; logits float32 [N, K], or [N, V] in id order for
    kind full; tail_lse float32 [N, tiers, T]; label_logit float32 [N, J]; mean, std float32 [N];
    top int64 [N], the id of a largest logit. None for what the spec does not store.
    """

    logits: Tensor
    top: Tensor
    ids: Tensor | None = None
    tail_lse: Tensor | None = None
    label_logit: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None


def torch_rows(
    logits_MV: Tensor,
    labels_NJ: Tensor | None,
    spec: CacheSpec,
    index_N: Tensor | None,
    chunk_rows: int | None,
) -> Reduced:
    """What a spec keeps of rows of logits [M, V], all on one device; index_N picks N of them, each
    once.

    For kind topk no row has NaN. `chunk_rows` instead of what CHUNK_ELEMENTS allows.
    """
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
        label_logit_NJ = (
            logits_NV.gather(1, labels_NJ.clamp(min=0))
            .float()
            .masked_fill(labels_NJ < 0, -torch.inf)
        )
    tails = []
    for k in spec.tiers:
        excluded_NE = (
            ids_NK[:, :k] if labels_NJ is None else torch.cat([ids_NK[:, :k], labels_NJ], 1)
        )
        tails.append(tail_lse(logits_NV, excluded_NE, max_N, temperatures))
    return Reduced(
        kept_NK, ids_NK[:, 0], ids_NK, torch.stack(tails, 1), label_logit_NJ, mean_N, std_N
    )


def _moments(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Population mean and standard deviation of the finite logits of each row, summed in float64."""
    # A lone row's sum is split over threads, two rows' are not: the bits of a row must not depend
    # on its chunk.
    x_NV = logits_NV.double() if len(logits_NV) != 1 else logits_NV.double().repeat(2, 1)
    finite_NV = x_NV.isfinite()
    count_N = finite_NV.sum(-1)
    mean_N = x_NV.masked_fill(~finite_NV, 0).sum(-1) / count_N
    spread_NV = (x_NV - mean_N[:, None]).square_().masked_fill_(~finite_NV, 0)
    std_N = (spread_NV.sum(-1) / count_N).sqrt()
    return mean_N[: len(logits_NV)].float(), std_N[: len(logits_NV)].float()
