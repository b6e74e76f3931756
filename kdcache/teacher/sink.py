"""Reduced batches -> columns -> shards, on a thread of its own, so that the teacher never waits for
a disk.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kdcache.cache.codec import encode_rows
from kdcache.cache.columns import Array, Columns
from kdcache.cache.features import encode_feature
from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec
from kdcache.cache.writer import Writer
from kdcache.data.collate import Collated
from kdcache.errors import DataError
from kdcache.teacher.answer import BatchRows
from kdcache.teacher.progress import Progress
from kdcache.teacher.reduce import Reduced

WAITING_BATCHES = 4  # encoded behind the teacher; more only holds memory
# how soon a full queue notices a signal or an error on the other side
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Span:
    """Samples [start, stop) of one view, all of one shard; `last` if they end it."""

    shard: int
    view: int
    start: int
    stop: int
    last: bool

    @property
    def ids(self) -> range:
        return range(self.start, self.stop)

    def __str__(self) -> str:
        return f"samples {self.start} to {self.stop - 1}"


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One batch on the CPU: where it belongs, its keys and tokens, its rows, and what was kept of
    them.
    """

    span: Span
    batch: Collated
    rows: BatchRows
    reduced: Reduced | None
    features: dict[str, Array]


@dataclass(slots=True)
class Totals:
    """Sums over what was encoded; `measured` as the codec gives it, with the rows that have a label
    and those of them whose label is the teacher's first class."""

    records: int = 0
    rows: int = 0
    bytes: int = 0
    shards: int = 0
    measured: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """The mean over rows of one of the codec's sums."""
        rows = self.measured.get("rows")
        return self.measured[name] / rows if rows and name in self.measured else None

    @property
    def labelled(self) -> int:
        return int(self.measured.get("labelled", 0))

    @property
    def correct(self) -> int:
        return int(self.measured.get("correct", 0))

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    def by_temperature(self, what: str) -> dict[str, float]:
        """Temperature -> the mean of a measured sum, for the largest tier: "mass", "truncation", or
        "kl" of the codec.
        """
        names = [name for name in list(self.measured) if name.startswith(f"{what}:")]
        if what != "kl":
            largest = max((int(name.split(":")[1]) for name in names), default=0)
            names = [name for name in names if name.split(":")[1] == str(largest)]
        means = {name.rsplit(":", 1)[1]: self.mean(name) for name in names}
        return {temperature: mean for temperature, mean in means.items() if mean is not None}

    def progress(self, total: int, seconds: float) -> Progress:
        """These sums as a moment of a run over `total` records."""
        return Progress(
            self.records,
            total,
            seconds,
            self.bytes,
            self.by_temperature("mass"),
            self.by_temperature("truncation"),
            self.accuracy,
        )


