"""Records in the order of the shards, as batches: the same ones with and without worker processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.spec import CacheSpec
from kdcache.data.collate import Collated, read_batch
from kdcache.data.padding import IGNORED
from kdcache.data.rows import NEXT_TOKEN, record_labels, select_rows
from kdcache.data.samples import Samples
from kdcache.data.workers import by_workers
from kdcache.errors import DataError

UNKNOWN = -1  # the label of a row without one, in a cache


@dataclass(frozen=True, slots=True)
class Span:
    """Samples [start, stop) of one view, all of one shard; `last` if they end it."""

    shard: int
    view: int
    start: int
    stop: int
    last: bool


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows of a batch, which the spec calls `one` per record or `ragged`.

    mask_BL bool and pos int64 [N] of ragged rows, else None; offsets int64 [B + 1]; labels int64
    [N, J], -1 unknown; label_weight float32 [N, J]; None where there are none. pos counts from a
    record's first real position.
    """

    offsets: npt.NDArray[np.int64]
    mask_BL: Tensor | None
    pos: npt.NDArray[np.int64] | None
    labels: Tensor | None
    label_weight: Tensor | None

    @property
    def count(self) -> int:
        return int(self.offsets[-1])


def spans(spec: CacheSpec, shards: Sequence[int], batch_size: int) -> list[Span]:
    """The batches of some shards: they start at a shard's first record and never span two shards."""
    out = []
    for index in shards:
        shard = spec.shard(index)
        for start in range(shard.start, shard.stop, batch_size):
            stop = min(start + batch_size, shard.stop)
            out.append(Span(index, shard.view, start, stop, stop == shard.stop))
    return out


def read(samples: Samples, view: int, ids: Sequence[int]) -> Collated:
    """One batch of some samples of a view."""
    return read_batch(samples, [(sample_id, view) for sample_id in ids])


class SpanBatch:
    """The batch of a span; the whole of what a worker process does."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, span: Span) -> Collated:
        return read(self.samples, span.view, range(span.start, span.stop))


def batches(
    samples: Samples,
    wanted: Sequence[Span],
    workers: int,
    check: Callable[[], object] | None = None,
) -> Generator[tuple[Span, Collated], None, None]:
    """(span, batch) in order. Worker processes start with the first `next()`; `check` is called
    while they are waited for, and what it raises ends the wait."""
    make = SpanBatch(samples)
    source: Any = (
        by_workers(make, lambda: wanted, workers, check)
        if workers
        else (make(span) for span in wanted)
    )
    with closing(source):
        yield from zip(wanted, source, strict=True)


def rows_of(
    batch: Collated, logits_shape: tuple[int, ...], row_mask: Tensor | None, convention: str
) -> BatchRows:
    """The rows of a batch whose model gave logits of that shape. DataError when labels do not fit
    them.
    """
    selection = select_rows(
        batch,
        logits_shape,
        convention,
        None if row_mask is None else row_mask.cpu(),
        logits_shape[-1],
    )
    if selection is None:
        labels, weight = record_labels(batch.labels, batch.label_weight, logits_shape[-1])
        if labels is not None:
            labels = torch.where(labels == IGNORED, UNKNOWN, labels).reshape(len(batch), -1)
        return BatchRows(np.arange(len(batch) + 1, dtype=np.int64), None, None, labels, weight)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(selection.counts_B, dtype=np.int64)])
    labels = None
    if convention == NEXT_TOKEN or batch.labels is not None:
        labels = torch.where(selection.labels_N == IGNORED, UNKNOWN, selection.labels_N)[:, None]
    weight = selection.weights_N
    return BatchRows(
        offsets,
        selection.mask_BL,
        selection.positions_N,
        labels,
        None if weight is None or labels is None else weight[:, None],
    )


def cached_rows_of(
    batch: Collated, logits_shape: tuple[int, ...], row_mask: Tensor | None, spec: CacheSpec
) -> BatchRows:
    """The rows of a batch that a cache keeps; of one that keeps features alone, a nameless one for
    each record.
    """
    if spec.kind == "none" and spec.rows == "one":
        return BatchRows(np.arange(len(batch) + 1, dtype=np.int64), None, None, None, None)
    return rows_of(batch, logits_shape, row_mask, spec.convention)


def check_labels(labels: Tensor, num_classes: int, name_row: Callable[[int], str]) -> None:
    """DataError naming the first row with a label that is no class and not -1 or -100 (unknown)."""
    bad = (labels >= num_classes) | (labels < UNKNOWN)
    if bool(bad.any()):
        row, j = bad.nonzero()[0].tolist()
        raise DataError(
            f"{name_row(row)}: its label is {int(labels[row, j])}; the teacher has {num_classes} "
            "classes: "
            f"expected 0 to {num_classes - 1}, or {UNKNOWN} or {IGNORED} for unknown (are they "
            "counted "
            "from 1, or those of another set of classes? --no-labels leaves them out)"
        )


def row_namer(span_view: int, sample_ids: Sequence[int], rows: BatchRows) -> Callable[[int], str]:
    """How errors call row n of a batch: by sample and view, and by its position in a sequence."""

    def name(n: int) -> str:
        record = int(np.searchsorted(rows.offsets, n, side="right")) - 1
        where = "" if rows.pos is None else f", position {int(rows.pos[n])}"
        return f"sample {sample_ids[record]}, view {span_view}{where}"

    return name
