"""The teacher over the records of some shards: forward, reduce on the device, hand over to the
sink.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

import torch
from torch import nn

from kdcache.cache.spec import CacheSpec
from kdcache.cache.writer import Writer
from kdcache.data.collate import Collated, beyond_tokens, to_device
from kdcache.data.rows import NEXT_TOKEN
from kdcache.data.samples import Samples
from kdcache.errors import DataError, UsageError
from kdcache.models.model import forward, trying
from kdcache.process.signals import Signals
from kdcache.teacher.batches import BatchRows, Span, batches, cached_rows_of, row_namer, spans
from kdcache.teacher.features import Taps, check_shapes, requests_of
from kdcache.teacher.progress import Progress
from kdcache.teacher.reduce import reduce_rows
from kdcache.teacher.sink import HostBatch, Sink, Totals
from kdcache.teacher.transfer import fetch, wait
from kdcache.user.guard import users_code


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a dump is computed; nothing of it decides what a cache is."""

    batch_size: int = 32
    device: torch.device
    workers: int = 0
    engine: str = "torch"
    logits: int | None = None  # that the teacher gives, where some are cut


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; afterwards its submodules are as they were. UsageError for one that
    stays in training.
    """
    with users_code(f"the teacher ({type(module).__name__}) cannot be put in eval mode"):
        before = {name: part.training for name, part in module.named_modules()}
        module.eval()
    try:
        still = [
            name or type(module).__name__ for name, part in module.named_modules() if part.training
        ]
        if still:
            raise UsageError(
                f"the teacher's {still[0]} stays in training mode after eval(); a teacher must be "
                "deterministic: do not override train() or eval()"
            )
        yield
    finally:
        for name, part in module.named_modules():
            part.training = before.get(name, part.training)


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
    total = sum(span.stop - span.start for span in wanted)
    source = batches(samples, wanted, compute.workers, signals.check)
    # worker processes fork here, before there is a second thread
    first = list(itertools.islice(source, 1))
    sink = Sink(writer, signals.check)
    sink.start()
    try:
        with Taps(module, requests_of(spec.features), by_row=spec.rows == "ragged") as taps:
            for span, batch in itertools.chain(first, source):
                signals.check()
                sink.put(observe(module, taps, span, batch, spec, compute))
                if progress is not None and span is not wanted[-1]:
                    progress(snapshot(sink.totals, total, monotonic() - start))
        sink.finish()
    finally:
        sink.stop()
        source.close()
    if progress is not None and wanted:
        progress(snapshot(sink.totals, total, monotonic() - start))
    return sink.totals


@torch.inference_mode()
def observe(
    module: nn.Module, taps: Taps, span: Span, batch: Collated, spec: CacheSpec, compute: Compute
) -> HostBatch:
    """What the teacher says about one batch, reduced and on the host. DataError names a sample it
    cannot be kept of.
    """
    inputs = to_device(batch.inputs, compute.device, non_blocking=True)
    taps.start(batch.real)
    with trying(
        "teacher", module, inputs, f"samples {span.start} to {span.stop - 1}, view {span.view}: "
    ):
        output = forward(module, inputs)
    if spec.tokens and (beyond := beyond_tokens(batch)):
        raise DataError(
            f"samples {span.start} to {span.stop - 1}: the teacher was given {beyond}; the first "
            "samples "
            "were asked about by their tokens alone, which this cache keeps in place of the data. "
            "Dump "
            "them to another --out with --no-tokens: students then take their inputs from --data"
        )
    try:
        rows = cached_rows_of(batch, tuple(output.logits.shape), output.row_mask, spec)
    except DataError as e:
        raise DataError(f"samples {span.start} to {span.stop - 1}, view {span.view}: {e}") from e
    taken = taps.take(rows.mask_BL)
    check_shapes(spec.features, taken, f"samples {span.start} to {span.stop - 1}")
    features = {name: fetch(x) for name, x in taken.items()}
    reduced = None
    if spec.kind != "none":
        name_row = row_namer(span.view, range(span.start, span.stop), rows)
        labels = _labels(rows, spec, name_row)
        logits_MV = output.logits.flatten(0, -2)
        if logits_MV.shape[1] != (compute.logits or spec.num_classes):
            cut = (
                f", the first of {compute.logits} logits"
                if (compute.logits or 0) > spec.num_classes
                else ""
            )
            raise DataError(
                f"{name_row(0)}: the teacher gave {logits_MV.shape[1]} logits; the cache has "
                f"{spec.num_classes} classes{cut}"
            )
        if logits_MV.shape[1] > spec.num_classes and spec.convention == NEXT_TOKEN:
            _refuse_tokens(batch, spec.num_classes, span)
        index = None if rows.mask_BL is None else rows.mask_BL.flatten().nonzero()[:, 0]
        reduced = reduce_rows(
            logits_MV, labels, spec, index_N=index, name_row=name_row, engine=compute.engine
        )
    # free after reduce_rows, which has waited for the same device
    for x in taken.values():
        wait(x.device)
    return HostBatch(span, batch, rows, reduced, {name: x.numpy() for name, x in features.items()})


def _refuse_tokens(batch: Collated, num_classes: int, span: Span) -> None:
    """DataError for a token that --classes says is none: the next one of a position may be it."""
    for sample, tokens in zip(range(span.start, span.stop), batch.tokens, strict=False):
        wrong = (tokens >= num_classes).nonzero()[0]
        if len(wrong):
            raise DataError(
                f"sample {sample}, view {span.view}: its token {int(tokens[wrong[0]])} at position "
                f"{int(wrong[0])} is none of the {num_classes} of --classes; expected tokens below "
                "that"
            )


def _labels(
    rows: BatchRows, spec: CacheSpec, name_row: Callable[[int], str]
) -> torch.Tensor | None:
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


def snapshot(totals: Totals, total: int, seconds: float) -> Progress:
    """The progress that the sums of a run say."""
    covered, truncation = running(totals, "mass"), running(totals, "truncation")
    return Progress(
        totals.records, total, seconds, totals.bytes, covered, truncation, totals.accuracy
    )


def running(totals: Totals, what: str) -> dict[str, float]:
    """Mean of a measured sum by temperature, of the largest tier: "mass", "truncation", or "kl" of
    the codec.
    """
    names = [name for name in list(totals.measured) if name.startswith(f"{what}:")]
    if what != "kl":
        largest = max((int(name.split(":")[1]) for name in names), default=0)
        names = [name for name in names if name.split(":")[1] == str(largest)]
    means = {name.rsplit(":", 1)[1]: totals.mean(name) for name in names}
    return {temperature: mean for temperature, mean in means.items() if mean is not None}
