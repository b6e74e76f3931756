"""The batches of both stages in order: from the user's dataset, by this process, a thread or
workers, or from the cache's own tokens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from kdcache.data.collate import Collated, collated_tokens, read_batch
from kdcache.data.padding import Padding
from kdcache.data.samples import Samples
from kdcache.data.workers import by_workers
from kdcache.errors import DataError
from kdcache.user.code_errors import users_code

if TYPE_CHECKING:
    from kdcache.cache.reader import Batch

T = TypeVar("T")
POLL_SECONDS = 0.5  # how soon a signal is noticed while an item is waited for
Pairs = list[tuple[int, int]]  # (sample_id, view) of each record of a batch


class Fetch:
    """Pairs -> a batch; the whole of what a worker process does."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, pairs: Pairs) -> Collated:
        return read_batch(self.samples, pairs)


def data_batches(
    samples: Samples,
    plan: Callable[[], Iterable[Pairs]],
    workers: int,
    check: Callable[[], object] | None = None,
    *,
    by_thread: bool = True,
) -> Generator[Collated, None, None]:
    """The planned batches in order; the same whatever the number of workers. Close it to stop what
    it started.

    check: called while a worker or a thread is waited for; what it raises ends the wait. by_thread:
    without workers a thread may make the next batches, where the dataset lets it.
    """
    fetch = Fetch(samples)
    if workers:
        yield from by_workers(fetch, plan, workers, check)
    elif by_thread and prefetchable(samples.dataset):
        with Prefetch(map(fetch, plan()), check=check) as ahead:
            yield from ahead
    else:
        yield from map(fetch, plan())


def prefetchable(dataset: Any) -> bool:
    """Whether a thread may build items while the student trains.

    An item that draws from the process's generators is built with them seeded and put back
    (data/views.py); a dropout that draws meanwhile would disturb both. Such items are built between
    steps, or by worker processes.
    """
    with users_code("the dataset's pure_items"):
        return hasattr(dataset, "view") or bool(getattr(dataset, "pure_items", False))


def token_batch(batch: Batch, padding: Padding) -> Collated:
    """Inputs from the tokens of a cache: input_ids, attention_mask where lengths differ,
    document_start.
    """
    offsets = batch.offsets["token"]
    tokens, starts = batch.columns["token"].astype(np.int64), batch.columns["document_start"]
    spans = [slice(a, b) for a, b in pairwise(offsets.tolist())]
    for at, span in enumerate(spans):
        if span.start == span.stop:
            raise DataError(f"record {int(batch.records[at])} of the cache has no tokens")
    return collated_tokens(
        [torch.from_numpy(tokens[span]) for span in spans],
        [torch.from_numpy(np.array(starts[span], np.uint8)) for span in spans],
        batch.columns["sample_key"],
        padding,
    )


class Prefetch(Generic[T]):
    """An iterator over `source` that a thread keeps up to `depth` items ahead.

    What the source raises is raised here, after the items before it. `check` is called while an
    item is waited for; what it raises ends the wait. `close()` stops the thread and waits for it;
    it is also called at the end, at an error, and by leaving the `with` block.
    """

    def __init__(
        self, source: Iterator[T], depth: int = 2, check: Callable[[], object] | None = None
    ) -> None:
        self._source, self._depth, self._check = source, depth, check
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="kdcache-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            while not self._changed.wait_for(lambda: self._items or self._ended, POLL_SECONDS):
                if self._check is not None:
                    self._check()
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
        self.close()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._source:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._items) < self._depth or self._stopped)
                    if self._stopped:
                        return
                    self._items.append(item)
                    self._changed.notify_all()
        except BaseException as e:  # the thread's owner raises it, whatever it is
            self._error = e
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