class Sink:
    """Encodes batches, writes and commits each shard with its last batch. Batches of a shard come
    in order.
    """

    def __init__(self, writer: Writer, keep_waiting: Callable[[], None]) -> None:
        """`keep_waiting()` is called while a full queue is waited for; what it raises ends the
        wait.
        """
        self.totals = Totals()
        self._writer, self._keep_waiting = writer, keep_waiting
        self._queue: queue.Queue[HostBatch | None] = queue.Queue(WAITING_BATCHES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="kdcache-sink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, batch: HostBatch | None) -> None:
        """Hand one batch over, None after the last; raises what went wrong on the other side."""
        while True:
            self.check()
            try:
                return self._queue.put(batch, timeout=POLL_SECONDS)
            except queue.Full:
                self._keep_waiting()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until all is written."""
        self.put(None)
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            self._keep_waiting()
        self.check()

    def stop(self) -> None:
        """End the thread once it has written what it was given: whole shards stay, a begun one is
        dropped.
        """
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            self._thread.join()

    def _work(self) -> None:
        try:
            parts: list[Columns] = []
            measured: dict[str, float] = {}
            while (batch := self._queue.get()) is not None:
                columns, cost = encode(self._writer.spec, batch)
                cost = {**cost, **agreement(self._writer.spec, batch)}
                parts.append(columns)
                add(measured, cost)
                self._count(batch, columns, cost)
                if batch.span.last:
                    self._writer.write(batch.span.shard, join(self._writer.spec, parts), measured)
                    self.totals.shards += 1
                    parts, measured = [], {}
        except BaseException as e:  # handed to the thread that waits, whatever it is
            self._error = e

    def _count(self, batch: HostBatch, columns: Columns, measured: dict[str, float]) -> None:
        totals = self.totals
        totals.records += len(batch.span.ids)
        totals.rows += batch.rows.count
        totals.bytes += sum(array.nbytes for array in columns.values())
        add(totals.measured, measured)


def agreement(spec: CacheSpec, batch: HostBatch) -> dict[str, float]:
    """Rows of a batch with a label, and those where one of them is the teacher's first class; {} if
    the cache keeps no labels: nobody vouches for what the data has then."""
    if batch.reduced is None or batch.rows.labels is None or not spec.labels:
        return {}
    label_NJ = batch.rows.labels.numpy()
    return {
        "labelled": float((label_NJ >= 0).any(1).sum()),
        "correct": float((label_NJ == batch.reduced.top.numpy()[:, None]).any(1).sum()),
    }


def add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def encode(spec: CacheSpec, batch: HostBatch) -> tuple[Columns, dict[str, float]]:
    """The columns of one batch, and what the codec measured."""
    first = spec.record(batch.span.view, batch.span.start)
    offsets = batch.rows.offsets if spec.rows == "ragged" else None
    columns: Columns = {"sample_key": batch.batch.sample_key}
    measured: dict[str, float] = {}
    if spec.view_keys:
        assert batch.batch.view_key is not None
        columns["view_key"] = batch.batch.view_key
    levels = spec.layout.levels
    if "row" in levels:
        encoded = encode_rows(spec, _rows(spec, batch), first_record=first, offsets=offsets)
        columns, measured = columns | encoded.columns, encoded.measured
        if offsets is not None:
            columns["row.offsets"] = offsets
    if "token" in levels:
        columns |= _tokens(spec, batch.batch, first)
    for feature in spec.features:
        columns |= encode_feature(
            feature,
            batch.features[feature.name],
            first_record=first,
            offsets=offsets if feature.level == "row" else None,
        )
    return columns, measured


def _rows(spec: CacheSpec, batch: HostBatch) -> Rows:
    pos = batch.rows.pos if spec.rows == "ragged" else None
    kept = batch.reduced
    if kept is None:
        return Rows(pos=pos)
    ids, tail, label_logit, mean, std = (
        None if x is None else x.numpy()
        for x in (kept.ids, kept.tail_lse, kept.label_logit, kept.mean, kept.std)
    )
    label, weight = (
        None if x is None or not spec.labels else x.numpy()
        for x in (batch.rows.labels, batch.rows.label_weight)
    )
    return Rows(
        logits=kept.logits.numpy(),
        ids=ids,
        tail_lse=tail,
        label=label,
        label_weight=weight,
        label_logit=label_logit,
        mean=mean,
        std=std,
        pos=pos,
    )


def _tokens(spec: CacheSpec, batch: Collated, first_record: int) -> Columns:
    dtype = spec.layout.columns["token"].storage
    tokens, starts = batch.tokens, batch.document_starts
    offsets = np.concatenate(
        [np.zeros(1, np.int64), np.cumsum([len(t) for t in tokens], dtype=np.int64)]
    )
    flat = np.concatenate(tokens).astype(np.int64)
    bad = (flat < 0) | (flat > np.iinfo(dtype).max)
    if bad.any():
        at = int(bad.argmax())
        raise DataError(
            f"record {first_record + int(np.searchsorted(offsets, at, side='right')) - 1}: token "
            f"{int(flat[at])} does not fit {dtype}; expected 0 to {np.iinfo(dtype).max}"
        )
    start = np.concatenate(starts).astype(np.uint8) if starts else np.zeros(len(flat), np.uint8)
    return {"token": flat.astype(dtype), "document_start": start, "token.offsets": offsets}


def join(spec: CacheSpec, parts: list[Columns]) -> Columns:
    """The columns of a whole shard from those of its batches."""
    out: Columns = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if not name.endswith(".offsets"):
            out[name] = np.concatenate(arrays)
            continue
        ends = np.cumsum([0, *(int(array[-1]) for array in arrays)])
        out[name] = np.concatenate(
            [arrays[0][:1], *(a[1:] + end for a, end in zip(arrays, ends[:-1], strict=True))]
        )
    return out
