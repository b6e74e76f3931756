"""Where a batch's inputs come from: the user's dataset, by this process or by workers, or the cache's own tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from kdcache.data.collate import Collated, collated_tokens, read_batch
from kdcache.data.padding import Padding
from kdcache.data.samples import Samples
from kdcache.errors import DataError, KDCacheError
from kdcache.student.prefetch import Prefetch

if TYPE_CHECKING:
    from kdcache.cache.reader import Batch

Pairs = list[tuple[int, int]]                       # (sample_id, view) of each record of a batch


class Fetch:
    """Pairs -> a batch; the whole of what a worker process does."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, pairs: Pairs) -> Collated:
        return read_batch(self.samples, pairs)

    def __getitems__(self, pairs: Pairs) -> Collated | KDCacheError:
        """Our errors as values: a DataLoader would wrap their one clear line in a worker's traceback."""
        try:
            return self(pairs)
        except KDCacheError as e:
            return e


class _Plan:
    """The batches of a run as what a DataLoader calls a batch sampler."""

    def __init__(self, make: Callable[[], Iterable[Pairs]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Pairs]:
        return iter(self.make())


def data_batches(samples: Samples, plan: Callable[[], Iterable[Pairs]],
                 workers: int) -> Generator[Collated, None, None]:
    """The planned batches in order; the same whatever the number of workers. Close it to stop what it started."""
    fetch = Fetch(samples)
    if workers:
        yield from _by_workers(fetch, plan, workers)
    elif prefetchable(samples.dataset):
        with Prefetch(map(fetch, plan())) as ahead:
            yield from ahead
    else:
        yield from map(fetch, plan())


def prefetchable(dataset: Any) -> bool:
    """Whether a thread may build items while the student trains.

    An item that draws from the process's generators is built with them seeded and put back (data/views.py); a dropout
    that draws meanwhile would disturb both. Such items are built between steps, or by worker processes.
    """
    return hasattr(dataset, "view") or bool(getattr(dataset, "pure_items", False))


def _by_workers(fetch: Fetch, plan: Callable[[], Iterable[Pairs]], workers: int) -> Iterator[Collated]:
    # A generator of its own: without one, DataLoader draws its base seed from the generator that dropout uses.
    loader: DataLoader[Any] = DataLoader(
        fetch, batch_sampler=_Plan(plan), collate_fn=_as_it_is, num_workers=workers,    # type: ignore[arg-type]
        generator=torch.Generator())
    with warnings.catch_warnings():
        # Python 3.12 and later: forking a process that has threads; torch's own threads are idle here.
        warnings.simplefilter("ignore", DeprecationWarning)
        batches = iter(loader)
    error = None
    for batch in batches:
        if isinstance(batch, KDCacheError):
            error = batch
            break
        yield batch
    # Its workers stop when it goes. Raised with it still in this frame, the error would keep it for the garbage
    # collector, under which torch waits 5 seconds for each worker.
    del batches
    if error is not None:
        raise error


def _as_it_is(batch: Any) -> Any:
    return batch


def token_batch(batch: Batch, padding: Padding) -> Collated:
    """Inputs from the tokens of a cache: input_ids, attention_mask where lengths differ, document_start."""
    offsets = batch.offsets["token"]
    tokens, starts = batch.columns["token"].astype(np.int64), batch.columns["document_start"]
    spans = [slice(a, b) for a, b in pairwise(offsets.tolist())]
    for at, span in enumerate(spans):
        if span.start == span.stop:
            raise DataError(f"record {int(batch.records[at])} of the cache has no tokens")
    return collated_tokens([torch.from_numpy(tokens[span]) for span in spans],
                           [torch.from_numpy(np.array(starts[span], np.uint8)) for span in spans],
                           batch.columns["sample_key"], padding)
