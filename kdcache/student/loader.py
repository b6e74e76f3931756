"""Batches for a student: inputs, labels, the teacher's rows and features, in order kd1. Its state
is one position.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.cache.columns import Array
from kdcache.cache.spec import CacheSpec, temperature_name
from kdcache.data.collate import Collated, read_batch
from kdcache.data.padding import Inputs, Padding
from kdcache.data.reading import Prefetch, data_batches, prefetchable, token_batch
from kdcache.data.row_selection import NEXT_TOKEN, POSITION, RECORD, label_evidence
from kdcache.data.samples import extremes
from kdcache.data.sources import as_samples
from kdcache.errors import DataError, UsageError
from kdcache.loss.targets import (
    SoftTargets,
    readable,
    stored_temperature,
    stored_tier,
    targets_from_logits,
    unpack_targets,
)
from kdcache.loss.tensor_arguments import check_device, check_temperature
from kdcache.models.checks import check_convention, padding_of, telling_records
from kdcache.models.model import forward, model_errors, move
from kdcache.process.ranks import refuse_ranks
from kdcache.student.batch import (
    BatchIndex,
    LoaderBatch,
    MicroBatch,
    RowPlaces,
    assemble,
    check_keys,
    find_features,
    needed_columns,
    student_rows,
    to_device,
)
from kdcache.student.cache_and_data import as_cache, cached_preprocessing
from kdcache.student.match import feature_tensors
from kdcache.student.order import Order
from kdcache.user.arguments import check_integer, check_workers
from kdcache.user.code_errors import entrance, in_one_line

if TYPE_CHECKING:
    from kdcache.cache.reader import Batch, Cache

# of a token cache, among which the shortest and the longest are looked for
TOKEN_RECORDS = 64


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The micro-batches of one optimizer step, in host memory, and the counts of labelled and of
    teacher rows in all. start, stop: positions.
    """

    step: int
    epoch: int
    start: int
    stop: int
    micro_batches: list[MicroBatch]
    counts: tuple[float, float]

    def __len__(self) -> int:
        return self.stop - self.start


