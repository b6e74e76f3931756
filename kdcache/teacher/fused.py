"""The fused kernel as an engine of the reduction: `kernels/topk_lse.py` in the words of
`reduce_rows`.

Ids and logits are those of torch, bit for bit; sums differ in their last bits. These also depend on
where a row starts within 16 bytes, which is its place in the batch if a row is no whole number of
16 bytes: equal batches, equal bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.cache.spec import CacheSpec
from kdcache.loss.engines import check_device, refuse
from kdcache.teacher.engine import Reduced
from kdcache.teacher.transfer import send


def check_fits(spec: CacheSpec, dtype: torch.dtype, device: torch.device) -> None:
    """UsageError where the kernel cannot take the rows of a spec (kind topk); nothing falls back to
    another engine.
    """
    check_device(device)
    from kdcache.kernels.topk_lse import DTYPES, MOST_K, MOST_LABELS, topk_lse

    if dtype not in DTYPES:
        refuse(f"the teacher's logits are {dtype}")
    if spec.k > MOST_K:
        refuse(f"k is {spec.k}; the kernel keeps at most {MOST_K}")
    if spec.labels > MOST_LABELS:
        refuse(f"the data has {spec.labels} labels a row; the kernel takes at most {MOST_LABELS}")
    try:
        topk_lse(
            torch.empty(0, spec.num_classes, dtype=dtype, device=device),
            spec.k,
            _temperatures(spec),
        )
    except ValueError as e:  # of classes and temperatures it says itself what it takes
        refuse(str(e))


def fused_rows(
    logits_MV: Tensor, labels_NJ: Tensor | None, spec: CacheSpec, index_N: Tensor | None
) -> tuple[Reduced, Tensor]:
    """(what the spec keeps, what is wrong with the rows: int32 [N], 0 for nothing), on the device,
    not waited for.

    logits_MV [M, V] on the device, labels and index on the CPU. All M rows are reduced and N of
    them kept: the kernel reads a row once, a copy of the rows wanted would read and write them
    before.
    """
    from kdcache.kernels.topk_lse import tier_tails, topk_lse

    device, temperatures = logits_MV.device, _temperatures(spec)
    if labels_NJ is not None:
        if index_N is not None:
            labels_NJ = labels_NJ.new_full((len(logits_MV), labels_NJ.shape[1]), -1).index_copy_(
                0, index_N, labels_NJ
            )
        labels_NJ = send(labels_NJ, device)
    kept = topk_lse(logits_MV, spec.k, temperatures, labels_NJ, spec.moments)
    tails = tier_tails(kept, spec.tiers, temperatures, labels_NJ)
    columns: list[Any] = [
        kept.values_NK,
        kept.ids_NK[:, 0],
        kept.ids_NK,
        tails,
        kept.label_logit_NJ,
        kept.mean_N,
        kept.std_N,
        kept.flag_N,
    ]
    if index_N is not None:
        index_N = send(index_N, device)
        columns = [None if x is None else x[index_N] for x in columns]
    return Reduced(*columns[:-1]), columns[-1]


def _temperatures(spec: CacheSpec) -> list[float]:
    return [float(t) for t in spec.temperatures]
