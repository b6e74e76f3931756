"""The teacher over the records of some shards: each batch is answered, reduced on the device and
handed to the sink.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor, nn

from kdcache.cache.spec import CacheSpec
from kdcache.cache.writer import Writer
from kdcache.data.collate import Collated, beyond_tokens
from kdcache.data.reading import data_batches
from kdcache.data.row_selection import NEXT_TOKEN
from kdcache.data.samples import Samples
from kdcache.data.transfer import fetch, wait
from kdcache.errors import DataError
from kdcache.process.signals import Signals
from kdcache.teacher.answer import BatchRows, answer, convention_of, row_namer
from kdcache.teacher.hooks import FeatureHooks, check_shapes, requests_of
from kdcache.teacher.progress import Progress
from kdcache.teacher.reduce import reduce_rows
from kdcache.teacher.sink import HostBatch, Sink, Span, Totals
from kdcache.user.arguments import at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a dump is computed; nothing of it decides what a cache is."""

    batch_size: int = 32
    device: torch.device
    workers: int = 0
    engine: str = "torch"
    logits: int | None = None  # that the teacher gives, where some are cut

    def __post_init__(self) -> None:
        at_least("--batch-size", self.batch_size, 1)
        at_least("--workers", self.workers, 0)


def spans(spec: CacheSpec, shards: Sequence[int], batch_size: int) -> list[Span]:
    """The batches of some shards; they start at a shard's first record and never span two."""
    out = []
    for index in shards:
        shard = spec.shard(index)
        for start in range(shard.start, shard.stop, batch_size):
            stop = min(start + batch_size, shard.stop)
            out.append(Span(index, shard.view, start, stop, stop == shard.stop))
    return out


def run_teacher(
    module: nn.Module,
    samples: Samples,
    writer: Writer,
    shards: Sequence[int],
    compute: Compute,
    signals: Signals,
    progress: Callable[[Progress], None] | None,
) -> Totals:
    """Compute, write and commit `shards`. An error or a signal drops the open shard and leaves the
    others whole.
    """
    spec, start = writer.spec, monotonic()
    wanted = spans(spec, shards, compute.batch_size)
    total = sum(len(span.ids) for span in wanted)
    plan = [[(sample_id, span.view) for sample_id in span.ids] for span in wanted]
    sink = Sink(writer, signals.check)
    # The user's items are built in this thread or in worker processes, never in a thread of ours.
    source = data_batches(samples, lambda: plan, compute.workers, signals.check, by_thread=False)
    with closing(source):
        # worker processes fork here, before there is a second thread
        first = list(itertools.islice(source, 1))
        sink.start()
        try:
            with FeatureHooks(module, requests_of(spec.features)) as hooks:
                batches = itertools.chain(first, source)
                for span, batch in zip(wanted, batches, strict=True):
                    signals.check()
                    sink.put(observe(module, hooks, span, batch, spec, compute))
                    if progress is not None and span is not wanted[-1]:
                        progress(sink.totals.progress(total, monotonic() - start))
            sink.finish()
        finally:
            sink.stop()
    if progress is not None and wanted:
        progress(sink.totals.progress(total, monotonic() - start))
    return sink.totals


@torch.inference_mode()
def observe(
    module: nn.Module,
    hooks: FeatureHooks,
    span: Span,
    batch: Collated,
    spec: CacheSpec,
    compute: Compute,
) -> HostBatch:
    """What the teacher says about one batch, reduced and on the host. DataError names a sample it
    cannot be kept of.
    """
    if spec.tokens and (beyond := beyond_tokens(batch)):
        raise DataError(
            f"{span}: the teacher was given {beyond}; the first samples were asked about by their "
            "tokens alone, which this cache keeps in place of the data. Dump them to another --out "
            "with --no-tokens: students then take their inputs from --data"
        )
    said = answer(
        module, hooks, batch, convention_of(spec), compute.device, f"{span}, view {span.view}: "
    )
    check_shapes(spec.features, said.features, str(span))
    features = {name: fetch(x) for name, x in said.features.items()}
    reduced = None
    if spec.has_rows:
        name_row = row_namer(span.view, span.ids, said.rows)
        labels = _labels(said.rows, spec, name_row)
        logits_MV = said.logits.flatten(0, -2)
        _check_width(logits_MV.shape[1], spec, compute, name_row)
        if logits_MV.shape[1] > spec.num_classes and spec.convention == NEXT_TOKEN:
            _refuse_tokens(batch, spec.num_classes, span)
        mask_BL = said.rows.mask_BL
        index = None if mask_BL is None else mask_BL.flatten().nonzero()[:, 0]
        reduced = reduce_rows(
            logits_MV, labels, spec, index_N=index, name_row=name_row, engine=compute.engine
        )
    # free after reduce_rows, which has waited for the same device
    for x in said.features.values():
        wait(x.device)
    on_host = {name: x.numpy() for name, x in features.items()}
    return HostBatch(span, batch, said.rows, reduced, on_host)


def _labels(rows: BatchRows, spec: CacheSpec, name_row: Callable[[int], str]) -> Tensor | None:
    """The labels that a cache keeps of the rows of a batch; DataError for others than its first
    samples had.
    """
    if not spec.labels:
        return None
    found = None if rows.labels is None else rows.labels.shape[1]
    if (
        rows.labels is None
        or found != spec.labels
        or (rows.label_weight is not None) != spec.label_weights
    ):
        raise DataError(
            f"{name_row(0)}: its batch has {found or 'no'} labels a row; the first samples had "
            f"{spec.labels} {'with' if spec.label_weights else 'without'} label_weight"
        )
    return rows.labels


def _check_width(
    width: int, spec: CacheSpec, compute: Compute, name_row: Callable[[int], str]
) -> None:
    """DataError for a teacher that gives another number of logits than it gave first."""
    if width == (compute.logits or spec.num_classes):
        return
    cut = ""
    if (compute.logits or 0) > spec.num_classes:
        cut = f", the first of {compute.logits} logits"
    raise DataError(
        f"{name_row(0)}: the teacher gave {width} logits; the cache has {spec.num_classes} "
        f"classes{cut}"
    )


def _refuse_tokens(batch: Collated, num_classes: int, span: Span) -> None:
    """DataError for a token that --classes says is none: the next one of a position may be it."""
    for sample, tokens in zip(span.ids, batch.tokens, strict=False):
        wrong = (tokens >= num_classes).nonzero()[0]
        if len(wrong):
            raise DataError(
                f"sample {sample}, view {span.view}: its token {int(tokens[wrong[0]])} at position "
                f"{int(wrong[0])} is none of the {num_classes} of --classes; expected tokens below "
                "that"
            )