class Loader:
    """Batches of `batch_size` records, every sample once an epoch.

    The first iteration begins at `start`. Each later one goes on where the one before it ends, or
    would have: with the next epoch's order and views. `set_epoch(e)` makes epoch e the next.

    cache          a Cache or its path; None for labels and inputs only (plain training on the same
                   batches)
    data           a dataset, `Samples` or a data SPEC with `data_args`; None takes the inputs from
                   the cache's tokens
    temperature    and k, of the targets; by default 2 (1 for token caches) and the largest tier
    epochs         passes over the samples, or max_steps; by default one epoch. Epoch e uses view e
                   modulo the views of the cache; without a cache, view e
    features       names of cached features to read
    targets        False reads nothing of the teacher's rows
    live_teacher   a module that is run on each batch, its logits in place of the cache's rows
    rows           "record", "position" or "next-token" (data/row_selection.py) where no cache says so; by
                   default what the labels of the first records say: of tokens with a label each,
                   "next-token" if these are the tokens
    model          the module that the batches are for: what its config says of padding and of a
                   decoder's start; by default input_ids are padded with the dataset's
                   `pad_token_id`, else 0
    accept         "view_key" overlooks that views are decoded otherwise than the teacher saw them
    num_classes    of the student, to check labels where no cache knows V
    classes        cuts the logits of the live teacher to the first so many; labels from there on
                   are no classes
    labels         False leaves those of the data unread, whatever they are; those of a cache that
                   keeps some are given, and compared with the data's

    NotBuilt in one of several processes (torchrun, or a process group of torch): each would see
    every sample. Each record's sample_key is computed again from the data: DataError naming the
    first that is not the cache's. Cached rows are read in a background thread; `workers` processes
    build inputs from the data.
    """

    @entrance
    def __init__(
        self,
        cache: Cache | str | Path | None = None,
        data: Any = None,
        *,
        batch_size: int,
        temperature: float | str | None = None,
        k: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: float | None = None,
        max_steps: int | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        features: Sequence[str] = (),
        targets: bool = True,
        start: int = 0,
        live_teacher: nn.Module | None = None,
        micro_batch_size: int | None = None,
        data_args: Mapping[str, Any] | None = None,
        rows: str | None = None,
        accept: Sequence[str] = (),
        num_classes: int | None = None,
        model: nn.Module | None = None,
        classes: int | None = None,
        labels: bool = True,
    ) -> None:
        refuse_ranks("a Loader")
        self.cache = cache = as_cache(cache)
        self.spec: CacheSpec | None = None if cache is None else cache.spec
        self.samples = as_samples(
            data,
            data_args,
            seed=0 if self.spec is None else self.spec.seed,
            labels=labels or (self.spec is not None and bool(self.spec.labels)),
            prepared=partial(cached_preprocessing, cache),
        )
        self._check_sources()
        check_convention(rows)
        self.rows, self.why = rows, "as asked"
        if (
            rows is not None
            and self.spec is not None
            and self.has_rows
            and rows != self.spec.convention
        ):
            raise UsageError(
                f"--rows {rows}: those of the cache are by {self.spec.convention}; leave it out"
            )
        self._padding = Padding()
        if self.samples is not None:
            self.samples.compares_raw = self.spec is not None and not self.spec.view_keys
        if model is not None:
            self.padding = padding_of(model, None if self.samples is None else self.samples.dataset)
        self.device = check_device(device)
        check_workers(workers)
        self.batch_size, self.micro_batch_size = check_sizes(batch_size, micro_batch_size)
        self.workers, self.accept, self.classes = workers, tuple(accept), classes
        first, last = self.spec.samples if self.spec is not None else (0, len(self.samples or ()))
        self.first, self.num_samples = first, last - first
        self.order = Order(self.num_samples, seed, shuffle)
        self.total = _total(epochs, max_steps, self.num_samples, self.batch_size)
        if not 0 <= start <= self.total:
            raise UsageError(
                f"start is {start}; expected a position from 0 to {self.total}, the end"
            )
        self.start = start
        self._next_pass = 0  # where the next iteration begins
        # called while a batch is waited for: it may raise
        self.check: Callable[[], object] | None = None
        self.teacher = live_teacher
        if live_teacher is not None:
            move(live_teacher, self.device, "live teacher")
            live_teacher.eval()
        self.reads_targets = (
            targets and self.teacher is None and self.spec is not None and self.spec.has_rows
        )
        self._check_names(num_classes, temperature, k)
        self.temperature = self._temperature(temperature)
        self.k = k
        # name of the temperature and tier that targets are unpacked at: checked here, once
        self._stored = temperature_name(self.temperature), k or 0
        if self.spec is not None and self.reads_targets:
            self._stored = self._stored[0], stored_tier(self.spec, k)
        if features and self.spec is None:
            raise UsageError("features are read from a cache; none is given")
        self.features = find_features(self.spec, features) if self.spec is not None else []
        self.columns = (
            []
            if self.spec is None
            else needed_columns(
                self.spec,
                targets=self.reads_targets,
                k=self.k,
                features=self.features,
                tokens=self.samples is None,
            )
        )
        known = self.spec.num_classes if self.spec is not None else 0
        self.num_classes = known or num_classes or classes

    def __len__(self) -> int:
        """Optimizer steps of the next iteration."""
        return -(-(self.total - self.start) // self.batch_size)

    @property
    def total_steps(self) -> int:
        return -(-self.total // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin with the order and the views of this epoch."""
        check_integer("epoch", epoch)
        if epoch < 0:
            raise UsageError(f"epoch is {epoch}; expected at least 0")
        self._next_pass = epoch * self.num_samples

    def __iter__(self) -> Generator[LoaderBatch, None, None]:
        base, start = self._next_pass, self.start
        self._next_pass, self.start = base + self.total, 0
        return self._batches(base, start)

    def _batches(self, base: int, start: int) -> Generator[LoaderBatch, None, None]:
        with closing(self.global_batches(base, start)) as batches:
            while (batch := self._guarded(batches)) is not None:
                for micro in batch.micro_batches:
                    yield self.to_device(micro)

    @in_one_line
    def _guarded(self, batches: Generator[GlobalBatch, None, None]) -> GlobalBatch | None:
        return next(batches, None)

    def global_batches(
        self, base: int = 0, start: int | None = None
    ) -> Generator[GlobalBatch, None, None]:
        """One for each optimizer step from `start` on, counted from position `base`; closing the
        iterator stops its background work.
        """
        at, micros = self.start if start is None else start, list[MicroBatch]()
        with closing(self._micro_batches(base, at)) as source:
            for micro in source:
                micros.append(micro)
                stop = micro.index.stop
                if micro.index.ends_step:
                    counts = sum(m.counts[0] for m in micros), sum(m.counts[1] for m in micros)
                    epoch = int(micros[0].index.epochs[0])
                    yield GlobalBatch(at // self.batch_size, epoch, at, stop, micros, counts)
                    at, micros = stop, []

    def to_device(self, micro: MicroBatch) -> LoaderBatch:
        """A micro-batch on the device, with features, and with targets unpacked there or made by
        the live teacher.
        """
        batch, columns = to_device(micro, self.device)
        cached: Any = (
            None if micro.cached is None else replace(micro.cached, columns=cast(Any, columns))
        )
        if self.features:
            names = [feature.name for feature in self.features]
            batch["features"] = feature_tensors(cached, names, spec=self.spec, device=self.device)
        if self.teacher is not None:
            batch["targets"] = self._live(self.teacher, micro, batch["inputs"], batch["rows"])
        elif self.spec is not None and self.reads_targets:
            batch["targets"] = unpack_targets(self.spec, cached, *self._stored, self.device)
        return batch

    def indices(self, start: int | None = None, base: int = 0) -> Iterator[BatchIndex]:
        """What stands where: the records of every micro-batch, from position `start` on, counted
        from `base`. Nothing is read.
        """
        at = self.start if start is None else start
        for epochs, samples in self.order.batches(at, self.total, self.batch_size, base):
            views = epochs
            if self.spec is not None:
                views = self.spec.views[0] + epochs % self.spec.num_views
            size = len(epochs)
            for a in range(0, size, self.micro_batch_size):
                b = min(a + self.micro_batch_size, size)
                yield BatchIndex(
                    epochs[a:b], samples[a:b] + self.first, views[a:b], at + b, b == size
                )
            at += size

    @property
    def padding(self) -> Padding:
        """What batches are padded with; set it to that of the model they are for before the first
        batch.
        """
        return self._padding if self.samples is None else self.samples.padding

    @padding.setter
    def padding(self, padding: Padding) -> None:
        self._padding = padding
        if self.samples is not None:
            self.samples.padding = padding

    @property
    def has_rows(self) -> bool:
        """Whether the cache says which rows there are."""
        return self.spec is not None and (self.spec.has_rows or self.spec.rows == "ragged")

    @property
    def convention(self) -> str:
        """Which rows there are: the cache's, as asked, or as the labels of the run's first records
        say.
        """
        if self.spec is not None and self.has_rows:
            return self.spec.convention
        if self.rows is None:
            self.rows = _by_labels(self.first_inputs())
        return self.rows

    def first_inputs(self, records: int = 8) -> Collated:
        """The inputs of the first few records of a run, read here and now."""
        index = next(self.indices(0)).first(records)
        return self._inputs(index, self._read(index) if self.samples is None else None)

    def telling(self, records: int = 8) -> list[int]:
        """Sample ids of a small batch with as much padding as is known of: the first few, the
        shortest, the longest.
        """
        first, last = self.first, self.first + self.num_samples
        if self.samples is not None:
            extreme = [i for i in extremes(self.samples) if first <= i < last]
        else:
            lengths = self.first_inputs(TOKEN_RECORDS).lengths
            assert lengths is not None
            known = next(self.indices(0)).first(TOKEN_RECORDS).sample_ids
            extreme = [int(known[lengths.argmin()]), int(known[lengths.argmax()])]
        ids = dict.fromkeys(next(self.indices(0)).first(records).sample_ids.tolist())
        return telling_records(list(ids), extreme if len(set(extreme)) > 1 else [])

    def inputs_of(self, sample_ids: Sequence[int], view: int = 0) -> Collated:
        """The inputs of some records, read here and now."""
        if self.samples is not None:
            return read_batch(self.samples, [(sample_id, view) for sample_id in sample_ids])
        assert self.cache is not None and self.spec is not None
        batch = self.cache.read(
            np.array([self.spec.record(self.spec.views[0] + view, i) for i in sample_ids]),
            ["sample_key", "token", "document_start"],
        )
        return token_batch(batch, self.padding)

    def peek(self, records: int = 8) -> MicroBatch:
        """The first few records of a run, read here and now, to check shapes with."""
        return self._here(next(self.indices(0)).first(records))

    def extremes(self) -> list[MicroBatch]:
        """The first micro-batch of a run, which is as large as any, and the smallest if it is
        smaller; read here and now."""
        # where the last step begins
        last = self.total - 1 - (self.total - 1) % self.batch_size
        first = next(self.indices(0))
        ends = [next(index for index in self.indices(at) if index.ends_step) for at in {0, last}]
        smallest = min((first, *ends), key=len)
        return [self._here(index) for index in (first, smallest)][: 1 + (smallest is not first)]

    def _micro_batches(self, base: int, start: int) -> Generator[MicroBatch, None, None]:
        """A thread reads ahead and assembles; inputs that it may not build join their cached rows
        here.
        """
        samples, indices = self.samples, partial(self.indices, start, base)
        if samples is None or (not self.workers and prefetchable(samples.dataset)):
            with Prefetch(map(self._here, indices()), check=self.check) as ahead:
                yield from ahead
            return
        data = data_batches(
            samples, lambda: (index.pairs for index in indices()), self.workers, self.check
        )
        reads = ((index, self._read(index)) for index in indices())
        with Prefetch(reads, check=self.check) as ahead_of, closing(data):
            for index, cached in ahead_of:
                yield self._finish(index, next(data), cached)

    def _here(self, index: BatchIndex) -> MicroBatch:
        cached = self._read(index)
        return self._finish(index, self._inputs(index, cached), cached)

    def _read(self, index: BatchIndex) -> Batch | None:
        """What the cache has of these records."""
        if self.cache is None:
            return None
        return self.cache.read(self._records(self.cache.spec, index), self.columns)

    def _inputs(self, index: BatchIndex, cached: Batch | None) -> Collated:
        """The inputs of these records, from the data, else from the tokens of the cache."""
        if self.samples is not None:
            return read_batch(self.samples, index.pairs)
        assert cached is not None  # _check_sources: there are tokens, or there is data
        return token_batch(cached, self.padding)

    def _finish(self, index: BatchIndex, collated: Collated, batch: Batch | None) -> MicroBatch:
        if batch is not None and self.samples is not None:
            try:
                check_keys(index, batch, collated, self.accept)
            except DataError:
                if self.cache is not None:  # before the data is blamed
                    self.cache.prove(batch.records)
                raise
        return assemble(
            index,
            collated,
            batch,
            spec=self.spec,
            from_data=self.samples is not None,
            convention=self.convention,
            targets=self.reads_targets or self.teacher is not None,
            num_classes=self.num_classes,
        )

    def prove(self, start: int, stop: int) -> None:
        """Read again every cached byte that the records of positions [start, stop) come from: for a
        step whose numbers cannot be. CacheCorrupt naming the file that has changed since it was
        proven."""
        if self.cache is None:
            return
        for index in self.indices(start):
            self.cache.prove(self._records(self.cache.spec, index))
            if index.stop >= stop:
                return

    def _records(self, spec: CacheSpec, index: BatchIndex) -> Array:
        """The numbers of these records in a cache."""
        records: Array = (index.views - spec.views[0]) * spec.num_samples + (
            index.sample_ids - self.first
        )
        return records

    # not inference mode: its tensors cannot take part in the student's backward
    @torch.no_grad()
    def _live(
        self, teacher: nn.Module, micro: MicroBatch, inputs: Inputs, rows: RowPlaces | None
    ) -> SoftTargets:
        with model_errors("live teacher", teacher, inputs):
            output = forward(teacher, inputs)
        logits_NV = student_rows(output, micro, rows)
        taught = self.spec.num_classes if self.spec is not None else 0
        if self.classes is not None:
            logits_NV = cut_logits(logits_NV, self.classes)
        if taught and logits_NV.shape[1] != taught:
            raise UsageError(
                f"the live teacher gives {logits_NV.shape[1]} logits, the cache is of {taught} "
                f"classes; where the rest is padding that nothing uses: classes={taught}"
            )
        return targets_from_logits(logits_NV, temperature=self.temperature, k=self.k)

    def _check_names(
        self, num_classes: int | None, temperature: float | str | None, k: int | None
    ) -> None:
        """UsageError for what is no such name or number, and for what would have no effect."""
        taught = 0 if self.spec is None else self.spec.num_classes
        if num_classes is not None and (num_classes < 1 or taught):
            raise UsageError(
                f"num_classes is {num_classes}; expected at least 1, and none where a cache knows "
                "its own"
            )
        if self.classes is not None and self.classes < max(1, taught):
            raise UsageError(
                f"classes is {self.classes}; expected at least {max(1, taught)}"
                + (", the classes of the cache" if taught else "")
            )
        if not self.reads_targets and self.teacher is None:
            for name, value in (("temperature", temperature), ("k", k)):
                if value is not None:
                    raise UsageError(
                        f"{name} is {value}, but no soft targets are read here: there is neither a "
                        "cache with rows whose targets are wanted nor a live teacher; leave it out"
                    )
        for name in self.accept:
            collates = self.samples is not None and self.samples.collates
            if name != "view_key" or self.spec is None or not (self.spec.view_keys or collates):
                raise UsageError(
                    f'accept is {name!r}; expected "view_key", of a cache that has view keys or of '
                    "data with a collate_fn"
                )

    def _check_sources(self) -> None:
        if self.samples is None and self.spec is None:
            raise UsageError("neither a cache nor data is given; there is nothing to train on")
        if self.samples is None and self.spec is not None and not self.spec.tokens:
            given = self.cache.identity.data.get("inputs") if self.cache is not None else None
            asked = (
                f" (the teacher was given {', '.join(map(str, given))})"
                if isinstance(given, list)
                else ""
            )
            raise UsageError(
                "the cache holds no tokens that are all the teacher was asked with, so the "
                f"student's inputs must come from the data{asked}: give --data"
            )
        if (
            self.samples is not None
            and self.spec is not None
            and len(self.samples) < self.spec.samples[1]
        ):
            raise UsageError(
                f"dataset {self.samples.name} has {len(self.samples)} samples; the cache is about "
                f"samples {self.spec.samples[0]} to {self.spec.samples[1] - 1}"
            )

    def _temperature(self, asked: float | str | None) -> float:
        temperature = default_temperature(self.spec) if asked is None else asked
        if self.spec is not None and self.reads_targets:
            return float(stored_temperature(self.spec, temperature))
        return float(check_temperature(temperature))


def _by_labels(batch: Collated) -> str:
    """The rows that labels speak of where no model is there to ask: of tokens with a label each,
    their next tokens if the labels are the tokens themselves or unknown; else each record is one.
    """
    if batch.ids_BL is None or (
        batch.labels is not None and batch.labels.shape != batch.ids_BL.shape
    ):
        return RECORD
    return POSITION if label_evidence(batch) in ("next", "other") else NEXT_TOKEN


def cut_logits(logits_NV: Tensor, classes: int) -> Tensor:
    """A live teacher's logits of the first so many classes. UsageError where it has fewer and, on
    the CPU, where one beyond is the largest of a row: it is no padding then."""
    if logits_NV.shape[1] < classes:
        raise UsageError(
            f"classes is {classes}, but the live teacher gives {logits_NV.shape[1]} logits"
        )
    kept_NV, rest_NV = logits_NV[:, :classes], logits_NV[:, classes:]
    if rest_NV.numel() and readable(rest_NV):
        wrong_N = rest_NV.amax(1) > kept_NV.amax(1)
        if bool(wrong_N.any()):
            raise UsageError(
                f"classes is {classes}, but the live teacher's largest logit of row "
                f"{int(wrong_N.nonzero()[0])} of a batch is beyond: it is no padding"
            )
    return kept_NV


def default_temperature(spec: CacheSpec | None) -> float:
    """Of soft targets, where nobody says: 1 for the rows of tokens, else 2."""
    return 1.0 if spec is not None and spec.rows == "ragged" else 2.0


def check_sizes(batch_size: int, micro: int | None) -> tuple[int, int]:
    if batch_size < 1 or (micro is not None and not 1 <= micro <= batch_size):
        raise UsageError(
            f"batch size {batch_size}, micro-batch size {micro}; expected at least 1, and the "
            "micro-batch no larger than the batch"
        )
    return batch_size, micro or batch_size


def _total(epochs: float | None, max_steps: int | None, num_samples: int, batch_size: int) -> int:
    """Positions in all."""
    if epochs is not None and max_steps is not None:
        raise UsageError(f"epochs is {epochs} and max_steps {max_steps}; give one of them")
    if max_steps is not None:
        if max_steps < 1:
            raise UsageError(f"max_steps is {max_steps}; expected at least 1")
        return max_steps * batch_size
    if epochs is not None and not 0 < epochs * num_samples < 2**62:  # nor NaN
        raise UsageError(
            f"epochs is {epochs}; expected a number of at least 1 / {num_samples}, the part of an "
            "epoch that one sample is"
        )
    total = round((1 if epochs is None else epochs) * num_samples)
    if total < 1:
        raise UsageError(f"epochs is {epochs}; {num_samples} samples make less than one of it")
    return total
