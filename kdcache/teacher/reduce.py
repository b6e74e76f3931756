"""Logits on the device -> what is kept of each row, on the host: nothing of size V leaves the
device for topk.

Two engines reduce rows. Plain torch works in chunks that bound memory and change no bit: every
result is a function of its row alone. The fused kernel (kernels/topk_lse.py) gives the ids and
logits of torch, bit for bit; its sums differ in their last bits. These also depend on where a row
starts within 16 bytes, which is its place in the batch if a row is no whole number of 16 bytes:
equal batches, equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.spec import CacheSpec
from kdcache.data.padding import IGNORED
from kdcache.data.transfer import fetch, send, wait
from kdcache.errors import DataError
from kdcache.loss.engines import check_device, refuse
from kdcache.loss.topk import exact_topk, row_chunk, tail_lse

# logits worked on at a time: 64 MiB as float32, about 256 MiB with all temporaries
CHUNK_ELEMENTS = 2**24
UNKNOWN = -1  # the label of a row without one, in a cache
# what is wrong with a row, numbered as kernels/topk_lse.py does
NOT_A_NUMBER, INFINITE, EMPTY = 1, 2, 4
FOUND = {NOT_A_NUMBER: "NaN", INFINITE: "+inf", EMPTY: "no finite logit"}


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
    if engine == "triton" and spec.is_sparse:
        kept, flag_N = fused_rows(logits_MV, labels_NJ, spec, index_N)
    else:
        sent = send({"labels": labels_NJ, "index": index_N}, device)
        labels_NJ, index_N = sent.get("labels"), sent.get("index")
        flag_N = _flags(logits_MV, index_N)
        if spec.is_sparse:
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
            f"among the teacher's {spec.k} largest" if spec.is_sparse else "the teacher's largest"
        )
        raise DataError(
            f"{name_row(int(beyond_N.nonzero()[0]))}: a logit beyond the {spec.num_classes} of "
            f"--classes is {where} ({int(beyond_N.sum())} such rows in this batch): it is no "
            "padding; give more classes, or none"
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
        f"this batch); {advice}. Nothing of its shard was kept; the same command goes on from there"
    )


def check_labels(labels: Tensor, num_classes: int, name_row: Callable[[int], str]) -> None:
    """DataError naming the first row with a label that is no class and not -1 or -100 (unknown)."""
    bad = (labels >= num_classes) | (labels < UNKNOWN)
    if bool(bad.any()):
        row, j = bad.nonzero()[0].tolist()
        raise DataError(
            f"{name_row(row)}: its label is {int(labels[row, j])}; the teacher has {num_classes} "
            f"classes: expected 0 to {num_classes - 1}, or {UNKNOWN} or {IGNORED} for unknown (are "
            "they counted from 1, or those of another set of classes? --no-labels leaves them out)"
        )


# ---- the engine of plain torch


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
    if not spec.is_sparse:
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
    """Population mean and standard deviation of each row's finite logits, summed in float64."""
    # A lone row's sum is split over threads, two rows' are not: the bits of a row must not depend
    # on its chunk.
    x_NV = logits_NV.double() if len(logits_NV) != 1 else logits_NV.double().repeat(2, 1)
    finite_NV = x_NV.isfinite()
    count_N = finite_NV.sum(-1)
    mean_N = x_NV.masked_fill(~finite_NV, 0).sum(-1) / count_N
    spread_NV = (x_NV - mean_N[:, None]).square_().masked_fill_(~finite_NV, 0)
    std_N = (spread_NV.sum(-1) / count_N).sqrt()
    return mean_N[: len(logits_NV)].float(), std_N[: len(logits_NV)].float()


# ---- the fused kernel


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
        labels_NJ = send({"labels": labels_NJ}, device)["labels"]
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
        index_N = send({"index": index_N}, device)["index"]
        columns = [None if x is None else x[index_N] for x in columns]
    return Reduced(*columns[:-1]), columns[-1]


def _temperatures(spec: CacheSpec) -> list[float]:
    return [float(t) for t in spec.temperatures]
